"""Calls that the tests of kernels make, and where they can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import backends_of
from strategies import attention_calls, gau_calls, glu_calls, glu_linear_calls, mixed_chunk_calls

CALLS = {
    "attention": attention_calls,
    "glu": glu_calls,
    "glu_linear": glu_linear_calls,
    "gau_attention": gau_calls,
    "mixed_chunk_attention": mixed_chunk_calls,
}
pytestmark = pytest.mark.skipif(
    any("triton" not in backends_of(op) for op in CALLS), reason="no GPU, and Triton was imported without interpreting"
)


def compiled(code: str, file: Path | None = None, **variables: str) -> str:
    """What a program prints that runs where Triton compiles; in a file if it has kernels, which Triton reads there."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
    if file is not None:
        file.write_text(code)
    program = ["-c", code] if file is None else [str(file)]
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""Calls that the tests of kernels make, and where they can run."""

from __future__ import annotations

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

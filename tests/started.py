"""Processes that a test starts, each of which calls a function of a module of the tests; none outlives the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def started(module: str, rank: int, *arguments: Any, pass_fds: Sequence[int] = ()) -> subprocess.Popen[str]:
    """A process of one thread that calls `work(rank, *arguments)` of the module; arguments arrive as text."""
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); import {module} as here; "
        "here.work(int(sys.argv[2]), *sys.argv[3:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(rank), *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        pass_fds=pass_fds,
    )


@contextmanager
def killed_at_the_end(workers: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Processes, even those that come into the list meanwhile, end with the block."""
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()


def finish(workers: list[subprocess.Popen[str]], timeout: float) -> str:
    """Wait for processes that must end well, so many seconds for each, and return what they said."""
    with killed_at_the_end(workers):
        errors = [worker.communicate(timeout=timeout)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n".join(errors)
    return "".join(errors)

"""Peak memory of one call above the state before it.

On a GPU the allocator counts. On the CPU it is measured in a process of its own, where every larger tensor
has a mapping of its own (see ALLOCATOR), so that freed memory goes back to the system at once and the
resident set is what is alive.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.cases import DTYPES, draw, load, prepare, runs

# Left alone, glibc raises this threshold to 32 MiB as blocks are freed, and keeps smaller ones in its heap.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _status_kib(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None


def _max_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> bool:
    """Set the recorded peak of this process to its present size (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status_kib("VmHWM") is not None


def cpu_peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which this process's peak resident set rises during `call`. Best in a fresh process.

    Where the system cannot reset its record (not Linux), the growth of the all-time peak: exact if nothing
    larger ran before.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if _reset_peak():
        before = _status_kib("VmHWM") or 0
        result = call()
        growth = ((_status_kib("VmHWM") or 0) - before) * 1024
    else:
        start = _max_rss_bytes()
        result = call()
        growth = _max_rss_bytes() - start
    del result
    return max(growth, 0)


def cuda_peak_growth(call: Callable[[], object]) -> int:
    """Bytes of the caching allocator's peak above what was allocated before `call`."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    growth = torch.cuda.max_memory_allocated() - before
    del result
    return growth


def in_fresh_process(operation: str, case_name: str, provider: str, quick: bool, threads: int) -> dict[str, int]:
    """Peak growth in bytes of each pass of one provider, measured by `python -m bench.memory` below."""
    request = json.dumps([operation, case_name, provider, quick, threads])
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", request],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | ALLOCATOR,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        # The line that names the exception: its message may go on over many lines, a tensor's values among them.
        named = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", done.stderr, re.MULTILINE)
        raise RuntimeError(named[-1] if named else f"the memory probe ended with status {done.returncode}")
    peaks: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return peaks


def _probe(operation_name: str, case_name: str, provider_name: str, quick: bool, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    operation = load(operation_name)
    case = next(c for c in operation.cases("cpu", quick) if c.name == case_name)
    provider = next(p for p in operation.providers if p.name == provider_name)

    def calls(length: int) -> dict[str, Callable[[], object]]:
        inputs = draw(operation, case, length, "cpu", DTYPES[case.dtype])
        return runs(case, prepare(case, provider.build, inputs))

    # A small run first, so that loading libraries and starting threads is not counted.
    for call in calls(min(case.check_length, case.length) // 4).values():
        call()
    return {name: cpu_peak_growth(call) for name, call in calls(case.length).items()}


if __name__ == "__main__":
    print(json.dumps(_probe(*json.loads(sys.argv[1]))))

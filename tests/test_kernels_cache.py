"""Triton's cache of compiled kernels, when several processes fill the same one at once."""

from __future__ import annotations

import ast
import multiprocessing

import kernel_calls
import pytest
from kernel_calls import compiled

pytest.importorskip("triton")

pytestmark = [
    kernel_calls.pytestmark,
    pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here"),
]

PROGRAM = """
import hashlib, os
from multiprocessing import get_context
from pathlib import Path
import torch
from flashgau.kernels import glu
from flashgau.options import GluOptions
from flashgau.tuning.ahead import compiling_for

cache = Path(os.environ["TRITON_CACHE_DIR"])

def work(begin, results):
    gate = torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta")
    found = list(cache.rglob("*.cubin"))
    begin.wait()
    with compiling_for("sm_90") as kernels:
        glu.glu_forward(gate, gate, options=GluOptions("silu", "identity"))
    cubins = [kernel.asm["cubin"] for function in vars(glu).values() if hasattr(function, "device_caches")
              for caches in function.device_caches.values() for kernel in caches[0].values()]
    results.put((len(found), len(kernels), [hashlib.sha256(cubin).hexdigest() for cubin in cubins]))

def at_once(count):
    context = get_context("fork")
    begin, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=work, args=(begin, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    files = {str(path): path.stat().st_mtime_ns for path in cache.rglob("*")}
    return found, files

print([at_once(4), at_once(1)])
"""


def test_processes_that_fill_one_cache_at_once_get_the_same_code(tmp_path):
    """Then a fifth, which finds it there: nothing is written again, and nothing is left of what was being written."""
    printed = compiled(PROGRAM, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    (four, files), (fifth, files_after) = ast.literal_eval(printed)
    found, kernels, (code,) = four[0]
    assert (found, kernels) == (0, 1)
    assert four == [(0, 1, [code])] * 4
    assert fifth == [(1, 1, [code])]
    assert files_after == files
    assert not [path for path in files if "/tmp." in path]

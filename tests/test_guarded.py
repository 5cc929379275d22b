"""A function that a compiled kernel calls is not replaced in silence: Triton keeps what it compiled."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import kernel_calls
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from flashgau.kernels import glu

MODULES = [
    "attention_kernels",
    "flash_unit",
    "gated",
    "gau",
    "gau_kernels",
    "glu",
    "mixed_chunk_kernels",
    "norms",
    "own_scores",
    "projection",
    "rank_form",
    "sums",
    "tangent_kernels",
]

PROGRAM = """
import torch, triton, triton.language as tl
from flashgau.kernels import common, glu
from flashgau.kernels.attention import attention_with
from flashgau.kernels.common import Config
from flashgau.kernels.guarded import guarded
from flashgau.tuning.ahead import compiling_for

x = torch.empty(64, 64, dtype=torch.float16, device="meta")
words = {"activation": "silu", "up_activation": "identity", "config": Config(16, 64, 4, 1)}
forward = lambda: glu.glu_forward(x, x, **words)
backward = lambda: glu.glu_backward(x, x, x, **words)

def refused(call, *names):
    try:
        call()
    except RuntimeError as error:
        for name in (*names, "Triton keeps what it compiled", "docs/own_variant.md"):
            assert name in str(error), (name, error)
    else:
        raise AssertionError(f"{names} was replaced in silence")

@triton.jit
def instead(x, NAME: tl.constexpr):
    return x * 3.0

@triton.jit
def inner(b_s):
    return tl.sigmoid(b_s)

@triton.jit
def weight(b_s):
    return inner(b_s)

@triton.jit
def once(b):
    return b + 0

@triton.jit
def twice(b):
    return once(b) * 2

@guarded
@triton.jit
def late_kernel(p, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p + o, twice(tl.load(p + o)))

@guarded
@triton.jit
def own_kernel(p, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p + o, twice(tl.load(p + o)))

with compiling_for("sm_80") as compiled:
    # before the first launch it is compiled
    kept, glu.normal_tail = glu.normal_tail, instead
    forward()
    glu.normal_tail = kept
    refused(forward, "glu_kernel", "`normal_tail` of flashgau.kernels.glu")
    glu.normal_tail = instead
    forward()
    # a direct one, once and twice removed; in a kernel that was never launched, too
    kept, glu.activate = glu.activate, instead
    refused(forward, "glu_kernel", "`activate` of flashgau.kernels.glu")
    glu.activate = kept
    forward()
    kept = glu.slope
    glu.slope = instead
    backward()
    glu.slope = kept
    refused(backward, "glu_backward_kernel", "`slope`")
    forward()  # which does not call it
    del glu.slope
    refused(backward, "glu_backward_kernel", "`slope`")
    # functions of a user's
    own_kernel[(1,)](x, 16)
    kept, once = once, instead
    refused(lambda: late_kernel[(1,)](x, 16), "late_kernel", "`once` of __main__")  # hashed with the other's, long ago
    once = kept
    twice = instead
    refused(lambda: own_kernel[(1,)](x, 16), "own_kernel", "`twice` of __main__")
    q = torch.empty(1, 1, 64, 32, dtype=torch.float16, device="meta")
    own = lambda: attention_with(q, q, q, weight_mod=weight, config=Config(16, 16, 4, 1))
    own()
    kept, common.in_blocks = common.in_blocks, instead
    refused(own, "forward_kernel", "`in_blocks` of flashgau.kernels.common")
    common.in_blocks = kept
    own()
    inner = instead
    refused(own, "weight", "`inner` of __main__")
print(*(c.kernel for c in compiled))
"""


def test_what_was_replaced_after_compiling_is_refused(tmp_path):
    # What is compiled here is filed under wrong names.
    printed = kernel_calls.compiled(PROGRAM, tmp_path / "program.py", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    names = printed.split()
    assert names == ["glu_kernel"] * 3 + ["glu_backward_kernel", "glu_kernel", "own_kernel"] + ["forward_kernel"] * 2


def test_every_kernel_is_guarded():
    """Whatever is launched with a grid: by its name, and by where launches are written."""
    found = set()
    for name in MODULES:
        module = importlib.import_module(f"flashgau.kernels.{name}")
        text = Path(module.__file__).read_text()
        kernels = [n for n, f in vars(module).items() if type(f) is type(glu.glu_kernel) and n.endswith("_kernel")]
        here = {n for n in kernels if vars(module)[n].fn.__module__ == module.__name__}
        found |= here
        lines = text.splitlines()
        guards = [i for i, line in enumerate(lines) if line == "@guarded"]
        names = {next(x for x in lines[i:] if x.startswith("def ")).split("(")[0].removeprefix("def ") for i in guards}
        assert names == here, name
    folder = Path(glu.__file__).parent
    launched = {
        line.split("[(")[0].split()[-1].split("(")[-1].split(".")[-1]
        for path in folder.glob("*.py")
        for line in path.read_text().splitlines()
        if "_kernel[(" in line
    }
    assert launched <= found
    assert launched


@triton.jit
def two(x, NAME: tl.constexpr):
    return x * 0 + 2.0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU, and Triton compiles")
def test_interpreted_functions_may_be_replaced(monkeypatch):
    """It looks them up as Python does: before and after the first launch."""
    x = torch.randn(3, 40)
    words = {"activation": "silu", "up_activation": "identity"}
    before, _ = glu.glu_forward(x, x, **words)
    monkeypatch.setattr(glu, "activate", two)
    torch.testing.assert_close(glu.glu_forward(x, x, **words)[0], torch.full_like(x, 4.0))
    monkeypatch.undo()
    torch.testing.assert_close(glu.glu_forward(x, x, **words)[0], before)

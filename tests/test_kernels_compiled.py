"""Triton kernels compiled ahead of time: what causes a compilation, and what comes of it."""

from __future__ import annotations

from typing import Any

import kernel_calls
import pytest
from kernel_calls import compiled

pytest.importorskip("triton")

from flashgau.sass import HotLoop
from flashgau.tuning import ahead

pytestmark = kernel_calls.pytestmark


def test_fp32_products_follow_pytorchs_switches():
    """The old switch, and the new one, after which the old one may not be read."""
    program = """
import torch
from flashgau.kernels.common import matmul_precision
assert matmul_precision(torch.float32) == matmul_precision(torch.bfloat16) == "ieee"
{}
assert matmul_precision(torch.float32) == "tf32"
assert matmul_precision(torch.bfloat16) == "ieee"
"""
    for switch in (
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ):
        compiled(program.format(switch))


PREPARE = """
import torch
from flashgau.kernels.attention import attention_backward, attention_forward
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

def call(b, hq, hk, m, n, d, window, backward=False, dtype=torch.bfloat16, **options):
    q = torch.empty(b, hq, m, d, dtype=dtype, device="meta")
    k = torch.empty(b, hk, n, d, dtype=dtype, device="meta")
    options |= {"scale": 0.1, "window": window, "config": Config(16, 16, 4, 1)}
    out, lse = attention_forward(q, k, k, **options)
    if backward:
        attention_backward(out, lse, q, k, k, (out, lse), **options)
"""


def test_lengths_windows_and_batches_cause_no_compilation():
    printed = compiled(
        PREPARE
        + """
with compiling_for("sm_80") as found:
    for b, n, left in [(1, 2048, 100), (3, 4096, 256), (7, 2051, 1), (1, 2049, 0), (2, 16384, 16)]:
        call(b, 8, 2, 1, n, 64, (left, 0))
        call(b, 8, 2, n, n, 64, (left, 0), backward=True)
from flashgau.kernels import attention_kernels
for name in ("forward_kernel", "merge_kernel", "dq_kernel", "dkv_kernel"):
    kernel = getattr(attention_kernels, name)
    print(name, sum(len(cache[0]) for cache in kernel.device_caches.values()))
"""
    )
    # The forward: few rows with split keys, many rows with and without. Lengths that 16 divides or not share a kernel.
    counts = dict(line.split() for line in printed.splitlines())
    assert int(counts["forward_kernel"]) <= 3
    assert counts["merge_kernel"] == counts["dq_kernel"] == counts["dkv_kernel"] == "1"


def test_chunks_lengths_and_batches_cause_no_compilation():
    printed = compiled(
        """
import torch
from flashgau.kernels import mixed_chunk, mixed_chunk_kernels
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

choose = lambda *args, **traits: Config(16, 16, 4, 1, 16)
options = {"chunk_size": 32, "score": "relu2", "causal": True, "quad_normalizer": 32.0}
with compiling_for("sm_80"):
    for b, n in [(1, 2048), (3, 4096), (7, 2051), (1, 20), (2, 65536), (64, 128)]:
        heads = torch.empty(4, b, n, 16, dtype=torch.bfloat16, device="meta")
        v = torch.empty(b, n, 64, dtype=torch.bfloat16, device="meta")
        mixed_chunk.mixed_chunk_attention_forward(heads, v, v, **options, config=choose)
        mixed_chunk.mixed_chunk_attention_backward(v, None, heads, v, v, product=v, **options, config=choose)
for name in dir(mixed_chunk_kernels):
    caches = getattr(getattr(mixed_chunk_kernels, name), "device_caches", {})
    if caches:
        print(name, sum(len(cache[0]) for cache in caches.values()))
"""
    )
    # Sequences of one segment or of several, forward and backward in one kernel, strides that 16 divides or not.
    counts = {name: int(count) for name, count in (line.split() for line in printed.splitlines())}
    assert counts.keys() == {f"{name}_kernel" for name in ("states", "carry", "probs", "scan", "gradient", "heads")}
    assert all(count <= (6 if name == "scan_kernel" else 2) for name, count in counts.items()), counts


COUNT = """
for name in dir(module):
    caches = getattr(getattr(module, name), "device_caches", {})
    if caches:
        print(name, sum(len(cache[0]) for cache in caches.values()))
"""


def test_gated_attentions_lengths_and_batches_cause_no_compilation():
    printed = compiled(
        """
import torch
from flashgau.kernels import gau as module
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

choose = lambda *args, **traits: Config(16, 16, 4, 1, 16)
options = {"score": "relu2", "normalizer": "keys", "causal": True, "config": choose}
with compiling_for("sm_80"):
    for b, n in [(1, 512), (3, 1024), (7, 515), (2, 100), (1, 2048)]:
        for e in (64, 528):
            q = torch.empty(b, n, 16, dtype=torch.bfloat16, device="meta")
            v = torch.empty(b, n, e, dtype=torch.bfloat16, device="meta")
            module.gau_attention_forward(q, q, v, v, save=True, **options)
            module.gau_attention_backward(v, q, q, v, v, v, **options)
"""
        + COUNT
    )
    counts = {name: int(count) for name, count in (line.split() for line in printed.splitlines())}
    # Two widths of values, which are compiled in; and panels whose width 16 divides, as it always does.
    assert {"probs_kernel", "product_kernel", "gradient_kernel", "dkv_kernel", "dq_kernel"} <= counts.keys()
    assert counts["probs_kernel"] == 1
    assert all(count <= 4 for count in counts.values()), counts


def test_gated_attention_reads_nothing_of_a_packed_batch_on_the_host():
    """Offsets without values, which could not be read."""
    printed = compiled(
        """
import torch
from flashgau.kernels import gau
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

q, v = (torch.empty(1, 300, width, dtype=torch.bfloat16, device="meta") for width in (16, 528))
options = {"causal": True, "config": lambda *args, **traits: Config(16, 16, 4, 1, 16)}
options["cu_seqlens"] = torch.empty(4, dtype=torch.int32, device="meta")
with compiling_for("sm_80") as found:
    gau.gau_attention_forward(q, q, v, v, save=True, **options)
    gau.gau_attention_backward(v, q, q, v, v, v, **options)
print(*dict.fromkeys(one.kernel for one in found))
"""
    )
    assert printed == "product_kernel prologue_kernel gradient_kernel dkv_kernel dq_kernel\n"


def test_rows_of_gated_products_cause_no_compilation():
    printed = compiled(
        """
import torch
from flashgau.kernels import glu as module
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

choose = lambda *args, **traits: Config(16, 16, 4, 1, 16)
options = {"activation": "silu", "up_activation": "identity", "config": choose}
with compiling_for("sm_80"):
    for rows in (512, 4096, 515, 100, 65536):
        x, w, d = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((rows, 32), (48, 32), (rows, 48)))
        module.glu_linear_forward(x, (w, w, None, None), fused=True, save=True, **options)
        module.glu_linear_backward(d, x, (w, w, None, None), fused=True, **options)
"""
        + COUNT
    )
    counts = {name: int(count) for name, count in (line.split() for line in printed.splitlines())}
    assert counts.keys() == {"linear_kernel", "linear_backward_kernel"}
    assert all(count <= 2 for count in counts.values()), counts  # rows that 16 divides, or not


def test_every_launch_says_that_multiply_adds_are_fused():
    """Whatever the default of Triton, which differs by version: here it is off."""
    printed = compiled(
        """
import os
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
from unittest import mock
import torch, triton
from flashgau.kernels import attention_kernels, gated, gau, gau_kernels, glu, mixed_chunk_kernels, norms
from flashgau.kernels import projection, rank_form, sums, tangent_kernels
from flashgau.options import ProjectionWeights
from flashgau.tables import configured
from flashgau.tuning import compiler, lookup
from flashgau.tuning.ahead import target_of
from flashgau.tuning.shipped import ENTRIES, Operands

def choose(kernel, x, width, rows=None, options=False):
    return lookup("sm_80", kernel, x.element_size(), width, rows, options)

launched = {}

def launch(kernel, grid):
    said = launched.setdefault(kernel, set())
    return lambda *args, **keywords: said.add(keywords.get("enable_fp_fusion"))

with mock.patch.object(triton.JITFunction, "__getitem__", launch):
    for entry in ENTRIES.values():
        for kind in entry.kinds["bf16"]:
            with configured(choose):
                entry.call(kind, entry.widths[-1], Operands(torch.bfloat16))
    x, w, gamma = (torch.empty(*shape, device="meta") for shape in ((1, 8, 4), (40, 4), (2, 8)))
    q, k, v = (torch.empty(1, *shape, device="meta") for shape in ((1, 64), (65536, 64), (65536, 520)))
    gau.gau_attention_forward(q, k, v, config=choose)  # whose keys are split
    options = {"interleaved": False, "save": False, "config": choose}
    projection.gated_projection_forward(x, ProjectionWeights(w, None, gamma, None), **options)
    a, turns = torch.empty(8, device="meta"), torch.empty(5, 8, device="meta")
    rank_form.rank_form_forward(a, a, turns)
    rank_form.rank_form_backward(turns[:, 0], a, a, turns)
for module in (attention_kernels, gated, gau_kernels, glu, mixed_chunk_kernels, norms, projection, rank_form, sums,
               tangent_kernels):
    for name, kernel in vars(module).items():
        if name.endswith("_kernel") and kernel.fn.__module__ == module.__name__:
            print(name, launched.get(kernel))

def compile(name, kernel):
    print(name, {kernel().metadata.enable_fp_fusion})

x = torch.empty(2, 64, device="meta")
for target in ("sm_80", "gfx942"):
    with compiler.instead_of_launching(target, target_of(target), compile):
        glu.glu_forward(x, x, activation="silu", up_activation="identity", config=choose)
"""
    )
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert len(lines) >= 28
    assert all(said == "{True}" for _, said in lines), printed


def test_all_options_compile_together():
    compiled(
        PREPARE
        + """
for target in ("sm_80", "gfx942"):
    with compiling_for(target) as found:
        call(
            1, 6, 2, 100, 100, 40, (7, 3), backward=True, dtype=torch.float16, softcap=5.0,
            rel_bias=torch.empty(1, 6, 201, device="meta"), sinks=torch.empty(6, device="meta"),
            cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta"),
            dropout_p=0.1, dropout_seed=torch.empty(1, dtype=torch.int64, device="meta"),
        )
        call(1, 1, 1, 1, 1, 1, (1, 1), backward=True, lengths=torch.empty(1, dtype=torch.int64, device="meta"))
    assert len(found) == 9, [c.kernel for c in found]
"""
    )


def test_a_target_that_is_none_is_refused():
    with pytest.raises(ValueError, match="compile: `target` is 'h100'; expected a name such as sm_80"):
        ahead.jobs(["sm_90", "h100"])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_kernel_compiles_for_every_target(target):
    """One of each: `flashgau compile` does all of them."""
    work = [
        ahead.Job(target, "attention_forward", "bf16", 128, "causal"),
        ahead.Job(target, "glu_linear", "bf16", 0, "inference"),
        ahead.Job(target, "glu_backward", "bf16", 0, "swiglu separate"),
    ]
    for row in ahead.compile_all(work, processes=1):
        assert row.ok, row.reason
        assert row.tensor_core == (row.kernel != "glu_backward_kernel")
        assert row.registers > 0
        assert row.spills == 0


def needs(**changes: Any) -> ahead.Compiled:
    return ahead.Compiled(**{"kernel": "k", "target": "sm_80", "registers": 9, "spills": 0, "shared_bytes": 0,
                             "matrix": frozenset({"HMMA"}), "vectors": True, **changes})  # fmt: skip


def loop(spills: int) -> HotLoop:
    return HotLoop(9, {}, {}, None, None, None, None, spills, 0, True, 0, 0, 0, {})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"spills": 3}, "3 spill instructions"),
        ({"shared_bytes": 166_913}, "166913 bytes of shared memory, the device has 166912"),
        ({"spills": 3, "loops": (loop(0), loop(0))}, None),
        ({"spills": 3, "loops": None}, None),  # nobody knows where they are
        ({"spills": 3, "loops": None, "matrix": frozenset()}, "3 spill instructions"),
        ({"spills": 3, "loops": (loop(0), loop(1), loop(1))}, "2 spill instructions in a hot loop"),
        ({"matrix": frozenset()}, "no matrix instruction HMMA"),
        ({"vectors": False}, "no loads or stores of 16 bytes"),
    ],
)
def test_what_makes_a_row_bad(changes, problem):
    assert needs(**changes).problem("HMMA", vectors=True) == problem

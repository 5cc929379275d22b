"""What holds for Triton kernels beyond what their operation promises: memory, configurations, compiling."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, attention_calls, backends_of, check_agrees, gradients, outputs, randn
from torch import Tensor

import flashgau
from flashgau import kernels

pytest.importorskip("triton")
from flashgau.kernels import attention as attention_kernels
from flashgau.kernels.common import Config

from flashgau import tuning
from flashgau.tuning import ahead
from flashgau.tuning.tables import TABLES

CALLS = {"attention": attention_calls}
pytestmark = pytest.mark.skipif(
    any("triton" not in backends_of(op) for op in CALLS), reason="no GPU, and Triton was imported without interpreting"
)


# ---------------------------------------------------------------- memory


@contextmanager
def guarded_results() -> Iterator[list[Tensor]]:
    """Let every tensor that a launcher makes lie in NaN, between guards, and collect the guards."""
    guards: list[Tensor] = []
    make = Tensor.new_empty

    def guarded(x: Tensor, *shape: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count, dtype = math.prod(size), dtype or x.dtype
        if not dtype.is_floating_point:
            return make(x, size, dtype=dtype, **kwargs)
        room = make(x, count + 512, dtype=dtype, **kwargs).fill_(math.nan)
        room[:256], room[256 + count :] = 0.5, 0.5
        guards.extend((room[:256], room[256 + count :]))
        return room[256 : 256 + count].view(size)

    with mock.patch.object(Tensor, "new_empty", guarded):
        yield guards


@pytest.mark.parametrize("op", CALLS)
@given(st.data())
def test_everything_is_written_and_nothing_beside_it(op, data):
    call = data.draw(CALLS[op]("triton"))
    plain = gradients(call, backend="triton")
    with guarded_results() as guards:
        guarded = gradients(call, backend="triton")
    assert guards
    assert all((g == 0.5).all() for g in guards)
    for a, b in zip([*plain[0], *plain[1]], [*guarded[0], *guarded[1]], strict=True):
        assert torch.equal(a, b)


def test_offsets_past_two_to_the_31():
    """Rows of keys and values 2^27 elements apart; most of the memory between them is never touched."""
    n = 18
    far = torch.empty(n * 2**27, dtype=torch.float16).as_strided((1, 1, n, 8), (0, 0, 2**27, 1))
    q, near = randn(0, 1, 1, n, 8).half(), randn(1, 1, 1, n, 8).half()
    far.copy_(near)
    for causal in (True, False):
        a, b = (gradients(Call("attention", (q, x, x), {"causal": causal}), backend="triton") for x in (near, far))
        assert all(torch.equal(x, y) for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True))


# ---------------------------------------------------------------- configurations


def shipped() -> list[Config]:
    """Every configuration of every table, without warps and stages, which change no result."""
    found = {
        (c.block_m, c.block_n) for t in TABLES.values() for k in t.values() for d in k.values() for c in d.values()
    }
    return [Config(*blocks) for blocks in sorted(found)]


@pytest.mark.parametrize("config", shipped(), ids=lambda c: f"{c.block_m}x{c.block_n}")
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (40, 3), "softcap": 3.0}], ids=["causal", "window"])
def test_every_shipped_configuration_agrees(config, options):
    n = 150
    q, k, v = randn(0, 1, 3, n, 20), randn(1, 1, 1, n, 20), randn(2, 1, 1, n, 9)
    square = Config(config.block_n, config.block_n)

    def choose(kernel: str, *args: Any, **kwargs: Any) -> Config:
        return square if kernel == "attention_dbias" else config

    with mock.patch.object(tuning, "choose", choose):
        bias = randn(3, 3, 2 * n - 1) if config.block_m == config.block_n else None
        check_agrees(Call("attention", (q, k, v), {**options, "rel_bias": bias}), "triton")


@pytest.mark.parametrize("arch", TABLES)
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tables_are_complete(arch, width, itemsize):
    for entry in ahead._CALLS:
        for options in (False, True):
            rows = 1 if "few" in entry else None
            config = tuning.lookup(arch, entry.removesuffix("_few_rows"), itemsize, width, rows, options)
            assert min(config.block_m, config.block_n) >= 16
            assert config.block_m & (config.block_m - 1) == 0 == config.block_n & (config.block_n - 1)
            if entry == "attention_dbias":
                assert config.block_m == config.block_n


@pytest.mark.parametrize(
    ("shared", "major", "arch"),
    [
        (232_448, 9, "sm_90"),
        (232_448, 10, "sm_100"),
        (166_912, 8, "sm_80"),
        (101_376, 12, "sm_86"),
        (65_536, 7, "gfx942"),
    ],
)
def test_an_unknown_gpu_gets_what_fits_its_shared_memory(monkeypatch, shared, major, arch):
    properties = mock.Mock(shared_memory_per_block_optin=shared, major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert tuning.architecture(torch.device("cuda")) == arch


# ---------------------------------------------------------------- split keys


@given(st.data())
def test_parts_of_the_keys_merge_into_the_whole(data):
    """However many programs share the keys of a row, the result is that of one, to rounding."""
    call = data.draw(attention_calls("triton", dtype=torch.float32)).with_options(return_lse=True)
    results = []
    for processors in (1, 7, 400):
        with mock.patch.object(attention_kernels, "processors", lambda device, p=processors: p):
            results.append(outputs(call(backend="triton")))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(torch.isfinite(a), torch.isfinite(b))
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------- limits


def test_what_is_too_wide_goes_to_eager():
    assert kernels.SUPPORTED["attention"] == 256
    for width, reason in ((256, None), (257, "its kernels take widths of up to 256, not 257")):
        assert flashgau.ops.dispatch.explain("attention", "cpu", width=width)["triton"] == reason
    wide = randn(0, 1, 1, 3, 257)
    with pytest.raises(RuntimeError, match=r'attention: backend="triton" cannot run this call: .* up to 256, not 257'):
        flashgau.attention(wide, wide, wide, backend="triton")
    assert flashgau.ops.dispatch.default_backend("attention", "cuda", width=257) == "eager"
    assert flashgau.attention(wide, wide, wide).shape == wide.shape


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's products")
def test_hidden_blocks_and_padding_do_no_products(monkeypatch):
    from triton.runtime import interpreter

    count = 0
    dot = interpreter.InterpreterBuilder.create_dot

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return dot(*args)

    def products(length: int, **options: Any) -> int:
        nonlocal count
        count, q = 0, randn(0, 1, 1, length, 16)
        gradients(Call("attention", (q, q, q), options), backend="triton")
        return count

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(attention_kernels, "processors", lambda device: 1)  # keys are not split
    alone = products(128)
    assert alone > 0
    assert products(512, lengths=torch.tensor([128])) == alone
    whole, causal, window = products(512), products(512, causal=True), products(512, window=(40, 0))
    assert causal < 0.65 * whole
    assert window < 0.3 * whole
    assert products(1024, window=(40, 0)) < 2.2 * window


# ---------------------------------------------------------------- compiled ahead of time


def compiled(code: str) -> str:
    """What a program prints that runs where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


PREPARE = """
import torch
from flashgau.kernels.attention import attention_backward, attention_forward
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

def call(b, hq, hk, m, n, d, window, backward=False, dtype=torch.bfloat16, **options):
    q = torch.empty(b, hq, m, d, dtype=dtype, device="meta")
    k = torch.empty(b, hk, n, d, dtype=dtype, device="meta")
    options |= {"scale": 0.1, "window": window, "choose": lambda *args, **traits: Config(16, 16, 4, 1)}
    out, lse = attention_forward(q, k, k, **options)
    if backward:
        attention_backward(out, lse, q, k, k, out, lse, **options)
"""


def test_lengths_windows_and_batches_cause_no_compilation():
    printed = compiled(
        PREPARE
        + """
with compiling_for("sm_80") as found:
    for b, n, left in [(1, 2048, 100), (3, 4096, 256), (7, 2051, 1), (1, 2049, 0), (2, 16384, 16)]:
        call(b, 8, 2, 1, n, 64, (left, 0))
        call(b, 8, 2, n, n, 64, (left, 0), backward=True)
from flashgau.kernels import attention
for name in ("forward_kernel", "merge_kernel", "dq_kernel", "dkv_kernel"):
    kernel = getattr(attention, name)
    print(name, sum(len(cache[0]) for cache in kernel.device_caches.values()))
"""
    )
    # The forward: few rows with split keys, many rows with and without. Lengths that 16 divides or not share a kernel.
    counts = dict(line.split() for line in printed.splitlines())
    assert int(counts["forward_kernel"]) <= 3
    assert counts["merge_kernel"] == counts["dq_kernel"] == counts["dkv_kernel"] == "1"


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
    work = [ahead.Job(target, "attention_forward", "bf16", 128, "causal")]
    (row,) = ahead.compile_all(work, processes=1)
    assert row.ok, row.reason
    assert row.tensor_core
    assert row.registers > 0
    assert row.spills == 0


def needs(**changes: Any) -> ahead.Compiled:
    return ahead.Compiled(**{"kernel": "k", "target": "sm_80", "registers": 9, "spills": 0, "shared_bytes": 0,
                             "matrix": frozenset({"HMMA"}), **changes})  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"spills": 3}, "3 spill instructions"),
        ({"shared_bytes": 166_913}, "166913 bytes of shared memory, the device has 166912"),
        ({"matrix": frozenset()}, "no matrix instruction HMMA"),
    ],
)
def test_what_makes_a_row_bad(changes, problem):
    assert needs(**changes).problem("HMMA") == problem


def test_the_interpreter_is_refused_what_it_computes_wrongly():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and Triton compiles")
    q = randn(0, 1, 1, 3, 4).bfloat16()
    with pytest.raises(RuntimeError, match="interpreter"):
        flashgau.attention(q, q, q, backend="triton")

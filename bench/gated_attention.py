"""Causal attention with a sigmoid gate on its output: one call against attention, sigmoid and product."""

from __future__ import annotations

import torch
from torch import Tensor

import flashgau
from bench import attention
from bench.cases import FORWARD, TRAINING, BenchCase, Goal, Operation, Provider, on_tensors, ours
from flashgau import reference

SHORT = 64  # tokens of a row at which attention itself takes the least
MANY = 32768  # tokens from which on no cache holds a tensor


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case({"B": 2, "H": 2, "D": 16}, n, "fp32", "eager") for n in (32, 64)]
    heads, mine, dtypes = (8, "eager", ("fp32", "bf16")) if device == "cpu" else (32, "triton", ("bf16",))
    few, many = (4096, MANY) if device == "cpu" else (65536, 262144)
    sizes = [(many, SHORT), *((few, n) for n in (SHORT, 256, 1024, 2048, 4096))]
    return [_case({"B": t // n, "H": heads, "D": 64}, n, dtype, mine) for dtype in dtypes for t, n in sizes]


def _case(shape: dict[str, int], n: int, dtype: str, mine: str) -> BenchCase:
    # Memory bounds the time of many short rows, but not of halves on a CPU: their forward in PyTorch's kernel, on two
    # cores with AVX2, moves 1.1 GB/s where a sum into fresh memory moves 4.6.
    by_memory = shape["B"] * n >= MANY and n == SHORT and (dtype, mine) != ("bf16", "eager")
    goals = tuple(
        Goal(f"flashgau-{mine}", f"flashgau-{mine}-unfused", "speed", run, 1.05 if by_memory else 1.0)
        for run in (FORWARD, TRAINING)
    )
    forward = 2.0 * shape["B"] * shape["H"] * n * n * shape["D"]  # two products of 2 N^2 D, of which half is seen
    work = {FORWARD: forward, TRAINING: 3.5 * forward}
    return BenchCase(
        f"gated causal, {shape['B'] * n} tokens", n, dtype, shape, min(n, 1024), {"causal": True}, goals, work
    )


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    size = (case.shape["B"], case.shape["H"], length, case.shape["D"])
    return {name: torch.randn(size, generator=generator) for name in ("q", "k", "v", "gate")}


def plain(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    """The formula as a textbook writes it."""
    return torch.sigmoid(t["gate"]) * attention.plain(case, t)


def library(case: BenchCase, t: dict[str, Tensor], backend: str) -> Tensor:
    out = flashgau.attention(t["q"], t["k"], t["v"], causal=True, gate=t["gate"], backend=backend)
    assert isinstance(out, Tensor)
    return out


def unfused(backend: str) -> Provider:
    """What a user writes around a call without a gate."""

    def call(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
        return torch.sigmoid(t["gate"]) * attention.library(case, t, backend)

    devices = ("cuda",) if backend == "triton" else ("cpu", "cuda")
    return Provider(f"flashgau-{backend}-unfused", on_tensors(call), devices=devices)


def sdpa(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    return torch.sigmoid(t["gate"]) * attention.sdpa(case, t)


def oracle(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    out = reference.attention(t["q"], t["k"], t["v"], causal=True, gate=t["gate"])
    assert isinstance(out, Tensor)
    return out


OPERATION = Operation(
    name="gated_attention",
    title="Gated softmax attention",
    cases=cases,
    inputs=inputs,
    oracle=on_tensors(oracle),
    plain=on_tensors(plain),
    providers=(
        ours("eager", library),
        unfused("eager"),
        ours("triton", library),
        unfused("triton"),
        Provider("sdpa-unfused", on_tensors(sdpa)),
        Provider("plain", on_tensors(plain), attention.plain_unavailable),
    ),
)

"""The tangent of causal attention along tangents of q, k and v, beside PyTorch's own; and the tangent's gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import attention
from bench.cases import FORWARD, TRAINING, BenchCase, Goal, Operation, Provider, on_tensors, ours


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case({"B": 1, "H": 2, "D": 16}, n, "fp32", "eager") for n in (64, 128)]
    shape = {"B": 1, "H": 8 if device == "cpu" else 32, "D": 64}
    mine, dtypes = ("eager", ("fp32", "bf16")) if device == "cpu" else ("triton", ("bf16",))
    return [_case(shape, n, dtype, mine) for dtype in dtypes for n in (1024, 2048, 4096)]


def _case(shape: dict[str, int], n: int, dtype: str, mine: str) -> BenchCase:
    goals = (Goal(f"flashgau-{mine}", "sdpa-math", "speed", FORWARD, 1.5),) if n == 4096 else ()
    # Six products of 2 N^2 D, of which half is seen; for the gradients 14 more.
    forward = 6.0 * shape["B"] * shape["H"] * n * n * shape["D"]
    work = {FORWARD: forward, TRAINING: forward * 20 / 6}
    return BenchCase("tangent, causal", n, dtype, shape, min(n, 1024), {"causal": True}, goals, work)


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    size = (case.shape["B"], case.shape["H"], length, case.shape["D"])
    return {name: torch.randn(size, generator=generator) for name in ("q", "k", "v", "tq", "tk", "tv")}


def _along(call: Callable[..., Tensor], case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(case, {"q": q, "k": k, "v": v})

    tangent: Tensor = torch.func.jvp(function, (t["q"], t["k"], t["v"]), (t["tq"], t["tk"], t["tv"]))[1]
    return tangent


def library(case: BenchCase, t: dict[str, Tensor], backend: str) -> Tensor:
    return _along(partial(attention.library, backend=backend), case, t)


def sdpa(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the only one that PyTorch differentiates forward
        return _along(attention.sdpa, case, t)


OPERATION = Operation(
    name="tangents",
    title="Tangents of softmax attention",
    cases=cases,
    inputs=inputs,
    oracle=on_tensors(partial(_along, attention.oracle)),
    plain=on_tensors(partial(_along, attention.plain)),
    providers=(
        ours("eager", library),
        ours("triton", library),
        Provider("sdpa-math", on_tensors(sdpa), attention.plain_unavailable),
        Provider("plain", on_tensors(partial(_along, attention.plain)), attention.plain_unavailable),
    ),
)

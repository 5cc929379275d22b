"""Gated linear units against plain PyTorch: elementwise, from one packed tensor, with their projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import flashgau
from bench import peers
from bench.cases import DTYPES, FORWARD, TRAINING, BenchCase, Goal, Operation, Provider, on_tensors, ours
from flashgau import reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


SERIES = {
    "swiglu": {"activation": "silu", "kind": "separate"},
    "geglu": {"activation": "gelu", "kind": "separate"},
    "swiglu packed": {"activation": "silu", "kind": "packed"},
    "swiglu linear": {"activation": "silu", "kind": "linear"},
}


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case(series, n, "fp32", 64, 16) for series in SERIES for n in (64, 128)]
    mine = "flashgau-eager" if device == "cpu" else "flashgau-triton"
    others = ("plain",) if device == "cpu" else ("plain", "torch.compile", "liger")
    goals = tuple(Goal(mine, other, "speed", run, 1.0) for other in others for run in (FORWARD, TRAINING))
    width, dim = (2048, 768) if device == "cpu" else (8192, 4096)
    dtypes, lengths = ("fp32", "bf16") if device == "cpu" else ("bf16",), (2048, 4096, 8192, 16384)
    return [_case(s, n, dtype, width, dim, goals) for dtype in dtypes for s in SERIES for n in lengths]


def _case(series: str, n: int, dtype: str, width: int, dim: int, goals: tuple[Goal, ...] = ()) -> BenchCase:
    options = SERIES[series]
    if options["kind"] == "linear":
        forward = 4.0 * n * dim * width
        work = {FORWARD: forward, TRAINING: 3 * forward}
        return BenchCase(series, n, dtype, {"d": dim, "F": width}, 1024, options, (), work)
    # Three tensors move in the forward (gate, up, result), five in the backward.
    tensor = float(n * width * DTYPES[dtype].itemsize)
    work = {FORWARD: 3 * tensor, TRAINING: 8 * tensor}
    return BenchCase(series, n, dtype, {"F": width}, 1024, options, goals, work, "B")


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    width = case.shape["F"]
    if case.options["kind"] == "packed":
        return {"gate_up": torch.randn(length, 2 * width, generator=generator)}
    if case.options["kind"] == "separate":
        return {name: torch.randn(length, width, generator=generator) for name in ("gate", "up")}
    dim = case.shape["d"]
    weights = {name: torch.randn(width, dim, generator=generator) / dim**0.5 for name in ("w_gate", "w_up")}
    return {"x": torch.randn(length, dim, generator=generator)} | weights


def plain(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    """What a user writes without a library."""
    if case.options["kind"] == "packed":
        gate, up = t["gate_up"].chunk(2, dim=-1)
    elif case.options["kind"] == "separate":
        gate, up = t["gate"], t["up"]
    else:
        gate, up = F.linear(t["x"], t["w_gate"]), F.linear(t["x"], t["w_up"])
    return ACTIVATIONS[case.options["activation"]](gate) * up


def library(case: BenchCase, t: dict[str, Tensor], backend: str) -> Tensor:
    how = flashgau.glu_linear if case.options["kind"] == "linear" else flashgau.glu
    return how(*t.values(), activation=case.options["activation"], backend=backend)


def oracle(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    how = reference.glu_linear if case.options["kind"] == "linear" else reference.glu
    return how(*t.values(), activation=case.options["activation"])


def liger(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    return peers.liger("LigerSiLUMulFunction").apply(t["gate"], t["up"])


def liger_unavailable(case: BenchCase, device: str) -> str | None:
    if case.options != SERIES["swiglu"]:
        return "it has silu of two tensors, and gelu by tanh only"
    return peers.without_liger(case, device)


OPERATION = Operation(
    name="glu",
    title="Gated linear units",
    cases=cases,
    inputs=inputs,
    oracle=on_tensors(oracle),
    plain=on_tensors(plain),
    providers=(
        ours("eager", library),
        ours("triton", library),
        Provider("liger", on_tensors(liger), liger_unavailable, devices=("cuda",), overwrites=True),
        peers.compiled(plain),
        Provider("plain", on_tensors(plain)),
    ),
)

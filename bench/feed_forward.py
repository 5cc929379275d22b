"""Feed-forward layers with a gated linear unit: inside the product, or after products of the vendor's library."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import flashgau
from bench import peers
from bench.cases import FORWARD, TRAINING, BenchCase, Goal, Operation, Provider, on_tensors, ours
from flashgau import reference, tables


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case(32, n, "fp32", ()) for n in (64, 128)]
    if device == "cpu":
        goals = tuple(Goal("flashgau-eager", "plain", "speed", run, 1.0) for run in (FORWARD, TRAINING))
        return [_case(768, n, dtype, goals) for dtype in ("fp32", "bf16") for n in (2048, 4096, 8192)]
    return [_case(d, n, "bf16", _gpu_goals(d)) for d in (768, 1024, 2048, 4096) for n in (4096, 16384, 65536)]


def _gpu_goals(dim: int) -> tuple[Goal, ...]:
    bound = 1.1 if dim <= 1024 else 1.0
    best = [Goal("flashgau-triton", who, "speed", FORWARD, bound) for who in ("library", "torch.compile", "liger")]
    return (*best, Goal("flashgau-triton", "plain", "memory", TRAINING, 0.75))


def _case(dim: int, n: int, dtype: str, goals: tuple[Goal, ...]) -> BenchCase:
    hidden = -(-8 * dim // 3 // 64) * 64
    forward = 6.0 * n * dim * hidden
    work = {FORWARD: forward, TRAINING: 3 * forward}
    return BenchCase(f"swiglu d={dim}", n, dtype, {"d": dim, "F": hidden}, 512, {}, goals, work)


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    dim, hidden = case.shape["d"], case.shape["F"]
    shapes = {"w_gate": (hidden, dim), "w_up": (hidden, dim), "w_out": (dim, hidden)}
    weights = {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
    return {"x": torch.randn(length, dim, generator=generator)} | weights


def library(case: BenchCase, t: dict[str, Tensor], backend: str) -> Tensor:
    return F.linear(flashgau.glu_linear(t["x"], t["w_gate"], t["w_up"], backend=backend), t["w_out"])


def made_by(fused: bool) -> Callable[[BenchCase, dict[str, Tensor]], Tensor]:
    """Our kernels with one of the two ways to make the products."""

    def call(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
        with tables.configured(fuse_glu_linear=fused):
            return library(case, t, "triton")

    return call


def recomputing(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    return F.linear(flashgau.glu_linear(t["x"], t["w_gate"], t["w_up"], recompute=True), t["w_out"])


def plain(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    """What a user writes without a library."""
    return F.linear(F.silu(F.linear(t["x"], t["w_gate"])) * F.linear(t["x"], t["w_up"]), t["w_out"])


def liger(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    gate, up = F.linear(t["x"], t["w_gate"]), F.linear(t["x"], t["w_up"])
    return F.linear(peers.liger("LigerSiLUMulFunction").apply(gate, up), t["w_out"])


def oracle(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    return F.linear(reference.glu_linear(t["x"], t["w_gate"], t["w_up"]), t["w_out"])


OPERATION = Operation(
    name="feed_forward",
    title="Gated feed-forward layers",
    cases=cases,
    inputs=inputs,
    oracle=on_tensors(oracle),
    plain=on_tensors(plain),
    providers=(
        ours("eager", library),
        ours("triton", library),
        Provider("fused", on_tensors(made_by(True)), devices=("cuda",)),
        Provider("library", on_tensors(made_by(False)), devices=("cuda",)),
        Provider("flashgau-recompute", on_tensors(recomputing)),
        Provider("liger", on_tensors(liger), peers.without_liger, devices=("cuda",)),
        peers.compiled(plain),
        Provider("plain", on_tensors(plain)),
    ),
    x_label="rows",
)

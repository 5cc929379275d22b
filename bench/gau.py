"""The gated attention unit's core operation (relu squared scores, gate) against the plain formula."""

from __future__ import annotations

import torch
from torch import Tensor

import flashgau
from bench import peers
from bench.cases import DTYPES, FORWARD, TRAINING, BenchCase, Operation, Provider, on_tensors, ours, too_large
from flashgau import reference


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case({"B": 1, "S": 16, "E": 32}, n, "fp32") for n in (64, 128)]
    if device == "cuda":
        lengths = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
        shapes = [{"B": 1, "S": 128, "E": e} for e in (1024, 2048)]
        return [_case(shape | {"B": max(1, 8192 // n)}, n, "bf16") for shape in shapes for n in lengths]
    shape = {"B": 1, "S": 128, "E": 1024}
    return [_case(shape, n, dtype) for dtype in ("fp32", "bf16") for n in (512, 1024, 2048, 4096, 8192)]


def _case(shape: dict[str, int], n: int, dtype: str) -> BenchCase:
    # 2 N (S + E) per token, halved by the causal mask; the backward is twice that.
    forward = float(shape["B"] * n * n * (shape["S"] + shape["E"]))
    return BenchCase(
        f"causal E={shape['E']}", n, dtype, shape, 1024, {"causal": True}, (), {FORWARD: forward, TRAINING: 3 * forward}
    )


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    batch, narrow, wide = (case.shape[name] for name in "BSE")
    widths = {"q": narrow, "k": narrow, "v": wide, "gate": wide}
    return {name: torch.randn(batch, length, width, generator=generator) for name, width in widths.items()}


def plain(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    """gate * (relu(q k^T / n)^2 v) with the N x N matrix written out."""
    scores = t["q"] @ t["k"].mT / t["k"].shape[1]
    return t["gate"] * ((scores.relu() ** 2).tril() @ t["v"])


def plain_unavailable(case: BenchCase, device: str) -> str | None:
    return too_large(6.0 * case.shape["B"] * case.length**2 * DTYPES[case.dtype].itemsize, device)


def library(case: BenchCase, t: dict[str, Tensor], backend: str) -> Tensor:
    return flashgau.gau_attention(t["q"], t["k"], t["v"], t["gate"], causal=True, backend=backend)


def oracle(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    return reference.gau_attention(t["q"], t["k"], t["v"], t["gate"], causal=True)


OPERATION = Operation(
    name="gau",
    title="Gated attention unit, core operation",
    cases=cases,
    inputs=inputs,
    oracle=on_tensors(oracle),
    plain=on_tensors(plain),
    providers=(
        ours("eager", library),
        ours("triton", library),
        peers.compiled(plain, plain_unavailable),
        Provider("plain", on_tensors(plain), plain_unavailable),
    ),
)

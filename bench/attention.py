"""Causal softmax attention against PyTorch's fused kernels and the plain formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashgau
from bench.cases import (
    DTYPES,
    FORWARD,
    TRAINING,
    BenchCase,
    Goal,
    Operation,
    Problem,
    Provider,
    on_tensors,
    ours,
    too_large,
)
from flashgau import reference


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case("causal", {"B": 1, "H": 2, "D": 16}, n, "fp32", True, ()) for n in (64, 128)]
    if device == "cpu":
        shape, lengths = {"B": 1, "H": 8, "D": 64}, (512, 1024, 2048, 4096, 8192, 16384)
        return [_case("causal", shape, n, dtype, True, _cpu_goals()) for dtype in ("fp32", "bf16") for n in lengths]
    found = []
    for dim, heads in ((64, 32), (128, 16), (256, 8)):
        for causal in (False, True):
            series = f"{'causal' if causal else 'full'} D={dim}"
            for n in (512, 1024, 2048, 4096, 8192, 16384):
                shape = {"B": max(1, 16384 // n), "H": heads, "D": dim}
                goals = _gpu_goals() if n == 16384 and dim == 128 else ()
                found.append(_case(series, shape, n, "bf16", causal, goals))
    return found


def _cpu_goals() -> tuple[Goal, ...]:
    return tuple(Goal("flashgau-eager", "sdpa", "speed", run, 0.95) for run in (FORWARD, TRAINING))


def _gpu_goals() -> tuple[Goal, ...]:
    return (
        Goal("flashgau-triton", "sdpa-flash", "speed", FORWARD, 1.3),
        Goal("flashgau-triton", "sdpa-cudnn", "speed", FORWARD, 0.85),
        Goal("flashgau-triton", "sdpa-flash", "speed", TRAINING, 1.0),
    )


def _case(series: str, shape: dict[str, int], n: int, dtype: str, causal: bool, goals: tuple[Goal, ...]) -> BenchCase:
    # Two products of 2 N^2 D each forward, five backward; a causal mask leaves half.
    forward = 4.0 * shape["B"] * shape["H"] * n * n * shape["D"] / (2 if causal else 1)
    work = {FORWARD: forward, TRAINING: 3.5 * forward}
    return BenchCase(series, n, dtype, shape, 1024, {"causal": causal}, goals, work)


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    size = (case.shape["B"], case.shape["H"], length, case.shape["D"])
    return {name: torch.randn(size, generator=generator) for name in "qkv"}


def plain(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    """The formula as a textbook writes it, with its N x N scores."""
    scores = t["q"] @ t["k"].mT / math.sqrt(case.shape["D"])
    if case.options["causal"]:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ t["v"]


def plain_unavailable(case: BenchCase, device: str) -> str | None:
    one = case.shape["B"] * case.shape["H"] * case.length**2 * DTYPES[case.dtype].itemsize
    return too_large(5.0 * one, device)


def library(case: BenchCase, t: dict[str, Tensor], backend: str) -> Tensor:
    out = flashgau.attention(t["q"], t["k"], t["v"], causal=case.options["causal"], backend=backend)
    assert isinstance(out, Tensor)
    return out


def sdpa(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=case.options["causal"])


def sdpa_with(name: str, backend: SDPBackend) -> Provider:
    def call(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(case, t)

    return Provider(name, on_tensors(call), devices=("cuda",))


def flex(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """Compiled FlexAttention; its block mask is made once, as its authors advise."""
    from torch.nn.attention.flex_attention import create_block_mask

    n, mask = tensors["q"].shape[2], None
    if case.options["causal"]:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=tensors["q"].device)
    return Problem(lambda: _compiled_flex()(*tensors.values(), block_mask=mask), tensors)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def oracle(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    return reference.attention(t["q"], t["k"], t["v"], causal=case.options["causal"])


OPERATION = Operation(
    name="attention",
    title="Softmax attention",
    cases=cases,
    inputs=inputs,
    oracle=on_tensors(oracle),
    plain=on_tensors(plain),
    providers=(
        ours("eager", library),
        ours("triton", library),
        Provider("sdpa", on_tensors(sdpa), devices=("cpu",)),
        sdpa_with("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        sdpa_with("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
        Provider("flex", flex, devices=("cuda",)),
        Provider("plain", on_tensors(plain), plain_unavailable),
    ),
)

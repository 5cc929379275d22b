"""FLASH's mixed chunk attention, the core operation, against the plain formula and its own floor of time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import flashgau
from bench import peers
from bench.cases import (
    BACKWARD,
    DTYPES,
    FORWARD,
    TRAINING,
    BenchCase,
    Goal,
    Operation,
    Provider,
    on_tensors,
    ours,
    too_large,
)
from flashgau import reference

NARROW = ("quad_q", "quad_k", "lin_q", "lin_k")

# Seconds per token of E = 2048, S = 128, C = 256 in bf16: the bytes that must move, at the 4.3 TB/s an H200 copies.
FLOORS = {FORWARD: 3.1e-9, BACKWARD: 8.2e-9}
LONG = 2**14  # from here on a GPU is full
LENGTHS = (2**10, 2**12, LONG, 2**16, 2**18, 2**19, 2**20)


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case({"B": 1, "S": 16, "E": 32, "C": 16}, n, "fp32", 64) for n in (64, 128)]
    if device == "cuda":
        shapes = [{"S": 128, "E": e, "C": 256} for e in (2048, 1024)]
        return [_case(shape | {"B": max(1, 8192 // n)}, n, "bf16", 2048) for shape in shapes for n in LENGTHS]
    shape = {"B": 1, "S": 128, "E": 1024, "C": 256}
    return [_case(shape, n, dtype, 2048) for dtype in ("fp32", "bf16") for n in (2048, 4096, 8192, 16384)]


def _case(shape: dict[str, int], n: int, dtype: str, check_length: int) -> BenchCase:
    batch, narrow, wide, chunk = (shape[name] for name in "BSEC")
    # Per token 2 C (S + E) within the chunk, 4 S E for the sum over chunks and its use; backward: twice that.
    forward = float(batch * n * (2 * chunk * (narrow + wide) + 4 * narrow * wide))
    at_goal = wide == 2048 and n >= LONG
    return BenchCase(
        f"causal E={wide}",
        n,
        dtype,
        shape,
        check_length,
        {"causal": True},
        _goals(n) if at_goal else (),
        {FORWARD: forward, TRAINING: 3 * forward},
        floors={run: seconds * batch * n for run, seconds in FLOORS.items()} if at_goal else {},
    )


def _goals(n: int) -> tuple[Goal, ...]:
    mine = "flashgau-triton"
    goals = (Goal(mine, None, "floor", FORWARD, 1.8), Goal(mine, None, "floor", BACKWARD, 2.0))
    if n < LENGTHS[-1]:
        return goals
    return (*goals, *(Goal(mine, None, "flat", run, 1.1, since=LONG) for run in (FORWARD, TRAINING)))


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    batch, narrow, wide = (case.shape[name] for name in "BSE")
    drawn = {name: torch.randn(batch, length, narrow, generator=generator) for name in NARROW}
    return drawn | {name: torch.randn(batch, length, wide, generator=generator) for name in ("v", "gate")}


def plain(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    """All chunks at once, every chunk's state stored and summed by cumsum. N is a multiple of C here."""
    size = case.shape["C"]
    quad_q, quad_k, lin_q, lin_k, v = (rearrange(t[n], "b (g c) d -> b g c d", c=size) for n in (*NARROW, "v"))
    local = ((quad_q @ quad_k.mT / size).relu() ** 2).tril() @ v
    state = F.pad((lin_k.mT @ v).cumsum(1), (0, 0, 0, 0, 1, -1))  # exclusive: chunks before this one
    closed = size * torch.arange(v.shape[1], device=v.device, dtype=v.dtype).clamp(min=1)
    total = lin_q @ state / closed[:, None, None]
    return t["gate"] * rearrange(local + total, "b g c e -> b (g c) e")


def plain_unavailable(case: BenchCase, device: str) -> str | None:
    """A training step keeps about a dozen tensors as wide as v, three of states and eight of scores."""
    narrow, wide, chunk = (case.shape[name] for name in "SEC")
    per_token = 15 * wide + 3 * narrow * wide / chunk + 8 * (chunk + narrow)
    return too_large(case.shape["B"] * case.length * per_token * DTYPES[case.dtype].itemsize, device)


def library(case: BenchCase, t: dict[str, Tensor], backend: str) -> Tensor:
    operands = (t[name] for name in (*NARROW, "v", "gate"))
    out = flashgau.mixed_chunk_attention(*operands, chunk_size=case.shape["C"], causal=True, backend=backend)
    assert isinstance(out, Tensor)
    return out


def oracle(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    operands = (t[name] for name in (*NARROW, "v", "gate"))
    out = reference.mixed_chunk_attention(*operands, chunk_size=case.shape["C"], causal=True)
    assert isinstance(out, Tensor)
    return out


OPERATION = Operation(
    name="mixed_chunk",
    title="Mixed chunk attention, core operation",
    cases=cases,
    inputs=inputs,
    oracle=on_tensors(oracle),
    plain=on_tensors(plain),
    providers=(
        ours("eager", library),
        ours("triton", library),
        Provider(
            "fla",
            peers.linear_attention,
            peers.without_fla,
            devices=("cuda",),
            other="linear attention alone, without chunk-local scores and gate",
        ),
        peers.compiled(plain, plain_unavailable),
        Provider("plain", on_tensors(plain), plain_unavailable),
    ),
)

"""FLASH's mixed chunk attention, the core operation, against the plain formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import flashgau
from bench.cases import FORWARD, TRAINING, Case, Operation, Provider, on_tensors, ours
from flashgau import reference

NARROW = ("quad_q", "quad_k", "lin_q", "lin_k")


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case({"B": 1, "S": 16, "E": 32, "C": 16}, n, "fp32", 64) for n in (64, 128)]
    if device == "cuda":
        shape = {"B": 4, "S": 128, "E": 2048, "C": 256}
        return [_case(shape, n, "bf16", 2048) for n in (2048, 4096, 8192, 16384, 32768)]
    shape = {"B": 1, "S": 128, "E": 1024, "C": 256}
    return [_case(shape, n, dtype, 2048) for dtype in ("fp32", "bf16") for n in (2048, 4096, 8192, 16384)]


def _case(shape: dict[str, int], n: int, dtype: str, check_length: int) -> Case:
    batch, narrow, wide, chunk = (shape[name] for name in "BSEC")
    # Per token 2 C (S + E) within the chunk, 4 S E for the sum over chunks and its use; backward: twice that.
    forward = float(batch * n * (2 * chunk * (narrow + wide) + 4 * narrow * wide))
    return Case(
        "causal",
        n,
        dtype,
        shape,
        check_length,
        {"causal": True},
        (),
        {FORWARD: forward, TRAINING: 3 * forward},
    )


def inputs(case: Case, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    batch, narrow, wide = (case.shape[name] for name in "BSE")
    drawn = {name: torch.randn(batch, length, narrow, generator=generator) for name in NARROW}
    return drawn | {name: torch.randn(batch, length, wide, generator=generator) for name in ("v", "gate")}


def plain(case: Case, t: dict[str, Tensor]) -> Tensor:
    """All chunks at once, every chunk's state stored and summed by cumsum. N is a multiple of C here."""
    size = case.shape["C"]
    quad_q, quad_k, lin_q, lin_k, v = (rearrange(t[n], "b (g c) d -> b g c d", c=size) for n in (*NARROW, "v"))
    local = ((quad_q @ quad_k.mT / size).relu() ** 2).tril() @ v
    state = F.pad((lin_k.mT @ v).cumsum(1), (0, 0, 0, 0, 1, -1))  # exclusive: chunks before this one
    closed = size * torch.arange(v.shape[1], device=v.device, dtype=v.dtype).clamp(min=1)
    total = lin_q @ state / closed[:, None, None]
    return t["gate"] * rearrange(local + total, "b g c e -> b (g c) e")


def library(case: Case, t: dict[str, Tensor], backend: str) -> Tensor:
    operands = (t[name] for name in (*NARROW, "v", "gate"))
    out = flashgau.mixed_chunk_attention(*operands, chunk_size=case.shape["C"], causal=True, backend=backend)
    assert isinstance(out, Tensor)
    return out


def oracle(case: Case, t: dict[str, Tensor]) -> Tensor:
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
    providers=(ours("eager", library), ours("triton", library), Provider("plain", on_tensors(plain))),
)

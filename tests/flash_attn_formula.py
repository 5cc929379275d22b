"""What flash-attn's functions compute, written out row by row in fp64, and operands for them."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q (M, H, D), k (N, Hkv, D), v (N, Hkv, E) give (M, H, E) and the log-sum-exp (H, M)."""
    (m, heads, dim), n = q.shape, k.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    s = torch.einsum("mhd,nhd->hmn", q, k) * (dim**-0.5 if softmax_scale is None else softmax_scale)
    s = softcap * torch.tanh(s / softcap) if softcap > 0 else s
    distance = torch.arange(n) - (torch.arange(m)[:, None] + n - m)
    if alibi_slopes is not None:
        s = s - alibi_slopes.double()[:, None, None] * distance.abs()
    left, right = window_size
    hidden = torch.zeros(m, n, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    if causal:
        hidden |= distance > 0
    s = s.masked_fill(hidden, -math.inf)
    return torch.einsum("hmn,nhe->mhe", torch.softmax(s, -1).nan_to_num(0.0), v), s.logsumexp(-1)


heads = st.sampled_from(((1, 1), (4, 2), (3, 3), (4, 1)))
slopes = st.sampled_from((None, "heads", "rows"))


def slopes_of(kind: str | None, rows: int, count: int) -> tuple[Tensor | None, list[Tensor | None]]:
    """The argument, and each row's own."""
    if kind is None:
        return None, [None] * rows
    values = torch.rand(rows, count, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    return (values, list(values)) if kind == "rows" else (values[0], [values[0]] * rows)


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

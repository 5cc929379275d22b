"""A user's functions in attention's kernels, beside the naive formula that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sigmoid(b_s):
    return tl.sigmoid(b_s)


@triton.jit
def sigmoid_slope(b_s):
    b_p = tl.sigmoid(b_s)
    return b_p * (1 - b_p)


@triton.jit
def sigmoid_wrong_slope(b_s):
    return tl.sigmoid(b_s)


@triton.jit
def identity(b_s):
    return b_s


@triton.jit
def one(b_s):
    return tl.full(b_s.shape, 1.0, tl.float32)


@triton.jit
def relu2(b_s):
    b_r = tl.maximum(b_s, 0.0)
    return b_r * b_r


@triton.jit
def relu2_slope(b_s):
    return 2 * tl.maximum(b_s, 0.0)


@triton.jit
def bent(b_s, o_query, o_key, i_head, aux):
    """Not linear in the score, and different by head, query and key: aux holds (heads, keys)."""
    b_t = tl.load(aux + i_head * 160 + o_key) + 0.01 * (o_query - o_key)
    return b_s * b_t + 0.1 * b_s * b_s


@triton.jit
def bent_slope(b_s, o_query, o_key, i_head, aux):
    return tl.load(aux + i_head * 160 + o_key) + 0.01 * (o_query - o_key) + 0.2 * b_s


@triton.jit
def same_document(b_s, o_query, o_key, i_head, aux):
    m_same = tl.load(aux + tl.maximum(o_query, 0)) == tl.load(aux + o_key)
    return tl.where(m_same, b_s, -float("inf"))


@triton.jit
def same_document_slope(b_s, o_query, o_key, i_head, aux):
    """1 even where the score is -inf, and NaN would be no worse: what is hidden has no slope."""
    return tl.where(tl.load(aux + tl.maximum(o_query, 0)) == tl.load(aux + o_key), 1.0, float("nan"))


AUX = torch.cat([torch.linspace(0.5, 1.5, 160) * x for x in (1.0, -0.5, 0.7, 0.2)])
DOCUMENTS = (torch.arange(160) // 23).float()
Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (s, i, j, head), positions that broadcast


def naive_bent(s: Tensor, i: Tensor, j: Tensor, head: Tensor) -> Tensor:
    t = AUX.view(4, 160).to(s)[head, j] + 0.01 * (i - j).to(s.dtype)
    return s * t + 0.1 * s * s


def naive_documents(s: Tensor, i: Tensor, j: Tensor, head: Tensor) -> Tensor:
    return torch.where(DOCUMENTS[i.clamp(min=0)] == DOCUMENTS[j], s, -torch.inf)


@dataclass(frozen=True)
class Own:
    """Keywords of `attention_with`, and the same in PyTorch; None for softmax, or for scores as they are."""

    keywords: dict[str, Any]
    score: Score | None = None
    weight: Callable[[Tensor], Tensor] | None = None


_BENT = {"score_mod": bent, "score_slope": bent_slope, "aux": AUX}
_DOCUMENTS = {"score_mod": same_document, "score_slope": same_document_slope, "aux": DOCUMENTS}
_SIGMOID = {"weight_mod": sigmoid, "weight_slope": sigmoid_slope}
OWN = {
    "sigmoid": Own(_SIGMOID, weight=torch.sigmoid),
    "linear": Own({"weight_mod": identity, "weight_slope": one}, weight=lambda s: s),
    "relu2": Own({"weight_mod": relu2, "weight_slope": relu2_slope}, weight=lambda s: s.relu().square()),
    "bent softmax": Own(_BENT, naive_bent),
    "documents": Own(_DOCUMENTS, naive_documents),
    "bent sigmoid": Own(_BENT | _SIGMOID, naive_bent, torch.sigmoid),
    "documents, relu2": Own(
        _DOCUMENTS | {"weight_mod": relu2, "weight_slope": relu2_slope}, naive_documents, lambda s: s.relu().square()
    ),
}


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    own: Own,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rel_bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The formula of `attention_with`, sequence by sequence."""
    b, n_heads, m, d = q.shape
    n = k.shape[2]
    k, v = (x.repeat_interleave(n_heads // x.shape[1], 1) for x in (k, v))
    left, right = window[0], 0 if causal else window[1]
    scale = d**-0.5 if scale is None else scale

    def sequence(row: int, rows: slice, keys: slice) -> Tensor:
        qs, ks, vs = q[row, :, rows], k[row, :, keys], v[row, :, keys]
        j = torch.arange(ks.shape[1])[None, :]
        i = torch.arange(qs.shape[1])[:, None] + ks.shape[1] - qs.shape[1]
        s = qs @ ks.mT * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if own.score is not None:
            s = own.score(s, i, j, torch.arange(n_heads)[:, None, None])
        if rel_bias is not None:
            table = rel_bias if rel_bias.dim() == 2 else rel_bias[row]
            s = s + table.to(s.dtype)[:, table.shape[-1] // 2 + j - i]
        seen = torch.isfinite(s)
        if left is not None:
            seen = seen & (j >= i - left)
        if right is not None:
            seen = seen & (j <= i + right)
        if own.weight is not None:
            return torch.where(seen, own.weight(torch.where(seen, s, 0)), 0) @ vs
        s = torch.where(seen, s, -torch.inf)
        sink = s.new_full((n_heads,), -torch.inf) if sinks is None else sinks.to(s.dtype)
        s = torch.cat([s, sink[:, None, None].expand(n_heads, s.shape[1], 1)], -1)
        alive = torch.isfinite(s).any(-1, keepdim=True)
        return torch.where(alive, torch.softmax(torch.where(alive, s, 0), -1), 0)[..., :-1] @ vs

    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        ends_k = ends if cu_seqlens_k is None else cu_seqlens_k.tolist()
        spans = zip(pairwise(ends), pairwise(ends_k), strict=True)
        parts = [sequence(0, slice(*rows), slice(*keys)) for rows, keys in spans]
        return torch.cat(parts, 1)[None]
    found = []
    for row in range(b):
        stop = n if lengths is None else int(lengths[row])
        rows = stop if m == n else m
        part = sequence(row, slice(0, rows), slice(0, stop))
        found.append(torch.nn.functional.pad(part, (0, 0, 0, m - rows)))
    return torch.stack(found)

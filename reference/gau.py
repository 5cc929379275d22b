"""The gated attention unit's quadratic attention, naively."""

import math

import torch
from torch import Tensor

from .common import (
    assemble,
    blank,
    elementwise_score,
    masked_softmax,
    sequences,
    toeplitz,
    upcast,
    visible_keys,
)
from .glu import ACTIVATIONS


@upcast
def gau_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    gate_activation: str = "identity",
    score: str = "relu2",
    normalizer: str | float = "keys",
    causal: bool = False,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Quadratic gated attention, the definition: O = act(gate) * (A v), A with all M x N pairs in memory.

    With x = q k^T / n + rel_bias, A is relu(x)^2 ("relu2") or (1 + erf((x - mu) / (sigma sqrt 2))) / 2
    ("laplace"), 0 where the query may not see the key. "softmax" and "softmax_plus" are
    softmax(c q k^T / sqrt S + rel_bias) over the visible keys, c = 1 or log_512(max(visible keys, 16)).

    Args:
        q: (B, M, S), one head; query i stands at position p = i + N - M of its sequence.
        k: (B, N, S).
        v: (B, N, E).
        gate: (B, M, E); act(gate) is 1 unless given.
        gate_activation: act, from the names of `glu`.
        score: "relu2", "laplace", "softmax" or "softmax_plus".
        normalizer: n, for the first two scores: "keys" (valid keys of the sequence), "row" (keys visible to
            that query) or a number.
        causal: each query sees keys up to its own position.
        rel_bias: broadcastable to (B, 2P-1), entry P-1 + (j - p) for key j.
        lengths: (B,) valid keys of each row, and valid queries where M == N.
        cu_seqlens: (G+1,) bounds of G sequences packed in one row; needs M == N.
        backend: accepted for the common signature, and ignored.

    Returns:
        O (B, M, E).

    Source: Hua et al. 2022 (arXiv 2202.10447), section 3.1; "laplace" Ma et al. 2022 (arXiv 2209.10655),
    section 3.5; "softmax_plus" Su Jianlin's notes on FLASH.

    Example:
        >>> q = k = torch.ones(1, 2, 1)
        >>> v = torch.tensor([[[1.0], [3.0]]])
        >>> gau_attention(q, k, v, normalizer=1.0, causal=True).flatten().tolist()
        [1.0, 4.0]
    """
    batch, n_queries, width = q.shape
    bias = None if rel_bias is None else rel_bias.expand(batch, -1)
    places = sequences(batch, n_queries, k.shape[1], lengths, cu_seqlens)
    outs = []
    for place in places:
        q_s, k_s, v_s = q[place.row, place.queries], k[place.row, place.keys], v[place.row, place.keys]
        m, n = q_s.shape[0], k_s.shape[0]
        visible = visible_keys(m, n, causal, None, q.device)
        seen = visible.sum(dim=-1, keepdim=True).to(q.dtype)
        products = torch.einsum("m s, n s -> m n", q_s, k_s)
        matrix_bias = 0.0 if bias is None else toeplitz(bias[place.row], m, n).to(products.dtype)
        if score in ("softmax", "softmax_plus"):
            factor = torch.log(seen.clamp(min=16)) / math.log(512) if score == "softmax_plus" else 1.0
            a, _ = masked_softmax(factor * products / math.sqrt(width) + matrix_bias, visible)
        else:
            x = products / divisor(normalizer, n, seen) + matrix_bias
            a = elementwise_score(x, score).masked_fill(~visible, 0)
        out = torch.einsum("m n, n e -> m e", a, v_s)
        if gate is not None:
            out = ACTIVATIONS[gate_activation](gate[place.row, place.queries]) * out
        outs.append(out)
    return assemble(blank((batch, n_queries, v.shape[-1]), 0.0, q, k, v, gate, rel_bias), places, outs, dim=-2)


def divisor(normalizer: str | float, n_keys: int, seen: Tensor) -> Tensor | float:
    """Give the n that divides the products; `seen` (M, 1) counts the keys visible to each query."""
    # A query or a sequence without keys has no term to divide: any n but 0 will do there.
    if normalizer == "keys":
        return max(n_keys, 1)
    if normalizer == "row":
        return seen.clamp(min=1)
    return float(normalizer)

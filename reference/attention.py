"""FlashAttention's function, naively: softmax(scale q k^T + bias) v with the whole matrix in memory."""

import math

import torch
from einops import repeat
from torch import Tensor

from .common import assemble, blank, masked_softmax, sequences, toeplitz, upcast, visible_keys
from .glu import ACTIVATIONS


@upcast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    rel_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, the definition: O = dropout(softmax(S + mask)) v, with S of all M x N pairs.

    With a gate it is act(gate) O.

    S = scale q k^T, then softcap tanh(S / softcap), then + rel_bias, then the mask; scale = 1/sqrt(D) unless
    given. Query i stands at position p = i + N - M of its sequence. `sinks` adds one logit per head to the
    denominator. A query that sees no key gives output 0; rows of padding give output 0 and LSE -inf.

    Args:
        q: (B, Hq, M, D).
        k: (B, Hkv, N, D); query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, N, E).
        causal: each query sees keys up to its own position.
        scale: factor on q k^T.
        window: (left, right), keys in [p - left, p + right]; None on a side leaves it open.
        softcap: bound on |scale q k^T|.
        rel_bias: broadcastable to (B, Hq, 2P-1), entry P-1 + (j - p) for key j.
        sinks: (Hq,).
        lengths: (B,) valid keys of each row, and valid queries where M == N.
        cu_seqlens: (G+1,) bounds of G sequences packed in one row, of the queries.
        cu_seqlens_k: the same for the keys; `cu_seqlens` unless given.
        dropout_p: probability of dropping a weight.
        dropout_seed: which weights are dropped; drawn from torch's default generator unless given.
        gate: (B, Hq, M, E), or (B, Hq, M, 1) for one number per head.
        gate_activation: act, from the names of `glu`.
        return_lse: also give the log of the sum of exponentials.
        backend: accepted for the common signature, and ignored.

    Returns:
        O (B, Hq, M, E), or O and LSE (B, Hq, M), the latter fp32 for half inputs.

    Source: Dao et al. 2022 (arXiv 2205.14135), equations of section 2.2.

    Example:
        >>> q = k = torch.zeros(1, 1, 2, 4)
        >>> v = torch.tensor([[[[1.0], [3.0]]]])
        >>> attention(q, k, v, causal=True).flatten().tolist()
        [1.0, 2.0]
    """
    batch, heads, n_queries, width = q.shape
    heads_kv, n_keys = k.shape[1:3]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (1,))
    bias = None if rel_bias is None else rel_bias.expand(batch, heads, -1)
    group = heads // heads_kv if heads_kv else 1
    k, v = (repeat(x, "b h n d -> b (h group) n d", group=group) for x in (k, v))

    places = sequences(batch, n_queries, n_keys, lengths, cu_seqlens, cu_seqlens_k)
    outs, lses = [], []
    for place in places:
        q_s, k_s, v_s = (
            q[place.row, :, place.queries],
            k[place.row, :, place.keys],
            v[place.row, :, place.keys],
        )
        m, n = q_s.shape[1], k_s.shape[1]
        scores = scale * torch.einsum("h m d, h n d -> h m n", q_s, k_s)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + toeplitz(bias[place.row], m, n).to(scores.dtype)
        visible = visible_keys(m, n, causal, window, q.device)
        probs, lse = masked_softmax(scores, visible, None if sinks is None else sinks[:, None, None])
        if dropout_p > 0 and dropout_seed is not None:
            keep = dropout_kept(dropout_seed, dropout_p, place.number, heads, m, n).to(q.device)
            probs = probs * keep.to(probs.dtype) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
        out = torch.einsum("h m n, h n e -> h m e", probs, v_s)
        if gate is not None:
            out = ACTIVATIONS[gate_activation](gate[place.row, :, place.queries]) * out
        outs.append(out)
        lses.append(lse)

    inputs = (q, k, v, rel_bias, sinks, gate)
    out = assemble(blank((batch, heads, n_queries, v.shape[-1]), 0.0, *inputs), places, outs, dim=-2)
    if not return_lse:
        return out
    return out, assemble(blank((batch, heads, n_queries), -math.inf, *inputs), places, lses, dim=-1)


def dropout_kept(seed: int | Tensor, p: float, number: int, heads: int, m: int, n: int) -> Tensor:
    """Give the kept set of one sequence, bool (heads, m, n): a pure function of (seed, b, h, i, j).

    Weight (i, j) of head h in sequence b = `number` is kept if its word of Philox-4x32-10 is at least
    floor(2^32 p). The key is the seed, low word first; counter (j // 4, i, h, b) gives the words of four
    neighbouring keys j.
    """
    seed = int(seed)
    h, i, j = torch.arange(heads)[:, None, None], torch.arange(m)[:, None], torch.arange(n)
    counter = torch.broadcast_tensors(j // 4, i, h, torch.tensor(number))
    words = torch.stack(philox(counter, (seed & WORD, seed >> 32 & WORD)), dim=-1)
    word = words.gather(-1, (j % 4).expand(heads, m, n)[..., None]).squeeze(-1)
    return word >= math.floor(p * 2**32)


# Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", the constants of Philox-4x32.
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox-4x32: from each counter of four words and a key of two, four random words (32 bits in int64)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # The 64-bit product of two words overflows int64; half of b at a time stays below 2^48.
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & WORD

"""FLASH's mixed chunk attention, naively: quadratic inside a chunk, linear between chunks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import assemble, blank, elementwise_score, sequences, toeplitz, upcast, visible_keys
from .glu import ACTIVATIONS


@dataclass(frozen=True)
class MixedChunkState:
    """What a causal mixed chunk attention must remember of a prefix, one row per sequence.

    Attributes:
        kv: (B, S, E) sum of lin_k^T v over the closed chunks; fp32, or fp64 for fp64 inputs.
        quad_k: (B, C, S) keys of the open chunk; rows from position % C on are zero.
        lin_k: (B, C, S) its linear keys.
        v: (B, C, E) its values.
        position: (B,) int64, the number of tokens so far.
    """

    kv: Tensor
    quad_k: Tensor
    lin_k: Tensor
    v: Tensor
    position: Tensor

    @property
    def chunk_size(self) -> int:
        """The chunk length C."""
        return self.quad_k.shape[1]

    @property
    def open_tokens(self) -> Tensor:
        """Tokens in the open chunk, (B,) int64."""
        return self.position % self.chunk_size

    def select(self, index: Tensor) -> "MixedChunkState":
        """Pick or reorder the sequences: row b of the result is row index[b]."""
        return MixedChunkState(
            self.kv[index], self.quad_k[index], self.lin_k[index], self.v[index], self.position[index]
        )


@upcast
def mixed_chunk_attention(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    gate_activation: str = "identity",
    chunk_size: int = 256,
    score: str = "relu2",
    causal: bool = False,
    quad_normalizer: float | None = None,
    lin_normalizer: str | float = "tokens",
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Any = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Any]:
    """Mixed chunk attention, the definition, one chunk of C tokens after the other.

        local_g  = score(quad_Q_g quad_K_g^T / quad_normalizer + rel_bias) V_g     causal: lower triangle
        global_g = lin_Q_g (sum over h of lin_K_h^T V_h) / lin_normalizer          causal: h < g; else all h
        O_g      = act(gate_g) * (local_g + global_g)

    Each sequence is cut into chunks from its own start. With `initial_state` it continues where the state
    ends: the open chunk's tokens stand in front of the new ones, and the KV sum has its starting value.

    Args:
        quad_q: (B, N, S).
        quad_k: (B, N, S).
        lin_q: (B, N, S).
        lin_k: (B, N, S).
        v: (B, N, E).
        gate: (B, N, E); act(gate) is 1 unless given.
        gate_activation: act, from the names of `glu`.
        chunk_size: C.
        score: "relu2" or "laplace", as in `gau_attention`.
        causal: each token sees the tokens up to its own position.
        quad_normalizer: C unless given.
        lin_normalizer: "tokens" (the valid tokens in the sum: of the closed chunks if causal, else of the
            sequence) or a number.
        rel_bias: broadcastable to (B, 2P-1) with P >= C, entry P-1 + (j - p).
        lengths: (B,) valid tokens of each row.
        cu_seqlens: (G+1,) bounds of G sequences packed in one row.
        initial_state: of each sequence (batch row, or packed sequence); causal only.
        return_state: also give the state after the last valid token; causal only.
        backend: accepted for the common signature, and ignored.

    Returns:
        O (B, N, E), or O and the state.

    Source: Hua et al. 2022 (arXiv 2202.10447), section 3.2.

    Example:
        >>> x = torch.ones(1, 4, 1)
        >>> out = mixed_chunk_attention(x, x, x, x, x, chunk_size=2, quad_normalizer=1.0, causal=True)
        >>> out.flatten().tolist()
        [1.0, 2.0, 2.0, 3.0]
    """
    batch, n_tokens, width = quad_q.shape
    places = sequences(batch, n_tokens, n_tokens, lengths, cu_seqlens)
    bias = None if rel_bias is None else rel_bias.expand(batch, -1)
    quad_n = chunk_size if quad_normalizer is None else quad_normalizer
    outs, kvs, open_chunks, positions = [], [], [], []
    for place in places:
        qq, qk, lq, lk, values = (
            x[place.row, place.keys] for x in (quad_q, quad_k, lin_q, lin_k, v)
        )  # (n, S), ..., (n, E)
        new = qq.shape[0]
        position = 0
        kv = v.new_zeros(width, v.shape[-1])
        if initial_state is not None:
            g = place.number
            position = int(initial_state.position[g])
            kv = initial_state.kv[g].to(v.dtype)
            opened = position % chunk_size
            # The open chunk's keys and values come first; its queries are done, so zeros stand for them.
            qq, lq = (F.pad(x, (0, 0, opened, 0)) for x in (qq, lq))
            qk = torch.cat([initial_state.quad_k[g, :opened].to(qk.dtype), qk])
            lk = torch.cat([initial_state.lin_k[g, :opened].to(lk.dtype), lk])
            values = torch.cat([initial_state.v[g, :opened].to(values.dtype), values])
            position -= opened
        total = qq.shape[0]
        if not causal:
            kv = torch.einsum("n s, n e -> s e", lk, values)

        chunks = []
        for start in range(0, total, chunk_size):
            chunk = slice(start, start + chunk_size)
            qq_g, qk_g, lq_g, lk_g, v_g = qq[chunk], qk[chunk], lq[chunk], lk[chunk], values[chunk]
            c = qq_g.shape[0]
            x = torch.einsum("m s, n s -> m n", qq_g, qk_g) / quad_n
            if bias is not None:
                x = x + toeplitz(bias[place.row], c, c).to(x.dtype)
            visible = visible_keys(c, c, causal, None, x.device)
            local = torch.einsum("m n, n e -> m e", elementwise_score(x, score).masked_fill(~visible, 0), v_g)
            tokens = position + start if causal else total
            # Before the first closed chunk the sum is empty and its quotient 0, whatever divides it.
            lin_n = max(tokens, 1) if lin_normalizer == "tokens" else float(lin_normalizer)
            chunks.append(local + torch.einsum("m s, s e -> m e", lq_g, kv) / lin_n)
            if causal and c == chunk_size:
                kv = kv + torch.einsum("n s, n e -> s e", lk_g, v_g)
        # An empty slice stands first, so that a sequence without tokens has a result too.
        out = torch.cat([values[:0], *chunks])[total - new :]
        if gate is not None:
            out = ACTIVATIONS[gate_activation](gate[place.row, place.keys]) * out
        outs.append(out)

        closed = total - total % chunk_size
        kvs.append(kv)
        fill = (0, 0, 0, chunk_size - total % chunk_size)
        open_chunks.append([F.pad(x[closed:], fill) for x in (qk, lk, values)])
        positions.append(position + total)

    inputs = (quad_q, quad_k, lin_q, lin_k, v, gate, rel_bias)
    out = assemble(blank((batch, n_tokens, v.shape[-1]), 0.0, *inputs), places, outs, dim=-2)
    if not return_state:
        return out
    result_type = MixedChunkState if initial_state is None else type(initial_state)
    quad_ks, lin_ks, vs = zip(*open_chunks, strict=True) if open_chunks else ((), (), ())
    state = result_type(
        kv=torch.stack(kvs) if kvs else v.new_zeros(0, width, v.shape[-1]),
        quad_k=torch.stack(quad_ks) if quad_ks else v.new_zeros(0, chunk_size, width),
        lin_k=torch.stack(lin_ks) if lin_ks else v.new_zeros(0, chunk_size, width),
        v=torch.stack(vs) if vs else v.new_zeros(0, chunk_size, v.shape[-1]),
        position=torch.tensor(positions, dtype=torch.int64, device=v.device),
    )
    return out, state


@upcast
def mixed_chunk_step(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    state: Any,
    gate_activation: str = "identity",
    score: str = "relu2",
    quad_normalizer: float | None = None,
    lin_normalizer: str | float = "tokens",
    rel_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Any]:
    """One token of causal mixed chunk attention: the sequence of `state` goes on by one.

    Args:
        quad_q: (B, 1, S); `quad_k`, `lin_q`, `lin_k` alike.
        quad_k: (B, 1, S).
        lin_q: (B, 1, S).
        lin_k: (B, 1, S).
        v: (B, 1, E).
        gate: (B, 1, E); act(gate) is 1 unless given.
        state: of the tokens before; its `chunk_size` is C.
        gate_activation: see `mixed_chunk_attention`, as for the options below.
        score: "relu2" or "laplace".
        quad_normalizer: C unless given.
        lin_normalizer: "tokens" or a number.
        rel_bias: broadcastable to (B, 2P-1) with P >= C.
        backend: accepted for the common signature, and ignored.

    Returns:
        The output (B, 1, E) and the new state.

    Example:
        >>> x = torch.ones(1, 3, 1)
        >>> _, state = mixed_chunk_attention(x, x, x, x, x, chunk_size=2, causal=True, return_state=True)
        >>> y = torch.ones(1, 1, 1)
        >>> out, state = mixed_chunk_step(y, y, y, y, y, state=state, quad_normalizer=1.0)
        >>> out.item(), state.position.item()
        (3.0, 4)
    """
    out, new_state = mixed_chunk_attention.__wrapped__(
        quad_q,
        quad_k,
        lin_q,
        lin_k,
        v,
        gate,
        gate_activation=gate_activation,
        chunk_size=state.quad_k.shape[1],
        score=score,
        causal=True,
        quad_normalizer=quad_normalizer,
        lin_normalizer=lin_normalizer,
        rel_bias=rel_bias,
        initial_state=state,
        return_state=True,
    )
    return out, new_state

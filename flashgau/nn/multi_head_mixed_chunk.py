"""Mixed chunk attention in several heads: what "mc-tfm++" has in place of softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.operands import mixed_chunk_options
from ..contract.validate import Arguments
from ..ops import MixedChunkState, mixed_chunk_attention, mixed_chunk_step
from .biases import make_bias
from .cache import check_memory, check_one_token
from .initialise import linear
from .multi_head_attention import check_heads
from .rotary import RotaryEmbedding, packed_positions
from .spread import Spread, check_spread, checked, first_position


class MultiHeadMixedChunk(nn.Module):
    """Mixed chunk attention with the projections of `MultiHeadAttention`; linear in the length.

    Each head's query and key serve the quadratic part inside a chunk and the linear part between chunks.
    It has neither norm nor residual sum: a model adds them.

    Source: the MC-TFM++ ablation of [GAU] (arXiv 2202.10447), section 4.

    Args:
        dim: d, width of input and output.
        heads: H.
        kv_heads: key and value heads, a divisor of `heads`; None for as many.
        head_dim: D; None for d / heads.
        chunk_size: C.
        causal: each token sees only itself and what came before.
        rotary_dim: how many channels of q and k RoPE turns; None for all D, 0 for none.
        bias: relative bias inside a chunk, one for all heads: "none", "toeplitz", "rotary" or "t5".
        score: "relu2" or "laplace"; see `flashgau.mixed_chunk_attention`.
        linear_bias: whether the projections have biases.
        attention_fn: called in place of `flashgau.mixed_chunk_attention`, as that is: the four heads and v, the options
            by name. Decoding asks it for a state (`return_state=True`).
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> layer = MultiHeadMixedChunk(64, heads=4, chunk_size=8, causal=True)
        >>> x = torch.randn(2, 20, 64)
        >>> y, state = layer(x[:, :19], return_state=True)
        >>> step, state = layer.step(x[:, 19:], state)
        >>> bool(torch.allclose(step, layer(x)[:, 19:], atol=1e-5))
        True
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    causal: bool
    score: str
    attention_fn: Callable[..., Any] | None
    to_qkv: nn.Linear
    rotary: RotaryEmbedding | None
    rel_bias: nn.Module | None
    to_out: nn.Linear

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        chunk_size: int = 256,
        causal: bool = False,
        rotary_dim: int | None = None,
        bias: str = "toeplitz",
        score: str = "relu2",
        linear_bias: bool = False,
        attention_fn: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        args = Arguments("MultiHeadMixedChunk")
        check_heads(args, dim, heads, kv_heads, head_dim, rotary_dim)
        args.flags(causal=causal, linear_bias=linear_bias)
        mixed_chunk_options(args, chunk_size, score)
        args.function("attention_fn", attention_fn, "flashgau.mixed_chunk_attention")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"MultiHeadMixedChunk: `heads` is {heads}; expected a multiple of `kv_heads` = {kv_heads}")
        if head_dim is None and dim % heads:
            raise ValueError(
                f"MultiHeadMixedChunk: `dim` is {dim}; expected a multiple of `heads` = {heads}, or a `head_dim`"
            )
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.chunk_size, self.causal, self.score, self.attention_fn = chunk_size, causal, score, attention_fn
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.to_qkv = linear(dim, (heads + 2 * kv_heads) * head_dim, linear_bias, **factory)
        self.rotary = None if rotary_dim == 0 else RotaryEmbedding(rotary_dim or head_dim)
        self.rel_bias = make_bias(bias, heads=None, dim=head_dim, max_length=chunk_size, causal=causal, **factory)
        self.to_out = linear(heads * head_dim, dim, linear_bias, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: MixedChunkState | None = None,
        return_state: bool = False,
        inplace: bool = False,
        spread: Spread | None = None,
    ) -> Any:
        """Apply the layer to a batch of sequences, or to the next part of sequences already begun.

        Args:
            x: (B, N, d). Padding may hold any finite number.
            lengths: (B,) valid tokens of each right-padded row.
            cu_seqlens: (G+1,) bounds of G sequences packed in one row (B = 1).
            state: of the tokens before (causal layers), with B H rows; it is not changed, unless `inplace`.
            return_state: also give the state after the last valid token of each row.
            inplace: write `state`, which then is the state after, too; without gradients.
            spread: x is this process's slice of sequences that are spread over several processes
                (`flashgau.distributed.spread_tokens`); lengths and cu_seqlens speak of the whole.

        Returns:
            (B, N, d), or that and the state. Rows of padding hold finite numbers without meaning.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"MultiHeadMixedChunk: `x` has shape {tuple(x.shape)}; expected (B, N, {self.dim})")
        recurrent = return_state or state is not None
        if recurrent and not self.causal:
            raise ValueError("MultiHeadMixedChunk: only a causal layer has a state; this one is not causal")
        if recurrent and cu_seqlens is not None:
            raise ValueError(
                "MultiHeadMixedChunk: `cu_seqlens` and a state together; give each sequence a row and `lengths`"
            )
        if inplace and state is None:
            raise ValueError("MultiHeadMixedChunk: `inplace` is True without a `state`, which it would write")
        operation = self.attention_fn
        if spread is not None:
            given = {"state": state, "return_state": return_state}
            check_spread("MultiHeadMixedChunk", spread, x, attention_fn=operation, **given)
            operation = spread.mixed_chunk_attention
        batch, n, _ = x.shape
        checked(spread, lambda: self._check_packed(batch, cu_seqlens))
        if state is not None:
            check_memory("MultiHeadMixedChunk", "state", state, MixedChunkState, batch * self.heads, x)
        start: int | Tensor = first_position(spread) if state is None else state.position[:: self.heads]
        q, k, v = self._project(x, start, cu_seqlens)
        bias = None if self.rel_bias is None else self.rel_bias(self.chunk_size)
        options: dict[str, Any] = {"score": self.score, "rel_bias": bias}
        result: Any
        if state is not None and lengths is None and n == 1 and operation is None:  # in constant time
            result = mixed_chunk_step(q, k, q, k, v, state=state, inplace=inplace, **options)
        else:
            bounds = cu_seqlens
            if cu_seqlens is not None and spread is None:  # over several processes, rows may be packed alike
                # The heads' sequences follow one another in one row.
                q, k, v = (t.reshape(1, self.heads * n, self.head_dim) for t in (q, k, v))
                first = torch.arange(self.heads, device=x.device)[:, None] * n + cu_seqlens[:-1]
                bounds = torch.cat((first.flatten(), first.new_full((1,), self.heads * n)))
            options |= {"lengths": None if lengths is None else lengths.repeat_interleave(self.heads)}
            options |= {"cu_seqlens": bounds, "chunk_size": self.chunk_size, "causal": self.causal}
            options |= {"initial_state": state, "return_state": True} if recurrent else {}
            result = (operation or mixed_chunk_attention)(q, k, q, k, v, **options)
        out, after = result if recurrent else (result, None)
        if state is not None and after is not None and inplace and after is not state:
            after = state.copy_(after)
        y = self._merge(out, batch, n)
        return (y, after) if return_state else y

    def step(self, x: Tensor, state: MixedChunkState, *, inplace: bool = False) -> tuple[Tensor, MixedChunkState]:
        """The next token, in constant time and memory: x (B, 1, d) -> (B, 1, d), and the new state, or `state`."""
        check_one_token("MultiHeadMixedChunk", x)
        y, after = self(x, state=state, return_state=True, inplace=inplace)
        return y, after

    def _check_packed(self, rows: int, cu_seqlens: Tensor | None) -> None:
        if cu_seqlens is not None and rows != 1:
            raise ValueError(f"MultiHeadMixedChunk: `x` has B = {rows} rows; expected B = 1 with `cu_seqlens`")

    def _project(self, x: Tensor, start: int | Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B H, N, D)."""
        heads = self.to_qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim)).transpose(1, 2)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.rotary is not None:
            positions = None
            if cu_seqlens is not None:
                assert isinstance(start, int)  # no state goes with packed sequences
                positions = packed_positions(x.shape[1], cu_seqlens, start)
            qk = self.rotary(qk, start, positions)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        group = self.heads // self.kv_heads
        return q.flatten(0, 1), _repeat(k, group).flatten(0, 1), _repeat(v, group).flatten(0, 1)

    def _merge(self, out: Tensor, batch: int, n: int) -> Tensor:
        """Heads (B H, N, D), or (1, H N, D), to the output (B, N, d)."""
        heads = out.reshape(batch, self.heads, n, self.head_dim)
        return self.to_out(heads.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f"{self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"chunk_size={self.chunk_size}, causal={self.causal}"
        )


def _repeat(x: Tensor, group: int) -> Tensor:
    return x if group == 1 else x.repeat_interleave(group, dim=1)

"""Multi-head softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.operands import ACTIVATIONS
from ..contract.validate import Arguments
from ..ops import attention
from .biases import bias_vector, make_bias
from .cache import KeyValueCache, check_memory, check_one_token
from .initialise import linear
from .rotary import RotaryEmbedding, packed_positions
from .spread import Spread, check_spread, first_position


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt D) v in several heads, with grouped queries, RoPE, relative bias, a gate and a cache.

    It has neither norm nor residual sum: a model adds them.

    Args:
        dim: d, width of input and output.
        heads: Hq, query heads.
        kv_heads: Hkv, key and value heads, a divisor of `heads` (grouped queries); None for as many.
        head_dim: D; None for d / heads.
        causal: each token sees only itself and what came before.
        rotary_dim: how many channels of q and k RoPE turns; None for all D, 0 for none.
        bias: relative bias: "none", "toeplitz" (table), "t5" or "alibi".
        max_length: longest sequence; needed by `bias="toeplitz"` only.
        linear_bias: whether the projections have biases.
        dropout: dropout of the attention weights while training.
        gate: what multiplies each head's output, before the last projection: "none", "elementwise" (a linear layer of
            x, as wide as the heads) or "headwise" (one number per head).
        gate_activation: of the gate, an activation of `flashgau.glu`.
        attention_fn: called in place of `flashgau.attention`, as that is: q, k, v, and causal, rel_bias, lengths,
            cu_seqlens and dropout_p by name; with a gate also gate and gate_activation.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> layer = MultiHeadAttention(64, heads=4, kv_heads=2, causal=True)
        >>> x = torch.randn(2, 10, 64)
        >>> y, cache = layer(x[:, :9], return_state=True)
        >>> step, cache = layer.step(x[:, 9:], cache)
        >>> bool(torch.allclose(step, layer(x)[:, 9:], atol=1e-5))
        True
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    dropout: float
    gate_activation: str
    to_qkv: nn.Linear
    to_gate: nn.Linear | None
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
        causal: bool = False,
        rotary_dim: int | None = None,
        bias: str = "none",
        max_length: int | None = None,
        linear_bias: bool = False,
        dropout: float = 0.0,
        gate: str = "none",
        gate_activation: str = "sigmoid",
        attention_fn: Callable[..., Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        args = Arguments("MultiHeadAttention")
        check_heads(args, dim, heads, kv_heads, head_dim, rotary_dim)
        args.flags(causal=causal, linear_bias=linear_bias)
        args.function("attention_fn", attention_fn, "flashgau.attention")
        args.number("dropout", dropout, "a probability in [0, 1]", 0, 1)
        args.choice("gate", gate, ("none", "elementwise", "headwise"))
        args.choice("gate_activation", gate_activation, ACTIVATIONS)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"MultiHeadAttention: `heads` is {heads}; expected a multiple of `kv_heads` = {kv_heads}")
        if head_dim is None and dim % heads:
            raise ValueError(
                f"MultiHeadAttention: `dim` is {dim}; expected a multiple of `heads` = {heads}, or a `head_dim`"
            )
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.causal, self.dropout, self.gate_activation = causal, dropout, gate_activation
        self.attention_fn: Callable[..., Any] = attention if attention_fn is None else attention_fn
        self.to_qkv = linear(dim, (heads + 2 * kv_heads) * head_dim, linear_bias, device=device, dtype=dtype)
        gate_widths = {"elementwise": head_dim, "headwise": 1}
        self.to_gate = (
            linear(dim, heads * gate_widths[gate], linear_bias, device=device, dtype=dtype)
            if gate in gate_widths
            else None
        )
        self.rotary = None if rotary_dim == 0 else RotaryEmbedding(rotary_dim or head_dim)
        self.rel_bias = make_bias(
            bias,
            heads=heads,
            dim=head_dim,
            max_length=max_length,
            causal=causal,
            device=device,
            dtype=dtype,
        )
        self.to_out = linear(heads * head_dim, dim, linear_bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: KeyValueCache | None = None,
        return_state: bool = False,
        inplace: bool = False,
        spread: Spread | None = None,
    ) -> Any:
        """Apply the layer to a batch of sequences, or to the next part of sequences already begun.

        Args:
            x: (B, N, d). Padding may hold any finite number.
            lengths: (B,) valid tokens of each right-padded row. Without a state only.
            cu_seqlens: (G+1,) bounds of G sequences packed in one row (B = 1).
            state: cache of the tokens before (causal layers), written in place: use it without gradients.
            return_state: also give the cache after the last valid token.
            inplace: of no effect, as a cache is always written; other layers choose.
            spread: x is this process's slice of sequences that are spread over several processes
                (`flashgau.distributed.spread_tokens`); lengths and cu_seqlens speak of the whole.

        Returns:
            (B, N, d), or that and the cache. Rows of padding hold the output's bias, or 0.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"MultiHeadAttention: `x` has shape {tuple(x.shape)}; expected (B, N, {self.dim})")
        recurrent = return_state or state is not None
        if recurrent and not self.causal:
            raise ValueError("MultiHeadAttention: only a causal layer has a cache; it was made with `causal=False`")
        if recurrent and cu_seqlens is not None:
            raise ValueError(
                "MultiHeadAttention: `cu_seqlens` and a cache together; give each sequence a row and `lengths`"
            )
        if state is not None and lengths is not None:
            raise ValueError("MultiHeadAttention: `lengths` and `state` together; a cache knows each row's length")
        operation = self.attention_fn
        if spread is not None:
            own = None if operation is attention else operation
            check_spread("MultiHeadAttention", spread, x, state=state, return_state=return_state, attention_fn=own)
            operation = spread.attention
        if state is not None:
            check_memory("MultiHeadAttention", "state", state, KeyValueCache, x.shape[0], x)
        start: int | Tensor = first_position(spread) if state is None else state.start
        qk, v = self._project(x, start, cu_seqlens)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        if state is not None:
            state.append(k, v)
            k, v, lengths = state.keys, state.values, state.lengths
        elif return_state:
            state = KeyValueCache(k, v, lengths)
        out: Any = operation(
            q,
            k,
            v,
            causal=self.causal,
            rel_bias=bias_vector(self.rel_bias, k.shape[2] if spread is None else spread.total, cu_seqlens),
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0,
            **self._gate(x),
        )
        y = self.to_out(out.transpose(1, 2).flatten(2))
        return (y, state) if return_state else y

    def step(self, x: Tensor, state: KeyValueCache, *, inplace: bool = False) -> tuple[Tensor, KeyValueCache]:
        """The next token: x (B, 1, d) -> (B, 1, d), and the cache, which is always written in place."""
        check_one_token("MultiHeadAttention", x)
        y, after = self(x, state=state, return_state=True)
        return y, after

    def _gate(self, x: Tensor) -> dict[str, Any]:
        """The gate (B, Hq, N, D or 1), as an argument of attention; nothing without one."""
        if self.to_gate is None:
            return {}
        gate = self.to_gate(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return {"gate": gate, "gate_activation": self.gate_activation}

    def _project(self, x: Tensor, start: int | Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, Hq + Hkv, N, D), turned by RoPE, and values (B, Hkv, N, D)."""
        heads = self.to_qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim)).transpose(1, 2)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.rotary is not None:
            positions = None
            if cu_seqlens is not None:
                assert isinstance(start, int)  # no cache goes with packed sequences
                positions = packed_positions(x.shape[1], cu_seqlens, start)
            qk = self.rotary(qk, start, positions)
        return qk, v

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f"{self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, causal={self.causal}"
        )


def check_heads(
    args: Arguments, dim: int, heads: int, kv_heads: int, head_dim: int | None, rotary_dim: int | None
) -> None:
    """Refuse sizes that are no whole numbers; None is chosen by the layer."""
    for name, size, low in (
        ("dim", dim, 1),
        ("heads", heads, 1),
        ("kv_heads", kv_heads, 1),
        ("head_dim", head_dim, 1),
        ("rotary_dim", rotary_dim, 0),
    ):
        if size is not None:
            args.integer(name, size, low, f"an int, at least {low}")

"""What GAU and FLASH share: norm, one projection to gate, value and z, the heads made from z, and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.projection import gated_projection, projection
from ..ops.state import destination, moved
from ..ops.validate import Arguments
from .cache import check_memory, check_one_token
from .initialise import linear
from .norms import make_norm
from .offset_scale import OffsetScale
from .rotary import RotaryEmbedding, packed_positions

Memory = TypeVar("Memory")


@dataclass
class UnitState(Generic[Memory]):
    """What a causal GAU or FLASH layer remembers of a prefix.

    Attributes:
        memory: a `KeyValueCache` (GAU, grows with the prefix) or a `flashgau.MixedChunkState` (FLASH, constant size).
        previous: (B, 1, ceil(d/2)) what token shift takes from the last token; None without token shift.
    """

    memory: Memory
    previous: Tensor | None = None

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> UnitState[Memory]:
        """The state on another device or in another floating type, which may come first as with tensors."""
        device, dtype = destination("UnitState.to", device, dtype)
        memory: Any = self.memory
        previous = None if self.previous is None else moved(self.previous, device, dtype)
        return UnitState(memory.to(device, dtype), previous)


def from_preset(layer: str, spec: str, presets: Mapping[str, Mapping[str, Any]], **given: Any) -> dict[str, Any]:
    """The options of preset `spec`, each replaced by the given one unless that is None."""
    if spec not in presets:
        names = ", ".join(repr(name) for name in presets)
        raise ValueError(f"{layer}: `spec` is {spec!r}; expected one of {names}")
    return {name: presets[spec][name] if value is None else value for name, value in given.items()}


class GatedUnit(nn.Module):
    """Base of GAU and FLASH: y = post_norm(x + attend(...) W_o), [u, v, z] = silu(norm(x) W + b).

    A subclass adds the attention between `_project` and `_finish`.

    Args:
        dim: d.
        heads: how many vectors OffsetScale makes from z.
        hidden: e; None for 2 d.
        key_dim: S.
        causal: each token sees only what came before it.
        norm: normalisation before (see `norms.make_norm`).
        post_norm: normalisation after the residual sum.
        rotary_dim: how many channels of the heads RoPE turns; 0 for none.
        rotary_interleaved: RoPE pairs neighbours.
        linear_bias: whether the projections and OffsetScale have biases.
        token_shift: half of the normalised channels come from the token before.
        residual: add x.
        qk_dropout: dropout of the heads while training.
        device: where the parameters live.
        dtype: their type.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        hidden: int | None,
        key_dim: int,
        causal: bool,
        norm: str,
        post_norm: str,
        rotary_dim: int,
        rotary_interleaved: bool,
        linear_bias: bool,
        token_shift: bool,
        residual: bool,
        qk_dropout: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        args = Arguments(type(self).__name__)
        for name, width in (("dim", dim), ("hidden", hidden), ("key_dim", key_dim)):
            args.integer(name, width, 1, "an int, at least 1")
        args.integer("rotary_dim", rotary_dim, 0, "an int, at least 0")
        args.number("qk_dropout", qk_dropout, "a probability in [0, 1]", 0, 1)
        args.flags(
            causal=causal,
            rotary_interleaved=rotary_interleaved,
            linear_bias=linear_bias,
            token_shift=token_shift,
            residual=residual,
        )
        self.dim, self.hidden, self.key_dim, self.causal = dim, hidden, key_dim, causal
        self.token_shift, self.residual, self.qk_dropout = token_shift, residual, qk_dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = make_norm(norm, dim, **factory)
        self.to_hidden = linear(dim, 2 * hidden + key_dim, linear_bias, **factory)
        self.offset_scale = OffsetScale(key_dim, heads, bias=linear_bias, **factory)
        self.rotary = RotaryEmbedding(rotary_dim, interleaved=rotary_interleaved) if rotary_dim else None
        self.to_out = linear(hidden, dim, linear_bias, **factory)
        self.post_norm = make_norm(post_norm, dim, **factory)

    def _project(
        self,
        x: Tensor,
        start: int | Tensor,
        cu_seqlens: Tensor | None,
        previous: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        """Gate and value (B, N, e), every head (B, N, S), and the second result of `shift_tokens`."""
        normed, moving = self._normed(x, cu_seqlens, previous)
        gate, value, heads = gated_projection(
            normed,
            self.to_hidden.weight,
            self.to_hidden.bias,
            self.offset_scale.gamma,
            self.offset_scale.beta,
            self._angles(x, start, cu_seqlens),
            interleaved=self.rotary is not None and self.rotary.interleaved,
        )
        if self.qk_dropout:
            heads = [F.dropout(head, self.qk_dropout, self.training) for head in heads]
        return gate, value, heads, moving

    def _normed(self, x: Tensor, cu_seqlens: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """norm(x), shifted if the layer shifts tokens, and the second result of `shift_tokens`."""
        normed = self.norm(x)
        return shift_tokens(normed, previous, cu_seqlens) if self.token_shift else (normed, None)

    def _angles(self, x: Tensor, start: int | Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        """The heads' rotary angles (1 or B, N, pairs)."""
        if self.rotary is None:
            return None
        positions = None if cu_seqlens is None else packed_positions(x.shape[1], cu_seqlens)
        angles = self.rotary.angles(x[..., :1].expand(*x.shape[:2], self.key_dim), start, positions)
        return angles if angles.ndim == 3 else angles[None]

    def _finish(self, x: Tensor, out: Tensor) -> Tensor:
        residual = x if self.residual else None
        return self.post_norm(projection(out, self.to_out.weight, self.to_out.bias, residual))

    def _check(self, x: Tensor, cu_seqlens: Tensor | None, state: Any, return_state: bool, memory: type) -> None:
        name, recurrent = type(self).__name__, return_state or state is not None
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"{name}: `x` has shape {tuple(x.shape)}; expected (B, N, {self.dim})")
        if recurrent and not self.causal:
            raise ValueError(f"{name}: only a causal layer has a state; it was made with `causal=False`")
        if recurrent and cu_seqlens is not None:
            raise ValueError(f"{name}: `cu_seqlens` and a state together; give each sequence a row and `lengths`")
        if state is None:
            return
        if not isinstance(state, UnitState):
            raise TypeError(f"{name}: `state` is a {type(state).__name__}; expected a UnitState")
        check_memory(name, "state.memory", state.memory, memory, x.shape[0], x)
        previous, shape = state.previous, (x.shape[0], 1, -(-self.dim // 2))
        if previous is not None and (previous.shape != shape or previous.device != x.device):
            raise ValueError(
                f"{name}: `state.previous` has shape {tuple(previous.shape)}, on {previous.device}; "
                f"expected {shape}, on {x.device}"
            )

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next token: x (B, 1, d) -> (B, 1, d), and the new state (a cache in it is written in place)."""
        check_one_token(type(self).__name__, x)
        y, after = self(x, state=state, return_state=True)
        return y, after

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.dim}, hidden={self.hidden}, key_dim={self.key_dim}, causal={self.causal}"


def shift_tokens(x: Tensor, previous: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take the first half of the channels from the token before (zero before the first token of a sequence).

    Args:
        x: (B, N, d).
        previous: (B, 1, ceil(d/2)) the last token's half of an earlier part, or None.
        cu_seqlens: (G+1,) bounds of packed sequences.

    Returns:
        tuple: the shifted x, and the halves that move, (B, N + 1, ceil(d/2)), token i of x at i + 1.

    Example:
        >>> import torch
        >>> shift_tokens(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), None, None)[0].tolist()
        [[[0.0, 2.0], [1.0, 4.0]]]
    """
    moving, staying = x.chunk(2, dim=-1)
    if previous is None:
        previous = moving.new_zeros(x.shape[0], 1, moving.shape[-1])
    moving = torch.cat((previous.to(moving.dtype), moving), dim=1)
    before = moving[:, :-1]
    if cu_seqlens is not None:
        starts = torch.zeros(moving.shape[1], dtype=torch.bool, device=x.device)
        before = before.masked_fill(starts.index_fill(0, cu_seqlens.long(), True)[:-1, None], 0.0)
    return torch.cat((before, staying), dim=-1), moving


def last_shifted(moving: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """What the next token of each row takes from its last valid one: `previous` for `shift_tokens`."""
    if moving is None or lengths is None:
        return None if moving is None else moving[:, -1:]
    return moving[torch.arange(moving.shape[0], device=moving.device), lengths.long()].unsqueeze(1)

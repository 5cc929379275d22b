"""What GAU and FLASH share: norm, one projection to gate, value and z, the heads made from z, and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.validate import Arguments, readable
from ..ops.projection import gated_heads, gated_projection, projection
from ..ops.state import destination, moved
from ..options import Angles
from .biases import make_bias
from .cache import check_memory, check_one_token
from .initialise import is_plain, linear
from .norms import make_norm
from .offset_scale import OffsetScale
from .rotary import RotaryEmbedding, packed_positions
from .spread import Spread

Memory = TypeVar("Memory")


@dataclass
class UnitState(Generic[Memory]):
    """What a causal GAU or FLASH layer remembers of a prefix.

    Attributes:
        memory: a `KeyValueCache` (GAU, grows with the prefix) or a `flashgau.MixedChunkState` (FLASH, constant size).
        previous: (B, 1, ceil(d/2)) what token shift takes from the last token; None without token shift.
        steps: what a layer has made for the tokens that write this state, if any; of no other, nor of a copy.
    """

    memory: Memory
    previous: Tensor | None = None
    steps: Any = field(default=None, init=False, repr=False, compare=False)

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> UnitState[Memory]:
        """The state on another device or in another floating type, which may come first as with tensors."""
        device, dtype = destination("UnitState.to", device, dtype)
        memory: Any = self.memory
        previous = None if self.previous is None else moved(self.previous, device, dtype)
        return replace(self, memory=memory.to(device, dtype), previous=previous)

    def clone(self) -> UnitState[Memory]:
        """A state of its own with the same values: to continue twice from one prefix, in place."""
        memory: Any = self.memory
        return replace(self, memory=memory.clone(), previous=None if self.previous is None else self.previous.clone())

    @property
    def rows(self) -> int:
        """How many sequences it has."""
        memory: Any = self.memory
        return int(memory.rows)

    def truncate(self, tokens: int) -> UnitState[Memory]:
        """The state before the last `tokens` tokens of every row; nothing is copied that need not be."""
        if self.previous is not None and tokens:
            raise ValueError("truncate: a layer with token shift does not remember the token before; expected 0 tokens")
        memory: Any = self.memory
        return UnitState(memory.truncate(tokens), self.previous)

    def copy_(self, other: UnitState[Memory]) -> None:
        """Take another state's values, in place."""
        self.advanced(other.memory, other.previous)

    def reorder(self, index: Tensor) -> None:
        """Let each row continue from row index[b] (B,) instead, in place: for beam search."""
        memory: Any = self.memory
        memory.reorder(index)
        if self.previous is not None:
            self.previous.copy_(self.previous[index])

    def advanced(self, memory: Memory, previous: Tensor | None) -> UnitState[Memory]:
        """Take another's values, in place."""
        if memory is not self.memory:
            mine: Any = self.memory
            mine.copy_(memory)
        if previous is not None and self.previous is not None:
            self.previous.copy_(previous)
        return self


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """What a preset decides of GAU and FLASH layers alike. The defaults are what the paper has.

    Attributes:
        norm: normalisation before (see `norms.make_norm`).
        post_norm: normalisation after the residual sum.
        bias: relative bias (see `biases.make_bias`).
        bias_scale: factor of the T5 bias.
        rotary_dim: how many channels of the heads RoPE turns; 0 for none.
        rotary_interleaved: RoPE pairs neighbours.
        score: of query and key.
        linear_bias: whether the projections and OffsetScale have biases.
        token_shift: half of the normalised channels come from the token before.
    """

    norm: str = "scalenorm"
    post_norm: str = "none"
    bias: str
    bias_scale: float = 1.0
    rotary_dim: int
    rotary_interleaved: bool = False
    score: str = "relu2"
    linear_bias: bool = True
    token_shift: bool = False


Options = TypeVar("Options", bound=UnitOptions)


def chosen(layer: str, presets: Mapping[str, Options], spec: str, given: Mapping[str, Any]) -> Options:
    """The preset called `spec`, with what `given` has under the name of a field, unless that is None."""
    if spec not in presets:
        raise ValueError(f"{layer}: `spec` is {spec!r}; expected one of {', '.join(map(repr, presets))}")
    names = [preset.name for preset in fields(presets[spec])]
    return replace(presets[spec], **{name: given[name] for name in names if given[name] is not None})


class GatedUnit(nn.Module):
    """Base of GAU and FLASH: y = post_norm(x + attend(...) W_o), [u, v, z] = silu(norm(x) W + b).

    A subclass adds the attention between `_heads` and `_output`.

    Args:
        dim: d.
        heads: how many vectors OffsetScale makes from z.
        options: what the preset and the arguments in its place decide.
        hidden: e; None for 2 d.
        key_dim: S.
        causal: each token sees only what came before it.
        max_length: longest sequence (chunk) of a bias that is a table.
        residual: add x.
        qk_dropout: dropout of the heads while training.
        factory: device and dtype of the parameters.
    """

    dim: int
    hidden: int
    key_dim: int
    causal: bool
    score: str
    token_shift: bool
    residual: bool
    qk_dropout: float
    norm: nn.Module
    to_hidden: nn.Linear
    offset_scale: OffsetScale
    rotary: RotaryEmbedding | None
    to_out: nn.Linear
    post_norm: nn.Module
    rel_bias: nn.Module | None

    def __init__(
        self,
        dim: int,
        heads: int,
        options: UnitOptions,
        *,
        hidden: int | None,
        key_dim: int,
        causal: bool,
        max_length: int | None,
        residual: bool,
        qk_dropout: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        args = Arguments(type(self).__name__)
        for name, width in (("dim", dim), ("hidden", hidden), ("key_dim", key_dim)):
            args.integer(name, width, 1, "an int, at least 1")
        args.integer("rotary_dim", options.rotary_dim, 0, "an int, at least 0")
        args.number("qk_dropout", qk_dropout, "a probability in [0, 1]", 0, 1)
        args.flags(
            causal=causal,
            rotary_interleaved=options.rotary_interleaved,
            linear_bias=options.linear_bias,
            token_shift=options.token_shift,
            residual=residual,
        )
        self.dim, self.hidden, self.key_dim, self.causal = dim, hidden, key_dim, causal
        self.score, self.token_shift = options.score, options.token_shift
        self.residual, self.qk_dropout = residual, qk_dropout
        self.norm = make_norm(options.norm, dim, **factory)
        self.to_hidden = linear(dim, 2 * hidden + key_dim, options.linear_bias, **factory)
        self.offset_scale = OffsetScale(key_dim, heads, bias=options.linear_bias, **factory)
        turned, interleaved = options.rotary_dim, options.rotary_interleaved
        self.rotary = RotaryEmbedding(turned, interleaved=interleaved) if turned else None
        self.to_out = linear(hidden, dim, options.linear_bias, **factory)
        self.post_norm = make_norm(options.post_norm, dim, **factory)
        self.rel_bias = make_bias(
            options.bias,
            heads=None,
            dim=key_dim,
            max_length=max_length,
            causal=causal,
            scale=options.bias_scale,
            **factory,
        )

    def _normed(
        self, x: Tensor, cu_seqlens: Tensor | None, previous: Tensor | None, spread: Spread | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """norm(x), shifted if the layer shifts tokens; and then what `shift_tokens` gives besides."""
        normed = self.norm(x)
        if not self.token_shift:
            return normed, None
        if spread is None:
            return shift_tokens(normed, previous, cu_seqlens)
        return shift_tokens(normed, spread.before(normed.chunk(2, dim=-1)[0]), cu_seqlens, spread.start)

    def _prepare(
        self,
        x: Tensor,
        start: int | Tensor,
        cu_seqlens: Tensor | None,
        previous: Tensor | None,
        spread: Spread | None,
    ) -> tuple[Tensor, Tensor | None, Angles]:
        """What `_normed` gives, and the rotary embedding.

        Its cosines and sines are (1 or B, N, pairs), for all heads.
        """
        return *self._normed(x, cu_seqlens, previous, spread), self._angles(x, start, cu_seqlens)

    def _angles(self, x: Tensor, start: int | Tensor, cu_seqlens: Tensor | None) -> Angles:
        if self.rotary is None:
            return Angles()
        positions = None
        if cu_seqlens is not None:
            assert isinstance(start, int)  # no state goes with packed sequences
            positions = packed_positions(x.shape[1], cu_seqlens, start)
        heads = x[..., :1].expand(*x.shape[:2], self.key_dim)
        cos, sin = (t if t.ndim == 3 else t[None] for t in self.rotary.turns(heads, start, positions))
        return Angles(cos, sin, self.rotary.interleaved)

    def _heads(self, normed: Tensor, angles: Angles, raw_gate: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gate, with `raw_gate` before its silu, and value (B, N, e), and every head (B, N, S)."""
        hidden, scale = self.to_hidden, self.offset_scale
        if is_plain(hidden):
            gate, value, heads = gated_projection(
                normed, hidden.weight, hidden.bias, scale.gamma, scale.beta, angles, raw_gate=raw_gate
            )
        else:
            gate, value, heads = gated_heads(hidden(normed), scale.gamma, scale.beta, raw_gate, angles)
        if self.qk_dropout:
            heads = [F.dropout(head, self.qk_dropout, self.training) for head in heads]
        return gate, value, heads

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        """x + out W_o + b_o."""
        if not is_plain(self.to_out):
            y: Tensor = self.to_out(out)
            return x + y if self.residual else y
        return projection(out, self.to_out.weight, self.to_out.bias, x if self.residual else None)

    def _check(
        self, x: Tensor, cu_seqlens: Tensor | None, state: Any, return_state: bool, memory: type, inplace: bool = False
    ) -> None:
        if inplace and state is None:
            raise ValueError(f"{type(self).__name__}: `inplace` is True without a `state`, which it would write")
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

    def step(self, x: Tensor, state: Any, *, inplace: bool = False) -> tuple[Tensor, Any]:
        """The next token: x (B, 1, d) -> (B, 1, d), and the new state: `state` itself if it is written `inplace`.

        A key/value cache in it is always written in place.
        """
        check_one_token(type(self).__name__, x)
        y, after = self(x, state=state, return_state=True, inplace=inplace)
        return y, after

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.dim}, hidden={self.hidden}, key_dim={self.key_dim}, causal={self.causal}"


def start_of(position: Tensor) -> int | Tensor:
    """Where the next token of each row stands: one number if all rows agree, and telling that costs nothing."""
    if position.device.type != "cpu" or not readable(position):
        return position
    at = position.tolist()
    return at[0] if at and at == at[:1] * len(at) else position


def shift_tokens(
    x: Tensor, previous: Tensor | None, cu_seqlens: Tensor | None, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Take the first half of the channels from the token before (zero before the first token of a sequence).

    Args:
        x: (B, N, d).
        previous: (B, 1, ceil(d/2)) the last token's half of an earlier part, or None.
        cu_seqlens: (G+1,) bounds of packed sequences.
        start: how many tokens of the packed row come before x.

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
        before = before.masked_fill(packed_positions(x.shape[1], cu_seqlens, start)[:, None] == 0, 0.0)
    return torch.cat((before, staying), dim=-1), moving


def last_shifted(moving: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """What the next token of each row takes from its last valid one: `previous` for `shift_tokens`."""
    if moving is None or lengths is None:
        return None if moving is None else moving[:, -1:]
    return moving[torch.arange(moving.shape[0], device=moving.device), lengths.long()].unsqueeze(1)

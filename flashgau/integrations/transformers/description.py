"""Which keys every query sees, as flashgau says it: a pattern within sequences, in one tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import pytorch
from ..packing import end_to_end

# A mask as it travels through a model: an int64 tensor (1, L, 1, 1), since a mask of four axes is what transformers
# hands on untouched. Its first numbers are _HEADER; the rest is `lengths`, or cu_seqlens of queries and of keys, and
# zeros. It stands on the axis of heads, longer than any model has heads: where a model adds its mask to scores by
# itself, however it slices it before, the shapes do not fit.
_HEADER, _LONGER_THAN_HEADS = 8, 1024
_MAGIC = 0x666C617368676175  # "flashgau" in ASCII: tells our tensors from a mask that a user made
_PLAIN, _LENGTHS, _PACKED = range(3)
_UNBOUNDED = -1
_FACTS = "_flashgau_facts"


class _Facts(NamedTuple):
    """What a mask says that must be known on the host: the layers read it without waiting for the device."""

    kind: int
    left: int
    right: int
    batch: int
    queries: int
    keys: int
    sequences: int


class _Pattern(NamedTuple):
    """Keys [p - left, p + right] of the same sequence; None is unbounded."""

    left: int | None
    right: int | None

    def __str__(self) -> str:
        kind = {0: "causal", None: "bidirectional"}.get(self.right, f"{self.right} keys ahead")
        return kind if self.left is None else f"{kind} with {self.left} keys back"

    @property
    def self_attention(self) -> bool:
        """Whether positions matter: then query i is itself a token of the keys, and may be padding."""
        return self != (None, None)


class _Place(NamedTuple):
    """Sizes of a batch: query i of a row stands where key i + shift does."""

    batch: int
    queries: int
    keys: int
    shift: int | Tensor
    device: torch.device | str

    @property
    def aligned(self) -> bool:
        """Whether the last query stands at the last key, as far as the host knows."""
        return isinstance(self.shift, int) and self.shift + self.queries == self.keys


class _Runs(NamedTuple):
    """The keys of each row that are tokens: first .. end - 1, two tensors (B,); and what the host knows of them."""

    first: Tensor
    end: Tensor
    padded: bool
    on_the_right_only: bool
    too_short: bool


def _describe(pattern: _Pattern, runs: _Runs, borders: Tensor | None, place: _Place) -> Tensor:
    """The tensor that says `pattern` within the sequences that padding, cache and packing leave."""
    if borders is not None:
        starts = torch.cat([borders.flatten().nonzero()[:, 0], runs.end.new_full((1,), borders.numel())])
        return _encode(_PACKED, pattern, place, starts, starts)
    if not pattern.self_attention:
        if not runs.padded:
            return _encode(_PLAIN, pattern, place)
        if runs.on_the_right_only and place.queries != place.keys:  # equal lengths would hide queries as well
            return _encode(_LENGTHS, pattern, place, runs.end)
        skipped, number, seen = (
            torch.zeros_like(runs.end),
            torch.full_like(runs.end, place.queries),
            runs.end - runs.first,
        )
        return _encode(_PACKED, pattern, place, *_packed(skipped, number, runs.first, seen, place))

    if runs.too_short:
        raise ValueError(
            "flashgau: `attention_mask` ends before the last query; expected it to cover the new tokens, too"
        )
    if pattern.right != 0 and not place.aligned:
        raise ValueError(
            f"flashgau: {place.queries} queries beside {place.keys} keys in a mask that is {pattern}; expected the "
            "last query to stand at the last key"
        )
    if isinstance(place.shift, int) and place.shift + place.queries > place.keys:
        raise ValueError(
            f"flashgau: query {place.queries - 1} stands at key {place.shift + place.queries - 1} of {place.keys}"
        )
    if place.aligned and not runs.padded:
        return _encode(_PLAIN, pattern, place)
    if place.aligned and place.queries == place.keys and runs.on_the_right_only:
        return _encode(_LENGTHS, pattern, place, runs.end)
    start, stop = runs.first.clamp(min=place.shift), runs.end.clamp(max=place.shift + place.queries)
    number = (stop - start).clamp(min=0)  # queries that are tokens
    some = number > 0
    skipped, seen = torch.where(some, start - place.shift, 0), torch.where(some, stop - runs.first, 0)
    return _encode(_PACKED, pattern, place, *_packed(skipped, number, runs.first, seen, place))


def _packed(skipped: Tensor, number: Tensor, first: Tensor, seen: Tensor, place: _Place) -> tuple[Tensor, Tensor]:
    """cu_seqlens of queries and keys, all rows end to end: in each row `number` queries that see `seen` keys, and
    the others before and after them, apart."""
    none = torch.zeros_like(number)
    return end_to_end(
        (skipped, none),
        (none, first),
        (number, seen),
        (place.queries - skipped - number, none),
        (none, place.keys - first - seen),
    )


class _Mask(Tensor):
    """A mask that says what it is to a model that computes with it: adds it to scores, or asks which keys are 0."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling() and (name := function.__name__.strip("_")) in _ARITHMETIC:
            raise ValueError(
                f"flashgau: this model computes with its attention mask by itself ({name}), which is flashgau's own "
                "description of sequences and no matrix (B, H, M, N); expected a model that hands its mask to the "
                "attention interface of transformers as it is, and adds no bias to it (relative positions, dynamic "
                "masks). attn_implementation='sdpa' or 'eager' can compute it"
            )
        with pytorch.without_subclasses():
            result = function(*args, **(kwargs or {}))
            # A slice or a copy still is a mask; what is read from it is not.
            return result.as_subclass(cls) if isinstance(result, Tensor) and result.ndim == 4 else result

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()


_ARITHMETIC = {
    "add", "bitwise_and", "bitwise_not", "bitwise_or", "div", "eq", "floordiv", "ge", "gt", "invert", "le",
    "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "mul", "ne", "neg", "radd", "rmul", "rsub", "sub",
    "truediv", "where", "and", "or", "rand", "ror",
}  # fmt: skip


def _encode(kind: int, pattern: _Pattern, place: _Place, *data: Tensor) -> Tensor:
    """Facts and data in one tensor, so that whatever moves or keeps the mask moves and keeps them all."""
    left, right = (_UNBOUNDED if side is None else side for side in pattern)
    sequences = data[0].shape[0] if data else 0
    facts = _Facts(kind, left, right, place.batch, place.queries, place.keys, sequences)
    header = torch.tensor([_MAGIC, *facts], dtype=torch.int64).to(place.device)
    numbers = torch.cat([header, *(x.to(torch.int64) for x in data)])
    mask = nn.functional.pad(numbers, (0, max(0, _LONGER_THAN_HEADS - len(numbers))))[None, :, None, None]
    # torch.export knows tensors of its own kind only.
    if pytorch.without_subclasses is not None and not torch.compiler.is_exporting():
        mask = mask.as_subclass(_Mask)
    setattr(mask, _FACTS, tuple(facts))
    return mask


def _facts(mask: Any) -> _Facts:
    """What the host must know of a mask; a copy of it that lost this (on another device) is read, which waits."""
    known = getattr(mask, _FACTS, None)
    if known is None:
        ours = isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.shape == (1, mask.numel(), 1, 1)
        values = mask.flatten()[:_HEADER].tolist() if ours and mask.numel() >= _LONGER_THAN_HEADS else [0]
        if values[0] != _MAGIC:
            what = (
                f"a {mask.dtype} tensor of shape {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else type(mask).__name__
            )
            raise ValueError(
                f"flashgau: `attention_mask` of a layer is {what}; expected what flashgau's own mask function made, "
                "from a mask (B, N) of valid tokens or none. Masks of four axes, and models that make masks without "
                "transformers' masking_utils, need attn_implementation='sdpa' or 'eager'"
            )
        known = tuple(values[1:])
        setattr(mask, _FACTS, known)
    return _Facts(*known)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:8]))}, ..., {values[-1]}]"

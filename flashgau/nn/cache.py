"""The key/value cache of attention layers that decode, and what a layer asks of the state that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract.validate import FLOATING, Arguments
from ..ops import MixedChunkState
from ..ops.state import destination, moved


class KeyValueCache:
    """Keys and values of the tokens so far: grown by doubling, written in place, one length per row.

    A new token costs the copy of one row; the buffer is copied only when it doubles. Because it is written in
    place, a cache serves inference: use it under `torch.no_grad()`, and `copy()` it to continue twice from one prefix.

    It takes the floating type of what is appended to it: a cache kept in another one is converted, once.

    Args:
        k: (B, H, N, D) keys of the prefix, fp16, bf16, fp32 or fp64.
        v: (B, H, N, E) its values.
        lengths: (B,) valid tokens of each right-padded row, integers of any type; None if all N are.

    Attributes:
        lengths: (B,) int64, tokens per row; None while all rows have `longest`.
        longest: tokens in the longest row, or an upper bound of it where rows differ.

    Example:
        >>> import torch
        >>> cache = KeyValueCache(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5))
        >>> cache.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 5))
        >>> cache.longest, tuple(cache.keys.shape), cache.keys[0, 0, :, 0].tolist()
        (4, (1, 2, 4, 4), [0.0, 0.0, 0.0, 1.0])
    """

    longest: int

    def __init__(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        args = Arguments("KeyValueCache")
        args.tensor("k", k, "B H N D")
        args.tensor("v", v, "B H N E")
        if lengths is not None:
            args.counts("lengths", lengths)
        self._k, self._v = k, v
        self.lengths = None if lengths is None else lengths.to(torch.int64)
        self.longest = k.shape[2]

    @property
    def keys(self) -> Tensor:
        """(B, H, longest, D); rows past a row's own length hold anything."""
        return self._k[:, :, : self.longest]

    @property
    def values(self) -> Tensor:
        """(B, H, longest, E); rows past a row's own length hold anything."""
        return self._v[:, :, : self.longest]

    @property
    def start(self) -> int | Tensor:
        """Position of the next token: an int if the rows agree, else (B,)."""
        return self.longest if self.lengths is None else self.lengths

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add M tokens to every row: k (B, H, M, D), v (B, H, M, E)."""
        self.check_rows("KeyValueCache", k.shape[0], k.device)
        for name, x, held in (("k", k, self._k), ("v", v, self._v)):
            _, heads, _, width = held.shape
            if x.ndim != 4 or x.shape[1::2] != (heads, width) or x.shape[2] != k.shape[2] or x.dtype not in FLOATING:
                raise ValueError(
                    f"KeyValueCache: `{name}` has shape {tuple(x.shape)} and dtype {x.dtype}; expected "
                    f"(B, {heads}, M, {width}) in a floating type, as the cache has"
                )
        batch, _, new, _ = k.shape
        total = self.longest + new
        self._k, self._v = moved(self._k, None, k.dtype), moved(self._v, None, v.dtype)
        self._k, self._v = _grown(self._k, self.longest, total), _grown(self._v, self.longest, total)
        if self.lengths is None:
            self._k[:, :, self.longest : total] = k
            self._v[:, :, self.longest : total] = v
        else:
            rows = torch.arange(batch, device=k.device)[:, None]
            places = self.lengths[:, None] + torch.arange(new, device=k.device)
            self._k[rows, :, places] = k.transpose(1, 2)
            self._v[rows, :, places] = v.transpose(1, 2)
            self.lengths = self.lengths + new
        self.longest = total

    def reserve(self, tokens: int) -> None:
        """Room for so many tokens of a row in all: until then nothing is copied, and buffers stay where they are."""
        self._k, self._v = (_grown(x, self.longest, tokens, exactly=True) for x in (self._k, self._v))

    @property
    def rows(self) -> int:
        """B."""
        return self._k.shape[0]

    def reorder(self, index: Tensor) -> None:
        """Let each row continue from row index[b] (B,) instead, in place: for beam search."""
        for x in (self.keys, self.values):
            x.copy_(x[index])
        self.lengths = None if self.lengths is None else self.lengths[index]

    def truncate(self, tokens: int) -> KeyValueCache:
        """The cache without the last `tokens` tokens of every row, over the same buffers."""
        fewest = self.longest if self.lengths is None else int(self.lengths.min())
        if not 0 <= tokens <= fewest:
            raise ValueError(f"truncate: `tokens` is {tokens}; expected 0 to {fewest}, the tokens of the shortest row")
        shorter = KeyValueCache(self._k, self._v, None if self.lengths is None else self.lengths - tokens)
        shorter.longest = self.longest - tokens
        return shorter

    def copy_(self, other: KeyValueCache) -> None:
        """Take another cache's contents."""
        self._k, self._v, self.lengths, self.longest = other._k, other._v, other.lengths, other.longest

    def copy(self) -> KeyValueCache:
        """A cache of its own with the same contents."""
        return KeyValueCache(self.keys.clone(), self.values.clone(), self.lengths)

    def clone(self) -> KeyValueCache:
        """`copy`, by the name that it has in every layer's state."""
        return self.copy()

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> KeyValueCache:
        """A cache of its own with the same contents, on another device or in another floating type.

        As with tensors, the type may come first.
        """
        device, dtype = destination("KeyValueCache.to", device, dtype)
        k, v = (x.to(device or x.device, dtype or x.dtype, copy=True) for x in (self.keys, self.values))
        return KeyValueCache(k, v, None if self.lengths is None else moved(self.lengths, device, None))

    def check_rows(self, caller: str, rows: int, device: torch.device) -> None:
        """Refuse a cache of another number of rows, or on another device."""
        if rows != self._k.shape[0]:
            raise ValueError(f"{caller}: {rows} rows to append; the cache has {self._k.shape[0]}")
        for name, x in (("keys", self._k), ("values", self._v), ("lengths", self.lengths)):
            if x is not None and x.device != device:
                raise ValueError(f"{caller}: the cache's `{name}` are on {x.device}; expected {device} as the input is")


def check_memory(caller: str, name: str, memory: Any, kind: type, rows: int, x: Tensor) -> None:
    """Refuse what cannot be the memory of a layer, before it computes anything from the input `x`.

    Args:
        caller: the layer.
        name: of the memory, in a message.
        memory: what came.
        kind: `KeyValueCache` or `MixedChunkState`.
        rows: how many sequences it must have.
        x: the layer's input.
    """
    if not isinstance(memory, kind):
        raise TypeError(f"{caller}: `{name}` is a {type(memory).__name__}; expected a {kind.__name__}")
    if isinstance(memory, KeyValueCache):
        memory.check_rows(caller, rows, x.device)
    elif isinstance(memory, MixedChunkState):
        position = memory.position
        if position.shape != (rows,) or position.dtype != torch.int64 or position.device != x.device:
            raise ValueError(
                f"{caller}: `{name}.position` has shape {tuple(position.shape)}, {position.dtype}, on "
                f"{position.device}; expected ({rows},), torch.int64, on {x.device}"
            )


def check_one_token(caller: str, x: Tensor) -> None:
    """Refuse a step of more or fewer tokens than one."""
    if x.ndim != 3 or x.shape[1] != 1:
        raise ValueError(f"{caller}.step: `x` has shape {tuple(x.shape)}; expected (B, 1, d): one token")


def _grown(buffer: Tensor, used: int, needed: int, exactly: bool = False) -> Tensor:
    batch, heads, capacity, width = buffer.shape
    if needed <= capacity:
        return buffer
    larger = buffer.new_zeros(batch, heads, needed if exactly else max(needed, 2 * capacity), width)
    larger[:, :, :used] = buffer[:, :, :used]
    return larger

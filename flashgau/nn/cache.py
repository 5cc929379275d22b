"""The key/value cache of attention layers that decode."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens so far: grown by doubling, written in place, one length per row.

    A new token costs the copy of one row; the buffer is copied only when it doubles. Because it is written in
    place, a cache serves inference: use it under `torch.no_grad()`, and `copy()` it to continue twice from one prefix.

    Args:
        k: (B, H, N, D) keys of the prefix.
        v: (B, H, N, E) its values.
        lengths: (B,) valid tokens of each right-padded row; None if all N are.

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

    def __init__(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
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
        batch, _, new, _ = k.shape
        if batch != self._k.shape[0]:
            raise ValueError(f"KeyValueCache: {batch} rows to append; the cache has {self._k.shape[0]}")
        total = self.longest + new
        self._k, self._v = _grown(self._k, self.longest, total), _grown(self._v, self.longest, total)
        if self.lengths is None:
            self._k[:, :, self.longest : total] = k
            self._v[:, :, self.longest : total] = v
        else:
            rows = torch.arange(batch, device=k.device)[:, None]
            places = self.lengths[:, None] + torch.arange(new, device=k.device)
            self._k[rows, :, places] = k.transpose(1, 2).to(self._k.dtype)
            self._v[rows, :, places] = v.transpose(1, 2).to(self._v.dtype)
            self.lengths = self.lengths + new
        self.longest = total

    def copy(self) -> KeyValueCache:
        """A cache of its own with the same contents."""
        return KeyValueCache(self.keys.clone(), self.values.clone(), self.lengths)


def _grown(buffer: Tensor, used: int, needed: int) -> Tensor:
    batch, heads, capacity, width = buffer.shape
    if needed <= capacity:
        return buffer
    larger = buffer.new_zeros(batch, heads, max(needed, 2 * capacity), width)
    larger[:, :, :used] = buffer[:, :, :used]
    return larger

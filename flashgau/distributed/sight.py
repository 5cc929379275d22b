"""What the queries of each process see of the keys of each, where attention's mask is a band of positions."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

import torch.nn.functional as F

from flashgau.options import AttentionOptions, Layout, Window

from .exchange import Range


@dataclass(frozen=True)
class Part:
    """Keys that one process's queries attend to in one call of the operation.

    There the last query stands at the last of these keys, and not where it is: `shift` behind it.

    Attributes:
        keys: their range in the whole.
        window: what the operation must be given in place of the whole's.
        shift: how far behind the last key the last query stands; negative if it is before.
    """

    keys: Range
    window: Window
    shift: int

    @property
    def is_empty(self) -> bool:
        """Whether the queries see nothing."""
        return self.keys[0] == self.keys[1]

    def options(self, options: AttentionOptions, m: int) -> AttentionOptions:
        """Those of the whole, as m queries and these keys have them."""
        bias = options.rel_bias
        if bias is not None:
            # Entry P-1 + t belongs to distance t in the whole, and here to t + shift, with P as large as needed here.
            more = max(1, m, self.keys[1] - self.keys[0]) - (bias.shape[-1] + 1) // 2
            bias = F.pad(bias, (more + self.shift, more - self.shift))
        return options._replace(causal=False, window=self.window, rel_bias=bias)


NOTHING = Part((0, 0), (None, None), 0)


@dataclass(frozen=True)
class Sight:
    """The slices of all processes, and the band: query i of M, at p = i + N - M, sees keys p - left to p + right.

    Attributes:
        queries: for each process, the range of its queries in the whole.
        keys: the same of its keys.
        window: (left, right), None where it is unbounded.
    """

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]
    window: Window

    @property
    def is_self(self) -> bool:
        """Whether queries are as many as keys, so that each stands at its own key."""
        return self.queries[-1][1] == self.keys[-1][1]

    @cached_property
    def seen(self) -> tuple[Range, ...]:
        """For each process, the range of keys that any of its queries sees."""
        return tuple(self.seen_by(queries) for queries in self.queries)

    def seen_by(self, queries: Range) -> Range:
        """The range of keys that any of these queries sees."""
        (left, right), total = self.window, self.keys[-1][1]
        (start, stop), offset = queries, total - self.queries[-1][1]
        hi = total if right is None else min(max(0, stop + offset + right), total)
        lo = 0 if left is None else min(max(0, start + offset - left), hi)
        return (lo if start < stop else hi, hi)

    def within(self, queries: Range, keys: Range) -> Range:
        """Those of these queries that see no other keys than these; the end of the range if there are none."""
        (left, right), total = self.window, self.keys[-1][1]
        (start, stop), offset = queries, total - self.queries[-1][1]
        if keys[0] > 0:
            start = stop if left is None else max(start, keys[0] + left - offset)
        if keys[1] < total:
            stop = start if right is None else min(stop, keys[1] - right - offset)
        return (start, stop) if start < stop else queries[1:] * 2

    def part(self, queries: Range, held: Range | None = None) -> Part:
        """What queries see, of these keys or of all; perhaps nothing."""
        (lo, hi), (start, stop) = self.seen_by(queries), queries
        if held is not None:
            lo, hi = max(lo, held[0]), min(hi, held[1])
        if lo >= hi:
            return replace(NOTHING, keys=(lo, lo))
        shift = stop + self.keys[-1][1] - self.queries[-1][1] - hi
        # A side that hides nothing is None, which operations are quickest with.
        left, right = (
            None if side is None or side + change >= most else side + change
            for side, change, most in zip(self.window, (-shift, shift), (hi - lo - 1, stop - start - 1), strict=True)
        )
        return Part((lo, hi), (left, right), shift)

    @cached_property
    def hops(self) -> tuple[int, ...]:
        """How far each process's keys travel from rank to rank, the first after the last: to all that see any."""
        ends = [hi for _, hi in self.seen]
        busy = [rank for rank, (start, stop) in enumerate(self.queries) if start < stop]
        found = []
        for rank, (start, stop) in enumerate(self.keys):
            # Where nothing bounds the left, whoever sees any of them is of the ranks from `first` on.
            first, before = bisect_right(ends, start), bisect_right(busy, rank - 1)
            if start == stop or not busy:
                found.append(0)
            elif before and busy[before - 1] >= first:
                found.append(len(ends) - rank + busy[before - 1])
            else:
                found.append(max(0, busy[-1] - rank) if busy[-1] >= first else 0)
        return tuple(found)


def packed(layout: Layout, queries: Range, keys: Range) -> Layout:
    """The layout of a whole as these ranges of it have it: of each packed sequence, what lies in them."""
    if layout.cu_seqlens is None:
        return layout
    of_keys = layout.cu_seqlens if layout.cu_seqlens_k is None else layout.cu_seqlens_k
    of_queries, of_keys = (
        (offsets - start).clamp(0, stop - start)
        for offsets, (start, stop) in ((layout.cu_seqlens, queries), (of_keys, keys))
    )
    return Layout(None, of_queries, of_keys)

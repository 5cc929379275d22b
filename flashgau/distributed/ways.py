"""The ways in which queries and keys of several processes come together, what each sends, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .agreement import ranges, shares
from .exchange import Range
from .sight import Sight

_UNIT = 16
WAYS = ("heads", "window", "ring")


class Sent(NamedTuple):
    """Bytes that all processes together send to others: each is sent once and received once."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Widths:
    """What a call of attention has of everything but tokens.

    Attributes:
        batch: B.
        heads: Hq.
        kv_heads: Hkv.
        width: D.
        value_width: E.
        itemsize: bytes of an element of q.
        gate_width: elements of the gate for each query and head: 0, 1 or E.
        returns_lse: whether the log-sum-exp is a result too.
    """

    batch: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    itemsize: int
    gate_width: int = 0
    returns_lse: bool = False

    @property
    def sums(self) -> int:
        """Bytes of an element of a sum: fp32, or fp64 for fp64."""
        return max(4, self.itemsize)

    @property
    def key(self) -> int:
        """Elements of one token's keys and values, of all its heads."""
        return self.batch * self.kv_heads * (self.width + self.value_width)


def bytes_sent(way: str, widths: Widths, sight: Sight) -> Sent:
    """What goes between processes for the tensors of one call, and for all their gradients.

    Up to 15 bytes more go with each tensor of each message, so that what follows it is aligned.

    Args:
        way: "heads", "window" or "ring".
        widths: of the call.
        sight: the slices of all processes and the mask. A ring's is unbounded to the left.
    """
    return _SENT[way](widths, sight)


def _by_heads(widths: Widths, sight: Sight) -> Sent:
    """Each process sends its tokens of the heads of others, and gets back what they make of them."""
    q_heads, k_heads = heads_of(widths.heads, widths.kv_heads, len(sight.keys))
    queries, results = widths.width + widths.gate_width, widths.value_width * widths.itemsize
    results += widths.sums * widths.returns_lse
    per_query = queries * widths.itemsize + results
    per_key = (widths.width + widths.value_width) * widths.itemsize
    total = per_query * _to_others(sight.queries, q_heads) + per_key * _to_others(sight.keys, k_heads)
    return Sent(widths.batch * total, widths.batch * total)


def _to_others(tokens: tuple[Range, ...], heads: tuple[Range, ...]) -> int:
    """Tokens times heads, over all pairs of two processes."""
    of_tokens, of_heads = [b - a for a, b in tokens], [b - a for a, b in heads]
    return sum(of_tokens) * sum(of_heads) - sum(n * h for n, h in zip(of_tokens, of_heads, strict=True))


def _by_window(widths: Widths, sight: Sight) -> Sent:
    """Each process gets the keys that its queries see and it has not, and sends their gradients back."""
    fetched = 0
    for (lo, hi), (start, stop) in zip(sight.seen, sight.keys, strict=True):
        fetched += hi - lo - max(0, min(hi, stop) - max(lo, start))
    total = fetched * widths.key * widths.itemsize
    return Sent(total, total)


def _by_ring(widths: Widths, sight: Sight) -> Sent:
    """Each slice of keys travels to the last process that sees it; in the backward again, and its gradient home."""
    travels = sum((b - a) * hops for (a, b), hops in zip(sight.keys, sight.hops, strict=True)) * widths.key
    return Sent(travels * widths.itemsize, travels * (widths.itemsize + widths.sums))


_SENT: dict[str, Callable[[Widths, Sight], Sent]] = {"heads": _by_heads, "window": _by_window, "ring": _by_ring}


def bytes_of_gau(batch: int, widths: tuple[int, int], itemsize: int, sight: Sight) -> Sent:
    """The same for `context_parallel_gau` with a gate: S and E are `widths`. Queries and keys go to all."""
    narrow, wide = widths
    queries, keys = sight.queries[-1][1], sight.keys[-1][1]
    columns = ranges(shares(wide, len(sight.keys), column_unit(wide, len(sight.keys))))
    everywhere = narrow * (len(sight.keys) - 1) * (queries + keys)
    total = everywhere + _to_others(sight.keys, columns) + 2 * _to_others(sight.queries, columns)  # v; gate and result
    return Sent(batch * itemsize * total, batch * itemsize * total)


def bytes_of_mixed_chunk(batch: int, widths: tuple[int, int], itemsize: int, messages: int) -> Sent:
    """The same for `context_parallel_mixed_chunk`, of so many sums (S, E): those of its chains (`Cuts`)."""
    total = batch * widths[0] * widths[1] * max(4, itemsize) * messages
    return Sent(total, total)


def column_unit(columns: int, processes: int) -> int:
    """Wide columns are divided by units of so many: rows of whole units stay aligned, as kernels read them fastest."""
    return _UNIT if columns % _UNIT == 0 and columns >= _UNIT * processes else 1


class Traits(NamedTuple):
    """What of a call decides which ways it can go, beside its sizes."""

    lengths: bool
    packed: bool
    packed_twice: bool
    biased: bool


def why_not(way: str, widths: Widths, sight: Sight, traits: Traits) -> str | None:
    """Why a call cannot go this way, or None if it can."""
    left, right = sight.window
    if way == "heads":
        count = len(sight.keys)
        return (
            f"Hq = {widths.heads} heads are not one for each of the {count} processes" if widths.heads < count else None
        )
    if way == "ring" and left is not None:
        return "`window` is bounded to the left"
    if traits.lengths and not (right == 0 and sight.is_self):
        return "`lengths` are given without causal=True and as many queries as keys"
    if not traits.packed:
        return None
    if way == "window" and (right != 0 or traits.packed_twice):
        return "`cu_seqlens` is given without causal=True, or with `cu_seqlens_k`"
    if way == "ring" and traits.biased:
        return "`cu_seqlens` is given with `rel_bias`"
    if way == "ring" and right is not None and (right or traits.packed_twice or sight.queries != sight.keys):
        return "`cu_seqlens` is given with a mask, and queries and keys are not cut alike, or `cu_seqlens_k` is given"
    return None


def possible(widths: Widths, sight: Sight, traits: Traits) -> tuple[dict[str, str], list[str]]:
    """The ways that a call cannot go, with the reasons, and those that are taken where none is asked for.

    One that would give a process keys without bound is taken only where it is asked for.
    """
    refused = {way: why for way in WAYS if (why := why_not(way, widths, sight, traits)) is not None}
    bounded = None not in sight.window
    return refused, [way for way in WAYS if way not in refused and (way != "window" or bounded)]


def heads_of(heads: int, kv_heads: int, processes: int) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """The query heads and the key heads of each process, as (first, last + 1); no process is without a query head."""
    group = heads // kv_heads
    if kv_heads >= processes:
        k_heads = ranges(shares(kv_heads, processes))
        return tuple((group * a, group * b) for a, b in k_heads), k_heads
    together = shares(processes, kv_heads)  # so many processes for each key head: at most `group`
    counts = [share for some in together for share in shares(group, some)]
    owners = [head for head, some in enumerate(together) for _ in range(some)]
    return ranges(counts), tuple((head, head + 1) for head in owners)

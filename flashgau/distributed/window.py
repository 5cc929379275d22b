"""Attention where each process fetches the keys that its queries see: of its neighbours, where a window bounds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.contract.validate import Arguments
from flashgau.ops.attention import attend
from flashgau.options import AttentionOptions, Layout

from .agreement import of_rank
from .call import Call
from .exchange import Meeting, Range, Turn, begin_exchange, common, reaching
from .sight import Sight, packed

_AXIS = 2  # of tokens


def by_window(
    call: Call, needed: dict[str, bool], sight: Sight, given: AttentionOptions, layout: Layout
) -> list[Tensor]:
    """This process's slices of output and log-sum-exp. Their gradients of what was fetched are sent back.

    Its queries are three parts: those before, among and behind which are those that see no keys but the process's own.
    These are done while the keys of others are on their way, and their gradients while those of others' keys are.

    Args:
        call: of attention, with this process's slices.
        needed: for each of the slices whether any process needs its gradient.
        sight: what each process sees of the keys of each.
        given: the options of the whole. The seed is common to all.
        layout: of the whole: packed, or nothing.
    """
    (q, k, v, gate), rank = call.tensors, call.context.rank
    assert q is not None
    assert k is not None
    assert v is not None
    queries, held, seen = sight.queries[rank], sight.keys[rank], sight.seen[rank]
    first, last = sight.within(queries, held)
    ranges = ((queries[0], first), (first, last), (last, queries[1]))
    before, among, behind = range(len(ranges))
    parts, sizes = [sight.part(some) for some in ranges], [b - a for a, b in ranges]
    q_parts = q.split(sizes, _AXIS)
    gate = gate[..., None] if gate is not None and gate.dim() == q.dim() - 1 else gate
    gates = [None] * len(ranges) if gate is None else gate.split(sizes, _AXIS)

    kept = [common(part.keys, held) for part in parts]
    own = [(a - held[0], b - held[0]) for a, b in kept]
    meeting, fetching = Meeting(call.context, 1), Turn.fetching(_AXIS, sight.seen, sight.keys, rank)
    pairs, arrival = begin_exchange(meeting, (k, v), (fetching,) * 2, (needed["k"], needed["v"]), own)

    def attended(place: int, keys: Tensor, values: Tensor) -> list[Tensor]:
        options = parts[place].options(given, sizes[place])
        if options.dropout_p:
            seed: Any = given.dropout_seed
            seed = of_rank(seed, rank * len(ranges) + (place - among) % len(ranges))
            options = options._replace(dropout_seed=seed)
        args, own_layout = Arguments(call.context.op), packed(layout, ranges[place], parts[place].keys)
        backend, activation = call.options["backend"], call.options["gate_activation"]
        return list(
            attend(args, q_parts[place], keys, values, options, own_layout, True, backend, gates[place], activation)
        )

    found: dict[int, list[Tensor]] = {}
    if sizes[among] or queries[0] == queries[1]:
        found[among] = attended(among, *pairs[among])
    came = arrival()
    for place in (before, behind):
        if sizes[place]:
            both = zip(pairs[place], came, strict=True)
            found[place] = attended(place, *(_seen(parts[place].keys, held, seen, *two) for two in both))
    results = [
        torch.cat(of, _AXIS) if len(of) > 1 else of[0] for of in zip(*(found[x] for x in sorted(found)), strict=True)
    ]
    sources = [x for x, name in zip(came, ("k", "v"), strict=True) if needed[name]]
    return reaching(meeting, results, sources[0]) if sources else results


def _seen(keys: Range, held: Range, seen: Range, own: Tensor, came: Tensor) -> Tensor:
    """These keys, of those that the process holds, and of the others that it sees: of those before them, and behind."""
    (lo, hi), (start, stop) = seen, common(held, seen)
    left, right = common(keys, (lo, start)), common(keys, (stop, hi))
    pieces = [
        came.narrow(_AXIS, left[0] - lo, left[1] - left[0]),
        own,
        came.narrow(_AXIS, start - lo + right[0] - stop, right[1] - right[0]),
    ]
    some = [x for x in pieces if x.shape[_AXIS]]
    return torch.cat(some, _AXIS) if len(some) > 1 else some[0] if some else own

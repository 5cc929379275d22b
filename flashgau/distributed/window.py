"""Attention where each process fetches the keys that its queries see: of its neighbours, where a window bounds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashgau.contract.validate import Arguments
from flashgau.ops.attention import attend
from flashgau.options import AttentionOptions, Layout

from .agreement import of_rank
from .call import Call
from .exchange import Meeting, Turn, exchange, reaching
from .sight import Sight, packed


def by_window(
    call: Call, needed: dict[str, bool], sight: Sight, given: AttentionOptions, layout: Layout
) -> list[Tensor]:
    """This process's slices of output and log-sum-exp. Their gradients of what was fetched are sent back.

    Args:
        call: of attention, with this process's slices.
        needed: for each of the slices whether any process needs its gradient.
        sight: what each process sees of the keys of each.
        given: the options of the whole. The seed is common to all.
        layout: of the whole: packed, or nothing.
    """
    (q, k, v, gate), rank = call.tensors, call.context.rank
    assert q is not None
    part, meeting = sight.part(rank), Meeting(call.context, 1)
    fetching = Turn.fetching(2, sight.seen, sight.keys, rank)
    k, v = exchange(meeting, (k, v), (fetching, fetching), (needed["k"], needed["v"]))
    assert k is not None
    assert v is not None
    options = part.options(given, q.shape[2])
    if options.dropout_p:
        common: Any = given.dropout_seed
        seed: Any = of_rank(common, rank)
        options = options._replace(dropout_seed=seed)
    gate = gate[..., None] if gate is not None and gate.dim() == q.dim() - 1 else gate
    args, layout = Arguments(call.context.op), packed(layout, sight.queries[rank], part.keys)
    backend, activation = call.options["backend"], call.options["gate_activation"]
    out, lse = attend(args, q, k, v, options, layout, True, backend, gate, activation)
    sources = [x for x, name in ((k, "k"), (v, "v")) if needed[name]]
    return [reaching(meeting, out, sources[0]) if sources else out, lse]

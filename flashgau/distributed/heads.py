"""Attention where each process gets all tokens of some heads (Ulysses)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from flashgau.options import AttentionOptions

from .agreement import of_rank
from .call import Call
from .exchange import Turn
from .sight import Sight
from .ways import heads_of


def by_heads(call: Call, agreed: dict[str, list[int]], sight: Sight, given: AttentionOptions) -> list[Tensor]:
    """This process's slices of the results of attention: heads for tokens, the operation as ever, and back.

    Args:
        call: of attention, with this process's slices.
        agreed: what the processes have said of it.
        sight: the slices of all.
        given: the options of the whole. The seed is common to all.
    """
    rank, (q, k, *_) = call.context.rank, call.tensors
    assert q is not None
    assert k is not None
    q_heads, k_heads = heads_of(q.shape[1], k.shape[1], call.context.size)
    start, stop = q_heads[rank]
    rel_bias, sinks = given.rel_bias, given.sinks
    seed: Any = given.dropout_seed
    if rel_bias is not None and rel_bias.dim() > 1 and rel_bias.shape[-2] > 1:
        rel_bias = rel_bias[..., start:stop, :]
    sinks = None if sinks is None else sinks[start:stop]
    of_queries, of_keys = (
        Turn(1, heads, 2, tuple(b - a for a, b in tokens))
        for heads, tokens in ((q_heads, sight.queries), (k_heads, sight.keys))
    )
    back = Turn(2, sight.queries, 1, tuple(b - a for a, b in q_heads))
    operate = partial(
        call.operation, **call.options, **call.sequences,
        rel_bias=rel_bias, sinks=sinks, dropout_seed=of_rank(seed, rank),
    )  # fmt: skip
    return call.exchanged(agreed, [of_queries, of_keys, of_keys, of_queries], back, operate)

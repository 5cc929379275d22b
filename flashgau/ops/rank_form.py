"""The rank form of a relative bias at kept distances, of layers. For `flashgau.nn`; not public."""

from __future__ import annotations

from torch import Tensor

from .. import bias
from . import dispatch
from .operation import Operation


def rank_form(a: Tensor, b: Tensor, turns: Tensor) -> Tensor:
    """`rotary_bias` of a and b (S,) at the distances of `turns` (n, S), which `bias.rank_turns` made."""
    name = dispatch.resolve_inner("rank_form", a.device, a.dtype)
    if name != "triton":
        return bias.rank_form(a, b, turns)
    out: Tensor = _rank_form(a, b, turns, backend=name)[0]
    return out


_rank_form = Operation(
    "rank_form",
    inputs="a b",
    data="turns",
    results="bias",
    shapes=lambda a, turns, **_: [a.new_empty(turns.shape[0])],
    op="rank_form",
    error="RotaryBias",
    others=lambda a, b, turns, backend: [bias.rank_form(a, b, turns)],
)

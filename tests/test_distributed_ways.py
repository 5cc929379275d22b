"""Attention over several processes is the same whichever way queries and keys come together, and sends what is said."""

from __future__ import annotations

from typing import Any

import distributed_world
import pytest
import torch
from distributed_world import MEMBERS, World
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Call, attention_calls
from test_distributed_equality import GROUPS, check_equal, drawn_cuts, drawn_needs, poison

from flashgau.distributed.agreement import ranges
from flashgau.distributed.sight import Sight
from flashgau.distributed.ways import Traits, Widths, why_not

world = distributed_world.world


def cut_ranges(cuts: list[int], total: int) -> tuple[tuple[int, int], ...]:
    ends = [*cuts, total]
    return ranges(b - a for a, b in zip([0, *ends], ends, strict=False))


def can_go(way: str, call: Call, cuts: dict[str, list[int]]) -> bool:
    q, k, v = call.args[:3]
    left, right = call.kwargs.get("window") or (None, None)
    right = 0 if call.kwargs["causal"] else right
    sight = Sight(cut_ranges(cuts["q"], q.shape[2]), cut_ranges(cuts["k"], k.shape[2]), (left, right))
    traits = Traits(*(call.kwargs.get(x) is not None for x in ("lengths", "cu_seqlens", "cu_seqlens_k", "rel_bias")))
    widths = Widths(q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], 8)
    return why_not(way, widths, sight, traits) is None


@pytest.mark.parametrize("way", ["window", "ring", "auto"])
@given(data=st.data(), group=GROUPS)
def test_attention_is_the_same_by_every_way(world: World, way: str, data: Any, group: str) -> None:
    call = data.draw(attention_calls(dtype=torch.float64)).with_options(dropout_p=0.0)
    if (gate := call.kwargs.pop("gate", None)) is not None:
        call = Call(call.name, (*call.args, gate), call.kwargs)
    parts = len(MEMBERS[group])
    if way == "ring" and call.kwargs.get("window"):
        call.kwargs["window"] = (None, call.kwargs["window"][1])
    if "lengths" in call.kwargs and data.draw(st.booleans()):
        call = poison(call)
    backend = data.draw(st.sampled_from([None, "reference"]))
    cuts = {"q": drawn_cuts(data.draw, call.args[0].shape[2], parts)}
    alike = call.args[0].shape[2] == call.args[1].shape[2] and data.draw(st.booleans())
    cuts["k"] = cuts["q"] if alike else drawn_cuts(data.draw, call.args[1].shape[2], parts)
    assume(any(can_go(x, call, cuts) for x in ([way] if way != "auto" else ["heads", "ring"])))
    call = call.with_options(backend=backend)
    check_equal(world, call, cuts, group, drawn_needs(data.draw, len(call.args), parts), by=way)

"""Attention over several processes is the same whichever way queries and keys come together, and sends what is said."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import distributed_world
import pytest
import torch
from checks import close, outputs
from distributed_world import AXES, CUTS, FUNCTIONS, MEMBERS, World, example, pieces, spread
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Call, attention_calls, randn
from test_distributed_equality import (
    GROUPS,
    check_alone,
    check_equal,
    check_precision,
    drawn_cuts,
    drawn_needs,
    poison,
)
from torch import Tensor

from flashgau.distributed.agreement import ranges
from flashgau.distributed.mixed_chunk import Cuts
from flashgau.distributed.ring import merged
from flashgau.distributed.sight import Sight
from flashgau.distributed.ways import (
    Sent,
    Traits,
    Widths,
    bytes_of_gau,
    bytes_of_mixed_chunk,
    bytes_sent,
    possible,
    why_not,
)

alone = distributed_world.alone
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
    if way == "window" and data.draw(st.booleans()):
        call.kwargs["window"] = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([None, 0, 3]))
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


# What sees what


@given(data=st.data(), parts=st.integers(1, 5))
def test_parts_and_travels_are_those_of_the_mask(data: Any, parts: int) -> None:
    """Against the mask of all pairs: what each part hides, how its last query stands, and who needs which keys."""
    m, n = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    side = st.sampled_from([None, 0, 1, 4])
    window = data.draw(side), data.draw(side)
    cuts = [drawn_cuts(data.draw, size, parts) for size in (m, n)]
    sight = Sight(cut_ranges(cuts[0], m), cut_ranges(cuts[1], n), window)
    left, right = (99 if x is None else x for x in window)
    distance = torch.arange(n)[None] - (torch.arange(m)[:, None] + n - m)
    seen = (distance >= -left) & (distance <= right)
    for queries, own in zip(sight.queries, sight.keys, strict=True):
        start, stop = queries
        for held in [None, *sight.keys] if window[0] is None else [None]:
            part = sight.part(queries, held)
            first, last = part.keys
            held = held or (0, n)
            outside = seen[start:stop, held[0] : held[1]].clone()
            outside[:, first - held[0] : last - held[0]] = False
            assert not outside.any()
            rows = torch.arange(stop - start)[:, None]
            there = torch.arange(last - first)[None] - (rows + last - first - stop + start)
            near, far = (99 if x is None else x for x in part.window)
            assert torch.equal((there >= -near) & (there <= far), seen[start:stop, first:last])
            assert part.is_empty or torch.equal(there, distance[start:stop, first:last] + part.shift)
        among = range(*sight.within(queries, own))
        for query in range(start, stop):
            elsewhere = seen[query, : own[0]].any() or seen[query, own[1] :].any()
            assert not elsewhere if query in among else elsewhere or not seen[query].any()
    if window[0] is None:
        for source, hops in enumerate(sight.hops):
            needs = [
                (rank - source) % parts
                for rank, queries in enumerate(sight.queries)
                if not sight.part(queries, sight.keys[source]).is_empty
            ]
            assert hops == max(needs, default=0)


@pytest.mark.parametrize("seed", range(5))
def test_merging_parts_is_softmax_over_all(seed: int) -> None:
    """Rows that see nothing of one part, or of both, included; however large the scores are."""
    scores, values = 20 * randn(seed, 7, 9, dtype=torch.float64), randn(seed + 9, 9, 2, dtype=torch.float64)
    scores[0, :4], scores[1, 4:], scores[2] = -math.inf, -math.inf, -math.inf
    out, lse = torch.zeros(7, 2, dtype=torch.float64), torch.full((7,), -math.inf, dtype=torch.float64)
    for part in (slice(0, 4), slice(4, 9)):
        own = scores[:, part].softmax(-1).nan_to_num(0) @ values[part]
        out, lse = merged(out, lse, own, scores[:, part].logsumexp(-1))
    close(out, scores.softmax(-1).nan_to_num(0) @ values, ulps=128)  # a log-sum-exp of up to 60 is rounded
    close(lse, scores.logsumexp(-1))


# Bytes


ROWS = [  # B, Hq, Hkv, D, E; fp32 rows of whole 16 bytes, so that nothing is sent to align them
    (1, 4, 4, 16, 16),
    (2, 4, 1, 8, 4),
    (1, 12, 3, 4, 8),
]
MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"causal": True, "window": (5, None)}, {"window": (9, 2)}]
TOKENS = {"pair": [(12, 12), (20, 4), (0, 24)], "all": [(8, 8, 8), (4, 0, 20)], "four": [(8, 8, 8, 8), (4, 20, 0, 8)]}


def ways_sent(world: World, group: str, tokens: tuple[int, ...], rows: tuple[int, ...], **options: Any) -> Sent:
    """What the processes of a group have sent in a call and in its backward, as counted where messages are sent."""
    batch, heads, kv_heads, width, value_width = rows
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)]
    args = [[randn(place, batch, h, n, w) for place, (h, w) in enumerate(shapes)] for n in tokens]
    return counted(world, group, args, options)


def counted(world: World, group: str, args: list[Any], options: dict[str, Any]) -> Sent:
    found = world.results("counted", args, [dict(options) for _ in args], group=group)
    forward, backward = (sum(int(results[0][part]) for results, _ in found) for part in (0, 1))
    return Sent(forward, backward)


@pytest.mark.parametrize("group", MEMBERS)
def test_what_is_sent_is_what_the_formula_says(world: World, group: str) -> None:
    for tokens, rows, mask in product(TOKENS[group], ROWS, MASKS):
        left, right = mask.get("window", (None, None))
        sight = Sight(ranges(tokens), ranges(tokens), (left, 0 if mask.get("causal") else right))
        widths = Widths(*rows, itemsize=4, gate_width=rows[4])
        _, choices = possible(widths, sight, Traits(False, False, False, False))
        formula = {way: bytes_sent(way, widths, sight) for way in choices}
        for way in choices:
            assert ways_sent(world, group, tokens, rows, by=way, **mask) == formula[way]
        assert sum(ways_sent(world, group, tokens, rows, **mask)) == min(map(sum, formula.values()))


@pytest.mark.parametrize("group", MEMBERS)
def test_what_gated_attention_and_sums_send(world: World, group: str) -> None:
    for tokens in TOKENS[group]:
        narrow, wide = 8, 80  # five units of columns
        sight = Sight(ranges(tokens), ranges(tokens), (None, None))
        args = [[randn(0, 2, n, w) for w in (narrow, narrow, wide, wide)] for n in tokens]
        formula = bytes_of_gau(2, (narrow, wide), 4, sight)
        assert counted(world, group, args, {"of": "gau_attention"}) == formula
        for causal, offsets in product((True, False), (None, torch.tensor([0, 4, sum(tokens)]))):
            args = [[randn(0, 1, n, w) for w in (*[narrow] * 4, wide, wide)] for n in tokens]
            options = {"of": "mixed_chunk_attention", "chunk_size": 4, "causal": causal, "cu_seqlens": offsets}
            bounds = (0, sum(tokens)) if offsets is None else tuple(offsets.tolist())
            cuts = Cuts(bounds, ranges(tokens), offsets is not None)
            messages = cuts.before.messages + (0 if causal else cuts.behind.messages)
            formula = bytes_of_mixed_chunk(1, (narrow, wide), 4, messages)
            assert counted(world, group, args, options) == formula


def test_the_documentation_shows_the_model_s_table() -> None:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "bench.spread"]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed.count("\n") > 10
    assert printed in (root / "docs" / "distributed.md").read_text()


def test_a_window_needs_its_neighbours_rows_only(world: World) -> None:
    """Where by heads all queries, keys, values and results would be sent."""
    rows, mask = (1, 8, 8, 64, 64), {"causal": True, "window": (1, None)}
    assert ways_sent(world, "four", (64,) * 4, rows, by="window", **mask).forward == 3 * 8 * 1 * (64 + 64) * 4
    assert ways_sent(world, "four", (64,) * 4, rows, by="heads", **mask).forward == 3 * 64 * 8 * 5 * 64 * 4


# What goes on beside it


LEFT, BOTH = {"causal": True, "window": (2, None), "by": "window"}, {"window": (2, 2), "by": "window"}
ORDERS = [  # of three processes with 8 tokens each: what each does in the call, and in the backward
    ("attention", LEFT, ["scw scw", "scwc cscw", "scwc cscw"]),
    ("attention", BOTH, ["scwc cscw", "scwc cscw", "scwc cscw"]),
    ("attention", LEFT | {"window": (8, None)}, ["scw scw", "swc csw", "swc csw"]),  # no query sees its slice alone
    ("attention", {"causal": True, "by": "ring"}, ["scwsw scwswswsw", "scwscw scwscwswsw", "scwscwc scwscwscwsw"]),
    ("attention", {"by": "ring"}, ["scwscwc scwscwscwsw"] * 3),
    # In two rounds, of which the first is begun before.
    ("mixed_chunk_attention", {"chunk_size": 4}, ["scwsw scwsw"] * 3),
    ("mixed_chunk_attention", {"chunk_size": 4, "causal": True}, ["swswc cswsw"] * 3),  # a state has to come first
    (  # in the first process a sequence begins that needs none
        "mixed_chunk_attention",
        {"chunk_size": 4, "causal": True, "cu_seqlens": torch.tensor([0, 4, 24])},
        ["scwswc cscwsw", "swswc cswsw", "swswc cswsw"],
    ),
]


@pytest.mark.parametrize(("name", "options", "orders"), ORDERS)
def test_what_needs_nothing_of_others_is_computed_while_it_is_sent(
    world: World, name: str, options: dict[str, Any], orders: list[str]
) -> None:
    """Sending begins, computing comes, and only then does a process wait: forward, and backward."""
    shapes = [(1, 2, 8, 4)] * 3 if name == "attention" else [(1, 8, 4)] * 6
    args = [[randn(place, *shape) for place, shape in enumerate(shapes)] for _ in range(3)]
    found = world.results("traced", args, [{"of": name, **options} for _ in range(3)])
    events = [bytes(results[0].tolist()).decode() for results, _ in found]
    assert events == [f"c{order}" for order in orders]


# What else every way keeps


EXAMPLE = {"window": {"window": (5, None)}, "ring": {}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", EXAMPLE)
def test_low_precision_errs_no_more_than_one_process(world: World, way: str, dtype: torch.dtype) -> None:
    call = example("attention", dtype, **EXAMPLE[way])
    check_precision(world, call, [{"by": way}] * 3)


@pytest.mark.parametrize("way", EXAMPLE)
def test_gradients_that_one_process_alone_wants(world: World, way: str) -> None:
    check_alone(world, example("attention", torch.float64, **EXAMPLE[way]), by=way)


@pytest.mark.parametrize("way", EXAMPLE)
def test_results_without_gradients_are_the_same(world: World, way: str) -> None:
    call = example("attention", torch.float64, **EXAMPLE[way])
    axis, kinds = AXES[call.name]
    parts = [pieces(x, axis, CUTS["all"][kind]) for x, kind in zip(call.args, kinds, strict=False)]
    args, options = [list(own) for own in zip(*parts, strict=True)], [call.kwargs | {"by": way}] * 3
    found = world.results(call.name, args, options, grad=[False] * 3)
    expected, _, _ = spread(world, call, CUTS["all"], "all", own=[{"by": way}] * 3)
    for place, whole in enumerate(expected):
        close(torch.cat([results[place] for results, _ in found], axis), whole, ulps=0)


@pytest.mark.parametrize("way", EXAMPLE)
def test_gradients_of_the_log_sum_exp_alone(world: World, way: str) -> None:
    """Also in the first process, which needs nothing of the others by window."""
    whole = example("attention", torch.float64, lengths=None, **EXAMPLE[way]).leaves()
    _, lse = outputs(whole())
    weight = randn(0, *lse.shape, dtype=torch.float64)
    expected = torch.autograd.grad((lse * weight).sum(), whole.args[:2])
    args = list(zip(*(pieces(x.detach(), 2, CUTS["all"]["q"]) for x in whole.args[:3]), strict=True))
    options = [{key: x for key, x in whole.kwargs.items() if key != "return_lse"} | {"by": way}] * 3
    options = [{key: x.detach() if isinstance(x, Tensor) else x for key, x in own.items()} for own in options]
    weights = [[part] for part in pieces(weight, 2, CUTS["all"]["q"])]
    found = world.results("log_sum_exp", [list(own) for own in args], options, weights=weights)
    for place, right in enumerate(expected):
        close(torch.cat([grads[place] for _, grads in found], 2), right, 256, float(right.abs().max()))


@pytest.mark.parametrize("way", EXAMPLE)
def test_every_run_gives_the_same_bits_and_drops_the_same(world: World, way: str) -> None:
    """With dropout too: the result is linear in v, so that its gradient shows what the backward has dropped."""
    call = example("attention", torch.float64, dropout_p=0.4, dropout_seed=5, return_lse=False, **EXAMPLE[way])
    first, again = (spread(world, call, CUTS["four"], "four", own=[{"by": way}] * 4) for _ in range(2))
    tensors = [[*results, *(x for own in grads for x in own if x is not None)] for results, _, grads in (first, again)]
    assert all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))
    (out,), grads, _ = first
    weight = randn(0, *out.shape, dtype=torch.float64)
    close((grads[2] * call.args[2]).sum(), (weight * out).sum(), 256, float((weight * out).abs().sum()))
    dropped = spread(world, call.with_options(dropout_p=1.0), CUTS["four"], "four", own=[{"by": way}] * 4)
    assert not dropped[0][0].any()
    q, k = randn(0, 1, 1, 600, 4), randn(1, 1, 1, 600, 4)
    plain = Call("attention", (0.1 * q, k, torch.ones(1, 1, 600, 1)), {"dropout_p": 0.3})
    mean = spread(world, plain, {"q": [100, 500], "k": [100, 500]}, "all", own=[{"by": way}] * 3)[0][0].mean()
    assert abs(float(mean) - 1) < 0.01


@pytest.mark.parametrize("way", EXAMPLE)
def test_second_derivatives_are_refused(alone: None, way: str) -> None:
    call = example("attention", torch.float64, by=way, **EXAMPLE[way]).leaves()
    out = outputs(FUNCTIONS["attention"](*call.args, **call.kwargs))[0]
    grads = torch.autograd.grad(out.square().sum(), call.args, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grads[1].sum(), call.args, allow_unused=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, and gloo's tensors are on the CPU")
@pytest.mark.parametrize("way", EXAMPLE)
def test_kernels_compute_the_parts(world: World, way: str) -> None:
    """With the windows and shifted biases that parts have, as the eager backend does."""
    call = example("attention", torch.float32, lengths=None, softcap=3.0, **EXAMPLE[way])
    own = [{"by": way, "backend": backend} for backend in ("triton", "eager")]
    (ours, grads, shares), (expected, expected_grads, expected_shares) = (
        spread(world, call, CUTS["pair"], "pair", own=[options] * 2) for options in own
    )
    steepest = max(float(x.abs().max()) for x in expected_grads if x is not None)
    for x, y in zip(ours, expected, strict=True):
        close(x, y, ulps=64)
    for found, right in ((grads, expected_grads), *zip(shares, expected_shares, strict=True)):
        for x, y in zip(found, right, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                close(x, y, 256, steepest)

"""A sequence over several processes is the sequence in one: results, gradients, dropout, and a group of one process."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import distributed_world
import pytest
import torch
from checks import close, close_gradients, outputs
from distributed_world import (
    AXES,
    CUTS,
    FUNCTIONS,
    MEMBERS,
    NAMES,
    VARIANTS,
    Outcome,
    World,
    answer,
    example,
    pieces,
    spread,
    whole,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Call, attention_calls, gau_calls, mixed_chunk_calls, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashgau
from flashgau.distributed import context_parallel_attention
from flashgau.distributed.agreement import of_rank, shares
from flashgau.distributed.ways import heads_of
from flashgau.ops import linear_part

alone = distributed_world.alone
world = distributed_world.world


# Equality


def poison(call: Call) -> Call:
    """The same call with NaN in the padding of keys, and of queries where they are as many."""
    axis, kinds = AXES[call.name]
    keys = call.args[1].shape[axis]
    lengths = call.kwargs["lengths"]

    def filled(x: Tensor, kind: str) -> Tensor:
        if kind == "q" and x.shape[axis] != keys:
            return x
        shape = [-1, *[1] * (x.dim() - 1)]
        places = torch.arange(x.shape[axis]).view([-1 if a == axis else 1 for a in range(x.dim())])
        return torch.where(places < lengths.view(shape), x, torch.nan)

    args = tuple(filled(x, kind) for x, kind in zip(call.args, kinds, strict=False))
    return Call(call.name, args, call.kwargs)


def check_equal(
    world: World, call: Call, cuts: dict[str, list[int]], group: str, needs: list[Any] | None, **more: Any
) -> None:
    """With `more` options, which the function for several processes alone has."""
    results, _, own = spread(world, call, cuts, group, needs=needs, own=[more] * len(MEMBERS[group]))
    expected, expected_grads = whole(call)
    for x, y in zip(results, expected, strict=True):
        close(x, y, ulps=64)
    axis, kinds = AXES[call.name]
    steepest = max((float(g.abs().max()) for g in expected_grads if g is not None and g.numel()), default=0.0)
    names = [key for key, x in call.kwargs.items() if isinstance(x, Tensor)]
    for place, gradient in enumerate(expected_grads):
        if gradient is None:
            continue
        if place < len(call.args):  # each process that asked has its slice
            for rank, part in enumerate(pieces(gradient, axis, cuts[kinds[place]])):
                asked = needs is None or needs[rank][0][place]
                assert (own[rank][place] is not None) == asked
                if asked:
                    close(own[rank][place], part, 256, steepest)
        elif needs is None or all(shared for _, shared in needs):  # each has its share
            shared = torch.stack([rank[place] for rank in own]).sum(0)
            assert call.kwargs[names[place - len(call.args)]].shape == shared.shape
            close(shared, gradient, 256, steepest)


def drawn_cuts(draw: Any, n: int, parts: int, unit: int = 1) -> list[int]:
    """Where a sequence is cut: anywhere at multiples of `unit`, so that slices may be empty, and at its end."""
    places = st.sampled_from([*range(0, n + 1, unit), n])
    return sorted(draw(places) for _ in range(parts - 1))


def drawn_needs(draw: Any, count: int, parts: int) -> list[Any] | None:
    """Which gradients each process wants: all, or any that come."""
    if draw(st.booleans()):
        return None
    flag = st.booleans()
    return [([draw(flag) for _ in range(count)], draw(flag)) for _ in range(parts)]


GROUPS = st.sampled_from(sorted(MEMBERS))


@given(data=st.data(), group=GROUPS)
def test_attention_of_slices_is_attention_of_the_whole(world: World, data: Any, group: str) -> None:
    """All options together, slices of any lengths, queries cut elsewhere than keys, any heads on any processes."""
    call = data.draw(attention_calls(dtype=torch.float64)).with_options(dropout_p=0.0)
    if (gate := call.kwargs.pop("gate", None)) is not None:
        call = Call(call.name, (*call.args, gate), call.kwargs)
    parts = len(MEMBERS[group])
    assume(call.args[0].shape[1] >= parts)
    if "lengths" in call.kwargs and data.draw(st.booleans()):
        call = poison(call)
    call = call.with_options(backend=data.draw(st.sampled_from([None, "reference"])))
    cuts = {"q": drawn_cuts(data.draw, call.args[0].shape[2], parts)}
    cuts["k"] = drawn_cuts(data.draw, call.args[1].shape[2], parts)
    check_equal(world, call, cuts, group, drawn_needs(data.draw, len(call.args), parts))


@given(data=st.data(), group=GROUPS)
def test_gau_of_slices_is_gau_of_the_whole(world: World, data: Any, group: str) -> None:
    call = data.draw(gau_calls(dtype=torch.float64))
    parts = len(MEMBERS[group])
    assume(call.args[2].shape[-1] >= parts)
    if "lengths" in call.kwargs and data.draw(st.booleans()):
        call = poison(call)
    call = call.with_options(backend=data.draw(st.sampled_from([None, "reference"])))
    cuts = {"q": drawn_cuts(data.draw, call.args[0].shape[1], parts)}
    cuts["k"] = drawn_cuts(data.draw, call.args[1].shape[1], parts)
    check_equal(world, call, cuts, group, drawn_needs(data.draw, len(call.args), parts))


@given(data=st.data(), group=GROUPS)
def test_mixed_chunk_of_slices_is_mixed_chunk_of_the_whole(world: World, data: Any, group: str) -> None:
    call = data.draw(mixed_chunk_calls(dtype=torch.float64, stateful=False))
    parts = len(MEMBERS[group])
    if "lengths" in call.kwargs and data.draw(st.booleans()):
        call = poison(call)
    call = call.with_options(backend=data.draw(st.sampled_from([None, "reference"])))
    bounds = call.kwargs.get("cu_seqlens", torch.tensor([0, call.args[0].shape[1]])).tolist()
    places = [place for a, b in pairwise(bounds) for place in range(a, b, call.kwargs["chunk_size"])]
    place = st.sampled_from([0, *places, bounds[-1]])
    cuts = {"q": sorted(data.draw(place) for _ in range(parts - 1))}
    check_equal(world, call, cuts, group, drawn_needs(data.draw, len(call.args), parts))


def test_a_bias_for_each_of_two_heads_goes_with_its_head(world: World) -> None:
    q, k, v = (randn(seed, 2, 2, 5, 3, dtype=torch.float64) for seed in range(3))
    for shape in ((2, 9), (2, 2, 9), (2, 1, 9)):
        call = Call("attention", (q, k, v), {"rel_bias": randn(3, *shape, dtype=torch.float64)})
        check_equal(world, call, {"q": [2], "k": [5]}, "pair", None)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_that_count_in_bytes(world: World, name: str) -> None:
    """Sequences are longer than their type counts, and a slice may begin behind the end of a row."""
    count = {"attention": 3, "gau_attention": 4, "mixed_chunk_attention": 5}[name]
    shape = (2, 2, 256, 3) if name == "attention" else (2, 256, 3)
    args = tuple(randn(seed, *shape, dtype=torch.float64) for seed in range(count))
    for causal in (True, False):
        for lengths in (torch.tensor([100, 200], dtype=torch.uint8), torch.tensor([127, 3], dtype=torch.int8)):
            options = {"lengths": lengths, "causal": causal}
            if name == "mixed_chunk_attention":
                options |= {"chunk_size": 64}
            check_equal(world, Call(name, args, options), {"q": [128], "k": [128]}, "pair", None)


@given(heads=st.integers(1, 9), group=st.integers(1, 9), data=st.data())
def test_heads_are_divided_so_that_each_process_has_some_with_their_keys(heads: int, group: int, data: Any) -> None:
    processes = data.draw(st.integers(1, heads * group))
    q_heads, k_heads = heads_of(heads * group, heads, processes)
    assert [a for a, _ in q_heads] == [0, *(b for _, b in q_heads[:-1])]
    assert q_heads[-1][1] == heads * group
    for (a, b), (first, last) in zip(q_heads, k_heads, strict=True):
        assert a < b
        # Attention gives its query head i the key head i / (query heads per key head).
        each = (b - a) // (last - first)
        assert [first + i // each for i in range(b - a)] == [i // group for i in range(a, b)]


def test_wide_columns_are_divided_by_units() -> None:
    assert shares(2048, 8, 16) == [256] * 8
    assert shares(80, 3, 16) == [32, 32, 16]
    assert shares(5, 3) == [2, 2, 1]


def errors_of(found: list[Any], exact: list[Any]) -> list[float]:
    """The largest error of each tensor."""
    both = [(x, y) for x, y in zip(found, exact, strict=True) if x is not None and y is not None]
    return [float(torch.where(torch.isfinite(y), x.double() - y, 0).abs().max()) for x, y in both]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "causal"), VARIANTS)
def test_low_precision_errs_no_more_than_one_process(world: World, name: str, causal: bool, dtype: torch.dtype) -> None:
    check_precision(world, example(name, dtype, causal=causal))


def check_precision(world: World, call: Call, own: list[Any] | None = None) -> None:
    """Errors in half precision beside those of one process; `own` are options that this process alone has not."""
    results, grads, _ = spread(world, call, CUTS["all"], "all", own=own)
    dtype = call.args[0].dtype
    single, single_grads = whole(call)
    exact, exact_grads = whole(call.map(lambda x: x.double() if x.is_floating_point() else x))
    assert [x.dtype for x in results] == [x.dtype for x in single]
    count = len(call.args)
    for found, one, right in ((results, single, exact), (grads, single_grads[:count], exact_grads[:count])):
        sizes = [float(torch.where(torch.isfinite(x), x, 0).abs().max()) for x in right if x is not None]
        for ours, theirs, size in zip(errors_of(found, right), errors_of(one, right), sizes, strict=True):
            assert ours <= 2 * theirs + 2 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_one_process_alone_wants(world: World, name: str) -> None:
    check_alone(world, example(name, torch.float64))


def check_alone(world: World, call: Call, **more: Any) -> None:
    """The others take part in what one process needs."""
    count, options = len(call.args), [more] * 3
    _, _, everything = spread(world, call, CUTS["all"], "all", own=options)
    for rank in range(3):
        for place in (*range(count), None):
            needs = [
                ([one == rank and x == place for x in range(count)], one == rank and place is None) for one in range(3)
            ]
            _, _, own = spread(world, call, CUTS["all"], "all", needs=needs, own=options)
            for one in range(3):
                for x, (found, expected) in enumerate(zip(own[one], everything[one], strict=True)):
                    wanted = one == rank and (x == place or (place is None and x >= count))
                    assert (found is not None) == (wanted and expected is not None)
                    assert found is None or torch.equal(found, expected)


def test_parts_of_a_gradient_in_half_precision_are_summed_in_fp32(world: World) -> None:
    call = example("gau_attention", torch.bfloat16, lengths=None)
    _, grads, _ = spread(world, call, CUTS["all"], "all")
    weight = randn(0, 2, 16, 48, dtype=torch.float64)
    parts = []
    for columns in (slice(0, 16), slice(16, 32), slice(32, 48)):
        q, k, v, gate = call.args
        leaves = [x.clone().requires_grad_() for x in (q, k, v[..., columns], gate[..., columns])]
        out = flashgau.gau_attention(*leaves, **call.kwargs)
        parts.append(torch.autograd.grad((out.double() * weight[..., columns]).sum(), leaves[:2]))
    for found, theirs in zip(grads, zip(*parts, strict=True), strict=False):
        assert torch.equal(found, torch.stack(theirs).float().sum(0).bfloat16())


@pytest.mark.parametrize("group", MEMBERS)
@pytest.mark.parametrize(("name", "causal"), VARIANTS)
def test_every_run_gives_the_same_bits(world: World, name: str, causal: bool, group: str) -> None:
    call = example(name, torch.float32, causal=causal)
    first, again = (spread(world, call, CUTS[group], group) for _ in range(2))
    tensors = [[*results, *(x for own in grads for x in own if x is not None)] for results, _, grads in (first, again)]
    assert all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_sums_over_blocks_of_one_token(alone: None, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_part, "_BLOCK_ELEMENTS", 1)
    call = example("mixed_chunk_attention", torch.float64, causal=causal)
    leaves = call.leaves()
    weights = [randn(0, *call.args[4].shape, dtype=torch.float64)]
    found, expected = answer(call.name, list(leaves.args), leaves.kwargs, weights), whole(call)
    for x, y in zip(found[0], expected[0], strict=True):
        close(x, y)
    ours, theirs = ([x for x in grads if x is not None] for _, grads in (found, expected))
    close_gradients(ours, theirs)


def test_nothing_as_long_as_the_values_is_made_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_part, "_BLOCK_ELEMENTS", 1024)
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            parts = result if isinstance(result, (tuple, list)) else [result]
            made.extend(x.numel() for x in parts if isinstance(x, Tensor) and x.dtype == torch.float32)
            return result

    lin_q, lin_k = (randn(seed, 1, 512, 4, dtype=torch.bfloat16).requires_grad_() for seed in (0, 1))
    v, gate = (randn(seed, 1, 512, 32, dtype=torch.bfloat16).requires_grad_() for seed in (2, 3))
    with Watch():
        kv = linear_part.linear_sums(lin_k, v, torch.tensor([500]))
        out = linear_part.add_linear_part(v, lin_q, kv, gate, kv.new_ones(1, 1, 1), torch.tensor([500]), "identity")
        out.sum().backward()
    assert 0 < max(made) <= 1024


# Dropout


def dropped(call: Call, common: int) -> Outcome:
    """Results and gradients of attention in one process, each part of its heads with the seed of a process."""
    axis = 1
    weights = [randn(i, *x.shape, dtype=torch.float64) for i, x in enumerate(outputs(call(dropout_seed=0)))]
    q, k, v, gate = leaves = [x.clone().requires_grad_() for x in call.args]
    shared = {key: call.kwargs[key].clone().requires_grad_() for key in ("rel_bias", "sinks")}
    parts = []
    for rank, ((a, b), (first, last)) in enumerate(zip(*heads_of(6, 2, 3), strict=True)):
        options = call.kwargs | {key: x[a:b].contiguous() for key, x in shared.items()}
        options["dropout_seed"] = of_rank(common, rank)
        options["gate"] = gate[:, a:b]
        parts.append(outputs(flashgau.attention(q[:, a:b], k[:, first:last], v[:, first:last], **options)))
    results = [torch.cat(own, axis) for own in zip(*parts, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for x, weight in zip(results, weights, strict=True):
        total = total + (torch.where(torch.isfinite(x), x, 0).double() * weight).sum()
    total.backward()
    return [x.detach() for x in results], [x.grad for x in (*leaves, *shared.values())]


def check_dropped(world: World, call: Call, found: Any, common: int) -> None:
    """What several processes gave is that, and so are the sums of their gradients."""
    results, grads, own = found
    expected, expected_grads = dropped(call, common)
    for x, y in zip(results, expected, strict=True):
        close(x, y, 64)
    steepest = max(float(x.abs().max()) for x in expected_grads)
    shared = [torch.stack([x for x in parts if x is not None]).sum(0) for parts in list(zip(*own, strict=True))[4:6]]
    for x, y in zip([*grads[:4], *shared], expected_grads, strict=True):
        close(x, y, 256, steepest)


def by_heads(world: World, call: Call, seeds: tuple[int, ...] = ()) -> Any:
    """What `spread` gives of it; `seeds` are where the processes' generators stand."""
    own = [{"by": "heads", "seed": seed} for seed in seeds] or [{"by": "heads"}] * 3
    return spread(world, call, CUTS["all"], "all", function="seeded" if seeds else None, own=own)


def test_each_process_drops_by_its_own_seed(world: World) -> None:
    """What its heads give is attention with the seed that comes from the common one and its rank."""
    for seed in (5, -7, torch.tensor([2**62 + 1])):
        call = example("attention", torch.float64, dropout_p=0.4, dropout_seed=seed)
        check_dropped(world, call, by_heads(world, call), int(seed))
    assert len({of_rank(seed, rank) for seed in range(100) for rank in range(8)}) == 800


def test_a_seed_that_nobody_gave_is_the_first_process_s(world: World) -> None:
    """One draw for all, wherever their generators stand, which is in the heads and gradients of every process."""
    call = example("attention", torch.float64, dropout_p=0.4)
    torch.manual_seed(7)
    drawn = int(torch.randint(2**62, (1,), dtype=torch.int64))
    check_dropped(world, call, by_heads(world, call, (7, 8, 9)), drawn)
    # Dropping everything, or another half in every call.
    call = example("attention", torch.float64, dropout_p=1.0)
    results, grads, _ = spread(world, call, CUTS["all"], "all")
    assert all(not x.any() for x in (results[0], *grads[2:]) if x is not None)
    call = call.with_options(dropout_p=0.3, lengths=None)
    first, second = (spread(world, call, CUTS["all"], "all")[0][0] for _ in range(2))
    assert not torch.equal(first, second)
    # With values of ones, and neither sinks nor hidden keys, a row is the mean of kept weights / (1 - p): 1 on average.
    q, k = randn(0, 1, 3, 600, 4), randn(1, 1, 3, 600, 4)
    plain = Call("attention", (0.1 * q, k, torch.ones(1, 3, 600, 1)), {"dropout_p": 0.3})
    mean = spread(world, plain, {"q": [100, 500], "k": [100, 500]}, "all")[0][0].mean((0, 2, 3))
    assert torch.allclose(mean, torch.ones(3), atol=0.01)


# Alone


@pytest.mark.parametrize(("name", "causal"), VARIANTS)
def test_one_process_computes_what_it_would_without(alone: None, name: str, causal: bool) -> None:
    """Under autocast too, whose dtype results have, while sums between processes stay in fp32."""
    call = example(name, torch.float32, causal=causal)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found, expected = outputs(FUNCTIONS[name](*call.args, **call.kwargs)), outputs(call())
        for x, y in zip(found, expected, strict=True):
            close(x, y, ulps=0 if name != "mixed_chunk_attention" else 16)


@pytest.mark.parametrize(("name", "causal"), VARIANTS)
def test_second_derivatives_are_refused(alone: None, name: str, causal: bool) -> None:
    for backend in (None, "reference"):
        call = example(name, torch.float64, causal=causal, backend=backend).leaves()
        out = outputs(FUNCTIONS[name](*call.args, **call.kwargs))[0]
        grads = torch.autograd.grad(out.square().sum(), call.args, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match="differentiable once"):
                torch.autograd.grad(grad.sum(), call.args, allow_unused=True, retain_graph=True)


def test_compiled_code_calls_them_between_its_graphs(alone: None) -> None:
    call = example("attention", torch.float64, return_lse=False)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = context_parallel_attention(2 * q, k, v, causal=True)
        assert isinstance(out, Tensor)
        return out + 1

    close(torch.compile(model, backend="eager")(*call.args[:3]), model(*call.args[:3]), ulps=0)

"""A sequence over several processes is the sequence in one: results, gradients, and errors that reach everyone.

Three processes wait for calls of this module's tests, each of its own slices. Calls go to all of them, or to the first
and the third, which are a group beside the default one.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import close, close_gradients, outputs
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Call, attention_calls, gau_calls, mixed_chunk_calls, randn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flashgau
from flashgau.distributed import (
    context_parallel_attention,
    context_parallel_gau,
    context_parallel_mixed_chunk,
    mixed_chunk,
)
from flashgau.distributed.agreement import Team, checksum, shares
from flashgau.distributed.attention import _heads, _of_rank

MEMBERS = {"all": (0, 1, 2), "pair": (0, 2)}
FUNCTIONS: dict[str, Any] = {
    "attention": context_parallel_attention,
    "gau_attention": context_parallel_gau,
    "mixed_chunk_attention": context_parallel_mixed_chunk,
}
NAMES = tuple(FUNCTIONS)
# The token axis of each argument, and whether its tokens are queries or keys.
AXES = {
    "attention": (2, "qkk"),
    "gau_attention": (1, "qkkq"),
    "mixed_chunk_attention": (1, "qqqqqq"),
}
Outcome = tuple[list[Tensor], list[Any]]  # results, and gradients: a tensor or None


def several(*calls: Any, backwards: str, group: Any, checkpointed: str = "") -> list[Tensor]:
    """The gradients of calls after backwards in this order, a digit for each; "+" is one more call.

    Activation checkpointing makes the "call" again, or "more" than that.
    """
    totals: list[Tensor] = []
    leaves: list[Tensor] = []

    def result(name: str, options: dict[str, Any], *own: Tensor) -> Any:
        return FUNCTIONS[name](*own, **options, group=group)

    def total(name: str, options: dict[str, Any], *own: Tensor) -> Tensor:
        made = (
            checkpoint(result, name, options, *own, use_reentrant=False)
            if checkpointed == "call"
            else result(name, options, *own)
        )
        return sum((torch.where(torch.isfinite(x), x, 0).double().sin().sum() for x in outputs(made)), torch.zeros(()))

    for name, args, options in calls:
        own = [x.detach().requires_grad_() for x in args]
        leaves += own
        if checkpointed == "more":
            totals.append(checkpoint(total, name, options, *own, use_reentrant=False))
        else:
            totals.append(total(name, options, *own))
    for place in backwards:
        if place == "+":
            name, args, options = calls[0]
            total(name, options, *args)
        else:
            totals[int(place)].backward(retain_graph=True)
    return [x.grad if x.grad is not None else torch.zeros(()) for x in leaves]


def seeded(*args: Tensor, seed: int, **options: Any) -> Any:
    """Attention in a process whose generator stands anywhere."""
    torch.manual_seed(seed)
    return context_parallel_attention(*args, **options)


def meshed(*args: Tensor, group: Any, **options: Any) -> Any:
    """Attention over the processes of a device mesh of one dimension."""
    mesh = DeviceMesh.from_group(group or dist.group.WORLD, "cpu", mesh_dim_names=("context",))
    return context_parallel_attention(*args, group=mesh, **options)


FUNCTIONS |= {"several": several, "seeded": seeded, "meshed": meshed}


def answer(function: str, args: list[Any], options: dict[str, Any], weights: list[Tensor] | None) -> Outcome:
    """Results, and the gradients of a weighted sum of them for every floating tensor that asks for one."""
    leaves = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
    call = FUNCTIONS.get(function) or getattr(flashgau, function.removeprefix("single "))
    results = outputs(call(*args, **options))
    if weights is not None:
        total = torch.zeros((), dtype=torch.float64)
        for x, weight in zip(results, weights, strict=True):
            total = total + (torch.where(torch.isfinite(x), x, 0).double() * weight).sum()
        if total.requires_grad:
            total.backward()
    return [x.detach() for x in results], [x.grad for x in leaves]


def tell(connection: Connection, message: Any) -> None:
    """Send an object; its tensors as bytes, where connection.send would share their memory."""
    connection.send_bytes(pickle.dumps(message))


def hear(connection: Connection) -> Any:
    """Receive one."""
    return pickle.loads(connection.recv_bytes())


def work(rank: int, folder: str, handle: str) -> None:
    """One of the processes: do calls as they come."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=30))
    groups = {name: dist.new_group(list(members)) for name, members in MEMBERS.items() if name != "all"}
    with Connection(int(handle)) as parent:
        while (request := hear(parent)) is not None:
            function, args, options, weights, group, needs, grad = request
            args = [
                x.detach().requires_grad_(need) if isinstance(x, Tensor) else x
                for x, need in zip(args, needs[0], strict=True)
            ]
            tensors = {key: x for key, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()}
            options |= {key: x.detach().requires_grad_(needs[1]) for key, x in tensors.items()}
            try:
                with torch.set_grad_enabled(grad):
                    found: Any = answer(function, args, options | {"group": groups.get(group)}, weights)
                tell(parent, ("results", found))
            except Exception as error:
                tell(parent, ("error", (type(error), str(error))))
    dist.destroy_process_group()


class World:
    """The processes, as the tests see them."""

    def __init__(self, connections: list[Connection], workers: list[subprocess.Popen[str]]) -> None:
        self.connections, self.workers = connections, workers

    def ask(
        self,
        function: str | list[str],
        args: list[Any],
        options: list[dict[str, Any]],
        group: str = "all",
        weights: list[Any] | None = None,
        needs: list[Any] | None = None,
        grad: list[bool] | None = None,
    ) -> list[tuple[str, Any]]:
        """One call: for each process of the group its arguments, options and so on; what became of each."""
        members = MEMBERS[group]
        for place, rank in enumerate(members):
            name = function if isinstance(function, str) else function[place]
            needed = needs[place] if needs else ([weights is not None] * len(args[place]), weights is not None)
            own = weights[place] if weights else None
            request = (name, args[place], options[place], own, group, needed, grad[place] if grad else True)
            tell(self.connections[rank], request)
        for rank in members:
            if not self.connections[rank].poll(300):
                for worker in self.workers:  # so that later calls fail at once
                    worker.kill()
                pytest.fail(f"process {rank} hangs")
        return [hear(self.connections[rank]) for rank in members]

    def errors(self, *args: Any, **kwargs: Any) -> list[tuple[type, str]]:
        """The same where every process must raise an error."""
        found = self.ask(*args, **kwargs)
        assert [kind for kind, _ in found] == ["error"] * len(found)
        return [error for _, error in found]

    def results(self, *args: Any, **kwargs: Any) -> list[Outcome]:
        """The same where none may."""
        found = self.ask(*args, **kwargs)
        assert [kind for kind, _ in found] == ["results"] * len(found), found
        return [result for _, result in found]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_distributed as here;"
        "here.work(int(sys.argv[2]), *sys.argv[3:])"
    )
    connections, workers = [], []
    try:
        for rank in range(3):
            ours, theirs = Pipe()
            arguments = [str(Path(__file__).parent), str(rank), str(folder), str(theirs.fileno())]
            worker = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
            )
            theirs.close()  # so that only the worker holds it, and its end is noticed
            connections.append(ours)
            workers.append(worker)
        yield World(connections, workers)
        for connection in connections:
            tell(connection, None)
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * 3, "\n".join(errors)
    assert "Warning" not in "".join(errors), errors


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Equality


def pieces(x: Tensor, axis: int, cuts: list[int]) -> list[Tensor]:
    """x cut along an axis at these places."""
    ends = [0, *cuts, x.shape[axis]]
    return [x.narrow(axis, a, b - a) for a, b in pairwise(ends)]


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


def spread(
    world: World,
    call: Call,
    cuts: dict[str, list[int]],
    group: str,
    seed: int = 0,
    needs: list[Any] | None = None,
    function: str | None = None,
    own: list[dict[str, Any]] | None = None,
) -> tuple[list[Tensor], list[Any], list[list[Any]]]:
    """A call in several processes: results and gradients of its arguments put together, and those of each process.

    `function` is called instead of the call's own, with options `own` for each process.
    """
    axis, kinds = AXES[call.name]
    members = len(MEMBERS[group])
    single = outputs(call(backend="reference"))
    weights = [pieces(randn(seed + i, *x.shape, dtype=torch.float64), axis, cuts["q"]) for i, x in enumerate(single)]
    args = [pieces(x, axis, cuts[kind]) for x, kind in zip(call.args, kinds, strict=False)]
    found = world.results(
        function or call.name,
        [list(parts) for parts in zip(*args, strict=True)],
        [call.kwargs | more for more in own or [{}] * members],
        group=group,
        weights=[list(parts) for parts in zip(*weights, strict=True)],
        needs=needs,
    )
    results = [torch.cat(parts, axis) for parts in zip(*(results for results, _ in found), strict=True)]
    grads = [grad for _, grad in found]
    joined: list[Any] = []
    for place in range(len(call.args)):
        parts = [grad[place] for grad in grads]
        joined.append(torch.cat(parts, axis) if all(x is not None for x in parts) else None)
    return results, joined, grads


def whole(call: Call, seed: int = 0) -> Outcome:
    """The same call in one process."""
    leaves = call.leaves()
    weights = [randn(seed + i, *x.shape, dtype=torch.float64) for i, x in enumerate(outputs(call()))]
    return answer(f"single {call.name}", list(leaves.args), leaves.kwargs, weights)


def check_equal(world: World, call: Call, cuts: dict[str, list[int]], group: str, needs: list[Any] | None) -> None:
    results, _, own = spread(world, call, cuts, group, needs=needs)
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
    parts = len(MEMBERS[group])
    assume(call.args[0].shape[1] >= parts)
    if "lengths" in call.kwargs and data.draw(st.booleans()):
        call = poison(call)
    call = call.with_options(backend=data.draw(st.sampled_from([None, "reference"])))
    cuts = {"q": drawn_cuts(data.draw, call.args[0].shape[2], parts)}
    cuts["k"] = drawn_cuts(data.draw, call.args[1].shape[2], parts)
    check_equal(world, call, cuts, group, drawn_needs(data.draw, 3, parts))


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
    call.kwargs.pop("cu_seqlens", None)  # then one sequence
    parts = len(MEMBERS[group])
    if "lengths" in call.kwargs and data.draw(st.booleans()):
        call = poison(call)
    call = call.with_options(backend=data.draw(st.sampled_from([None, "reference"])))
    cuts = {"q": drawn_cuts(data.draw, call.args[0].shape[1], parts, call.kwargs["chunk_size"])}
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
    q_heads, k_heads = _heads(heads * group, heads, processes)
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


SIXTEEN = torch.tensor([16, 11])
CUTS = {"all": {"q": [4, 12], "k": [0, 9]}, "pair": {"q": [8], "k": [3]}}  # whole chunks of 4 queries


def example(name: str, dtype: torch.dtype, **options: Any) -> Call:
    """A call with many options at once."""

    def make(seed: int, *shape: int) -> Tensor:
        return randn(seed, *shape, dtype=dtype)

    if name == "attention":
        args = [make(0, 2, 6, 16, 8), make(1, 2, 2, 16, 8), make(2, 2, 2, 16, 5)]
        own = {
            "causal": True,
            "rel_bias": randn(3, 6, 31),
            "sinks": randn(4, 6),
            "lengths": SIXTEEN,
            "return_lse": True,
        }
        return Call(name, tuple(args), {**own, **options})
    if name == "gau_attention":
        args = [make(0, 2, 16, 8), make(1, 2, 16, 8), make(2, 2, 16, 48), make(3, 2, 16, 48)]
        own = {"causal": True, "rel_bias": randn(4, 31), "lengths": SIXTEEN, "normalizer": "row"}
        return Call(name, tuple(args), {**own, **options})
    heads = [make(seed, 2, 16, 8) for seed in range(4)]
    own = {"chunk_size": 4, "causal": True, "rel_bias": randn(6, 7), "lengths": SIXTEEN}
    return Call(name, (*heads, make(4, 2, 16, 12), make(5, 2, 16, 12)), {**own, **options})


VARIANTS = [*((name, True) for name in NAMES), ("mixed_chunk_attention", False)]


def errors_of(found: list[Any], exact: list[Any]) -> list[float]:
    """The largest error of each tensor."""
    both = [(x, y) for x, y in zip(found, exact, strict=True) if x is not None and y is not None]
    return [float(torch.where(torch.isfinite(y), x.double() - y, 0).abs().max()) for x, y in both]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "causal"), VARIANTS)
def test_low_precision_errs_no_more_than_one_process(world: World, name: str, causal: bool, dtype: torch.dtype) -> None:
    call = example(name, dtype, causal=causal)
    results, grads, _ = spread(world, call, CUTS["all"], "all")
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
    """The others take part in what it needs."""
    call = example(name, torch.float64)
    count = len(call.args)
    _, _, everything = spread(world, call, CUTS["all"], "all")
    for rank in range(3):
        for place in (*range(count), None):
            needs = [
                ([one == rank and x == place for x in range(count)], one == rank and place is None) for one in range(3)
            ]
            _, _, own = spread(world, call, CUTS["all"], "all", needs=needs)
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
    monkeypatch.setattr(mixed_chunk, "_BLOCK_ELEMENTS", 1)
    call = example("mixed_chunk_attention", torch.float64, causal=causal)
    leaves = call.leaves()
    weights = [randn(0, *call.args[4].shape, dtype=torch.float64)]
    found, expected = answer(call.name, list(leaves.args), leaves.kwargs, weights), whole(call)
    for x, y in zip(found[0], expected[0], strict=True):
        close(x, y)
    ours, theirs = ([x for x in grads if x is not None] for _, grads in (found, expected))
    close_gradients(ours, theirs)


def test_nothing_as_long_as_the_values_is_made_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_chunk, "_BLOCK_ELEMENTS", 1024)
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
        kv = mixed_chunk._Sums.apply(lin_k, v, torch.tensor([500]))
        out = mixed_chunk._Joined.apply(v, lin_q, kv, gate, kv.new_ones(1, 1, 1), torch.tensor([500]))
        out.sum().backward()
    assert 0 < max(made) <= 1024


# Dropout


def dropped(call: Call, common: int) -> Outcome:
    """Results and gradients of attention in one process, each part of its heads with the seed of a process."""
    axis = 1
    weights = [randn(i, *x.shape, dtype=torch.float64) for i, x in enumerate(outputs(call(dropout_seed=0)))]
    q, k, v = leaves = [x.clone().requires_grad_() for x in call.args]
    shared = {key: call.kwargs[key].clone().requires_grad_() for key in ("rel_bias", "sinks")}
    parts = []
    for rank, ((a, b), (first, last)) in enumerate(zip(*_heads(6, 2, 3), strict=True)):
        options = call.kwargs | {key: x[a:b].contiguous() for key, x in shared.items()}
        options["dropout_seed"] = _of_rank(common, rank)
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
    shared = [torch.stack([x for x in parts if x is not None]).sum(0) for parts in list(zip(*own, strict=True))[3:5]]
    for x, y in zip([*grads[:3], *shared], expected_grads, strict=True):
        close(x, y, 256, steepest)


def test_each_process_drops_by_its_own_seed(world: World) -> None:
    """What its heads give is attention with the seed that comes from the common one and its rank."""
    for seed in (5, -7, torch.tensor([2**62 + 1])):
        call = example("attention", torch.float64, dropout_p=0.4, dropout_seed=seed)
        check_dropped(world, call, spread(world, call, CUTS["all"], "all"), int(seed))
    assert len({_of_rank(seed, rank) for seed in range(100) for rank in range(8)}) == 800


def test_a_seed_that_nobody_gave_is_the_first_process_s(world: World) -> None:
    """One draw for all, wherever their generators stand, which is in the heads and gradients of every process."""
    call = example("attention", torch.float64, dropout_p=0.4)
    torch.manual_seed(7)
    drawn = int(torch.randint(2**62, (1,), dtype=torch.int64))
    found = spread(world, call, CUTS["all"], "all", function="seeded", own=[{"seed": seed} for seed in (7, 8, 9)])
    check_dropped(world, call, found, drawn)
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


# Backwards of several calls


def several_calls(group: str, *names: tuple[str, int]) -> list[list[Any]]:
    """For each process of the group, the arguments of `several`: a call of each name, of this many tokens in all."""
    processes: list[list[Any]] = [[] for _ in MEMBERS[group]]
    for place, (name, tokens) in enumerate(names):
        call = example(name, torch.float64)
        axis, kinds = AXES[name]
        options = {key: x for key, x in call.kwargs.items() if key not in ("lengths", "rel_bias")}
        cuts = CUTS[group]["q"]
        args = [torch.cat([x] * (tokens // 16), axis) * (place + 1) for x in call.args]
        for own, parts in zip(
            processes,
            zip(*(pieces(x, axis, cuts) for x, _ in zip(args, kinds, strict=False)), strict=True),
            strict=True,
        ):
            own.append((name, list(parts), options))
    return processes


TWICE = [
    (("attention", 16), ("attention", 16)),
    (("gau_attention", 16), ("gau_attention", 16)),
    (("mixed_chunk_attention", 16), ("mixed_chunk_attention", 32)),  # what is sent is of one size
    (("attention", 16), ("attention", 32)),
    (("gau_attention", 16), ("mixed_chunk_attention", 16)),
]


@pytest.mark.parametrize(
    ("calls", "checkpointed"),
    [
        *((calls, again) for calls in TWICE for again in ("", "call")),
        *((calls, "more") for calls in TWICE[:3]),  # others would make calls of each other's sizes again
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(str(part) for call in x for part in call),
)
def test_backwards_in_another_order_raise_in_all(world: World, calls: Any, checkpointed: str) -> None:
    """Or of one call only, or again; and what follows works as if nothing had been."""
    orders = [["01", "10", "01"], ["01", "10"], ["0", "1"], ["011", "010"]]
    if not checkpointed:  # which would take the other's call for the one that it makes again
        orders.append(["1+", "10"])
    for own_orders in orders:
        group = "all" if len(own_orders) == 3 else "pair"
        args = several_calls(group, *calls)
        options = [{"backwards": order, "checkpointed": checkpointed} for order in own_orders]
        needs = [([None] * len(own), False) for own in args]
        found = world.errors("several", args, options, group=group, needs=needs)
        assert len({said.split(": ", 1)[1] for _, said in found}) == 1
        for error, said in found:
            assert error is RuntimeError
            places = r"is in (part \d of the backward of call \d+, of|a call of) context_parallel_\w+"
            members = f"process 0 {places}, process {MEMBERS[group][1]} {places}"
            assert re.match(rf"context_parallel_\w+: {members}; expected the same calls and backwards in the", said)


@pytest.mark.parametrize("calls", TWICE, ids=lambda x: "-".join(str(part) for call in x for part in call))
def test_backwards_in_any_order_that_is_everyone_s(world: World, calls: Any) -> None:
    """Twice, too, through a graph that is kept, and through calls that checkpointing makes again."""
    gradients = {}
    plain = [(order, "") for order in ("01", "10", "0110")]
    for backwards, checkpointed in (*plain, ("01", "call"), ("10", "call"), ("01", "more"), ("10", "more")):
        args = several_calls("pair", *calls)
        options = [{"backwards": backwards, "checkpointed": checkpointed}] * 2
        needs = [([None] * len(own), False) for own in args]
        found = world.results("several", args, options, group="pair", needs=needs)
        gradients[backwards, checkpointed] = [x for results, _ in found for x in results]
    expected = gradients.pop(("01", ""))
    twice = gradients.pop(("0110", ""))
    assert all(torch.equal(x, y) for own in gradients.values() for x, y in zip(own, expected, strict=True))
    for x, y in zip(twice, expected, strict=True):
        close(x, 2 * y)


# Errors reach every process


def slices(name: str, group: str, **options: Any) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    """The arguments of each process."""
    call = example(name, torch.float32, **options)
    axis, kinds = AXES[name]
    parts = [pieces(x, axis, CUTS[group][kind]) for x, kind in zip(call.args, kinds, strict=False)]
    return [list(own) for own in zip(*parts, strict=True)], [dict(call.kwargs) for _ in MEMBERS[group]]


# What one process does wrong, and what it and the others must say.
WRONG = [
    ("attention", {0: "text"}, {}, TypeError, "`q` is a str", "refused"),
    ("attention", {0: torch.zeros(2, 6, 8)}, {}, ValueError, r"`q` has shape \(2, 6, 8\)", "refused"),
    ("attention", {1: torch.zeros(2, 2, 5, 7)}, {}, ValueError, "`k` .*D = 8 as in `q`", "refused"),
    ("attention", {2: torch.zeros(2, 2, 9, 5).double()}, {}, TypeError, "`v` has dtype torch.float64", "refused"),
    ("attention", {}, {"causal": "yes"}, TypeError, "`causal` is 'yes'", "refused"),
    ("attention", {}, {"backend": "cuda"}, ValueError, "`backend` is 'cuda'", "refused"),
    ("attention", {}, {"rel_bias": torch.zeros(5, 31)}, ValueError, "`rel_bias`", "refused"),
    ("attention", {}, {"lengths": torch.tensor([1, 2, 3])}, ValueError, "`lengths`", "refused"),
    ("attention", {}, {"cu_seqlens_k": SIXTEEN}, ValueError, "`cu_seqlens_k`", "refused"),
    ("attention", {}, {"dropout_p": 2.0}, ValueError, "`dropout_p`", "refused"),
    ("attention", {}, {"causal": False}, ValueError, "`causal` of process 1", "`causal` of process 1"),
    ("attention", {}, {"scale": 0.3}, ValueError, "`scale` of process 1", "`scale` of process 1"),
    ("attention", {}, {"sinks": None}, ValueError, "`sinks` of process 1", "`sinks` of process 1"),
    ("attention", {}, {"rel_bias": None}, ValueError, "`rel_bias` of process 1", "`rel_bias` of process 1"),
    ("attention", {}, {"lengths": SIXTEEN - 1}, ValueError, "`lengths` of process 1", "`lengths` of process 1"),
    ("attention", {}, {"return_lse": False}, ValueError, "`return_lse` of process 1", "`return_lse` of process 1"),
    ("gau_attention", {}, {"score": "relu"}, ValueError, "`score` is 'relu'", "refused"),
    ("gau_attention", {3: None}, {}, ValueError, "`gate` of process 1", "`gate` of process 1"),
    ("gau_attention", {}, {"normalizer": "keys"}, ValueError, "`normalizer` of process 1", "`normalizer` of"),
    ("mixed_chunk_attention", {4: torch.zeros(2, 8)}, {}, ValueError, "`v` has shape", "refused"),
    ("mixed_chunk_attention", {}, {"chunk_size": 0}, ValueError, "`chunk_size` is 0", "refused"),
    ("mixed_chunk_attention", {}, {"chunk_size": 2}, ValueError, "`chunk_size` of process 1", "`chunk_size` of"),
]  # fmt: skip


@pytest.mark.parametrize("group", MEMBERS)
@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0]}-{case[4]}")
def test_what_is_wrong_in_one_process_raises_in_all(world: World, case: Any, group: str) -> None:
    name, changes, options, kind, message, elsewhere = case
    wrong = MEMBERS[group][1]
    message, elsewhere = (x.replace("process 1", f"process {wrong}") for x in (message, elsewhere))
    args, kwargs = slices(name, group)
    for place, x in changes.items():
        args[1][place] = x
    kwargs[1] |= options
    needs = [([False] * len(own), False) for own in args]
    found = world.errors(name, args, kwargs, group=group, needs=needs)
    for rank, (error, said) in enumerate(found):
        assert error is (kind if rank == 1 else ValueError)
        assert said.startswith(f"{FUNCTIONS[name].__name__}: ")
        assert re.search(message if rank == 1 else elsewhere, said)
        if elsewhere == "refused" and rank != 1:
            assert f"process {wrong} refused" in said


BOTH: list[Any] = [  # what is wrong with the whole, in all processes alike
    ("attention", {"rel_bias": torch.zeros(29)}, "`rel_bias` covers P = 15 .*P >= 16, the longest sequence"),
    ("attention", {"lengths": torch.tensor([16, 17])}, "`lengths` holds 17; expected values from 0 to N = 16"),
    ("gau_attention", {"rel_bias": torch.zeros(29)}, "`rel_bias` covers P = 15"),
    ("gau_attention", {"lengths": torch.tensor([16, -1])}, "`lengths` holds -1"),
    ("mixed_chunk_attention", {"lengths": torch.tensor([16, 17])}, "`lengths` holds 17"),
    ("mixed_chunk_attention", {"chunk_size": 3, "rel_bias": None}, "4 tokens in process 0; .* of chunk_size = 3"),
    ("mixed_chunk_attention", {"rel_bias": torch.zeros(5)}, "`rel_bias` covers P = 3"),
]


@pytest.mark.parametrize(("name", "options", "message"), BOTH, ids=lambda x: x if isinstance(x, str) else "")
def test_options_are_checked_against_the_whole_sequence(world: World, name: str, options: Any, message: str) -> None:
    found = world.errors(name, *slices(name, "all", **options))
    assert len({said for _, said in found}) == 1
    assert found[0][0] is ValueError
    assert re.search(message, found[0][1])


def test_packed_offsets_are_checked_against_the_whole_sequence(world: World) -> None:
    q = randn(0, 1, 3, 4, 2)
    for offsets, message in (([0, 3, 11], "from 0 to M = 12"), ([0, 13], "from 0 to M = 12")):
        options = {"cu_seqlens": torch.tensor(offsets)}
        for error, said in world.errors("attention", [[q, q, q]] * 3, [dict(options) for _ in range(3)]):
            assert error is ValueError
            assert re.search(message, said)
    options = {"cu_seqlens": torch.tensor([0, 7, 12])}
    world.results("attention", [[q, q, q]] * 3, [dict(options) for _ in range(3)])


def test_processes_that_are_too_many_for_the_heads_or_columns(world: World) -> None:
    q, v = randn(0, 1, 2, 4, 8), randn(1, 1, 4, 2)
    for error, said in world.errors("attention", [[q, q, q]] * 3, [{} for _ in range(3)]):
        assert (error, said) == (
            ValueError,
            "context_parallel_attention: `q` has Hq = 2 heads; expected at least one for each of the 3 processes",
        )
    world.results("attention", [[q, q, q]] * 2, [{}, {}], group="pair")
    for _, said in world.errors("gau_attention", [[q[0], q[0], v.expand(2, 4, 2)]] * 3, [{} for _ in range(3)]):
        assert "`v` has E = 2 columns; expected at least one for each of the 3 processes" in said


def test_sizes_dtypes_and_modes_that_differ_between_processes(world: World) -> None:
    args, options = slices("attention", "all")
    args[2] = [x.double() for x in args[2]]
    found = {said for _, said in world.errors("attention", args, options)}
    assert found == {
        "context_parallel_attention: `q.dtype` of process 2 is not that of process 0; expected the same in all"
    }
    args, options = slices("attention", "all")
    args[1] = [x[:1] for x in args[1]]
    for own in options:
        own |= {"lengths": None}
    found = {said for _, said in world.errors("attention", args, options)}
    assert found == {"context_parallel_attention: process 1 has B = 1; expected B = 2, as process 0 has"}
    args, options = slices("attention", "all")
    found = {said for _, said in world.errors("attention", args, options, grad=[True, True, False])}
    assert len(found) == 1
    assert "`torch.is_grad_enabled()` of process 2" in found.pop()
    world.results("attention", args, options, grad=[False, False, False])
    options[1] |= {"dropout_p": 0.1}
    options[0] |= {"dropout_p": 0.1}
    options[2] |= {"dropout_p": 0.1, "dropout_seed": 3}
    assert {said for _, said in world.errors("attention", args, options)} == {
        "context_parallel_attention: `dropout_seed` of process 2 is not that of process 0; expected the same in all"
    }


def test_different_operations_in_different_processes(world: World) -> None:
    (a, b, _), (one, two, _) = slices("attention", "all")
    (*_, c), (*_, three) = slices("gau_attention", "all")
    found = world.errors(["attention", "attention", "gau_attention"], [a, b, c], [one, two, three])
    assert {said.split(": ")[1] for _, said in found} == {
        "process 0 is in a call of context_parallel_attention, process 2 is in a call of context_parallel_gau; "
        "expected the same calls and backwards in the same order in all"
    }
    assert {said.split(": ")[0] for _, said in found} == {"context_parallel_attention", "context_parallel_gau"}


def test_a_group_must_exist_and_hold_the_process(world: World, alone: None) -> None:
    q = randn(0, 1, 1, 4, 8)
    with pytest.raises(TypeError, match=r"`group` is a str; expected a torch.distributed.ProcessGroup or None, or a D"):
        context_parallel_attention(q, q, q, group="gloo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`group` does not hold process 0"):
        context_parallel_attention(q, q, q, group=dist.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`q` is on meta; expected a tensor on cpu, .* backend \(gloo\) sends"):
        context_parallel_attention(*[q.to("meta")] * 3)
    elsewhere: Any = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(ValueError, match="`x` is on cuda:0"):
        Team.of("op", None).check_device("x", elsewhere)


@pytest.mark.parametrize("group", MEMBERS)
def test_a_device_mesh_of_one_dimension_is_a_group(world: World, group: str) -> None:
    call = example("attention", torch.float64)
    expected, grads, _ = spread(world, call, CUTS[group], group)
    found, found_grads, _ = spread(world, call, CUTS[group], group, function="meshed")
    for x, y in zip([*found, *found_grads], [*expected, *grads], strict=True):
        assert x is y is None or torch.equal(x, y)


def test_a_device_mesh_of_more_dimensions_is_refused(alone: None) -> None:
    q = randn(0, 1, 1, 4, 8)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "context"))
    with pytest.raises(
        ValueError,
        match=r"context_parallel_attention: `group` is a DeviceMesh of 2 dimensions \(data, context\); "
        r'expected one of them, such as mesh\["context"\]',
    ):
        context_parallel_attention(q, q, q, group=mesh)
    assert torch.equal(
        outputs(context_parallel_attention(q, q, q, group=mesh["context"]))[0], outputs(flashgau.attention(q, q, q))[0]
    )


def test_distributed_tensors_are_refused_by_name(alone: None) -> None:
    """In the operations of a single process, too, rather than by a shape function, or for mixing the two."""
    from torch.distributed.tensor import Replicate, distribute_tensor  # a second, which the processes need not wait

    mesh = init_device_mesh("cpu", (1,))

    def whole(x: Tensor) -> Any:
        return distribute_tensor(x, mesh, [Replicate()])

    q, x, w = randn(0, 1, 1, 4, 8), randn(0, 1, 4, 8), randn(0, 6, 8)
    calls: list[tuple[Any, str]] = [
        (lambda: flashgau.attention(q, whole(q), q), "attention: `k`"),
        (lambda: flashgau.attention(q, q, q, rel_bias=whole(torch.zeros(7))), "attention: `rel_bias`"),
        (lambda: flashgau.attention(q, q, q, lengths=whole(torch.tensor([4]))), "attention: `lengths`"),
        (lambda: flashgau.glu(whole(x)), "glu: `gate`"),
        (lambda: flashgau.glu_linear(x, torch.nn.Parameter(whole(w)), w), "glu_linear: `w_gate`"),
        (lambda: flashgau.gau_attention(whole(x), x, x), "gau_attention: `q`"),
        (lambda: flashgau.mixed_chunk_attention(x, x, x, x, whole(x)), "mixed_chunk_attention: `v`"),
        (lambda: context_parallel_attention(q, whole(q), q), "context_parallel_attention: `k`"),
        (lambda: context_parallel_gau(x, x, x, rel_bias=whole(torch.zeros(7))), "context_parallel_gau: `rel_bias`"),
    ]
    for call, name in calls:
        with pytest.raises(TypeError, match=rf"^{name} is a DTensor; expected a plain tensor: x.to_local\(\)"):
            call()


def test_without_processes_the_error_says_how_to_start_them() -> None:
    q = randn(0, 1, 1, 4, 8)
    for function, args in ((context_parallel_attention, [q] * 3), (context_parallel_gau, [q[0]] * 3)):
        with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group.* torchrun"):
            function(*args)


def test_offsets_with_the_same_sums_are_told_apart() -> None:
    sums = {int(checksum(torch.tensor([a, b, c]))) for a in range(9) for b in range(9) for c in range(9)}
    assert len(sums) == 729
    assert int(checksum(torch.tensor([3, 4], dtype=torch.int32))) == int(checksum(torch.tensor([3, 4])))


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

    close(torch.compile(model, backend="eager")(*call.args), model(*call.args), ulps=0)

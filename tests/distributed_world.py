"""Four processes that wait for calls of the tests, each of its own slices of a sequence.

Calls go to all of them, which are the default group, to the first three, or to the first and the third.
"""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from functools import wraps
from itertools import pairwise
from multiprocessing.connection import Connection, Pipe
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import outputs
from started import finish, killed_at_the_end, started
from strategies import Call, randn, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashgau.distributed import (
    context_parallel_attention,
    context_parallel_gau,
    context_parallel_mixed_chunk,
    spread_tokens,
)


@wraps(context_parallel_attention)
def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None, **options: Any) -> Any:
    """Attention with its gate at the place that gates of the others have."""
    return context_parallel_attention(q, k, v, gate=gate, **options)


MEMBERS = {"all": (0, 1, 2), "pair": (0, 2), "four": (0, 1, 2, 3)}
FUNCTIONS: dict[str, Any] = {
    "attention": attend,
    "gau_attention": context_parallel_gau,
    "mixed_chunk_attention": context_parallel_mixed_chunk,
}
NAMES = tuple(FUNCTIONS)
# The token axis of each argument, and whether its tokens are queries or keys.
AXES = {
    "attention": (2, "qkkq"),
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
    return attend(*args, **options)


def log_sum_exp(*args: Tensor, **options: Any) -> Tensor:
    """Of attention that alone."""
    return attend(*args, return_lse=True, **options)[1]


def meshed(*args: Tensor, group: Any, **options: Any) -> Any:
    """Attention over the processes of a device mesh of one dimension."""
    mesh = DeviceMesh.from_group(group or dist.group.WORLD, "cpu", mesh_dim_names=("context",))
    return attend(*args, group=mesh, **options)


def layered(
    x: Tensor, weight: Tensor, *, module: torch.nn.Module, group: Any, tokens: int | None = None, **options: Any
):
    """A layer or model: its output, the gradient of its input if that has one, and those of its parameters."""
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    spread = spread_tokens(x.shape[1] if tokens is None else tokens, group)
    return gradients_of(module, x, weight, spread=spread, **options)


def gradients_of(module: torch.nn.Module, x: Tensor, weight: Tensor, **options: Any) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it, zeros where there are none."""
    module.zero_grad()
    y = module(x, **options)
    (y * weight).sum().backward()
    leaves = [*([x] if x.is_floating_point() else []), *module.parameters()]
    return [y, *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def counted(*args: Tensor, of: str = "attention", **options: Any) -> Tensor:
    """The bytes that this process sends to others in a call, and in its backward."""
    counts: list[int] = []
    send = dist.all_to_all_single

    def count(received: Tensor, sent: Tensor, gets: list[int], gives: list[int], group: Any, **more: Any) -> Any:
        counts.append(sum(gives) - gives[dist.get_rank(group)])
        return send(received, sent, gets, gives, group=group, **more)

    with mock.patch.object(dist, "all_to_all_single", count), torch.enable_grad():
        out = FUNCTIONS[of](*(x.detach().requires_grad_() for x in args), **options)
        forward = sum(counts)
        out.sum().backward()
    return torch.tensor([forward, sum(counts) - forward], dtype=torch.float64)


def traced(*args: Tensor, of: str = "attention", **options: Any) -> list[Tensor]:
    """What this process does in a call, and after a blank in its backward, as codes of letters.

    "s" where it begins to send tensors, "w" where it has to wait for those of others, "c" where it computes the
    operation or its gradient, once or more. The first "c" is the check, on no tokens.
    """
    events: list[str] = []
    send = dist.all_to_all_single

    class Computing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "flashgau" and events[-1:] != ["c"]:
                events.append("c")
            return func(*args, **(kwargs or {}))

    def begin(*args: Any, **more: Any) -> Any:
        events.append("s")
        work = send(*args, **more)
        return SimpleNamespace(wait=lambda: (events.append("w"), work.wait()))

    with mock.patch.object(dist, "all_to_all_single", begin), torch.enable_grad(), Computing():
        out = FUNCTIONS[of](*(x.detach().requires_grad_() for x in args), **options)
        events.append(" ")
        out.sum().backward()
    return [torch.tensor(list("".join(events).encode()))]


def kept(tokens: Tensor, *, module: torch.nn.Module, group: Any) -> list[Tensor]:
    """How many bytes a model keeps for its backward, beside its parameters, as a tensor."""
    own = {x.untyped_storage().data_ptr() for x in module.parameters()}
    found: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x
        return x

    spread = spread_tokens(tokens.shape[1], group) if group else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = module(tokens, spread=spread)
    total = torch.tensor(sum(x.untyped_storage().nbytes() for x in found.values()))
    y.sum().backward()
    return [total]


FUNCTIONS |= {
    "counted": counted,
    "traced": traced,
    "several": several,
    "seeded": seeded,
    "meshed": meshed,
    "log_sum_exp": log_sum_exp,
    "layered": layered,
    "kept": kept,
}


def answer(function: str, args: list[Any], options: dict[str, Any], weights: list[Tensor] | None) -> Outcome:
    """Results, and the gradients of a weighted sum of them for every floating tensor that asks for one."""
    leaves = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
    call = FUNCTIONS.get(function) or (lambda *args, **options: run(function.removeprefix("single "), args, options))
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
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=30))
    groups = {name: dist.new_group(list(members)) for name, members in MEMBERS.items() if name != "four"}
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
    connections: list[Connection] = []
    workers: list[subprocess.Popen[str]] = []
    with killed_at_the_end(workers):
        for rank in range(4):
            ours, theirs = Pipe()
            handle = theirs.fileno()
            workers.append(started("distributed_world", rank, folder, handle, pass_fds=[handle]))
            theirs.close()  # so that only the worker holds it, and its end is noticed
            connections.append(ours)
        yield World(connections, workers)
        for connection in connections:
            tell(connection, None)
        said = finish(workers, 300)
    assert "Warning" not in said, said


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pieces(x: Tensor, axis: int, cuts: list[int]) -> list[Tensor]:
    """x cut along an axis at these places."""
    ends = [0, *cuts, x.shape[axis]]
    return [x.narrow(axis, a, b - a) for a, b in pairwise(ends)]


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


SIXTEEN = torch.tensor([16, 11])
CUTS = {
    "all": {"q": [4, 12], "k": [0, 9]},
    "pair": {"q": [8], "k": [3]},
    "four": {"q": [4, 12, 12], "k": [0, 9, 15]},
}  # whole chunks of 4 queries


def example(name: str, dtype: torch.dtype, **options: Any) -> Call:
    """A call with many options at once."""

    def make(seed: int, *shape: int) -> Tensor:
        return randn(seed, *shape, dtype=dtype)

    if name == "attention":
        args = [make(0, 2, 6, 16, 8), make(1, 2, 2, 16, 8), make(2, 2, 2, 16, 5), make(5, 2, 6, 16, 5)]
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

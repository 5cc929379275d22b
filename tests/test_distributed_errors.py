"""A sequence over several processes: errors, and backwards in another order, reach every process."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import distributed_world
import pytest
import torch
import torch.distributed as dist
from checks import close, outputs
from distributed_world import AXES, CUTS, FUNCTIONS, MEMBERS, SIXTEEN, World, example, pieces, spread
from strategies import randn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import flashgau
from flashgau.distributed import context_parallel_attention, context_parallel_gau
from flashgau.distributed.agreement import GroupContext, checksum

alone = distributed_world.alone
world = distributed_world.world


# Backwards of several calls


def several_calls(group: str, *names: tuple[str, int]) -> list[list[Any]]:
    """For each process of the group, the arguments of `several`: a call of each name, of this many tokens in all.

    Behind the name of attention, by which way it goes.
    """
    processes: list[list[Any]] = [[] for _ in MEMBERS[group]]
    for place, (named, tokens) in enumerate(names):
        name, *way = named.split(" by ")
        call = example(name, torch.float64, **({"window": (5, None)} if way == ["window"] else {}))
        axis, kinds = AXES[name]
        options = {key: x for key, x in call.kwargs.items() if key not in ("lengths", "rel_bias")}
        options |= {"by": way[0]} if way else {}
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
    (("attention by window", 16), ("attention by window", 16)),
    (("attention by ring", 16), ("attention by ring", 16)),
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
    ("attention", {3: torch.zeros(2, 6, 8, 3)}, {}, ValueError, "`gate` has shape .*E = 5 as in", "refused"),
    ("attention", {3: None}, {}, ValueError, "`gate` of process 1", "`gate` of process 1"),
    ("attention", {3: torch.zeros(2, 6, 8, 1)}, {}, ValueError, "`gate` of process 1", "`gate` of process 1"),
    ("attention", {}, {"gate_activation": "silu"}, ValueError, "`gate_activation` of process 1", "`gate_act"),
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
    ("attention", {}, {"by": "ring"}, ValueError, "`by` of process 1", "`by` of process 1"),
    ("attention", {}, {"by": "rows"}, ValueError, "`by` is 'rows'; expected one of 'auto', 'heads', 'wi", "refused"),
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


def test_slices_that_end_within_a_chunk_of_a_packed_sequence(world: World) -> None:
    """The chunks of the second sequence begin at 5."""
    x = randn(0, 1, 16, 8)
    options = [{"chunk_size": 4, "cu_seqlens": torch.tensor([0, 5, 5, 16])} for _ in range(2)]
    for cut in (4, 5, 9, 13, 16):
        args = [[part] * 5 for part in pieces(x, 1, [cut])]
        world.results("mixed_chunk_attention", args, options, group="pair")
    for error, said in world.errors(
        "mixed_chunk_attention", [[part] * 5 for part in pieces(x, 1, [8])], options, group="pair"
    ):
        assert error is ValueError
        assert said == (
            "context_parallel_mixed_chunk: `quad_q` has 8 tokens in process 0; expected a slice that ends with a "
            "sequence, or a multiple of chunk_size = 4 tokens into one"
        )
    nothing = [{"chunk_size": 4, "causal": causal, "cu_seqlens": torch.tensor([0])} for causal in (True, False)]
    for own in nothing:
        world.results("mixed_chunk_attention", [[x[:, :0]] * 5] * 2, [own] * 2, group="pair")


def test_processes_that_are_too_many_for_the_heads_or_columns(world: World) -> None:
    q, v = randn(0, 1, 2, 4, 8), randn(1, 1, 4, 2)
    for error, said in world.errors("attention", [[q, q, q]] * 3, [{"by": "heads"} for _ in range(3)]):
        assert (error, said) == (
            ValueError,
            "context_parallel_attention: `by` is 'heads', and Hq = 2 heads are not one for each of the 3 processes; "
            "expected 'window' or 'ring'",
        )
    lengths = {"lengths": torch.tensor([12])}
    for error, said in world.errors("attention", [[q, q, q]] * 3, [dict(lengths) for _ in range(3)]):
        assert error is ValueError
        assert "`by` is 'auto', and 'heads' is not possible: Hq = 2 heads are not one for each" in said
        assert "'ring' is not possible: `lengths` are given without causal=True" in said
    world.results("attention", [[q, q, q]] * 3, [{} for _ in range(3)])
    world.results("attention", [[q, q, q]] * 2, [{"by": "heads"}, {"by": "heads"}], group="pair")
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
        GroupContext.of("op", None).check_device("x", elsewhere)


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

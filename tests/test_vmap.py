"""torch.vmap of the operations: one call where the mapped axis can be more rows, else one for each entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import close, outputs
from strategies import randn
from torch import Tensor

import flashgau
from flashgau.ops import autograd

T = torch.tensor
SIZE = 3


@pytest.fixture
def calls(monkeypatch):
    """The functions of floors that were called."""
    found, real = [], autograd.run

    def run(op: str, backend: str, function: str, *args: Any, **named: Any) -> Any:
        found.append(function)
        return real(op, backend, function, *args, **named)

    monkeypatch.setattr(autograd, "run", run)
    return found


def tokens(seed: int, *shape: int) -> Tensor:
    return randn(seed, *shape, dtype=torch.float32)


# Each: the function, its tensors, and which of them may be the same for all entries.
FOLDED: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "attention": (
        lambda q, k, v: flashgau.attention(q, k, v, causal=True, return_lse=True),
        [tokens(0, 2, 4, 9, 8), tokens(1, 2, 2, 9, 8), tokens(2, 2, 2, 9, 5)],
    ),
    "attention, lengths, window, bias": (
        lambda q, k, v, b: flashgau.attention(q, k, v, lengths=T([9, 4]), window=(3, 1), softcap=2.0, rel_bias=b),
        [tokens(0, 2, 4, 9, 8), tokens(1, 2, 2, 9, 8), tokens(2, 2, 2, 9, 5), tokens(3, 4, 17)],
    ),
    "attention, gated": (
        lambda q, k, v, g: flashgau.attention(q, k, v, causal=True, gate=g),
        [tokens(0, 2, 2, 9, 8), tokens(1, 2, 2, 9, 8), tokens(2, 2, 2, 9, 5), tokens(3, 2, 2, 9, 1)],
    ),
    "gau": (
        lambda q, k, v, g, b: flashgau.gau_attention(q, k, v, g, causal=True, rel_bias=b),
        [tokens(0, 2, 9, 4), tokens(1, 2, 9, 4), tokens(2, 2, 9, 6), tokens(3, 2, 9, 6), tokens(4, 17)],
    ),
    "gau, M != N": (
        lambda q, k, v: flashgau.gau_attention(q, k, v, score="softmax_plus", lengths=T([5, 7])),
        [tokens(0, 2, 3, 4), tokens(1, 2, 7, 4), tokens(2, 2, 7, 6)],
    ),
    "mixed_chunk": (
        lambda *heads: flashgau.mixed_chunk_attention(*heads, chunk_size=4, causal=True, lengths=T([9, 4])),
        [*(tokens(i, 2, 9, 4) for i in range(4)), tokens(4, 2, 9, 6), tokens(5, 2, 9, 6)],
    ),
    "mixed_chunk, both ways": (
        lambda *heads: flashgau.mixed_chunk_attention(*heads, chunk_size=4),
        [*(tokens(i, 2, 9, 4) for i in range(4)), tokens(4, 2, 9, 6)],
    ),
    "glu": (flashgau.glu, [tokens(0, 2, 5, 8), tokens(1, 2, 5, 8)]),
    "glu, packed, one axis": (flashgau.glu, [tokens(0, 8)]),
}
AXES = [0, 1, -1]


def entries(args: list[Tensor], mapped: list[int | None], i: int) -> list[Tensor]:
    return [x if axis is None else x.select(axis, i) for x, axis in zip(args, mapped, strict=True)]


def check_equals_a_loop(function: Callable[..., Any], args: list[Tensor], in_dims: list[int | None]) -> None:
    mapped = outputs(torch.vmap(function, in_dims=tuple(in_dims))(*args))
    singles = [outputs(function(*entries(args, in_dims, i))) for i in range(SIZE)]
    for got, *wanted in zip(mapped, *singles, strict=True):
        close(got, torch.stack(wanted))


def stacked(x: Tensor, axis: int) -> Tensor:
    """Entries unlike each other along that axis."""
    return torch.stack([x, 0.5 * x, -x], axis if axis >= 0 else x.dim())


@pytest.mark.parametrize("name", FOLDED)
def test_mapped_tensors_are_rows_of_one_call(name, calls):
    function, args = FOLDED[name]

    def total(*args: Tensor) -> Tensor:
        results = outputs(function(*args))
        return sum((torch.where(torch.isfinite(x), x, 0) ** 2).sum() for x in results)

    everything = [stacked(x, AXES[i % 3]) for i, x in enumerate(args)], [AXES[i % 3] for i in range(len(args))]
    only_first = [stacked(args[0], 0), *args[1:]], [0, *[None] * (len(args) - 1)]
    only_last = [*args[:-1], stacked(args[-1], 1)], [*[None] * (len(args) - 1), 1]
    for given, in_dims in (everything, only_first, only_last):
        calls.clear()
        torch.vmap(function, in_dims=tuple(in_dims))(*given)
        assert len(calls) == 1
        check_equals_a_loop(function, given, in_dims)
        for gradient in (torch.func.grad(total, argnums=tuple(range(len(args)))), torch.func.grad(total)):
            calls.clear()
            torch.vmap(gradient, in_dims=tuple(in_dims))(*given)
            assert len(calls) == 2
            assert calls[1].endswith("_backward")
            check_equals_a_loop(gradient, given, in_dims)
        # The derivative of what is mapped, too, is that of its one call.
        leaves = [x.clone().requires_grad_() for x in given]
        calls.clear()
        sums = torch.vmap(total, in_dims=tuple(in_dims))(*leaves)
        through = torch.autograd.grad(sums.sum(), leaves)
        assert len(calls) == 2
        wanted = torch.autograd.grad(sum(total(*entries(leaves, in_dims, i)) for i in range(SIZE)), leaves)
        for a, b in zip(through, wanted, strict=True):
            close(a, b)


def test_results_go_where_out_dims_says_and_maps_nest(calls):
    q, k, v = tokens(0, 5, 2, 2, 7, 4), tokens(1, SIZE, 2, 2, 7, 4), tokens(2, SIZE, 5, 2, 2, 7, 4)
    inner = torch.vmap(lambda q, k, v: flashgau.attention(q, k, v), in_dims=(0, None, 0), out_dims=1)
    got = torch.vmap(inner, in_dims=(None, 0, 0), out_dims=-1)(q, k, v)
    assert len(calls) == 1
    assert got.shape == (2, 5, 2, 7, 4, SIZE)
    for i in range(SIZE):
        for j in range(5):
            close(got[:, j, ..., i], flashgau.attention(q[j], k[i], v[i, j]))


def test_weights_that_all_entries_share_need_no_loop(calls):
    x, w, u, b = tokens(0, SIZE, 2, 5, 4), tokens(1, 6, 4), tokens(2, 6, 4), tokens(3, 6)
    got = torch.vmap(lambda x: flashgau.glu_linear(x, w, u, b))(x)
    assert len(calls) == 1
    for a, entry in zip(got, x, strict=True):
        close(a, flashgau.glu_linear(entry, w, u, b))


Q = tokens(0, SIZE, 2, 2, 9, 4)
ONE = tokens(0, SIZE, 1, 2, 9, 4)


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    {
        "mapped weights": (
            lambda x, w: flashgau.glu_linear(x, w, w), (tokens(0, SIZE, 2, 4), tokens(1, SIZE, 6, 4)), SIZE
        ),
        "gradients of weights": (
            torch.func.grad(lambda w, x: flashgau.glu_linear(x, w, w).square().sum()),
            (tokens(1, SIZE, 6, 4), tokens(0, SIZE, 2, 4)), 2 * SIZE,
        ),
        "packed": (lambda q: flashgau.attention(q, q, q, cu_seqlens=T([0, 4, 9])), (ONE,), SIZE),
        "sinks": (lambda q, s: flashgau.attention(q, q, q, sinks=s), (Q, tokens(1, SIZE, 2)), SIZE),
        "gradients of sinks": (
            torch.func.grad(lambda s, q: flashgau.attention(q, q, q, sinks=s).square().sum()),
            (tokens(1, SIZE, 2), Q), 2 * SIZE,
        ),
        "dropout": (lambda q: flashgau.attention(q, q, q, dropout_p=0.5, dropout_seed=1), (Q,), SIZE),
    }.values(),
    ids=["mapped weights", "gradients of weights", "packed", "sinks", "gradients of sinks", "dropout"],
)  # fmt: skip
def test_what_rows_cannot_say_is_a_loop(function, args, expected, calls):
    torch.vmap(function)(*args)
    assert len(calls) == expected
    check_equals_a_loop(function, list(args), [0] * len(args))


def test_sinks_that_all_entries_share_are_one_call_forward(calls):
    sinks = tokens(1, 2)
    got = torch.vmap(lambda q: flashgau.attention(q, q, q, sinks=sinks))(Q)
    assert len(calls) == 1
    for a, q in zip(got, Q, strict=True):
        close(a, flashgau.attention(q, q, q, sinks=sinks))


def test_dropout_follows_the_randomness_of_vmap():
    ones = torch.ones(SIZE, 1, 1, 4, 64)

    def dropped(x: Tensor) -> Tensor:
        return flashgau.attention(x, x, x, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(ones)
    same = torch.vmap(dropped, randomness="same")(ones)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(dropped, randomness="different")(ones)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("batch", [0, 2])
def test_rows_may_be_few_or_none(batch):
    q = tokens(0, SIZE, batch, 2, 5, 4)
    assert torch.vmap(lambda q: flashgau.attention(q, q, q))(q).shape == q.shape
    assert torch.vmap(lambda q: flashgau.attention(q, q, q))(q[..., :0, :]).shape == (SIZE, batch, 2, 0, 4)

"""`flashgau.compare` of functions and modules that are not ours: held to the reference that comes with them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from strategies import randn
from torch import Tensor, nn

import flashgau
from flashgau import testing


def gated(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    return F.silu(x) * (x @ w) * scale


def naive_gated(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    return x / (1 + torch.exp(-x)) * torch.einsum("ni,ij->nj", x, w) * scale


X, W = randn(0, 7, 5), randn(1, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_function_is_held_to_its_reference(dtype):
    report = flashgau.compare(gated, X.to(dtype), W.to(dtype), scale=3.0, reference=naive_gated)
    assert report.ok, f"\n{report}"
    assert [row.name for row in report.rows] == ["out", "dx", "dw"]
    assert str(report).startswith(f"gated against the fp64 reference, {str(dtype).removeprefix('torch.')} input")


def test_an_error_is_found_where_it_is():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return gated(x, w)

        @staticmethod
        def backward(ctx, dout):
            with torch.enable_grad():
                x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
                dx, dw = torch.autograd.grad(gated(x, w), (x, w), dout)
            dw[2, 3] *= 1.001
            return dx, dw

    report = flashgau.compare(Wrong.apply, X, W, reference=naive_gated)
    assert [row.name for row in report.rows if not row.ok] == [report.rows[2].name]
    assert not flashgau.compare(lambda x, w: gated(x, w) + 1e-4, X, W, reference=naive_gated, grad=False)


def test_a_function_is_known_by_what_it_is():
    """One that is called like ours, and calls PyTorch's, is not ours."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (randn(i, 1, 2, 9, 4) for i in range(3))
    with pytest.raises(ValueError, match="`fn` is 'attention' without `reference`"):
        flashgau.compare(attention, q, k, v)
    report = flashgau.compare(attention, q, k, v, reference=flashgau.reference.attention)
    assert report.ok
    assert report.backend == ""
    with pytest.raises(ValueError, match=r"`reference` was given with flashgau\.attention"):
        flashgau.compare(flashgau.attention, q, k, v, reference=attention)
    with pytest.raises(ValueError, match="`backend` is 'eager' with 'attention', which is no operation"):
        flashgau.compare(attention, q, k, v, reference=attention, backend="eager")


def test_partials_and_compiled_functions():
    assert flashgau.compare(functools.partial(gated, scale=2.0), X, W, reference=lambda x, w: 2 * naive_gated(x, w)).ok
    compiled = torch.compile(gated, backend="eager")
    report = flashgau.compare(compiled, X, W, reference=naive_gated)
    assert report.ok
    assert report.op == "gated"


class Pair(NamedTuple):
    total: Tensor
    largest: Tensor


@pytest.mark.parametrize(
    ("collect", "names", "expected"),
    [
        (lambda a, b: (a, b), None, ["out0", "out1"]),
        (lambda a, b: [a, b], ("sum", "max"), ["sum", "max"]),
        (lambda a, b: {"sum": a, "more": {"max": b}}, None, ["sum", "more.max"]),
        (Pair, None, ["total", "largest"]),
        (lambda a, b: (a, Pair(a, b)), ("a", "pair"), ["a", "pair.total", "pair.largest"]),
    ],
)
def test_results_of_any_kind_have_names(collect, names, expected):
    def fn(x):
        return collect(x.sum(0), x.amax(0))

    report = flashgau.compare(fn, X, reference=fn, names=names)
    assert report.ok
    assert [row.name for row in report.rows] == [*expected, "dx"]


def test_results_with_other_names_are_refused():
    with pytest.raises(ValueError, match="`fn` gives out; its reference gives out0, out1"):
        flashgau.compare(torch.relu, X, reference=lambda x: (x, x), grad=False)
    with pytest.raises(ValueError, match="`names` has 1 names; expected one for each of 2 results"):
        flashgau.compare(lambda x: (x, x), X, reference=lambda x: (x, x), names=["a"])
    with pytest.raises(TypeError, match="the result is a int; expected tensors"):
        flashgau.compare(lambda x: 3, X, reference=lambda x: 3)


def test_arguments_in_containers_are_copied_and_differentiated():
    def fn(pair: dict[str, Tensor], rest: list[Tensor]) -> Tensor:
        pair["x"].detach().mul_(1)
        return pair["x"] * rest[0]

    report = flashgau.compare(fn, {"x": X}, [X], reference=fn)
    assert [row.name for row in report.rows] == ["out", "dpair.x", "drest.0"]
    assert report.ok


def test_parameters_of_a_module_are_compared_with_those_of_its_reference():
    """The reference computes with the values of the module's, wherever its own have the same names."""

    class Naive(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return torch.einsum("ni,oi->no", x, self.weight) + self.bias

    layer, naive = nn.Linear(5, 4).to(torch.bfloat16), Naive()
    before = [p.clone() for p in (*layer.parameters(), *naive.parameters())]
    report = flashgau.compare(layer, X.to(torch.bfloat16), reference=naive)
    assert report.ok, f"\n{report}"
    assert [row.name for row in report.rows] == ["out", "dinput", "dweight", "dbias"]
    assert all(torch.equal(a, b) for a, b in zip(before, (*layer.parameters(), *naive.parameters()), strict=True))
    assert all(p.grad is None for p in layer.parameters())

    class Doubled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.detach() + 0.5 * (self.weight - self.weight.detach()), self.bias)

    assert [r.name for r in flashgau.compare(Doubled(5, 4), X, reference=Naive()).rows if not r.ok] == ["dweight"]
    function = flashgau.compare(layer, X.to(torch.bfloat16), reference=lambda x: F.linear(x, *map(x.new_tensor, [
        layer.weight.tolist(), layer.bias.tolist()])))  # fmt: skip
    assert [row.name for row in function.rows] == ["out", "dinput"]


def test_a_layer_of_ours_against_one_of_pytorch():
    layer = flashgau.nn.FeedForward(6, 12)
    ours = dict(layer.named_parameters())
    naive = flashgau.nn.FeedForward(6, 12)
    report = flashgau.compare(layer, randn(0, 2, 3, 6), reference=naive)
    assert report.ok
    assert {row.name.removeprefix("d") for row in report.rows[2:]} == set(ours)


def test_integer_results_must_be_equal():
    assert flashgau.compare(lambda x: x.argmax(-1), X, reference=lambda x: x.argmax(-1), grad=False).ok
    assert not flashgau.compare(lambda x: x.argmax(-1) + 1, X, reference=lambda x: x.argmax(-1), grad=False).ok


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="`fn` is a Tensor; expected a function or module"):
        flashgau.compare(X, X)
    with pytest.raises(TypeError, match="`reference` is a Tensor; expected a function or module"):
        flashgau.compare(gated, X, W, reference=X)


def test_the_assertion_shows_the_table():
    assert testing.assert_close(gated, naive_gated, X, W).ok
    with pytest.raises(AssertionError, match=r"beyond tolerance\n<lambda> against[^M]*MISS"):
        testing.assert_close(lambda x, w: gated(x, w) * 1.01, naive_gated, X, W)
    assert testing.assert_close(flashgau.glu, None, X, X).backend == "eager"


def test_the_rule_alone():
    exact = {"out": X.double()}
    assert testing.held({"out": X}, exact, [{"out": X}], torch.float32)[0].ok
    assert not testing.held({"out": X + 1e-4}, exact, [{"out": X}], torch.float32)[0].ok


@given(testing.tensors(4, 6, dtypes=testing.HALVES), testing.lengths(4, 6), testing.packings(9), testing.sizes(40))
def test_published_strategies_draw_what_they_say(x, lengths, packed, size):
    assert x.shape == (4, 6)
    assert x.dtype in testing.HALVES
    assert torch.isfinite(x).all()
    assert lengths.shape == (4,)
    assert 0 <= int(lengths.min()) <= int(lengths.max()) <= 6
    assert packed[0] == 0
    assert packed[-1] == 9
    assert (packed.diff() >= 0).all()
    assert size in testing.SIZES
    assert size <= 40

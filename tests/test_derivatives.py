"""Forward mode and second derivatives, held to those of the reference, which PyTorch differentiates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from backends import backend_fixture, largest_storages
from checks import close, close_gradients, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Call, attention_calls, gau_calls, glu_calls, glu_linear_calls, mixed_chunk_calls, randn
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import flashgau
from flashgau.nn.norms import LayerNorm
from flashgau.ops import higher, plain

backend = backend_fixture("attention")
data = st.data()
CALLS = {
    "attention": attention_calls,
    "gau_attention": gau_calls,
    "mixed_chunk_attention": partial(mixed_chunk_calls, stateful=False),
    "glu": glu_calls,
    "glu_linear": glu_linear_calls,
}


def function_of(call: Call, backend: str | None) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The call as a function of its floating tensors, and these; PyTorch has no tangent of an expanded one.

    Without a backend it is the formula in the dtype of the tensors, in whose place the reference computes halves in
    fp32: what `flashgau.compare` takes for plain PyTorch, and in fp64 for exact.
    """
    inputs = [x.contiguous() if 0 in x.stride() else x for x in call.tensors() if x.is_floating_point()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        with_these = call.map(lambda x: next(given) if x.is_floating_point() else x)
        if backend is None:
            return tuple(outputs(formula(*with_these.args, **with_these.kwargs)))
        return tuple(outputs(with_these(backend=backend)))

    formula: Any = getattr(flashgau.reference, call.name).__wrapped__
    return function, inputs


def tangents_of(function: Callable[..., Any], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tangents of results at the first `count` tensors, along the others."""
    found: tuple[Tensor, ...] = torch.func.jvp(function, tensors[:count], tensors[count:])[1]
    return tuple(torch.where(torch.isfinite(x), x, 0) for x in found)


def gradients_of(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a sum of the results' squares, and those of a weighting of these, each in one tensor.

    For in half precision what cancels in one is rounded as the largest of them: each is made of the others.
    """
    leaves = [x.requires_grad_() if x.is_leaf else x for x in tensors]
    with torch.enable_grad():
        total = sum(torch.where(torch.isfinite(x), x, 0).square().sum() for x in function(*leaves))
        once = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        weights = [randn(50 + i, *g.shape, dtype=torch.bfloat16).to(g.dtype) for i, g in enumerate(once)]
        weighted = sum((g * w).sum() for g, w in zip(once, weights, strict=True))
        twice = torch.autograd.grad(weighted, leaves, materialize_grads=True)
    first, second = (torch.cat([g.detach().flatten().to(grads[0].dtype) for g in grads]) for grads in (once, twice))
    return first, second


def along(seed: int, inputs: list[Tensor]) -> list[Tensor]:
    return [randn(seed + i, *x.shape, dtype=x.dtype) for i, x in enumerate(inputs)]


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=8)
@given(data)
def test_tangents_and_their_gradients_agree_with_the_reference(backend, name, data):
    """Forward mode, and reverse over forward."""
    call = data.draw(CALLS[name](backend))
    ours, inputs = function_of(call, backend)
    theirs, _ = function_of(call, None)
    torch.manual_seed(len(repr(call)))
    report = flashgau.compare(
        partial(tangents_of, ours, len(inputs)), *inputs, *along(7, inputs),
        reference=partial(tangents_of, theirs, len(inputs)),
    )  # fmt: skip
    assert report.ok, f"\n{call}\n{report}"


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=8)
@given(data)
def test_gradients_of_gradients_agree_with_the_reference(backend, name, data):
    call = data.draw(CALLS[name](backend))
    ours, inputs = function_of(call, backend)
    theirs, _ = function_of(call, None)
    torch.manual_seed(len(repr(call)))
    report = flashgau.compare(
        partial(gradients_of, ours), *inputs, reference=partial(gradients_of, theirs), names=("d", "dd"), grad=False
    )  # by the rule of gradients, which their names stand for
    assert report.ok, f"\n{call}\n{report}"


# ---------------------------------------------------------------- eager in fp64: finite differences

DOUBLE = {"dtype": torch.float64}
MIXED = [(2, 7, 2)] * 4 + [(2, 7, 3)] * 2
PACKED = torch.tensor([0, 0, 4, 7], dtype=torch.int32)
DERIVATIVES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "attention": (flashgau.attention, [(1, 2, 5, 3)] * 3),
    "attention, grouped, capped, causal, lse": (
        partial(flashgau.attention, causal=True, softcap=1.5, return_lse=True),
        [(1, 4, 4, 3), (1, 2, 6, 3), (1, 2, 6, 2)],
    ),
    "attention, bias, sinks, window": (
        lambda q, k, v, b, s: flashgau.attention(q, k, v, window=(2, 1), rel_bias=b, sinks=s, return_lse=True),
        [(1, 2, 4, 3), (1, 2, 6, 3), (1, 2, 6, 2), (2, 13), (2,)],
    ),
    "attention, dropout, lengths": (
        partial(flashgau.attention, dropout_p=0.3, dropout_seed=5, lengths=torch.tensor([4, 2])),
        [(2, 2, 4, 3)] * 3,
    ),
    "attention, gate of a head": (
        lambda q, k, v, g: flashgau.attention(q, k, v, gate=g, lengths=torch.tensor([3, 5])),
        [(2, 2, 5, 2)] * 3 + [(2, 2, 5, 1)],
    ),
    **{
        f"gau, {score}": (
            lambda q, k, v, b, score=score: flashgau.gau_attention(q, k, v, rel_bias=b, score=score, causal=True),
            [(2, 5, 3), (2, 5, 3), (2, 5, 4), (9,)],
        )
        for score in ("relu2", "laplace", "softmax", "softmax_plus")
    },
    "gau, gate": (partial(flashgau.gau_attention, gate_activation="silu"), [(1, 5, 2)] * 2 + [(1, 5, 3)] * 2),
    "mixed": (partial(flashgau.mixed_chunk_attention, chunk_size=3), MIXED),
    "mixed, causal, laplace, lengths": (
        partial(
            flashgau.mixed_chunk_attention, chunk_size=3, causal=True, score="laplace", lengths=torch.tensor([4, 7])
        ),
        MIXED,
    ),
    "mixed, packed, gate": (
        partial(flashgau.mixed_chunk_attention, chunk_size=3, cu_seqlens=PACKED, gate_activation="gelu"),
        [(1, *shape[1:]) for shape in MIXED],
    ),
    "mixed, packed, causal": (
        partial(flashgau.mixed_chunk_attention, chunk_size=3, cu_seqlens=PACKED, causal=True, lin_normalizer=2.0),
        [(1, *shape[1:]) for shape in MIXED],
    ),
    "glu": (partial(flashgau.glu, activation="gelu", up_activation="sigmoid"), [(3, 4)] * 2),
    "glu of halves": (flashgau.glu, [(3, 4)]),
    "glu_linear": (flashgau.glu_linear, [(3, 4), (2, 4), (2, 4), (2,), (2,)]),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_all_four_are_derivatives(name):
    """Forward, reverse over reverse, forward over reverse and reverse over forward, against differences in fp64."""
    function, shapes = DERIVATIVES[name]
    function = partial(function, backend="eager") if isinstance(function, partial) else function
    inputs = [randn(i, *shape, **DOUBLE).requires_grad_() for i, shape in enumerate(shapes)]
    assert gradcheck(function, inputs, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)
    moved = tuple(randn(20 + i, *x.shape, **DOUBLE) for i, x in enumerate(inputs))
    assert gradcheck(lambda *x: torch.func.jvp(function, x, moved)[1], inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["attention", "gau, relu2", "mixed", "glu", "glu_linear"])
def test_hessians(name):
    """By torch.func, forward over reverse, and by torch.autograd.functional, reverse over reverse."""
    function, shapes = DERIVATIVES[name]
    inputs = tuple(randn(i, *shape, **DOUBLE) for i, shape in enumerate(shapes))
    total = lambda *x: sum(part.square().sum() for part in outputs(function(*x)))
    ours = torch.func.hessian(total, argnums=tuple(range(len(inputs))))(*inputs)
    theirs = torch.autograd.functional.hessian(total, inputs)
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b)
    _, product = torch.autograd.functional.hvp(total, inputs, tuple(torch.ones_like(x) for x in inputs))
    for row, part in zip(ours, product, strict=True):
        torch.testing.assert_close(sum(block.flatten(part.dim()).sum(-1) for block in row), part)


def test_dual_numbers_and_linearize():
    q, k, v, t = (randn(i, 1, 2, 9, 4) for i in range(4))
    expected = torch.func.jvp(partial(flashgau.attention, backend="reference"), (q, k, v), (t, t, t))[1]
    with forward_ad.dual_level():
        out = flashgau.attention(*(forward_ad.make_dual(x, t) for x in (q, k, v)))
        close(forward_ad.unpack_dual(out).tangent, expected, ulps=64)
        one = flashgau.attention(q, forward_ad.make_dual(k, t), v)
        assert forward_ad.unpack_dual(one).tangent is not None
        assert forward_ad.unpack_dual(flashgau.attention(q, k, v)).tangent is None
    out, along_it = torch.func.linearize(flashgau.attention, q, k, v)
    close(out, flashgau.attention(q, k, v), ulps=64)
    close(along_it(t, t, t), expected, ulps=64)


@pytest.mark.parametrize("name", ["attention", "gau, relu2"])
def test_third_derivatives_are_refused(name):
    function, shapes = DERIVATIVES[name]
    x = [randn(i, *shape, **DOUBLE).requires_grad_() for i, shape in enumerate(shapes)]
    value = function(*x).square().sum()
    for _ in range(2):
        value = sum(g.square().sum() for g in torch.autograd.grad(value, x, create_graph=True))
    with pytest.raises(RuntimeError, match=r'attention: .*differentiable twice.*backend="reference"'):
        torch.autograd.grad(value, x)
    first = lambda *x: torch.func.jvp(function, x, x)[1]
    with pytest.raises(RuntimeError, match=r'a tangent has no tangent.*backend="reference"'):
        torch.func.jvp(first, tuple(x), tuple(x))


# ---------------------------------------------------------------- layers and models

LAYERS = {
    "MultiHeadAttention": lambda: flashgau.nn.MultiHeadAttention(8, 2),
    "GAU": lambda: flashgau.nn.GAU(8, key_dim=4),
    "FLASH": lambda: flashgau.nn.FLASH(8, key_dim=4, chunk_size=4, causal=True),
    "GatedFeedForward": lambda: flashgau.nn.GatedFeedForward(8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_differentiates_twice_and_forward(name):
    """A penalty on the gradient, by parameters and input; a product with the Jacobian."""
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x, t = randn(1, 2, 9, 8, **DOUBLE).requires_grad_(), randn(2, 2, 9, 8, **DOUBLE)
    leaves = [x, *layer.parameters()]

    def results() -> list[Tensor]:
        (dx,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        second = torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        return [dx.detach(), torch.func.jvp(layer, (x,), (t,))[1].detach(), *second]

    ours = results()
    with flashgau.use_backend("reference"):
        theirs = results()
    close_gradients(ours, theirs, ulps=2048)


def test_the_gradient_of_a_tangent_of_a_norm():
    """PyTorch's own of layer_norm takes the mean and the deviation for constants."""
    layer = LayerNorm(5).double()
    x, t = randn(0, 3, 5, **DOUBLE).requires_grad_(), randn(1, 3, 5, **DOUBLE)
    assert gradcheck(lambda x: torch.func.jvp(layer, (x,), (t,))[1], x)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("batch", [(7,), (2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("name", ["glu", "halves", "glu_linear", "glu_linear with biases"])
def test_independent_rows_are_taken_a_few_at_a_time(name, batch, monkeypatch):
    """Second derivatives, and tangents, are the same however many rows are worked on together; sums over rows too."""
    shapes = {"glu": [(*batch, 6)] * 2, "halves": [(*batch, 12)]}.get(name, [(*batch, 5), (6, 5), (6, 5), (6,), (6,)])
    shapes = shapes[:3] if name == "glu_linear" else shapes
    inputs = [randn(i, *shape, dtype=torch.float64) for i, shape in enumerate(shapes)]
    function = flashgau.glu_linear if name.startswith("glu_linear") else flashgau.glu

    def found() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, randn(9, *out.shape, dtype=out.dtype), create_graph=True)
        twice = torch.autograd.grad(grads, leaves, along(20, inputs))
        with torch.no_grad():
            return [*twice, torch.func.jvp(function, tuple(inputs), tuple(along(30, inputs)))[1]]

    together = found()
    monkeypatch.setattr(higher, "AT_ONCE", 13)
    monkeypatch.setattr(plain, "AT_ONCE", 13)
    close_gradients(found(), together)


def largest(run: Callable[[], Any]) -> int:
    with largest_storages() as bytes_:
        run()
    return max(bytes_)


@pytest.mark.parametrize("name", ["attention", "gau_attention", "mixed_chunk_attention"])
def test_no_matrix_of_all_scores(name):
    """Four times the length takes four times the memory, not sixteen."""
    function: Callable[..., Any] = partial(getattr(flashgau, name), backend="eager", causal=True)
    heads, count = ((1,), 3) if name == "attention" else ((), 5 if name == "mixed_chunk_attention" else 3)

    def call(n: int) -> None:
        inputs = [randn(i, 1, *heads, n, 4) for i in range(count)]
        torch.func.jvp(function, tuple(inputs), tuple(inputs))
        leaves = [x.clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        sum(g.square().sum() for g in grads).backward()

    assert largest(lambda: call(4096)) <= 4 * 1.1 * largest(lambda: call(1024))

"""`flashgau.glu` and `flashgau.glu_linear` on every optimised backend."""

import itertools
from functools import partial

import pytest
import torch
from backends import DTYPES, backend_fixture, dtypes_of, needs
from checks import (
    check_agrees,
    check_backward_repeats,
    check_leaves_inputs_alone,
    check_repeats_bitwise,
    check_second_derivative,
    check_some_gradients,
    close,
    gradients,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import ACTIVATIONS, Call, glu_calls, glu_linear_calls, randn

import flashgau

backend = backend_fixture("glu")
data = st.data()
both = pytest.mark.parametrize("calls", [glu_calls, glu_linear_calls], ids=["glu", "glu_linear"])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=data)
def test_agrees_with_the_reference(backend, calls, dtype, data):
    needs(backend, dtype)
    check_agrees(data.draw(calls(dtype=dtype)), backend)


@pytest.mark.parametrize("pair", [*itertools.product(ACTIVATIONS, ACTIVATIONS)], ids="-".join)
def test_every_pair_of_activations(backend, pair):
    options = dict(zip(("activation", "up_activation"), pair, strict=True))
    for dtype in dtypes_of(backend):
        gate, up = randn(1, 5, 9, dtype=dtype), randn(2, 5, 9, dtype=dtype)
        check_agrees(Call("glu", (gate, up), options), backend)
        check_agrees(Call("glu", (torch.cat([gate, up], -1),), options), backend)
        w, b = [randn(i, 6, 9, dtype=dtype) for i in (3, 4)], [randn(i, 6, dtype=dtype) for i in (5, 6)]
        check_agrees(Call("glu_linear", (gate, *w, *b), options), backend)


@both
@given(data=data)
def test_repeats_bitwise(backend, calls, data):
    check_repeats_bitwise(data.draw(calls(backend)))


@both
@given(data=data)
def test_leaves_its_inputs_alone(backend, calls, data):
    check_leaves_inputs_alone(data.draw(calls(backend)))


@both
@given(data=data)
def test_backward_repeats_over_a_kept_graph(backend, calls, data):
    check_backward_repeats(data.draw(calls(backend)))


@both
@given(data=data, needed=st.lists(st.booleans(), min_size=5, max_size=5))
def test_gradients_of_some_operands_alone(backend, calls, data, needed):
    check_some_gradients(data.draw(calls(backend)), needed)


@pytest.mark.parametrize("packed", [False, True])
def test_second_derivatives(backend, packed):
    check_second_derivative(Call("glu", (randn(0, 3, 4), *([] if packed else [randn(1, 3, 4)])), {}))
    check_second_derivative(Call("glu_linear", (randn(0, 3, 4), randn(1, 2, 4), randn(2, 2, 4)), {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_derivatives(backend, activation):
    needs(backend, torch.float64)
    gate, up = (randn(i, 2, 4, dtype=torch.float64).requires_grad_() for i in range(2))
    options = {"activation": activation, "up_activation": "silu"}
    assert torch.autograd.gradcheck(lambda g, u: flashgau.glu(g, u, **options), (gate, up))
    assert torch.autograd.gradcheck(lambda g: flashgau.glu(g, **options), (gate,))
    rest = [randn(i, *s, dtype=torch.float64).requires_grad_() for i, s in ((2, (3, 4)), (3, (3, 4)), (4, (3,)))]
    function = lambda x, w, u, b: flashgau.glu_linear(x, w, u, b, **options)
    assert torch.autograd.gradcheck(function, (gate, *rest))


@given(data)
def test_packed_is_its_halves(backend, data):
    call = data.draw(glu_calls(backend))
    first, *second = call.args
    if not second:
        half = first.shape[-1] // 2
        call = Call("glu", (first[..., :half], first[..., half:]), call.kwargs)
    else:
        assume(first.dim() > 0)
    gate, up = call.args
    (out,), (dgate, dup) = gradients(call)
    (out2,), (dpacked,) = gradients(Call("glu", (torch.cat([gate, up], -1),), call.kwargs))
    close(out, out2, ulps=4)
    close(torch.cat([dgate, dup], -1), dpacked, ulps=4)


@pytest.mark.parametrize("pair", [*itertools.product(ACTIVATIONS, ACTIVATIONS)], ids="-".join)
def test_one_column_halves_of_a_transposed_tensor(backend, pair):
    """Each half lies in one piece, and its gradient does not."""
    options = dict(zip(("activation", "up_activation"), pair, strict=True))
    packed = randn(0, 2, 5).T
    (out,), (dpacked,) = gradients(Call("glu", (packed,), options))
    (out2,), (dpacked2,) = gradients(Call("glu", (packed.contiguous(),), options))
    terms = float(packed.abs().max()) ** 2  # PyTorch has two gelus, each true to the size of its argument
    close(out, out2, ulps=4, scale=terms)
    close(dpacked, dpacked2, ulps=4, scale=terms)


@given(data)
def test_sides_are_alike(backend, data):
    """Exchanging both the operands and their activations changes nothing."""
    call = data.draw(glu_calls(backend))
    if len(call.args) == 2:
        gate, up = call.args
        swapped = {"activation": call.kwargs["up_activation"], "up_activation": call.kwargs["activation"]}
        assert torch.equal(call(), flashgau.glu(up, gate, **swapped))


@given(data)
def test_linear_is_glu_of_two_projections(backend, data):
    call = data.draw(glu_linear_calls(backend, dtype=torch.float32))
    x, w_gate, w_up, b_gate, b_up = call.args
    linear = torch.nn.functional.linear
    out = call(activation="identity")
    expected = flashgau.glu(
        linear(x, w_gate, b_gate), linear(x, w_up, b_up), activation="identity",
        up_activation=call.kwargs["up_activation"],
    )  # fmt: skip
    close(out, expected, ulps=64, scale=terms(call.with_options(activation="identity")))


def test_recomputing_keeps_nothing_of_the_hidden_width(backend):
    """Between forward and backward autograd holds the operands and, unless told to recompute, two pre-activations."""

    def keep(storages, t):
        return storages.setdefault(t.data_ptr(), t)

    held = {}
    for recompute in (False, True):
        x, *weights = (randn(i, n, 6).requires_grad_() for i, n in enumerate((50, 30, 30)))
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, storages), lambda t: t):
            flashgau.glu_linear(x, *weights, recompute=recompute, backend=backend)
        held[recompute] = sum(t.numel() for t in storages.values())
    assert held == {True: 50 * 6 + 2 * 30 * 6, False: 50 * 6 + 2 * 30 * 6 + 2 * 50 * 30}


def terms(call):
    """How large the terms of a glu_linear call's sums are: cancelled or not, they set the rounding of its result."""
    x, *weights = (t.detach().abs().double() for t in call.args[:3])
    largest = 1.0
    for side, w in zip(("activation", "up_activation"), weights, strict=True):
        size = float((x @ w.mT).max()) if x.numel() and w.numel() else 0.0
        largest *= size**2 if call.kwargs[side] == "relu2" else size
    return largest


@given(data)
def test_rows_are_independent(backend, data):
    call = data.draw(glu_linear_calls(backend))
    x, *rest = call.args
    if x.dim() > 1:
        whole = call()
        for i in range(x.shape[0]):
            close(Call("glu_linear", (x[i], *rest), call.kwargs)(), whole[i], ulps=64, scale=terms(call))


@pytest.mark.parametrize("shape", [(), (1,), (300_001,), (3, 100_003), (700, 500)], ids=str)
def test_large_and_awkward_shapes(backend, shape):
    """Past the size at which work is cut into pieces, in layouts with and without contiguous rows."""
    if backend == "triton":  # which cuts work into blocks of a thousand columns, one program after another here
        shape = {(300_001,): (30_001,), (3, 100_003): (3, 10_003), (700, 500): (70, 500)}.get(shape, shape)
    gate, up = randn(0, *shape), randn(1, *shape)
    expected = torch.nn.functional.silu(gate) * up
    close(flashgau.glu(gate, up), expected)
    if len(shape) > 1:
        close(flashgau.glu(gate.mT.contiguous().mT, up), expected)
        close(flashgau.glu(torch.cat([gate, up], -1)), expected)
        (out,), (dgate, dup) = gradients(Call("glu", (gate.mT.contiguous().mT, up), {}))
        (out2,), (dgate2, dup2) = gradients(Call("glu", (gate, up), {}))
        for a, b in ((out, out2), (dgate, dgate2), (dup, dup2)):
            close(a, b)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_minus_infinity_has_no_slope(backend, activation):
    x = torch.tensor([-torch.inf, -1.0, 2.0])
    _, (dgate, _) = gradients(Call("glu", (x, torch.ones_like(x)), {"activation": activation}))
    assert dgate[0] == dgate[1] == 0


@given(st.sampled_from(ACTIVATIONS))
def test_saturation_is_finite(backend, activation):
    x = torch.tensor([-1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4])
    (out,), (dgate, dup) = gradients(Call("glu", (x, torch.ones_like(x)), {"activation": activation}))
    assert all(torch.isfinite(t).all() for t in (out, dgate, dup))
    check_agrees(Call("glu", (x, torch.ones_like(x)), {"activation": activation}), backend)

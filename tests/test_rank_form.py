"""The rank form of a relative bias on every backend, at distances whose cosines and sines are kept."""

import pytest
import torch
from backends import backends_of, dtypes_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import Maker, randn

import flashgau
from flashgau import bias
from flashgau.nn.biases import RotaryBias
from flashgau.ops import dispatch
from flashgau.ops.rank_form import rank_form

TRITON = "triton" in backends_of("rank_form")
needs_triton = pytest.mark.skipif(not TRITON, reason="no GPU, and not interpreting")


@pytest.fixture(params=backends_of("rank_form"))
def backend(request):
    with dispatch.use_backend_in_layers(request.param):
        yield request.param


@given(st.data())
def test_agrees_with_the_rotated_products(backend, data):
    """Result and gradients: <RoPE(a)_p, RoPE(b)_j>, pairs turned one by one, of any length, strides and dtype."""
    make = Maker(data.draw, data.draw(st.sampled_from(dtypes_of(backend))))
    pairs, length = data.draw(st.sampled_from([1, 2, 5, 16, 40])), data.draw(st.sampled_from([1, 2, 9, 70]))
    a, b = make(2 * pairs), make(2 * pairs)
    turns = bias.rank_turns(a, length)

    def naive(a, b):
        theta = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * theta
        turn = torch.polar(torch.ones_like(angles), angles)
        turned_a, turned_b = (torch.complex(*x.double().chunk(2)) * turn for x in (a, b))
        scores = (turned_a[:, None] * turned_b.conj()[None]).real.sum(-1)  # of each position with each
        distances = [scores[max(0, -t), max(0, t)] for t in range(1 - length, length)]
        return torch.stack(distances).to(a.dtype)

    report = flashgau.compare(lambda a, b: rank_form(a, b, turns), a, b, reference=naive)
    assert report.ok, f"\n{report}"


@needs_triton
@pytest.mark.parametrize(("pairs", "rows"), [(3, 1), (16, 300), (64, 1999), (300, 41)])
def test_triton_is_eager(pairs, rows):
    """However many distances a program has, and however many shares are summed; twice the same bits."""
    from flashgau.kernels import rank_form as kernels

    a, b, turns, d = randn(0, 2 * pairs), randn(1, 2 * pairs), randn(2, rows, 2 * pairs), randn(3, rows)
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    expected = bias.rank_form(*leaves, turns)
    found, again = (
        (kernels.rank_form_forward(a, b, turns), *kernels.rank_form_backward(d, a, b, turns)) for _ in range(2)
    )
    for x, same, e in zip(found, again, (expected, *torch.autograd.grad(expected, leaves, d)), strict=True):
        assert torch.equal(x, same)
        torch.testing.assert_close(x, e.detach(), rtol=1e-5, atol=1e-5 * float(e.detach().abs().max()))


@needs_triton
def test_second_derivatives():
    layer = RotaryBias(8)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(randn(i, 8))

    def penalty(name):
        with dispatch.use_backend_in_layers(name):
            grads = torch.autograd.grad(layer(9).square().sum(), list(layer.parameters()), create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in grads), list(layer.parameters()))

    for x, e in zip(penalty("triton"), penalty("eager"), strict=True):
        torch.testing.assert_close(x, e)

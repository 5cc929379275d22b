"""LayerNorm, RMSNorm and ScaleNorm of layers on every backend: against the fp64 reference, and by their own laws."""

import copy
import math
from unittest import mock

import pytest
import torch
from backends import backends_of, dtypes_of, fresh_memory_is_nan
from checks import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import Maker, randn
from torch import Tensor

import flashgau
from flashgau.nn.norms import LayerNorm, RMSNorm, ScaleNorm
from flashgau.ops import dispatch
from flashgau.ops.norms import norm
from flashgau.options import NormOptions

TRITON = "triton" in backends_of("norm")
needs_triton = pytest.mark.skipif(not TRITON, reason="no GPU, and not interpreting")
KINDS = {
    "layernorm": NormOptions("layernorm", 1e-5),
    "rms": NormOptions("rms", 1e-6),
    "clamped": NormOptions("rms", 0.7, True),  # which bounds about every third of narrow rows
}
data = st.data()


@pytest.fixture(params=backends_of("norm"))
def backend(request):
    with dispatch.use_backend_in_layers(request.param):
        yield request.param


def call(options):
    return lambda x, weight=None, bias=None: norm("test", x, weight, bias, *options)


def naive(options):
    return lambda x, weight=None, bias=None: flashgau.reference.norm(x, weight, bias, **options._asdict())


@pytest.mark.parametrize("kind", KINDS)
@given(data)
def test_agrees_with_the_reference(backend, kind, data):
    """Result and gradients, of any shape, strides and dtype; with a weight for each channel, one for all, and none."""
    make = Maker(data.draw, data.draw(st.sampled_from(dtypes_of(backend))))
    lead = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 17]), max_size=4))
    d = data.draw(st.sampled_from([2, 3, 7, 16, 33, 100, 129]))
    if kind == "layernorm":  # of equal numbers, and of two, only rounding would be left
        d, make.layouts = max(d, 7), tuple(layout for layout in make.layouts if layout != "expanded")
    parameter = make.beside if backend == "triton" else make  # PyTorch's own take one type only on a CPU
    arguments = [make(*lead, d)]
    if data.draw(st.booleans()):
        one_for_all = kind != "layernorm" and data.draw(st.booleans())
        arguments.append(parameter(1 if one_for_all else d))
        if kind == "layernorm" and data.draw(st.booleans()):
            arguments.append(parameter(d))
    torch.manual_seed(0)
    report = flashgau.compare(call(KINDS[kind]), *arguments, reference=naive(KINDS[kind]))
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_derivatives(kind):
    x, *parameters = (randn(i, *s, dtype=torch.float64).requires_grad_() for i, s in enumerate(((3, 5), (5,), (5,))))
    inputs = (x, *parameters[: 2 if kind == "layernorm" else 1])
    for function in (call(KINDS[kind]), naive(KINDS[kind])):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [8, 33])
def test_laws(backend, kind, d):
    """Scale and shift of a row do not matter, as far as each norm says; a NaN stays in its row; zeros stay zeros."""
    function, x = call(KINDS[kind]._replace(eps=1e-12)), randn(0, 6, d)
    y = function(x)
    torch.testing.assert_close(function(4 * x), y)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(6))
    if kind == "layernorm":
        torch.testing.assert_close(function(x + 3), y, rtol=1e-5, atol=1e-5)
    x[2, 1] = math.nan
    x[4] = 0
    leaf = x.clone().requires_grad_()
    found = function(leaf)
    (dx,) = torch.autograd.grad(found, leaf, torch.ones_like(found))
    rest = torch.tensor([0, 1, 3, 5])
    assert torch.equal(found[rest], y[rest])
    assert found[2].isnan().all()
    assert dx[2].isnan().all()
    assert not found[4].any()
    assert dx[[0, 1, 3, 4, 5]].isfinite().all()


def layers(d, **factory):
    """Every norm of a layer, with parameters of order one."""
    found = [LayerNorm(d, **factory), RMSNorm(d, **factory), RMSNorm(d, 1e-12, False, **factory),
             ScaleNorm(d, **factory), ScaleNorm(d, clamp=True, **factory)]  # fmt: skip
    with torch.no_grad():
        for layer in found:
            for i, p in enumerate(layer.parameters()):
                p.copy_(1 + randn(i, *p.shape) / 4)
    return found


def run(layer, x, weights):
    leaf = x.detach().requires_grad_()  # in the same memory layout
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], weights.to(y.dtype))]


@needs_triton
@pytest.mark.parametrize("d", [5, 64])
def test_triton_is_eager(d):
    """However many rows a program goes through, and however many shares are summed; twice the same bits."""
    from flashgau.kernels import norms

    x, weights = randn(0, 3, 41, d), randn(1, 3, 41, d)
    x[1] *= 1e-7  # rows that a clamp bounds, and where eps counts
    for layer in layers(d):
        expected = run(layer, x, weights)
        for count in (1, 3, 1000):
            shared = mock.patch.object(norms, "processors", return_value=count)
            with dispatch.use_backend_in_layers("triton"), shared, fresh_memory_is_nan():
                found, again = run(layer, x, weights), run(layer, x, weights)
            for a, b, e in zip(found, again, expected, strict=True):
                assert torch.equal(a, b)
                torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-5)


@needs_triton
@pytest.mark.parametrize("permuted", [(1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_strides_of_three_axes_are_read_in_place(permuted):
    x = randn(0, 4, 6, 8).permute(permuted)
    layer = LayerNorm(x.shape[-1])
    from flashgau.kernels import norms

    assert norms._rows(x).pointer.data_ptr() == x.data_ptr()
    with dispatch.use_backend_in_layers("triton"):
        y = layer(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@needs_triton
def test_rows_wider_than_a_program_holds_are_pytorchs():
    assert dispatch.explain("norm", "cpu", width=8192)["triton"] is None
    assert "widths of up to 8192" in dispatch.explain("norm", "cpu", width=8193)["triton"]


@needs_triton
def test_operators_are_what_their_shape_functions_say():
    from flashgau.ops import norms

    x, w, b = (randn(i, *s).requires_grad_() for i, s in enumerate(((2, 3, 5), (5,), (5,))))
    for options in KINDS.values():
        args = (x, w, b if options.kind == "layernorm" else None, *options, "triton")
        torch.library.opcheck(norms._norm.forward.overload, args)


@needs_triton
def test_second_derivatives_are_those_of_the_eager_backend():
    for layer in layers(5):

        def twice(layer: torch.nn.Module = layer) -> Tensor:
            x = randn(0, 3, 5).requires_grad_()
            (dx,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
            return torch.autograd.grad(dx.square().sum(), x)[0]

        expected = twice()
        with dispatch.use_backend_in_layers("triton"):
            close(twice(), expected, ulps=256)


def test_layers_are_pytorchs_with_their_parameters():
    """State dicts go both ways, and so do copies."""
    for ours, theirs in ((LayerNorm(6), torch.nn.LayerNorm(6)), (RMSNorm(6), torch.nn.RMSNorm(6, 1e-6))):
        theirs.load_state_dict(ours.state_dict())
        assert isinstance(ours, type(theirs))
        x = randn(0, 3, 6)
        torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))


@pytest.mark.parametrize("layer", layers(6), ids=lambda layer: type(layer).__name__)
def test_wrong_widths_are_refused_by_name(backend, layer):
    with pytest.raises(ValueError, match=rf"{type(layer).__name__}: `x` has shape \(2, 5\); expected \(..., 6\)"):
        layer(torch.randn(2, 5))

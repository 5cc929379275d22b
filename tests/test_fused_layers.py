"""The fused pieces of GAU and FLASH layers, held to the same layers composed from the reference in plain PyTorch."""

import importlib
from unittest import mock

import pytest
import torch
from backends import backends_of
from checks import close_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

import flashgau
from flashgau.eager import common
from flashgau.eager.sizes import sized
from flashgau.nn import FLASH, GAU
from flashgau.ops import dispatch, projection


@st.composite
def layers(draw, kind=FLASH):
    """A layer in fp64 with parameters of order one, and inputs for it: dense, padded or packed."""
    causal = draw(st.booleans())
    options = {
        "causal": causal,
        "key_dim": draw(st.sampled_from([2, 8])),
        "score": draw(st.sampled_from(["relu2", "laplace"])),
        "bias": draw(st.sampled_from(["none", "rotary", "t5", *(["toeplitz"] if kind is FLASH else [])])),
        "linear_bias": draw(st.booleans()),
        "token_shift": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "spec": draw(st.sampled_from(["paper", "lucidrains"])),
    }
    if kind is FLASH:
        options["chunk_size"] = draw(st.sampled_from([1, 4, 16, 70]))
        options["lin_normalizer"] = draw(st.sampled_from(["tokens", 3.0]))
    else:
        options["normalizer"] = 5.0 if options["spec"] == "lucidrains" else draw(st.sampled_from(["row", 5.0]))
    layer = kind(6, hidden=draw(st.integers(1, 9)), dtype=torch.float64, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    n = draw(st.sampled_from([0, 1, 3, 4, 5, 33, 140]))
    layout = draw(st.sampled_from(["dense", "padded", "packed"]))
    x = torch.randn(1 if layout == "packed" else draw(st.integers(1, 3)), n, 6, dtype=torch.float64)
    sequences = {}
    if layout == "padded":
        sequences["lengths"] = torch.tensor([draw(st.integers(0, n)) for _ in range(x.shape[0])])
    if layout == "packed":
        cuts = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
        sequences["cu_seqlens"] = torch.tensor([0, *cuts, n], dtype=torch.int32)
    return layer, x.requires_grad_(), sequences


def results(layer, x, sequences):
    """The output, and the gradients of x and of every parameter, of a fixed weighting of it.

    Linear: a sine of outputs in the thousands would multiply the last places of both sides alike.
    """
    y = layer(x, **sequences)
    inputs = [x, *layer.parameters()]
    weights = torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
    return [y, *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True))]


def assert_equal_to_reference(layer, x, sequences):
    fused = results(layer, x, sequences)
    with flashgau.use_backend("reference"):
        composed = results(layer, x, sequences)
    largest = max((float(t.detach().abs().max()) for t in composed if t.numel()), default=0.0)
    for ours, theirs in zip(fused, composed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * max(1.0, largest))


@given(layers())
def test_a_whole_flash_layer_is_its_parts(case):
    assert_equal_to_reference(*case)


@given(layers(GAU))
@settings(max_examples=15)
def test_a_gau_layer_with_fused_projections_is_its_parts(case):
    assert_equal_to_reference(*case)


def test_panels_and_batch_groups_change_nothing():
    layer = FLASH(6, key_dim=4, chunk_size=4, causal=True, dtype=torch.float64)
    x = torch.randn(5, 30, 6, dtype=torch.float64, requires_grad=True)
    whole = results(layer, x, {})
    for chunks in (1, 2, 5, 8):  # together; of 7 and an open one
        with sized(chunk_elements=chunks * 4 * 12):
            found = results(layer, x, {})
        for ours, theirs in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_near_fp64_with_and_without_native_products(native, monkeypatch):
    """On processors that multiply bf16 products take bf16 factors, elsewhere fp32 ones; both must hold."""
    monkeypatch.setattr(common, "native_halves", lambda kind: common.HALVES if native else frozenset())
    exact = FLASH(32, key_dim=16, chunk_size=16, causal=True, dtype=torch.float64)
    rounded = FLASH(32, key_dim=16, chunk_size=16, causal=True, dtype=torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
            q.copy_(p.normal_(std=0.3).to(torch.bfloat16))
            p.copy_(q)
    x = torch.randn(2, 50, 32, dtype=torch.bfloat16)
    with flashgau.use_backend("reference"):
        truth = results(exact, x.double().requires_grad_(), {})
        plain = results(rounded, x.clone().requires_grad_(), {})
    ours = results(rounded, x.clone().requires_grad_(), {})
    for a, b, t in zip(ours, plain, truth, strict=True):
        floor = 8 * torch.finfo(torch.bfloat16).eps * t.abs().max()
        assert (a.double() - t).abs().max() <= 3 * (b.double() - t).abs().max() + floor


@pytest.mark.parametrize("options", [{}, {"linear_bias": False}, {"rotary_dim": 4}], ids=str)
@pytest.mark.parametrize("kind", [GAU, FLASH])
@pytest.mark.skipif("triton" not in backends_of("gau_attention"), reason="no GPU, and not interpreting")
def test_on_triton_silu_of_the_gate_is_attentions(kind, options):
    """Output and gradients are those of the reference, and nothing stores silu(u)."""
    torch.manual_seed(0)
    layer = kind(12, key_dim=8, hidden=20, **({"chunk_size": 16} if kind is FLASH else {}), **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x, op = torch.randn(2, 21, 12, requires_grad=True), "gau" if kind is GAU else "mixed_chunk"
    sequences = {"lengths": torch.tensor([21, 5])}
    seen = []
    own = dispatch.implementation(f"{op}_attention", "triton", f"{op}_attention_forward")

    def forward(*args, **kwargs):
        seen.append((kwargs["gate"].detach(), kwargs["options"].gate_activation))
        return own(*args, **kwargs)

    module = importlib.import_module(f"flashgau.kernels.{op}")
    with flashgau.use_backend("reference"), dispatch.use_backend_in_layers("reference"):
        expected = results(layer, x, sequences)
    watched = mock.patch.object(module, f"{op}_attention_forward", forward)
    with flashgau.use_backend("triton"), dispatch.use_backend_in_layers("triton"), watched:
        found = results(layer, x, sequences)
    close_gradients(found, expected, ulps=256)
    ((gate, activation),) = seen
    bias = None if layer.to_hidden.bias is None else layer.to_hidden.bias[:20]
    torch.testing.assert_close(gate, torch.nn.functional.linear(layer.norm(x), layer.to_hidden.weight[:20], bias))
    assert activation == "silu"


@pytest.mark.parametrize("kind", [GAU, FLASH])
def test_a_function_in_place_of_attention_gets_an_activated_gate(kind):
    """It need not know of `gate_activation`."""
    op = flashgau.gau_attention if kind is GAU else flashgau.mixed_chunk_attention
    own = kind(6, key_dim=4, attention_fn=lambda *args, **options: op(*args, **options))
    plain = kind(6, key_dim=4)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(1, 9, 6)
    torch.testing.assert_close(own(x), plain(x))
    if "triton" in backends_of("gau_attention"):
        with flashgau.use_backend("triton"), dispatch.use_backend_in_layers("triton"):
            torch.testing.assert_close(own(x), plain(x))


def test_operators_are_what_their_shape_functions_say():
    x, w, b = torch.randn(2, 5, 6), torch.randn(10, 6), torch.randn(10)
    operator = projection._projection.forward.overload
    torch.library.opcheck(operator, tuple(map(_trainable, (x, w, b, None, "eager"))))
    gamma, beta, angles = torch.randn(3, 2), torch.randn(3, 2), torch.randn(1, 5, 1)
    for save, raw_gate in ((True, False), (True, True), (False, True)):
        args = (x, w, b, gamma, beta, angles.cos(), angles.sin(), save, raw_gate, False, "eager")
        trainable = tuple(_trainable(t) if save or not isinstance(t, torch.Tensor) else t for t in args)
        torch.library.opcheck(projection._gated_projection.forward.overload, trainable)


def _trainable(x):
    return x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("kind", [GAU, FLASH])
@pytest.mark.skipif("triton" not in backends_of("gau_attention"), reason="no GPU, and not interpreting")
def test_a_training_step_keeps_what_the_docs_say(kind):
    """Numbers a token: x, norm(x), u, v twice, what u multiplies, and that product; z and the heads made of it."""
    d, e, s, n = 12, 20, 8, 64
    layer = kind(d, key_dim=s, hidden=e, bias="none", **({"chunk_size": 16} if kind is FLASH else {}))
    x, held = torch.randn(1, n, d, requires_grad=True), {}

    def keep(t):
        if t.numel() >= n * min(d, s):  # not what is as small as a parameter
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() / 4 / n
        return t

    with flashgau.use_backend("triton"), dispatch.use_backend_in_layers("triton"):
        layer(x)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(x)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    angles = {t.untyped_storage().data_ptr() for t in layer.rotary.turns(torch.empty(n, s))}
    found = sum(size for place, size in held.items() if place not in parameters | angles)
    count = 2 if kind is GAU else 4
    assert found == 2 * d + 5 * e + (1 + count) * s

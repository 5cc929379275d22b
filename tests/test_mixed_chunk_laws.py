"""`flashgau.mixed_chunk_attention` on every optimised backend, by its own laws."""

import torch
from backends import backend_fixture
from checks import close, close_gradients
from hypothesis import given
from hypothesis import strategies as st
from mixed_chunk_inputs import draw_dense
from strategies import Call, randn, seeds

import flashgau

backend = backend_fixture("mixed_chunk_attention")
data = st.data()


@given(data)
def test_batch_rows_are_independent(backend, data):
    call = draw_dense(data, backend, causal=data.draw(st.booleans()))
    whole = call()
    for b in range(whole.shape[0]):
        alone = Call(call.name, tuple(x[b : b + 1] for x in call.args), call.kwargs)
        close(alone(), whole[b : b + 1])


@given(data)
def test_causal_prefix_knows_nothing_of_the_rest(backend, data):
    call = draw_dense(data, backend, causal=True)
    n = data.draw(st.integers(0, call.args[0].shape[1]))
    close(Call(call.name, tuple(x[:, :n] for x in call.args), call.kwargs)(), call()[:, :n])


@given(data)
def test_order_of_chunks_is_irrelevant(backend, data):
    """Without a mask whole chunks may change places."""
    chunks = data.draw(st.integers(1, 3 if backend == "triton" else 5))
    call = draw_dense(data, backend, chunks=chunks, causal=False)
    size = call.kwargs["chunk_size"]
    order = torch.randperm(chunks, generator=torch.Generator().manual_seed(data.draw(seeds)))
    rows = (order[:, None] * size + torch.arange(size)).flatten()
    moved = Call(call.name, tuple(x[:, rows] for x in call.args), call.kwargs)
    close(moved(), call()[:, rows], ulps=32)
    leaves = moved.leaves()
    weight = torch.ones_like(call.args[4])
    moved_grads = torch.autograd.grad(leaves(), list(leaves.args), weight)
    leaves = call.leaves()
    grads = torch.autograd.grad(leaves(), list(leaves.args), weight)
    close_gradients(list(moved_grads), [g[:, rows] for g in grads])


@given(data)
def test_one_chunk_is_the_gated_attention_unit(backend, data):
    """Causal within one chunk there is only the local part: quadratic attention with n = C."""
    size = data.draw(st.integers(1, 40))
    call = draw_dense(data, backend, chunk=size, chunks=1, causal=True, dtype=torch.float32)
    quad_q, quad_k, _, _, v, *gate = call.args
    options = {key: call.kwargs.get(key) for key in ("score", "causal", "rel_bias")}
    options["normalizer"] = size
    # How large the terms are: a score may cancel, and its products are added up in another order.
    terms = flashgau.gau_attention(*(x.abs() for x in (quad_q, quad_k, v, *gate)), **options)
    scale = float(terms.abs().max()) if terms.numel() else 0.0
    close(call(), flashgau.gau_attention(quad_q, quad_k, v, *gate, **options), ulps=32, scale=scale)


@given(data)
def test_chunks_of_one_token_are_linear_attention(backend, data):
    """With C = 1 and a local score of zero the causal sum over tokens before is all."""
    call = draw_dense(data, backend, chunk=1, causal=True, dtype=torch.float32, lin_normalizer=2, score="relu2")
    _, _, lin_q, lin_k, v, *gate = call.args
    zero = torch.zeros_like(lin_q)
    out = Call(call.name, (zero, zero, *call.args[2:]), {**call.kwargs, "rel_bias": None})()
    scores = (lin_q.double() @ lin_k.double().mT).tril(-1) / 2
    expected = scores @ v.double()
    terms = scores.abs() @ v.double().abs()  # how large they are: the result may cancel
    if gate:
        expected, terms = expected * gate[0], terms * gate[0].abs()
    close(out, expected.float(), ulps=64, scale=float(terms.max()))


@given(data)
def test_gate_multiplies_the_ungated_output(backend, data):
    call = draw_dense(data, backend, causal=data.draw(st.booleans()), dtype=torch.float32)
    gate = randn(data.draw(seeds), *call.args[4].shape)
    ungated = Call(call.name, call.args[:5], call.kwargs)()
    close(Call(call.name, (*call.args[:5], gate), call.kwargs)(), gate * ungated)

"""`flashgau.gau_attention` on every optimised backend: against the fp64 reference, and by its own laws."""

import math

import pytest
import torch
from backends import DTYPES, PANELS, TINY, backend_fixture, backends_of, blocks, dtypes_of, largest_storages, needs
from checks import (
    REST,
    check_agrees,
    check_backward_repeats,
    check_leaves_inputs_alone,
    check_repeats_bitwise,
    check_rest_is_padding,
    check_second_derivative,
    check_some_gradients,
    close,
    close_gradients,
    gradients,
    outputs,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import ACTIVATIONS, GAU_SCORES, Call, gau_calls, randn, seeds
from torch import Tensor

import flashgau

backend = backend_fixture("gau_attention")
data = st.data()
every_score = pytest.mark.parametrize(("score", "normalizer"), GAU_SCORES, ids=str)
# What a row of a causal call says must not depend on what comes after it: "keys" counts that too.
PREFIX_STABLE = [pair for pair in GAU_SCORES if pair[1] != "keys" or pair[0].startswith("softmax")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data)
def test_agrees_with_the_reference(backend, dtype, data):
    needs(backend, dtype)
    check_agrees(data.draw(gau_calls(dtype=dtype)), backend)


@every_score
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_every_score_in_every_shape(backend, score, normalizer, causal):
    """Fewer, as many and more queries than keys; with all else that is optional, and without."""
    for m, n in ((33, 33), (17, 33), (40, 17), (1, 20)):
        q, k, v, gate = randn(0, 2, m, 8), randn(1, 2, n, 8), randn(2, 2, n, 11), randn(3, 2, m, 11)
        options = {"score": score, "normalizer": normalizer, "causal": causal}
        check_agrees(Call("gau_attention", (q, k, v), options), backend)
        options |= {"rel_bias": randn(4, 2, 81) / 4, "lengths": torch.tensor([n, n // 2])}
        check_agrees(Call("gau_attention", (q, k, v, gate), options), backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_the_gate(backend, activation):
    """Applied where the gate is read: a gate that was activated before gives the same, and as large gradients."""
    shapes = (2, 19, 8), (2, 19, 8), (2, 19, 11), (2, 19, 11)
    call = Call("gau_attention", tuple(randn(i, *s) for i, s in enumerate(shapes)), {"gate_activation": activation})
    check_agrees(call, backend)
    q, k, v, gate = call.args
    before = flashgau.gau_attention(q, k, v, flashgau.reference.glu(gate, torch.ones_like(gate), activation=activation))
    close(call(), before)


@pytest.mark.parametrize("spare", [0, 1, 6], ids="P = longest + {}".format)
@pytest.mark.parametrize(("m", "n"), [(17, 17), (5, 34), (34, 20)])
def test_every_entry_of_the_bias(backend, m, n, spare):
    """About 0.7 the laplace score is steepest, so that the gradient's first and last entries count."""
    q, k, v = randn(0, 2, m, 8), randn(1, 2, n, 8), randn(2, 2, n, 12)
    bias = 0.7 + 0.1 * randn(3, 2 * (max(m, n) + spare) - 1)
    check_agrees(Call("gau_attention", (q, k, v), {"score": "laplace", "rel_bias": bias}), backend)


@given(data)
def test_repeats_bitwise(backend, data):
    check_repeats_bitwise(data.draw(gau_calls(backend)))


@given(data)
def test_leaves_its_inputs_alone(backend, data):
    check_leaves_inputs_alone(data.draw(gau_calls(backend)))


@given(data)
def test_backward_repeats_over_a_kept_graph(backend, data):
    check_backward_repeats(data.draw(gau_calls(backend)))


@given(data, st.lists(st.booleans(), min_size=5, max_size=5))
def test_gradients_of_some_operands_alone(backend, data, needed):
    check_some_gradients(data.draw(gau_calls(backend)), needed)


@every_score
def test_second_derivatives(backend, score, normalizer):
    operands = randn(0, 1, 7, 4), randn(1, 1, 7, 4), randn(2, 1, 7, 3), randn(3, 1, 7, 3)
    check_second_derivative(Call("gau_attention", operands, {"score": score, "normalizer": normalizer}))


@every_score
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients_are_derivatives(backend, score, normalizer, causal):
    needs(backend, torch.float64)
    shapes = (1, 4, 2), (1, 5, 2), (1, 5, 2), (1, 4, 2), (1, 9)
    inputs = [randn(i, *s, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]
    options = {"score": score, "normalizer": normalizer, "causal": causal}
    function = lambda q, k, v, gate, bias: flashgau.gau_attention(q, k, v, gate, rel_bias=bias, **options)
    assert torch.autograd.gradcheck(function, inputs)


# ---------------------------------------------------------------- laws


def draw_dense(data, backend, *, pairs=GAU_SCORES, causal=None, equal=False, dtype=None) -> Call:
    dtype = dtype or data.draw(st.sampled_from(dtypes_of(backend)))
    b, m = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 15, 17, 65]))
    n = m if equal else data.draw(st.sampled_from([1, 16, 33, 65]))
    width, value_width = data.draw(st.sampled_from([(8, 8), (5, 19), (16, 3)]))
    seed = data.draw(seeds)
    score, normalizer = data.draw(st.sampled_from(pairs))
    args = [
        randn(seed + i, b, rows, w, dtype=dtype)
        for i, (rows, w) in enumerate([(m, width), (n, width), (n, value_width), (m, value_width)])
    ]
    causal = data.draw(st.booleans()) if causal is None else causal
    return Call(
        "gau_attention",
        tuple(args[: data.draw(st.integers(3, 4))]),
        {"score": score, "normalizer": normalizer, "causal": causal},
    )


def bias_for(data, call: Call, length: int) -> Tensor | None:
    q = call.args[0]
    return randn(data.draw(seeds), 2 * length - 1, dtype=q.dtype) if data.draw(st.booleans()) else None


@given(data)
def test_order_of_keys_is_irrelevant(backend, data):
    call = draw_dense(data, backend, causal=False)
    q, k, v, *gate = call.args
    order = torch.randperm(k.shape[1], generator=torch.Generator().manual_seed(data.draw(seeds)))
    (out,), (dq, dk, dv, *dgate) = gradients(call)
    shuffled = Call("gau_attention", (q, k[:, order], v[:, order], *gate), call.kwargs)
    (out2,), (dq2, dk2, dv2, *dgate2) = gradients(shuffled)
    close(out2, out)
    close_gradients([dq2, dk2, dv2, *dgate2], [dq, dk[:, order], dv[:, order], *dgate])


@given(data)
def test_batch_rows_are_independent(backend, data):
    call = draw_dense(data, backend)
    call = call.with_options(rel_bias=bias_for(data, call, 65))
    whole = call()
    # A product may add up in another order for another number of rows: what cancels in a score leaves that rounding.
    scale = float(Call("gau_attention", tuple(x.abs() for x in call.args), call.kwargs)().abs().max())
    for b in range(whole.shape[0]):
        alone = Call("gau_attention", tuple(x[b : b + 1] for x in call.args), call.kwargs)()
        close(alone, whole[b : b + 1], scale=scale if math.isfinite(scale) else 0.0)


@given(data)
def test_causal_prefix_knows_nothing_of_the_rest(backend, data):
    call = draw_dense(data, backend, pairs=PREFIX_STABLE, causal=True, equal=True)
    bias = bias_for(data, call, call.args[0].shape[1])
    n = data.draw(st.integers(0, call.args[0].shape[1]))
    prefix = Call("gau_attention", tuple(x[:, :n] for x in call.args), call.kwargs)
    close(prefix(rel_bias=bias), call(rel_bias=bias)[:, :n])


@given(data)
def test_last_queries_alone_are_the_last_rows(backend, data):
    """Bottom-right alignment: new queries against cached keys are the end of the whole."""
    call = draw_dense(data, backend, equal=True)
    q, k, v, *gate = call.args
    n = q.shape[1]
    bias = bias_for(data, call, n)
    m = data.draw(st.integers(0, n))
    last = Call("gau_attention", (q[:, n - m :], k, v, *(g[:, n - m :] for g in gate)), call.kwargs)
    close(last(rel_bias=bias), call(rel_bias=bias)[:, n - m :])


@given(data)
def test_split_keys_add_up(backend, data):
    """Elementwise scores need no normalisation over keys: parts of the sum simply add."""
    call = draw_dense(data, backend, pairs=[("relu2", 3.5), ("laplace", 8)], causal=False, dtype=torch.float32)
    q, k, v, *gate = call.args
    cut = data.draw(st.integers(0, k.shape[1]))
    parts = [Call("gau_attention", (q, k[:, s], v[:, s], *gate), call.kwargs)() for s in (slice(cut), slice(cut, None))]
    close(sum(parts), call(), ulps=64)


@given(data)
def test_gate_multiplies_the_ungated_output(backend, data):
    call = draw_dense(data, backend, dtype=torch.float32)
    q, k, v, *_ = call.args
    gate = randn(data.draw(seeds), *q.shape[:2], v.shape[-1])
    ungated = Call("gau_attention", (q, k, v), call.kwargs)()
    close(Call("gau_attention", (q, k, v, gate), call.kwargs)(), gate * ungated)


@given(data)
def test_softmax_score_is_attention_with_one_head(backend, data):
    call = draw_dense(data, backend, pairs=[("softmax", "keys")], dtype=torch.float32)
    q, k, v = call.args[:3]
    bias = bias_for(data, call, 65)
    out = Call("gau_attention", (q, k, v), call.kwargs)(rel_bias=bias)
    heads = [x[:, None] for x in (q, k, v)]
    close(out, flashgau.attention(*heads, causal=call.kwargs["causal"], rel_bias=bias)[:, 0], ulps=32)


@given(data)
def test_softmax_plus_scales_by_the_log_of_what_is_seen(backend, data):
    call = draw_dense(data, backend, pairs=[("softmax_plus", "keys")], causal=False, dtype=torch.float32)
    q, k, v, *gate = call.args
    factor = math.log(max(16, k.shape[1]), 512)
    scaled = Call("gau_attention", (factor * q, k, v, *gate), {"score": "softmax"})
    close(call(), scaled(), ulps=64)


@given(data)
def test_squared_relu_is_quadratic_in_the_queries(backend, data):
    pairs = [pair for pair in GAU_SCORES if pair[0] == "relu2"]
    call = draw_dense(data, backend, pairs=pairs, dtype=torch.float32)
    q, *rest = call.args
    close(Call("gau_attention", (4 * q, *rest), call.kwargs)(), 16 * call())


@given(data)
def test_equal_values_under_softmax_come_out_unchanged(backend, data):
    pairs = [("softmax", "keys"), ("softmax_plus", "keys")]
    call = draw_dense(data, backend, pairs=pairs)
    q, k, v, *_ = call.args
    out = Call("gau_attention", (q, k, torch.full_like(v, 1.25)), call.kwargs)()
    m, n = q.shape[1], k.shape[1]
    seeing = (torch.arange(m) + n - m >= 0) | torch.tensor(not call.kwargs["causal"])
    close(out, torch.where(seeing[:, None], 1.25, 0.0).expand_as(out).to(out.dtype), ulps=8)


# ---------------------------------------------------------------- padding and packing


def run_with_own_weights(call: Call) -> list[Tensor]:
    """Output and gradients of the operands; a token's weights come from its own output, in a pack as alone."""
    call = call.leaves()
    out = call()
    grads = torch.autograd.grad(out, list(call.args), torch.cos(7 * out.detach()))
    return [out.detach(), *grads]


@given(data)
def test_packed_is_alone(backend, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    counts = data.draw(st.lists(st.sampled_from([0, 1, 7, 16, 33]), min_size=1, max_size=4))
    score, normalizer = data.draw(st.sampled_from(GAU_SCORES))
    options = {"score": score, "normalizer": normalizer, "causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["rel_bias"] = randn(data.draw(seeds), 79, dtype=dtype)
    seed = data.draw(seeds)
    sequences = [tuple(randn(seed + i, 1, n, w, dtype=dtype) for i, w in enumerate((4, 4, 6, 6))) for n in counts]
    cu = torch.tensor([0, *counts]).cumsum(0)
    packed = Call(
        "gau_attention",
        tuple(torch.cat(parts, 1) for parts in zip(*sequences, strict=True)),
        {**options, "cu_seqlens": cu},
    )
    alone = [run_with_own_weights(Call("gau_attention", parts, options)) for parts in sequences]
    for a, parts in zip(run_with_own_weights(packed), zip(*alone, strict=True), strict=True):
        close(a, torch.cat(parts, 1), ulps=4)


@given(data)
def test_padded_is_alone_and_padding_is_irrelevant(backend, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 7, 16, 33]), min_size=1, max_size=4))
    n = max(lengths) + data.draw(st.sampled_from([0, 1, 5]))
    m = data.draw(st.sampled_from([n, n, 1, 20]))  # as many queries as keys are padded like these
    rows = [x if m == n else m for x in lengths]
    score, normalizer = data.draw(st.sampled_from(GAU_SCORES))
    options = {"score": score, "normalizer": normalizer, "causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["rel_bias"] = randn(data.draw(seeds), 79, dtype=dtype)
    seed, b = data.draw(seeds), len(lengths)
    valids = (rows, lengths, lengths, rows, rows)
    operands = [
        randn(seed + i, b, size, w, dtype=dtype) for i, (size, w) in enumerate(((m, 4), (n, 4), (n, 6), (m, 6), (m, 6)))
    ]
    for x, valid in zip(operands, valids, strict=True):
        for i, length in enumerate(valid):
            x[i, length:] = math.nan

    def run(batch: slice, cuts: list[slice], **padding) -> list[Tensor]:
        *leaves, weight = (x[batch, s] for x, s in zip(operands, cuts, strict=True))
        leaves = [x.clone().requires_grad_() for x in leaves]
        out = flashgau.gau_attention(*leaves, **options, **padding)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

    padded = run(slice(None), [slice(None)] * 5, lengths=torch.tensor(lengths))
    for i in range(b):
        alone = run(slice(i, i + 1), [slice(0, valid[i]) for valid in valids])
        for a, w, valid in zip(alone, padded, (rows, *valids[:4]), strict=True):
            close(w[i : i + 1, : valid[i]], a, ulps=4)
            assert not w[i, valid[i] :].any()


@pytest.mark.parametrize("name", [*backends_of("gau_attention"), "reference"])
@pytest.mark.parametrize("case", range(len(REST)), ids=lambda case: str(REST[case][0]))
def test_rows_of_no_sequence_are_padding(name, case):
    ends, n = REST[case]
    operands = tuple(randn(i, 1, n, w) for i, w in enumerate((4, 4, 7, 7)))
    options = {"score": "softmax" if case else "relu2", "causal": case == 3, "rel_bias": randn(4, 79) / 4}
    with flashgau.use_backend(name), blocks({**TINY, **(PANELS if case % 2 else {})}):
        check_rest_is_padding(Call("gau_attention", operands, options), 1, {"q": ends}, "qqqq", "q")


# ---------------------------------------------------------------- cost and sizes


@pytest.mark.parametrize("name", backends_of("gau_attention"))
@pytest.mark.parametrize("score", ["relu2", "softmax_plus"])
def test_memory_is_linear(name, score):
    n = 512 if name == "triton" else 8192  # whose panels are then of one block
    operands = [randn(i, 1, n, w) for i, w in enumerate((2, 2, 4, 4))]
    with flashgau.use_backend(name), blocks(PANELS if name == "triton" else {}), largest_storages() as found:
        gradients(Call("gau_attention", tuple(operands), {"score": score, "rel_bias": randn(4, 2 * n - 1)}))
    assert max(found) < n * n  # bytes: a quarter of a matrix of fp32 scores


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids=str)
@every_score
def test_nothing_in_gives_nothing_out(backend, shape, score, normalizer):
    b, m, n = shape
    operands = randn(0, b, m, 4), randn(1, b, n, 4), randn(2, b, n, 3), randn(3, b, m, 3)
    (out,), grads = gradients(Call("gau_attention", operands, {"score": score, "normalizer": normalizer}))
    assert out.shape == (b, m, 3)
    assert not out.any()
    assert not any(g.any() for g in grads)


def test_large_fp16_scores_stay_finite_until_they_are_squared(backend):
    """q k^T / n of 300 squares to 90000, past the largest fp16: weights are fp32 until they meet the values."""
    q = torch.full((1, 4, 1), 30.0, dtype=torch.float16)
    v = torch.full((1, 4, 1), 1e-3, dtype=torch.float16)
    out = flashgau.gau_attention(q, q, v, normalizer=3)
    close(out, torch.full_like(out, 4 * 300.0**2 * float(v[0, 0, 0])), ulps=4)


def test_outputs_are_contiguous(backend):
    q, v = randn(0, 2, 9, 4), randn(1, 2, 9, 3)
    assert outputs(flashgau.gau_attention(q, q, v.mT.contiguous().mT))[0].is_contiguous()


def test_gradients_are_contiguous_whatever_the_operands(backend):
    """As the operator's shape function tells torch.compile."""
    operands = [randn(i, 2, width, 9).mT.requires_grad_() for i, width in enumerate((4, 4, 3, 3))]
    grads = torch.autograd.grad(flashgau.gau_attention(*operands, causal=True).sum(), operands)
    assert all(g.is_contiguous() for g in grads)

"""`flashgau.attention` on every optimised backend: against the fp64 reference, and by its own laws."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from backends import (
    DTYPES,
    TINY,
    backend_fixture,
    backends_of,
    blocks,
    dtypes_of,
    largest_storages,
    needs,
    small_blocks,
)
from checks import (
    REST,
    check_agrees,
    check_backward_repeats,
    check_leaves_inputs_alone,
    check_refuses_second_derivative,
    check_repeats_bitwise,
    check_rest_is_padding,
    check_some_gradients,
    close,
    close_gradients,
    gradients,
    outputs,
    weighted,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Call, attention_calls, randn, seeds
from torch import Tensor

import flashgau
from flashgau.eager import attention as eager_attention

backend = backend_fixture("attention")
data = st.data()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data)
def test_agrees_with_the_reference(backend, dtype, data):
    needs(backend, dtype)
    check_agrees(data.draw(attention_calls(backend, dtype=dtype)), backend)


@given(data)
def test_without_options_agrees_with_the_reference(backend, data):
    check_agrees(data.draw(attention_calls(backend, plain=True)), backend)


@given(data)
def test_repeats_bitwise(backend, data):
    check_repeats_bitwise(data.draw(attention_calls(backend)))


@given(data)
def test_leaves_its_inputs_alone(backend, data):
    check_leaves_inputs_alone(data.draw(attention_calls(backend)))


@given(data)
def test_backward_repeats_over_a_kept_graph(backend, data):
    check_backward_repeats(data.draw(attention_calls(backend)))


@given(data, st.lists(st.booleans(), min_size=5, max_size=5))
def test_gradients_of_some_operands_alone(backend, data, needed):
    check_some_gradients(data.draw(attention_calls(backend)), needed)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"causal": True, "return_lse": True}])
def test_second_derivatives_are_refused(backend, options):
    q, k, v = (randn(i, 1, 2, 7, 4) for i in range(3))
    check_refuses_second_derivative(Call("attention", (q, k, v), options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window": (3, None), "softcap": 1.5},
        {"lengths": torch.tensor([3, 0])},
        {"dropout_p": 0.4, "dropout_seed": 7, "return_lse": True},
    ],
    ids=["full", "window, softcap", "lengths", "dropout"],
)
@pytest.mark.parametrize("extras", [False, True], ids=["", "bias, sinks"])
def test_gradients_are_derivatives(backend, options, extras):
    needs(backend, torch.float64)
    inputs = [randn(1, 2, 2, 4, 2), randn(2, 2, 1, 5, 2), randn(3, 2, 1, 5, 1)]
    inputs += [randn(4, 2, 9), randn(5, 2)] if extras else []
    inputs = [x.double().requires_grad_() for x in inputs]

    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        bias, sinks = rest if rest else (None, None)
        result = flashgau.attention(q, k, v, rel_bias=bias, sinks=sinks, **options)
        return torch.cat([torch.where(torch.isfinite(x), x, 0).flatten() for x in outputs(result)])

    assert torch.autograd.gradcheck(function, inputs)


# ---------------------------------------------------------------- laws


def close_lse(actual: Tensor, expected: Tensor, like: Tensor) -> None:
    """A logarithm near 0 keeps the rounding of what it came from, so values count as at least 1.

    On a CPU PyTorch's fused kernel gives the LSE of half-precision inputs to about 5e-5.
    """
    close(actual, expected, ulps=1024 if like.dtype.itemsize == 2 else 16, scale=1.0)


def check(actual: Tensor, expected: Tensor, like: Tensor) -> None:
    """An output, or an LSE, which has one axis less."""
    if actual.dim() == 4:
        close(actual, expected)
    else:
        close_lse(actual, expected, like)


def draw_dense(data, backend, *, batch=(1, 2, 3), m=(1, 15, 17, 65), equal=False, dtype=None, **options) -> Call:
    """A call without padding or packing, M = N if `equal`."""
    dtype = dtype or data.draw(st.sampled_from(dtypes_of(backend)))
    few = backend == "triton"  # programs that an interpreter goes through
    b = data.draw(st.sampled_from([x for x in batch if x < 3] if few else batch))
    heads_k, group = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)] + [(2, 2)] * (not few)))
    rows = data.draw(st.sampled_from(m))
    keys = rows if equal else data.draw(st.sampled_from([1, 16, 33, 65]))
    width, value_width = data.draw(st.sampled_from([(8, 8), (5, 7), (16, 3)]))
    seed = data.draw(seeds)
    q = randn(seed, b, heads_k * group, rows, width, dtype=dtype)
    k = randn(seed + 1, b, heads_k, keys, width, dtype=dtype)
    v = randn(seed + 2, b, heads_k, keys, value_width, dtype=dtype)
    return Call("attention", (q, k, v), options)


def bias_for(data, call: Call, length: int) -> Tensor | None:
    q = call.args[0]
    return randn(data.draw(seeds), q.shape[1], 2 * length - 1, dtype=q.dtype) if data.draw(st.booleans()) else None


def windows(data) -> dict:
    side = st.sampled_from([None, 0, 3, 20])
    return {"causal": data.draw(st.booleans()), "window": data.draw(st.tuples(side, side))}


@given(data)
def test_order_of_keys_is_irrelevant(backend, data):
    call = draw_dense(data, backend, return_lse=True, softcap=data.draw(st.sampled_from([None, 3.0])))
    q, k, v = call.args
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(data.draw(seeds)))
    (out, lse), (dq, dk, dv) = gradients(call)
    (out2, lse2), (dq2, dk2, dv2) = gradients(Call("attention", (q, k[:, :, order], v[:, :, order]), call.kwargs))
    close(out2, out)
    close_lse(lse2, lse, q)
    close_gradients([dq2, dk2, dv2], [dq, dk[:, :, order], dv[:, :, order]])


@given(data)
def test_batch_rows_are_independent(backend, data):
    call = draw_dense(data, backend, batch=(2, 3), **windows(data))
    call = call.with_options(return_lse=True, rel_bias=bias_for(data, call, 65))
    whole = outputs(call())
    for b in range(call.args[0].shape[0]):
        alone = Call("attention", tuple(x[b : b + 1] for x in call.args), call.kwargs)
        for a, w in zip(outputs(alone()), whole, strict=True):
            check(a, w[b : b + 1], call.args[0])


@given(data)
def test_heads_are_independent(backend, data):
    call = draw_dense(data, backend, **windows(data))
    q, k, v = call.args
    call = call.with_options(return_lse=True, sinks=randn(data.draw(seeds), q.shape[1], dtype=q.dtype))
    whole = outputs(call())
    group = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        own = slice(h // group, h // group + 1)
        alone = Call("attention", (q[:, h : h + 1], k[:, own], v[:, own]), call.kwargs)
        for a, w in zip(outputs(alone(sinks=call.kwargs["sinks"][h : h + 1])), whole, strict=True):
            check(a, w[:, h : h + 1], call.args[0])


@given(data)
def test_shared_keys_are_repeated_keys(backend, data):
    call = draw_dense(data, backend, **windows(data))
    q, k, v = call.args
    group = q.shape[1] // k.shape[1]
    repeated = Call("attention", (q, *(x.repeat_interleave(group, 1) for x in (k, v))), call.kwargs)
    (out,), (dq, dk, dv) = gradients(call)
    (out2,), (dq2, dk2, dv2) = gradients(repeated)
    close(out, out2)
    # In half precision the sum over the group is rounded once more.
    close_gradients([dq, dk, dv], [dq2, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk2, dv2))])


@given(data)
def test_causal_prefix_knows_nothing_of_the_rest(backend, data):
    call = draw_dense(data, backend, equal=True, causal=True, return_lse=True)
    call = call.with_options(window=(data.draw(st.sampled_from([None, 0, 5, 40])), None))
    q, _k, _v = call.args
    bias = bias_for(data, call, q.shape[2])
    whole = outputs(call(rel_bias=bias))
    n = data.draw(st.integers(0, q.shape[2]))
    prefix = Call("attention", tuple(x[:, :, :n] for x in call.args), call.kwargs)
    for a, w in zip(outputs(prefix(rel_bias=bias)), whole, strict=True):
        check(a, w[:, :, :n], call.args[0])


@given(data)
def test_last_queries_alone_are_the_last_rows(backend, data):
    """Bottom-right alignment: a decoding step against cached keys is the end of the whole."""
    call = draw_dense(data, backend, equal=True, return_lse=True, **windows(data))
    q, k, v = call.args
    call = call.with_options(rel_bias=bias_for(data, call, q.shape[2]))
    m = data.draw(st.integers(0, q.shape[2]))
    last = Call("attention", (q[:, :, q.shape[2] - m :], k, v), call.kwargs)
    for a, w in zip(outputs(last()), outputs(call()), strict=True):
        check(a, w[:, :, q.shape[2] - m :], call.args[0])


@given(data)
def test_split_keys_merge_by_their_lse(backend, data):
    call = draw_dense(data, backend, return_lse=True)
    q, k, _v = call.args
    cut = data.draw(st.integers(0, k.shape[2]))
    (out, lse), grads = gradients(call)

    def merged(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        parts = [flashgau.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(cut), slice(cut, None))]
        lses = torch.stack([part[1] for part in parts])
        total = torch.logsumexp(lses, 0)
        weights = torch.exp(lses - total)
        return [sum(w[..., None] * part[0] for w, part in zip(weights, parts, strict=True)).to(q.dtype), total]

    leaves = [x.detach().requires_grad_() for x in call.args]
    results = merged(*leaves)
    merged_grads = torch.autograd.grad(weighted(results), leaves)
    loose = 8 if q.dtype.itemsize == 2 else 64
    close(results[0].detach(), out)
    close_lse(results[1].detach(), lse, q)
    close_gradients(list(merged_grads), grads, ulps=loose)


@given(data)
def test_equal_values_come_out_unchanged(backend, data):
    call = draw_dense(data, backend, **windows(data))
    q, k, v = call.args
    constant = torch.full_like(v, 1.25)
    out, lse = flashgau.attention(q, k, constant, return_lse=True, **call.kwargs)
    expected = torch.where(torch.isfinite(lse), 1.25, 0.0)[..., None].expand_as(out).to(out.dtype)
    close(out, expected, ulps=8)


@given(data)
def test_equal_logits_average_the_values(backend, data):
    """With q = 0 the output is the mean over visible keys, and the LSE is the log of their number."""
    call = draw_dense(data, backend, **windows(data))
    q, k, v = call.args
    out, lse = flashgau.attention(torch.zeros_like(q), k, v, return_lse=True, **call.kwargs)
    m, n = q.shape[2], k.shape[2]
    t = torch.arange(n) - (torch.arange(m)[:, None] + n - m)
    left, right = call.kwargs["window"]
    visible = torch.ones(m, n, dtype=torch.bool)
    if left is not None:
        visible &= t >= -left
    if right is not None:
        visible &= t <= right
    if call.kwargs["causal"]:
        visible &= t <= 0
    count = visible.sum(-1)
    group = q.shape[1] // k.shape[1]
    mean = visible.double() @ v.double().repeat_interleave(group, 1) / count.clamp_min(1)[:, None]
    close(out, mean.to(out.dtype), ulps=32)
    close_lse(lse, count.double().log().expand_as(lse).to(lse.dtype), q)


@given(data)
def test_window_is_a_bias_of_minus_infinity(backend, data):
    call = draw_dense(data, backend, return_lse=True)
    q, k, _ = call.args
    reach = max(q.shape[2], k.shape[2])
    left, right = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
    distance = torch.arange(2 * reach - 1) - (reach - 1)
    hidden = (distance < -left) | (distance > right)
    bias = torch.zeros(2 * reach - 1, dtype=q.dtype).masked_fill(hidden, -math.inf)
    by_window, grads = gradients(call.with_options(window=(left, right)))
    by_bias, grads_bias = gradients(call.with_options(rel_bias=bias))
    for a, b in zip(by_bias, by_window, strict=True):
        check(a, b, q)
    close_gradients(grads_bias[:3], grads)
    assert torch.isfinite(grads_bias[3]).all()


@given(data, st.sampled_from([30.0, 1e3, 1e4]))
def test_large_logits_neither_overflow_nor_vanish(backend, data, size):
    """At 1e4 the last place of an fp32 logit is 1e-3, and so are probabilities' relative errors: gradients too."""
    call = draw_dense(data, backend, dtype=torch.float32, return_lse=True, **windows(data))
    q, k, v = call.args
    large = Call("attention", (q * size, k, v), call.kwargs)
    report = flashgau.compare(flashgau.attention, *large.args, grad=False, **large.kwargs)
    # Eager makes the very logits of plain PyTorch. Another order of their sums moves them by last places, and a
    # probability by as much: there plain's own error, of a row or two, is luck.
    logit = size * float(q.abs().max() * k.abs().max()) * q.shape[-1] ** 0.5 if q.numel() and k.numel() else 0.0
    moved = 0.0 if backend == "eager" else torch.finfo(torch.float32).eps * logit
    for row in report.rows:
        assert row.max_error <= max(row.tolerance, moved * max(row.scale, 1.0)), str(report)
    assert all(torch.isfinite(g).all() for g in gradients(large)[1])


def test_many_sinks_drown_the_values(backend):
    q, k, v = (randn(i, 2, 2, 9, 4) for i in range(3))
    out, lse = flashgau.attention(q, k, v, sinks=torch.tensor([-math.inf, 200.0]), return_lse=True)
    plain, plain_lse = flashgau.attention(q, k, v, return_lse=True)
    close(out[:, 0], plain[:, 0])
    close(lse[:, 0], plain_lse[:, 0])
    assert out[:, 1].abs().max() == 0
    close(lse[:, 1], torch.full_like(lse[:, 1], 200))


def test_row_that_sees_nothing_has_its_sink_as_lse(backend):
    q, k, v = randn(0, 1, 2, 5, 4), randn(1, 1, 2, 2, 4), randn(2, 1, 2, 2, 4)
    sinks = torch.tensor([0.5, -3.0])
    (out, lse), grads = gradients(Call("attention", (q, k, v), {"causal": True, "sinks": sinks, "return_lse": True}))
    assert torch.equal(lse[0, :, :3], sinks[:, None].expand(2, 3))
    assert out[0, :, :3].abs().max() == 0
    assert grads[0][0, :, :3].abs().max() == 0
    assert all(torch.isfinite(g).all() for g in grads)


# ---------------------------------------------------------------- long sums in half precision

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["as fp32", "as halves"])
def products(request, monkeypatch):
    """The eager floor on a processor that multiplies halves slower than fp32, and on one that does it faster."""
    faster = request.param == "as halves"
    monkeypatch.setattr(eager_attention, "factor_dtype", lambda x: x.dtype if faster else torch.float32)
    monkeypatch.setattr(eager_attention, "_TILE", 256)
    with flashgau.use_backend("eager"):
        yield request.param


def half_operands(m: int, n: int, dtype: torch.dtype, heads: tuple[int, int] = (1, 1)) -> list[Tensor]:
    """q, k, v and the gradient of the output. Keys are their own values, and queries and gradients have a mean: every
    gradient is then a sum of terms of one sign."""
    q, k = randn(0, 1, heads[0], m, 8) + 1, randn(1, 1, heads[1], n, 8)
    return [x.to(dtype) for x in (q, k, k, 0.3 + 0.1 * randn(2, 1, heads[0], m, 8))]


def exact_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool = False) -> list[Tensor]:
    """dq, dk and dv by their formulas, in fp64."""
    group, shape = q.shape[1] // k.shape[1], k.shape
    q, dout = q.double(), dout.double()
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    s = scale * q @ k.mT
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -math.inf)
    p = torch.softmax(s, -1)
    ds = p * (dout @ v.mT - (dout * (p @ v)).sum(-1, keepdim=True))
    dk, dv = scale * ds.mT @ q, p.mT @ dout
    return [scale * ds @ k, *(x.view(shape[0], shape[1], group, *shape[2:]).sum(2) for x in (dk, dv))]


def half_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(flashgau.attention(*leaves, **options), leaves, dout)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("m", "n", "summed"), [(2**16, 3, "dk dv"), (3, 2**16, "dq")], ids=["queries", "keys"])
def test_gradients_over_a_long_axis_are_summed_in_fp32(products, dtype, m, n, summed):
    """In the inputs' own precision a sum of so many terms stands still: an eighth of it was missing in bf16.

    Each term may be rounded before it is added, and the sum once: two units in the last place of the largest.
    """
    operands = half_operands(m, n, dtype)
    found = zip(("dq", "dk", "dv"), half_gradients(*operands), exact_gradients(*operands), strict=True)
    for name, actual, expected in found:
        if name in summed.split():
            error = (actual.double() - expected).abs().max() / expected.abs().max()
            assert error < 2 * torch.finfo(dtype).eps, f"{name} is off by {error:.4f} of its largest"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["", "grouped"])
def test_gradients_of_halves_are_those_of_the_formula(products, dtype, causal, heads):
    operands = half_operands(850, 850, dtype, heads)
    found, expected = half_gradients(*operands, causal=causal), exact_gradients(*operands, causal)
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for actual, exact in zip(found, expected, strict=True):
        assert (actual.double() - exact).abs().max() < 4 * eps * exact.abs().max()
    if products == "as fp32":  # dv is then rounded once; its terms have one sign, and the LSE is right to about 5e-5
        assert ((found[2].double() - expected[2]).abs() <= (eps / 2 + 2e-4) * expected[2].abs() + least).all()


# ---------------------------------------------------------------- softcap and bias


def capped_and_biased_gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dout: Tensor, cap: float):
    """Output and gradients of q, k, v and the bias of one head, by loops over its entries, in fp64."""
    q, k, v, bias, dout = (x.double() for x in (q, k, v, bias, dout))
    m, n, reach = len(q), len(k), len(bias) // 2 + 1
    scale = q.shape[1] ** -0.5
    t = torch.tanh(scale * q @ k.T / cap)
    place = [[reach - 1 + j - (i + n - m) for j in range(n)] for i in range(m)]
    p = torch.softmax(cap * t + bias[torch.tensor(place)], -1)
    out = p @ v
    ds = p * (dout @ v.T - (dout * out).sum(-1, keepdim=True))
    dbias = torch.zeros_like(bias)
    for i in range(m):
        for j in range(n):
            dbias[place[i][j]] += ds[i, j]
    ds = ds * (1 - t * t)
    return out, scale * ds @ k, scale * ds.T @ q, p.T @ dout, dbias


@pytest.mark.parametrize("name", ["reference", "eager", "eager, small blocks", "triton"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 17), (33, 40), (5, 34)])
@pytest.mark.parametrize("spare", [0, 1, 6], ids="P = longest + {}".format)
def test_softcap_and_every_entry_of_the_bias(name, m, n, spare):
    """Scores past the cap, where 1 - tanh^2 matters; a large bias, which is not capped; a gradient in every entry."""
    name, *small = name.split(", ")
    if name == "triton" and name not in backends_of("attention"):
        pytest.skip("no GPU, and not interpreting")
    cap, reach = 0.75, n + spare
    q, k, v, dout = randn(0, m, 8), randn(1, n, 8), randn(2, n, 8), randn(3, m, 8)
    bias = 2 * randn(4, 2 * reach - 1)
    expected = capped_and_biased_gradients(q, k, v, bias, dout, cap)
    leaves = [x.requires_grad_() for x in (q[None, None], k[None, None], v[None, None], bias)]
    with flashgau.use_backend(name), small_blocks() if small else nullcontext():
        out = flashgau.attention(*leaves[:3], softcap=cap, rel_bias=leaves[3])
        found = out, *torch.autograd.grad(out, leaves, dout[None, None])
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double().view_as(exact), exact, atol=2e-5, rtol=1e-4)
    first, last = spare, 2 * reach - 2 - spare - (n - m)  # the last query and the first key, and the other way round
    assert not found[4][:first].any()
    assert not found[4][last + 1 :].any()
    assert n == 1 or found[4][[first, last]].abs().min() > 1e-6


# ---------------------------------------------------------------- dropout


@given(seeds, st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_keeps_what_the_reference_keeps(backend, seed, p):
    """With v one-hot the output is the matrix of kept probabilities itself."""
    q, k = randn(seed, 2, 2, 21, 4), randn(seed + 1, 2, 2, 37, 4)
    v = torch.eye(37).expand(2, 2, 37, 37)
    options = {"dropout_p": p, "dropout_seed": seed, "return_lse": True}
    out, lse = flashgau.attention(q, k, v, **options)
    expected, _ = flashgau.attention(q, k, v, backend="reference", **options)
    whole, whole_lse = flashgau.attention(q, k, v, return_lse=True)
    assert torch.equal(out == 0, expected == 0)
    close(out, torch.where(expected == 0, 0, whole / (1 - p)))
    assert torch.equal(lse, whole_lse)
    kept = (out != 0).double().mean()
    assert abs(kept - (1 - p)) < 6 * math.sqrt(p * (1 - p) / out.numel())


def test_dropout_seed_is_drawn_from_torch(backend):
    q, k, v = (randn(i, 1, 1, 40, 8) for i in range(3))
    torch.manual_seed(3)
    first, second = (flashgau.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(flashgau.attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_dropout_seed_may_be_a_tensor(backend):
    q, k, v = (randn(i, 1, 1, 40, 8) for i in range(3))
    for seed in (0, 5, 2**40 + 3, -1, 2**63 - 1):
        by_int = flashgau.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)
        by_tensor = flashgau.attention(q, k, v, dropout_p=0.5, dropout_seed=torch.tensor([seed]))
        assert torch.equal(by_int, by_tensor)


def test_dropout_counts_within_a_packed_sequence(backend):
    """Sequence g of a pack keeps what row g of a batch keeps."""
    q, k, v = (randn(i, 3, 2, 11, 4) for i in range(3))
    batched = flashgau.attention(q, k, v, dropout_p=0.5, dropout_seed=9)
    packed = (x.transpose(1, 2).reshape(1, 33, 2, 4).transpose(1, 2) for x in (q, k, v))
    cu = torch.tensor([0, 11, 22, 33], dtype=torch.int32)
    out = flashgau.attention(*packed, cu_seqlens=cu, dropout_p=0.5, dropout_seed=9)
    close(out.transpose(1, 2).reshape(3, 11, 2, 4).transpose(1, 2), batched)


# ---------------------------------------------------------------- padding and packing


def ragged_options(data, heads: int, dtype: torch.dtype) -> dict:
    """Options that mean the same for a sequence alone as in a batch."""
    options = windows(data) | {"softcap": data.draw(st.sampled_from([None, 2.0])), "return_lse": True}
    if data.draw(st.booleans()):
        options["rel_bias"] = randn(data.draw(seeds), heads, 2 * 40 - 1, dtype=dtype)
    if data.draw(st.booleans()):
        options["sinks"] = randn(data.draw(seeds), heads, dtype=dtype)
    return options


@given(data)
def test_packed_is_alone(backend, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    own_keys = data.draw(st.booleans())
    counts = data.draw(st.lists(st.sampled_from([0, 1, 7, 16, 33]), min_size=1, max_size=4))
    counts_k = [data.draw(st.sampled_from([0, 1, 9, 34])) for _ in counts] if own_keys else counts
    seed, heads = data.draw(seeds), 2
    options = ragged_options(data, heads, dtype)
    sequences = [
        (
            randn(seed, 1, heads, m, 4, dtype=dtype),
            randn(seed + 1, 1, 1, n, 4, dtype=dtype),
            randn(seed + 2, 1, 1, n, 4, dtype=dtype),
        )
        for m, n in zip(counts, counts_k, strict=True)
    ]
    cu = {"cu_seqlens": torch.tensor([0, *counts]).cumsum(0)}
    if own_keys:
        cu["cu_seqlens_k"] = torch.tensor([0, *counts_k]).cumsum(0)
    packed = Call("attention", tuple(torch.cat(parts, 2) for parts in zip(*sequences, strict=True)), options | cu)

    def run(call: Call) -> list[Tensor]:
        call = call.leaves()
        q, k, v = call.args
        out, lse = call()
        # The weights of each token are its own values, so that they are the same in a pack and alone.
        loss = (out * torch.cos(7 * out.detach())).sum() + torch.where(torch.isfinite(lse), lse, 0).sum()
        grads = torch.autograd.grad(loss, [q, k, v])
        return [out.detach(), lse[..., None].detach(), *grads]

    together = run(packed)
    alone = [run(Call("attention", parts, options)) for parts in sequences]
    for a, parts in zip(together, zip(*alone, strict=True), strict=True):
        close(a, torch.cat(parts, 2), ulps=4)


@given(data)
def test_padded_is_alone_and_padding_is_irrelevant(backend, data):
    dtype = data.draw(st.sampled_from(dtypes_of(backend)))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 7, 16, 33]), min_size=1, max_size=4))
    n = max(lengths) + data.draw(st.sampled_from([0, 1, 5]))
    m = data.draw(st.sampled_from([None, 1, 20]))  # None: as many queries as keys, padded like these
    rows = [x if m is None else m for x in lengths] if m != n else lengths
    seed, heads = data.draw(seeds), 2
    options = ragged_options(data, heads, dtype)
    b = len(lengths)
    q = randn(seed, b, heads, n if m is None else m, 4, dtype=dtype)
    k, v = randn(seed + 1, b, 1, n, 4, dtype=dtype), randn(seed + 2, b, 1, n, 4, dtype=dtype)
    weight = randn(seed + 3, *q.shape[:3], 4, dtype=dtype)
    lse_weight = randn(seed + 4, *q.shape[:3])
    for x, valid in ((q, rows), (k, lengths), (v, lengths), (weight, rows), (lse_weight, rows)):
        for i, length in enumerate(valid):
            x[i, :, length:] = math.nan

    def run(b: slice, m: slice, n: slice, **padding) -> list[Tensor]:
        leaves = [x[b, :, s].clone().requires_grad_() for x, s in ((q, m), (k, n), (v, n))]
        out, lse = flashgau.attention(*leaves, **options, **padding)
        seeing = torch.isfinite(lse.detach())
        cotangents = [weight[b, :, m], torch.where(seeing, lse_weight[b, :, m].to(lse.dtype), 0)]
        return [out.detach(), lse[..., None].detach(), *torch.autograd.grad([out, lse], leaves, cotangents)]

    padded = run(slice(None), slice(None), slice(None), lengths=torch.tensor(lengths))
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = run(slice(i, i + 1), slice(0, row), slice(0, length))
        for a, w, valid in zip(alone, padded, (row, row, row, length, length), strict=True):
            close(w[i : i + 1, :, :valid], a, ulps=4)
            rest = w[i, :, valid:]
            assert torch.equal(rest, torch.full_like(rest, -math.inf if w is padded[1] else 0))


@pytest.mark.parametrize("name", [*backends_of("attention"), "reference"])
@pytest.mark.parametrize("case", range(len(REST)), ids=lambda case: str(REST[case][0]))
def test_rows_of_no_sequence_are_padding(name, case):
    ends, m = REST[case]
    packed, n = {"q": ends}, m
    options = {"causal": case != 1, "return_lse": True, "sinks": randn(3, 2)}
    if case % 2:  # keys that are packed otherwise
        packed["k"], n = [max(0, 3 * x // 4 - 2) for x in ends], m + 3
    if case == 1:
        options["rel_bias"] = randn(4, 2 * n - 1)
    q, k, v = randn(0, 1, 2, m, 4), randn(1, 1, 1, n, 4), randn(2, 1, 1, n, 3)
    with flashgau.use_backend(name), blocks(TINY):
        check_rest_is_padding(Call("attention", (q, k, v), options), 2, packed, "qkk" if case % 2 else "qqq", "qq")


# ---------------------------------------------------------------- cost and sizes


@pytest.mark.parametrize("name", backends_of("attention"))
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "window": (200, None)}, {"softcap": 3.0, "dropout_p": 0.1}],
    ids=["full", "window", "dropout"],
)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_memory_is_linear(name, options, biased):
    n = 320 if name == "triton" and not torch.cuda.is_available() else 4096
    q, k, v = (randn(i, 1, 1, n, 4) for i in range(3))
    extra = {"rel_bias": randn(3, 2 * n - 1)} if biased else {}
    with flashgau.use_backend(name), largest_storages() as found:
        gradients(Call("attention", (q, k, v), {**options, **extra}))
    assert max(found) < n * n  # bytes: a quarter of a matrix of fp32 scores


def test_offsets_and_lengths_of_any_integer_dtype(backend):
    q, k, v = (randn(i, 1, 1, 9, 4) for i in range(3))
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        out = flashgau.attention(q, k, v, lengths=torch.tensor([5], dtype=dtype))
        close(out[:, :, :5], flashgau.attention(q[:, :, :5], k[:, :, :5], v[:, :, :5]), ulps=4)
    for dtype in (torch.int32, torch.int64):
        out = flashgau.attention(q, k, v, cu_seqlens=torch.tensor([0, 5, 9], dtype=dtype))
        close(out[:, :, :5], flashgau.attention(q[:, :, :5], k[:, :, :5], v[:, :, :5]), ulps=4)


def test_lengths_and_offsets_may_be_strided(backend):
    q, k, v = (randn(i, 3, 2, 40, 8) for i in range(3))
    column = torch.tensor([[40, 1], [17, 2], [5, 3]])[:, 0]
    for strided in (column, torch.tensor(20).expand(3)):
        a, b = (flashgau.attention(q, k, v, lengths=x) for x in (strided, strided.clone()))
        assert torch.equal(a, b)
    offsets = torch.tensor([0, 0, 7, 7, 15, 15, 40, 40], dtype=torch.int32)[::2]
    a, b = (flashgau.attention(q[:1], k[:1], v[:1], cu_seqlens=x) for x in (offsets, offsets.clone()))
    assert torch.equal(a, b)


def test_what_a_row_that_sees_nothing_is_sent_does_not_matter(backend):
    """The gradient of logaddexp(-inf, -inf) is NaN, and arrives at the LSE of such a row."""
    leaves = [randn(i, 1, 2, m, 16).requires_grad_() for i, m in enumerate((50, 40, 40))]
    sinks = torch.full((2,), -math.inf).requires_grad_()
    out, lse = flashgau.attention(*leaves, causal=True, sinks=sinks, return_lse=True)
    dlse = torch.ones_like(lse)
    dlse[..., :10] = math.nan
    grads = torch.autograd.grad((out, lse), (*leaves, sinks), (torch.ones_like(out), dlse))
    assert all(torch.isfinite(g).all() for g in grads)


def test_bias_that_no_query_uses_does_not_matter(backend):
    leaves = [randn(i, 1, 2, 40, 16).requires_grad_() for i in range(3)]
    bias = randn(3, 2, 127)
    bias[:, :24] = bias[:, -24:] = math.nan
    bias.requires_grad_()
    out = flashgau.attention(*leaves, rel_bias=bias)
    grads = torch.autograd.grad(out.sum(), (*leaves, bias))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[-1][:, :24].any()


def test_windows_of_any_size(backend):
    q, k, v = (randn(i, 1, 1, 9, 4) for i in range(3))
    a = flashgau.attention(q, k, v, window=(2**70, 2**31))
    assert torch.equal(a, flashgau.attention(q, k, v, window=(9, 9)))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (2, 2, 0, 0)], ids=str)
def test_nothing_in_gives_nothing_out(backend, shape):
    b, h, m, n = shape
    call = Call("attention", (randn(0, b, h, m, 4), randn(1, b, h, n, 4), randn(2, b, h, n, 3)), {"return_lse": True})
    (out, lse), grads = gradients(call)
    assert out.shape == (b, h, m, 3)
    assert not out.any()
    assert lse.shape == (b, h, m)
    assert (lse == -math.inf).all()
    assert not any(g.any() for g in grads)


@given(data)
def test_the_result_is_laid_out_as_the_queries(backend, data):
    """Heads cut from one projection are joined again by a view; heads apart stay apart, without a copy."""
    q, *rest = (call := data.draw(attention_calls(backend))).args
    assume(q.numel() > 0)
    by_tokens = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert outputs(replace(call, args=(by_tokens, *rest))())[0].transpose(1, 2).is_contiguous()
    by_heads = q.contiguous()
    if not by_heads.transpose(1, 2).is_contiguous():
        assert outputs(replace(call, args=(by_heads, *rest))())[0].is_contiguous()

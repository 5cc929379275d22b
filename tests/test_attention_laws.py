"""`flashgau.attention` on every optimised backend, by its own laws."""

import math

import torch
from attention_inputs import bias_for, draw_dense, windows
from backends import backend_fixture
from checks import close, close_gradients, gradients, outputs, weighted
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, randn, seeds
from torch import Tensor

import flashgau

backend = backend_fixture("attention")
data = st.data()


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

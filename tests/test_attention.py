"""`flashgau.attention` on every optimised backend: against the fp64 reference, dropout, cost and sizes."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from backends import DTYPES, backend_fixture, backends_of, largest_storages, needs, small_blocks
from checks import (
    check_agrees,
    check_backward_repeats,
    check_leaves_inputs_alone,
    check_repeats_bitwise,
    check_second_derivative,
    check_some_gradients,
    close,
    gradients,
    outputs,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Call, attention_calls, randn, seeds
from torch import Tensor

import flashgau
from flashgau.eager import attention as eager_attention
from flashgau.eager.sizes import SIZES

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


def test_a_gate_multiplies_and_padding_of_it_is_nothing(backend):
    """Queries that are padding give 0, whatever their gates are, and no gradient."""
    q, k, v, gate = (randn(i, 2, h, 6, w) for i, (h, w) in enumerate(((4, 8), (2, 8), (2, 5), (4, 5))))
    lengths = torch.tensor([6, 2])
    plain = flashgau.attention(q, k, v, causal=True, lengths=lengths, backend=backend)
    spoilt = gate.clone()
    spoilt[1, :, 2:] = torch.nan
    spoilt.requires_grad_()
    out = flashgau.attention(q, k, v, causal=True, lengths=lengths, gate=spoilt, backend=backend)
    close(out, plain * torch.where(gate.isfinite(), gate, 0).sigmoid())
    assert (out[1, :, 2:] == 0).all()
    (dgate,) = torch.autograd.grad(out.square().sum(), spoilt)
    assert (dgate[1, :, 2:] == 0).all()
    close(dgate[0], (2 * plain**2 * gate.sigmoid() ** 2 * (1 - gate.sigmoid()))[0])


def test_a_gate_per_head_is_one_for_every_column(backend):
    q, k, v, gate = (randn(i, 2, 3, 7, w) for i, w in enumerate((8, 8, 5, 1)))
    found = []
    for wide in (gate, gate.expand(-1, -1, -1, 5)):
        leaf = gate.clone().requires_grad_()
        given = leaf if wide is gate else leaf.expand(wide.shape)
        out = flashgau.attention(q, k, v, gate=given, gate_activation="silu", backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for a, b in zip(*found, strict=True):
        close(a, b)


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
def test_second_derivatives(backend, options):
    q, k, v = (randn(i, 1, 2, 7, 4) for i in range(3))
    check_second_derivative(Call("attention", (q, k, v), options))


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


# ---------------------------------------------------------------- long sums in half precision


HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["as fp32", "as halves"])
def products(request, monkeypatch):
    """The eager floor on a processor that multiplies halves slower than fp32, and on one that does it faster."""
    faster = request.param == "as halves"
    monkeypatch.setattr(eager_attention, "factor_dtype", lambda x: x.dtype if faster else torch.float32)
    monkeypatch.setattr(SIZES, "attention_tile", 256)
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

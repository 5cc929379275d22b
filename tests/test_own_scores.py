"""Own scores in attention's kernels: every function, mask and layout against the naive formula in fp64."""

from __future__ import annotations

from functools import partial

import kernel_calls
import pytest
import torch
from backends import dtypes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import randn, seeds

import flashgau
from flashgau import testing

pytest.importorskip("triton")
from flashgau.kernels import own_scores
from flashgau.kernels.attention import attention_forward, attention_with
from flashgau.kernels.common import Config, Sizes
from flashgau.kernels.own_scores import check_slopes
from own_functions import AUX, OWN, bent, bent_slope, naive, sigmoid, sigmoid_slope, sigmoid_wrong_slope

pytestmark = kernel_calls.pytestmark
FEW = settings(max_examples=max(2, settings.default.max_examples // 12))  # interpreted: as conftest has it
SMALL = Config(16, 16)


def hold(name, q, k, v, **options):
    """Results and every gradient are as near to fp64 as plain PyTorch's."""
    torch.manual_seed(q.numel() + k.numel())  # of compare's weights: a failing example must repeat
    fn = partial(attention_with, **OWN[name].keywords, config=SMALL)
    testing.assert_close(fn, partial(naive, own=OWN[name]), q, k, v, **options)


def draw_tensors(data, *, batch=(1, 2), m=(0, 1, 17, 33), n=(0, 1, 16, 40, 70), equal=False):
    dtype = data.draw(st.sampled_from(dtypes_of("triton")))
    b, rows = data.draw(st.sampled_from(batch)), data.draw(st.sampled_from(m))
    keys = rows if equal else data.draw(st.sampled_from(n))
    heads_k, group = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 1)]))
    width, value_width = data.draw(st.sampled_from([(8, 8), (5, 17), (16, 3)]))
    seed = data.draw(seeds)
    q = randn(seed, b, heads_k * group, rows, width, dtype=dtype)
    return (
        q,
        randn(seed + 1, b, heads_k, keys, width, dtype=dtype),
        randn(seed + 2, b, heads_k, keys, value_width, dtype=dtype),
    )


def draw_options(data, name, q, k):
    side = st.sampled_from([None, 0, 3, 20])
    options = {"causal": data.draw(st.booleans()), "window": data.draw(st.tuples(side, side))}
    if data.draw(st.booleans()):
        options["softcap"] = 2.5
    if data.draw(st.booleans()):
        options["scale"] = 0.3
    if data.draw(st.booleans()):
        longest = max(q.shape[2], k.shape[2], 1)
        options["rel_bias"] = randn(data.draw(seeds), q.shape[1], 2 * longest - 1, dtype=q.dtype)
    if OWN[name].weight is None and data.draw(st.booleans()):
        options["sinks"] = randn(data.draw(seeds), q.shape[1], dtype=q.dtype)
    return options


@pytest.mark.parametrize("name", OWN)
@FEW
@given(st.data())
def test_dense(name, data):
    q, k, v = draw_tensors(data)
    hold(name, q, k, v, **draw_options(data, name, q, k))


@pytest.mark.parametrize("name", OWN)
@FEW
@given(st.data())
def test_padded(name, data):
    q, k, v = draw_tensors(data, m=(17, 40), equal=data.draw(st.booleans()))
    options = draw_options(data, name, q, k)
    lengths = data.draw(testing.lengths(q.shape[0], k.shape[2]))
    hold(name, q, k, v, lengths=lengths, **options)


@pytest.mark.parametrize("name", OWN)
@FEW
@given(st.data())
def test_packed(name, data):
    twice = data.draw(st.booleans())
    q, k, v = draw_tensors(data, batch=(1,), m=(17, 40), equal=not twice)
    options = draw_options(data, name, q, k)
    options["cu_seqlens"] = data.draw(testing.packings(q.shape[2]))
    if twice:
        parts = len(options["cu_seqlens"]) - 1
        options["cu_seqlens_k"] = data.draw(testing.packings(k.shape[2], parts)).to(options["cu_seqlens"].dtype)
    hold(name, q, k, v, **options)


@pytest.mark.parametrize("name", OWN)
def test_split_keys(name):
    """One row and many keys: several programs share them, and what they give is put together as the weight wants."""
    q, k, v = randn(0, 1, 4, 1, 8), randn(1, 1, 2, 150, 8), randn(2, 1, 2, 150, 5)
    hold(name, q, k, v, causal=True)
    hold(name, q, k, v, window=(70, None))
    whole = attention_with(q, k, v, **OWN[name].keywords, config=Config(16, 256))
    split = attention_with(q, k, v, **OWN[name].keywords, config=SMALL)
    assert torch.allclose(split, whole, atol=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_what_padding_holds_does_not_matter(name):
    lengths = torch.tensor([0, 11, 30])
    tensors = [randn(i, 3, 2, 30, 8) for i in range(3)]
    padding = torch.arange(30)[None, :] >= lengths[:, None]
    found = []
    for content in (0.0, float("nan"), float("inf")):
        leaves = [x.masked_fill(padding[:, None, :, None], content).requires_grad_() for x in tensors]
        out = attention_with(*leaves, **OWN[name].keywords, lengths=lengths, config=SMALL)
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
        assert all((x.masked_select(padding[:, None, :, None]) == 0).all() for x in found[-1])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_without_functions_it_is_attention():
    q, k, v = (randn(i, 1, 2, 20, 8) for i in range(3))
    expected, _ = attention_forward(q, k, v, causal=True, config=SMALL)
    assert torch.equal(attention_with(q, k, v, causal=True, config=SMALL), expected)


def test_sigmoid_is_softmax_over_a_key_and_nothing():
    """With one key in sight and a sink of 0, softmax is sigmoid."""
    q, k, v = (randn(i, 1, 2, 20, 8) for i in range(3))
    one = flashgau.attention(q, k, v, window=(0, 0), sinks=torch.zeros(2))
    own = attention_with(q, k, v, window=(0, 0), weight_mod=sigmoid)
    assert torch.allclose(one, own, atol=1e-6)


def test_documents_are_packing():
    q, k, v = (randn(i, 1, 2, 60, 8) for i in range(3))
    ends = torch.tensor([0, 23, 46, 60])
    packed = flashgau.attention(q, k, v, cu_seqlens=ends, causal=True)
    assert torch.allclose(attention_with(q, k, v, **OWN["documents"].keywords, causal=True), packed, atol=1e-5)


def test_any_strides_and_a_backward_that_repeats():
    q, k, v = (randn(i, 2, 20, 2, 8).transpose(1, 2).requires_grad_() for i in range(3))
    runs = [
        torch.autograd.grad(attention_with(q, k, v, **OWN["bent sigmoid"].keywords, config=SMALL).sum(), (q, k, v))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    plain = attention_with(*(x.contiguous() for x in (q, k, v)), **OWN["bent sigmoid"].keywords, config=SMALL)
    assert torch.equal(plain, attention_with(q, k, v, **OWN["bent sigmoid"].keywords, config=SMALL))


def test_a_wrong_slope_is_found():
    q, k, v = (randn(i, 1, 2, 20, 8) for i in range(3))
    fn = partial(attention_with, weight_mod=sigmoid, weight_slope=sigmoid_wrong_slope)
    report = flashgau.compare(fn, q, k, v, reference=partial(naive, own=OWN["sigmoid"]))
    assert {row.name for row in report.rows if not row.ok} == {"dq", "dk"}
    with pytest.raises(AssertionError, match=r"`weight_slope` is .* at b_s = .*; differences give"):
        check_slopes(weight_mod=sigmoid, weight_slope=sigmoid_wrong_slope)
    with pytest.raises(AssertionError, match=r"`score_slope` is .*, query \d+, key \d+, head \d"):
        check_slopes(score_mod=bent, score_slope=bent, aux=AUX)


@pytest.mark.parametrize("name", OWN)
def test_right_slopes_pass(name):
    check_slopes(**OWN[name].keywords, n_keys=160, n_heads=4)


def test_what_does_not_belong_together_is_refused(monkeypatch):
    q, k, v = (randn(i, 1, 2, 5, 8).requires_grad_() for i in range(3))
    both = {"score_mod": bent, "score_slope": bent_slope}
    plain = lambda b_s: b_s
    for error, message, options in (
        (TypeError, "`weight_mod` is a function; expected a function under @triton.jit", {"weight_mod": plain}),
        (ValueError, "`weight_mod` was given without `weight_slope`, and an argument", {"weight_mod": sigmoid}),
        (ValueError, "`score_slope` was given without `score_mod`", {"score_slope": bent_slope}),
        (TypeError, "`aux` has dtype torch.float16; expected a contiguous float32", {**both, "aux": AUX.half()}),
        (TypeError, "`aux` is a float; expected", {**both, "aux": 1.0}),
        (ValueError, r"`aux` has strides \(2,\)", {**both, "aux": AUX[::2]}),
        (ValueError, "`aux` requires a gradient, which is not computed", {**both, "aux": AUX.clone().requires_grad_()}),
        (ValueError, "`aux` was given without `score_mod`", {"aux": AUX}),
        (ValueError, "`aux` is on meta; expected cpu", {**both, "aux": AUX.to("meta")}),
        (ValueError, "`sinks` was given with `weight_mod`",
         {"weight_mod": sigmoid, "weight_slope": sigmoid_slope, "sinks": torch.zeros(2)}),
        (ValueError, r"`sinks` has shape \(3,\)", {"sinks": torch.zeros(3)}),
        (ValueError, r"`rel_bias` has shape \(2, 5\)", {"rel_bias": torch.zeros(2, 5)}),
        (ValueError, r"`lengths` has shape \(2,\)", {"lengths": torch.tensor([1, 2])}),
        (ValueError, "`cu_seqlens_k` was given without", {"cu_seqlens_k": torch.tensor([0, 5])}),
    ):  # fmt: skip
        with pytest.raises(error, match="attention_with: " + message):
            attention_with(q, k, v, **options)
    with torch.no_grad():
        attention_with(q, k, v, weight_mod=sigmoid)
    for error, message, tensors in (
        (ValueError, "`k` and `v` have shapes", (q, k[:, :, :3], v)),
        (ValueError, "`q` has 2 heads; expected a multiple of the 0", (q, k[:, :0], v[:, :0])),
        (ValueError, r"`v` has shape \(5, 8\)", (q, k, v[0, 0])),
        (TypeError, "`v` has dtype torch.float64", (q, k, v.double())),
        (
            ValueError,
            "widths 300 and 8",
            (torch.zeros(1, 1, 1, 300), torch.zeros(1, 1, 1, 300), torch.zeros(1, 1, 1, 8)),
        ),
    ):
        with pytest.raises(error, match="attention_with: .*" + message):
            attention_with(*tensors)
    if not torch.cuda.is_available():
        monkeypatch.setattr(own_scores, "mend", lambda: False)
        with pytest.raises(RuntimeError, match=r"interpreter.*multiplies bf16 wrongly"):
            attention_with(*(x.bfloat16() for x in (q, k, v)))


def test_a_second_derivative_is_refused():
    q, k, v = (randn(i, 1, 1, 5, 8).requires_grad_() for i in range(3))
    out = attention_with(q, k, v, **OWN["sigmoid"].keywords)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_with: it is differentiated twice"):
        grad.sum().backward()


PROGRAM = """
import torch, triton, triton.language as tl
from flashgau.kernels.attention import attention_with
from flashgau.kernels.common import Config, Sizes
from flashgau.tuning.ahead import compiling_for

@triton.jit
def sigmoid(b_s):
    return tl.sigmoid(b_s)

@triton.jit
def slope(b_s):
    return tl.sigmoid(b_s) * (1 - tl.sigmoid(b_s))

@triton.jit
def bent(b_s, o_query, o_key, i_head, aux):
    return b_s * tl.load(aux + i_head) + o_key - o_query

@triton.jit
def bent_slope(b_s, o_query, o_key, i_head, aux):
    return tl.load(aux + i_head)

first = repr(Sizes(WEIGHT_MOD=sigmoid))

@triton.jit
def sigmoid(b_s):
    return tl.sigmoid(b_s) + 1

assert repr(Sizes(WEIGHT_MOD=sigmoid)) != first, "a changed function is compiled anew"
q = torch.empty(1, 4, 1024, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
own = {"weight_mod": sigmoid, "weight_slope": slope, "score_mod": bent, "score_slope": bent_slope}
with compiling_for("sm_80") as compiled:
    out = attention_with(q, q, q, **own, aux=torch.empty(4, device="meta"), config=Config(32, 32, 4, 2))
    out.backward(torch.empty_like(out))
print(*(c.kernel for c in compiled), sum(c.spills for c in compiled), all(c.matrix for c in compiled))
"""


def test_kernels_with_functions_compile(tmp_path):
    printed = kernel_calls.compiled(PROGRAM, tmp_path / "program.py")
    assert printed == "forward_kernel dq_kernel dkv_kernel 0 True\n"


def test_functions_are_among_the_sizes_a_kernel_may_lack():
    sizes = Sizes(D=8, WEIGHT_MOD=sigmoid)
    assert sizes.WEIGHT_MOD.value is sigmoid
    assert sizes.SCORE_MOD is sizes.SCORE_SLOPE is sizes.WEIGHT_SLOPE is None
    assert repr(sizes).startswith("Sizes(D=8, WEIGHT_MOD=sigmoid:")
    assert sizes != Sizes(D=8, WEIGHT_MOD=sigmoid_slope)

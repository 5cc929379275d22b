"""Own scores in GAU's kernels: every function, mask and layout against the naive formula in fp64."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

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
from flashgau.kernels import gau
from flashgau.kernels.common import Config
from flashgau.kernels.gau import gau_with
from own_functions import AUX, OWN, bent, bent_slope, sigmoid, sigmoid_slope, sigmoid_wrong_slope

pytestmark = kernel_calls.pytestmark
FEW = settings(max_examples=max(2, settings.default.max_examples // 12))  # interpreted: as conftest has it
SMALL = Config(16, 16, block_k=16)
BENT = {"score_mod": bent, "score_slope": bent_slope, "aux": AUX}
CASES = {
    "sigmoid": ("sigmoid", None),
    "relu2 of one's own": ("relu2", None),
    "bent sigmoid": ("bent sigmoid", None),
    "documents, relu2": ("documents, relu2", None),
    "bent softmax": ("bent softmax", "softmax"),
    "bent laplace": ("bent softmax", "laplace"),
}


def naive(q, k, v, gate=None, *, own, score, normalizer="keys", causal=False, rel_bias=None, lengths=None,
          cu_seqlens=None):  # fmt: skip
    """The formula of `gau_with`, sequence by sequence."""
    (b, m, s), n = q.shape, k.shape[1]

    def sequence(row, rows, keys):
        qs, ks, vs = q[row, rows], k[row, keys], v[row, keys]
        j = torch.arange(len(ks))[None, :]
        i = torch.arange(len(qs))[:, None] + len(ks) - len(qs)
        seen = (j <= i) if causal else torch.ones_like(j + i, dtype=torch.bool)
        divisor = {"keys": len(ks), "row": seen.sum(-1, keepdim=True)}.get(normalizer, normalizer)
        divisor = torch.as_tensor(divisor).clamp(min=1e-9 if not isinstance(normalizer, str) else 1)
        x = qs @ ks.mT * (s**-0.5 if score == "softmax" else 1) / (1 if score == "softmax" else divisor.to(q.dtype))
        if own.score is not None:
            x = own.score(x, i, j, torch.zeros(1, 1, dtype=torch.long))
        if rel_bias is not None:
            table = rel_bias if rel_bias.dim() == 1 else rel_bias[row]
            x = x + table.to(x.dtype)[table.shape[-1] // 2 + j - i]
        seen = seen & torch.isfinite(x)
        if own.weight is not None:
            return torch.where(seen, own.weight(torch.where(seen, x, 0)), 0) @ vs
        if score == "laplace":
            a = torch.erf((torch.where(seen, x, 0) - 0.5**0.5) * (2 * torch.pi) ** 0.5) / 2 + 0.5
            return torch.where(seen, a, 0) @ vs
        x = torch.where(seen, x, -torch.inf)
        alive = seen.any(-1, keepdim=True)
        return torch.where(alive, torch.softmax(torch.where(alive, x, 0), -1), 0) @ vs

    if cu_seqlens is not None:
        out = torch.cat([sequence(0, slice(*ends), slice(*ends)) for ends in pairwise(cu_seqlens.tolist())])[None]
    else:
        parts = []
        for row in range(b):
            stop = n if lengths is None else int(lengths[row])
            rows = stop if m == n else m
            part = sequence(row, slice(0, rows), slice(0, stop))
            parts.append(torch.nn.functional.pad(part, (0, 0, 0, m - rows)))
        out = torch.stack(parts)
    return out if gate is None else out * gate


def hold(name, *tensors, **options):
    """Results and every gradient are as near to fp64 as plain PyTorch's."""
    torch.manual_seed(tensors[0].numel())  # of compare's weights: a failing example must repeat
    own, score = OWN[CASES[name][0]], CASES[name][1]
    fn = partial(gau_with, **own.keywords, score=score, config=SMALL)
    testing.assert_close(fn, partial(naive, own=own, score=score), *tensors, **options)


def draw_tensors(data, *, batch=(1, 2), m=(1, 17, 33), n=(1, 16, 40), equal=False):
    dtype = data.draw(st.sampled_from(dtypes_of("triton")))
    b, rows, seed = data.draw(st.sampled_from(batch)), data.draw(st.sampled_from(m)), data.draw(seeds)
    keys = rows if equal else data.draw(st.sampled_from(n))
    width, value_width = data.draw(st.sampled_from([(8, 24), (5, 17)]))
    shapes = [(b, rows, width), (b, keys, width), (b, keys, value_width)]
    if data.draw(st.booleans()):
        shapes.append((b, rows, value_width))
    return [randn(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def draw_options(data, name, tensors, longest=None):
    options = {"causal": data.draw(st.booleans())}
    if CASES[name][1] != "softmax":
        options["normalizer"] = data.draw(st.sampled_from(["keys", "row", 3.0]))
    if data.draw(st.booleans()):
        longest = longest or max(tensors[0].shape[1], tensors[1].shape[1])
        options["rel_bias"] = randn(data.draw(seeds), 2 * longest - 1, dtype=tensors[0].dtype)
    return options


@pytest.mark.parametrize("panels", [False, True], ids=["fused", "panels"])
@pytest.mark.parametrize("name", CASES)
@FEW
@given(st.data())
def test_dense(name, panels, data):
    tensors = draw_tensors(data)
    width = gau._FUSED_WIDTH
    gau._FUSED_WIDTH = 0 if panels else width
    try:
        hold(name, *tensors, **draw_options(data, name, tensors))
    finally:
        gau._FUSED_WIDTH = width


@pytest.mark.parametrize("name", CASES)
@FEW
@given(st.data())
def test_padded(name, data):
    tensors = draw_tensors(data, m=(17, 40), equal=data.draw(st.booleans()))
    options = draw_options(data, name, tensors)
    hold(name, *tensors, lengths=data.draw(testing.lengths(tensors[0].shape[0], tensors[1].shape[1])), **options)


@pytest.mark.parametrize("name", CASES)
@FEW
@given(st.data())
def test_packed(name, data):
    tensors = draw_tensors(data, batch=(1,), m=(17, 40), equal=True)
    options = draw_options(data, name, tensors)
    hold(name, *tensors, cu_seqlens=data.draw(testing.packings(tensors[0].shape[1])), **options)


@pytest.mark.parametrize("name", CASES)
def test_what_padding_holds_does_not_matter(name):
    own, score = OWN[CASES[name][0]], CASES[name][1]
    lengths = torch.tensor([0, 11, 30])
    tensors = [randn(i, 3, 30, width) for i, width in enumerate((8, 8, 20, 20))]
    padding = torch.arange(30)[None, :, None] >= lengths[:, None, None]
    found = []
    for content in (0.0, float("nan"), float("inf")):
        leaves = [x.masked_fill(padding, content).requires_grad_() for x in tensors]
        out = gau_with(*leaves, **own.keywords, score=score, lengths=lengths, config=SMALL)
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
        assert all((x.masked_select(padding) == 0).all() for x in found[-1])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("score", ["relu2", "laplace", "softmax", "softmax_plus"])
def test_without_functions_it_is_gau_attention(score):
    q, k, v, gate = (randn(i, 1, 20, width) for i, width in enumerate((8, 8, 24, 24)))
    expected = flashgau.gau_attention(q, k, v, gate, score=score, causal=True, backend="triton")
    assert torch.equal(gau_with(q, k, v, gate, score=score, causal=True), expected)


def test_a_wrong_slope_is_found():
    q, k, v, gate = (randn(i, 1, 20, width) for i, width in enumerate((8, 8, 24, 24)))
    fn = partial(gau_with, weight_mod=sigmoid, weight_slope=sigmoid_wrong_slope)
    report = flashgau.compare(fn, q, k, v, gate, reference=partial(naive, own=OWN["sigmoid"], score=None))
    assert {row.name for row in report.rows if not row.ok} == {"dq", "dk"}


def test_what_does_not_belong_together_is_refused():
    q, k, v = (randn(i, 1, 5, width).requires_grad_() for i, width in enumerate((8, 8, 24)))
    own = {"weight_mod": sigmoid, "weight_slope": sigmoid_slope}
    for error, message, options in (
        (TypeError, "`weight_mod` is a function; expected a function under @triton.jit", {"weight_mod": lambda s: s}),
        (ValueError, "`weight_mod` was given without `weight_slope`", {"weight_mod": sigmoid}),
        (ValueError, "`score` is 'relu2' with `weight_mod`", {**own, "score": "relu2"}),
        (ValueError, "`score` is 'sigmoid'; expected one of relu2", {"score": "sigmoid"}),
        (ValueError, "`normalizer` is 'rows'", {"normalizer": "rows"}),
        (ValueError, "`normalizer` is -1", {"normalizer": -1}),
        (ValueError, "`normalizer` is None", {"normalizer": None}),
        (ValueError, "`normalizer` is 'row' with a softmax", {"normalizer": "row", "score": "softmax"}),
        (TypeError, "`rel_bias` is a float", {"rel_bias": 1.0}),
        (TypeError, "`rel_bias` has dtype torch.float16", {"rel_bias": torch.zeros(9).half()}),
        (TypeError, "`gate` is a str", {"gate": "gate"}),
        (ValueError, r"`rel_bias` has shape \(2, 9\)", {"rel_bias": torch.zeros(2, 9)}),
        (ValueError, r"`gate` has shape \(1, 5, 3\)", {"gate": torch.zeros(1, 5, 3)}),
        (ValueError, r"`lengths` has shape \(2,\)", {"lengths": torch.tensor([1, 2])}),
        (ValueError, "`aux` was given without `score_mod`", {**own, "aux": AUX}),
    ):
        with pytest.raises(error, match="gau_with: " + message):
            gau_with(q, k, v, **options)
    for error, message, tensors in (
        (ValueError, r"`v` has shape \(5, 24\); expected three axes", (q, k, v[0])),
        (TypeError, "`v` has dtype torch.float64", (q, k, v.double())),
        (ValueError, "`k` and `v` have shapes", (q, k[:, :3], v)),
    ):
        with pytest.raises(error, match="gau_with: .*" + message):
            gau_with(*tensors)


@pytest.mark.parametrize("place", [0, 3, 4])
def test_a_second_derivative_is_refused_by_whatever_argument(place):
    tensors = [randn(i, 1, 5, width) for i, width in enumerate((8, 8, 24, 24))] + [randn(9, 9)]
    tensors[place].requires_grad_()
    *operands, rel_bias = tensors
    out = gau_with(*operands, rel_bias=rel_bias, weight_mod=sigmoid, weight_slope=sigmoid_slope)
    (grad,) = torch.autograd.grad(out.sum(), tensors[place], create_graph=True)
    with pytest.raises(RuntimeError, match="gau_with: it is differentiated twice"):
        grad.sum().backward()


PROGRAM = """
import torch, triton, triton.language as tl
from flashgau.kernels.common import Config
from flashgau.kernels.gau import gau_with
from flashgau.tuning.ahead import compiling_for

@triton.jit
def sigmoid(b_s):
    return tl.sigmoid(b_s)

@triton.jit
def slope(b_s):
    return tl.sigmoid(b_s) * (1 - tl.sigmoid(b_s))

q = torch.empty(1, 1024, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
v = torch.empty(1, 1024, 1024, dtype=torch.bfloat16, device="meta", requires_grad=True)
with compiling_for("sm_80") as compiled:
    config = Config(32, 32, 4, 1, block_k=32)
    out = gau_with(q, q, v, v, weight_mod=sigmoid, weight_slope=slope, causal=True, config=config)
    out.backward(torch.empty_like(out))
print(*(c.kernel for c in compiled))
"""


def test_kernels_with_functions_compile(tmp_path):
    printed = kernel_calls.compiled(PROGRAM, tmp_path / "program.py")
    expected = "probs_kernel product_kernel prologue_kernel gradient_kernel dkv_kernel dq_kernel\n"
    assert printed == expected

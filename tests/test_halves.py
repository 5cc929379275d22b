"""Half precision on a CPU: by instructions of its own or through fp32, whatever this processor has."""

import copy

import pytest
import torch
from backends import backend_fixture
from checks import check_agrees
from hypothesis import given
from hypothesis import strategies as st
from strategies import attention_calls, gau_calls, glu_calls, glu_linear_calls, mixed_chunk_calls, randn

import flashgau
from flashgau import nn
from flashgau.eager import common
from flashgau.eager.sizes import SIZES
from flashgau.nn.initialise import embedding
from flashgau.nn.norms import LayerNorm, RMSNorm, ScaleNorm
from flashgau.nn.offset_scale import OffsetScale
from flashgau.nn.sinusoidal import ScaledSinusoidal

CALLS = {
    "attention": attention_calls,
    "glu": glu_calls,
    "glu_linear": glu_linear_calls,
    "gau_attention": gau_calls,
    "mixed_chunk_attention": mixed_chunk_calls,
}
data = st.data()
backend = backend_fixture("attention")


@pytest.fixture(params=[True, False], ids=["native", "through fp32"])
def native(request, monkeypatch):
    halves = common.HALVES if request.param else frozenset()
    monkeypatch.setattr(common, "native_halves", lambda device: halves)
    monkeypatch.setattr(SIZES, "attention_short", 0)  # short rows, too, in the kernel's own blocks of halves
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", CALLS)
@given(data=data)
def test_both_ways_agree_with_the_reference(native, op, dtype, data):
    check_agrees(data.draw(CALLS[op](dtype=dtype)), "eager")


@pytest.mark.parametrize("op", ["gau_attention", "mixed_chunk_attention", "attention", "glu_linear"])
def test_many_tokens_are_summed_in_fp32(native, op):
    """Sums of thousands of equal terms: of halves they would stand still at 256 (bf16), far below what is right."""
    n = 4096
    ones = torch.ones(1, n, 8, dtype=torch.bfloat16)
    if op == "attention":
        args, options = [x[None] for x in (ones, ones[:, :4], ones[:, :4])], {"softcap": 1e3}
    elif op == "glu_linear":
        args, options = [ones, *randn(0, 2, 5, 8).to(torch.bfloat16)], {"activation": "relu"}
    else:
        heads = 2 if op == "gau_attention" else 4
        args, options = [ones] * (heads + 1), {"causal": True}
    args = [x.detach().clone().requires_grad_() for x in args]
    report = flashgau.compare(getattr(flashgau, op), *args, backend="eager", **options)
    assert report.ok, str(report)


def test_the_dtypes_of_products_follow_the_processor(monkeypatch):
    for halves in (frozenset(), frozenset({torch.bfloat16}), common.HALVES):
        monkeypatch.setattr(common, "native_halves", lambda device, halves=halves: halves)
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.ones(1, dtype=dtype)
            assert common.factor_dtype(x) == (dtype if dtype in halves else torch.float32)
        assert common.values_dtype(torch.ones(1, dtype=torch.float16)) == torch.float32
    for dtype in (torch.float32, torch.float64):
        assert common.factor_dtype(torch.ones(1, dtype=dtype)) == dtype


CPUS = {
    "neither": ({"avx512_f": True, "avx512_bf16": False}, []),
    "avx512_bf16": ({"avx512_bf16": True, "avx512_f": True}, [torch.bfloat16]),
    "tiles": ({"amx_tile": True, "l2_cache_size": 2**21}, [torch.bfloat16]),
    "both": ({"avx512_fp16": True, "amx_tile": True, "amx_fp16": False}, [torch.bfloat16, torch.float16]),
}


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("asked", ["PyTorch", "Linux"])
def test_the_processor_is_asked(monkeypatch, cpu, asked):
    answers, expected = CPUS[cpu]
    if asked == "PyTorch":
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: answers, raising=False)
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        flags = f"model name: a\nflags\t\t: fpu {' '.join(name for name, has in answers.items() if has is True)}\n"
        monkeypatch.setattr(common.Path, "read_text", lambda path, **options: flags)
    assert common.native_halves.__wrapped__("cpu") == frozenset(expected)
    assert common.native_halves.__wrapped__("cuda") == common.HALVES


def test_the_gradient_of_sinks_does_not_round_its_terms(backend):
    """It is a sum over all rows of terms of both signs: what each is rounded by, as rowsum(dO * O) is by O, stays."""
    q, k, v, dout = (randn(i, 2, 3, 70, 16, dtype=torch.float16) for i in range(4))
    dlse, sinks = randn(4, 2, 3, 70), randn(5, 3).requires_grad_()
    out, lse = flashgau.attention(q, k, v, sinks=sinks, causal=True, return_lse=True)
    (dsinks,) = torch.autograd.grad([out, lse], sinks, [dout, dlse])
    exact, lse = flashgau.reference.attention(*(x.double() for x in (q, k, v)), sinks=sinks.double(), causal=True,
                                              return_lse=True)  # fmt: skip
    terms = (sinks[:, None] - lse).exp() * (dlse - (dout * exact).sum(-1))
    allowed = 32 * torch.finfo(torch.float32).eps * terms.abs().sum((0, 2))
    assert ((dsinks - terms.sum((0, 2))).abs() <= allowed).all()


LAYERS = {
    "LayerNorm": lambda: LayerNorm(8),
    "RMSNorm": lambda: RMSNorm(8),
    "ScaleNorm": lambda: ScaleNorm(8),
    "OffsetScale": lambda: OffsetScale(8, 2),
    "embedding": lambda: embedding(2, 8),
    "positions": lambda: ScaledSinusoidal(8),
    "GAU": lambda: nn.GAU(8, key_dim=8, norm="layernorm"),
    "FLASH": lambda: nn.FLASH(8, key_dim=8, chunk_size=32, norm="layernorm"),
    "MultiHeadAttention": lambda: nn.MultiHeadAttention(8, 2),
    "MultiHeadMixedChunk": lambda: nn.MultiHeadMixedChunk(8, 2, chunk_size=32),
    "GatedFeedForward": lambda: nn.GatedFeedForward(8),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_parameters_get_gradients_of_many_tokens_summed_in_fp32(layer):
    """PyTorch's own CPU kernels of LayerNorm and of embeddings would sum those of halves in their type."""
    torch.manual_seed(0)
    n, half = 4096, LAYERS[layer]().to(torch.bfloat16)
    exact, x = copy.deepcopy(half).double(), (torch.ones(1, n, 8) + randn(0, 1, n, 8) / 8).to(torch.bfloat16)
    if layer == "embedding":
        x = torch.arange(n)[None] % 2
    if layer == "positions":
        x = torch.arange(n).expand(2, n)
    for model in (half, exact):
        given = x.double() if model is exact and x.is_floating_point() else x
        outs = model(given)
        sum((out.sum() for out in outs), torch.zeros((), dtype=outs[0].dtype)).backward()
    for (name, ours), theirs in zip(half.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        error = (ours.grad.double() - theirs.grad).abs().max()
        assert error <= 2**-6 * theirs.grad.abs().max(), name

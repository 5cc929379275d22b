"""bf16 in Triton's interpreter: to the bit what PyTorch computes, and what the compiled code does."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from bf16_steps import STEPS, steps_kernel
from strategies import randn
from test_ptx_numbers import nearest

pytest.importorskip("triton")
import triton
import triton.language as tl
from flashgau.kernels import interpreted
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles")
BF16 = torch.bfloat16


def bits(x):
    return x.view(torch.int16).numpy().view(np.uint16)


def test_every_bf16_is_widened_exactly():
    every = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(every.view(np.int16)).view(BF16).float().numpy()
    assert np.array_equal(interpreted.widened(every), expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(interpreted.rounded(expected)[numbers], every[numbers])
    assert (interpreted.rounded(expected)[~numbers] == 0x7FFF).all()


@given(st.lists(st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1).map(lambda x: x << 16 | 0x8000))))
def test_fp32_is_rounded_as_pytorch_rounds(values):
    x = np.array(values, np.uint32).view(np.float32)
    expected = torch.from_numpy(x.copy()).bfloat16()
    found = torch.from_numpy(interpreted.rounded(x).view(np.int16)).view(BF16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@given(st.integers(0, 2**16 - 1), st.integers(1, 2**40))
def test_fp64_is_rounded_once(b, below):
    """A number between two bf16, nearer to the middle than fp32 can tell."""
    if b % 2**15 >= 0x7F7F:  # the next one is infinite, or none
        return
    low, high = (interpreted.widened(np.array([x], np.uint16)).astype(np.float64) for x in (b, b + 1))
    middle = (low + high) / 2
    for towards, expected in ((low, b), (high, b + 1)):
        x = middle + (towards - middle) * 2.0**-40 * (below % 1024 + 1)
        assert interpreted.rounded(x)[0] == expected


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_pytorchs_to_the_bit(step):
    x, y = randn(0, 100, dtype=BF16), randn(1, 100, dtype=BF16)
    x[:3] = torch.tensor([1.5e-39, -0.0, 3e38])
    out = torch.zeros_like(x)
    steps_kernel[(1,)](x, y, out, 100, STEP=step, BLOCK=128)
    assert torch.equal(out, STEPS[step](x, y).to(BF16))


def test_views_keep_their_bits():
    x = randn(0, 128, dtype=BF16)
    out = torch.zeros_like(x)
    steps_kernel[(1,)](x, x, out, 128, STEP="turned", BLOCK=128)
    assert torch.equal(out, x.view(4, 32).T.reshape(-1))


@triton.jit
def product_kernel(a, b, out, K: tl.constexpr):
    o_m, o_k = tl.arange(0, 16), tl.arange(0, K)
    b_a = tl.load(a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.load(b + o_k[:, None] * 16 + o_m[None, :])
    tl.store(out + o_m[:, None] * 16 + o_m[None, :], tl.dot(b_a, b_b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_halves_are_summed_in_fp32(dtype):
    a, b, out = randn(0, 16, 512, dtype=dtype), randn(1, 512, 16, dtype=dtype), torch.zeros(16, 16)
    product_kernel[(1,)](a, b, out, K=512)
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((out - exact).abs() <= 512 * torch.finfo(torch.float32).eps * terms).all()


NAMES = [(name, method) for name, methods in interpreted._METHODS.items() for method in methods]


@pytest.mark.parametrize(("name", "method"), NAMES)
def test_a_version_that_calls_things_otherwise_is_left_alone(name, method, monkeypatch):
    from triton.runtime import interpreter

    whole = dict(vars(interpreter.InterpreterBuilder))
    whole.pop(method, None)
    monkeypatch.delattr(getattr(interpreter, name), method)
    assert interpreted._mend() is False
    left = dict(vars(interpreter.InterpreterBuilder))
    assert all(left[key] is value for key, value in whole.items())


@triton.jit
def fma_kernel(x, y, z, out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out + o, tl.fma(tl.load(x + o), tl.load(y + o), tl.load(z + o)))


@given(st.lists(st.tuples(*[st.integers(0, 2**16 - 1)] * 3), min_size=16, max_size=16))
def test_a_fused_product_is_rounded_once(triples):
    triples[0] = (0x3F88, 0x3F88, 0x1780)  # 1.0625^2 lies halfway between two bf16, and 2^-80 above it decides
    x, y, z = (torch.tensor(v, dtype=torch.int32).to(torch.int16).view(BF16) for v in zip(*triples, strict=True))
    out = torch.zeros_like(x)
    fma_kernel[(1,)](x, y, z, out, BLOCK=16)
    for a, b, c, found in zip(x.tolist(), y.tolist(), z.tolist(), out.tolist(), strict=True):
        if all(map(math.isfinite, (a, b, c))):
            assert found == nearest(Fraction(a) * Fraction(b) + Fraction(c), "bf16")

"""Unmodified kernels from outside of this package, and what goes wrong in some."""

import pytest
import torch
import triton
import triton.language as tl
from outside_kernels import add_kernel, mapped_kernel, matmul_kernel, softmax_kernel
from strategies import randn

from flashgau.ptx import Fault, executing

TARGETS = ["sm_80", "sm_90"]
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("target", TARGETS)
def test_addition(target):
    x, y, out = randn(0, 300), randn(1, 300), torch.zeros(300)
    with executing(target) as executed:
        add_kernel[(3,)](x, y, out, 300, BLOCK=128)
    assert torch.equal(out, x + y)
    assert executed.counts.read_bytes == 2 * 300 * 4
    assert executed.counts.written_bytes == 300 * 4


@pytest.mark.parametrize("target", TARGETS)
def test_softmax(target):
    x, out = randn(0, 5, 100), torch.zeros(5, 100)
    for seed in (None, 0):
        with executing(target, seed=seed):
            softmax_kernel[(5,)](x, out, 100, BLOCK=128)
        assert ((out - x.double().softmax(-1)).abs() <= 32 * EPS).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products(target, dtype):
    m, n, k = 70, 50, 40
    a, b, c = randn(0, m, k, dtype=dtype), randn(1, k, n, dtype=dtype), torch.zeros(m, n)
    with executing(target) as executed:
        matmul_kernel[lambda meta: (triton.cdiv(m, meta["BM"]), 1)](a, b, c, m, n, k, BM=64, BN=64, BK=32)
    unit = 2**-10 if dtype == torch.float32 else EPS  # such products are tf32's unless one asks for others
    assert ((c - a.double() @ b.double()).abs() <= k * unit * (a.double().abs() @ b.double().abs())).all()
    assert executed.launches[0].grid == (2, 1, 1)
    assert executed.counts.matrix_flops == 2 * 2 * 64 * 64 * 64  # blocks of 64 x 64, and k in steps of 32


def test_products_by_tensor_maps():
    m, n, k = 70, 56, 40
    a, b, c = (randn(i, *x, dtype=torch.bfloat16) for i, x in enumerate([(m, k), (k, n), (m, n)]))
    with executing("sm_90"):
        mapped_kernel[(2, 1)](a, b, c, m, n, k, BM=64, BN=64, BK=32)
    exact = a.double() @ b.double()
    assert ((c - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


@triton.jit
def unmasked_kernel(x, out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o), o < n)


@triton.jit
def sum_kernel(x, out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out, tl.load(out) + tl.sum(tl.load(x + o, o < n, 0.0), 0))


@triton.jit
def neighbour_kernel(x, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + (o + 1) % n, o < n)
    tl.store(x + o, b_x, o < n)


def test_faults_of_kernels_are_found_by_line():
    x, out = randn(0, 300), torch.zeros(300)
    for kernel, args, kind, line in (
        (unmasked_kernel, (x, out, 300), "outside", "tl.load(x + o)"),
        (sum_kernel, (x, out, 300), "two", "tl.load(out) + tl.sum"),
        (neighbour_kernel, (x.clone(), 300), "two blocks", "b_x"),
    ):
        with pytest.raises(Fault) as found, executing("sm_80"):
            kernel[(3,)](*args, BLOCK=128)
        fault = found.value
        assert fault.kind.startswith(kind)
        assert fault.kernel == kernel.__name__
        number = int(fault.source.split(":")[1])
        with open(__file__) as file:
            assert line in file.read().splitlines()[number - 1]


def test_nothing_is_launched_outside_of_the_block():
    x, y, out = randn(0, 300), randn(1, 300), torch.zeros(300)
    with executing("sm_80") as executed:
        add_kernel[(3,)](x, y, out, 300, BLOCK=128)
    assert len(executed.launches) == 1
    with pytest.raises(ValueError, match="`target` is 'gfx942'; expected an NVIDIA GPU"), executing("gfx942"):
        pass

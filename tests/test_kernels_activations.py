"""Activations and their slopes in the kernels of gated units, at all sizes of fp32 numbers, against fp64."""

from __future__ import annotations

import math

import kernel_calls
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from flashgau.kernels.glu import glu_backward, glu_forward

from flashgau.sass.model import MACHINES
from flashgau.tables.config import Config

pytestmark = kernel_calls.pytestmark

U = 2.0**-24  # half the distance from 1 to the next fp32 number
TINY = torch.finfo(torch.float32).tiny


def grid() -> Tensor:
    """Numbers of both signs: evenly spaced ones up to 16, and 64 of every power of two."""
    even = torch.arange(1, 2**16 + 1) / 2**12
    every = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)[:, None] * (1 + torch.arange(64) / 64)
    size = torch.cat([even, (even.double() + math.pi * 2**-14).float(), every.flatten().float(), torch.zeros(1)])
    return torch.cat([size, -size])


def computed(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x) as kernels compute them."""
    one, options = torch.ones_like(x), {"activation": activation, "up_activation": "identity"}
    config = Config(1, 8192, num_warps=4, num_stages=1)
    value, _ = glu_forward(x, one, **options, config=config)
    slope, _ = glu_backward(one, x, one, **options, config=config)
    return value.double(), slope.double()


def normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Phi(x) and phi(x)."""
    return torch.special.erfc(-x * 0.5**0.5) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def test_gelu_is_right_to_the_last_place_of_its_scale():
    """Left of 0 in absolute terms, and in relative ones as far as the square in the exponent is rounded."""
    x = grid()
    value, slope = computed(x, "gelu")
    x = x.double()
    phi, density = normal(x)
    left, right, true = x < 0, x > 0, x * phi
    error = (value - true).abs()
    assert error[left].max() <= 0.8 * U
    assert (error / ((4 + x * x) * true.abs() * U + TINY))[left].max() <= 1.25
    assert (error / (true * U + U))[right].max() <= 1.0
    near = (x.abs() < 1e-3) & (true.abs() > TINY)  # where Phi is a half
    assert ((value - true) / true)[near].abs().max() <= 2 * U
    assert (slope - (phi + x * density)).abs().max() <= 2 * U
    tail = x < -2  # left of where the slope's terms cancel
    true = (phi + x * density)[tail]
    assert ((slope[tail] - true) / ((4 + x[tail] ** 2) * true.abs() * U + TINY)).abs().max() <= 1.25


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_logistic_functions_keep_their_tails(activation):
    x = grid()
    value, slope = computed(x, activation)
    x = x.double()
    right, left = torch.sigmoid(x), torch.sigmoid(-x)
    rounding = (4 + x.abs()) * U  # of the exponent
    if activation == "sigmoid":
        true, derivative = right, right * left
        assert ((slope - derivative).abs() / (2 * rounding * derivative + TINY)).max() <= 1
    else:
        true, derivative = x * right, right * (1 + x * left)
        assert (slope - derivative).abs().max() <= 4 * U
    assert ((value - true).abs() / (rounding * true.abs() + TINY)).max() <= 1.25


def test_the_approximate_gelu_is_its_formula():
    x = grid()
    x = x[x.abs() < 1e6]  # whose cube is finite
    value, slope = computed(x, "gelu_tanh")
    leaf = x.double().requires_grad_()
    true = leaf * torch.sigmoid(math.sqrt(8 / math.pi) * (leaf + 0.044715 * leaf**3))
    (derivative,) = torch.autograd.grad(true.sum(), leaf)
    assert ((value - true).abs() / (U + U * true.abs())).max() <= 2
    assert (slope - derivative).abs().max() <= 6 * U


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh", "silu"])
def test_no_number_stays_none(activation):
    value, slope = computed(torch.tensor([math.nan, 1.0]), activation)
    assert value[0].isnan()
    assert value[1].isfinite()
    if activation in ("gelu", "sigmoid", "silu", "gelu_tanh"):
        assert slope[0].isnan()


def test_infinities_have_the_limits_of_gelu():
    value, slope = computed(torch.tensor([math.inf, -math.inf]), "gelu")
    assert value.tolist() == [math.inf, 0]
    assert slope.tolist() == [1, 0]


def test_arithmetic_of_gated_units_takes_half_the_time_of_their_memory():
    """A scheduler of an H100 issues one instruction of 32 threads per clock; 3.35 TB/s (data sheet) are 13.9 bytes per
    clock and multiprocessor, which has four schedulers."""
    printed = kernel_calls.compiled(
        """
import torch
from flashgau import tables
from flashgau.kernels import glu
from flashgau.sass.text import parse
from flashgau.tuning import compiler
from flashgau.tuning.ahead import target_of

def count(name, kernel):
    needs, config = compiler.needs(kernel()), tables.lookup("sm_90", "glu_forward", 2, 0)
    threads = 32 * config.num_warps
    paths = 2  # with a mask, and without, which has no more
    print(name, len(parse(needs.assembly)) / paths / (config.block_m * config.block_n / threads), needs.spills)

x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
with compiler.instead_of_launching("sm_90", target_of("sm_90"), count):
    for activation in ("silu", "gelu"):
        options = {"activation": activation, "up_activation": "identity", "config": tables.of_architecture("sm_90")}
        glu.glu_forward(x, x, **options)
        glu.glu_backward(x, x, x, **options)
"""
    )
    lines = [line.split() for line in printed.splitlines()]
    assert len(lines) == 4
    machine = MACHINES["sm_90"]
    per_clock = 3.35e12 / machine.sms / (machine.ghz * 1e9)
    for kernel, issued, spills in lines:
        tensors = {"glu_kernel": 3, "glu_backward_kernel": 5}[kernel]
        memory = tensors * 2 * 4 * 32 / per_clock  # of bf16, in the time in which each scheduler takes 32 elements
        assert float(issued) < 0.55 * memory, (kernel, issued, memory)
        assert spills == "0"

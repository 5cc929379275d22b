"""Values for the tests of the reference, and how its results are compared."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

INF = math.inf
SCORES = ["relu2", "laplace", "softmax", "softmax_plus"]

ACTIVATIONS = ["identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh", "silu"]
seeds = st.integers(0, 2**32)


def randoms(seed: int, *shapes: tuple[int, ...], grad: bool = False) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_(grad) for s in shapes]


def close(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def pad(x: Tensor, n: int, value: float, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = n - shape[dim]
    return torch.cat([x, x.new_full(shape, value)], dim)

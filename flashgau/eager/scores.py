"""Elementwise attention scores of the gated attention unit and their derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MU = math.sqrt(0.5)
_SIGMA = math.sqrt(0.25 / math.pi)


def score(kind: str, x: Tensor) -> Tensor:
    """relu2: max(x, 0)^2 (Hua et al. 2022); laplace: (1 + erf((x - mu) / (sigma sqrt 2))) / 2 (Ma et al. 2022)."""
    if kind == "relu2":
        return x.clamp_min(0).square_()  # relu would keep its result for autograd, and squaring in place spoil it
    return torch.special.erf((x - _MU).mul_(1 / (_SIGMA * math.sqrt(2)))).add_(1).mul_(0.5)


def score_slope(kind: str, x: Tensor) -> Tensor:
    """The derivative of `score` at x: 2 max(x, 0), or the normal density of mean mu and deviation sigma."""
    if kind == "relu2":
        return torch.relu(x).mul_(2)
    z = (x - _MU).div_(_SIGMA)
    return z.square_().mul_(-0.5).exp_().mul_(1 / (_SIGMA * math.sqrt(2 * math.pi)))

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
    z = (x - _MU).mul_(1 / (_SIGMA * math.sqrt(2)))
    if z.dtype == torch.float64:  # 1 + erf would cancel for small scores, which only fp64 is asked to keep
        return torch.special.erfc(z.neg_()).mul_(0.5)
    return torch.special.erf(z).add_(1).mul_(0.5)


def score_slope(kind: str, x: Tensor) -> Tensor:
    """The derivative of `score` at x: 2 max(x, 0), or the normal density of mean mu and deviation sigma."""
    if kind == "relu2":
        return torch.relu(x).mul_(2)
    # 1 / (2 sigma^2) = 2 pi, and the density's factor 1 / (sigma sqrt(2 pi)) = sqrt 2.
    return (x - _MU).square_().mul_(-2 * math.pi).exp_().mul_(math.sqrt(2))


def score_bend(kind: str, x: Tensor) -> Tensor:
    """The derivative of `score_slope` at x; 0 where x is -inf."""
    if kind == "relu2":
        return (x > 0).to(x.dtype).mul_(2)
    return score_slope(kind, x).mul_((x - _MU).clamp_min(-1e4)).mul_(-4 * math.pi)

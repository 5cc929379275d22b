"""Normalisations of rows, differentiated by PyTorch: LayerNorm and RMSNorm are its own, ScaleNorm a formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulator


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, clamp: bool) -> Tensor:
    """Rows of x (..., d) over their deviation, times `weight` (d,) or (1,), plus `bias` (d,), in x's type."""
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if not clamp and (weight is None or weight.shape[0] == x.shape[-1]):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = x.to(accumulator(x.dtype))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # of one pass, and no square of x in memory
    if clamp:
        inverse = length.mul(x.shape[-1] ** -0.5).clamp(min=eps).reciprocal()
    else:
        inverse = length.square().mul_(1 / x.shape[-1]).add_(eps).rsqrt()
    return (wide * (inverse if weight is None else inverse * weight)).to(x.dtype)

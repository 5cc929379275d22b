"""Normalisations of rows, differentiated by PyTorch: LayerNorm and RMSNorm are its own, ScaleNorm a formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import NormOptions
from .common import accumulator


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> Tensor:
    """Rows of x (..., d) over their deviation, times `weight` (d,) or (1,), plus `bias` (d,), in x's type."""
    kind, eps, clamp = options
    shape = x.shape[-1:]
    if kind == "layernorm":
        return F.layer_norm(x, shape, weight, bias, eps)
    if not clamp and (weight is None or weight.shape == shape):
        return F.rms_norm(x, shape, weight, eps)
    wide = x.to(accumulator(x.dtype))
    mean_square = wide.square().mean(-1, keepdim=True)
    if clamp:
        # The tiny term under the root only keeps the gradient of sqrt finite at a row of zeros.
        inverse = (mean_square + torch.finfo(wide.dtype).tiny).sqrt().clamp(min=eps).reciprocal()
    else:
        inverse = (mean_square + eps).rsqrt()
    return (wide * (inverse if weight is None else inverse * weight)).to(x.dtype)

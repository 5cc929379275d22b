"""Normalisations of rows, differentiated by PyTorch: LayerNorm and RMSNorm are its own, ScaleNorm a formula.

Of LayerNorm in half precision PyTorch's kernel sums the gradients of weight and bias in that type: of 16384 rows with
gradients about 1, bf16 loses nine tenths of the bias's. There the backward is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgau.options import NormOptions

from .common import accumulator
from .sizes import SIZES


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


def widened_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> Tensor:
    """`norm` in fp32, rounded to x's type: all its derivatives sum in fp32."""
    acc = accumulator(x.dtype)
    w, b = (None if t is None else t.to(acc) for t in (weight, bias))
    return norm(x.to(acc), w, b, *options).to(x.dtype)


def norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> Tensor:
    """LayerNorm, whose gradients `norm_backward` sums in fp32."""
    return norm(x, weight, bias, *options)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of LayerNorm's x, weight and bias; None where there is no such input."""
    width, acc = x.shape[-1:], accumulator(x.dtype)
    w, b = (None if t is None else t.to(acc) for t in (weight, bias))
    if w is None:
        w = x.new_ones(width, dtype=acc)  # fp32 parameters have PyTorch keep fp32 statistics
    _, mean, inverse = torch.native_layer_norm(x, width, w, b, options.eps)
    dx: Tensor = torch.ops.aten.native_layer_norm_backward(
        dy, x, width, mean, inverse, w, b, [True, False, False]
    )[0]  # fmt: skip
    dweight, dbias = torch.zeros_like(w), torch.zeros_like(w)
    rows = max(1, SIZES.glu_bytes // (4 * width.numel()))
    flat = (t.reshape(-1, t.shape[-1]).split(rows) for t in (dy, x, mean, inverse))
    for part, part_x, part_mean, part_inverse in zip(*flat, strict=True):
        wide = part.to(acc)
        dbias += wide.sum(0)
        dweight += part_x.to(acc).sub(part_mean).mul_(part_inverse).mul_(wide).sum(0)
    dw, db = (None if t is None else d.to(t.dtype) for t, d in ((weight, dweight), (bias, dbias)))
    return dx, dw, db

"""The normalisations of layers. For `flashgau.nn`; not public."""

from __future__ import annotations

from torch import Tensor

from flashgau.contract.validate import Arguments
from flashgau.eager import norms as eager
from flashgau.eager.common import HALVES
from flashgau.options import NormOptions
from flashgau.reference import norm as naive

from .. import pytorch
from . import autograd, dispatch
from .operation import Operation


def norm(
    caller: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, clamp: bool = False
) -> Tensor:
    """Rows of x (..., d) over their deviation, times `weight` (d,) or (1,), plus `bias` (d,), in x's type.

    Statistics are fp32 (fp64 for fp64); `kind`, `eps` and `clamp` are those of `NormOptions`. On a CPU, and for rows
    wider than 8192, it is PyTorch's own or a formula that PyTorch differentiates,
    but for LayerNorm's gradients in half precision. What is wrong is refused in the name
    of `caller`, a layer.
    """
    name = dispatch.resolve_inner("norm", x.device, x.dtype, x.shape[-1])
    # PyTorch's forward mode of layer_norm takes mean and deviation for constants where it is differentiated.
    if name == "reference" or (kind == "layernorm" and pytorch.in_forward_mode()):
        return naive(x, weight, bias, kind=kind, eps=eps, clamp=clamp)
    options = NormOptions(kind, eps, clamp)
    sums = kind == "layernorm" and x.dtype in HALVES and autograd.needs_grad(weight, bias)
    if name == "eager" and not sums:
        return eager.norm(x, weight, bias, *options)
    args = Arguments(caller)
    args.tensor("x", x, "... d")
    for what, w in (("weight", weight), ("bias", bias)):
        if w is not None:
            args.held(what, w)
    out: Tensor = _norm(x, weight, bias, options=options, backend=name)[0]
    return out


_norm = Operation(
    "norm",
    inputs="x weight? bias?",
    results="y",
    shapes=lambda x, **_: [x.new_empty(x.shape)],
    tuples={"options": NormOptions},
    op="norm",
    error="norm",
    others=lambda x, weight, bias, options, backend: [eager.widened_norm(x, weight, bias, options)],
)

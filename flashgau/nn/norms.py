"""Normalisations of a layer's input or output, by name: on a GPU one kernel each way, elsewhere PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.norms import norm

NORMS = ("layernorm", "scalenorm", "scalenorm_clamped", "rmsnorm", "rms", "none")


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis: (x - mean) / sqrt(variance + eps), times a weight, plus a bias.

    Statistics are fp32 (fp64 for fp64 input), the result has x's dtype. Source: Ba et al. 2016 (arXiv 1607.06450).

    Args:
        dim: width of the last axis.
        eps: what keeps the division finite.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> LayerNorm(2)(torch.tensor([1.0, 3.0])).round(decimals=3).tolist()
        [-1.0, 1.0]
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape and dtype."""
        _check("LayerNorm", x, self.normalized_shape[0])
        return norm("LayerNorm", x, self.weight, self.bias, "layernorm", self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last axis: x / sqrt(mean(x^2) + eps), times a weight.

    Statistics are fp32 (fp64 for fp64 input), the result has x's dtype. Source: Zhang and Sennrich 2019 (arXiv
    1910.07467).

    Args:
        dim: width of the last axis.
        eps: what keeps the division finite.
        elementwise_affine: whether there is a weight.
        device: where it lives.
        dtype: its type.

    Example:
        >>> import torch
        >>> RMSNorm(2)(torch.tensor([3.0, -3.0])).round(decimals=3).tolist()
        [1.0, -1.0]
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, elementwise_affine, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape and dtype."""
        _check("RMSNorm", x, self.normalized_shape[0])
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps  # PyTorch's, which ours never has
        return norm("RMSNorm", x, self.weight, None, "rms", eps)


class ScaleNorm(nn.Module):
    """g x / rms(x) with one learned scalar g: LayerNorm without mean, offset and per-channel scale.

    `rms(x) = sqrt(mean(x^2) + eps)` over the last axis; with `clamp=True` it is `max(sqrt(mean(x^2)), eps)`, as
    FLASH-pytorch has it. The mean is taken in fp32 (fp64 for fp64 input), the result has x's dtype.

    Source: Nguyen and Salazar 2019 (arXiv 1910.05895); as in the GAU paper (arXiv 2202.10447).

    Args:
        dim: width of the last axis (it sets nothing but the check of the input).
        eps: what keeps the division finite.
        clamp: bound rms(x) from below by eps, instead of adding eps under the root.
        device: where the parameter lives.
        dtype: its type.

    Example:
        >>> import torch
        >>> y = ScaleNorm(4)(torch.tensor([3.0, -3.0, 3.0, 3.0]))
        >>> [round(v, 3) for v in y.tolist()]
        [1.0, -1.0, 1.0, 1.0]
    """

    dim: int
    eps: float
    clamp: bool
    g: nn.Parameter

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        clamp: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.clamp = dim, eps, clamp
        self.g = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape and dtype."""
        _check("ScaleNorm", x, self.dim)
        return norm("ScaleNorm", x, self.g, None, "rms", self.eps, self.clamp)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.dim}, eps={self.eps}, clamp={self.clamp}"


def _check(layer: str, x: Tensor, dim: int) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"{layer}: `x` has shape {tuple(x.shape)}; expected (..., {dim})")


def make_norm(name: str, dim: int, **factory: Any) -> nn.Module:
    """The normalisation called `name` over `dim` channels; `factory` holds device and dtype.

    `layernorm` (eps 1e-5), `scalenorm`, `scalenorm_clamped` (FLASH-pytorch's), `rmsnorm` (a learned scale per channel,
    eps 1e-6), `rms` (no parameters, eps 1e-12: what GAU-alpha has after each layer) and `none`.
    """
    match name:
        case "layernorm":
            return LayerNorm(dim, **factory)
        case "scalenorm":
            return ScaleNorm(dim, **factory)
        case "scalenorm_clamped":
            return ScaleNorm(dim, clamp=True, **factory)
        case "rmsnorm":
            return RMSNorm(dim, **factory)
        case "rms":
            return RMSNorm(dim, 1e-12, False)
        case "none":
            return nn.Identity()
    raise ValueError(f"norm: {name!r} is not one of {', '.join(NORMS)}")

"""Normalisations of a layer's input or output, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NORMS = ("layernorm", "scalenorm", "scalenorm_clamped", "rmsnorm", "rms", "none")


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
        if x.shape[-1] != self.dim:
            raise ValueError(f"ScaleNorm: `x` has shape {tuple(x.shape)}; expected (..., {self.dim})")
        wide = x if x.dtype == torch.float64 else x.float()
        mean_square = wide.square().mean(-1, keepdim=True)
        if self.clamp:
            # The tiny term under the root only keeps the gradient of sqrt finite at a row of zeros.
            inverse = (mean_square + torch.finfo(wide.dtype).tiny).sqrt().clamp(min=self.eps).reciprocal()
        else:
            inverse = (mean_square + self.eps).rsqrt()
        return (wide * (inverse * self.g)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.dim}, eps={self.eps}, clamp={self.clamp}"


def make_norm(name: str, dim: int, **factory: Any) -> nn.Module:
    """The normalisation called `name` over `dim` channels; `factory` holds device and dtype.

    `layernorm` (eps 1e-5), `scalenorm`, `scalenorm_clamped` (FLASH-pytorch's), `rmsnorm` (a learned scale per channel,
    eps 1e-6), `rms` (no parameters, eps 1e-12: what GAU-alpha has after each layer) and `none`.
    """
    match name:
        case "layernorm":
            return nn.LayerNorm(dim, **factory)
        case "scalenorm":
            return ScaleNorm(dim, **factory)
        case "scalenorm_clamped":
            return ScaleNorm(dim, clamp=True, **factory)
        case "rmsnorm":
            return nn.RMSNorm(dim, eps=1e-6, **factory)
        case "rms":
            return nn.RMSNorm(dim, eps=1e-12, elementwise_affine=False)
        case "none":
            return nn.Identity()
    raise ValueError(f"norm: {name!r} is not one of {', '.join(NORMS)}")

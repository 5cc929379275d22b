"""Scaled sinusoidal embedding of absolute positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledSinusoidal(nn.Module):
    """A learned scalar times [sin(p w_i), cos(p w_i)], w_i = 10000^(-2i/dim): what a model adds to its embeddings.

    The scalar starts at dim^-0.5. Source: [GAU] (arXiv 2202.10447), appendix ("ScaledSin").

    Args:
        dim: d, even.
        device: where the parameter lives.
        dtype: its type.

    Example:
        >>> import torch
        >>> tuple(ScaledSinusoidal(8)(torch.arange(5)).shape)
        (5, 8)
    """

    scale: nn.Parameter

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"ScaledSinusoidal: `dim` is {dim}; expected an even number, at least 2")
        self.dim = dim
        self.scale = nn.Parameter(torch.full((1,), dim**-0.5, device=device, dtype=dtype))

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (...) of integers -> (..., dim) in the parameter's dtype; angles in fp32 or wider."""
        wide = torch.float64 if self.scale.dtype == torch.float64 else torch.float32
        frequency = 1.0 / (10000 ** (torch.arange(0, self.dim, 2, device=positions.device).float() / self.dim))
        angle = positions.to(wide).unsqueeze(-1) * frequency.to(wide)
        return torch.cat((angle.sin(), angle.cos()), dim=-1).to(self.scale.dtype) * self.scale

"""OffsetScale: how GAU and FLASH make their queries and keys from one shared vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .initialise import STD


class OffsetScale(nn.Module):
    """z -> gamma_h * z + beta_h, one cheap head per h: 2 S parameters in place of a projection.

    Source: [GAU] (arXiv 2202.10447), section 2.2 and code 1. gamma ~ N(0, 0.02), beta = 0.

    Args:
        dim: S, the width of z.
        heads: how many (GAU: q and k; FLASH: quad_q, quad_k, lin_q, lin_k).
        bias: whether there is a beta.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> heads = OffsetScale(8, heads=4)(torch.randn(2, 5, 8))
        >>> tuple(heads.shape)
        (2, 4, 5, 8)
    """

    gamma: nn.Parameter
    beta: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(heads, dim, device=device, dtype=dtype).normal_(std=STD))
        self.beta = nn.Parameter(torch.zeros(heads, dim, device=device, dtype=dtype)) if bias else None

    def forward(self, z: Tensor) -> Tensor:
        """z (..., N, S) -> (..., heads, N, S), in z's dtype."""
        gamma = self.gamma.to(z.dtype).unsqueeze(-2)
        if self.beta is None:
            return z.unsqueeze(-3) * gamma
        return torch.addcmul(self.beta.to(z.dtype).unsqueeze(-2), z.unsqueeze(-3), gamma)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.gamma.shape[1]}, heads={self.gamma.shape[0]}, bias={self.beta is not None}"

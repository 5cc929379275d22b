"""Rotary position embedding, and where the tokens of packed sequences stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .kept import Kept

_MOST = 2**17  # positions whose cosines and sines are kept; beyond them they are made anew


def packed_positions(n: int, cu_seqlens: Tensor, start: int = 0) -> Tensor:
    """Position of each of n packed tokens in its own sequence: (n,) int64, counted from 0 at every boundary.

    `start` tokens of the row come before the n.

    Example:
        >>> import torch
        >>> packed_positions(6, torch.tensor([0, 2, 6])).tolist()
        [0, 1, 0, 1, 2, 3]
    """
    tokens = torch.arange(start, start + n, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    sequence = torch.searchsorted(bounds, tokens, right=True) - 1
    return tokens - bounds[sequence.clamp(min=0)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn pairs of the leading channels of x (..., S) by angles whose cosine and sine (..., pairs) are given.

    It is computed in the dtype of `cos` and returned in that of x.

    Example:
        >>> import torch
        >>> quarter = torch.zeros(1), torch.ones(1)  # 90 degrees
        >>> rotate(torch.tensor([1.0, 0.0, 7.0]), *quarter)
        tensor([0., 1., 7.])
    """
    dim = 2 * cos.shape[-1]
    turning = x[..., :dim].to(cos.dtype)
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    turned = turned.to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)


class RotaryEmbedding(nn.Module):
    """RoPE: pairs of channels turn by position * base^(-2i/dim), so that q.k depends on the distance only.

    Angles and rotation are computed in fp32 (fp64 for fp64 input; the frequencies are fp32 numbers there too); the
    result has x's dtype. It has no parameters and no buffers: cosines and sines of the first positions are made once
    for a device and type, and no copy or saved module has them.

    Source: Su et al. 2021 (arXiv 2104.09864). Channel i is paired with i + dim/2 ("half-split", the form of the GAU
    paper), or 2i with 2i + 1 if `interleaved`.

    Args:
        dim: how many leading channels turn; None for all of them. Even.
        interleaved: pair neighbours rather than halves.
        base: the slowest pair turns by base^(-(dim - 2) / dim) per token.

    Example:
        >>> import torch
        >>> rotary = RotaryEmbedding()
        >>> q, k = torch.randn(2, 1, 1, 8)
        >>> score = lambda i, j: (rotary(q, i) * rotary(k, j)).sum()
        >>> bool(torch.allclose(score(7, 4), score(3, 0), atol=1e-5))
        True
    """

    dim: int | None
    interleaved: bool
    base: float

    def __init__(self, dim: int | None = None, *, interleaved: bool = False, base: float = 10000.0) -> None:
        super().__init__()
        if dim is not None and (dim < 2 or dim % 2):
            raise ValueError(f"RotaryEmbedding: `dim` is {dim}; expected an even number of channels, at least 2")
        self.dim, self.interleaved, self.base = dim, interleaved, base
        self._kept = Kept()

    def frequencies(self, dim: int, device: torch.device | str | None = None) -> Tensor:
        """Angle per token of each pair: (dim/2,) fp32."""
        return 1.0 / (self.base ** (torch.arange(0, dim, 2, device=device).float() / dim))

    def rates(self, x: Tensor, width: int) -> Tensor:
        """`frequencies` of heads of that width, on the device of x, to be read only: kept for the next call."""
        turning, device = self._turning((*x.shape[:-1], width)), x.device
        key = "rates", turning, self.base, device
        kept = self._kept.get(key, x, 1, _MOST, lambda _: (self.frequencies(turning, device),))
        return self.frequencies(turning, device) if kept is None else kept[1][0]

    def forward(self, x: Tensor, start: int | Tensor = 0, positions: Tensor | None = None) -> Tensor:
        """Turn each token of x by its position.

        Args:
            x: (B, N, S) or (B, H, N, S).
            start: position of the first token: an int, or one per row (B,).
            positions: positions themselves, (N,) or (B, N), instead of start.

        Returns:
            Tensor: x's shape and dtype.
        """
        cos, sin = self.turns(x, start, positions)
        if cos.ndim == 3 and x.ndim == 4:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for every head
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def turns(self, x: Tensor, start: int | Tensor = 0, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of the angle of every pair at every token of x (..., N, S), to be read only.

        (N, pairs) or (B, N, pairs), fp32 (fp64 for fp64). From an int `start` on they are kept for the next call.
        """
        if positions is None and isinstance(start, int):
            key = "rotary", self._turning(x.shape), self.base, x.device, x.dtype == torch.float64
            stop = start + x.shape[-2]
            kept = self._kept.rows(
                key, x, start, stop, _MOST, lambda n: self._made(x, torch.arange(n, device=x.device))
            )
            if kept is not None:
                cos, sin = kept
                return cos, sin
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
            positions = positions + (start[:, None] if isinstance(start, Tensor) else start)
        return self._made(x, positions)

    def _made(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        angle = positions.to(wide).unsqueeze(-1) * self.frequencies(self._turning(x.shape), x.device).to(wide)
        return angle.cos(), angle.sin()

    def _turning(self, shape: Sequence[int]) -> int:
        """How many channels of a tensor of this shape turn."""
        dim = self.dim or shape[-1]
        if dim > shape[-1] or dim % 2:
            got, least = tuple(shape), self.dim or 2
            raise ValueError(f"RotaryEmbedding: `x` has shape {got}; expected an even last axis of at least {least}")
        return dim

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"dim={self.dim}, interleaved={self.interleaved}, base={self.base}"

"""Relative position biases: each gives, for a length, the vector `rel_bias` that the operations take.

Entry `length - 1 + (j - p)` is what the score of key j and the query at position p gains; see `flashgau.attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bias import alibi_bias, rank_turns, rotary_bias, t5_bias
from ..ops.rank_form import rank_form
from .initialise import STD
from .kept import Kept

_MOST = 2**15  # tokens of the longest sequence whose cosines and sines are kept, 32 MiB for S = 128
BIASES = ("none", "toeplitz", "rotary", "t5", "alibi")


class ToeplitzBias(nn.Module):
    """A learned number for every distance j - p, from -(max_length - 1) to max_length - 1; N(0, 0.02) at the start.

    Source: [GAU] (arXiv 2202.10447), appendix, for short sequences. A FLASH layer needs it for its chunk only.

    Args:
        max_length: P, the longest sequence (chunk) it serves.
        heads: one table per head, (heads, 2P-1); None for one table (2P-1,).
        device: where the parameter lives.
        dtype: its type.

    Example:
        >>> bias = ToeplitzBias(8)
        >>> bool((bias(3) == bias.weight[5:10]).all())
        True
    """

    weight: nn.Parameter

    def __init__(
        self,
        max_length: int,
        heads: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"ToeplitzBias: `max_length` is {max_length}; expected at least 1")
        self.max_length = max_length
        shape = (2 * max_length - 1,) if heads is None else (heads, 2 * max_length - 1)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(std=STD))

    def forward(self, length: int) -> Tensor:
        """The table's middle, (..., 2 length - 1)."""
        if length > self.max_length:
            raise ValueError(
                f"ToeplitzBias: a sequence of {length} tokens; the table covers `max_length` = {self.max_length}"
            )
        # An empty sequence takes the one entry that every table has.
        length = max(length, 1)
        if length == self.max_length:
            return self.weight
        return self.weight[..., self.max_length - length : self.max_length + length - 1]

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.max_length}, shape={tuple(self.weight.shape)}"


class RotaryBias(nn.Module):
    """The rank form <RoPE(a)_p, RoPE(b)_j>: any length from 2 S parameters a, b ~ N(0, 0.02).

    Source: [GAU] (arXiv 2202.10447), appendix, for sequences of 512 tokens and more.

    Args:
        dim: S, even.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> tuple(RotaryBias(16)(100).shape)
        (199,)
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryBias: `dim` is {dim}; expected an even number, at least 2")
        self.a = nn.Parameter(torch.empty(dim, device=device, dtype=dtype).normal_(std=STD))
        self.b = nn.Parameter(torch.empty(dim, device=device, dtype=dtype).normal_(std=STD))
        self._kept = Kept()

    def forward(self, length: int) -> Tensor:
        """(2 length - 1,)."""
        a, length = self.a, max(length, 1)
        key = "rank form", a.shape[0], a.device, a.dtype == torch.float64
        kept = self._kept.get(key, a, length, _MOST, lambda n: (rank_turns(a.detach(), n),))
        if kept is None:
            return rotary_bias(a, self.b, length)
        longest, (turns,) = kept
        return rank_form(a, self.b, turns[longest - length : longest + length - 1])

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.a.shape[0]}"


class T5Bias(nn.Module):
    """One learned number per bucket of distances: exact when near, logarithmic up to max_distance, then constant.

    Source: Raffel et al. 2020 (arXiv 1910.10683). Weights start as N(0, 0.02).

    Args:
        heads: one set of buckets per head; None for a single one without a head axis.
        buckets: how many; not causal, half of them for keys after the query.
        max_distance: from here on all distances share the last bucket.
        causal: only keys before the query matter, and all buckets are theirs.
        scale: the bias is multiplied by this.
        device: where the parameter lives.
        dtype: its type.

    Example:
        >>> tuple(T5Bias(4, causal=True)(10).shape)
        (4, 19)
    """

    max_distance: int
    causal: bool
    scale: float
    weight: nn.Parameter

    def __init__(
        self,
        heads: int | None = None,
        buckets: int = 32,
        max_distance: int = 128,
        *,
        causal: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.max_distance, self.causal, self.scale = max_distance, causal, scale
        shape = (buckets,) if heads is None else (buckets, heads)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(std=STD))

    def forward(self, length: int) -> Tensor:
        """(heads, 2 length - 1), or (2 length - 1,) without heads."""
        bias = t5_bias(self.weight, max(length, 1), causal=self.causal, max_distance=self.max_distance)
        return bias if self.scale == 1.0 else bias * self.scale

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return (
            f"shape={tuple(self.weight.shape)}, max_distance={self.max_distance}, causal={self.causal}, "
            f"scale={self.scale:g}"
        )


class AlibiBias(nn.Module):
    """ALiBi: -slope_h * |j - p|, nothing learned; slopes fall geometrically from 2^(-8/heads) to 2^-8.

    Source: Press et al. 2022 (arXiv 2108.12409).

    Args:
        heads: H.
        device: where the slopes live.

    Example:
        >>> AlibiBias(2)(2).tolist()
        [[-0.0625, 0.0, -0.0625], [-0.00390625, 0.0, -0.00390625]]
    """

    slopes: Tensor

    def __init__(self, heads: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        exponents = torch.arange(1, heads + 1, device=device, dtype=torch.float32) * (-8 / heads)
        self.register_buffer("slopes", torch.exp2(exponents), persistent=False)

    def forward(self, length: int) -> Tensor:
        """(heads, 2 length - 1)."""
        return alibi_bias(self.slopes, max(length, 1))


def bias_vector(bias: nn.Module | None, length: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """The bias for sequences of up to `length` tokens, or None without one.

    Of a packed row `length` is only a bound: there a table gives all it has, and the operation checks that it covers
    each sequence.
    """
    if bias is None:
        return None
    if cu_seqlens is not None and isinstance(bias, ToeplitzBias):
        length = min(length, bias.max_length)
    vector: Tensor = bias(length)
    return vector


def make_bias(
    name: str,
    *,
    heads: int | None,
    dim: int,
    max_length: int | None,
    causal: bool,
    scale: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """The bias called `name` ("none", "toeplitz", "rotary", "t5", "alibi"), or None for "none".

    Args:
        name: which.
        heads: None for the single head of GAU and FLASH.
        dim: width of the query, for "rotary".
        max_length: longest sequence, for "toeplitz".
        causal: for the buckets of "t5".
        scale: factor of "t5".
        device: where parameters live.
        dtype: their type.
    """
    match name:
        case "none":
            return None
        case "toeplitz":
            if max_length is None:
                raise ValueError('bias: "toeplitz" is a table, and needs `max_length`')
            return ToeplitzBias(max_length, heads, device=device, dtype=dtype)
        case "rotary" if heads is None:
            return RotaryBias(dim, device=device, dtype=dtype)
        case "t5":
            return T5Bias(heads, causal=causal, scale=scale, device=device, dtype=dtype)
        case "alibi" if heads is not None:
            return AlibiBias(heads, device=device)
    one_head = 'one head takes "none", "toeplitz", "rotary", "t5"'
    many_heads = 'several heads take "none", "toeplitz", "t5", "alibi"'
    raise ValueError(f"bias: {name!r} is not possible here; {one_head if heads is None else many_heads}")

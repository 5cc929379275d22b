"""Hypothesis strategies for what breaks kernels: odd sizes and strides, padding, packing, half precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashgau.extras import extra

with extra("testing"):
    from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
# Empty, single, and on both sides of every power-of-two block; odd, so that every block has a ragged end.
SIZES = (0, 1, 2, 15, 17, 33, 63, 65, 129)
LAYOUTS = ("contiguous", "transposed", "heads inside", "guarded", "every second", "expanded")


def sizes(largest: int = SIZES[-1], smallest: int = 0) -> st.SearchStrategy[int]:
    """Lengths of an axis, around the borders of blocks.

    Example:
        >>> from flashgau.testing import sizes
        >>> sizes(20, smallest=1)
        sampled_from([1, 2, 15, 17])
    """
    return st.sampled_from([size for size in SIZES if smallest <= size <= largest])


def layouts() -> st.SearchStrategy[str]:
    """Names of memory layouts, as `lay_out` takes them."""
    return st.sampled_from(LAYOUTS)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (for "expanded", of its first row everywhere) in another memory layout.

    What surrounds them in "guarded" and "every second" is NaN: one read out of bounds shows in the result.

    Args:
        x: any tensor; one with too few axes for the layout is returned as it is.
        layout: one of `LAYOUTS`.

    Returns:
        A tensor of the same shape and dtype.

    Example:
        >>> import torch
        >>> from flashgau.testing import lay_out
        >>> lay_out(torch.ones(2, 3), "every second").stride()
        (6, 2)
    """
    if layout == "transposed" and x.dim() >= 2:
        return x.mT.contiguous().mT
    if layout == "heads inside" and x.dim() >= 3:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "expanded" and x.dim() >= 2 and x.shape[0] > 0:
        return x[:1].clone().expand_as(x)
    if layout == "guarded":
        base = x.new_full([s + 5 for s in x.shape], math.nan)
        view = base[tuple(slice(2, 2 + s) for s in x.shape)]
        return view.copy_(x)
    if layout == "every second" and x.dim() >= 1:
        view = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)[..., ::2]
        return view.copy_(x)
    return x


@st.composite
def tensors(
    draw: Any,
    *shape: int,
    dtypes: Sequence[torch.dtype] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal values from a generator that hypothesis seeds, in any of the dtypes and memory layouts.

    Example:
        >>> from flashgau.testing import HALVES, tensors
        >>> strategy = tensors(2, 3, dtypes=HALVES)
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x.to(device=device, dtype=draw(st.sampled_from(list(dtypes))))
    return lay_out(x, draw(st.sampled_from(list(layouts))))


@st.composite
def packings(draw: Any, total: int, parts: int | None = None) -> Tensor:
    """`cu_seqlens`: ends of sequences packed in one row of `total` tokens, some of them empty, after a leading 0.

    Args:
        draw: hypothesis gives it.
        total: tokens.
        parts: sequences, or None for up to 4.

    Example:
        >>> from flashgau.testing import packings
        >>> strategy = packings(20)
    """
    count = draw(st.integers(1, 4)) if parts is None else parts
    cuts = sorted(draw(st.integers(0, total)) for _ in range(count - 1))
    return torch.tensor([0, *cuts, total], dtype=draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def lengths(draw: Any, batch: int, n: int) -> Tensor:
    """`lengths`: valid tokens of padded rows, 0 and n among them.

    Args:
        draw: hypothesis gives it.
        batch: rows.
        n: the longest.

    Example:
        >>> from flashgau.testing import lengths
        >>> strategy = lengths(3, 20)
    """
    values = [draw(st.sampled_from(sorted({0, 1, n // 2, n - 1, n} & set(range(n + 1))))) for _ in range(batch)]
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.int32, torch.int64])))

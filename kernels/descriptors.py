"""Descriptors of tensors that a kernel makes, by which Hopper copies a block of rows in one instruction.

A program makes its own for the tokens of one sequence and head, so that rows past the last come as zeros, whatever is
stored there. It keeps them in memory that Triton asks an allocator for, at each launch and in proportion to the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
import triton
from torch import Tensor

_ALIGNED = 16  # bytes: a descriptor's address and strides (CUDA driver API, tensor maps)
_LARGEST = 2**40  # bytes: its strides are below


def describable(x: Tensor) -> bool:
    """Whether the tokens of each head of (B, H, N, D) can be described: rows without gaps between their columns, that
    begin at multiples of 16 bytes."""
    size = x.element_size()
    strides = [stride * size for stride, extent in zip(x.stride()[:2], x.shape[:2], strict=True) if extent > 1]
    row = x.stride(2) * size
    aligned = all(step % _ALIGNED == 0 for step in (*strides, row, x.data_ptr()))
    return x.stride(3) == 1 and 0 < row < _LARGEST and aligned


def launched(launch: Callable[..., Any], *args: Any, described: bool, **keywords: Any) -> None:
    """Launch a kernel. Where it makes descriptors it gets PyTorch's memory; the user's own allocator stays as it is."""
    if not described:
        launch(*args, **keywords)
        return
    context = copy_context()
    context.run(triton.set_allocator, _memory)
    context.run(launch, *args, **keywords)


def _memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")

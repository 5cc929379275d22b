"""Formulas that PyTorch differentiates as often as asked: what operations are written in where they are (`others`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgau.eager.common import accumulator
from flashgau.options import Layout

AT_ONCE = 2**20
"""Numbers of an operand whose rows are independent that are worked on together."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activated(x: Tensor, activation: str) -> Tensor:
    """An activation of `glu`, in the type of sums."""
    return _ACTIVATIONS[activation](x.to(accumulator(x.dtype)))


def glu(gate: Tensor, up: Tensor | None, activation: str, up_activation: str) -> Tensor:
    """act(gate) * up_act(up), or of the halves of `gate`."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return (activated(gate, activation) * activated(up, up_activation)).to(gate.dtype)


def gated(x: Tensor, gate: Tensor, activation: str, layout: Layout) -> Tensor:
    """act(gate) * x, both (B, ..., N, E), in x's type; 0 at padding, whatever that holds."""
    real = real_tokens(layout, gate.shape[-2], gate)
    if real is not None:
        real = real.view(real.shape[0], *[1] * (gate.dim() - 3), real.shape[1], 1)
        gate = torch.where(real, gate, 0)
    return (activated(gate, activation) * x).to(x.dtype)


def of_queries(layout: Layout, m: int, n: int) -> Layout:
    """The layout of m queries against n keys: lengths are those of keys, and of queries too if m is n."""
    return layout if layout.lengths is None or m == n else Layout()


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """function(x) (..., width) of rows that are independent, so many at a time that what lies between stays small."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows * width <= AT_ONCE or x.dim() < 2:
        return function(x)
    parts = [function(part) for part in x.flatten(0, -2).split(max(1, AT_ONCE // width))]
    return torch.cat(parts).unflatten(0, x.shape[:-1])


def added(x: Tensor, residual: Tensor | None) -> Tensor:
    """x + residual, where there is one."""
    return x if residual is None else x + residual


def real_tokens(layout: Layout, n: int, like: Tensor) -> Tensor | None:
    """Which of n tokens belong to a sequence, (B or 1, n); None if all do."""
    ends = layout.lengths if layout.lengths is not None else layout.cu_seqlens
    if ends is None:
        return None
    ends = ends[-1:] if layout.lengths is None else ends
    return torch.arange(n, device=like.device) < ends[:, None]

"""Gradients that can be computed, and not differentiated again. For `flashgau.distributed`; not public."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor


def once(op: str, compute: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None) -> Any:
    """The gradients that `compute` makes of tensors; differentiating them again raises an error, which says so."""
    return _Once.apply(op, compute, *tensors)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, compute: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.op = op
        return compute(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"{ctx.op}: differentiable once; over several processes there are no second derivatives")

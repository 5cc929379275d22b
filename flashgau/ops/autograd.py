"""Running one floor's function, and whether a derivative may be asked for, once or again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import pytorch
from .dispatch import implementation


def run(op: str, backend: str, function: str, *args: Any, **kwargs: Any) -> Any:
    """Call one floor's function with autocast off: operands were cast before, and sums stay in fp32."""
    return without_autocast(implementation(op, backend, function), *args, **kwargs)


def without_autocast(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with autocast off."""
    if not pytorch.any_autocast():
        return call(*args, **kwargs)
    device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    with torch.autocast(device.type, enabled=False):
        return call(*args, **kwargs)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, so that the forward should save what only it can use.

    A transform of torch.func may differentiate what does not say so: mapped tensors never do.
    """
    return torch.is_grad_enabled() and (
        any(t is not None and t.requires_grad for t in tensors) or pytorch.transforms_active()
    )


def bias_rows(bias: Tensor | None, batch: int) -> Tensor | None:
    """A bias (..., 2P-1) as (B, 2P-1), a view; a single row's gradient is one too, with nothing to sum."""
    return None if bias is None else bias.reshape(-1, bias.shape[-1]).expand(batch, -1)


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

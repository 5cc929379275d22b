"""What every operation's custom operators share."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .dispatch import implementation


def run(op: str, backend: str, function: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Call one floor's function with autocast off: operands were cast before, and sums stay in fp32."""
    with torch.autocast(device.type, enabled=False):
        return implementation(op, backend, function)(*args, **kwargs)


def present(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """A custom operator returns no None: what is absent becomes an empty tensor."""
    return [like.new_empty(0) if t is None else t for t in tensors]


def refuse_second_derivative(op: str, operator: torch.library.CustomOpDef) -> None:
    """Let differentiating a backward operator raise an error that says what to do."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{op}: the optimised backends are differentiable once; "
            f'for second derivatives call it with backend="reference"'
        )

    operator.register_autograd(backward)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, so that the forward should save what only it can use."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def only_needed(ctx: Any, grads: list[Tensor | None]) -> list[Tensor | None]:
    """None for inputs that need no gradient, as autograd wants it."""
    return [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]

"""What every operation's custom operators share."""

from __future__ import annotations

from collections.abc import Callable
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


class Operator:
    """A PyTorch operator `flashgau::name`, for tracing as one node, with a shape function and a derivative."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"flashgau::{name}"
        torch.library.define(self.name, torch.library.infer_schema(function, mutates_args=()))
        # Not torch.library.custom_op: that imports the whole of torch.compile, seconds of it, at the first call.
        torch.library.impl(self.name, "CompositeExplicitAutograd")(function)
        self.overload = getattr(torch.ops.flashgau, name).default

    def __call__(self, *args: Any) -> Any:
        """Call the operator."""
        return self.overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """How shapes, strides and dtypes of the results follow from those of the inputs."""
        torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
        """The derivative, and what to keep for it."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function on plain tensors the operator of that name; its schema is read from the annotations."""
    return lambda function: Operator(name, function)


def refuse_second_derivative(op: str, operator: Operator) -> None:
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

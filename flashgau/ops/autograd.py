"""What every operation's custom operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .dispatch import implementation


def run(op: str, backend: str, function: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Call one floor's function with autocast off: operands were cast before, and sums stay in fp32."""
    call = implementation(op, backend, function)
    if backend == "triton":
        from flashgau import tuning  # which needs Triton

        kwargs["choose"] = tuning.choose
    if not torch.is_autocast_enabled(device.type):
        return call(*args, **kwargs)
    with torch.autocast(device.type, enabled=False):
        return call(*args, **kwargs)


def present(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """A custom operator returns no None: what is absent becomes an empty tensor."""
    return [like.new_empty(0) if t is None else t for t in tensors]


_library = torch.library.Library("flashgau", "FRAGMENT")


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
        """The derivative, and what to keep for it; `backward` gets a list if the operator returns one."""
        # Not torch.library.register_autograd: it looks for missing arguments at every call, of which there are none
        # here, and that took longer than attention over a hundred tokens.
        overload, below = self.overload, torch._C._after_autograd_keyset
        returns_list = overload._schema.returns[0].type.kind() == "ListType"

        def undifferentiated(keyset: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & below, *args)

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                *inputs, keyset = args
                result = undifferentiated(keyset, *inputs)
                if setup_context is not None:
                    setup_context(ctx, tuple(inputs), result)
                return tuple(result) if returns_list else result

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return *backward(ctx, *([list(grads)] if returns_list else grads)), None

        def differentiable(keyset: Any, *args: Any) -> Any:
            if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
                return undifferentiated(keyset, *args)
            result = Node.apply(*args, keyset)
            return list(result) if returns_list else result

        Node.__name__ = Node.__qualname__ = self.name.replace("::", "_")
        _library.impl(self.name, differentiable, "Autograd", with_keyset=True)


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

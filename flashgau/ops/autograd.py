"""What every operation's custom operators share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import pytorch
from .dispatch import implementation


def run(op: str, backend: str, function: str, *args: Any, **kwargs: Any) -> Any:
    """Call one floor's function with autocast off: operands were cast before, and sums stay in fp32."""
    call = implementation(op, backend, function)
    if backend == "triton":
        from flashgau import tuning  # which needs Triton

        kwargs["choose"] = tuning.choose
    if not pytorch.any_autocast():
        return call(*args, **kwargs)
    device = next(x.device for x in args if isinstance(x, Tensor))
    with torch.autocast(device.type, enabled=False):
        return call(*args, **kwargs)


_library = torch.library.Library("flashgau", "FRAGMENT")


class Operator:
    """A PyTorch operator `flashgau::name`, for tracing as one node, with a shape function and a derivative.

    A call that nothing observes runs the function at once: PyTorch's dispatcher would come back to Python twice, which
    takes longer than the checks of the arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"flashgau::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(self.name, schema)
        # Not torch.library.custom_op: that imports the whole of torch.compile, seconds of it, at the first call.
        torch.library.impl(self.name, "CompositeExplicitAutograd")(_present(function))
        torch.library.register_vmap(self.name, self._mapped)
        self.overload = getattr(torch.ops.flashgau, name).default
        self._function = self._differentiable = function
        self._observed: Callable[..., Any] = self.overload
        self._returns_list = schema.endswith("[]")

    def __call__(self, *args: Any) -> Any:
        """Call the operator."""
        if pytorch.observed(args):
            return self._observed(*args)
        if torch.is_grad_enabled() and pytorch.any_requires_grad(*args):
            return self._differentiable(*args)
        return self._function(*args)

    def _mapped(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """What torch.vmap gets: a call for each entry of the mapped axis. The results' axis is the first."""
        if info.batch_size == 0:
            raise RuntimeError(f"{self.name} cannot be mapped over an axis of size 0")
        calls = [
            self._observed(*(_entry(x, axis, i) for x, axis in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = [torch.stack(parts) for parts in zip(*calls, strict=True)]
        return type(calls[0])(results), type(calls[0])([0] * len(results))

    def register_fake(self, function: Callable[..., Any]) -> None:
        """How shapes, strides and dtypes of the results follow from those of the inputs."""
        torch.library.register_fake(self.name, _present(function))

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
        """The derivative, and what to keep for it; `backward` gets a list if the operator returns one."""
        returns_list = self._returns_list

        class Node(pytorch.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                *inputs, function = args
                result = function(*inputs)
                if setup_context is not None:
                    setup_context(ctx, tuple(inputs), result)
                return tuple(result) if returns_list else result

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return *backward(ctx, *([list(grads)] if returns_list else grads)), None

        def differentiable(function: Callable[..., Any], *args: Any) -> Any:
            result = Node.apply(*args, function)
            return list(result) if returns_list else result

        Node.__name__ = Node.__qualname__ = self.name.replace("::", "_")
        self._differentiable = partial(differentiable, self._function)
        derivative = pytorch.Derivative(differentiable, backward, setup_context, returns_list, self._mapped)
        self._observed = pytorch.register_autograd(_library, self.overload, derivative)


def _entry(x: Any, axis: Any, i: int) -> Any:
    """Entry i of a mapped argument; lists are mapped one by one, and what has no axis is the same for all."""
    if isinstance(x, list):
        axes = axis if isinstance(axis, (list, tuple)) else [axis] * len(x)
        return [_entry(part, a, i) for part, a in zip(x, axes, strict=True)]
    return x if axis is None else x.select(axis, i)


def _present(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as PyTorch's dispatcher wants it, which knows no None in a list: an empty tensor stands for it."""

    def call(*args: Any) -> Any:
        results = function(*args)
        if isinstance(results, Tensor) or not any(x is None for x in results):
            return results
        like = next(x for x in results if x is not None)
        return [like.new_empty(0) if x is None else x for x in results]

    return call


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
    """Whether a backward may follow, so that the forward should save what only it can use.

    A transform of torch.func may differentiate what does not say so: mapped tensors never do.
    """
    return torch.is_grad_enabled() and (
        any(t is not None and t.requires_grad for t in tensors) or pytorch.transforms_active()
    )


def only_needed(ctx: Any, grads: list[Tensor | None]) -> list[Tensor | None]:
    """None for inputs that need no gradient, as autograd wants it."""
    return [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]

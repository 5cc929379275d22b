"""A function on plain tensors as a PyTorch operator: what dispatcher, tracing, autograd and torch.vmap want of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from itertools import chain, islice
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import pytorch
from .folding import Folding
from .names import flat

_library = torch.library.Library("flashgau", "FRAGMENT")


class Operator:
    """A PyTorch operator `flashgau::name`, for tracing as one node, with a shape function and a derivative.

    A call that nothing observes runs the function at once: PyTorch's dispatcher would come back to Python twice, which
    takes longer than the checks of the arguments.

    Args:
        name: without the library.
        schema: of the arguments, in PyTorch's language.
        function: what it does.
        fake: the same for shapes.
        returns: "Tensor[]", or "Tensor" if it writes arguments: the only result that torch.compile takes then.
        folding: how torch.vmap makes one call of it; without, it makes one for each entry.
    """

    name: str
    overload: Any

    def __init__(
        self,
        name: str,
        schema: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        returns: str = "Tensor[]",
        folding: Folding | None = None,
    ) -> None:
        self.name = f"flashgau::{name}"
        torch.library.define(self.name, f"{schema} -> {returns}")
        # Not torch.library.custom_op: that imports the whole of torch.compile, seconds of it, at the first call.
        present = _present if returns == "Tensor[]" else lambda function: function
        torch.library.impl(self.name, "CompositeExplicitAutograd")(present(function))
        torch.library.register_fake(self.name, present(fake))
        if returns == "Tensor[]":
            torch.library.register_vmap(self.name, self._mapped)
        self.overload = getattr(torch.ops.flashgau, name).default
        self._lists = {i for i, x in enumerate(schema.strip("()").split(", ")) if x.startswith("Tensor[]")}
        self._function = self._differentiable = function
        self._observed: Callable[..., Any] = self.overload
        self._folding = folding

    def __call__(self, *args: Any) -> Any:
        """Call the operator."""
        if pytorch.observed(args):
            return self._observed(*args)
        if torch.is_grad_enabled() and pytorch.any_requires_grad(*args):
            return self._differentiable(*args)
        return self._function(*args)

    def _mapped(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """What torch.vmap gets: one call, or one for each entry of the mapped axis. The results' axis is the first."""
        if info.batch_size == 0:
            raise RuntimeError(f"{self.name} cannot be mapped over an axis of size 0")
        folded = None if self._folding is None else self._folding.folded(info.batch_size, in_dims, args)
        if self._folding is not None and folded is not None:
            results = self._folding.unfolded(info.batch_size, self._observed(*folded))
            return results, [0] * len(results)
        calls = [
            self._observed(*(_entry(x, axis, i) for x, axis in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        results = [torch.stack(parts) for parts in zip(*calls, strict=True)]
        return results, [0] * len(results)

    def register_autograd(
        self,
        backward: Callable[..., Any],
        setup_context: Callable[..., Any] | None = None,
        tangents: Callable[..., Any] | None = None,
        no_tangents: str = "",
        refused: Collection[int] = (),
    ) -> None:
        """The derivative, `backward(ctx, list of gradients)`, and what to keep for it; and that in forward mode,
        `tangents(arguments, their tangents or None, results)`, or what is said where there is none.

        The same is said to who wants the derivatives by the arguments with the `refused` numbers. PyTorch does not tell
        `backward` which are wanted; it gives zeros for these.
        """
        if refused and not pytorch.sees_levels:  # where a Function before this one, as below, could not be told apart
            backward = self._refuse(no_tangents)

        class Refused(pytorch.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.view_as(x)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> NoReturn:
                raise RuntimeError(no_tangents)

        class Node(pytorch.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                *inputs, kept, sizes, function = args
                if sizes is not None:
                    rest = iter(inputs)
                    inputs = [next(rest) if size is None else list(islice(rest, size)) for size in sizes]
                result = function(*inputs)
                if setup_context is not None:
                    setup_context(ctx, kept or tuple(inputs), result)
                return tuple(result)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                found = backward(ctx, list(grads))
                return *(flat(found) if self._lists else found), None, None, None

        def differentiable(function: Callable[..., Any], *args: Any, kept: tuple[Any, ...] = ()) -> Any:
            if refused:
                args = tuple(
                    Refused.apply(x) if i in refused and isinstance(x, Tensor) and x.requires_grad else x
                    for i, x in enumerate(args)
                )
            if not self._lists:
                return list(Node.apply(*args, kept, None, function))
            # A Function sees no tensor in a list.
            sizes = [len(x) if i in self._lists else None for i, x in enumerate(args)]
            parts = (x if size is not None else [x] for x, size in zip(args, sizes, strict=True))
            return list(Node.apply(*chain.from_iterable(parts), kept, sizes, function))

        Node.__name__ = Node.__qualname__ = self.name.replace("::", "_")
        self._differentiable = partial(differentiable, self._function)
        derivative = pytorch.Derivative(differentiable, backward, setup_context, self._mapped, tangents, no_tangents)
        self._observed = pytorch.register_autograd(_library, self.overload, derivative)

    def refuse_derivative(self, op: str) -> None:
        """Let differentiating it raise an error that says what to do, in the name of the operation `op`."""
        error = refusal(op, "once")
        self.register_autograd(self._refuse(error), no_tangents=error)

    @staticmethod
    def _refuse(error: str) -> Callable[..., Any]:
        def backward(ctx: Any, grads: list[Tensor]) -> NoReturn:
            raise RuntimeError(error)

        return backward


def refusal(op: str, times: str) -> str:
    """What is said to who asks for one derivative more."""
    return (
        f"{op}: the optimised backends are differentiable {times}; "
        f'for more derivatives call it with backend="reference"'
    )


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
        if not any(x is None for x in results):
            return list(results)
        like = next(x for x in results if x is not None)
        return [like.new_empty(0) if x is None else x for x in results]

    return call

"""What every operation's custom operators share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad

from .dispatch import implementation


def run(op: str, backend: str, function: str, *args: Any, **kwargs: Any) -> Any:
    """Call one floor's function with autocast off: operands were cast before, and sums stay in fp32."""
    call = implementation(op, backend, function)
    if backend == "triton":
        from flashgau import tuning  # which needs Triton

        kwargs["choose"] = tuning.choose
    if not torch._C._is_any_autocast_enabled():
        return call(*args, **kwargs)
    device = next(x.device for x in args if isinstance(x, Tensor))
    with torch.autocast(device.type, enabled=False):
        return call(*args, **kwargs)


_TENSORS = {Tensor, torch.nn.Parameter}
_VALUES = {type(None), bool, int, float, str, list}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_library = torch.library.Library("flashgau", "FRAGMENT")


class Operator:
    """A PyTorch operator `flashgau::name`, for tracing as one node, with a shape function and a derivative.

    A call that nothing observes runs the function at once: PyTorch's dispatcher would come back to Python twice, which
    takes longer than the checks of the arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"flashgau::{name}"
        torch.library.define(self.name, torch.library.infer_schema(function, mutates_args=()))
        # Not torch.library.custom_op: that imports the whole of torch.compile, seconds of it, at the first call.
        torch.library.impl(self.name, "CompositeExplicitAutograd")(_present(function))
        torch.library.register_vmap(self.name, self._mapped)
        self.overload = getattr(torch.ops.flashgau, name).default
        self._function = self._differentiable = function

    def __call__(self, *args: Any) -> Any:
        """Call the operator."""
        if _observed(args):
            return self.overload(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._differentiable(*args)
        return self._function(*args)

    def _mapped(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """What torch.vmap gets: a call for each entry of the mapped axis. The results' axis is the first."""
        if info.batch_size == 0:
            raise RuntimeError(f"{self.name} cannot be mapped over an axis of size 0")
        calls = [
            self.overload(*(_entry(x, axis, i) for x, axis in zip(args, in_dims, strict=True)))
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
        # Not torch.library.register_autograd: it looks for missing arguments at every call, of which there are none
        # here, and that took longer than attention over a hundred tokens.
        overload, below = self.overload, torch._C._after_autograd_keyset
        returns_list = overload._schema.returns[0].type.kind() == "ListType"

        def dispatched(keyset: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & below, *args)

        def dispatched_to_transform(keyset: Any, *args: Any) -> Any:
            # A Node records nothing of what runs inside, but the next transform of torch.func further out still does.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return dispatched(keyset, *args)

        class Node(torch.autograd.Function):
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

        # Not Node.apply: it looks for functorch's wrappers first, which takes as long as the rest of it.
        single_level: Any = super(torch.autograd.Function, Node)

        def differentiable(function: Callable[..., Any], *args: Any) -> Any:
            result = single_level.apply(*args, function)
            return list(result) if returns_list else result

        def on_autograd_key(keyset: Any, *args: Any) -> Any:
            _refuse_tangents(self.name, args)
            args = unwrap_dead_wrappers(args)
            if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
                return dispatched(keyset, *args)
            transformed = keyset.has(torch._C.DispatchKey.FuncTorchDynamicLayerBackMode)
            with enable_single_level_autograd_function():
                return differentiable(partial(dispatched_to_transform if transformed else dispatched, keyset), *args)

        Node.__name__ = Node.__qualname__ = self.name.replace("::", "_")
        self._differentiable = partial(differentiable, self._function)
        _library.impl(self.name, on_autograd_key, "Autograd", with_keyset=True)


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


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raise an error for dual numbers, whose tangents would be lost without a word."""
    if forward_ad._current_level < 0:
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{name} has no forward-mode derivative: the optimised backends are differentiated in reverse; "
                f'for jvp call the operation with backend="reference"'
            )


def _observed(args: tuple[Any, ...]) -> bool:
    """Whether something beside the caller wants to see the operator: a trace, a transform, a mode, a profile, or a
    kind of tensor with rules of its own."""
    if torch.compiler.is_compiling():
        return True
    for x in args:
        kind = type(x)
        if _is_special(x) if kind in _TENSORS else kind not in _VALUES:
            return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


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


def _is_special(x: Tensor) -> bool:
    """Whether PyTorch has rules for x that its class does not tell: a view that negates, zeros without memory, no
    values at all, a wrapper of a transform, even of one that has ended."""
    return x.is_neg() or x.is_meta or x._is_zerotensor() or is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, so that the forward should save what only it can use.

    A transform of torch.func may differentiate what does not say so: mapped tensors never do.
    """
    return torch.is_grad_enabled() and (
        any(t is not None and t.requires_grad for t in tensors) or torch._C._are_functorch_transforms_active()
    )


def only_needed(ctx: Any, grads: list[Tensor | None]) -> list[Tensor | None]:
    """None for inputs that need no gradient, as autograd wants it."""
    return [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]

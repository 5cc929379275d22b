"""Every private name of PyTorch that the package uses, with the public way for a version that lacks it.

Any release may take a private name away. So each is looked up here, once, and what is built of it has a slower way
that needs public names only. Tests hide the names one by one, and find any that is used elsewhere. (The operators of
`torch.ops.aten` without a leading underscore count as public: PyTorch keeps their schemas compatible.)

Every part may import this file, which imports nothing of ours: it computes nothing that an implementation and the
reference could have wrong together.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

USED: list[str] = []  # every private name, as "module:name"


def _private(name: str) -> Any:
    """What this version of PyTorch has under a private name, or None."""
    USED.append(name)
    try:
        return pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return None


# ---------------------------------------------------------------- who wants to see a call

_functorch_wrapped = _private("torch._C:_functorch.is_functorch_wrapped_tensor")
_legacy_batched = _private("torch._C:_functorch.is_legacy_batchedtensor")
_zero_tensor = _private("torch:Tensor._is_zerotensor")
_dispatch_modes = _private("torch._C:_len_torch_dispatch_stack")
_function_modes = _private("torch._C:_len_torch_function_stack")
_key_is_included = _private("torch._C:_dispatch_tls_is_dispatch_key_included")
_pre_dispatch = _private("torch._C:DispatchKey.PreDispatch")
_transforms = _private("torch._C:_are_functorch_transforms_active")
_tracing = _private("torch._C:_get_tracing_state")
_profiling = _private("torch.autograd:_profiler_enabled")
_forward_level = _private("torch.autograd.forward_ad:_current_level")  # its value now: only whether there is one

_TENSORS = {Tensor, torch.nn.Parameter}
_VALUES = {type(None), bool, int, float, str, list}


def _is_special(x: Tensor) -> bool:
    """Whether PyTorch has rules for x that its class does not tell: a view that negates, zeros without memory, no
    values at all, a wrapper of a transform, even of one that has ended."""
    return x.is_neg() or x.is_meta or _zero_tensor(x) or _functorch_wrapped(x) or _legacy_batched(x)


def _observed(args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling():
        return True
    for x in args:
        kind = type(x)
        if _is_special(x) if kind in _TENSORS else kind not in _VALUES:
            return True
    return (
        _dispatch_modes() > 0
        or _function_modes() > 0
        or _key_is_included(_pre_dispatch)
        or _transforms()
        or _tracing() is not None
        or _profiling()
        or forward_ad._current_level >= 0
    )


def _perhaps(*args: Any) -> bool:
    return True


_watchers = (
    *(_functorch_wrapped, _legacy_batched, _zero_tensor, _dispatch_modes, _function_modes, _key_is_included),
    *(_pre_dispatch, _transforms, _tracing, _profiling, _forward_level),
)

# Whether something beside the caller wants to see an operator with these arguments: a trace, a transform, a mode, a
# profile, or a kind of tensor with rules of its own. Where that cannot be told, every call goes the observed way.
observed = _perhaps if any(name is None for name in _watchers) else _observed

# Whether torch.func is at work, so that tensors may be differentiated which do not say so.
transforms_active = _transforms or _perhaps


# ---------------------------------------------------------------- questions about tensors and the caller


def _search_requires_grad(*args: Any) -> bool:
    return any(
        x.requires_grad if isinstance(x, Tensor) else isinstance(x, (list, tuple)) and _search_requires_grad(*x)
        for x in args
    )


def _ask_each_device() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda", "xpu", "mps"))


_batched = _private("torch._C:_functorch.is_batchedtensor")
_unwrapped = _private("torch._C:_functorch.get_unwrapped")


def _is_mapped(x: Tensor) -> bool:
    while _functorch_wrapped(x):
        if _batched(x):
            return True
        x = _unwrapped(x)
    return False


def _refuses_to_be_read(x: Tensor) -> bool:
    try:
        for value in x.flatten():
            value.item()
    except RuntimeError:
        return True
    return False


# Whether a tensor, or one in a list, among the arguments requires a gradient.
any_requires_grad = _private("torch._C:_any_requires_grad") or _search_requires_grad

# Whether autocast is on for a device, whichever.
any_autocast = _private("torch._C:_is_any_autocast_enabled") or _ask_each_device

# Whether x stands for the entries of an axis that torch.vmap took away, so that its values cannot be read.
is_mapped = _refuses_to_be_read if None in (_functorch_wrapped, _batched, _unwrapped) else _is_mapped


_version = _private("torch:Tensor._version")


def _counted(x: Tensor) -> int | None:
    return None if x.is_inference() else int(x._version)


def _uncounted(x: Tensor) -> None:
    return None


# How often x, or another tensor of its memory, was written; None where that is not counted.
writes_of: Callable[[Tensor], int | None] = _uncounted if _version is None else _counted


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_global_hook = _private("torch.nn.modules.module:_has_any_global_hook")


def _has_hooks(module: torch.nn.Module) -> bool:
    return any(getattr(module, name, True) for name in _HOOKS) or _global_hook()


# Whether a call of the module does more than run its `forward`. Where that cannot be told, it may.
has_hooks = _has_hooks if _global_hook else _perhaps


# ---------------------------------------------------------------- derivatives of operators

_single_level = _private("torch.autograd.function:_SingleLevelFunction")
_allow_single_level = _private("torch._functorch.utils:enable_single_level_autograd_function")
_unwrap_dead = _private("torch._functorch.utils:unwrap_dead_wrappers")
_set_forward_grad = _private("torch.autograd.forward_ad:_set_fwd_grad_enabled")
_below = _private("torch._C:_AutoDispatchBelowAutograd")
_keys_below = _private("torch._C:_after_autograd_keyset")
_back_mode = _private("torch._C:DispatchKey.FuncTorchDynamicLayerBackMode")

# The base of an autograd function whose `apply` does not look for functorch's wrappers first, which takes as long as
# the rest of it.
Function: Any = _single_level or torch.autograd.Function


@dataclass(frozen=True)
class Derivative:
    """How an operator is differentiated, in reverse and forward, and mapped by torch.vmap."""

    # (function, *arguments): runs the function, and remembers what `backward` wants, of the `kept` ones in their place.
    apply: Callable[..., Any]
    backward: Callable[..., Any]
    setup_context: Callable[..., Any] | None
    mapped: Callable[..., Any]
    tangents: Callable[..., Any] | None = None  # (arguments, their tangents, results) -> tangents of the results
    no_tangents: str = ""  # what the error says if there is no such function


def has_tangents(args: tuple[Any, ...]) -> bool:
    """Whether any of the tensors, those in lists too, is a dual number of the level of forward mode that is entered."""
    return any(
        forward_ad.unpack_dual(x).tangent is not None
        if isinstance(x, Tensor)
        else isinstance(x, (list, tuple)) and has_tangents(tuple(x))
        for x in args
    )


def _along(derivative: Derivative, name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """What `call` makes of dual numbers: of their values, and the tangents of that."""
    if derivative.tangents is None:
        raise _no_forward_mode(derivative, name)
    primals, tangents = [list(args), [None] * len(args)]
    for i, x in enumerate(args):
        if isinstance(x, Tensor):
            primals[i], tangents[i] = forward_ad.unpack_dual(x)
    results = list(call(*primals))
    found = derivative.tangents(primals, tangents, results)
    return [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(results, found, strict=True)]


def _no_forward_mode(derivative: Derivative, name: str) -> RuntimeError:
    return RuntimeError(
        derivative.no_tangents
        or f'{name} has no forward-mode derivative here; for jvp call the operation with backend="reference"'
    )


def _can_make_a_dual() -> bool:
    try:
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
    except RuntimeError:
        return False
    return True


def _has_a_level() -> bool:
    return forward_ad._current_level >= 0


# Whether a level of forward mode is entered, so that tensors may have tangents, those inside of a transform too.
in_forward_mode = _can_make_a_dual if _forward_level is None else _has_a_level


def _dispatched(library: torch.library.Library, overload: Any, derivative: Derivative) -> Callable[..., Any]:
    # Not torch.library.register_autograd: it looks for missing arguments at every call, of which there are none here,
    # which took longer than attention over a hundred tokens; and what it makes is refused by torch.func.
    def below(keyset: Any, *args: Any) -> Any:
        with _below():
            return overload.redispatch(keyset & _keys_below, *args)

    def below_a_transform(keyset: Any, *args: Any) -> Any:
        # A Function records nothing of what runs inside, but the next transform of torch.func further out still does.
        with torch.enable_grad(), _set_forward_grad(True):
            return below(keyset, *args)

    def on_autograd_key(keyset: Any, *args: Any) -> Any:
        def values(*primals: Any) -> Any:
            if not (torch.is_grad_enabled() and any_requires_grad(*primals)):
                return below(keyset, *primals)
            function = partial(below_a_transform if keyset.has(_back_mode) else below, keyset)
            with _allow_single_level():  # what is kept has its tangents, for a backward along them
                return derivative.apply(function, *primals, kept=args)

        args = _unwrap_dead(args)
        return _along(derivative, overload.name(), values, args) if has_tangents(args) else values(*args)

    library.impl(overload.name(), on_autograd_key, "Autograd", with_keyset=True)
    return overload


def _around_the_dispatcher(library: torch.library.Library, overload: Any, derivative: Derivative) -> Callable[..., Any]:
    # PyTorch's own registration is for torch.compile; torch.func takes a Function that calls the operator.
    torch.library.register_autograd(
        overload.name(), derivative.backward, setup_context=derivative.setup_context, lib=library
    )

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return tuple(overload(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if derivative.setup_context is not None:
                derivative.setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return derivative.backward(ctx, list(grads))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            results, axes = derivative.mapped(info, in_dims, *args)
            return tuple(results), tuple(axes)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return overload(*args)
        if has_tangents(args):  # which what this Node keeps would not have
            raise _no_forward_mode(derivative, overload.name())
        return list(Node.apply(*args))

    return call


_needed = (_single_level, _allow_single_level, _unwrap_dead, _set_forward_grad, _below, _keys_below, _back_mode)

# Whether an operator's derivative is that of one level of torch.func's transforms at a time.
sees_levels = not any(name is None for name in _needed)

# Give an operator its derivative, and return what an observed call of it should call.
register_autograd = _dispatched if sees_levels else _around_the_dispatcher


# ---------------------------------------------------------------- what operations do

_dispatch_mode = _private("torch.utils._python_dispatch:TorchDispatchMode")
_storage_of = _private("torch:UntypedStorage._cdata")

# Sees every operation inside of its block; without it none is seen.
DispatchMode: Any = _dispatch_mode or torch.overrides.TorchFunctionMode


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


# A number that tensors have in common if they share memory; with the second all without values do.
memory_of = _address if _storage_of is None else _storage


def writes(operation: Any) -> bool:
    """Whether an operation writes an argument."""
    if hasattr(operation, "_schema"):
        return bool(operation._schema.is_mutable)
    return str(operation.__name__).partition(".")[0].endswith("_")


# ---------------------------------------------------------------- computations


def _silu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    return F.silu(x) if out is None else out.copy_(F.silu(x))


def _gelu(x: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    result = F.gelu(x, approximate=approximate)
    return result if out is None else out.copy_(result)


# torch.nn.functional's activations, into memory that is there.
silu = _private("torch._C:_nn.silu") or _silu
gelu = _private("torch._C:_nn.gelu") or _gelu

# PyTorch's fused attention on a CPU, which gives the log-sum-exp that its public function keeps to itself, and its
# derivative; None without it, where the blocked computation takes every case.
cpu_attention_backward = _private("torch.ops:aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
cpu_attention = cpu_attention_backward and _private(
    "torch.ops:aten._scaled_dot_product_flash_attention_for_cpu.default"
)


# ---------------------------------------------------------------- models of others

# Runs what is inside as if no subclass of Tensor had rules of its own; None where there is no such thing.
without_subclasses = _private("torch._C:DisableTorchFunctionSubclass")

# (condition, message): lets an exported graph stop where the condition, a tensor, is false; None where none can.
assert_in_graph = _private("torch.ops:aten._assert_async.msg")

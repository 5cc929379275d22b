"""bf16 in Triton's interpreter, put right: there it is two bytes that numpy adds and multiplies as integers.

Values in bf16 stay the bits that the interpreter keeps. What computes with them gets fp32 or fp64 instead, and what
comes out is rounded once, to the nearest, ties to even, as compiled code does (`fma.rn.bf16`, `cvt.rn.bf16.f32`;
Triton's own interpreter cuts). Products of `tl.dot` are exact in fp32, and its sums are fp32's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import triton.language as tl

Array = np.ndarray[Any, Any]


def widened(bits: Array) -> Array:
    """fp32 of bf16's bits, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(x: Array) -> Array:
    """Bits of the nearest bf16 to fp32 or fp64 numbers, ties to even; a NaN stays one."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.asarray(x, np.float32)
    bits = near.view(np.uint32)
    if x.dtype == np.float64:  # rounded to fp32 first, as if to odd, for which the second rounding makes up
        with np.errstate(invalid="ignore"):
            missed = np.isfinite(near) & (near != x)
            too_far = missed & (np.abs(near) > np.abs(x))
        bits = np.where(missed, (bits - too_far.astype(np.uint32)) | np.uint32(1), bits)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(near), np.uint16(0x7FFF), bits.astype(np.uint16))


def added(a: Array, b: Array) -> Array:
    """a + b of fp64 numbers rounded to odd, which survives another rounding to a shorter format (Boldo and Melquiond
    2008): what the sum missed decides that one."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = a + b
        back = total - a
        missed = (a - (total - back)) + (b - back)
    missed = np.where(np.isfinite(missed), missed, 0)
    towards_zero = (missed != 0) & ((missed < 0) != (total < 0))
    return np.where(missed != 0, ((total.view(np.int64) - towards_zero) | 1).view(np.float64), total)


# ---- the interpreter's own methods, around which something is put

_METHODS = {
    "InterpreterBuilder": ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_clampf", "create_fma",
                           "create_erf", "create_rsqrt", "create_dot"),
    "ReduceScanOpInterface": ("apply",),
}  # fmt: skip
_mended: bool | None = None


def mend() -> bool:
    """Put bf16 right, once in a process; False if this version of Triton calls what is needed otherwise."""
    global _mended
    if _mended is None:
        _mended = _mend()
    return _mended


def _mend() -> bool:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return False
    classes = {name: getattr(interpreter, name, None) for name in (*_METHODS, "TensorHandle")}
    if any(not hasattr(classes[name], method) for name, methods in _METHODS.items() for method in methods):
        return False
    builder, reductions, handle = (
        classes["InterpreterBuilder"],
        classes["ReduceScanOpInterface"],
        classes["TensorHandle"],
    )
    assert builder is not None
    assert reductions is not None
    assert handle is not None
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast(getattr(builder, name), handle))
    builder.create_fma = _fused(builder.create_fma, handle)
    for name in ("binary_op", "unary_op", "create_clampf", "create_erf", "create_rsqrt"):
        setattr(builder, name, _computed(getattr(builder, name), handle))
    builder.create_dot = _dot(builder.create_dot, handle)
    builder.get_bf16 = lambda self, value: handle(rounded(np.array([value], np.float64)), tl.bfloat16)
    reductions.apply = _reduced(reductions.apply, handle)
    return True


def _is_bf16(handle: Any) -> bool:
    return getattr(handle, "dtype", None) is not None and handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any, dtype: Any, make: Any) -> Any:
    """The handle in fp32 or fp64, if it is bf16."""
    if not _is_bf16(handle):
        return handle
    return make(widened(handle.data).astype(np.float64 if dtype == tl.float64 else np.float32), dtype)


def _cast(original: Callable[..., Any], make: Any) -> Callable[..., Any]:
    """From bf16 by way of fp32, which has every one of them; to bf16 by one rounding of fp32 or fp64."""

    @wraps(original)
    def cast(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
        if _is_bf16(src):
            if dst_type.scalar == tl.bfloat16:
                return src
            src = _wide(src, tl.float32, make)
            return src if dst_type.scalar == tl.float32 else original(self, src, dst_type, *rest)
        if dst_type.scalar != tl.bfloat16:
            return original(self, src, dst_type, *rest)
        data = src.data if src.data.dtype in (np.float32, np.float64) else src.data.astype(np.float64)
        return make(rounded(data), tl.bfloat16)

    return cast


def _computed(original: Callable[..., Any], make: Any) -> Callable[..., Any]:
    """In fp64, which has products and all but exact sums, then rounded; a comparison stays one."""

    @wraps(original)
    def computed(self: Any, *args: Any) -> Any:
        if not any(_is_bf16(x) for x in args):
            return original(self, *args)
        found = original(self, *(_wide(x, tl.float64, make) for x in args))
        return found if found.data.dtype == bool else make(rounded(found.data.astype(np.float64)), tl.bfloat16)

    return computed


def _fused(original: Callable[..., Any], make: Any) -> Callable[..., Any]:
    """a b + c, rounded once: products are exact in fp64."""

    @wraps(original)
    def fma(self: Any, *args: Any) -> Any:
        if not any(_is_bf16(x) for x in args):
            return original(self, *args)
        a, b, c = (_wide(x, tl.float64, make).data.astype(np.float64) for x in args)
        return make(rounded(added(a * b, c)), tl.bfloat16)

    return fma


def _dot(original: Callable[..., Any], make: Any) -> Callable[..., Any]:
    @wraps(original)
    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, _wide(a, tl.float32, make), _wide(b, tl.float32, make), d, *rest)

    return dot


def _reduced(original: Callable[..., Any], make: Any) -> Callable[..., Any]:
    """Sums, extremes and scans in fp32, then rounded."""

    @wraps(original)
    def apply(self: Any, args: Any) -> Any:
        if not isinstance(args, tuple) or not any(_is_bf16(x.handle) for x in args):
            return original(self, args)
        narrow = [_is_bf16(x.handle) for x in args]
        wide = tuple(x.to(tl.float32) if is_narrow else x for x, is_narrow in zip(args, narrow, strict=True))
        found = original(self, wide)
        return tuple(
            x.to(tl.bfloat16) if i < len(narrow) and narrow[i] and x.handle.dtype.scalar == tl.float32 else x
            for i, x in enumerate(found)
        )

    return apply

"""Triton's interpreter without what it does again and again: the same numbers in less time.

Most of the time of an interpreted kernel goes into types and wrappers around NumPy's calls, which are small. Each
function here takes the place of one of Triton's, and makes what that makes. What a version of Triton calls otherwise
stays as slow as it is.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import triton.language as tl

core = tl.core


def hasten(interpreter: Any) -> None:
    """`interpreter` is `triton.runtime.interpreter`."""
    _look_types_up_once(interpreter)
    _search_packages_once(interpreter)
    _patch_once_a_launch(interpreter)
    _spare_checks_that_nothing_reads(interpreter)
    _make_shapes_once()
    semantic = type(getattr(interpreter, "interpreter_semantic", None))
    if hasattr(semantic, "binary_op_type_checking_impl"):
        semantic.binary_op_type_checking_impl = _equal_types(semantic.binary_op_type_checking_impl)


def _look_types_up_once(interpreter: Any) -> None:
    """For every type that it looks up it makes the table of types anew."""
    find, found = getattr(interpreter, "_get_np_dtype", None), {}
    if find is None:
        return

    def as_numpy(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    interpreter._get_np_dtype = as_numpy


def _search_packages_once(interpreter: Any) -> None:
    """At every launch it searches all of a package for what to patch."""
    patch, builtins = getattr(interpreter, "_patch_attr", None), {}
    is_builtin = getattr(core, "is_builtin", None)
    if not hasattr(interpreter, "_patch_builtin") or patch is None or is_builtin is None:
        return

    def patch_builtin(package: Any, *rest: Any) -> None:
        if id(package) not in builtins:
            builtins[id(package)] = [name for name in dir(package) if is_builtin(getattr(package, name))]
        for name in builtins[id(package)]:
            member = getattr(package, name)
            if is_builtin(member):
                patch(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


def _patch_once_a_launch(interpreter: Any) -> None:
    """At every call of a device function it patches what the kernel's start has patched."""
    patch, scope_type = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope_type is None:
        return
    languages: dict[Any, frozenset[int]] = {}
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        if fn not in languages:
            values = [v for v in fn.__globals__.values() if isinstance(v, ModuleType)]
            languages[fn] = frozenset(id(v) for v in values if v in (tl, core))
        if languages[fn] and languages[fn] <= patched:
            return scope_type()
        outermost = not patched
        scope = patch(fn)
        patched.update(languages[fn])
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_lang


def _spare_checks_that_nothing_reads(interpreter: Any) -> None:
    """Of every sum and product of integers it finds out whether 32 bits hold it, and asserts it in debug mode alone."""
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = replace(options, sanitize_overflow=False)


def _make_shapes_once() -> None:
    """For every type and every block it wraps the sizes anew, counts the elements and writes a name."""
    make_type, make_tensor, equal = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if type(shape) not in (list, tuple, core.tuple):
            return make_type(self, element_ty, shape)
        key = element_ty.name, *(size if type(size) is int else getattr(size, "value", size) for size in shape)
        if key in types:
            vars(self).update(types[key], element_ty=element_ty)
        else:
            make_type(self, element_ty, shape)
            self.sizes = key[1:]
            types[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = vars(type).get("sizes") if type.is_block() else ()
        if sizes in shapes:
            vars(self).update(shapes[sizes], handle=handle, type=type, dtype=type.scalar)
        else:
            make_tensor(self, handle, type)
            if sizes is not None:
                shapes[sizes] = {
                    name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")
                }

    def is_equal(self: Any, other: Any) -> bool:
        return self.name == other.name if type(other) is core.dtype else equal(self, other)

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    core.dtype.__eq__ = is_equal


def _equal_types(check: Any) -> Any:
    """Two operands of one type and shape are what they become, but for divisions of halves."""

    def checked(self: Any, lhs: Any, rhs: Any, *rest: Any, **options: Any) -> Any:
        if not rest[3:] and not options and isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor):
            ours, theirs = lhs.type, rhs.type
            if (ours is theirs or ours.name == theirs.name) and not ours.scalar.is_ptr():
                return lhs, rhs
        return check(self, lhs, rhs, *rest, **options)

    return checked

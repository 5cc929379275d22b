"""A function that a compiled kernel calls must not be replaced: Triton keeps what it compiled, and would ignore it.

Triton hashes a kernel with all that it calls, once, and finds compiled code by that hash, in the process and on disk. A
function that is replaced in its module afterwards has no effect on what is compiled, and what is compiled later is
filed under a wrong hash. In Triton's interpreter, which looks functions up as Python does, replacing works.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from . import interpreting

_COMPILED = not interpreting()


class _Called(NamedTuple):
    """A jitted function that another one calls, by its name among the globals."""

    namespace: dict[str, Any]
    name: str
    function: Any


# What each function calls, as it was when the first kernel that reaches it was launched: then Triton hashes it.
_calls: dict[Any, list[_Called]] = {}


def _calls_of(function: Any) -> list[_Called]:
    if function not in _calls:
        code, namespace = function.fn.__code__, function.fn.__globals__
        names = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
        found = ((name, namespace.get(name)) for name in names)
        _calls[function] = [_Called(namespace, name, f) for name, f in found if type(f) is type(function)]
    return _calls[function]


def _reached(function: Any) -> Iterator[_Called]:
    """What a function calls, and what that calls, each once."""
    seen, left = set(), [function]
    while left:
        for called in _calls_of(left.pop()):
            if (id(called.namespace), called.name) not in seen:
                seen.add((id(called.namespace), called.name))
                left.append(called.function)
                yield called


class Watch:
    """Holds a kernel, or a function of a user's that is compiled into one, to what it called at its first launch.

    A launch costs one look at each name, less than a microsecond for all of a kernel's.

    Raises:
        RuntimeError: when it is called, if one is another by now.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._groups: list[tuple[Callable[[Any], Any], dict[str, Any], Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Called before a launch, with its arguments."""
        if self._groups is None:
            self._groups = self._grouped()
        for get, namespace, functions in self._groups:
            try:
                same = get(namespace) == functions
            except KeyError:
                same = False
            if not same:
                self._refuse()

    def _grouped(self) -> list[tuple[Callable[[Any], Any], dict[str, Any], Any]]:
        """The names of each module together, so that one look gets them all."""
        modules: dict[int, list[_Called]] = {}
        for called in _reached(self.kernel):
            modules.setdefault(id(called.namespace), []).append(called)
        groups: list[tuple[Callable[[Any], Any], dict[str, Any], Any]] = []
        for found in modules.values():
            functions = tuple(called.function for called in found)
            get = itemgetter(*(called.name for called in found))
            groups.append((get, found[0].namespace, functions if len(found) > 1 else functions[0]))
        return groups

    def _refuse(self) -> None:
        for namespace, name, function in _reached(self.kernel):
            if namespace.get(name) is not function:
                raise RuntimeError(
                    f"{self.kernel.__name__}: `{name}` of {namespace.get('__name__')} was replaced after it had been "
                    f"compiled, and Triton keeps what it compiled; expected the function as it was. Replace it before "
                    f"the first launch of a kernel that calls it, or change a copy (docs/own_variant.md)"
                )


def guarded(kernel: Any) -> Any:
    """Above `@triton.jit`: launches of a kernel are refused when a function that it calls was replaced after the first.

    The kernel is as Triton made it, with one hook. Interpreted, it has none.
    """
    if _COMPILED:
        kernel.add_pre_run_hook(Watch(kernel))
    return kernel


_watched: dict[Any, Watch] = {}


def check_unchanged(function: Any) -> None:
    """The same of a function of a user's that is compiled into our kernels: before each launch."""
    if _COMPILED and function is not None:
        watch = _watched.get(function)
        if watch is None:
            watch = _watched[function] = Watch(function)
        watch()

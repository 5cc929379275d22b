"""Every launch of a call on tensors without values: the kernels, compiled for a target, and PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashgau import kernels, pytorch, sass, tables
from flashgau.ptx.footprint import Values
from flashgau.ptx.launch import passed
from flashgau.sass.model import MACHINES, Program, programs_on
from flashgau.tuning import compiler
from flashgau.tuning.ahead import table_of, target_of

from .clocks import Code


@dataclass(frozen=True)
class Kernel:
    """A launch of one of our kernels."""

    name: str
    grid: tuple[int, int, int]
    ptx: str = field(repr=False)
    code: Code = field(repr=False)
    values: Values = field(repr=False)
    configuration: str = ""

    @property
    def programs(self) -> int:
        """How many there are."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class PyTorch:
    """What PyTorch launches inside of a call: a product of the vendor's library, or something elementwise."""

    name: str
    flop: int  # of a product
    read: int
    written: int


@contextmanager
def recording(target: str) -> Iterator[list[Kernel | PyTorch]]:
    """Inside the block launches are compiled for a target, with its multiprocessors, and collected instead of run.

    Tensors lie on the device "meta"; integers whose values matter, such as positions, on the CPU.

    Raises:
        RuntimeError: if Triton interprets the kernels (TRITON_INTERPRET).
    """
    if kernels.interpreting():
        raise RuntimeError("recording: TRITON_INTERPRET=1 is set, so that Triton interprets kernels; expected it unset")
    found: list[Kernel | PyTorch] = []
    known: dict[int, tuple[Any, Code]] = {}

    def seen(name: str, compile: Callable[[], Any]) -> None:
        kernel = compile()
        if id(kernel) not in known:
            known[id(kernel)] = kernel, _code(target, kernel)
        taken = compile.func.__self__, compile.args, dict(compile.keywords)  # type: ignore[attr-defined]
        grid, values = passed(kernel, *taken)
        found.append(Kernel(name, grid, kernel.asm["ptx"], known[id(kernel)][1], values, _configuration(*taken)))

    before, kernels.executed.processors = kernels.executed.processors, MACHINES[target].sms
    in_table = tables.configured(tables.of_architecture(table_of(target)))
    try:
        with in_table, compiler.instead_of_launching(target, target_of(target), seen), _Watched(found):
            yield found
    finally:
        kernels.executed.processors = before


def _code(target: str, kernel: Any) -> Code:
    needs = compiler.needs(kernel)
    program = Program(needs.warps, needs.registers, needs.shared_bytes)
    loops = sass.inspect(target, needs.assembly, needs.ttgir, program)
    return Code(needs.warps, programs_on(MACHINES[target], program), loops, needs.registers, needs.shared_bytes)


def _configuration(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What the kernel was compiled for: constants, warps and stages."""
    taken = dict(zip(function.arg_names, args, strict=False)) | keywords
    constants = [p.name for p in function.params if p.is_constexpr]
    return ", ".join(f"{name}={taken[name]!r}" for name in [*constants, "num_warps", "num_stages"] if name in taken)


# What gives memory, or another view of it, and launches nothing.
_NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh")


class _Watched(pytorch.DispatchMode):
    """Notes each operation of PyTorch that launches something on a GPU."""

    def __init__(self, found: list[Kernel | PyTorch]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        inputs, outputs = list(_tensors(args)), list(_tensors(result))
        held = set(map(pytorch.memory_of, inputs))
        fresh = [x for x in outputs if pytorch.memory_of(x) not in held]
        written = fresh or (outputs if pytorch.writes(function) else [])
        if name in _NO_LAUNCH or not any(x.numel() for x in written):
            return result
        read = sum(x.numel() * x.element_size() for x in inputs)
        stored = sum(x.numel() * x.element_size() for x in written)
        if pytorch.writes(function) and name.startswith(("zero", "fill")):
            read = 0
        self.found.append(PyTorch(name, _flop(name, inputs, outputs), read, stored))
        return result


def _flop(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Of a product, whose factors are the last two arguments."""
    if name.rstrip("_") not in ("mm", "addmm", "bmm", "baddbmm"):
        return 0
    return 2 * outputs[0].numel() * inputs[-2].shape[-1]


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for one in x:
            yield from _tensors(one)
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))

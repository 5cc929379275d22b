"""`executing`: inside it, launches of Triton kernels on CPU tensors are compiled for a GPU and executed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashgau import kernels, tables
from flashgau.tuning import compiler
from flashgau.tuning.ahead import table_of, target_of

from .faults import UnknownInstruction
from .machine import LANES, Counts, Machine
from .memory import BASE, Global
from .numbers import Array, Freedom
from .program import Program

_FORMATS = {"i1": "i1", "u1": "u1", "i8": "i1", "u8": "u1", "i16": "i2", "u16": "u2", "i32": "i4", "u32": "u4",
            "s32": "i4", "b32": "u4", "i64": "i8", "u64": "u8", "s64": "i8", "b64": "u8", "fp16": "f2", "fp32": "f4",
            "f32": "f4", "fp64": "f8", "f64": "f8"}  # fmt: skip
DESCRIPTORS = "(descriptors)"  # the memory that Triton asks for, beside the parameters
prepared = lru_cache(maxsize=32)(Program)


@dataclass
class Launch:
    """One launch that was executed.

    Attributes:
        kernel: its name.
        grid: blocks along x, y and z.
        counts: what it did.
    """

    kernel: str
    grid: tuple[int, int, int]
    counts: Counts


@dataclass
class Execution:
    """What happened inside `executing`.

    Attributes:
        target: such as "sm_90".
        launches: in order.
    """

    target: str
    launches: list[Launch] = field(default_factory=list)

    @property
    def counts(self) -> Counts:
        """Of all launches together."""
        return sum((launch.counts for launch in self.launches), Counts())


@contextmanager
def executing(
    target: str = "sm_80",
    *,
    seed: int | None = None,
    descending: bool | None = None,
    budget: int = 1_000_000,
) -> Iterator[Execution]:
    """Inside the block every launch of a Triton kernel is compiled for `target`, and its PTX is executed on the CPU.

    Tensors lie on the CPU; what a kernel writes is in them when the launch returns, as on a GPU. It takes thousands of
    times as long as there, so inputs are to be small. What a kernel does wrong, even without a wrong result, is raised.

    Args:
        target: "sm_80", "sm_89" or "sm_90".
        seed: of the order in which warps run between barriers, and of the errors of approximate functions, within what
            PTX allows. None runs warps side by side and rounds those functions correctly.
        descending: the order in which matrix instructions add up products, in fp32: from the last (True) or the first
            (False); None leaves it to numpy.
        budget: basic blocks that a launch may execute before it counts as endless.

    Yields:
        What is executed: launches and their counts.

    Raises:
        RuntimeError: if Triton interprets the kernels (TRITON_INTERPRET).
        Fault: for an access outside of tensors or misaligned, a race, an early read, a barrier not reached, and what
            else `KINDS` lists, with kernel, line, thread and address.
        UnknownInstruction: for an instruction that is not executed here.
        ValueError: for a target that is no NVIDIA GPU.

    Example:
        >>> import torch, triton
        >>> import triton.language as tl
        >>> @triton.jit
        ... def twice(x, n, BLOCK: tl.constexpr):
        ...     o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ...     tl.store(x + o, 2 * tl.load(x + o, o < n), o < n)
        >>> x = torch.arange(100.0)
        >>> with executing("sm_90") as executed:                                   # doctest: +SKIP
        ...     twice[(1,)](x, 100, BLOCK=128)
        >>> executed.counts.read_bytes                                             # doctest: +SKIP
        400
    """
    if kernels.interpreting():
        raise RuntimeError("executing: TRITON_INTERPRET=1 is set, so that Triton interprets kernels; expected it unset")
    described = target_of(target)
    if described.backend != "cuda":
        raise ValueError(f"executing: `target` is {target!r}; expected an NVIDIA GPU, such as sm_80 or sm_90")
    execution = Execution(target)
    order = count(seed or 0)

    def execute(name: str, compile: Callable[[], Any]) -> None:
        kernel = compile()
        launch = compile.func.__self__, compile.args, dict(compile.keywords)  # type: ignore[attr-defined]
        freedom = Freedom(None if seed is None else next(order), descending)
        execution.launches.append(_execute(kernel, *launch, freedom, budget))

    outer, kernels.executed.target = kernels.executed.target, target
    in_table = tables.configured(tables.of_architecture(table_of(target)))
    try:
        with in_table, compiler.instead_of_launching(target, described, execute):
            yield execution
    finally:
        kernels.executed.target = outer


def _execute(
    kernel: Any, function: Any, args: tuple[Any, ...], keywords: dict[str, Any], freedom: Freedom, budget: int
) -> Launch:
    grid, named = passed(kernel, function, args, keywords)
    values = [value for values in named.values() for value in values]
    return _run(kernel.asm["ptx"], grid, values, kernel.metadata.shared, freedom, budget)


def passed(
    kernel: Any, function: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[int, int, int], dict[str, list[tuple[str, Any]]]]:
    """The grid of a launch, and by the names of its parameters the types and values that the compiled kernel gets."""
    name = function.__name__
    if getattr(kernel.metadata, "num_ctas", 1) != 1:
        raise UnknownInstruction(f"ptx: {name} runs in clusters, which is not executed")
    bound = _bound(function, args, keywords)
    grid = _grid(keywords["grid"], bound)
    values = {key: list(_flat(kind, bound.get(key), name)) for key, kind in kernel.src.signature.items()}
    if scratch := getattr(kernel.metadata, "global_scratch_size", 0):  # where tensor maps are made
        room = np.zeros(scratch * grid[0] * grid[1] * grid[2], np.uint8)
        values[DESCRIPTORS] = [("*", torch.from_numpy(room))]
    return grid, values


def run(
    ptx: str,
    grid: tuple[int, ...],
    *args: Any,
    shared_bytes: int = 0,
    seed: int | None = None,
    descending: bool | None = None,
    budget: int = 1_000_000,
) -> Launch:
    """Execute a kernel that is there as text, such as `asm["ptx"]` of what Triton compiled.

    Args:
        ptx: a module with one entry.
        grid: blocks along x, y and z.
        *args: one for each parameter: a tensor on the CPU, or a number. Parameters without one are 0.
        shared_bytes: of the extern array in shared memory, which a launch would say.
        seed: as `executing` takes it.
        descending: as `executing` takes it.
        budget: as `executing` takes it.

    Returns:
        What it did. Results are in the tensors.

    Raises:
        Fault, UnknownInstruction: as `executing`.
        ValueError: if the text has no entry, or there are more arguments than parameters.

    Example:
        >>> import torch
        >>> ptx = '''
        ... .version 8.0
        ... .target sm_80
        ... .visible .entry one(.param .u64 x) .reqntid 32 {
        ...   .reg .b64 %rd<3>; .reg .b32 %r<2>;
        ...   ld.param.b64 %rd1, [x];
        ...   mov.u32 %r1, %tid.x;
        ...   mad.wide.u32 %rd2, %r1, 4, %rd1;
        ...   st.global.b32 [%rd2], %r1;
        ...   ret;
        ... }
        ... '''
        >>> x = torch.zeros(32, dtype=torch.int32)
        >>> run(ptx, (1,), x).counts.written_bytes, int(x.sum())
        (128, 496)
    """
    parameters = prepared(ptx).kernel.parameters
    if len(args) > len(parameters):
        raise ValueError(f"run: {len(args)} arguments were given; expected at most the {len(parameters)} of the kernel")
    values = [("*" if isinstance(x, Tensor) else p.kind, x) for p, x in zip(parameters, args, strict=False)]
    return _run(ptx, _grid(grid, {}), values, shared_bytes, Freedom(seed, descending), budget)


def _run(
    ptx: str, grid: tuple[int, int, int], values: list[tuple[str, Any]], shared: int, freedom: Freedom, budget: int
) -> Launch:
    """A launch with these types and values of parameters."""
    program = prepared(ptx)
    memory, parameters = _memory(program, values)
    counts = Counts()
    blocks = np.arange(grid[0] * grid[1] * grid[2])
    generator = None if freedom.seed is None else np.random.default_rng(freedom.seed)
    if generator is not None:
        blocks = generator.permutation(blocks)
    at_once = max(1, LANES // program.kernel.threads)
    for first in range(0, len(blocks), at_once):
        some = blocks[first : first + at_once]
        machine = Machine(program, memory, parameters, some, grid, shared, freedom, generator, budget)
        machine.run()
        counts += machine.counts()
    counts.read_bytes, counts.written_bytes = memory.read_bytes, memory.written_bytes
    counts.distinct_read_bytes = memory.distinct_read_bytes
    counts.distinct_written_bytes = memory.distinct_written_bytes
    _write_back(memory, values)
    return Launch(program.kernel.name, grid, counts)


def _bound(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults included."""
    bound = {p.name: p.default for p in function.params if p.has_default}
    bound |= dict(zip(function.arg_names, args, strict=False))
    return bound | {name: x for name, x in keywords.items() if name in function.arg_names}


def _grid(grid: Any, bound: dict[str, Any]) -> tuple[int, int, int]:
    sizes = grid(bound) if callable(grid) else grid
    x, y, z = (*(int(n) for n in sizes), 1, 1)[:3]
    return x, y, z


def _flat(kind: Any, value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What is passed: types and values, tuples taken apart, constants left out."""
    if isinstance(kind, tuple):
        for one, x in zip(kind, value, strict=True):
            yield from _flat(one, x, name)
    elif kind == "constexpr":
        return
    elif kind.startswith("*") or kind in _FORMATS:
        yield kind, value
    else:
        raise UnknownInstruction(f"ptx: {name} takes a {kind}, which is not executed")


def _storages(values: list[tuple[str, Any]]) -> dict[int, Any]:
    """Of the tensors that are passed, by address."""
    storages = (x.untyped_storage() for _, x in values if isinstance(x, Tensor))
    return {s.data_ptr(): s for s in storages}


def _memory(program: Program, values: list[tuple[str, Any]]) -> tuple[Global, Array]:
    """Copies of the tensors, and the parameter space with their addresses."""
    storages = _storages(values)
    memory = Global([s.nbytes() for s in storages.values()], program.global_granule)
    starts = dict(zip(storages, memory.starts, strict=True))
    for pointer, storage in storages.items():
        memory.bytes[starts[pointer] : starts[pointer] + storage.nbytes()] = stored_bytes(storage).numpy()

    def address(x: Tensor) -> int:
        first = starts[x.untyped_storage().data_ptr()] + int(x.storage_offset()) * x.element_size()
        memory.allow(first, first + _span(x))
        return BASE + first

    return memory, parameter_space(program, values, address)


def parameter_space(program: Program, values: list[tuple[str, Any]], address: Callable[[Any], int]) -> Array:
    """The bytes that a kernel reads its parameters from."""
    end = max((p.offset + p.size for p in program.kernel.parameters), default=0)
    parameters = np.zeros(end, np.uint8)
    for parameter, (kind, value) in zip(program.kernel.parameters, values, strict=False):
        if kind.startswith("*"):
            scalar: Any = np.uint64(0 if value is None else address(value))
        else:
            scalar = np.dtype(_FORMATS[kind]).type(value)
        raw = np.frombuffer(scalar.tobytes(), np.uint8)[: parameter.size]
        parameters[parameter.offset : parameter.offset + len(raw)] = raw
    return parameters


def _span(x: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    if x.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


def stored_bytes(storage: Any) -> Tensor:
    """What a storage holds."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _write_back(memory: Global, values: list[tuple[str, Any]]) -> None:
    """What the kernel wrote, into the tensors."""
    for start, storage in zip(memory.starts, _storages(values).values(), strict=True):
        stored_bytes(storage).copy_(torch.from_numpy(memory.bytes[start : start + storage.nbytes()]))

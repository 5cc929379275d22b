"""Compile kernels for GPUs that are not there, and read from the result what it will need of them.

A launcher is run on tensors without storage ("meta"), while Triton is told that the device is the target: so exactly
the kernels that a call would launch are compiled, with the specialisation that the call would cause.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing import active_children, get_context
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from flashgau import tables
from flashgau.extras import MissingExtra, wheel
from flashgau.kernels import common
from flashgau.tables.config import Config
from flashgau.tables.table import Key

from . import compiler
from .shipped import DTYPES, ENTRIES, CallShape, Operands

if TYPE_CHECKING:
    from flashgau.sass import HotLoop

# Shared memory that one program may take, in bytes, by compute capability (CUDA programming guide).
SHARED_BYTES = {75: 65_536, 80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448,
                103: 232_448, 110: 232_448, 120: 101_376, 121: 101_376}  # fmt: skip
_AMD_SHARED_BYTES = 65_536  # LDS

# What the matrix units' instructions are called in assembly: Hopper's HGMMA, Blackwell's UTC*MMA, all NVIDIA's HMMA.
MATRIX_INSTRUCTIONS = r"\b(?:UTC\w*MMA|HGMMA|HMMA|v_mfma)"

# Loads and stores of 16 bytes and more.
VECTOR_LOADS = r"\b(?:LDG\.E\.(?:ENL2\.)?(?:128|256)|(?:global|buffer)_load_dwordx4)"
VECTOR_STORES = r"\b(?:STG\.E\.(?:ENL2\.)?(?:128|256)|(?:global|buffer)_store_dwordx4)"


def target_of(name: str) -> compiler.GPUTarget:
    """Triton's description of "sm_90", "gfx942" and the like.

    Raises:
        ValueError: for a name that is none.
    """
    if match := re.fullmatch(r"sm_(\d+)", name):
        return compiler.GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx\w+", name):
        return compiler.GPUTarget("hip", name, 64)
    raise ValueError(f"compile: `target` is {name!r}; expected a name such as sm_80, sm_90 or gfx942")


def shared_bytes_of(target: str) -> int:
    """Shared memory that one program may take on a target; of an unknown one, what the smallest known has."""
    known = target_of(target)
    return SHARED_BYTES.get(known.arch, 65_536) if known.backend == "cuda" else _AMD_SHARED_BYTES


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one target, and whether that will do."""

    kernel: str
    target: str
    registers: int
    spills: int  # instructions that move registers to memory and back
    shared_bytes: int
    matrix: frozenset[str]  # its matrix instructions
    vectors: bool  # whether it loads and stores 16 bytes at a time
    loops: tuple[HotLoop, ...] | None = ()  # those that hold its products; None if flashgau-instruments is missing

    @property
    def hot_spills(self) -> int:
        """Spills that are paid for in every iteration: those inside hot loops; of a kernel without any, all.

        Where nothing that finds loops is installed, none of a kernel with matrix instructions: nobody knows which of
        `spills` they are.
        """
        if self.loops is None and self.matrix:
            return 0
        return sum(loop.spills for loop in self.loops if loop.mask_free) if self.loops else self.spills

    def problem(self, wanted: str | None, *, spills: bool = True, vectors: bool = False) -> str | None:
        """Why it should not be shipped, if it should not.

        `wanted` is the start of a matrix instruction that it must have; `spills`, whether registers must suffice
        where it is hot: between the products of a loop (outside loops a spill costs next to nothing), or everywhere if
        it has no such loop; `vectors`, whether its loads and stores must be of 16 bytes.
        """
        limit = shared_bytes_of(self.target)
        if self.shared_bytes > limit:
            return f"{self.shared_bytes} bytes of shared memory, the device has {limit}"
        if self.hot_spills and spills:
            return f"{self.hot_spills} spill instructions" + (" in a hot loop" if self.loops else "")
        if wanted is not None and not any(name.startswith(wanted) for name in self.matrix):
            return f"no matrix instruction {wanted}"
        if vectors and not self.vectors:
            return "no loads or stores of 16 bytes"
        return None


@contextmanager
def compiling_for(target: str, only: str | None = None) -> Iterator[list[Compiled]]:
    """Inside the block every launch (or those of kernel `only`) compiles for `target`, and nothing runs.

    The list collects what the kernels need. What is given no configuration has that of the table that serves the
    target.

    Raises:
        RuntimeError: if Triton interprets the kernels (TRITON_INTERPRET).

    Example:
        >>> import torch
        >>> from flashgau.kernels.attention import attention_forward
        >>> q = torch.empty(1, 8, 1024, 64, dtype=torch.bfloat16, device="meta")
        >>> config = Config(block_m=64, block_n=64, num_warps=4, num_stages=2)
        >>> with compiling_for("sm_80") as compiled:                               # doctest: +SKIP
        ...     _ = attention_forward(q, q, q, causal=True, config=config)
        >>> compiled[0].spills                                                     # doctest: +SKIP
        0
    """
    if not compiler.is_compiled(common.tanh):
        raise RuntimeError(
            "compiling_for: TRITON_INTERPRET=1 was set when the kernels were imported, so that Triton interprets them; "
            "expected a process without it: unset TRITON_INTERPRET"
        )
    found: list[Compiled] = []
    inspected: dict[Any, Compiled] = {}  # Triton gives the same object to launches that share a kernel

    def compile_only(kernel: str, compile: Callable[[], Any]) -> None:
        if only not in (None, kernel):
            return
        result = compile()
        if result not in inspected:
            inspected[result] = _inspect(kernel, target, result)
        found.append(inspected[result])

    in_table = tables.configured(tables.of_architecture(table_of(target)))
    with in_table, compiler.instead_of_launching(target, target_of(target), compile_only):
        yield found


def _inspect(name: str, target: str, kernel: Any) -> Compiled:
    needs = compiler.needs(kernel)
    matrix = frozenset(re.findall(MATRIX_INSTRUCTIONS, needs.assembly))
    vectors = bool(re.search(VECTOR_LOADS, needs.assembly) and re.search(VECTOR_STORES, needs.assembly))
    loops = _loops(target, needs)
    return Compiled(name, target, needs.registers, needs.spills, needs.shared_bytes, matrix, vectors, loops)


def _loops(target: str, needs: compiler.Needs) -> tuple[HotLoop, ...] | None:
    """A kernel's hot loops; None without flashgau-instruments, which finds them."""
    try:
        with wheel("instruments"):
            from flashgau.sass import Program, inspect
    except MissingExtra:
        return None
    return inspect(target, needs.assembly, needs.ttgir, Program(needs.warps, needs.registers, needs.shared_bytes))


# ---- everything that is shipped ----


@dataclass(frozen=True)
class Row:
    """One kernel in one shipped configuration for one target, as `flashgau compile` reports it."""

    op: str
    kernel: str
    dtype: str
    shape: str
    configuration: dict[str, int]
    target: str
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    tensor_core: bool = False
    ok: bool = False
    reason: str | None = None
    entry: str = ""  # of the tables, without "_few_rows"
    loops: tuple[HotLoop, ...] | None = ()  # the hot ones of each way in which the call compiles the kernel, or None


@dataclass(frozen=True)
class Job:
    """One kernel to compile: what `flashgau compile` and `flashgau tune` cut their work into."""

    target: str
    entry: str  # of the tables
    dtype: str
    width: int
    kind: str  # of the entry's
    config: Config | None = None  # of this kernel; None for that of the architecture's table
    shape: CallShape = field(default_factory=CallShape)  # of the call that is compiled

    @property
    def exact_width(self) -> int:
        """Of a head of the call: that of its shape, else the entry's; 0 for a kernel without heads."""
        return self.shape.width if self.width and self.shape.width else self.width

    @property
    def key(self) -> Key:
        """Where the configuration stands in a table."""
        name = self.entry.removesuffix("_few_rows")
        return Key(name, DTYPES[self.dtype].itemsize, self.width, few_rows=name != self.entry)


def jobs(targets: list[str], shape: CallShape = CallShape()) -> list[Job]:  # noqa: B008
    """Every kernel in every shipped configuration, of the targets' tables and of GPUs that are such targets.

    Args:
        targets: such as "sm_90".
        shape: of the calls.

    Raises:
        ValueError: for a target that is none.
    """
    for target in targets:
        target_of(target)
    gpus = tables.shipped_gpus()
    found = []
    for target in targets:
        for name, entry in ENTRIES.items():
            for width, (dtype, kinds) in product(entry.widths, entry.kinds.items()):
                for kind in kinds:
                    job = Job(target, name, dtype, width, kind, shape=shape)
                    own = [gpu.config(job.key) for gpu in gpus if gpu.architecture == target]
                    # What goes through all options has the configuration of the architecture's table.
                    measured = [c for c in own if c is not None and kind != "all options"]
                    found += [job, *(replace(job, config=c) for c in measured)]
    return list(dict.fromkeys(found))


def table_of(target: str) -> str:
    """The architecture whose table serves a target, as `tables.architecture` would choose on that device."""
    known = target_of(target)
    return tables.table_for(known.arch // 10, shared_bytes_of(target)) if known.backend == "cuda" else "gfx942"


def compile_one(job: Job) -> Row:
    """Compile one kernel; what goes wrong is the row's reason."""
    entry, row = ENTRIES[job.entry], _row(job)

    def choose(kernel: str, x: Tensor, width: int, **traits: Any) -> Config:
        config = tables.of_architecture(table_of(job.target))(kernel, x, width, **traits)
        if job.key.kernel == kernel:
            config = job.config or config
            row.keywords["configuration"] = asdict(config)
        return config

    try:
        with compiling_for(job.target, only=entry.kernel) as found, tables.configured(choose):
            entry.call(job.kind, job.exact_width, Operands(DTYPES[job.dtype], shape=job.shape))
    except Exception as error:  # a compiler fails in its own ways, each of which is a row that is not ok
        return row(reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if not found:
        return row(reason="a call of this shape never starts the kernel")
    needs = max(
        found, key=lambda c: (c.hot_spills, c.spills, c.shared_bytes, c.registers)
    )  # where a kernel serves two purposes
    may_spill = job.dtype == "fp32" or job.kind == "all options"
    reason = needs.problem(_wanted(job), spills=not may_spill, vectors=entry.vectors)
    return row(
        registers=needs.registers, spills=needs.spills, shared_bytes=needs.shared_bytes,
        tensor_core=bool(needs.matrix), ok=reason is None, reason=reason,
        loops=None if needs.loops is None
        else tuple(loop for one in {id(c): c for c in found}.values() for loop in one.loops or ()),
    )  # fmt: skip


def _wanted(job: Job) -> str | None:
    """How a matrix instruction begins that a kernel must have; "" for any."""
    matrix = ENTRIES[job.entry].matrix
    if matrix is None or job.dtype == "fp32":  # IEEE products
        return None
    if job.kind == "all options" or job.dtype not in ENTRIES[job.entry].large:
        return ""
    return matrix.get(table_of(job.target), "")


def compile_all(work: list[Job], processes: int | None = None) -> Iterator[Row]:
    """Compile in parallel; rows come as they are done."""
    return (row for _, row in compile_each(work, processes))


def compile_each(work: list[Job], processes: int | None = None) -> Iterator[tuple[Job, Row]]:
    """Compile in parallel; jobs and their rows come as they are done. What crashes the compiler is not ok."""
    return in_processes(compile_one, lambda job: _row(job)(reason="the compiler crashed"), work, processes)


Work = TypeVar("Work", bound=Hashable)
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Work], Result], crashed: Callable[[Work], Result], work: list[Work], processes: int | None
) -> Iterator[tuple[Work, Result]]:
    """Run in parallel, in processes that compile kernels even if this one interprets them; what is done comes as it is.

    What takes a process down has `crashed` as its result.
    """
    left = dict.fromkeys(work)
    for one, result in _until_a_crash(function, work, processes or os.cpu_count() or 1):
        del left[one]
        yield one, result
    for one in left:  # a crash took the pool down: each of the rest on its own
        yield next(_until_a_crash(function, [one], 1), (one, crashed(one)))


def _until_a_crash(
    function: Callable[[Work], Result], work: list[Work], processes: int
) -> Iterator[tuple[Work, Result]]:
    # Ctrl-C reaches every process of a terminal; the one that waits for them ends the work.
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    others = set(active_children())
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=ignore) as pool:
        with _not_interpreting():  # the processes start while work is submitted
            waiting = {pool.submit(function, one): one for one in work}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BrokenProcessPool:
            return
        except (KeyboardInterrupt, GeneratorExit):  # nobody waits for what is being done
            for process in set(active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _not_interpreting() -> Iterator[None]:
    """Inside, a process that starts compiles kernels, whatever this one does."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


def _row(job: Job) -> partial[Row]:
    """The row of a job, without its results."""
    few = ["few rows"] if job.key.few_rows else []
    shape = ", ".join([*([f"D={job.exact_width}"] if job.width else []), *few, job.kind])
    kernel, name = ENTRIES[job.entry].kernel, job.key.kernel
    return partial(
        Row, op=op_of(job.entry), kernel=kernel, dtype=job.dtype, shape=shape, configuration={}, target=job.target,
        entry=name,
    )  # fmt: skip


def op_of(entry: str) -> str:
    """The operation that an entry's kernel belongs to; "projection", "heads" and "norm" are a layer's, "derivatives"
    are tangents and second derivatives of any attention.

    Example:
        >>> op_of("gau_dq"), op_of("glu_linear_few_rows")
        ('gau_attention', 'glu_linear')
    """
    ops = {"attention": "attention", "glu_linear": "glu_linear", "glu": "glu", "gau": "gau_attention",
           "mixed_chunk_step": "mixed_chunk_step", "mixed_chunk": "mixed_chunk_attention",
           "projection": "projection", "heads": "heads", "norm": "norm",
           "tangent": "derivatives", "second": "derivatives"}  # fmt: skip
    return next(op for prefix, op in ops.items() if entry.startswith(prefix))


def target_here(device: torch.device) -> str:
    """What a device is called as a target. One without limits of its own, the interpreter, is held to sm_80's."""
    if device.type != "cuda":
        return "sm_80"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"

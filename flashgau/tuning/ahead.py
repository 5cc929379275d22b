"""Compile kernels for GPUs that are not there, and read from the result what it will need of them.

A launcher is run on tensors without storage ("meta"), while Triton is told that the device is the target: so exactly
the kernels that a call would launch are compiled, with the specialisation that the call would cause.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flashgau.kernels import attention
from flashgau.kernels.common import Config

from . import lookup, table_for

# Shared memory that one program may take, in bytes, by compute capability (CUDA programming guide).
SHARED_BYTES = {75: 65_536, 80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448,
                103: 232_448, 110: 232_448, 120: 101_376, 121: 101_376}  # fmt: skip
_AMD_SHARED_BYTES = 65_536  # LDS

# What the matrix units' instructions are called in assembly: Hopper's HGMMA, Blackwell's UTC*MMA, all NVIDIA's HMMA.
MATRIX_INSTRUCTIONS = r"\b(?:UTC\w*MMA|HGMMA|HMMA|v_mfma)"

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = (64, 128, 256)
_MASKS = {  # what is compiled in each dtype; fp16 and bf16 differ in the names of instructions only
    "fp16": ("full", "causal"),
    "bf16": ("full", "causal", "all options"),
    "fp32": ("causal", "all options"),
}


def target_of(name: str) -> GPUTarget:
    """Triton's description of "sm_90", "gfx942" and the like.

    Raises:
        ValueError: for a name that is none.
    """
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx\w+", name):
        return GPUTarget("hip", name, 64)
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

    def problem(self, wanted: str | None, *, spills: bool = True) -> str | None:
        """Why it should not be shipped, if it should not.

        `wanted` is the start of a matrix instruction that it must have; `spills`, whether registers must suffice.
        """
        limit = shared_bytes_of(self.target)
        if self.shared_bytes > limit:
            return f"{self.shared_bytes} bytes of shared memory, the device has {limit}"
        if self.spills and spills:
            return f"{self.spills} spill instructions"
        if wanted is not None and not any(name.startswith(wanted) for name in self.matrix):
            return f"no matrix instruction {wanted}"
        return None


class _Absent:
    """Stands for a GPU that is not there, as far as compiling asks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return target_of(self.name)

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextmanager
def compiling_for(target: str, only: str | None = None) -> Iterator[list[Compiled]]:
    """Inside the block every launch (or those of kernel `only`) compiles for `target`, and nothing runs.

    The list collects what the kernels need. Triton must not be interpreting (TRITON_INTERPRET).

    Example:
        >>> import torch
        >>> from flashgau.kernels.attention import attention_forward
        >>> q = torch.empty(1, 8, 1024, 64, dtype=torch.bfloat16, device="meta")
        >>> config = Config(block_m=64, block_n=64, num_warps=4, num_stages=2)
        >>> with compiling_for("sm_80") as compiled:                               # doctest: +SKIP
        ...     _ = attention_forward(q, q, q, scale=0.125, window=(None, 0), choose=lambda *a, **k: config)
        >>> compiled[0].spills                                                     # doctest: +SKIP
        0
    """
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if only not in (None, kernel.__name__):
            return None
        result = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        found.append(_inspect(kernel.__name__, target, result))
        return result

    before = driver._active
    driver.set_active(_Absent(target))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield found
    finally:
        driver._active = before


def _inspect(name: str, target: str, kernel: Any) -> Compiled:
    assembly, registers, spills = _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)
    matrix = frozenset(re.findall(MATRIX_INSTRUCTIONS, assembly))
    return Compiled(name, target, registers, spills, kernel.metadata.shared, matrix)


def _nvidia(kernel: Any) -> tuple[str, int, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)), default=0)
    return sass, registers, len(re.findall(r"\b(?:STL|LDL)\b", sass))


def _amd(kernel: Any) -> tuple[str, int, int]:
    # A scalar register that is "spilled" goes to a lane of a vector register, not to memory: those are not counted.
    assembly = kernel.asm["amdgcn"]
    registers, spills = (
        max(map(int, re.findall(rf"\.{key}:\s+(\d+)", assembly)), default=0)
        for key in ("vgpr_count", "vgpr_spill_count")
    )
    return assembly, registers, spills


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


@dataclass(frozen=True)
class Job:
    """One kernel to compile: what `flashgau compile` cuts its work into."""

    target: str
    entry: str  # of the tables
    dtype: str
    width: int
    masks: str  # "full", "causal", or "all options"


def jobs(targets: list[str]) -> list[Job]:
    """Every kernel in every shipped configuration.

    Raises:
        ValueError: for a target that is none.
    """
    for target in targets:
        target_of(target)
    return [
        Job(target, entry, dtype, width, masks)
        for target in targets
        for entry in _CALLS
        for width in WIDTHS
        for dtype, kinds in _MASKS.items()
        for masks in kinds
    ]


def table_of(target: str) -> str:
    """The architecture whose table serves a target, as `tuning.architecture` would choose on that device."""
    known = target_of(target)
    return table_for(known.arch // 10, shared_bytes_of(target)) if known.backend == "cuda" else "gfx942"


def compile_one(job: Job) -> Row:
    """Compile one kernel; what goes wrong is the row's reason."""
    call, kernel = _CALLS[job.entry]
    row = _row(job)
    try:
        with compiling_for(job.target, only=kernel) as found:
            call(job, DTYPES[job.dtype], partial(_chosen, table_of(job.target)))
    except Exception as error:  # a compiler fails in its own ways, each of which is a row that is not ok
        return row(reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    (needs,) = found
    reason = needs.problem(_wanted(job), spills=job.dtype != "fp32" and job.masks != "all options")
    return row(needs.registers, needs.spills, needs.shared_bytes, bool(needs.matrix), reason is None, reason)


def _wanted(job: Job) -> str | None:
    """How a matrix instruction begins that a kernel must have; "" for any."""
    if job.dtype == "fp32":
        return None  # IEEE products
    if job.entry in ("attention_forward", "attention_dq", "attention_dkv") and job.masks != "all options":
        return {"sm_90": "HGMMA", "sm_100": "UTC"}.get(table_of(job.target), "")
    return ""  # too few rows for the instructions of 64


def compile_all(work: list[Job], processes: int | None = None) -> Iterator[Row]:
    """Compile in parallel; rows come as they are done. A job that crashes the compiler is a row that is not ok."""
    interpreting = os.environ.pop("TRITON_INTERPRET", None)  # the workers must not, and they start from this
    try:
        left = set(work)
        for row, job in _in_processes(work, processes or os.cpu_count() or 1):
            left.discard(job)
            yield row
        for job in sorted(left, key=work.index):  # a crash took the pool down: each of the rest on its own
            alone = [row for row, _ in _in_processes([job], 1)]
            yield alone[0] if alone else _row(job)(reason="the compiler crashed")
    finally:
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


def _in_processes(work: list[Job], processes: int) -> Iterator[tuple[Row, Job]]:
    """Rows of the jobs that end before a process dies."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(compile_one, job): job for job in work}
        try:
            for done in as_completed(waiting):
                yield done.result(), waiting[done]
        except BrokenProcessPool:
            return
        finally:
            pool.shutdown(cancel_futures=True)


def _row(job: Job) -> Callable[..., Row]:
    """The row of a job, without its results."""
    kernel, options = _CALLS[job.entry][1], job.masks == "all options"
    entry = job.entry.removesuffix("_few_rows")
    few = entry != job.entry
    config = lookup(table_of(job.target), entry, DTYPES[job.dtype].itemsize, job.width, 1 if few else None, options)
    shape = ", ".join([f"D={job.width}", *(["few rows"] if few else []), job.masks])
    return partial(Row, entry.split("_")[0], kernel, job.dtype, shape, asdict(config), job.target)


def _chosen(arch: str, kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False) -> Config:
    return lookup(arch, kernel, x.element_size(), width, rows, options)


def _attention(
    backward: bool, queries: int, biased: bool, job: Job, dtype: torch.dtype, choose: Callable[..., Config]
) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    length, fp32 = 16384, torch.float32
    options: dict[str, Any] = {"scale": 0.1, "window": (None, None if job.masks == "full" else 0), "choose": choose}
    if job.masks == "all options":
        options |= {"window": (64, 64), "softcap": 5.0, "dropout_p": 0.1, "sinks": empty(8, dtype=fp32)}
        options |= {"dropout_seed": empty(1, dtype=torch.int64), "lengths": empty(1, dtype=torch.int32)}
    if biased or job.masks == "all options":
        options["rel_bias"] = empty(1, 8, 2 * length - 1, dtype=fp32)
    q, k = empty(1, 8, queries, job.width), empty(1, 8, length, job.width)
    if backward:
        attention.attention_backward(q, None, q, k, k, q, empty(1, 8, queries, dtype=fp32), **options)
    else:
        attention.attention_forward(q, k, k, **options)


# What to call, and the kernel that matters there.
_CALLS: dict[str, tuple[Callable[..., None], str]] = {
    "attention_forward": (partial(_attention, False, 16384, False), "forward_kernel"),
    "attention_forward_few_rows": (partial(_attention, False, 1, False), "forward_kernel"),
    "attention_dq": (partial(_attention, True, 16384, False), "dq_kernel"),
    "attention_dkv": (partial(_attention, True, 16384, False), "dkv_kernel"),
    "attention_dbias": (partial(_attention, True, 16384, True), "dbias_kernel"),
}

"""Cases whose kernels are compiled for GPUs that need not be there, and executed on this machine (`flashgau.ptx`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from flashgau import tables
from flashgau.ops import dispatch
from flashgau.ptx import executing
from flashgau.tables.config import Choose, Config
from flashgau.tuning.ahead import in_processes, op_of, table_of, target_of
from flashgau.verification.cases import CheckCase, all_cases
from flashgau.verification.checking import Row, held_row
from flashgau.verification.configurations import Configured, case_of, is_asked, with_beside

DTYPES = ("bfloat16", "float16", "float32")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """One case on one target: what a process is given, which makes the list of cases anew."""

    target: str
    op: str | None
    dtype: str | None
    quick: bool
    number: int

    @property
    def case(self) -> CheckCase:
        """What is held."""
        return cases(self.target, self.op, self.dtype, self.quick)[self.number]


@lru_cache(maxsize=8)
def cases(target: str, op: str | None, dtype: str | None, quick: bool) -> tuple[CheckCase, ...]:
    """Every kernel in every configuration that is shipped for a target, and every operation with every option.

    Options are tried in blocks that small shapes cross, which compile in a fraction of the time of the shipped ones.
    Quick: every kernel once, in bf16. The operations `projection`, `heads` and `norm` are a layer's and come
    with `gau_attention`, `derivatives` with `attention`.
    """
    found: list[CheckCase] = []
    kernels: set[tuple[str, bool]] = set()
    table = tables.shipped_table(table_of(target))
    for key in table.entries:
        if op is not None and op_of(key.kernel) not in with_beside([op]):
            continue
        if quick and (key.itemsize == 4 or (key.kernel, key.few_rows) in kernels):
            continue
        kernels.add((key.kernel, key.few_rows))
        config = table.config(key)
        assert config is not None
        for name in ("float32",) if key.itemsize == 4 else ("bfloat16",) if quick else ("bfloat16", "float16"):
            # Beside fp16 some kernels work on weights in fp32. Weights of chunks are kept of long ones alone.
            if name != "float16" or is_asked(key, fp16=True):
                found.append(case_of(key, config, name, small=key.kernel != "mixed_chunk_weights"))
    if not quick:
        found += [case for case in all_cases(op, thorough=False) if case.dtype in DTYPES]
    return tuple(case for case in found if dtype in (None, case.dtype))


def tasks(targets: list[str], op: str | None, dtype: str | None, quick: bool) -> list[Task]:
    """Everything that is held.

    Raises:
        ValueError: for a target that is not executed, and if nothing is left to hold.
        RuntimeError: if Triton cannot compile.
    """
    if reason := dispatch.unfit_triton(interpreting=False):
        raise RuntimeError(reason)
    for target in targets:
        known = target_of(target)
        if known.backend != "cuda" or known.arch > 90:
            raise ValueError(f"execute: `target` is {target!r}; expected NVIDIA GPUs up to sm_90, such as sm_80")
    found = [
        Task(target, op, dtype, quick, number)
        for target in targets
        for number in range(len(cases(target, op, dtype, quick)))
    ]
    if not found:
        raise ValueError(f"execute: there is no case of {op or 'any operation'} in {dtype}")
    return found


def _small(target: str) -> Choose:
    """Blocks of 64 rows, which Hopper's products of warpgroups need, and few columns."""

    def small(kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False) -> Config:
        few = rows is not None and rows <= tables.FEW_ROWS
        if kernel.endswith("_dbias"):  # whose blocks are square
            return Config(32, 32, 4, 2)
        columns = 32 if kernel.startswith("attention") else 64
        return Config(16 if few else 64, columns, 4, 2, block_k=32, asynchronous=target == "sm_90" and not few)

    return small


def execute(task: Task) -> Row:
    """Hold one case to the fp64 reference: its kernels are compiled, and executed."""
    case = task.case
    torch.set_num_threads(1)  # processes run beside each other
    blocks = nullcontext() if isinstance(case, Configured) else tables.configured(_small(task.target))
    with executing(task.target) as executed, blocks:
        row = held_row(case, "triton", _CPU, seed=0)
    counts = executed.counts
    plain = {**asdict(counts), "instructions": dict(counts.instructions), "launches": len(executed.launches)}
    return replace(row, backend=f"triton, {task.target}", counts=plain)


def execute_all(work: list[Task], processes: int | None = None) -> Iterator[tuple[Task, Row]]:
    """In parallel; rows come as they are done."""
    return in_processes(execute, _crashed, work, processes)


def _crashed(task: Task) -> Row:
    case = task.case
    backend = f"triton, {task.target}"
    return Row(case.op, case.options, case.shape, case.dtype, backend, "error", detail="the process crashed")

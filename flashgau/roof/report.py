"""The rows of the table: a call of an operation at a stated size, launch by launch and in sum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashgau.ptx import footprint
from flashgau.ptx.footprint import Touched
from flashgau.sass.model import MACHINES
from flashgau.tuning.ahead import in_processes, target_of
from flashgau.tuning.shipped import DTYPES

from . import clocks
from .cases import Case, cases, operands
from .launches import Kernel, PyTorch, recording

_SERIES = 3  # launches of a kernel whose addresses are executed; those between are interpolated


@dataclass(frozen=True)
class Task:
    """One row to make."""

    target: str
    dtype: str
    case: str

    @property
    def what(self) -> Case:
        """The call."""
        return next(case for case in cases() if case.key == self.case)


@dataclass(frozen=True)
class Row:
    """A call in numbers. What is "per token" is of all launches, by the tokens of all sequences.

    Attributes:
        launches: all, and `own`, those of our kernels; the rest are PyTorch's.
        programs: of the smallest launch of our kernels, and `smallest`, its kernel.
        bytes: of HBM per token; `panel_bytes`, those that panels would add where they stay in the cache.
        flop: of matrix instructions per token, as they are executed.
        ns: modelled, per token.
        floor: of the mathematics, and `ratio`, the modelled over it.
        sources: of each column, where it is from.
        details: each launch, with its kernel, grid, configuration, and how its time was made.
        reason: why there is no row.
    """

    target: str
    op: str
    direction: str
    shape: str
    dtype: str
    launches: int = 0
    own: int = 0
    programs: int = 0
    smallest: str = ""
    bytes: float = 0.0
    panel_bytes: float = 0.0
    flop: float = 0.0
    ns: float = 0.0
    floor: float = 0.0
    ratio: float = 0.0
    sources: dict[str, str] = field(default_factory=dict, hash=False)
    details: list[dict[str, Any]] = field(default_factory=list, hash=False)
    reason: str | None = None


def tasks(targets: list[str], dtypes: tuple[str, ...], ops: frozenset[str] | None) -> list[Task]:
    """Every row of these.

    Raises:
        ValueError: for a target without a model, or whose compiled code is not executed.
    """
    for target in targets:
        if target not in MACHINES or target_of(target).arch > 90:
            raise ValueError(f"{target} is not modelled; expected NVIDIA GPUs up to sm_90, such as sm_80")
    return [
        Task(target, dtype, case.key)
        for target in targets
        for dtype in dtypes
        for case in cases()
        if ops is None or case.op in ops
    ]


def examine_all(work: list[Task], processes: int | None = None) -> Iterator[Row]:
    """In parallel; rows come as they are done."""
    return (row for _, row in in_processes(examine, _crashed, work, processes))


def examine(task: Task) -> Row:
    """Make one row. What goes wrong is its reason."""
    try:
        return _examined(task)
    except Exception as error:  # compilers fail in their own ways, each of which is a row
        return _failed(task, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _crashed(task: Task) -> Row:
    return _failed(task, "the process crashed")


def _failed(task: Task, reason: str) -> Row:
    case = task.what
    return Row(task.target, case.op, case.direction, case.shape, task.dtype, reason=reason)


def _examined(task: Task) -> Row:
    case, target, dtype = task.what, task.target, DTYPES[task.dtype]
    with recording(target) as found:
        case.run(operands(dtype))
    own = [one for one in found if isinstance(one, Kernel)]
    done = {id(one): _work(target, one) for one in own}
    touched = _touched(own, {key: work.flop for key, work in done.items()})
    details = [
        _of_kernel(target, one, done[id(one)], touched[id(one)])
        if isinstance(one, Kernel)
        else _of_pytorch(target, one)
        for one in found
    ]
    total = {name: sum(d[name] for d in details) for name in ("bytes", "panel_bytes", "flop", "us")}
    smallest = min(own, key=lambda one: one.programs)
    ns = 1e3 * total["us"] / case.tokens
    floor = 1e9 * clocks.floor_seconds(target, case.flop, case.moved(dtype.itemsize))
    return Row(
        target, case.op, case.direction, case.shape, task.dtype,
        launches=len(found), own=len(own), programs=smallest.programs, smallest=smallest.name,
        bytes=total["bytes"] / case.tokens, panel_bytes=total["panel_bytes"] / case.tokens,
        flop=total["flop"] / case.tokens, ns=ns, floor=floor, ratio=ns / floor,
        sources=_sources(details), details=details,
    )  # fmt: skip


def _sources(details: list[dict[str, Any]]) -> dict[str, str]:
    bytes_from = "; ".join(dict.fromkeys(d["bytes_from"] for d in details))
    time_from = "; ".join(dict.fromkeys(d["time_from"] for d in details))
    return {
        "launches": "recorded from the launchers",
        "programs": "their grids",
        "bytes": bytes_from,
        "flop": "branches of the compiled code, executed for every program",
        "ns": f"modelled: {time_from}; {clocks.START * 1e6:g} us to start each launch",
        "floor": f"closed formula; {clocks.SUSTAINED:g} of the peak, {clocks.STREAM:g} of the rate of HBM",
    }


# ---- bytes


def _touched(launches: list[Kernel], flop: dict[int, int]) -> dict[int, tuple[dict[str, Touched], str]]:
    """What each launch touches. Of more than three of one kernel the first, the middle and the last are executed, if
    the FLOP of those between lie on a line: a series over panels covers its sequence step by step."""
    series: dict[str, list[Kernel]] = defaultdict(list)
    for one in launches:
        series[one.ptx].append(one)
    found = {}
    for several in series.values():
        last = len(several) - 1
        chosen = [0, last // 2, last]
        work = [flop[id(one)] for one in several]
        line = np.interp(range(last + 1), chosen, [work[i] for i in chosen])
        source = "addresses of the compiled code, executed"
        if last < _SERIES or not np.allclose(work, line, rtol=0, atol=0.02 * max(work)):
            chosen = list(range(last + 1))
        else:
            source += f" (of launches {', '.join(str(i + 1) for i in chosen)} of {last + 1}, between them a line)"
        known = {i: footprint.footprint(several[i].ptx, several[i].grid, several[i].values) for i in chosen}
        for i, one in enumerate(several):
            found[id(one)] = known[i] if i in known else _between(known, i), source
    return found


def _between(known: dict[int, dict[str, Touched]], i: int) -> dict[str, Touched]:
    places, first = sorted(known), known[min(known)]

    def line(name: str, which: str) -> int:
        return int(np.interp(i, places, [getattr(known[p][name], which) for p in places]))

    return {
        name: Touched(line(name, "read"), line(name, "written"), x.size, line(name, "asked"))
        for name, x in first.items()
    }


# ---- launches


def _work(target: str, one: Kernel) -> clocks.Work:
    program, counts = footprint.paths(one.ptx, one.grid, one.values)
    return clocks.work(target, program, counts, one.code)


def _of_kernel(target: str, one: Kernel, done: clocks.Work, touched: tuple[dict[str, Touched], str]) -> dict[str, Any]:
    arguments, source = touched
    moved, panels = 0, 0
    for name, x in arguments.items():
        if "panel" in name and x.size <= clocks.MEMORIES[target].cache:  # written by one launch, read by the next
            panels += x.read + x.written
        else:
            moved += x.read + x.written
    asked = sum(x.asked for x in arguments.values())
    compute, memory = clocks.seconds(target, done, one.code, asked, moved)
    return {
        "kernel": one.name, "grid": list(one.grid), "programs": one.programs, "resident": one.code.resident,
        "configuration": one.configuration, "registers": one.code.registers, "shared_bytes": one.code.shared_bytes,
        "bytes": moved, "panel_bytes": panels, "asked_bytes": asked, "flop": done.flop,
        "arguments": {name: [x.read, x.written, x.size] for name, x in arguments.items() if x.read or x.written},
        "processors_us": 1e6 * compute, "memory_us": 1e6 * memory,
        "us": 1e6 * (max(compute, memory) + clocks.START),
        "bound": "multiprocessors" if compute > memory else "memory", "hot_share": done.hot,
        "bytes_from": source, "time_from": done.source,
    }  # fmt: skip


def _of_pytorch(target: str, one: PyTorch) -> dict[str, Any]:
    moved = one.read + one.written
    compute, memory = one.flop / (clocks.VENDOR * clocks.peak(target)), clocks.memory_seconds(target, moved)
    return {
        "kernel": f"PyTorch {one.name}", "bytes": moved, "panel_bytes": 0, "flop": one.flop,
        "processors_us": 1e6 * compute, "memory_us": 1e6 * memory, "us": 1e6 * (max(compute, memory) + clocks.START),
        "bound": "multiprocessors" if compute > memory else "memory",
        "bytes_from": "PyTorch's operands", "time_from": f"PyTorch's products at {clocks.VENDOR:g} of the peak",
    }  # fmt: skip

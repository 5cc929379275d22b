"""The vocabulary of a benchmark: cases, providers, goals, operations."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FORWARD, TRAINING = "forward", "forward+backward"
PASSES = (FORWARD, TRAINING)
BACKWARD = "backward"  # in goals: what a training step takes beyond the forward
GROWTH_BOUND = 2.3  # allowed factor in peak memory when the length doubles


@dataclass(frozen=True)
class Goal:
    """What `ours` should reach, beside `theirs` or by itself.

    `metric` says what `bound` is: "speed", at least so many times theirs; "memory", at most so many times theirs;
    "floor", at most so many times the case's own floor of time; "flat", at most so many times between the fastest and
    the slowest rate of work among the group's lengths from `since` to the case's.
    """

    ours: str
    theirs: str | None  # None for "floor" and "flat"
    metric: str
    run: str  # one of PASSES; of "floor" also BACKWARD
    bound: float
    since: int = 0


@dataclass(frozen=True)
class BenchCase:
    """One point of a benchmark: its sizes and options, and the series (one plot) it belongs to."""

    series: str
    length: int  # tokens: the x axis
    dtype: str
    shape: Mapping[str, int]
    check_length: int  # correctness is checked at this length: the fp64 oracle is naive
    options: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()
    work: Mapping[str, float] = field(default_factory=dict)  # useful work of each pass, in `work_unit`
    work_unit: str = "FLOP"  # or "B", bytes that must move, or "token"
    floors: Mapping[str, float] = field(default_factory=dict)  # seconds below which a pass, or BACKWARD, cannot be

    @property
    def group(self) -> str:
        return f"{self.series}, {self.dtype}"

    @property
    def name(self) -> str:
        return f"{self.group}, N={self.length}"


@dataclass
class Problem:
    """A provider ready to run: `call()` gives the output; gradients are taken with respect to `leaves`.

    Without leaves it runs forward only. `shared` puts the gradients under the names that all providers of the
    operation share, for comparison.
    """

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    shared: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


Build = Callable[[BenchCase, dict[str, Tensor]], Problem]


def on_tensors(function: Callable[[BenchCase, dict[str, Tensor]], Tensor]) -> Build:
    """A provider that is a plain function of the case's tensors."""
    return lambda case, tensors: Problem(lambda: function(case, tensors), tensors)


def anywhere(case: BenchCase, device: str) -> str | None:
    """No reason not to run."""
    return None


@dataclass(frozen=True)
class Provider:
    """A named implementation. `unavailable` gives the reason it cannot run a case, or None.

    `other` says what it computes if that is not the operation: then it is timed for scale, and not checked. If it
    takes the place of several of the operation, `stands_for` of them, the report says from which length they are
    faster. One that `overwrites` its inputs gets a copy of its own.
    """

    name: str
    build: Build
    unavailable: Callable[[BenchCase, str], str | None] = anywhere
    devices: tuple[str, ...] = ("cpu", "cuda")
    other: str | None = None
    stands_for: int = 0
    overwrites: bool = False


def ours(backend: str, function: Callable[[BenchCase, dict[str, Tensor], str], Tensor]) -> Provider:
    """One of flashgau's backends: `function` takes the backend's name last."""
    build = on_tensors(lambda case, tensors: function(case, tensors, backend))
    return Provider(f"flashgau-{backend}", build, devices=("cuda",) if backend == "triton" else ("cpu", "cuda"))


@dataclass(frozen=True)
class Operation:
    """A benchmark. `oracle` runs in fp64 to judge the rest, `plain` in the case's dtype sets tolerances.

    `together`: all cases are timed in the same rounds, in random turns, so that they can be compared with each other.
    `plot` draws a record as this benchmark's own plot, and says whether anything was measured.
    """

    name: str
    title: str
    cases: Callable[[str, bool], list[BenchCase]]  # (device, quick)
    inputs: Callable[[BenchCase, int, torch.Generator], dict[str, Tensor]]  # fp32 or integers, at a given length
    oracle: Build
    plain: Build
    providers: tuple[Provider, ...]
    x_label: str = "length (tokens)"
    together: bool = False
    plot: Callable[[dict[str, Any], Path], bool] | None = None


OPERATIONS = (
    "attention",
    "gated_attention",
    "tangents",
    "glu",
    "feed_forward",
    "gau",
    "gau_layer",
    "mixed_chunk",
    "flash_layer",
    "decode",
)


def load(name: str) -> Operation:
    """The OPERATION of `bench/NAME.py`."""
    operation = importlib.import_module(f"bench.{name}").OPERATION
    assert isinstance(operation, Operation)
    return operation


def draw(operation: Operation, case: BenchCase, length: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs of `case` at `length`, the same at every call, drawn on `device`.

    The values are as rounded to the case's dtype, whatever `dtype`, so that fp64 sees what bf16 sees.
    """
    with torch.device(device):
        drawn = operation.inputs(case, length, torch.Generator(device).manual_seed(length))
    return {name: t.to(DTYPES[case.dtype]).to(dtype) if t.is_floating_point() else t for name, t in drawn.items()}


def prepare(case: BenchCase, build: Build, inputs: Mapping[str, Tensor]) -> Problem:
    """Build a provider on leaves of its own, which share the memory of `inputs`."""
    return build(case, {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()})


def output_gradient(case: BenchCase, out: Tensor) -> Tensor:
    """The gradient fed into every backward: the same numbers for all, rounded to the case's dtype."""
    return _drawn_gradient(out.shape, DTYPES[case.dtype], out.dtype, out.device)


@lru_cache(maxsize=1)  # of a million tokens it is gigabytes: all providers of a case share one
def _drawn_gradient(shape: torch.Size, rounded: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device).to(rounded).to(dtype)


def runs(case: BenchCase, problem: Problem) -> dict[str, Callable[[], object]]:
    """The timed calls: inference without autograd and, if there are leaves, one step's forward and backward."""

    def forward() -> Tensor:
        with torch.no_grad():
            return problem.call()

    if not problem.leaves:
        return {FORWARD: forward}
    grad_out = output_gradient(case, forward())
    wanted = list(problem.leaves.values())

    def training() -> object:
        return torch.autograd.grad(problem.call(), wanted, grad_out)

    return {FORWARD: forward, TRAINING: training}


def too_large(needed: float, device: str) -> str | None:
    """Why not to start a run that needs about `needed` bytes: more than 80% of what is free. Or None."""
    if device == "cuda":  # what the allocator keeps for reuse is free too
        free = float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    else:
        free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if needed <= 0.8 * free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free"

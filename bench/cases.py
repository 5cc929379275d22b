"""The vocabulary of a benchmark: cases, providers, goals, operations."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FORWARD, TRAINING = "forward", "forward+backward"
PASSES = (FORWARD, TRAINING)
GROWTH_BOUND = 2.3  # allowed factor in peak memory when the length doubles


@dataclass(frozen=True)
class Goal:
    """What `ours` should reach beside `theirs`: at least `bound` times its speed, or at most its memory."""

    ours: str
    theirs: str
    metric: str  # "speed" or "memory"
    run: str  # one of PASSES
    bound: float


@dataclass(frozen=True)
class Case:
    """One point of a benchmark: its sizes and options, and the series (one plot) it belongs to."""

    series: str
    length: int  # tokens: the x axis
    dtype: str
    shape: Mapping[str, int]
    check_length: int  # correctness is checked at this length: the fp64 oracle is naive
    options: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()
    work: Mapping[str, float] = field(default_factory=dict)  # useful work of each pass, in `work_unit`
    work_unit: str = "FLOP"  # or "B", bytes that must move

    @property
    def group(self) -> str:
        return f"{self.series}, {self.dtype}"

    @property
    def name(self) -> str:
        return f"{self.group}, N={self.length}"


@dataclass
class Problem:
    """A provider ready to run: `call()` gives the output; gradients are taken with respect to `leaves`.

    `shared` puts the gradients under the names that all providers of the operation share, for comparison.
    """

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    shared: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


Build = Callable[[Case, dict[str, Tensor]], Problem]


def on_tensors(function: Callable[[Case, dict[str, Tensor]], Tensor]) -> Build:
    """A provider that is a plain function of the case's tensors."""
    return lambda case, tensors: Problem(lambda: function(case, tensors), tensors)


def anywhere(case: Case, device: str) -> str | None:
    """No reason not to run."""
    return None


@dataclass(frozen=True)
class Provider:
    """A named implementation. `unavailable` gives the reason it cannot run a case, or None.

    `other` says what it computes if that is not the operation: then it is timed for scale, and not checked.
    """

    name: str
    build: Build
    unavailable: Callable[[Case, str], str | None] = anywhere
    devices: tuple[str, ...] = ("cpu", "cuda")
    other: str | None = None


def ours(backend: str, function: Callable[[Case, dict[str, Tensor], str], Tensor]) -> Provider:
    """One of flashgau's backends: `function` takes the backend's name last."""
    build = on_tensors(lambda case, tensors: function(case, tensors, backend))
    return Provider(f"flashgau-{backend}", build, devices=("cuda",) if backend == "triton" else ("cpu", "cuda"))


@dataclass(frozen=True)
class Operation:
    """A benchmark. `oracle` runs in fp64 to judge the rest, `plain` in the case's dtype sets tolerances."""

    name: str
    title: str
    cases: Callable[[str, bool], list[Case]]  # (device, quick)
    inputs: Callable[[Case, int, torch.Generator], dict[str, Tensor]]  # fp32 on the CPU, at a given length
    oracle: Build
    plain: Build
    providers: tuple[Provider, ...]
    x_label: str = "length (tokens)"


OPERATIONS = ("attention", "glu", "feed_forward", "gau", "gau_layer", "mixed_chunk", "flash_layer")


def load(name: str) -> Operation:
    """The OPERATION of `bench/NAME.py`."""
    operation = importlib.import_module(f"bench.{name}").OPERATION
    assert isinstance(operation, Operation)
    return operation


def leaves(tensors: Mapping[str, Tensor], case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh leaf copies of the values as rounded to the case's dtype, so that fp64 sees what bf16 sees."""
    rounded = {name: t.to(DTYPES[case.dtype]) for name, t in tensors.items()}
    return {name: t.to(device=device, dtype=dtype, copy=True).requires_grad_() for name, t in rounded.items()}


def prepare(operation: Operation, case: Case, build: Build, length: int, device: str, dtype: torch.dtype) -> Problem:
    """Draw the inputs of `case` at `length` (the same for every provider) and build a provider on them."""
    generator = torch.Generator().manual_seed(length)
    return build(case, leaves(operation.inputs(case, length, generator), case, device, dtype))


def output_gradient(case: Case, out: Tensor) -> Tensor:
    """The gradient fed into every backward: the same numbers for all, rounded to the case's dtype."""
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(DTYPES[case.dtype]).to(out)


def runs(case: Case, problem: Problem) -> dict[str, Callable[[], object]]:
    """The timed calls: inference without autograd, and one training step's forward and backward."""
    with torch.no_grad():
        grad_out = output_gradient(case, problem.call())
    wanted = list(problem.leaves.values())

    def forward() -> object:
        with torch.no_grad():
            return problem.call()

    def training() -> object:
        return torch.autograd.grad(problem.call(), wanted, grad_out)

    return {FORWARD: forward, TRAINING: training}


def too_large(needed: float, device: str) -> str | None:
    """Why not to start a run that needs about `needed` bytes: more than 80% of what is free. Or None."""
    if device == "cuda":
        free = float(torch.cuda.mem_get_info()[0])
    else:
        free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if needed <= 0.8 * free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free"

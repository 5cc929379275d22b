"""Time and memory of the three ways to mix tokens, against length: what `flashgau demo` plots.

The same model width for all, fp32, causal, forward and backward, the mixing operation alone (no projections):

- naive attention: softmax(q k^T) v in three lines of PyTorch, with its N x N matrices;
- `flashgau.attention`: the same function without them;
- `flashgau.mixed_chunk_attention`: FLASH, linear in length.

Time is the median over rounds in which the three take turns, so that a machine that slows down for a while
slows all of them. Memory is the peak of what PyTorch allocates during forward and backward, beyond the inputs
that are there before: on the CPU it is summed up from the profiler's record of every allocation and release,
which is exact and repeatable. (The growth of the process's peak resident size, which also has the scratch space
of BLAS libraries in it, was within 1% of it for all three.)
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

NAIVE, ATTENTION, FLASH = "naive attention", "flashgau attention", "FLASH"
PROVIDERS = (NAIVE, ATTENTION, FLASH)


@dataclass(frozen=True)
class Sizes:
    """One model width, as attention and as FLASH use it ([GAU]: e = 2d, s = 128, C = 256)."""

    width: int = 256
    heads: int = 4
    narrow: int = 128
    chunk: int = 256

    @property
    def expanded(self) -> int:
        """Width of FLASH's values."""
        return 2 * self.width


@dataclass(frozen=True)
class Point:
    """One operation at one length: `seconds` of each forward + backward, or why it was `skipped`."""

    provider: str
    length: int
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    skipped: str | None = None

    @property
    def median(self) -> float | None:
        """Median seconds of a run."""
        return statistics.median(self.seconds) if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON values."""
        return {**asdict(self), "median": self.median}


def _naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def _prepare(provider: str, length: int, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Make the inputs; return a function that runs forward and backward once and keeps nothing."""
    import flashgau

    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    if provider == FLASH:
        widths = [sizes.narrow] * 4 + [sizes.expanded] * 2  # four heads, values, gate
        inputs = [draw(1, length, width) for width in widths]
    else:
        inputs = [draw(1, sizes.heads, length, sizes.width // sizes.heads) for _ in "qkv"]

    def forward() -> Tensor:
        out: Any
        if provider == NAIVE:
            out = _naive(*inputs)
        elif provider == ATTENTION:
            out = flashgau.attention(*inputs, causal=True)
        else:
            out = flashgau.mixed_chunk_attention(*inputs, chunk_size=sizes.chunk, causal=True)
        return cast(Tensor, out)  # not the pairs with log-sum-exp or state

    with torch.no_grad():
        direction = torch.randn_like(forward())

    def run() -> None:
        torch.autograd.grad(forward(), inputs, direction)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that PyTorch holds at the most during `run`, beyond those it held before.

    Example:
        >>> peak_memory(lambda: torch.zeros(1000).exp().sum(), torch.device("cpu")) // 1000
        8
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before

    # Read when the profiler first starts: its library otherwise reports start and stop on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run()
    # The raw record: one event per allocation (positive) and release (negative), in the order of time.
    assert record.profiler is not None
    results = record.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(
    lengths: Sequence[int],
    *,
    budget: float,
    rounds: int = 5,
    sizes: Sizes | None = None,
    device: torch.device | None = None,
    memory_limit: int | None = None,
    on_point: Callable[[Point], None] | None = None,
) -> list[Point]:
    """Measure all providers at rising, doubling `lengths`; leave out what would not fit.

    A provider whose next length would take more than what is left of the `budget` (seconds, for everything)
    after the faster ones, or more than `memory_limit` bytes, judged by its last length times four, stops there
    with a point that says so.
    """
    sizes, device = sizes or Sizes(), device or torch.device("cpu")
    started = time.perf_counter()
    points: list[Point] = []
    last: dict[str, Point] = {}
    stopped: dict[str, str] = {}

    def add(point: Point) -> None:
        points.append(point)
        if on_point is not None:
            on_point(point)

    for length in lengths:
        left = budget - (time.perf_counter() - started)
        runs: dict[str, Callable[[], None]] = {}
        # The cheap ones first: what they leave of the budget decides about the others.
        for provider in sorted(PROVIDERS, key=lambda name: _cost(last.get(name))):
            cost = _cost(last.get(provider))
            if provider not in stopped and memory_limit is not None and _peak(last.get(provider)) > memory_limit:
                stopped[provider] = "would take too much memory"
            if provider not in stopped and cost > max(left, 0.0):
                stopped[provider] = "would take too long"
            if provider in stopped:
                add(Point(provider, length, skipped=stopped[provider]))
                continue
            runs[provider] = _prepare(provider, length, sizes, device)
            left -= cost
        peaks = {provider: peak_memory(run, device) for provider, run in runs.items()}  # warms up as well
        times: dict[str, list[float]] = {provider: [] for provider in runs}
        began = time.perf_counter()
        for turn in range(rounds):
            for provider in _rotated(list(runs), turn):
                start = time.perf_counter()
                runs[provider]()
                times[provider].append(time.perf_counter() - start)
            # Three rounds give a median; more only while they are cheap.
            if turn >= 2 and time.perf_counter() - began > budget / (2 * len(lengths)):
                break
        for provider in sorted(runs, key=PROVIDERS.index):
            last[provider] = Point(provider, length, tuple(times[provider]), peaks[provider])
            add(last[provider])
    return points


def _rotated(names: list[str], turn: int) -> list[str]:
    turn %= max(len(names), 1)
    return names[turn:] + names[:turn]


def _cost(last: Point | None) -> float:
    """Seconds that twice the length of `last` may take: each run four times as long, four runs."""
    return 0.0 if last is None or last.median is None else 4 * 4 * last.median


def _peak(last: Point | None) -> int:
    """Bytes that twice the length of `last` may take."""
    return 0 if last is None or last.peak_bytes is None else 4 * last.peak_bytes

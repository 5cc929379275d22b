"""Timing: rounds in which every competitor has a turn, medians with quartiles."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

L2_FLUSH_BYTES = 256 * 2**20  # larger than any GPU's level-2 cache


class Timer(Protocol):
    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds one call took."""
        ...


class CpuTimer:
    """Wall-clock time. The result is freed after the clock stops."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Callable[[], object]) -> float:
        start = self.clock()
        result = call()
        stop = self.clock()
        del result
        return stop - start


class CudaTimer:
    """Time on the GPU between two events, with the level-2 cache emptied before.

    Writing the buffer also keeps the GPU busy while the call is being launched, so launch latency is hidden
    unless the call itself waits for the host.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.buffer.zero_()
        start.record()
        result = call()
        stop.record()
        torch.cuda.synchronize()
        del result
        return float(start.elapsed_time(stop)) / 1e3


def timer_for(device: str) -> Timer:
    return CudaTimer() if device == "cuda" else CpuTimer()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not while the clock runs."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, interpolated linearly between order statistics."""
    ordered = sorted(values)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.25), at(0.5), at(0.75)


Name = TypeVar("Name", bound=Hashable)


def alternate(
    calls: Mapping[Name, Callable[[], object]],
    timer: Timer,
    *,
    warmup: int = 1,
    min_rounds: int = 5,
    max_rounds: int = 200,
    seconds: float = 20.0,
) -> dict[Name, list[float]]:
    """Seconds of every call, round by round, in a new random order each: A B C, C A B, ...

    Drift of the machine (heat, other programs) then falls on all alike, as does what a call leaves behind for the
    next (emptied caches, memory given back), and one round's times can be compared with each other.
    `seconds` sets the number of rounds, between `min_rounds` and `max_rounds`,
    from the last warm-up.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    if not calls:
        return times
    with no_garbage_collection():
        expected = 0.0
        for call in calls.values():
            for _ in range(warmup):
                last = timer(call)
            expected += last if warmup else 0.0
        rounds = max_rounds if expected == 0 else int(seconds / expected)
        for _ in range(min(max(rounds, min_rounds), max_rounds)):
            for name in random.sample(list(calls), len(calls)):
                times[name].append(timer(calls[name]))
    return times


def speed_ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster `ours` is, round by round: first quartile, median and third quartile of the ratios.

    Not the ratio of the medians, which may lie outside: those two may be of different rounds.
    """
    return quartiles([t / o for t, o in zip(theirs, ours, strict=True)])

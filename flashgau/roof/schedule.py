"""How long the multiprocessors of a GPU take for the programs of a launch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Multiprocessor:
    """Its programs with what is left of each, 1 to 0; since when, and which of its events counts."""

    left: dict[int, float] = field(default_factory=dict)
    since: float = 0.0
    event: int = 0


def makespan(alone: Sequence[float], busy: Sequence[float], processors: int, resident: int) -> float:
    """Clocks until the last program has ended.

    Programs begin in their order, one on each multiprocessor, then a second one, and so on; whenever one ends, the next
    takes its place. With j on a multiprocessor each takes the longer of `alone` and j times `busy`: they fill each
    other's gaps until a pipe has none.

    Args:
        alone: clocks of each program with a multiprocessor to itself.
        busy: of these, those of its busiest pipe.
        processors: multiprocessors.
        resident: how many programs one holds.

    Example:
        >>> makespan([10] * 5, [4] * 5, 2, 1), makespan([10] * 5, [4] * 5, 2, 2), makespan([10] * 4, [8] * 4, 2, 2)
        (30.0, 20.0, 16.0)
    """
    if not len(alone):
        return 0.0
    if min(alone) == max(alone) and min(busy) == max(busy):
        waves, rest = divmod(len(alone), processors * resident)
        last = -(-rest // processors)
        return float(waves * max(alone[0], resident * busy[0]) + (max(alone[0], last * busy[0]) if rest else 0))
    machines = [_Multiprocessor() for _ in range(processors)]
    for i in range(min(len(alone), processors * resident)):
        machines[i % processors].left[i] = 1.0
    started = min(len(alone), processors * resident)
    events: list[tuple[float, int, int]] = []

    def clocks(i: int, together: int) -> float:
        return max(alone[i], together * busy[i], 1e-9)

    def plan(number: int) -> None:
        one = machines[number]
        one.event += 1
        if one.left:
            first = min(share * clocks(i, len(one.left)) for i, share in one.left.items())
            heapq.heappush(events, (one.since + first, number, one.event))

    for number in range(processors):
        plan(number)
    now = 0.0
    while events:
        now, number, event = heapq.heappop(events)
        one = machines[number]
        if event != one.event:
            continue
        passed, together = now - one.since, len(one.left)
        left = {i: share - passed / clocks(i, together) for i, share in one.left.items()}
        one.left, one.since = {i: share for i, share in left.items() if share > 1e-9}, now
        while len(one.left) < resident and started < len(alone):
            one.left[started] = 1.0
            started += 1
        plan(number)
    return now

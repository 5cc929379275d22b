"""Intervals over seeds, comparisons with what is published, verdicts, and two curves: crossings and costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

CONFIRMED, REFUTED, OPEN = "confirmed", "not confirmed", "not testable at this scale"
UNFINISHED = "not finished"

# Two-sided 95% quantiles of Student's t, for 1, 2, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and its 95% interval; of a single value there is none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        around = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.mean:.4g}{around}"


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent values, with Student's t interval of 95%.

    >>> str(interval([1.0, 2.0, 3.0]))
    '2 [-0.4843, 4.484]'
    """
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = T95[min(n - 1, len(T95)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def exact(value: float) -> Interval:
    """Of what is counted, and has no spread."""
    return Interval(value, value, value, 1)


@dataclass(frozen=True)
class Comparison:
    """How far `what` lies below (negative) or above zero, seed by seed, and how far it was published to lie.

    The claim is that it lies below zero. It is confirmed if the whole interval does. It is open if there is no
    interval, or if the interval has both zero and what was published in it: then it cannot tell the two apart. Else
    it is not confirmed. Without a published size it is open where the interval has zero in it.
    """

    what: str
    found: Interval
    published: float | None = None
    unit: str = "%"
    over: str = "seeds"
    said: str = ""  # in place of the sentence, where another number says more

    @property
    def outcome(self) -> str:
        low, high = self.found.low, self.found.high
        if low is None or high is None:
            return OPEN
        if high < 0:
            return CONFIRMED
        return OPEN if low < 0 and (self.published is None or low <= self.published) else REFUTED

    def sentence(self) -> str:
        """One clause with numbers."""
        if self.said:
            return self.said
        found = self.found
        text = f"{self.what} {found.mean:+.2f}{self.unit}"
        if found.low is None:
            text += f" from one of the {self.over}"
        elif found.low < found.mean:
            text += f" [{found.low:+.2f}, {found.high:+.2f}] over {found.n} {self.over}"
        return text + ("" if self.published is None else f", published {self.published:+.2f}{self.unit}")

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, **asdict(self.found), "published": self.published, "unit": self.unit,
                "outcome": self.outcome, "text": self.sentence()}  # fmt: skip


def compare(
    what: str, ours: Sequence[float], theirs: Sequence[float], published: float | None = None, over: str = "seeds"
) -> Comparison:
    """By how many percent `ours` lies below `theirs`, of pairs that share a seed (or a round)."""
    found = [100 * (a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    return Comparison(what, interval(found), None if published is None else 100 * published, over=over)


@dataclass(frozen=True)
class Verdict:
    """`outcome`, and the sentence that says so with its numbers."""

    outcome: str
    sentence: str
    comparisons: tuple[Comparison, ...] = ()


def verdict(claim: str, comparisons: Sequence[Comparison], reason: str = "no trial has finished") -> Verdict:
    """Of a claim that holds if all of its comparisons do: not confirmed if one is not, open if one of the rest is.

    Args:
        claim: begins the sentence.
        comparisons: what it consists of; with none it is open.
        reason: why there are none.
    """
    outcomes = [one.outcome for one in comparisons]
    outcome = next((o for o in (REFUTED, OPEN) if o in outcomes), CONFIRMED if outcomes else OPEN)
    groups = []
    for name in (CONFIRMED, REFUTED, OPEN):
        told = [one.sentence() for one in comparisons if one.outcome == name]
        if told:
            groups.append((f"{name}: " if len(set(outcomes)) > 1 else "") + "; ".join(told))
    return Verdict(outcome, f"{claim}: {outcome} ({'. '.join(groups) or reason}).", tuple(comparisons))


def unfinished(found: Verdict) -> Verdict:
    """Of a record whose trials are not all there, whatever those that are show."""
    sentence = found.sentence.replace(f": {found.outcome} (", f": {UNFINISHED} (", 1)
    return replace(found, outcome=UNFINISHED, sentence=sentence)


def crossings(points: Sequence[tuple[float, float]]) -> list[float]:
    """Every length at which a ratio passes 1, linear between points on logarithmic axes.

    >>> crossings([(1000, 0.25), (4000, 4.0)]), crossings([(1000, 1.5), (2000, 2.0)])
    ([2000.0], [])
    """
    found = []
    for (short, a), (long, b) in pairwise(points):
        if (a < 1) != (b < 1):
            found.append(round(short * (long / short) ** (math.log(a) / math.log(a / b)), 1))
    return found


def cost(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """a and b, not negative, of the time a + b N of a token in sequences of N: least squares of relative errors.

    >>> a, b = cost([(512, 2.0 + 0.01 * 512), (4096, 2.0 + 0.01 * 4096), (8192, 2.0 + 0.01 * 8192)])
    >>> round(a, 6), round(b, 6)
    (2.0, 0.01)
    """
    lengths, times = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    both = np.stack([np.ones_like(lengths), lengths], 1) / times[:, None]
    fits = []
    for used in ([0, 1], [0], [1]):
        found, *_ = np.linalg.lstsq(both[:, used], np.ones(len(times)), rcond=None)
        if (found >= 0).all():
            error = float(((both[:, used] @ found - 1) ** 2).sum())
            whole = np.zeros(2)
            whole[used] = found
            fits.append((error, whole.tolist()))
    a, b = min(fits)[1]
    return a, b

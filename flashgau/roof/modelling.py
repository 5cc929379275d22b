"""Candidates ranked by a model of their hot loops, on no GPU: where a search on a real one begins.

The model knows the loops' products and what stands about them (`flashgau.sass.model`). It knows nothing of memory
beyond their prefetch, of launches, or of how a grid fills a GPU; and what has no products has no rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flashgau.sass import HotLoop
from flashgau.tables.config import Config
from flashgau.tables.table import Key
from flashgau.tuning.ahead import Job, Row


@dataclass(frozen=True)
class Modelled:
    """A candidate and its modelled TFLOP/s, or why it has none."""

    job: Job
    rate: float | None = None
    bound: str = ""
    reason: str | None = None


def modelled(job: Job, row: Row) -> Modelled:
    """What the model says of a compiled candidate."""
    if not row.ok:
        return Modelled(job, reason=row.reason)
    loops = row.loops or ()
    rate = combined_rate(loops)
    if rate is None:
        return Modelled(job, reason="no loop of matrix products to model")
    bounds = dict.fromkeys(loop.bound for loop in loops if loop.mask_free)
    return Modelled(job, rate, ", ".join(bounds))


def combined_rate(loops: Iterable[HotLoop]) -> float | None:
    """TFLOP/s of the loops without masks, an iteration of each after the other; None without any that is modelled."""
    work = [(loop.useful, loop.rate) for loop in loops if loop.mask_free and loop.useful and loop.rate]
    return sum(macs for macs, _ in work) / sum(macs / rate for macs, rate in work) if work else None


def ranking(found: Iterable[Modelled]) -> dict[Key, list[Modelled]]:
    """The candidates of each entry that have a rate, the fastest first."""
    ranks: dict[Key, list[Modelled]] = {}
    for one in sorted((one for one in found if one.rate is not None), key=lambda one: -(one.rate or 0)):
        ranks.setdefault(one.job.key, []).append(one)
    return ranks


def best(ranks: dict[Key, list[Modelled]], top: int) -> dict[Key, frozenset[Config]]:
    """The configurations worth measuring: the first few of each entry."""
    return {key: frozenset(one.job.config for one in found[:top] if one.job.config) for key, found in ranks.items()}

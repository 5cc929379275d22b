"""The run: check, time and probe every provider of every case, writing results as they come."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench import machine, memory, report
from bench.cases import (
    BACKWARD,
    DTYPES,
    FORWARD,
    GROWTH_BOUND,
    PASSES,
    TRAINING,
    BenchCase,
    Goal,
    Operation,
    Provider,
    draw,
    prepare,
    runs,
)
from bench.correct import Judge
from bench.timing import Timer, alternate, quartiles, speed_ratio, timer_for

RESOLUTION_BYTES = 2**20  # below this, the factor between two peaks is the probe's noise
SCHEMA, SCHEMA_VERSION = "flashgau-bench", 1


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    device: str = "cpu"
    quick: bool = False
    providers: tuple[str, ...] = ()  # empty: all
    only: tuple[str, ...] = ()  # words that a case's name must contain
    seconds: float = 20.0  # timing budget of one pass of one case, all providers together
    warmup: int = 1  # besides the first call
    min_rounds: int = 5
    max_rounds: int = 200
    memory: bool = True


Progress = Callable[[str], None]
"""Called before each step with what comes next."""


def selected(operation: Operation, settings: Settings) -> tuple[list[BenchCase], list[Provider]]:
    """The cases and providers asked for. ValueError if a name matches none."""
    here = [p for p in operation.providers if settings.device in p.devices]
    unknown = set(settings.providers) - {p.name for p in here}
    if unknown:
        names = ", ".join(p.name for p in here)
        wrong = ", ".join(sorted(unknown))
        raise ValueError(f"{operation.name}: no provider {wrong} on {settings.device}; there are {names}")
    cases = [
        case
        for case in operation.cases(settings.device, settings.quick)
        if all(word in case.name for word in settings.only)
    ]
    if not cases:
        raise ValueError(f"{operation.name}: no case's name contains {' and '.join(settings.only)}")
    return cases, [p for p in here if not settings.providers or p.name in settings.providers]


def steps(operation: Operation, settings: Settings) -> int:
    """How many times `run` will call its `progress`."""
    cases, providers = selected(operation, settings)
    return len(cases) * (len(providers) * 2 + 1)


def run(
    operation: Operation, out: Path, settings: Settings, progress: Progress, timer: Timer | None = None
) -> dict[str, Any]:
    """Measure an operation and return its record, which is also kept in `out/results.json` after every step.

    On Ctrl-C the record so far is returned, with `complete` false. ValueError: an unknown provider or case.
    """
    cases, providers = selected(operation, settings)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "operation": operation.name,
        "title": operation.title,
        "x_label": operation.x_label,
        "complete": False,
        "settings": asdict(settings),
        "machine": machine.describe(settings.device),
        "cases": [],
        "memory_growth": [],
        "crossings": [],
    }
    judge = Judge(operation, settings.device)
    timer = timer or timer_for(settings.device)
    try:
        for group in [cases] if operation.together else [[case] for case in cases]:
            measured = [Measured(case, _case_entry(case)) for case in group]
            record["cases"] += [one.entry for one in measured]
            _measure(operation, measured, providers, judge, timer, settings, progress, lambda: _save(record, out))
            if settings.device == "cuda":
                torch.cuda.empty_cache()  # the next case's blocks have other sizes
        record["complete"] = True
    except KeyboardInterrupt:
        pass
    record["machine"]["load_average_after"] = machine.load_average()
    _save(record, out)
    return record


def _save(record: dict[str, Any], out: Path) -> None:
    for entry in record["cases"]:
        entry["goals"] = [judge_goal(entry, Goal(**goal), record["cases"]) for goal in entry["goals_set"]]
    record["memory_growth"] = growth_rows(record["cases"])
    record["crossings"] = crossing_rows(record["cases"])
    report.write_json(record, out / "results.json")


def _case_entry(case: BenchCase) -> dict[str, Any]:
    return {
        "name": case.name,
        "group": case.group,
        "series": case.series,
        "length": case.length,
        "dtype": case.dtype,
        "shape": dict(case.shape),
        "options": dict(case.options),
        "work": dict(case.work),
        "work_unit": case.work_unit,
        "floors": dict(case.floors),
        "goals_set": [asdict(goal) for goal in case.goals],
        "goals": [],
        "load_average": machine.load_average(),
        "providers": {},
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


@dataclass
class Measured:
    """A case, its entry in the record, and the passes of the providers that are timed on it."""

    case: BenchCase
    entry: dict[str, Any]
    calls: dict[str, dict[str, Callable[[], object]]] = field(default_factory=dict)


def _measure(
    operation: Operation,
    group: list[Measured],
    providers: Iterable[Provider],
    judge: Judge,
    timer: Timer,
    settings: Settings,
    progress: Progress,
    save: Callable[[], None],
) -> None:
    """Check all providers, time those that are right, on all cases in the same rounds, then probe their memory."""
    for one in group:
        right = _right(one, providers, judge, settings, progress)
        save()
        who = ", ".join(p.name for p in right) or "nothing"
        progress(f"{one.case.name}: time {who}" + (" later, with the other cases" if operation.together else ""))
        _prepare(operation, one, right, settings)
    for name in PASSES:
        measured = alternate(
            {(i, who): of[name] for i, one in enumerate(group) for who, of in one.calls.items() if name in of},
            timer,
            warmup=settings.warmup,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            seconds=settings.seconds * len(group),
        )
        for (i, who), seconds in measured.items():
            q1, median, q3 = quartiles(seconds)
            group[i].entry["providers"][who]["times"][name] = {
                "median_s": median,
                "q1_s": q1,
                "q3_s": q3,
                "runs": len(seconds),
                "warmup": settings.warmup + 1,
                "raw_s": seconds,
            }
        save()
    for one in group:
        _probe(operation, one, providers, settings, progress)
        save()


def _right(
    one: Measured, providers: Iterable[Provider], judge: Judge, settings: Settings, progress: Progress
) -> list[Provider]:
    """The providers that are to be timed: those that are right, or compute something else."""
    right: list[Provider] = []
    for provider in providers:
        progress(f"{one.case.name}: check {provider.name}")
        result: dict[str, Any] = {
            "status": "ok",
            "reason": None,
            "check": None,
            "stands_for": provider.stands_for,
            "times": {},
            "peak_bytes": {},
        }
        one.entry["providers"][provider.name] = result
        reason = provider.unavailable(one.case, settings.device)
        if reason is not None:
            result |= {"status": "skipped", "reason": reason}
            continue
        if provider.other is not None:
            result["reason"] = provider.other
            right.append(provider)
            continue
        with _failure_noted(one.entry, provider.name):
            check = judge.check(one.case, provider.name, provider.build)
            result["check"] = check.as_json()
            if check.ok:
                right.append(provider)
            else:
                row = check.worst
                why = f"{row.tensor} off by {row.error:.2g} at N={check.length}, allowed {row.allowed:.2g}"
                result |= {"status": "wrong", "reason": why}
    return right


def _prepare(operation: Operation, one: Measured, right: list[Provider], settings: Settings) -> None:
    """Make the passes of these providers, and call each once."""
    case = one.case
    inputs = draw(operation, case, case.length, settings.device, DTYPES[case.dtype]) if right else {}
    for provider in right:
        own = {name: t.clone() for name, t in inputs.items()} if provider.overwrites else inputs
        with _failure_noted(one.entry, provider.name):
            one.calls[provider.name] = runs(case, prepare(case, provider.build, own))
    # First calls only now, when all that stays in memory is there: what fits in them fits in the rounds.
    for who in list(one.calls):
        with _failure_noted(one.entry, who):
            for call in one.calls[who].values():
                call()
        if one.entry["providers"][who]["status"] != "ok":
            del one.calls[who]


def _probe(
    operation: Operation, one: Measured, providers: Iterable[Provider], settings: Settings, progress: Progress
) -> None:
    """Measure the peak of memory of each provider that was timed."""
    for provider in providers:
        progress(f"{one.case.name}: memory of {provider.name}")
        result = one.entry["providers"][provider.name]
        if result["status"] != "ok" or not settings.memory:
            continue
        try:
            if settings.device == "cuda":
                result["peak_bytes"] = {n: memory.cuda_peak_growth(c) for n, c in one.calls[provider.name].items()}
            else:
                result["peak_bytes"] = memory.in_fresh_process(
                    operation.name, one.case.name, provider.name, settings.quick, torch.get_num_threads()
                )
        except RuntimeError as error:
            result["memory_failed"] = _reason(error)


@contextlib.contextmanager
def _failure_noted(entry: dict[str, Any], provider: str) -> Iterator[None]:
    """An error inside becomes the provider's result."""
    try:
        yield
    except Exception as error:
        entry["providers"][provider] |= {"status": "failed", "reason": _reason(error)}


def judge_goal(entry: dict[str, Any], goal: Goal, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A goal with what was measured: `verdict` is "met", "missed" or "not measured"."""
    low, measured, high = _measured(entry, goal, entries)
    outcome: dict[str, Any] = asdict(goal) | {"measured": measured, "low": low, "high": high}
    if measured is None:
        return outcome | {"verdict": "not measured"}
    met = measured >= goal.bound if goal.metric == "speed" else measured <= goal.bound
    return outcome | {"verdict": "met" if met else "missed"}


Estimate = tuple[float | None, float | None, float | None]  # low, measured, high


def _measured(entry: dict[str, Any], goal: Goal, entries: list[dict[str, Any]]) -> Estimate:
    """What the goal is about, between its quartiles where they are known; None for what was not measured."""
    ours, theirs = (entry["providers"].get(who, {"times": {}, "peak_bytes": {}}) for who in (goal.ours, goal.theirs))
    if goal.metric == "speed" and goal.run in ours["times"] and goal.run in theirs["times"]:
        return speed_ratio(theirs["times"][goal.run]["raw_s"], ours["times"][goal.run]["raw_s"])
    if goal.metric == "memory" and goal.run in ours["peak_bytes"] and theirs["peak_bytes"].get(goal.run):
        return None, ours["peak_bytes"][goal.run] / theirs["peak_bytes"][goal.run], None
    if goal.metric == "floor" and (seconds := _seconds(ours["times"], goal.run)):
        low, middle, high = quartiles([t / entry["floors"][goal.run] for t in seconds])
        return low, middle, high
    if goal.metric == "flat":
        return None, _unevenness(entry, goal, entries), None
    return None, None, None


def _seconds(times: dict[str, Any], run: str) -> list[float]:
    """Every time of a pass; of BACKWARD, those of training less the median of the forward."""
    if run != BACKWARD:
        return times[run]["raw_s"] if run in times else []
    if not {FORWARD, TRAINING} <= set(times):
        return []
    return [t - times[FORWARD]["median_s"] for t in times[TRAINING]["raw_s"]]


def _unevenness(entry: dict[str, Any], goal: Goal, entries: list[dict[str, Any]]) -> float | None:
    """The fastest over the slowest rate of work from length `since` to the entry's; None if an end is missing."""
    rates = {}
    for other in entries:
        times = other["providers"].get(goal.ours, {"times": {}})["times"]
        if other["group"] == entry["group"] and goal.since <= other["length"] <= entry["length"] and goal.run in times:
            rates[other["length"]] = other["work"][goal.run] / times[goal.run]["median_s"]
    return max(rates.values()) / min(rates.values()) if {goal.since, entry["length"]} <= set(rates) else None


def crossing_rows(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From which length on flashgau's providers are faster than what stands for several of them.

    For every group and pass: `shortest` and `longest` length compared, and `since`, interpolated between the last
    length where ours is slower and the next; `shortest` if it never is, and None if it is at the longest.
    """
    rows = []
    for group in dict.fromkeys(entry["group"] for entry in entries):
        here = sorted((entry for entry in entries if entry["group"] == group), key=lambda entry: entry["length"])
        results = {who: result for entry in here for who, result in entry["providers"].items()}
        for ours in (who for who in results if who.startswith("flashgau")):
            for theirs, count in ((who, result.get("stands_for", 0)) for who, result in results.items()):
                for run in PASSES if count else ():
                    points = _ratios(here, ours, theirs, count, run)
                    if points:
                        row = {"group": group, "provider": ours, "than": theirs, "stands_for": count, "run": run}
                        rows.append(row | {"shortest": points[0][0], "longest": points[-1][0], "since": _since(points)})
    return rows


def _ratios(entries: list[dict[str, Any]], ours: str, theirs: str, count: int, run: str) -> list[tuple[int, float]]:
    """By length, how many times faster `count` of ours are than one of theirs."""
    points = []
    for entry in entries:
        times = [entry["providers"].get(who, {}).get("times", {}).get(run) for who in (ours, theirs)]
        if all(times):
            points.append((entry["length"], times[1]["median_s"] / (count * times[0]["median_s"])))
    return points


def _since(points: list[tuple[int, float]]) -> float | None:
    """The length at which the ratio last rises through 1, linear between points on logarithmic axes.

    >>> _since([(1000, 0.25), (4000, 4.0)]), _since([(1000, 1.5), (2000, 2.0)]), _since([(1000, 0.5)])
    (2000.0, 1000, None)
    """
    if points[-1][1] < 1:
        return None
    for (short, slower), (long, faster) in reversed(list(pairwise(points))):
        if slower < 1:
            return round(short * (long / short) ** (math.log(slower) / math.log(slower / faster)), 1)
    return points[0][0]


def growth_rows(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By what factor peak memory grows over each doubling of the length, for every provider, series and pass.

    Only flashgau's own providers are held to GROWTH_BOUND; for others the factor is information.
    """
    rows = []
    by_place = {(entry["group"], entry["length"]): entry for entry in entries}
    for (group, length), entry in by_place.items():
        twice = by_place.get((group, 2 * length))
        if twice is None:
            continue
        for name, result in entry["providers"].items():
            for run_name, small in result["peak_bytes"].items():
                large = twice["providers"].get(name, {}).get("peak_bytes", {}).get(run_name)
                if large is None or large < RESOLUTION_BYTES:
                    continue
                factor = large / max(small, RESOLUTION_BYTES)
                row = {"group": group, "provider": name, "run": run_name, "from": length, "to": 2 * length}
                row |= {"factor": factor, "bound": None, "verdict": None}
                if name.startswith("flashgau"):
                    row |= {"bound": GROWTH_BOUND, "verdict": "met" if factor <= GROWTH_BOUND else "missed"}
                rows.append(row)
    return rows

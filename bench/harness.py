"""The run: check, time and probe every provider of every case, writing results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import machine, memory, report
from bench.cases import (
    DTYPES,
    GROWTH_BOUND,
    PASSES,
    Case,
    Goal,
    Operation,
    Provider,
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
    max_rounds: int = 30
    memory: bool = True


Progress = Callable[[str], None]
"""Called before each step with what comes next."""


def selected(operation: Operation, settings: Settings) -> tuple[list[Case], list[Provider]]:
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
    }
    judge = Judge(operation, settings.device)
    timer = timer or timer_for(settings.device)
    try:
        for case in cases:
            entry = _case_entry(case)
            record["cases"].append(entry)
            _measure(
                operation,
                case,
                entry,
                providers,
                judge,
                timer,
                settings,
                progress,
                lambda: _save(record, out),
            )
        record["complete"] = True
    except KeyboardInterrupt:
        pass
    record["machine"]["load_average_after"] = machine.load_average()
    _save(record, out)
    return record


def _save(record: dict[str, Any], out: Path) -> None:
    for entry in record["cases"]:
        entry["goals"] = [_judge_goal(entry, Goal(**goal)) for goal in entry["goals_set"]]
    record["memory_growth"] = growth_rows(record["cases"])
    report.write_json(record, out / "results.json")


def _case_entry(case: Case) -> dict[str, Any]:
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
        "goals_set": [asdict(goal) for goal in case.goals],
        "goals": [],
        "load_average": machine.load_average(),
        "providers": {},
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _measure(
    operation: Operation,
    case: Case,
    entry: dict[str, Any],
    providers: Iterable[Provider],
    judge: Judge,
    timer: Timer,
    settings: Settings,
    progress: Progress,
    save: Callable[[], None],
) -> None:
    """Check all providers, time those that are right in alternating rounds, then probe their memory."""
    dtype = DTYPES[case.dtype]
    right: list[Provider] = []
    for provider in providers:
        progress(f"{case.name}: check {provider.name}")
        result: dict[str, Any] = {
            "status": "ok",
            "reason": None,
            "check": None,
            "times": {},
            "peak_bytes": {},
        }
        entry["providers"][provider.name] = result
        reason = provider.unavailable(case, settings.device)
        if reason is not None:
            result |= {"status": "skipped", "reason": reason}
            continue
        if provider.other is not None:
            result["reason"] = provider.other
            right.append(provider)
            continue
        try:
            check = judge.check(case, provider.name, provider.build)
        except Exception as error:
            result |= {"status": "failed", "reason": _reason(error)}
            continue
        result["check"] = check.as_json()
        if check.ok:
            right.append(provider)
        else:
            row = check.worst
            why = f"{row.tensor} off by {row.error:.2g} at N={check.length}, allowed {row.allowed:.2g}"
            result |= {"status": "wrong", "reason": why}
    save()

    progress(f"{case.name}: time {', '.join(p.name for p in right) or 'nothing'}")
    calls: dict[str, dict[str, Callable[[], object]]] = {name: {} for name in PASSES}
    for provider in right:
        try:
            problem = prepare(operation, case, provider.build, case.length, settings.device, dtype)
            for name, call in runs(case, problem).items():
                call()
                calls[name][provider.name] = call
        except Exception as error:
            for name in PASSES:
                calls[name].pop(provider.name, None)
            entry["providers"][provider.name] |= {"status": "failed", "reason": _reason(error)}
    for name in PASSES:
        measured = alternate(
            calls[name],
            timer,
            warmup=settings.warmup,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            seconds=settings.seconds,
        )
        for who, seconds in measured.items():
            q1, median, q3 = quartiles(seconds)
            entry["providers"][who]["times"][name] = {
                "median_s": median,
                "q1_s": q1,
                "q3_s": q3,
                "runs": len(seconds),
                "warmup": settings.warmup + 1,
                "raw_s": seconds,
            }
        save()

    for provider in providers:
        progress(f"{case.name}: memory of {provider.name}")
        result = entry["providers"][provider.name]
        if result["status"] != "ok" or not settings.memory:
            continue
        try:
            if settings.device == "cuda":
                result["peak_bytes"] = {n: memory.cuda_peak_growth(calls[n][provider.name]) for n in PASSES}
            else:
                result["peak_bytes"] = memory.in_fresh_process(
                    operation.name, case.name, provider.name, settings.quick, torch.get_num_threads()
                )
        except RuntimeError as error:
            result["memory_failed"] = _reason(error)
        save()


def _judge_goal(entry: dict[str, Any], goal: Goal) -> dict[str, Any]:
    """A goal with what was measured: `verdict` is "met", "missed" or "not measured"."""
    outcome: dict[str, Any] = asdict(goal) | {
        "measured": None,
        "low": None,
        "high": None,
        "verdict": "not measured",
    }
    ours, theirs = entry["providers"].get(goal.ours), entry["providers"].get(goal.theirs)
    if not ours or not theirs:
        return outcome
    if goal.metric == "speed":
        if goal.run in ours["times"] and goal.run in theirs["times"]:
            low, ratio, high = speed_ratio(theirs["times"][goal.run]["raw_s"], ours["times"][goal.run]["raw_s"])
            outcome |= {"measured": ratio, "low": low, "high": high}
            outcome["verdict"] = "met" if ratio >= goal.bound else "missed"
    elif goal.run in ours["peak_bytes"] and theirs["peak_bytes"].get(goal.run):
        ratio = ours["peak_bytes"][goal.run] / theirs["peak_bytes"][goal.run]
        outcome |= {"measured": ratio, "verdict": "met" if ratio <= goal.bound else "missed"}
    return outcome


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
                if large is None or large < RESOLUTION_BYTES or small == 0:
                    continue
                factor = large / small
                row = {"group": group, "provider": name, "run": run_name, "from": length, "to": 2 * length}
                row |= {"factor": factor, "bound": None, "verdict": None}
                if name.startswith("flashgau"):
                    row |= {"bound": GROWTH_BOUND, "verdict": "met" if factor <= GROWTH_BOUND else "missed"}
                rows.append(row)
    return rows

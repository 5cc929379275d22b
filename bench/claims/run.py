"""The run of a claim: trial after trial, each in the journal as soon as it is done: a kill loses one at most."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import harness, machine, report
from bench.cases import load as load_operation
from bench.claims import Claim, Settings, Trial
from bench.claims import train as training
from bench.claims.statistics import unfinished
from bench.memory import ALLOCATOR
from flashgau.files import parse_json
from flashgau.training import load_corpus
from flashgau.training.folder import locked

SCHEMA, SCHEMA_VERSION = "flashgau-claims", 1
JOURNAL, RECORD, PARTS = "journal.jsonl", "results.json", "trials"
_BEGINNING = f'{{"schema": "{SCHEMA}"'
ROOT = Path(__file__).resolve().parents[2]
LATE = 1.15  # of the budget: then no further trial begins


@dataclass
class Context:
    """What a trial may use: a folder of its own, the settings, and `tell`, which shows a line of progress."""

    settings: Settings
    folder: Path
    tell: Callable[[str], None]

    def fresh(self, request: dict[str, Any]) -> Any:
        """What `bench.claims.probe` answers, in a process whose memory can be measured and that does not interpret."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", "bench.claims.probe", json.dumps({**request, "threads": self.settings.threads})],
            cwd=ROOT, env=environment | ALLOCATOR, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            named = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt|Extra)\b.*", done.stderr, re.MULTILINE)
            raise RuntimeError(named[-1] if named else f"the probe ended with status {done.returncode}")
        return parse_json(done.stdout.strip().splitlines()[-1], "the probe")


Runner = Callable[[dict[str, Any], Context], dict[str, Any]]


def measured(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """One case of a benchmark of this folder, each provider checked, timed in turns and probed."""
    settings, out = context.settings, context.folder
    how = harness.Settings(
        device=settings.device, quick=settings.quick, providers=tuple(spec["providers"]), only=tuple(spec["only"]),
        seconds=spec["seconds"], min_rounds=spec["rounds"], memory=not settings.quick,
    )  # fmt: skip
    record = harness.run(load_operation(spec["operation"]), out, how, context.tell)
    if not record["complete"]:
        raise KeyboardInterrupt
    (entry,) = record["cases"]
    return {name: entry[name] for name in ("name", "length", "shape", "dtype", "providers")}


def probed(spec: dict[str, Any], context: Context) -> dict[str, Any]:
    """What a fresh process finds; what it cannot do here is the result's `reason`."""
    try:
        return {"found": context.fresh(spec), "reason": None}
    except RuntimeError as error:
        return {"found": None, "reason": str(error)}


RUNNERS: dict[str, Runner] = {
    "train": training.run, "pace": training.pace, "steps": training.steps, "bench": measured, "probe": probed,
}  # fmt: skip


class Journal:
    """Finished trials as JSON lines behind a line that says what they are of. The file is whole at every moment.

    Args:
        path: the file; it is read if it is there.
        head: what all trials depend on.

    Raises:
        ValueError: the file is of other settings, or no journal.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **head}
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read(path.read_text(encoding="utf-8", errors="replace"))
        self._write()

    def _read(self, text: str) -> None:
        if not (text.startswith(_BEGINNING) or _BEGINNING.startswith(text)):
            raise ValueError(f"{self.path}: no journal of a claim; choose another --out")
        lines = [line for line in map(_object, text.splitlines()) if line is not None]
        if not lines or "schema" not in lines[0]:
            return  # cut within its first line, before any trial
        before, now = lines[0], json.loads(json.dumps(self.head))
        other = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]]
        if other:
            raise ValueError(
                f"{self.path} is of another run: {'; '.join(other)}; say the same, or choose another --out"
            )
        self.rows = {line["key"]: line for line in lines[1:] if {"key", "result", "seconds"} <= line.keys()}

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return {key: row["result"] for key, row in self.rows.items()}

    @property
    def seconds(self) -> float:
        """What all its trials took."""
        return sum(row["seconds"] for row in self.rows.values())

    def add(self, key: str, result: dict[str, Any], seconds: float) -> None:
        """Keep a result. It is on the disk when this returns."""
        self.rows[key] = {"key": key, "result": result, "seconds": seconds}
        self._write()

    def _write(self) -> None:
        lines = [json.dumps(row, allow_nan=False) for row in (self.head, *self.rows.values())]
        report.write_text("\n".join(lines) + "\n", self.path)


def _object(line: str) -> dict[str, Any] | None:
    """The object in a line; None if there is none, as where a file was cut."""
    try:
        value = parse_json(line, "line")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def run(
    claim: Claim, settings: Settings, out: Path, tell: Callable[[str], None], done: Callable[[Trial, float], None]
) -> dict[str, Any]:
    """Run what is not in the journal yet, and return the record, which is also kept in `out`, with its plot.

    After Ctrl-C the record so far is returned, with `complete` false and `interrupted` true. No trial begins when the
    budget is over; then what is missing is named.

    Args:
        claim: what to try.
        settings: how.
        out: the folder; one that holds such a run is continued.
        tell: shows what is going on.
        done: is told of each finished trial and the seconds that all have taken.

    Raises:
        ValueError: `out` has another run, or something is wrong with the text.
        OSError: something cannot be read or written, or another process works in `out`.
    """
    if (out / RECORD).exists() and not (out / JOURNAL).exists():
        raise ValueError(f"{out} has a {RECORD} and no {JOURNAL}; choose another --out")
    corpus = load_corpus(settings.data).summary()
    place = machine.describe(settings.device)
    same = {name: place.get(name) for name in ("cpu", "gpu", "torch")}
    head = {"settings": asdict(settings), "machine": same, "data": corpus["fingerprint"]}
    with locked(out):
        journal = Journal(out / JOURNAL, head)
        interrupted = False
        try:
            missing = _work(claim, settings, out, journal, tell, done)
        except KeyboardInterrupt:
            interrupted, missing = True, []
        verdict = claim.verdict(settings, journal.results)
        verdict = unfinished(verdict) if missing or interrupted else verdict
        record = {
            "schema": SCHEMA, "schema_version": SCHEMA_VERSION, "claim": claim.name, "title": claim.title,
            "statement": claim.statement, "published": dict(claim.published), "method": claim.method(settings),
            "settings": asdict(settings), "machine": place, "data": corpus, "complete": not missing and not interrupted,
            "interrupted": interrupted, "missing": missing, "seconds": round(journal.seconds, 1),
            "results": journal.results, "comparisons": [one.to_dict() for one in verdict.comparisons],
            "outcome": verdict.outcome, "sentence": verdict.sentence,
        }  # fmt: skip
        report.write_json(record, out / RECORD)
        claim.plot(record, out / f"{claim.name}.png")
    return record


def _work(
    claim: Claim,
    settings: Settings,
    out: Path,
    journal: Journal,
    tell: Callable[[str], None],
    done: Callable[[Trial, float], None],
) -> list[str]:
    """Every trial that is not in the journal, while there is time. Returns the keys of those that were left out."""
    for trial in claim.trials(settings, journal.results):
        if trial.key in journal.rows:  # killed right after it was written down
            shutil.rmtree(_folder(out, trial), ignore_errors=True)
    while True:
        waiting = [trial for trial in claim.trials(settings, journal.results) if trial.key not in journal.rows]
        if not waiting:
            shutil.rmtree(out / PARTS, ignore_errors=True)
            return []
        if journal.seconds > LATE * 60 * settings.minutes and not settings.quick:
            return [trial.key for trial in waiting]
        trial, began = waiting[0], time.perf_counter()
        folder = _folder(out, trial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        context = Context(settings, folder, lambda what, key=trial.key: tell(f"{key}: {what}"))
        tell(trial.key)
        result = RUNNERS[trial.run](trial.spec, context)
        journal.add(trial.key, result, time.perf_counter() - began)
        shutil.rmtree(folder, ignore_errors=True)
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        done(trial, journal.seconds)


def _folder(out: Path, trial: Trial) -> Path:
    """Where a trial keeps what it needs to go on after a kill."""
    return out / PARTS / re.sub(r"[^\w.=+-]+", "_", trial.key)

"""One command for a machine of which nothing is known: ``python -m bench suite --device cuda --minutes 9 --out DIR``.

Steps in the order of what is missed most if the time is over: each is a process of its own with a share of the time
that is left, stopped when that is over (and the next one goes on), and each writes what it has as it goes. `suite.json`
says what became of every step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.cases import OPERATIONS
from flashgau.ops.dispatch import FILES

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 10.0  # seconds between the wish that a step end, as by Ctrl-C, and its end
# Operations by what their results are wanted for most; those that are not here come after, in their own order.
FIRST = ("attention", "mixed_chunk", "gau", "glu", "flash_layer")
TESTED = (
    *("attention", "attention_laws", "attention_packing", "glu", "gau"),
    *("mixed_chunk", "mixed_chunk_laws", "mixed_chunk_states", "mixed_chunk_packing"),
)
TESTS = tuple(f"tests/test_{name}.py" for name in TESTED)


@dataclass(frozen=True)
class Step:
    """A command, and how much of the time it may take beside the others."""

    name: str
    command: tuple[str, ...]
    weight: float


def steps(device: str, out: Path, quick: bool) -> list[Step]:
    """What there is to do, the most important first."""
    python = sys.executable
    small = ("--quick",) if quick else ()

    def check(op: str) -> Step:
        return Step(f"check {op}", (python, "-m", "flashgau", "check", "--device", device, "--op", op, "--json"), 1.0)

    def bench(op: str) -> Step:
        command = (python, "-m", "bench", op, "--device", device, "--out", str(out / op), *small)
        return Step(
            f"bench {op}", (*command, *(() if quick else ("--seconds", "3" if device == "cuda" else "10"))), 1.0
        )

    found = [
        Step("doctor", (python, "-m", "flashgau", "doctor", "--json"), 0.2),
        check("attention"),
        bench("attention"),
    ]
    checked = [check(op) for op in FILES if op != "attention"]
    timed = [bench(op) for op in dict.fromkeys((*FIRST, *OPERATIONS)) if op != "attention"]
    found += [*checked, *timed]
    if importlib.util.find_spec("pytest") is not None and not quick:
        only = ("-k", "triton") if device == "cuda" else ()
        tests = Step("tests", (python, "-m", "pytest", "-x", "-q", *only, *TESTS), 2.0)
        found.insert(3 + len(checked), tests)
    if device == "cuda":
        tune = (python, "-m", "flashgau", "tune", "--device", device, "--json", "--minutes")
        found.insert(3, Step("tune", (*tune, "0.2" if quick else "1.5"), 2.0))
    return found


def share(left: float, waiting: list[Step]) -> float:
    """Seconds for the first of the steps that wait, by its weight: what earlier ones did not need goes to all."""
    return left * waiting[0].weight / sum(step.weight for step in waiting)


Run = Callable[[Step, float, Path], dict[str, Any]]


def run_step(step: Step, limit: float, log: Path) -> dict[str, Any]:
    """Run a step for at most `limit` seconds; what it prints goes to `log` as it comes."""
    began = time.monotonic()
    environment = dict(os.environ, FLASHGAU_TUNING=str(log.parent / "tuning"), PYTHONUNBUFFERED="1")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        over = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            over = True
            _end(process)
        except BaseException:
            _end(process)
            raise
    return {"status": process.returncode, "over": over, "seconds": round(time.monotonic() - began, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would, which leaves results written; then the whole group without further wish."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    device: str, minutes: float, out: Path, quick: bool, say: Callable[[str], None], run_one: Run = run_step
) -> dict[str, Any]:
    """Run the steps and return what is in `out/suite.json`, which is written after each. Ctrl-C ends it with that."""
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "schema": "flashgau-suite", "schema_version": 1, "device": device, "minutes": minutes, "quick": quick,
        "complete": False, "machine": machine.describe("cpu"), "steps": [],
    }  # fmt: skip
    ends, waiting = time.monotonic() + 60 * minutes, steps(device, out, quick)
    try:
        while waiting:
            step = waiting[0]
            left = ends - PATIENCE - time.monotonic()
            limit = max(share(left, waiting), min(left, PATIENCE))  # what starts at all gets a few seconds
            row: dict[str, Any] = {"name": step.name, "command": list(step.command[1:])}
            if limit < 1:
                row |= {"status": None, "over": True, "seconds": 0.0}
            else:
                log = out / f"{step.name.replace(' ', '_')}.log"
                row |= {"log": log.name, **run_one(step, limit, log)}
            record["steps"].append(row)
            waiting.pop(0)
            say(f"{step.name}: {verdict(row)} in {row['seconds']:.0f} s")
            report.write_json(record, out / "suite.json")
        record["complete"] = True
    except KeyboardInterrupt:
        pass
    report.write_json(record, out / "suite.json")
    return record


def verdict(row: dict[str, Any]) -> str:
    """What became of a step, in a word or two."""
    if row["status"] is None:
        return "no time left"
    if row["over"]:
        return "stopped, time over"
    return "ok" if row["status"] == 0 else f"status {row['status']}"

"""``python -m bench startup``: how long the command line takes to answer, and an operation's first call in a process.

A first call is `import flashgau` and one small call on the CPU, after `import torch`, by the clock of a process of its
own. Processes of every kind take turns in random order, one at a time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import machine

ROOT = Path(__file__).resolve().parent.parent
SCHEMA, SCHEMA_VERSION = "flashgau-startup", 1
LIMIT = 0.3  # seconds, of each
ROUNDS = 9

CALLS = {
    "attention": "flashgau.attention(x, x, x, causal=True)",
    "glu": "flashgau.glu(x, x)",
    "glu_linear": "flashgau.glu_linear(x, w, w)",
    "gau_attention": "flashgau.gau_attention(x[0], x[0], x[0])",
    "mixed_chunk_attention": "flashgau.mixed_chunk_attention(*[x[0]] * 5, chunk_size=16, causal=True)",
}
FIRST_CALL = """
import time, torch
x, w = torch.ones(1, 2, 32, 16), torch.ones(8, 16)
begin = time.perf_counter()
import flashgau
{call}
print(time.perf_counter() - begin)
"""
WHOLE = {"python, doing nothing": ["-c", "pass"], "flashgau --help": ["-m", "flashgau", "--help"]}


def run(rounds: int, advance: Callable[[str], None]) -> dict[str, Any]:
    """Every kind of process `rounds` times, and once before that, which leaves Python's bytecode for the others."""
    record = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "limit_seconds": LIMIT}
    record["machine"] = machine.describe("cpu")
    names = [*WHOLE, *CALLS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in random.sample(names, len(names)):
            taken = _once(name)
            if number:
                seconds[name].append(taken)
            advance(name)
    record["machine"]["load_average_after"] = machine.load_average()
    return record | {"seconds": seconds}


def _once(name: str) -> float:
    """Seconds of one process: by its own clock if it makes a call, from its start to its end if not.

    Raises:
        RuntimeError: it failed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "TRITON_INTERPRET")}
    arguments = WHOLE.get(name) or ["-c", FIRST_CALL.format(call=CALLS[name])]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    taken = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return taken if name in WHOLE else float(done.stdout)


def main(rounds: int, out: Path, errors: Console, console: Console) -> int:
    """0 if every median is within the limit, 1 if not or if a process failed."""
    from rich.progress import Progress

    try:
        with Progress(console=errors, transient=True) as bar:
            task = bar.add_task("start", total=(rounds + 1) * (len(WHOLE) + len(CALLS)))
            record = run(rounds, lambda what: bar.update(task, advance=1, description=what))
        out.mkdir(parents=True, exist_ok=True)
        (out / "startup.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (RuntimeError, OSError) as error:
        errors.print(f"bench startup: {error}", markup=False, highlight=False)
        return 1
    table = Table("ms", "minimum", "median", "largest", f"within {LIMIT:g} s")
    met = True
    for name, times in record["seconds"].items():
        within = statistics.median(times) <= LIMIT
        met &= within
        numbers = (f"{1e3 * f(times):.0f}" for f in (min, statistics.median, max))
        table.add_row(name if name in WHOLE else f"{name}, first call", *numbers, "yes" if within else "no")
    console.print(table)
    facts = record["machine"]
    before, after = (facts[f"load_average_{when}"] or [float("nan")] for when in ("before", "after"))
    load = f"load {before[0]:.1f} before and {after[0]:.1f} after"
    console.print(f"{rounds} processes of each on {facts['cores']} x {facts['cpu']}, {load}", highlight=False)
    console.print(f"wrote {out / 'startup.json'}", highlight=False)
    return 0 if met else 1

"""Command line: ``python -m bench claims NAME --scale cpu|gpu``, and ``python -m bench claims table``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.claims import NAMES, Settings, Trial, load, run, table
from flashgau.cli.console import seconds as duration


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench claims",
        description="Measure a claim of the papers here, and say whether it holds. The same command continues a run "
        "that was stopped.",
    )
    parser.add_argument(
        "name", choices=(*NAMES, "all", "table"), metavar="NAME",
        help=", ".join(NAMES) + "; all: one after the other; table: fill the table of the documentation from the "
        "records under bench/results/claims",
    )  # fmt: skip
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="sizes and device (default: cpu)")
    parser.add_argument("--minutes", type=float, default=30.0, help="for each claim in all (default: 30)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--data", metavar="PATH", help="file or folder of text (default: Python's standard library)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/claims/NAME-SCALE; with all: DIR/NAME; "
                        "of table: the page, docs/benchmarks.md")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads for everyone (default: torch's)")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # sizes for a test
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Exit status: 0 measured, whatever was found; 1 a claim could not be tried; 2 a bad request; 130 interrupted."""
    options, errors = parse(arguments), Console(stderr=True)
    try:
        if options.name == "table":
            page = table.fill(options.out or table.PAGE)
            errors.print(f"wrote {page}", highlight=False, markup=False)
            return 0
        _check(options)
    except (ValueError, OSError) as error:
        errors.print(f"bench claims: {error}", markup=False, highlight=False)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    worst = 0
    for name in NAMES if options.name == "all" else (options.name,):
        worst = max(worst, _one(name, options, errors))
        if worst == 130:
            break
    return worst


def _check(options: argparse.Namespace) -> None:
    """Refuse what no run can mean."""
    for name in ("minutes", "seeds", "threads"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; expected a positive number")
    if options.scale == "gpu" and not torch.cuda.is_available():
        raise ValueError("--scale gpu, but torch sees no GPU here")


def _one(name: str, options: argparse.Namespace, errors: Console) -> int:
    settings = Settings(
        name, options.scale, options.minutes, options.seeds, options.data, torch.get_num_threads(), options.quick
    )
    if options.name == "all":
        out = (options.out or Path("runs/claims") / options.scale) / name
    else:
        out = options.out or Path("runs/claims") / f"{name}-{options.scale}"
    claim = load(name)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("of the time"),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
            task = bar.add_task(name, total=60 * options.minutes)

            def done(trial: Trial, seconds: float) -> None:
                bar.update(task, completed=seconds)
                errors.print(f"{name}: {trial.key} done, {duration(seconds)} in all", highlight=False, markup=False)

            record = run.run(claim, settings, out, lambda what: bar.update(task, description=f"{name} {what}"), done)
    except (ValueError, OSError, RuntimeError) as error:
        errors.print(f"bench claims: {error}", markup=False, highlight=False)
        return 2 if isinstance(error, (ValueError, OSError)) else 1
    console = Console(soft_wrap=True)
    console.print(record["sentence"], highlight=False, markup=False)
    if record["missing"] and not record["interrupted"]:
        console.print(f"The time was over before {len(record['missing'])} trials.", highlight=False, markup=False)
    for path in (out / run.RECORD, out / f"{name}.png"):
        console.print(f"wrote {path}", highlight=False, markup=False)
    return 130 if record["interrupted"] else 0

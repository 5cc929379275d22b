"""Command line: ``python -m bench OP``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import harness, report
from bench.cases import OPERATIONS, load


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time an operation and its alternatives side by side, after checking each against fp64.",
    )
    parser.add_argument("operation", choices=OPERATIONS, metavar="OP", help=", ".join(OPERATIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--providers", default="", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--only", default="", metavar="WORD,WORD", help="only cases whose name contains every word")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results go here (default: runs/bench/OP)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it work at all?")
    parser.add_argument("--threads", type=int, help="CPU threads for everyone (default: torch's)")
    parser.add_argument("--seconds", type=float, help="time to spend on one pass of one case (default: 20)")
    parser.add_argument("--rounds", type=int, help="exactly this many rounds, whatever the time")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    return parser.parse_args(arguments)


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def settings_from(options: argparse.Namespace) -> harness.Settings:
    default = harness.Settings()
    least, most = (2, 3) if options.quick else (default.min_rounds, default.max_rounds)
    return harness.Settings(
        device=options.device,
        quick=options.quick,
        providers=words(options.providers),
        only=words(options.only),
        seconds=options.seconds or (0.5 if options.quick else default.seconds),
        min_rounds=options.rounds or least,
        max_rounds=options.rounds or most,
        memory=not options.no_memory,
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 measured; 1 a provider of ours is wrong or failed; 2 a bad request; 130 interrupted."""
    options = parse(arguments)
    errors = Console(stderr=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        errors.print("bench: --device cuda, but torch sees no GPU here")
        return 2
    for name in ("threads", "rounds", "seconds"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            errors.print(f"bench: --{name} must be positive")
            return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out or Path("runs/bench") / options.operation
    settings = settings_from(options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        operation = load(options.operation)
        total = harness.steps(operation, settings)
        with Progress(*columns, console=errors, transient=True) as bar:
            task = bar.add_task("start", total=total + 1)
            record = harness.run(operation, out, settings, lambda what: bar.update(task, advance=1, description=what))
    except (ValueError, OSError) as error:
        errors.print(f"bench: {error}", markup=False)
        return 2
    console = Console() if sys.stdout.isatty() else Console(width=170)
    report.show(record, console)
    for path in (out / "results.json", *report.plot(record, out)):
        console.print(f"wrote {path}", highlight=False)
    if not record["complete"]:
        return 130
    results = [(n, r) for entry in record["cases"] for n, r in entry["providers"].items()]
    return int(any(n.startswith("flashgau") and r["status"] in ("wrong", "failed") for n, r in results))


if __name__ == "__main__":
    sys.exit(main())

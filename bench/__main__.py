"""Command line: ``python -m bench OP``, and ``suite``, ``report``, ``startup`` or ``claims`` in its place."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from flashgau.extras import MissingExtra, extra

try:
    with extra("bench"):
        import matplotlib  # noqa: F401  # which bench.report draws with
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from flashgau.cli.console import with_outputs
except MissingExtra as missing:
    sys.exit(f"bench: {missing}")

from bench import harness, page, report, startup, suite
from bench.cases import OPERATIONS, load
from bench.claims import command as claims


def parse(arguments: list[str]) -> argparse.Namespace:
    if arguments[:1] == ["claims"]:
        return claims.parse(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time an operation and its alternatives side by side, after checking each against fp64.",
    )
    parser.add_argument(
        "operation", choices=(*OPERATIONS, "suite", "report", "startup"), metavar="OP",
        help=", ".join(OPERATIONS) + "; suite: check, tune and time everything in --minutes; "
        "report: make the page on performance, in --out (default: docs), of all results under bench/results; "
        "startup: the command line's answer, and first calls, in fresh processes; "
        "claims, as the first word: the papers' figures, with options of its own (python -m bench claims --help)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--providers", default="", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--only", default="", metavar="WORD,WORD", help="only cases whose name contains every word")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results go here (default: runs/bench/OP)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it work at all?")
    parser.add_argument("--threads", type=int, help="CPU threads for everyone (default: torch's)")
    parser.add_argument("--seconds", type=float, help="time to spend on one pass of one case (default: 20)")
    parser.add_argument("--rounds", type=int, help="exactly this many rounds, whatever the time")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for a whole suite (default: 9)")
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
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["claims"]:
        return with_outputs("bench claims", lambda: claims.main(given[1:]))
    return with_outputs("bench", lambda: _run(given))


def _run(arguments: list[str]) -> int:
    options = parse(arguments)
    errors = Console(stderr=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        errors.print("bench: --device cuda, but torch sees no GPU here")
        return 2
    for name in ("threads", "rounds", "seconds", "minutes"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            errors.print(f"bench: --{name} must be positive")
            return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.operation in ("suite", "report"):
        return run_suite(options, errors) if options.operation == "suite" else write_page(options, errors)
    out = options.out or Path("runs/bench") / options.operation
    if options.operation == "startup":
        return startup.main(options.rounds or (1 if options.quick else startup.ROUNDS), out, errors, Console())
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
    drawn = report.plot(record, out)
    if operation.plot is not None and operation.plot(record, out / "context.png"):
        drawn.append(out / "context.png")
    for path in (out / "results.json", *drawn):
        console.print(f"wrote {path}", highlight=False)
    if not record["complete"]:
        return 130
    results = [(n, r) for entry in record["cases"] for n, r in entry["providers"].items()]
    return int(any(n.startswith("flashgau") and r["status"] in ("wrong", "failed") for n, r in results))


def run_suite(options: argparse.Namespace, errors: Console) -> int:
    """0 if every step ran and succeeded, 130 if Ctrl-C ended them, else 1."""
    out = (options.out or Path("runs/bench/suite")).resolve()
    say = partial(errors.print, highlight=False)
    record = suite.run(options.device, options.minutes, out, options.quick, say)
    errors.print(f"wrote {out / 'suite.json'}", highlight=False)
    if not record["complete"]:
        return 130
    return int(any(suite.verdict(row) != "ok" for row in record["steps"]))


def write_page(options: argparse.Namespace, errors: Console) -> int:
    root = Path(__file__).resolve().parent.parent
    try:
        written = page.write(root / "bench" / "results", options.out or root / "docs")
    except (ValueError, OSError) as error:
        errors.print(f"bench: {error}", markup=False)
        return 2
    for path in written:
        errors.print(f"wrote {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

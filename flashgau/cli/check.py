"""`flashgau check`: every operation and option held to the fp64 reference, on this machine."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashgau.cli.console import FAILURE, USAGE, dump_json, fail, make_console, make_table, seconds, usable_device
from flashgau.cli.doctor import OPERATIONS
from flashgau.extras import wheel

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from flashgau.verification.cases import CheckCase
    from flashgau.verification.checking import Row

BACKENDS = ("triton", "eager", "reference")
WIDE = 110  # columns that the whole table needs
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def run_with_progress(pairs: list[tuple[CheckCase, str]], device: torch.device, seed: int = 0) -> list[Row]:
    """`run_cases` with a progress bar on standard error where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from flashgau.verification.checking import run_cases

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("check", total=len(pairs))
        missed = 0

        def on_row(row: Row) -> None:
            nonlocal missed
            missed += not row.ok
            text = row.op + (f", {missed} missed" if missed else "")
            progress.update(task, advance=1, description=text)

        return run_cases(pairs, device, seed, on_row)


def number(value: float | None) -> str:
    """An error for a table: two significant digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.1e}"


def show(rows: list[Row], console: Console, everything: bool = True) -> None:
    """Print one line per case (`everything`) or only those that missed, then one line per operation.

    The columns "error", "plain" and "allowed" are the backend's largest error in the case's worst tensor, that of
    plain PyTorch of the same dtype, and the tolerance. A narrow terminal shows the case and the verdict only.
    """
    from flashgau.verification.checking import summary

    listed = rows if everything else [row for row in rows if not row.ok]
    if listed:
        numbers = ("error", "plain", "allowed") if console.width >= WIDE else ()
        where = ("worst in",) if numbers else ()
        fixed = ("operation", "type", "worst in", "verdict")
        names = ("operation", "options", "shape", "type", *where, *numbers, "verdict")
        table = make_table(*names, right=numbers, fixed=fixed)
        for row in listed:
            cells = [row.op, row.options, row.shape, SHORT[row.dtype]]
            if numbers:
                cells += [row.worst, number(row.max_error), number(row.plain_max_error), number(row.tolerance)]
            table.add_row(*cells, row.verdict, style=None if row.ok else "bold red")
        console.print(table)
    failures = Counter((row.op, row.detail) for row in rows if row.detail)
    for (op, detail), count in failures.items():
        console.print(f"{op}, {count} cases: {detail}", style="red", soft_wrap=True)
    numbers = ("cases", "missed", "largest error / allowed")
    table = make_table("operation", "backend", *numbers, right=numbers)
    for op, backends, count, missed, share in summary(rows):
        table.add_row(op, backends, str(count), str(missed), "-" if share is None else f"{share:.0%}")
    console.print(table)


def check(
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.", metavar="DEVICE")] = "cpu",
    op: Annotated[str | None, typer.Option(help=f"Only this operation: {', '.join(OPERATIONS)}.", metavar="OP")] = None,
    backend: Annotated[
        str | None,
        typer.Option(help=f"Hold this backend: {', '.join(BACKENDS)}. Else each default.", metavar="NAME"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    thorough: Annotated[bool, typer.Option("--thorough", help="Every option at many lengths.")] = False,
    seed: Annotated[int, typer.Option(help="Draw other values.", metavar="N", min=0, max=2**64 - 1)] = 0,
    execute: Annotated[
        str | None,
        typer.Option(help="Compile the kernels for these GPUs, and execute what the compiler gives.", metavar="NAMES"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="With --execute: only bf16, fp16 or fp32.", metavar="NAME")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="With --execute: each kernel once, in bf16.")] = False,
    counts: Annotated[bool, typer.Option("--counts", help="With --execute: what each case did.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --execute: keep rows here; go on where it stopped.", metavar="FILE")
    ] = None,
    processes: Annotated[
        int, typer.Option(metavar="N", min=0, max=1024, help="With --execute: how many run at once; 0 for all.")
    ] = 0,
) -> None:
    """Hold every operation and option to the fp64 reference on this machine.

    Each case runs forward and backward. Its largest error may be twice that of plain PyTorch in the same
    dtype (three times for gradients) plus a few units in the last place. The table shows the largest error, plain
    PyTorch's, and what is allowed, for the tensor of each case that comes nearest to it. Where Triton runs, so does
    every launch configuration in the tables of the device. Exit status 1 if a case misses.

    With --execute no GPU is needed: the kernels are compiled for one (sm_80, sm_90), in every configuration that is
    shipped for it and with every option, and their PTX is executed. Races, stray accesses and early reads are errors.

    \b
    Examples:
      flashgau check
      flashgau check --op attention --backend eager
      flashgau check --device cuda --thorough
      flashgau check --json > check.json
      flashgau check --execute sm_80,sm_90 --quick
    """
    if op is not None and op not in OPERATIONS:
        fail("check", f"no operation is called {op!r}; there are {', '.join(OPERATIONS)}", USAGE)
    if backend is not None and backend not in BACKENDS:
        fail("check", f"no backend is called {backend!r}; there are {', '.join(BACKENDS)}", USAGE)

    if execute is not None:
        if device != "cpu" or backend is not None or thorough or seed:
            fail(
                "check",
                "--execute runs Triton's kernels on the CPU: expected no --device, --backend, --thorough, --seed",
                USAGE,
            )
        with wheel("instruments"):
            from flashgau.cli.instruments.executed import executed
        executed(execute, op, dtype, quick, counts, out, processes, as_json)
        return
    if dtype is not None or quick or counts or out is not None or processes:
        fail("check", "--dtype, --quick, --counts, --out and --processes come with --execute", USAGE)

    from flashgau.verification.checking import select

    where = usable_device("check", device)
    try:
        pairs = select(op, backend, where, thorough)
    except ValueError as error:
        fail("check", str(error), USAGE)

    started = time.perf_counter()
    rows = run_with_progress(pairs, where, seed)
    elapsed = time.perf_counter() - started
    missed = sum(not row.ok for row in rows)
    if as_json:
        facts = {"device": device, "seed": seed, "seconds": elapsed, "cases": len(rows), "missed": missed}
        print(dump_json({**facts, "rows": [asdict(row) for row in rows]}))
    else:
        show(rows, make_console())
        print(f"{len(rows)} cases on {device} in {seconds(elapsed)}: {missed or 'none'} missed")
    if missed:
        raise typer.Exit(FAILURE)

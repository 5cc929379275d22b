"""`flashgau check`: every operation and option held to the fp64 reference, on this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashgau.cli.console import FAILURE, USAGE, dump_json, fail, make_console, make_table, seconds, usable_device
from flashgau.cli.doctor import OPERATIONS

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from flashgau.cli.cases import CheckCase
    from flashgau.ops.compare import Report

BACKENDS = ("triton", "eager", "reference")
# What is kept of each tensor that `compare` reports on.
FIELDS = ("name", "max_error", "rms_error", "plain_max_error", "plain_rms_error", "tolerance", "ok")
WIDE = 110  # columns that the whole table needs
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Row:
    """The verdict on one case, with the errors of its worst tensor: the one nearest to, or past, its tolerance.

    `verdict` is "ok", "miss" (an error past its tolerance) or "error" (the call itself failed: see `detail`).
    """

    op: str
    options: str
    shape: str
    dtype: str
    backend: str
    verdict: str
    worst: str = ""
    max_error: float | None = None
    plain_max_error: float | None = None
    tolerance: float | None = None
    detail: str = ""
    tensors: tuple[dict[str, Any], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the case agrees with the reference."""
        return self.verdict == "ok"


def select(op: str | None, backend: str | None, device: torch.device, thorough: bool) -> list[tuple[CheckCase, str]]:
    """The cases that can run on `device`, each with the backend to hold to the reference.

    Without `backend` that is the one a call would use. A named backend that does not take a dtype (Triton and
    fp64) is not asked for it. Where it is Triton, one case more for every launch configuration of the device's tables.

    Raises:
        ValueError: no case can run; with the reason.
    """
    import torch

    from flashgau.cli.cases import all_cases
    from flashgau.ops import dispatch

    chosen: dict[tuple[str, str], str | None] = {}
    reasons: list[str] = []
    pairs = []
    for case in all_cases(op, thorough):
        key = case.op, case.dtype
        if key not in chosen:
            dtype = getattr(torch, case.dtype)
            if backend is None:
                chosen[key] = dispatch.resolve(case.op, None, device, dtype)
            else:
                reason = dict(dispatch.explain(case.op, device, dtype)).get(backend, "it does not exist")
                chosen[key] = backend if reason is None else None
                reasons += [reason] if reason is not None else []
        name = chosen[key]
        if name is not None:
            pairs.append((case, name))
    if not pairs:
        raise ValueError(f"backend {backend!r} cannot run on {device}: {reasons[0]}")
    launched = {case.op for case, name in pairs if name == "triton"}
    if launched:
        from flashgau.cli.configurations import cases_of  # which needs Triton

        pairs += [(case, "triton") for case in cases_of(device, launched)]
    return pairs


def _row(case: CheckCase, backend: str, device: torch.device, seed: int) -> Row:
    row = Row(case.op, case.options, case.shape, case.dtype, backend, verdict="error")
    try:
        report = _report(case, backend, device, seed)
    except Exception as error:  # whatever goes wrong in one case is its verdict, and the others still run
        return replace(row, detail=" ".join(f"{type(error).__name__}: {error}".split()))
    tensors = tuple({name: getattr(tensor, name) for name in FIELDS} for tensor in report.rows)
    if not tensors:
        return replace(row, detail="nothing was compared")
    worst = max(tensors, key=_nearness)
    return replace(
        row,
        verdict="ok" if report.ok else "miss",
        worst=worst["name"],
        max_error=worst["max_error"],
        plain_max_error=worst["plain_max_error"],
        tolerance=worst["tolerance"],
        tensors=tensors,
    )


def _report(case: CheckCase, backend: str, device: torch.device, seed: int) -> Report:
    import torch

    import flashgau

    if hasattr(case, "config"):
        from flashgau.cli import configurations

        assert isinstance(case, configurations.Configured)
        return configurations.hold(case, device, seed)
    arguments, keywords = case.arguments(device, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # `compare` draws the weights of the gradients
        return flashgau.compare(getattr(flashgau, case.op), *arguments, backend=backend, **keywords)


def _nearness(tensor: dict[str, Any]) -> tuple[bool, float]:
    """Orders tensors by how near their error is to the tolerance; those past it come last."""
    error, tolerance = tensor["max_error"], tensor["tolerance"]
    if error != error:
        return True, float("inf")
    share = error / tolerance if tolerance > 0 else (float("inf") if error > 0 else 0.0)
    return not tensor["ok"], share


def run_cases(
    pairs: Iterable[tuple[CheckCase, str]],
    device: torch.device,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Run each (case, backend) and return its row; `on_row` is told of each as it comes."""
    rows = []
    for case, backend in pairs:
        row = _row(case, backend, device, seed)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def run_with_progress(pairs: list[tuple[CheckCase, str]], device: torch.device, seed: int = 0) -> list[Row]:
    """`run_cases` with a progress bar on standard error where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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


def summary(rows: list[Row]) -> list[tuple[str, str, int, int, float | None]]:
    """(operation, backends, cases, misses, largest error as a share of its tolerance) per operation."""
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == op]
        backends = ", ".join(dict.fromkeys(row.backend for row in own))
        shares = [row.max_error / row.tolerance for row in own if row.max_error is not None and row.tolerance]
        lines.append((op, backends, len(own), sum(not row.ok for row in own), max(shares, default=None)))
    return lines


def show(rows: list[Row], console: Console, everything: bool = True) -> None:
    """Print one line per case (`everything`) or only those that missed, then one line per operation.

    The columns "error", "plain" and "allowed" are the backend's largest error in the case's worst tensor, that of
    plain PyTorch of the same dtype, and the tolerance. A narrow terminal shows the case and the verdict only.
    """
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
) -> None:
    """Hold every operation and option to the fp64 reference on this machine.

    Each case runs forward and backward. Its largest error may be twice that of plain PyTorch in the same
    dtype (three times for gradients) plus a few units in the last place. The table shows the largest error, plain
    PyTorch's, and what is allowed, for the tensor of each case that comes nearest to it. Where Triton runs, so does
    every launch configuration in the tables of the device. Exit status 1 if a case misses.

    \b
    Examples:
      flashgau check
      flashgau check --op attention --backend eager
      flashgau check --device cuda --thorough
      flashgau check --json > check.json
    """
    if op is not None and op not in OPERATIONS:
        fail("check", f"no operation is called {op!r}; there are {', '.join(OPERATIONS)}", USAGE)
    if backend is not None and backend not in BACKENDS:
        fail("check", f"no backend is called {backend!r}; there are {', '.join(BACKENDS)}", USAGE)

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

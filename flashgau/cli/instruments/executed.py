"""`flashgau check --execute`: compiled kernels, executed without their GPU and held to the fp64 reference."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashgau.cli.console import FAILURE, USAGE, dump_json, fail, make_console, make_table, seconds
from flashgau.cli.filters import words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from flashgau.cli.instruments.executing import Task
    from flashgau.verification.checking import Row

LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SCHEMA = "flashgau-check-execute"
EVERY = 30  # seconds between the times at which rows are kept


def executed(
    targets: str,
    op: str | None,
    dtype: str | None,
    quick: bool,
    counts: bool,
    out: Path | None,
    processes: int,
    as_json: bool,
) -> None:
    """Run every case that is not in `out` yet, and report all."""
    from flashgau.cli.instruments import executing

    if dtype is not None and dtype not in LONG and dtype not in LONG.values():
        fail("check", f"no dtype is called {dtype!r}; there are {', '.join(LONG)}", USAGE)
    try:
        work = executing.tasks(words(targets), op, LONG.get(dtype or "", dtype), quick)
    except ValueError as error:
        fail("check", str(error).partition(": ")[2], USAGE)
    except RuntimeError as error:
        fail("check", str(error))
    kept = Kept(out)
    left = [task for task in work if kept.row_of(task) is None]
    started = time.perf_counter()
    try:
        for task, row in with_progress(
            executing.execute_all(left, processes or None), len(work), len(work) - len(left)
        ):
            kept.add(task, row)
    finally:  # Ctrl-C included
        kept.write()
    rows = [kept.rows[kept.name_of(task)] for task in work]
    elapsed = time.perf_counter() - started
    missed = [row for row in rows if not row.ok]
    if as_json:
        facts = {**kept.facts, "seconds": elapsed, "cases": len(rows), "missed": len(missed)}
        print(dump_json({**facts, "rows": [asdict(row) for row in rows]}))
    else:
        show(rows, make_console(), counts)
        print(f"{len(left)} of {len(rows)} cases executed in {seconds(elapsed)}: {len(missed) or 'none'} missed")
    if missed:
        raise typer.Exit(FAILURE)


class Kept:
    """Rows by task, in a file if there is one: it is whole at every moment, and only goes on with the same versions."""

    path: Path | None
    written: float

    def __init__(self, path: Path | None) -> None:
        from flashgau.verification.candidates import versions

        self.path, self.written = path, time.monotonic()
        self.facts: dict[str, Any] = {"schema": SCHEMA, "schema_version": 1, "versions": versions()}
        self.rows: dict[str, Row] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        from flashgau.files import parse_json, read_text
        from flashgau.verification.checking import Row

        try:
            found = parse_json(read_text(path), str(path))
            facts = {name: found[name] for name in self.facts}
            rows = {x["task"]: Row(**x["row"]) for x in found["rows"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail("check", f"{path} holds no rows of `flashgau check --execute`: {error}", USAGE)
        if facts != self.facts:
            fail("check", f"{path} is of other versions, {facts['versions']}; expected another --out", USAGE)
        self.rows = {name: row for name, row in rows.items() if row.ok}  # what missed is tried again

    @staticmethod
    def name_of(task: Task) -> str:
        """What its row is kept under."""
        return f"{task.target} {task.case.key}"

    def row_of(self, task: Task) -> Row | None:
        """What is known of a task."""
        return self.rows.get(self.name_of(task))

    def add(self, task: Task, row: Row) -> None:
        """Keep one, and write the file now and then."""
        self.rows[self.name_of(task)] = row
        if time.monotonic() - self.written > EVERY:
            self.write()

    def write(self) -> None:
        """The file, if there is to be one."""
        from flashgau.files import atomic_write

        self.written = time.monotonic()
        if self.path is None:
            return
        rows = [{"task": name, "row": asdict(replace(row, tensors=()))} for name, row in self.rows.items()]
        with atomic_write(self.path) as stream:
            stream.write((json.dumps({**self.facts, "rows": rows}, indent=1) + "\n").encode())


def with_progress(done: Iterable[tuple[Task, Row]], total: int, before: int) -> Iterable[tuple[Task, Row]]:
    """A progress bar on standard error; where that is no terminal, a line a minute."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    missed, said = 0, time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("execute", total=total, completed=before)
        for number, (task, row) in enumerate(done, before + 1):
            missed += not row.ok
            text = f"{task.target} {row.op}" + (f", {missed} missed" if missed else "")
            progress.update(bar, advance=1, description=text)
            if not console.is_terminal and time.monotonic() - said > 60:
                said = time.monotonic()
                console.print(f"{number} of {total} cases, {missed} missed")
            yield task, row


def show(rows: list[Row], console: Console, counts: bool) -> None:
    """What missed, line by line; with `counts` what every case did; then one line for each operation and target."""
    from flashgau.verification.checking import summary

    if counts:
        table = make_table(
            "target", "operation", "options", "shape", "dtype", "launches", "blocks", "read", "written", "matrix FLOP",
            "instructions", right=("launches", "blocks", "read", "written", "matrix FLOP", "instructions"),
        )  # fmt: skip
        for row in rows:
            c = row.counts or {}
            numbers = [c.get(name, 0) for name in ("launches", "blocks", "read_bytes", "written_bytes", "matrix_flops")]
            numbers.append(sum(c.get("instructions", {}).values()))
            where = row.backend.rpartition(" ")[2]
            table.add_row(where, row.op, row.options, row.shape, row.dtype, *(f"{n:,}" for n in numbers))
        console.print(table)
    for row in rows:
        if not row.ok:
            what = row.detail or f"{row.worst}: error {row.max_error:.1e}, allowed {row.tolerance:.1e}"
            console.print(f"{row.backend}: {row.op}, {row.options}, {row.shape}, {row.dtype}: {what}", style="red",
                          soft_wrap=True)  # fmt: skip
    figures = ("cases", "missed", "largest error / allowed")
    table = make_table("operation", "backend", *figures, right=figures)
    for backend in dict.fromkeys(row.backend for row in rows):
        for op, _, count, missed, share in summary([row for row in rows if row.backend == backend]):
            table.add_row(op, backend, str(count), str(missed), "-" if share is None else f"{share:.0%}")
    console.print(table)

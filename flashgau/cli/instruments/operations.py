"""`flashgau compile --operations`: every launch of a call, its bytes and a model of its time, beside recorded ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgau.cli.console import FAILURE, USAGE, counted, dump_json, fail, failing, make_console, make_table, write_rows

if TYPE_CHECKING:
    from flashgau.roof import Row
    from flashgau.roof.against import Changes

SCHEMA = {"schema": "flashgau-operations", "schema_version": 1}


def report(
    targets: list[str],
    ops: frozenset[str] | None,
    dtypes: tuple[str, ...] | None,
    processes: int,
    out: Path | None,
    against: Path | None,
    as_json: bool,
) -> int:
    """Make, print, record and compare the rows of these operations; the exit status."""
    from flashgau import roof
    from flashgau.roof.against import compare, place

    try:
        work = roof.tasks(targets, dtypes or ("bf16",), ops)
    except ValueError as error:
        fail("compile", str(error), USAGE)
    if not work:
        fail("compile", "there is no operation of this name in the table", USAGE)
    with failing("compile"):
        before = None if against is None else read(against)
    rows = list(counted(roof.examine_all(work, processes or None), len(work), "examining"))
    order = {(task.target, task.dtype, task.case): number for number, task in enumerate(work)}
    rows.sort(key=lambda row: order[row.target, row.dtype, f"{row.op} {row.direction} {row.shape}"])
    kept = [recorded(row) for row in rows]
    changes = None if before is None else compare(kept, before, [place(row) for row in kept])
    if out is not None:
        with failing("compile"):
            record(out, kept)
    show(rows, changes, as_json)
    failed = any(row.reason for row in rows) or (changes is not None and changes.worse)
    return FAILURE if failed else 0


def recorded(row: Row) -> dict[str, Any]:
    """A row without its launches, and with four digits of what is no whole number."""
    plain = {name: value for name, value in asdict(row).items() if name != "details"}
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in plain.items()}


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what `--against` needs: a line for each row that has a result."""
    kept = [row for row in rows if row["reason"] is None]
    write_rows(path, {**SCHEMA, "versions": {"triton": version("triton")}}, kept)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `record` or `--json` wrote.

    Raises:
        ValueError: if it is none.
        OSError: if it cannot be read.
    """
    from flashgau.roof.against import place

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {name: found[name] for name in SCHEMA} != SCHEMA:
            raise ValueError
        for row in found["rows"]:
            place(row), row["launches"], row["programs"], row["bytes"], row["ns"]
        return [row for row in found["rows"] if row["reason"] is None]
    except (ValueError, KeyError, TypeError) as error:
        text = "holds no recorded operations; `flashgau compile --operations --out FILE` writes them"
        raise ValueError(f"{path} {text}") from error


def show(rows: list[Row], changes: Changes | None, as_json: bool) -> None:
    """Print the rows, and how they differ from the recorded ones."""
    if as_json:
        differences = {} if changes is None else {"against": asdict(changes)}
        print(dump_json({**SCHEMA, "rows": [asdict(row) for row in rows], **differences}))
        return
    right = ("launches", "programs", "bytes/token", "+ panels", "FLOP/token", "ns/token", "floor", "ratio")
    table = make_table(
        "target", "operation", "direction", "shape", "dtype", "launches", "programs", "smallest", "bytes/token",
        "+ panels", "FLOP/token", "ns/token", "floor", "ratio", right=right,
    )  # fmt: skip
    for row in rows:
        head = (row.target, row.op, row.direction, row.shape, row.dtype)
        if row.reason is not None:
            table.add_row(*head, *[""] * 8, row.reason)
            continue
        launches = str(row.launches) if row.launches == row.own else f"{row.launches} ({row.own} ours)"
        table.add_row(
            *head, launches, str(row.programs), row.smallest, f"{row.bytes:,.0f}", f"{row.panel_bytes:,.0f}",
            f"{row.flop:,.0f}", f"{row.ns:.3g}", f"{row.floor:.3g}", f"{row.ratio:.2f}",
        )  # fmt: skip
    console = make_console()
    console.print(table)
    console.print(f"{len(rows)} operations; times are modelled, not measured (docs/tuning.md)")
    for name in next((row.sources for row in rows if row.sources), {}):
        sources = dict.fromkeys(part for row in rows for part in row.sources.get(name, "").split("; ") if part)
        console.print(f"{name}: {'; '.join(sources)}", soft_wrap=True)
    if changes is not None:
        for line in changes.lines():
            console.print(line)

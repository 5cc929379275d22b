"""`flashgau compile --loops`: the hot loops of what was compiled, a row each, beside recorded ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgau.cli.compile import configuration
from flashgau.cli.console import dump_json, make_console, make_table, write_rows
from flashgau.roof import loops as against

if TYPE_CHECKING:
    from flashgau.tuning.ahead import Row

SCHEMA = {"schema": "flashgau-loops", "schema_version": 1}


def report(rows: list[Row], before: list[dict[str, Any]] | None, out: Path | None, as_json: bool) -> bool:
    """Print, record and compare the loops of compiled kernels; whether one is worse than recorded.

    Args:
        rows: of the kernels.
        before: of recorded loops; None to compare with nothing.
        out: where loops are recorded; None for nowhere.
        as_json: whether JSON is printed.
    """
    found = loop_rows(rows)
    changes = None
    if before is not None:
        compiled = {(row.target, row.entry, row.dtype, row.shape) for row in rows}
        changes = against.compare([row for one in found if (row := against.recorded(one))], before, compiled)
    if out is not None:
        record(out, found)
    show(found, changes, as_json)
    return changes is not None and bool(changes.worse)


def loop_rows(rows: list[Row]) -> list[dict[str, Any]]:
    """A row for each hot loop; a kernel that did not compile has one of its own, which says why."""
    from flashgau.tuning.shipped import ENTRIES

    found = []
    for row in rows:
        first: dict[str, Any] = {"target": row.target, "kernel": row.entry, "dtype": row.dtype, "shape": row.shape}
        first["configuration"] = configuration(row)
        if not row.loops and not row.ok:
            found.append({**first, "loop": None, "ok": False, "misses": [row.reason]})
        entry = ENTRIES.get(row.entry)
        skewed = entry is not None and entry.skewed and row.target == "sm_90" and row.dtype != "fp32"
        for number, loop in enumerate(row.loops or ()):
            misses = loop.misses(skewed and "few rows" not in row.shape)
            numbers = asdict(loop)
            found.append(
                {**first, "loop": number, "registers": row.registers, **numbers, "ok": row.ok, "misses": misses}
            )
    return found


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what `--against` needs: a line for each loop, those of fp16 only where they differ from bf16's."""
    kept = against.without_equals([row for row in map(against.recorded, rows) if row is not None])
    head = {**SCHEMA, "versions": {"triton": version("triton")}, "fields": list(against.FIELDS)}
    write_rows(path, head, [[row[name] for name in against.FIELDS] for row in kept])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `record` or `--json` wrote.

    Raises:
        ValueError: if it is none.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {name: found[name] for name in SCHEMA} != SCHEMA:
            raise ValueError
        fields = found.get("fields")
        rows = [dict(zip(fields, row, strict=True)) for row in found["rows"]] if fields else found["rows"]
        return [row for one in rows if (row := against.recorded(one)) is not None]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no recorded loops; `flashgau compile --loops --out FILE` writes them"
        ) from error


def show(rows: list[dict[str, Any]], changes: against.Changes | None, as_json: bool) -> None:
    """Print the rows, and how they differ from the recorded ones."""
    if as_json:
        differences = {} if changes is None else {"against": asdict(changes)}
        print(dump_json({**SCHEMA, "rows": rows, **differences}))
        return
    right = ("registers", "n", "work", "ahead", "spills", "exp under", "clocks", "TFLOP/s")
    table = make_table(
        "target", "kernel", "dtype", "shape", "configuration", "registers", "n", "matrix", "work", "ahead", "spills",
        "exp under", "tensor/shared/issue/fp32/int/exp", "clocks", "TFLOP/s", "bound", "misses", right=right,
    )  # fmt: skip
    for row in rows:
        head = [row[name] for name in ("target", "kernel", "dtype", "shape", "configuration")]
        table.add_row(*head, *(_cells(row) if row["loop"] is not None else [""] * 11), ", ".join(row["misses"]) or "ok")
    console = make_console()
    console.print(table)
    missing = sum(bool(row["misses"]) for row in rows)
    console.print(f"{len(rows)} hot loops, {missing} of which miss something that a loop of products is held to")
    if changes is not None:
        for line in changes.lines():
            console.print(line)


def _cells(row: dict[str, Any]) -> list[str]:
    clocks = row["clocks"]
    pipes = [f"{clocks[name]:.0f}" for name in ("tensor", "shared", "issue", "fp32", "alu", "exp")] if clocks else []
    return [
        str(row["registers"]), str(row["instructions"]),
        " ".join(f"{count}*{shape}" for shape, count in row["matrix"].items()),
        _number(row["redundancy"], ".2f"), _number(row["prefetch"], ".2g"), str(row["spills"]),
        f"{row['exps_under']}/{row['exps']}" if row["exps"] else "-",
        "/".join(pipes) or "-",
        f"{clocks['total']:.0f}" if clocks else "-",
        _number(row["rate"], ".0f"), row["bound"],
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

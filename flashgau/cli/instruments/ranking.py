"""`flashgau tune --model`: candidates by a model of their hot loops, for a GPU that need not be there."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flashgau.cli.console import counted, dump_json, fail, make_console, make_table

if TYPE_CHECKING:
    from flashgau.roof.modelling import Modelled
    from flashgau.tables.config import Config
    from flashgau.tables.table import Key
    from flashgau.tuning.ahead import Job


def rank(starts: list[Job]) -> dict[Key, list[Modelled]]:
    """Compile the candidates around each entry and rank them; what Ctrl-C interrupts ends at once."""
    from flashgau.roof import modelling
    from flashgau.sass.model import MACHINES
    from flashgau.tuning import ahead, searching

    for target in {job.target for job in starts} - set(MACHINES):
        fail("tune", f"there is no model of {target}; expected one of {', '.join(MACHINES)}")
    jobs = [job for _, job in searching.candidates_of(starts)]
    print(f"{len(jobs)} candidates for {len(starts)} entries are compiled and modelled", file=sys.stderr, flush=True)
    done = counted(ahead.compile_each(jobs), len(jobs), "modelling")
    return modelling.ranking(modelling.modelled(job, row) for job, row in done)


def best(starts: list[Job], top: int) -> dict[Key, frozenset[Config]]:
    """The configurations worth measuring: the first few of each entry."""
    from flashgau.roof import modelling

    return modelling.best(rank(starts), top)


def show(starts: list[Job], ranks: dict[Key, list[Modelled]], top: int, as_json: bool) -> None:
    """The best few of each entry beside the shipped one, in modelled TFLOP/s: never to be read as measured."""
    rows = [row for job in starts for row in _rows(job, ranks.get(job.key, []), top)]
    if as_json:
        target = starts[0].target if starts else ""
        print(dump_json({"schema": "flashgau-tune-model", "schema_version": 1, "target": target, "rows": rows}))
        return
    numbers = ("place", "modelled TFLOP/s", "to shipped")
    table = make_table("entry", "place", "configuration", *numbers[1:], "bound", "", right=numbers)
    for row in rows:
        table.add_row(
            row["entry"], f"{row['place']} of {row['of']}", row["text"], f"{row['rate']:.0f}",
            f"{row['gain']:.2f}x" if row["gain"] else "-", row["bound"], "shipped" if row["shipped"] else "",
        )  # fmt: skip
    if rows:
        make_console().print(table)
    print(f"{len(ranks)} of {len(starts)} entries have loops to model; nothing was measured or written")


def _rows(start: Job, found: list[Modelled], top: int) -> list[dict[str, Any]]:
    """The first few, and the shipped one wherever it stands."""
    shipped = next((one.rate for one in found if one.job.config == start.config), None)
    rows = []
    for place, one in enumerate(found, 1):
        config: Config | None = one.job.config
        if config is not None and (place <= top or config == start.config):
            rows.append({
                "entry": str(start.key), **start.key._asdict(), "choice": asdict(config), "text": config.text(),
                "place": place, "of": len(found), "rate": round(one.rate or 0, 1),
                "gain": round(one.rate / shipped, 3) if shipped and one.rate else None,
                "bound": one.bound, "shipped": config == start.config,
            })  # fmt: skip
    return rows

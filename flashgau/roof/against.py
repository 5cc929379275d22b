"""Rows beside those that a file has recorded: what got worse, what is new and what is gone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from flashgau.sass.model import MACHINES

from . import loops

GROWTH = 1.05  # how much a call may grow by in anything, or its smallest launch fall short by

Row = dict[str, Any]  # as `report.Row` without its details
_IDENTITY = ("target", "op", "direction", "shape", "dtype")
_HELD = {"launches": "launches", "bytes": "bytes of HBM per token", "ns": "modelled ns per token"}


class Changes(loops.Changes):
    """The same of the rows of operations."""

    what: ClassVar[str] = "operation"


def place(row: Row) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(row[name] for name in _IDENTITY)


def compare(now: list[Row], before: list[Row], wanted: Collection[tuple[Any, ...]]) -> Changes:
    """Hold rows to recorded ones.

    Args:
        now: those of this run.
        before: those of the file; of targets that it lacks nothing is said.
        wanted: the places of this run's rows, those without a result included; other recorded rows do not count.
    """
    was, targets = {place(row): row for row in before}, {row["target"] for row in before}
    worse, new = [], []
    for row in now:
        old = was.get(place(row))
        if row["reason"] is not None:
            worse.append(f"{_name(row)}: {row['reason']}")
        elif old is None:
            new += [_name(row)] if row["target"] in targets else []
        else:
            worse += [f"{_name(row)}: {what}" for what in _worse(row, old)]
    found = {place(row) for row in now}
    here = {(target, op, dtype) for target, op, _, _, dtype in wanted}
    gone = [_name(row) for at, row in was.items() if at not in found and (at[0], at[1], at[4]) in here]
    return Changes(worse, new, gone)


def _name(row: Row) -> str:
    return ", ".join(str(row[name]) for name in _IDENTITY)


def _worse(row: Row, old: Row) -> list[str]:
    found = [
        f"{row[name]:.4g} {words}, recorded {old[name]:.4g}"
        for name, words in _HELD.items()
        if row[name] > GROWTH * old[name]
    ]
    if GROWTH * row["programs"] < min(old["programs"], MACHINES[row["target"]].sms):
        found.append(f"{row['programs']} programs in the smallest launch, recorded {old['programs']}")
    return found

"""Loops beside those that a file has recorded: what grew, what got worse, what is new and what is gone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

GROWTH = 1.05  # how much longer a loop may get

Row = dict[str, Any]  # of a loop, as `flashgau compile --loops --json` has it

_IDENTITY = ("target", "kernel", "dtype", "shape", "loop")
FIELDS = (
    *_IDENTITY, "configuration", "instructions", "useful", "redundancy", "prefetch", "spills", "exps", "exps_under",
    "total", "rate",
)  # fmt: skip


def recorded(row: Row) -> Row | None:
    """What is kept of a row; None for one that did not compile."""
    if row["loop"] is None:
        return None
    total = row["total"] if "total" in row else row["clocks"].get("total")
    return {name: total if name == "total" else row[name] for name in FIELDS}


def without_equals(rows: list[Row]) -> list[Row]:
    """All rows but those of fp16 that say what bf16's say."""
    half = {_place(row): row for row in rows if row["dtype"] == "bf16"}

    def equal(row: Row) -> bool:
        other = half.get(_place(row | {"dtype": "bf16"}))
        return other is not None and row | {"dtype": "bf16"} == other

    return [row for row in rows if row["dtype"] != "fp16" or not equal(row)]


@dataclass(frozen=True)
class Changes:
    """How loops differ from the recorded ones, a line for each; `worse` is a failure."""

    worse: list[str]
    new: list[str]
    gone: list[str]
    what: ClassVar[str] = "loop"

    def lines(self) -> list[str]:
        """All of them."""
        kinds = (("worse", self.worse), ("new", self.new), ("gone", self.gone))
        found = [f"{kind}: {line}" for kind, lines in kinds for line in lines]
        return found or [f"no {self.what} is worse than recorded"]


def compare(now: list[Row], before: list[Row], compiled: Collection[tuple[str, ...]]) -> Changes:
    """Hold loops to recorded ones.

    Args:
        now: the loops of this selection of kernels, as `recorded` gives them.
        before: those of the file; of targets that it lacks nothing is said.
        compiled: target, kernel, dtype and shape of the kernels of the selection; other recorded loops do not count.
    """
    was = {_place(row): row for row in before}
    targets = {row["target"] for row in before}
    worse, new, seen = [], [], set()
    for row in now:
        place = _place(row)
        old = was.get(place)
        if old is None and row["dtype"] == "fp16":  # recorded where it differs
            old = was.get(_place(row | {"dtype": "bf16"}))
        seen.add(place)
        if old is None:
            new += [_name(row)] if row["target"] in targets else []
        else:
            worse += [f"{_name(row)}: {what}" for what in _worse(row, old)]
    gone = [_name(row) for place, row in was.items() if place not in seen and place[:4] in compiled]
    return Changes(worse, new, gone)


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _IDENTITY)


def _name(row: Row) -> str:
    return ", ".join(str(row[name]) for name in _IDENTITY[:4]) + f", loop {row['loop']}"


def _worse(row: Row, old: Row) -> list[str]:
    """In what a loop is worse. Instructions are compared in the same configuration, clocks by useful multiply-add."""
    found = []
    if row["configuration"] == old["configuration"] and row["instructions"] > GROWTH * old["instructions"]:
        found.append(f"{row['instructions']} instructions, recorded {old['instructions']}")
    if row["total"] and old["total"] and row["useful"] and old["useful"]:
        now, before = row["total"] / row["useful"], old["total"] / old["useful"]
        if now > GROWTH * before:
            text = f"{row['total']:.0f} modelled clocks, recorded {old['total']:.0f}"
            found.append(text + ("" if row["useful"] == old["useful"] else f" (per product {now / before:.2f}x)"))
    if (row["redundancy"] or 1) > (old["redundancy"] or 1) + 0.005:
        found.append(f"redundancy {row['redundancy']:.2f}, recorded {old['redundancy'] or 1:.2f}")
    if row["spills"] > old["spills"]:
        found.append(f"{row['spills']} spills, recorded {old['spills']}")
    if row["prefetch"] is not None and old["prefetch"] is not None and row["prefetch"] < old["prefetch"]:
        found.append(f"prefetch {row['prefetch']:.2g}, recorded {old['prefetch']:.2g}")
    if _under(row) < _under(old) - 0.005:
        found.append(f"exp under products {_under(row):.0%}, recorded {_under(old):.0%}")
    return found


def _under(row: Row) -> float:
    return float(row["exps_under"] / row["exps"]) if row["exps"] else 1.0

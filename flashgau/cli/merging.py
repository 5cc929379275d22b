"""`flashgau tune --merge`: tables of launch configurations that others measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flashgau.cli.console import dump_json

if TYPE_CHECKING:
    from flashgau.tables.merging import Difference
    from flashgau.tables.table import TableEntry


def merge(files: list[Path], as_json: bool) -> int:
    """Put the tables of files into the user's, and say what became of every entry that differs."""
    from flashgau.tables import merging

    found = merging.merge_files(files)
    if as_json:
        rows = [
            {"table": str(one.path), "gpu": one.table.gpu, "added": len(one.added), "left_out": one.left_out,
             "kept": str(one.kept) if one.kept else None,
             "differences": [
                 {**d.key._asdict(), "from": str(d.source), "own": asdict(d.own), "other": asdict(d.other),
                  "taken": d.takes} for d in one.differences]}
            for one in found
        ]  # fmt: skip
        print(dump_json({"schema": "flashgau-merge", "schema_version": 1, "tables": rows}))
        return 0
    for one in found:
        taken = sum(difference.takes for difference in one.differences)
        print(f"{one.path}: {len(one.added)} entries added, {taken} replaced, {len(one.table.entries)} in all")
        for difference in one.differences:
            print(f"  {_text(difference)}")
        if one.left_out:
            print(f"  {one.left_out} entries of kernels that are not flashgau's are left out")
        if one.kept is not None:
            print(f"  the table as it was is kept: {one.kept}")
    return 0


def _text(difference: Difference) -> str:
    """Which of two choices stays, and why.

    Example:
        >>> from flashgau.tables.merging import Difference
        >>> from flashgau.tables.table import Key, TableEntry
        >>> own, other = TableEntry(False, 2.0), TableEntry(True)
        >>> _text(Difference(Key("glu_linear_fused", 2), Path("a.json"), own, other))
        "glu_linear_fused (16 bit): the vendor's library (2 ms) stays; a.json has one kernel (no time)"
    """
    stays, goes = _entry(difference.own), _entry(difference.other)
    if difference.takes:
        return f"{difference.key}: {goes} of {difference.source} is faster than {stays}"
    return f"{difference.key}: {stays} stays; {difference.source} has {goes}"


def _entry(entry: TableEntry) -> str:
    from flashgau.cli.tune import block_text

    choice = entry.choice if isinstance(entry.choice, bool) else asdict(entry.choice)
    return f"{block_text(choice)} ({'no time' if entry.ms is None else f'{entry.ms:.3g} ms'})"

"""Tables that others measured, put into one's own: of two choices for a key the faster, where both were timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from . import shipped_kernels, table, user_path_of
from .table import Key, Table, TableEntry


@dataclass(frozen=True)
class Difference:
    """Two choices for one key, of which one stays.

    Attributes:
        key: where both stand.
        source: the file that came.
        own: the entry that was there.
        other: the entry that came.
    """

    key: Key
    source: Path
    own: TableEntry
    other: TableEntry

    @property
    def takes(self) -> bool:
        """Whether the other one stays: both were timed, and it took less."""
        return self.own.ms is not None and self.other.ms is not None and self.other.ms < self.own.ms


@dataclass(frozen=True)
class Merged:
    """What became of the table of one GPU.

    Attributes:
        path: its file.
        table: what it holds now.
        added: the keys that it did not have.
        differences: the keys that it had otherwise.
        kept: a copy of the file as it was, if an entry of it was replaced.
        left_out: entries of kernels that are not of this package.
    """

    path: Path
    table: Table
    added: tuple[Key, ...]
    differences: tuple[Difference, ...]
    kept: Path | None
    left_out: int


def merge_files(files: Iterable[Path]) -> list[Merged]:
    """Put the tables of files into the user's, each into that of its GPU, which need not be here.

    All files are read before one is written. An own entry gives way only to a faster one, and then the file as it was
    is kept under another name. Kernels that are not of this package stay out: what others call so may be another.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for one that is no table, or not of a GPU that was measured.
    """
    by_gpu: dict[str, list[tuple[Path, Table]]] = {}
    for path in files:
        found = table.read(path)
        if found.gpu is None or not found.measured:
            raise ValueError(
                f"{path}: a table of the architecture {found.architecture}; expected one measured on a GPU"
            )
        by_gpu.setdefault(found.gpu, []).append((path, found))
    return [_merge(gpu, others) for gpu, others in by_gpu.items()]


def _merge(gpu: str, others: list[tuple[Path, Table]]) -> Merged:
    path = user_path_of(gpu)
    added: list[Key] = []
    differences: list[Difference] = []
    left_out = sum(key.kernel not in shipped_kernels() for _, other in others for key in other.entries)

    def joined(own: Table | None) -> Table:
        if own is not None and own.gpu != gpu:  # whose name differs in what a file's name cannot have
            raise ValueError(f"{path}: a table of {own.gpu}; expected one of {gpu}")
        result = replace(others[0][1], entries={}) if own is None else own
        for source, other in others:
            entries = dict(result.entries)
            for key, entry in other.entries.items():
                if key.kernel not in shipped_kernels():
                    continue
                if key not in entries:
                    added.append(key)
                    entries[key] = entry
                elif entries[key].choice != entry.choice:
                    differences.append(Difference(key, source, entries[key], entry))
                    if differences[-1].takes:
                        entries[key] = entry
            date = max(result.date, other.date)  # written year first
            result = replace(result, entries=entries, versions=_both(result, other), date=date)
        return result

    def loses(before: Table, after: Table) -> bool:
        return any(after.entries[key] != entry for key, entry in before.entries.items())

    result, kept = table.change(path, joined, keep=loses)
    return Merged(path, result, tuple(added), tuple(differences), kept, left_out)


def _both(a: Table, b: Table) -> dict[str, str]:
    """The versions that measured either, such as "2.11.0, 2.12.0"."""
    names = dict.fromkeys([*a.versions, *b.versions])
    found = {name: [v for t in (a, b) for v in t.versions.get(name, "").split(", ") if v] for name in names}
    return {name: ", ".join(dict.fromkeys(versions)) for name, versions in found.items()}

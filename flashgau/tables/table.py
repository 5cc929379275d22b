"""Tables of launch configurations as JSON files: reading, checking, and writing without losing anything.

One format for all: what is shipped for an architecture, what was measured on one GPU, and what a user measured.

```json
{"format": 1, "gpu": "NVIDIA H200", "architecture": "sm_90", "measured": true, "versions": {"torch": "2.11.0"},
 "date": "2026-11-23", "entries": [
 {"kernel": "attention_forward", "itemsize": 2, "width": 128, "few_rows": false,
  "config": {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}, "ms": 1.21, "default_ms": 1.34}]}
```
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from flashgau.files import atomic_write, parse_json, read_text

from .config import Config, is_register_count

try:
    import fcntl
except ImportError:  # not on Windows, where two processes that tune at once are on their own
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
FUSED = "glu_linear_fused"  # the one entry that is a choice between two ways, not a configuration


class Key(NamedTuple):
    """What a configuration is chosen by: never an exact length, nor a batch size.

    Attributes:
        kernel: the launcher's name for it, such as "attention_dq".
        itemsize: bytes of an element.
        width: the class of the head dimension, 64, 128 or 256; 0 for a kernel without heads. Of `FUSED`, the inner axis
            of the product, rounded up to a power of two.
        few_rows: whether the rows fit one matrix instruction, where a kernel distinguishes that.
        options: whether scores go through more than a scale and a mask, where a kernel distinguishes that.
    """

    kernel: str
    itemsize: int
    width: int = 0
    few_rows: bool = False
    options: bool = False

    def __str__(self) -> str:
        traits = [f"{8 * self.itemsize} bit", *([f"width {self.width}"] if self.width else [])]
        traits += ["few rows"] * self.few_rows + ["options"] * self.options
        return f"{self.kernel} ({', '.join(traits)})"


@dataclass(frozen=True)
class TableEntry:
    """One choice: a configuration or, of `FUSED`, whether one kernel does it; measured, its time and the default's."""

    choice: Config | bool
    ms: float | None = None
    default_ms: float | None = None


@dataclass(frozen=True)
class Table:
    """What one file holds.

    Attributes:
        gpu: the device's name; None of a table that is for an architecture.
        architecture: such as "sm_90"; whose table is asked for what is not here.
        measured: whether the entries were timed, or only found to compile well.
        versions: of the software that measured.
        date: of the last measurement, as 2026-11-23.
        entries: by key.
    """

    gpu: str | None
    architecture: str
    measured: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    entries: Mapping[Key, TableEntry] = field(default_factory=dict)

    def config(self, key: Key) -> Config | None:
        """The configuration of a kernel, if there is one."""
        entry = self.entries.get(key)
        return entry.choice if entry is not None and isinstance(entry.choice, Config) else None


# ---- from and to JSON


def parse(text: str, where: str) -> Table:
    """A table from the text of a file called `where`.

    Raises:
        ValueError: naming the file, the entry and the field, what came and what was expected.

    Example:
        >>> parse('{"format": 1, "gpu": null, "architecture": "sm_90", "measured": false, "entries": [{}]}', "t.json")
        Traceback (most recent call last):
            ...
        ValueError: t.json: entry 0: `kernel` is missing; expected a kernel's name
    """
    return of_json(parse_json(text, where), where)


def of_json(data: Any, where: str) -> Table:
    """The same of its value in JSON."""
    read = Fields(data, where)
    read("format", f"{FORMAT}, which this version reads", lambda x: type(x) is int and x == FORMAT)
    header: dict[str, Any] = {
        "gpu": read("gpu", "a name or null", lambda x: x is None or (isinstance(x, str) and x != "")),
        "architecture": read("architecture", "a name such as sm_90", lambda x: isinstance(x, str) and x != ""),
        "measured": read("measured", "true or false", _is_bool),
        "versions": read("versions", "an object of strings", _is_versions, {}),
        "date": read("date", "a string", lambda x: isinstance(x, str), ""),
    }
    rows = read("entries", "a list", lambda x: isinstance(x, list))
    read.nothing_else()
    entries: dict[Key, TableEntry] = {}
    for place, row in enumerate(rows):
        key, entry = _entry(Fields(row, f"{where}: entry {place}"))
        if key in entries:
            raise ValueError(f"{where}: entry {place}: {key} is there twice; expected each key once")
        entries[key] = entry
    return Table(**header, entries=entries)


class Fields:
    """Reads the fields of a JSON object, each once; `where` begins every complaint."""

    data: Any
    where: str
    seen: set[str]

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where}: {_shown(data)}; expected an object")
        self.data, self.where, self.seen = data, where, set[str]()

    def __call__(self, name: str, expected: str, fits: Callable[[Any], bool], *default: Any) -> Any:
        """The value of the field `name`; the default, if there is one, of a field that is not there."""
        self.seen.add(name)
        if name not in self.data:
            if default:
                return default[0]
            raise ValueError(f"{self.where}: `{name}` is missing; expected {expected}")
        if not fits(self.data[name]):
            raise ValueError(f"{self.where}: `{name}` is {_shown(self.data[name])}; expected {expected}")
        return self.data[name]

    def nothing_else(self) -> None:
        """Complain of a field that has not been read."""
        if unknown := sorted(self.data.keys() - self.seen):
            expected = ", ".join(sorted(self.seen))
            raise ValueError(f"{self.where}: `{_shown(unknown[0])[1:-1]}` is no field; expected {expected}")


def _shown(value: Any) -> str:
    return text if len(text := json.dumps(value)) <= 60 else text[:60] + "..."


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool)


def _is_power(x: Any, most: int) -> bool:
    return type(x) is int and 0 < x <= most and x & (x - 1) == 0


def _is_time(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x <= 1e9


def _is_versions(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(v, str) for v in x.values())


def key_of(read: Fields) -> Key:
    """The key in a row of a file, or a complaint."""
    return Key(
        kernel=read("kernel", "a kernel's name", lambda x: isinstance(x, str) and x.isidentifier()),
        itemsize=read("itemsize", "1, 2, 4 or 8 bytes", lambda x: _is_power(x, 8)),
        width=read("width", "a power of two, or 0", lambda x: type(x) is int and (x == 0 or _is_power(x, 2**30))),
        few_rows=read("few_rows", "true or false", _is_bool, False),
        options=read("options", "true or false", _is_bool, False),
    )


def time_of(read: Fields, name: str) -> float | None:
    """The time in a row of a file, None if there is none, or a complaint."""
    time: float | None = read(name, "milliseconds above 0, up to 1e9", _is_time, None)
    return time


def _entry(read: Fields) -> tuple[Key, TableEntry]:
    key = key_of(read)
    choice: Config | bool = read("fused", "true or false", _is_bool) if key.kernel == FUSED else config_of(read)
    entry = TableEntry(choice, time_of(read, "ms"), time_of(read, "default_ms"))
    read.nothing_else()
    return key, entry


def _is_register_limit(value: object) -> bool:
    """A journal has every field, that without a value as null."""
    return value is None or is_register_count(value)


def config_of(row: Fields) -> Config:
    """The configuration in a row of a file, or a complaint."""
    read = Fields(row("config", "an object", lambda x: isinstance(x, dict)), f"{row.where}: config")
    block = "a power of two up to 65536"
    config = Config(
        block_m=read("block_m", block, lambda x: _is_power(x, 65536)),
        block_n=read("block_n", block, lambda x: _is_power(x, 65536)),
        block_k=read("block_k", block, lambda x: _is_power(x, 65536), Config.block_k),
        num_warps=read("num_warps", "1, 2, 4, 8, 16 or 32", lambda x: _is_power(x, 32)),
        num_stages=read("num_stages", "1 to 8", lambda x: type(x) is int and 1 <= x <= 8),
        asynchronous=read("asynchronous", "true or false", _is_bool, False),
        maxnreg=read("maxnreg", "a multiple of 8 from 24 to 256, or null", _is_register_limit, None),
    )
    read.nothing_else()
    return config


def dump(table: Table) -> str:
    """A table as the text of its file, an entry a line: what `parse` reads."""
    header = {"format": FORMAT, **{name: getattr(table, name) for name in ("gpu", "architecture", "measured")}}
    header |= {"versions": dict(table.versions), "date": table.date}
    lines = [json.dumps(_row(key, entry)) for key, entry in sorted(table.entries.items(), key=lambda item: item[0])]
    return json.dumps(header)[:-1] + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n"


def _row(key: Key, entry: TableEntry) -> dict[str, Any]:
    row = key._asdict()
    if not key.options:
        del row["options"]
    row |= {"fused": entry.choice} if isinstance(entry.choice, bool) else {"config": _fields(entry.choice)}
    return row | {name: ms for name in ("ms", "default_ms") if (ms := getattr(entry, name)) is not None}


def _fields(config: Config) -> dict[str, Any]:
    fields = asdict(config)
    for name in ("asynchronous", "maxnreg"):  # what few kernels have
        if not fields[name]:
            del fields[name]
    return fields


# ---- files


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds no valid table.
    """
    return parse(read_text(path), str(path))


@cache
def usable(path: Path) -> Table | None:
    """The table in a file; None if there is none, or, with a warning, if it cannot be used. Once per process."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"a table of launch configurations is skipped: {error}", RuntimeWarning, stacklevel=2)
        return None


def file_name(gpu: str) -> str:
    """What the table of a GPU is called.

    Example:
        >>> file_name("NVIDIA H100 80GB HBM3")
        'nvidia_h100_80gb_hbm3.json'
    """
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def write(path: Path, table: Table) -> None:
    """Write a whole file at once, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(dump(table).encode())


def merge(path: Path, table: Table) -> Table:
    """Put a table's entries into a file, beside those of other keys that are there, and return what it then holds."""

    def merged(own: Table | None) -> Table:
        return table if own is None else replace(table, entries={**own.entries, **table.entries})

    return change(path, merged)[0]


def change(
    path: Path, to: Callable[[Table | None], Table], keep: Callable[[Table, Table], bool] = lambda before, after: False
) -> tuple[Table, Path | None]:
    """Write what `to` makes of the table in a file, or of None; processes that do so at once wait for each other.

    A file that is no table is kept under another name, and so is one of which `keep` says so.

    Returns:
        What the file now holds, and where the file as it was is kept, if it is.
    """
    with _locked(path):
        own, kept = None, None
        try:
            own = read(path)
        except FileNotFoundError:
            pass
        except ValueError as error:
            kept = _unused(path.with_suffix(".unreadable"))
            os.replace(path, kept)
            warnings.warn(f"{error}; it is kept as {kept.name}", RuntimeWarning, stacklevel=3)
        table = to(own)
        if own is not None and keep(own, table):
            kept = _unused(path.with_suffix(".before"))
            shutil.copyfile(path, kept)
        write(path, table)
    return table, kept


def _unused(path: Path) -> Path:
    """A name like this one that no file has."""
    names = (path.with_name(f"{path.name}{number}") for number in range(1, 1_000_000))
    return next(name for name in names if not name.exists())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside, no other process is in such a block for this file. A process that dies lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

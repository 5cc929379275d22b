"""The log of a run: JSON lines that can be read while it is written, and cut back when it resumes."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from ..files import atomic_write, parse_json


class Log:
    """Rows as JSON lines in a file, which begins with the first row, and in memory for the plot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.stream: TextIO | None = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.stream is not None:
            # After a failed write (a full disk), closing fails once more; the first error is the one to show.
            with contextlib.suppress(OSError):
                self.stream.close()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to the file; other processes can read it at once."""
        try:
            if self.stream is None:
                self.stream = self.path.open("a", encoding="utf-8")
            self.stream.write(json.dumps(row) + "\n")
            self.stream.flush()
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Wait until all rows are on disk."""
        if self.stream is not None:
            os.fsync(self.stream.fileno())

    def rewind(self, step: int, validated: int) -> list[dict[str, Any]]:
        """The rows up to `step`; what a stopped run wrote after it, half a line included, leaves the file."""
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path}: not a file; expected the log of the run")
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        rows = [row for line in lines if (row := _row(line)) is not None]
        kept = [
            row
            for row in rows
            if row["step"] < step or (row["step"] == step and (row["kind"] == "train" or validated == step))
        ]
        with atomic_write(self.path) as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        return kept


def _row(line: str) -> dict[str, Any] | None:
    """The row in a line of the file; None if that is no row, as after a power cut."""
    try:
        row: dict[str, Any] = parse_json(line, "row")
    except ValueError:
        return None
    fits = isinstance(row, dict) and row.get("kind") in ("train", "validation") and type(row.get("step")) is int
    return row if fits and type(row.get("loss")) is float and math.isfinite(row["loss"]) else None

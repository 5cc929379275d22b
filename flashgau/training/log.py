"""The log of a run: JSON lines that can be read while it is written, and cut back when it resumes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from ..files import atomic_write


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
        kept = []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] < step or (row["step"] == step and (row["kind"] == "train" or validated == step)):
                kept.append(row)
        with atomic_write(self.path) as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        return kept

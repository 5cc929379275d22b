"""Files that are whole at every moment, and JSON of which anything may have become."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which takes the name `path` only if the block ends without an error.

    The contents reach the disk before the name does: after a crash or a power cut, `path` is the old file or
    the new one, whole. On an error the temporary file, `.NAME.PID.tmp` in the same folder, is removed and
    `path` is as it was.

    Raises:
        OSError: the file cannot be written, for example on a full disk; the message names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous one is intact" if path.exists() else ""
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file (reading a pipe would wait for ever), or not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def parse_json(text: str, where: str) -> Any:
    """The value of a text in JSON, as the standard has it: without NaN.

    Raises:
        ValueError: the text is anything else; the message begins with `where`.

    Example:
        >>> parse_json("[" * 100_000, "file.json")
        Traceback (most recent call last):
            ...
        ValueError: file.json: not JSON: nested too deeply
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:  # also of a number with thousands of digits
        raise ValueError(f"{where}: not JSON: {error}") from None


def _sync_folder(folder: Path) -> None:
    """Make a renaming in `folder` durable, where the system can (Windows and some network folders cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

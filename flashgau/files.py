"""Files that are whole at every moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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


def _sync_folder(folder: Path) -> None:
    """Make a renaming in `folder` durable, where the system can (Windows and some network folders cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

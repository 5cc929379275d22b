"""The folder of a run: its files, and that only one process trains in it."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_write

LAST, BEST = "last.safetensors", "best.safetensors"
LOG, PLOT, SETTINGS = "log.jsonl", "loss.png", "config.json"
FILES = (LAST, BEST, LOG, SETTINGS, PLOT)
_LOCK = ".lock"


def check_folder(out: Path, resume: bool) -> None:
    """Refuse to overwrite a run, or to resume one that is not there."""
    if resume and not (out / LAST).exists():
        raise FileNotFoundError(f"nothing to resume in {out}: it has no {LAST}")
    present = [name for name in FILES if (out / name).exists()]
    if present and not resume:
        raise FileExistsError(f"{out} already holds a run ({present[0]}); resume it, or choose another folder")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is not a folder")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """The run's folder, made if need be, and held so that no second process trains in it meanwhile."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows: no such protection
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, f"another process is training in {out}") from error
        yield


def write_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """What a run was told, and where it runs, for people to read; the checkpoint's own copy is what is resumed from."""
    machine = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with atomic_write(out / SETTINGS) as stream:
        stream.write(json.dumps({**settings, **machine}, indent=2).encode() + b"\n")

"""Text as bytes: which files are taken, how they are split, and which windows a training step sees.

The vocabulary is the 256 byte values, so any file is training text and nothing has to be learned or
downloaded. Everything here is a pure function of the files and of numbers in the configuration. A training
step finds its windows from `(seed, step)` alone, which is why a resumed run needs no stored position in the
data.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VOCABULARY = 256
SEPARATOR = 0
"""The byte before and after every file of a folder: to the model, "here a file begins" or "ends"."""

Bytes = npt.NDArray[np.uint8]

# What random numbers are drawn for.
WINDOWS, MASKS, DROPOUT = 0, 1, 2

# A file of a folder that holds a zero byte this early is taken for binary, as git and grep do.
_BINARY_PROBE = 8192
_READ_BLOCK = 1 << 24
_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, each one array of bytes.

    Attributes:
        train: (T,) uint8, the bytes that training windows are drawn from.
        validation: (V,) uint8, bytes of other files (or, for a single file, of its end). Never trained on.
        train_files: number of files in `train`.
        validation_files: number of files in `validation`.
        fingerprint: 32 hexadecimal digits; equal if and only if contents, order and split are equal.
        source: where the text came from, and how it was split.
    """

    train: Bytes
    validation: Bytes
    train_files: int
    validation_files: int
    fingerprint: str
    source: str

    def summary(self) -> dict[str, str | int]:
        """What a checkpoint remembers of its data: sizes and fingerprint, not the text."""
        return {
            "source": self.source,
            "train_bytes": int(self.train.size),
            "train_files": self.train_files,
            "validation_bytes": int(self.validation.size),
            "validation_files": self.validation_files,
            "fingerprint": self.fingerprint,
        }


def standard_library() -> Path:
    """The folder of the running Python's own standard library sources (about 30 MB of text).

    Raises:
        FileNotFoundError: this Python was installed without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "os.py").is_file():
        raise FileNotFoundError(f"data: this Python has no standard library sources at {folder}; name a file or folder")
    return folder


def list_files(folder: Path, *, suffix: str | None = None, exclude: Path | None = None) -> list[str]:
    """Paths of the files of `folder` that can be text, relative to it, with `/`, in the order of their bytes.

    All files of all subfolders are taken, except those that are empty, hidden (a name that begins with a dot,
    or inside such a folder), not regular files, or inside a folder named `__pycache__`, `site-packages`,
    `dist-packages` or `node_modules`. A link to a file is followed, a link to a folder is not.

    Args:
        folder: where to look.
        suffix: take only names that end with it.
        exclude: a folder to leave out (the run's own output, which grows while training).
    """
    skipped = exclude.resolve() if exclude is not None else None

    def walk(place: Path, prefix: str) -> Iterator[str]:
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _SKIPPED_FOLDERS and (
                        skipped is None or Path(entry.path).resolve() != skipped
                    ):
                        yield from walk(Path(entry.path), f"{prefix}{entry.name}/")
                elif entry.is_file() and (suffix is None or entry.name.endswith(suffix)) and entry.stat().st_size > 0:
                    yield prefix + entry.name

    return sorted(walk(folder, ""), key=os.fsencode)


def split_position(relative_path: str) -> float:
    """A number in [0, 1) from a hash of a relative path; files below the validation fraction are validation.

    It depends on nothing but the name, so adding or removing other files moves no file between the parts.

    Example:
        >>> split_position("email/parser.py") == split_position("email/parser.py")
        True
    """
    digest = hashlib.blake2b(os.fsencode(relative_path), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def split_files(relative_paths: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Divide two or more files into (training, validation); neither part is empty, and no file is in both.

    A small folder may hash entirely to one side; then the file nearest to the boundary changes sides.
    """
    position = {path: split_position(path) for path in relative_paths}
    train = [path for path in relative_paths if position[path] >= validation_fraction]
    validation = [path for path in relative_paths if position[path] < validation_fraction]
    if not validation:
        validation = [min(train, key=lambda path: position[path])]
        train.remove(validation[0])
    elif not train:
        train = [max(validation, key=lambda path: position[path])]
        validation.remove(train[0])
    return train, validation


def load_corpus(
    path: str | os.PathLike[str] | None = None,
    *,
    validation_fraction: float = 0.05,
    exclude: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Read the text of a file or folder and split it.

    - A **folder** is split by file (`split_files`), so no validation file is ever trained on. Which files are taken:
      see `list_files`; besides, a file with a zero byte in its first 8 KiB is taken for binary and left out, and of
      files with equal contents only the first is kept (a copy in both parts would leak). The files of a part stand
      one after the other with a zero byte around each. They are held in memory once.
    - A **single file**, of any content, is split by position: its last `validation_fraction` is validation. It is
      mapped from disk, not read into memory, and must not change meanwhile. A folder that offers only one file is
      treated like that file.
    - **None** is Python's standard library: its `.py` files, without installed packages.

    Args:
        path: file or folder, or None.
        validation_fraction: between 0 and 1; the expected share of files, or the share of a single file's
            bytes.
        exclude: a folder inside `path` to leave out.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: there is no text in it.
        OSError: something in it cannot be read.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"data: validation_fraction is {validation_fraction}; expected a number between 0 and 1")
    root = standard_library() if path is None else Path(path)
    if not root.exists():
        raise FileNotFoundError(f"data: {root} does not exist; expected a file or a folder")
    if not root.is_dir():
        return _from_file(root, validation_fraction)

    digests = _distinct_texts(
        root, suffix=".py" if path is None else None, exclude=Path(exclude) if exclude is not None else None
    )
    if len(digests) == 1:
        return _from_file(root / next(iter(digests)), validation_fraction)

    parts = split_files(list(digests), validation_fraction)
    fingerprint = hashlib.blake2b(digest_size=16)
    for part in parts:
        fingerprint.update(len(part).to_bytes(8, "big"))
        for name in part:
            fingerprint.update(digests[name])
    return Corpus(
        train=_join(root, parts[0]),
        validation=_join(root, parts[1]),
        train_files=len(parts[0]),
        validation_files=len(parts[1]),
        fingerprint=fingerprint.hexdigest(),
        source=f"{root}, split by file",
    )


def load_text(path: str | os.PathLike[str]) -> Bytes:
    """The whole text of a file or folder, undivided: (N,) uint8.

    Of a folder the same files are taken as by `load_corpus`, with a zero byte around each. A file is mapped from
    disk.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: there is no text in it.
        OSError: something in it cannot be read.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"data: {root} does not exist; expected a file or a folder")
    return _join(root, list(_distinct_texts(root))) if root.is_dir() else _mapped(root)


def _distinct_texts(root: Path, suffix: str | None = None, exclude: Path | None = None) -> dict[str, bytes]:
    """The files of a folder that are text, each contents once: names in order, with hashes of the contents."""
    candidates = list_files(root, suffix=suffix, exclude=exclude)
    digests: dict[str, bytes] = {}
    seen: set[bytes] = set()
    for name in candidates:
        digest = _text_digest(root / name)
        if digest is not None and digest not in seen:
            seen.add(digest)
            digests[name] = digest
    if not digests:
        raise ValueError(f"data: no text in folder {root}; it has {len(candidates)} files that are not empty or hidden")
    return digests


def _text_digest(file: Path) -> bytes | None:
    """Hash of a file's contents, or None if it looks binary."""
    content = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        block = stream.read(_READ_BLOCK)
        if b"\0" in block[:_BINARY_PROBE]:
            return None
        while block:
            content.update(block)
            block = stream.read(_READ_BLOCK)
    return content.digest()


def _join(root: Path, names: list[str]) -> Bytes:
    """The files' contents with a separator before, between and after them, read straight into one array."""
    sizes = [(root / name).stat().st_size for name in names]
    joined = np.full(sum(sizes) + len(sizes) + 1, SEPARATOR, dtype=np.uint8)
    view, start = joined.data, 1
    for name, size in zip(names, sizes, strict=True):
        with (root / name).open("rb", buffering=0) as stream:
            filled = 0
            while filled < size and (count := stream.readinto(view[start + filled : start + size])):
                filled += count
        if filled < size:
            raise OSError(f"data: {root / name} became shorter while it was read")
        start += size + 1
    return joined


def _mapped(file: Path) -> Bytes:
    """The bytes of one file, mapped from disk."""
    size = file.stat().st_size
    if not file.is_file():
        raise ValueError(f"data: {file} is neither a file nor a folder")
    if size < 2:
        raise ValueError(f"data: {file} has {size} bytes; expected text")
    return np.memmap(file, dtype=np.uint8, mode="r")


def _from_file(file: Path, validation_fraction: float) -> Corpus:
    """One file: the last `validation_fraction` of its bytes is validation."""
    content = _mapped(file)
    size = content.size
    boundary = min(max(round(size * (1.0 - validation_fraction)), 1), size - 1)
    fingerprint = hashlib.blake2b(boundary.to_bytes(8, "big"), digest_size=16)
    for start in range(0, size, _READ_BLOCK):
        fingerprint.update(content[start : start + _READ_BLOCK].data)
    return Corpus(
        train=content[:boundary],
        validation=content[boundary:],
        train_files=1,
        validation_files=1,
        fingerprint=fingerprint.hexdigest(),
        source=f"{file}, its last {size - boundary} of {size} bytes for validation",
    )


def random_words(use: int, seed: int, step: int, count: int) -> npt.NDArray[np.uint64]:
    """The `count` random 64-bit numbers that a run with `seed` has in `step` for one of its uses of them.

    A pure function of its arguments: the bits of the counter-based generator Philox at key (seed, use) and counter
    `step`. They do not depend on NumPy's version, and number r of a step can be found by any process without
    drawing for the steps before it.

    Args:
        use: `WINDOWS`, `MASKS` or `DROPOUT`: what is drawn for one use is independent of the others.
        seed: in [0, 2^64).
        step: in [0, 2^64).
        count: how many.
    """
    # The low counter word runs within the step; the second one is the step, so no two steps overlap.
    key, counter = np.array([seed, use], dtype=np.uint64), np.array([0, step, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def sample_starts(size: int, count: int, length: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """First positions of the `count` training windows of a step: independent, uniform over the whole text.

    A pure function of its arguments: `random_words`, reduced to positions by the high half of a 64 x 64 bit product.

    Args:
        size: bytes of text; at least `length` + 1.
        count: windows in the step.
        length: predicted bytes of a window, which spans `length` + 1 bytes.
        seed: in [0, 2^64).
        step: in [0, 2^64).

    Example:
        >>> sample_starts(10**6, 4, 512, seed=42, step=7).tolist()
        [450035, 305826, 554236, 35131]
    """
    choices = size - length
    words = random_words(WINDOWS, seed, step, count)
    return np.array([int(word) * choices >> 64 for word in words], dtype=np.int64)


def windows(text: Bytes, starts: npt.NDArray[np.int64], length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (each (len(starts), length) int64): the target of a byte is the byte after it."""
    picked = np.stack([text[start : start + length + 1] for start in starts.tolist()])
    rows = torch.from_numpy(picked.astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def validation_starts(size: int, count: int, length: int) -> npt.NDArray[np.int64]:
    """First positions of at most `count` validation windows: evenly spread, no byte predicted twice.

    Example:
        >>> validation_starts(101, 3, 10).tolist()
        [0, 45, 90]
    """
    count = min(count, (size - 1) // length)
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    # The last window starts at size - 1 - length >= (count - 1) * length, so neighbours are at least `length`
    # apart.
    return np.arange(count, dtype=np.int64) * (size - 1 - length) // (count - 1)

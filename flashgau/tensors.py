"""Tensors out of files: safetensors, and what `torch.save` wrote, neither of which runs code that the file holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgau.extras import extra

Shapes = Mapping[str, tuple[Any, ...]]


class TensorFile:
    """An open safetensors file. Its header tells names, types and shapes; a tensor is read when it is asked for.

    What is read has memory of its own, on a boundary of 64 bytes as all that PyTorch allocates. The library's tensors
    lie in the mapped file, one behind the other, on any multiple of 8 bytes, and the last bits of a matrix product may
    depend on where its factors lie: a model of such tensors would not be, bit for bit, the one that was saved.

    Args:
        file: what `safetensors.safe_open` gives for PyTorch.

    Attributes:
        metadata: the texts in the header, by name.
        names: of the tensors.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.names: list[str] = list(file.keys())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the header."""
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self.names}

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor called `name`."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor.to(device, copy=True)


@contextlib.contextmanager
def open_safetensors(path: Path, subject: str, error: Callable[[str], Exception] = ValueError) -> Iterator[TensorFile]:
    """The safetensors file at `path`.

    Args:
        path: the file, which is there.
        subject: how a message names it.
        error: what a damaged one raises.
    """
    with extra("models"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            yield TensorFile(file)
    except (SafetensorError, UnicodeDecodeError) as reason:
        raise error(f"{subject} is damaged or not a safetensors file: {reason}") from reason


def read_pickle(path: Path, subject: str) -> Any:
    """What `torch.save` wrote to the file at `path`, which is there, with all tensors on the CPU.

    Only tensors and plain containers are accepted, so nothing is called that the file names.

    Raises:
        ValueError: it cannot be read so; the message calls it `subject`.
        OSError: it cannot be opened.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make of the unpickler: KeyError, struct.error, MemoryError ...
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it cannot be opened; of a file cut off torch.load seeks a place before its beginning
        raise ValueError(
            f"{subject} cannot be read by torch.load with weights_only=True; expected the file of a state dict"
        ) from error


def differences(given: Shapes, expected: Shapes) -> list[str]:
    """Every missing and unexpected name and every other shape, in words.

    Args:
        given: shapes by name.
        expected: the same; an axis whose size nothing tells is a letter, and not compared.

    Example:
        >>> differences({"a": (2, 3), "b": (1,)}, {"a": (2, "d"), "c": (4,)})
        ['missing c (4,)', 'unexpected b']
    """
    problems = [f"missing {name} {_shown(shape)}" for name, shape in expected.items() if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    for name, shape in expected.items():
        if name in given and not _fits(given[name], shape):
            problems.append(f"{name} has shape {_shown(given[name])}, expected {_shown(shape)}")
    return problems


def _fits(shape: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(isinstance(wanted, str) or size == wanted for size, wanted in pairs)


def _shown(shape: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"

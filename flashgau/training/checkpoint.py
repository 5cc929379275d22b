"""Checkpoints: one file each, which is either the complete old one or the complete new one, at every moment.

The file is in the safetensors format with all that is not a tensor as JSON in its header. So loading a
checkpoint runs no code from it (a pickle would), any safetensors reader can open the weights, and names and
shapes can be checked from the header alone. The bytes are written here rather than by the safetensors library
because that reports a full disk as an error of its own without the system's error number, and gives no handle
to synchronise. Reading is the library's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_write, parse_json
from ..tensors import TensorFile, open_safetensors

FORMAT = 1
_KEY = "flashgau"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used here: damaged, of another model, or of other data."""


def remove_temporaries(*paths: Path) -> None:
    """Delete what killed processes left of `atomic_write` to `paths`. No other process may be writing them."""
    for path in paths:
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of names (in order), types, shapes and contents: a safetensors file does not notice a changed byte."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(_raw(tensor))
    return state.hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` (any device) and `metadata` (JSON values) to `path`, atomically.

    Raises:
        OSError: as `atomic_write`; `path` is then what it was before.
    """
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    # Wide elements first: every tensor then begins at a multiple of its element size.
    order = sorted(held, key=lambda name: (-held[name].element_size(), name))
    # The header vouches for the metadata, and the metadata for the tensors.
    content = {"format": FORMAT, "tensors_digest": _tensors_digest(sorted(held.items())), **metadata}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    header: dict[str, Any] = {"__metadata__": {_KEY: text, "digest": _text_digest(text)}}
    end = 0
    for name in order:
        start, end = end, end + held[name].nbytes
        header[name] = {
            "dtype": _DTYPES[held[name].dtype],
            "shape": list(held[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_write(path) as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name in order:
            stream.write(_raw(held[name]))


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint, without reading its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not a checkpoint of flashgau.
    """
    with _opened(path) as file:
        return _metadata(path, file.metadata)


def read_checkpoint(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU, each in memory of its own) and metadata of a checkpoint.

    Args:
        path: the file.
        wanted: which tensors to return, by name. All of them are read, one by one, to verify the contents.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, or is not a checkpoint of flashgau.
    """
    tensors: dict[str, Tensor] = {}

    def read(file: TensorFile) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(file.names):
            tensor = file.read(name)
            if wanted(name):
                tensors[name] = tensor
            yield name, tensor

    with _opened(path) as file:
        metadata = _metadata(path, file.metadata)
        digest = _tensors_digest(read(file))
    if metadata.get("tensors_digest") != digest:
        raise CheckpointError(f"checkpoint {path} is damaged: its contents do not match their checksum")
    return tensors, metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TensorFile]:
    """The safetensors file at `path`, with every way of being unreadable turned into a CheckpointError."""
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is not a file")
    with open_safetensors(path, f"checkpoint {path}", CheckpointError) as file:
        yield file


def _metadata(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """The JSON value in the header, verified."""
    if _KEY not in header or "digest" not in header:
        raise CheckpointError(f"checkpoint {path} was not written by `flashgau train`: it has no training state")
    if header["digest"] != _text_digest(header[_KEY]):
        raise CheckpointError(f"checkpoint {path} is damaged: its header does not match its checksum")
    try:
        metadata = parse_json(header[_KEY], "its header")
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else "none"
        raise CheckpointError(f"checkpoint {path} has format {_shown(found)}; this version of flashgau reads {FORMAT}")
    return metadata


def section(path: Path, metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object called `name` in the metadata of the checkpoint at `path`.

    Raises:
        CheckpointError: there is none.
    """
    found = metadata.get(name)
    if not isinstance(found, dict):
        raise CheckpointError(f"checkpoint {path} cannot be used: its `{name}` is {_shown(found)}; expected an object")
    return found


def _shown(value: Any) -> str:
    """A value out of a file in few words."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], limit: int = 4) -> str:
    """How two mappings differ, in one line: "lr is 0.1 in the checkpoint, 0.2 here"; empty if they do not.

    Example:
        >>> differences({"lr": 0.2, "batch": 4}, {"lr": 0.1, "batch": 4})
        'lr is 0.1 in the checkpoint, 0.2 here'
    """
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            found.append(f"{_shown(name)} is not in the checkpoint")
        elif name not in ours:
            found.append(f"{_shown(name)} is only in the checkpoint")
        elif ours[name] != theirs[name]:
            found.append(f"{name} is {_shown(theirs[name])} in the checkpoint, {_shown(ours[name])} here")
    more = f"; and {len(found) - limit} more" if len(found) > limit else ""
    return "; ".join(found[:limit]) + more

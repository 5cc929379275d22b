"""State dicts of elsewhere: read from modules, mappings and files, and what they tell of sizes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors import open_safetensors, read_pickle

State = Mapping[str, Tensor]
Source = nn.Module | State | str | os.PathLike[str]


def read_state(caller: str, source: Any) -> State:
    """The state dict in `source`: a module's, a mapping itself, or that of a file.

    A `.safetensors` file is read by its own library, any other by `torch.load` with `weights_only=True`: neither runs
    code from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as a state dict.
        TypeError: source is of no known kind, or some of its values are no tensors (all of those are listed).
    """
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, str | os.PathLike):
        source = _read_file(caller, Path(source))
    if not isinstance(source, Mapping):
        raise TypeError(
            f"{caller}: `source` is a {type(source).__name__}; expected a module, a state dict or the path of one"
        )
    others = [f"{key!r} is a {type(value).__name__}" for key, value in source.items() if not isinstance(value, Tensor)]
    others += [f"the name {key!r} is a {type(key).__name__}" for key in source if not isinstance(key, str)]
    if others:
        raise TypeError(f"{caller}: `source` is no state dict: {'; '.join(others)}; expected tensors by name")
    return source


def _read_file(caller: str, path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: `source` is {path}, where no file is")
    subject = f"{caller}: {path}"
    if path.suffix != ".safetensors":
        return _checked(subject, read_pickle(path, subject))
    with open_safetensors(path, subject) as file:
        tensors = {name: file.read(name) for name in file.names}
    # `safetensors.torch.save_model` writes a tensor of several names once, and notes the other names in the metadata.
    names = file.metadata.items()
    return tensors | {other: tensors[name] for other, name in names if name in tensors and other not in tensors}


def _checked(subject: str, found: Any) -> Any:
    """What torch.load found, if every tensor has a number of its own for every entry: sizes of layers come from it."""
    tensors = {name: t for name, t in found.items() if isinstance(t, Tensor)} if isinstance(found, Mapping) else {}
    for name, t in tensors.items():
        if t.layout != torch.strided or t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f"{subject}: {name} {tuple(t.shape)} is sparse or repeats its numbers; expected dense ones")
    return found


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def size_of(state: State, places: Iterable[tuple[str, int, int]]) -> int | None:
    """The size that most of some axes have; None if there is none of them.

    Args:
        state: the state dict.
        places: (key, number of axes, axis) of tensors that share the size; what is absent or has other axes is passed
            over.

    Example:
        >>> import torch
        >>> size_of({"a": torch.zeros(2, 3), "b": torch.zeros(3), "c": torch.zeros(5)}, [("a", 2, 1), ("b", 1, 0)])
        3
    """
    sizes = Counter(state[key].shape[axis] for key, ndim, axis in places if key in state and state[key].ndim == ndim)
    return sizes.most_common(1)[0][0] if sizes else None


def layer_count(state: State, prefix: str) -> int:
    """How many layers the keys PREFIX.0.*, PREFIX.1.*, ... are of, a missing one in between counted."""
    numbers = {key[len(prefix) + 1 :].partition(".")[0] for key in state if key.startswith(prefix + ".")}
    return min(max((int(number) + 1 for number in numbers if number.isdecimal()), default=0), len(state))

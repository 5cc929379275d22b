"""State dicts of elsewhere: read from modules, mappings and files, and held against what is expected."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

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
        path = Path(source)
        source = _read_safetensors(caller, path) if path.suffix == ".safetensors" else _read_pickle(caller, path)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"{caller}: `source` is a {type(source).__name__}; expected a module, a state dict or the path of one"
        )
    others = [f"{key!r} is a {type(value).__name__}" for key, value in source.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(f"{caller}: `source` is no state dict: {'; '.join(others)}; expected tensors by name")
    return source


def _read_safetensors(caller: str, path: Path) -> State:
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: `source` is {path}, where no file is")
    try:
        with safe_open(path, "pt") as file:
            names = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{caller}: {path} is damaged or not a safetensors file: {error}") from error
    # `safetensors.torch.save_model` writes a tensor of several names once, and notes the other names in the metadata.
    return tensors | {other: tensors[name] for other, name in names.items() if name in tensors and other not in tensors}


def _read_pickle(caller: str, path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: `source` is {path}, where no file is")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{caller}: {path} cannot be read by torch.load with weights_only=True; expected the file of a state dict"
        ) from error


def differences(given: State, expected: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Every missing and unexpected key and every other shape, in words.

    Args:
        given: the state dict.
        expected: shapes by name; an axis whose size nothing tells is a letter, and not compared.

    Example:
        >>> import torch
        >>> differences({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, {"a": (2, "d"), "c": (4,)})
        ['missing c (4,)', 'unexpected b']
    """
    problems = [f"missing {key} {_shown(shape)}" for key, shape in expected.items() if key not in given]
    problems += [f"unexpected {key}" for key in given if key not in expected]
    for key, shape in expected.items():
        if key in given and not _fits(given[key].shape, shape):
            problems.append(f"{key} has shape {tuple(given[key].shape)}, expected {_shown(shape)}")
    return problems


def _fits(shape: torch.Size, expected: tuple[Any, ...]) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(isinstance(wanted, str) or size == wanted for size, wanted in pairs)


def _shown(shape: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


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

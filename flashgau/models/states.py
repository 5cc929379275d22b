"""States of models as files: a prefix that was read once, to be continued by another process or on another day."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import extra
from ..files import atomic_write, parse_json
from ..nn import KeyValueCache
from ..nn.gated_unit import UnitState
from ..ops import MixedChunkState
from ..tensors import open_safetensors
from .stack import ModelState

KEY = "flashgau_state"  # of the header's metadata
_CONSTANT = tuple(field.name for field in fields(MixedChunkState))
_CACHE = ("keys", "values")  # and lengths, where rows differ


def save_state(state: ModelState, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the state of a model, for `load_state`: a safetensors file.

    Args:
        state: of `model(..., return_state=True)`.
        path: the file.
        overwrite: replace a file of that name.

    Raises:
        FileExistsError: there is one, and `overwrite` is False.
        OSError: it cannot be written; an existing file is then intact.

    Example:
        >>> import tempfile, torch
        >>> from flashgau.models import CausalLM, load_state, save_state
        >>> model, text = CausalLM("flash-tiny"), torch.randint(256, (1, 9))
        >>> with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ...     _, state = model(text[:, :8], return_state=True)
        ...     save_state(state, f"{folder}/prefix.safetensors")
        ...     later = load_state(f"{folder}/prefix.safetensors")
        ...     logits, _ = model(text[:, 8:], state=later, return_state=True)
        >>> bool(torch.allclose(logits, model(text)[:, 8:], atol=1e-5))
        True
    """
    with extra("models"):
        from safetensors.torch import save as to_bytes
    path = Path(path)
    if not isinstance(state, ModelState):
        raise TypeError(f"save_state: `state` is a {type(state).__name__}; expected a ModelState")
    if path.exists() and not overwrite:
        raise FileExistsError(f"save_state: `path` is {path}, which exists; expected a new name, or `overwrite=True`")
    tensors, layers = {"position": state.position}, []
    for i, layer in enumerate(state.layers):
        unit = isinstance(layer, UnitState)
        memory = layer.memory if unit else layer
        named = _named(memory)
        if unit and layer.previous is not None:
            named["previous"] = layer.previous
        tensors |= {f"{i}.{name}": x for name, x in named.items()}
        layers.append({"unit": unit, "memory": type(memory).__name__})
    contents = {name: x.detach().contiguous().clone() for name, x in tensors.items()}  # which share no memory
    content = to_bytes(contents, {"format": "pt", KEY: json.dumps({"layers": layers})})
    with atomic_write(path) as stream:
        stream.write(content)


def load_state(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ModelState:
    """The state that `save_state` wrote. Whether it is one of a given model, that model finds out.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds no state.

    Example:
        >>> import tempfile, torch
        >>> from flashgau.models import CausalLM, load_state, save_state
        >>> with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ...     _, state = CausalLM("flash-tiny")(torch.randint(256, (1, 8)), return_state=True)
        ...     save_state(state, f"{folder}/prefix.safetensors")
        ...     load_state(f"{folder}/prefix.safetensors").position.item()
        8
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_state: `path` is {path}, where no file is; expected one of `save_state`")
    with open_safetensors(path, f"load_state: {path}") as file:
        layers = _described(path, file.metadata, file.names)
        tensors = {name: file.read(name, device) for name in file.names}
    if tensors["position"].dtype != torch.int64:
        raise ValueError(f"load_state: {path} holds position in {tensors['position'].dtype}; expected torch.int64")
    states = []
    for i, layer in enumerate(layers):
        own = {name.partition(".")[2]: x for name, x in tensors.items() if name.partition(".")[0] == str(i)}
        memory: Any
        if layer["memory"] == "MixedChunkState":
            memory = MixedChunkState(**{name: own[name] for name in _CONSTANT})
        else:
            memory = KeyValueCache(own["keys"], own["values"], own.get("lengths"))
        states.append(UnitState(memory, own.get("previous")) if layer["unit"] else memory)
    return ModelState(states, tensors["position"])


def _named(memory: MixedChunkState | KeyValueCache) -> dict[str, Tensor]:
    if isinstance(memory, MixedChunkState):
        return dict(zip(_CONSTANT, memory.tensors(), strict=True))
    named = {"keys": memory.keys, "values": memory.values}
    return named if memory.lengths is None else named | {"lengths": memory.lengths}


def _described(path: Path, metadata: dict[str, str], names: Any) -> list[dict[str, Any]]:
    """What the header says of the layers, whose tensors are all there and no others."""
    if KEY not in metadata:
        raise ValueError(f"load_state: {path} holds no state of a model; expected a file of `save_state`")
    described = parse_json(metadata[KEY], f"load_state: {path}")
    layers = described.get("layers") if isinstance(described, dict) else None
    kinds = {"MixedChunkState": _CONSTANT, "KeyValueCache": _CACHE}
    whole = isinstance(layers, list) and all(
        isinstance(x, dict) and x.get("memory") in kinds and isinstance(x.get("unit"), bool) for x in layers
    )
    if not whole:
        raise ValueError(f"load_state: {path} describes no state of this version")
    assert layers is not None
    needed = {"position"} | {f"{i}.{name}" for i, x in enumerate(layers) for name in kinds[x["memory"]]}
    welcome = {f"{i}.{name}" for i, _ in enumerate(layers) for name in ("lengths", "previous")}
    if missing := sorted(needed - set(names)):
        raise ValueError(f"load_state: {path} lacks {', '.join(missing[:4])}")
    if unknown := sorted(set(names) - needed - welcome):
        raise ValueError(f"load_state: {path} holds {', '.join(unknown[:4])}, which no state of it has")
    return layers

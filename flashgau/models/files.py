"""Models as files: safetensors with the configuration in the header, so that a file alone is enough to load one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..files import atomic_write
from .config import ModelConfig

KEY = "flashgau_model"  # of the header's metadata


def write_model(
    path: str | os.PathLike[str], name: str, config: ModelConfig, tensors: Mapping[str, Tensor], overwrite: bool
) -> None:
    """Write the model of class `name`, atomically, and over an existing file only if `overwrite`."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"save: `path` is {path}, which exists; expected a new name, or `overwrite=True`")
    description = json.dumps({"class": name, "config": config.to_dict()})
    content = to_bytes({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt", KEY: description})
    with atomic_write(path) as stream:
        stream.write(content)


def read_model(path: str | os.PathLike[str], device: torch.device | str) -> tuple[str, ModelConfig, dict[str, Tensor]]:
    """The class name, configuration and tensors that `write_model` wrote."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: `path` is {path}, where no file is; expected one that a model's `save` wrote")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            description = (file.metadata() or {}).get(KEY)
            if description is None:
                raise ValueError(
                    f"load: {path} holds no model's configuration; expected a file that a model's `save` wrote "
                    "(`flashgau.training.load_model` reads checkpoints of a training run)"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path} is damaged or not a safetensors file: {error}") from error
    described: dict[str, Any] = json.loads(description)
    return described["class"], ModelConfig.from_dict(described["config"]), tensors

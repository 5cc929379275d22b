"""Models as files: safetensors with the configuration in the header, so that a file alone is enough to load one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..extras import extra
from ..files import atomic_write
from ..tensors import TensorFile, differences, open_safetensors
from .config import ModelConfig

KEY = "flashgau_model"  # of the header's metadata
_LAYER = re.compile(r"stack\.layers\.(\d+)\.")
_SHOWN = 400  # characters of a reason, which may quote the file


def write_model(
    path: str | os.PathLike[str], name: str, config: ModelConfig, tensors: Mapping[str, Tensor], overwrite: bool
) -> None:
    """Write the model of class `name`, atomically, and over an existing file only if `overwrite`."""
    with extra("models"):
        from safetensors.torch import save as to_bytes
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"save: `path` is {path}, which exists; expected a new name, or `overwrite=True`")
    for key, value in tensors.items():
        if hasattr(value, "device_mesh"):
            raise ValueError(
                f"save: `{key}` is sharded, and this process holds a part of it; expected whole tensors: get them with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict and its option `full_state_dict`, load "
                "them into a model of the same configuration, and save that"
            )
        if value.is_meta:
            raise ValueError(f"save: `{key}` is on the device 'meta', which holds no numbers; expected a real device")
    description = json.dumps({"class": name, "config": config.to_dict()})
    content = to_bytes({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt", KEY: description})
    with atomic_write(path) as stream:
        stream.write(content)


def read_model(
    path: str | os.PathLike[str], device: torch.device | str, classes: Mapping[str, Callable[..., nn.Module]]
) -> nn.Module:
    """The model, one of `classes` by name, that `write_model` wrote.

    Nothing is allocated from the numbers in its configuration before names and shapes of the tensors it implies have
    been found equal to those in the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: `path` is {path}, where no file is; expected one that a model's `save` wrote")
    with open_safetensors(path, f"load: {path}") as file:
        make, config = _described(path, file, classes)
        check_shapes(f"load: {path}", file.shapes(), make, config)
        tensors = {name: file.read(name, device) for name in file.names}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"load: {path} holds {name} in {tensor.dtype}; expected a floating type")
    model = make(config, device=device)
    model.load_state_dict(tensors, assign=True)
    return model


def _described(
    path: Path, file: TensorFile, classes: Mapping[str, Callable[..., nn.Module]]
) -> tuple[Callable[..., nn.Module], ModelConfig]:
    """Class and configuration that the header names."""
    if KEY not in file.metadata:
        raise ValueError(
            f"load: {path} holds no model's configuration; expected a file that a model's `save` wrote "
            "(`flashgau.training.load_model` reads checkpoints of a training run)"
        )
    try:
        described = json.loads(file.metadata[KEY])
        if not isinstance(described, dict) or not {"class", "config"} <= described.keys():
            raise ValueError("expected a `class` and its `config`")
        if described["class"] not in classes:
            raise ValueError(f"it holds a {described['class']}; expected one of {', '.join(classes)}")
        return classes[described["class"]], ModelConfig.from_dict(described["config"])
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"load: {path} describes no model of this version: {_short(error)}") from error


def check_shapes(
    subject: str, shapes: Mapping[str, tuple[int, ...]], make: Callable[..., nn.Module], config: ModelConfig
) -> None:
    """Refuse tensors that are not those of their configuration; nothing is allocated from its numbers.

    Args:
        subject: what holds them, as a message names it.
        shapes: by name.
        make: the class of the model.
        config: its configuration.

    Raises:
        ValueError: they are not, or there is no such model.
    """
    numbers = {match[1] for match in map(_LAYER.match, shapes) if match}
    if config.depth != (len(numbers) or 1):  # which bounds the number of modules; a layer's own file has no numbers
        problems = [f"`depth` is {config.depth}, and there are {len(numbers)} layers"]
    else:
        try:
            with _Undrawn():
                expected = make(config, device="meta").state_dict()
        except Exception as error:  # whatever a number or option out of a file makes of the layers
            raise ValueError(f"{subject} describes no model of this version: {_short(error)}") from error
        problems = differences(shapes, {name: tuple(value.shape) for name, value in expected.items()})
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        found = _short("; ".join(problems[:4]))
        raise ValueError(f"{subject} does not fit its own configuration: {found}{more}")


class _Undrawn(TorchFunctionMode):
    """Inside, no normal numbers are drawn: for weights without memory PyTorch would load 900 modules to draw none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _short(reason: BaseException | str) -> str:
    """A reason in one line of bounded length."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."

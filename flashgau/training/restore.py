"""What the checkpoint of a run holds, read back: its configuration, its model and its state, or why they do not fit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import CausalLM, MaskedLM, ModelConfig
from ..models.files import check_shapes
from . import checkpoint as files
from . import parallel
from .checkpoint import CheckpointError, differences, section
from .config import FREE, TrainConfig
from .data import Corpus
from .folder import BEST, LAST
from .objective import model_class


@dataclass
class State:
    """What a checkpoint holds besides tensors and configuration: all of a run's memory from step to step."""

    step: int = 0
    elapsed: float = 0.0
    validated: int = -1  # the last step with a validation
    best_loss: float | None = None
    best_step: int | None = None
    loss_sum: float = 0.0  # since the last row of the log
    loss_steps: int = 0
    norm_max: float = 0.0

    @classmethod
    def stored(cls, path: Path, values: Mapping[str, Any]) -> State:
        """The state in the checkpoint at `path`.

        Raises:
            CheckpointError: `values` are not those of a state.
        """
        _check_same("state", path, dict.fromkeys(_AT_LEAST, ""), dict.fromkeys(values, ""))
        for name, least in _AT_LEAST.items():
            value, kind = values[name], int if isinstance(least, int) else float
            none = name.startswith("best_") and values["best_loss"] is None and values["best_step"] is None
            most = 2**63 if kind is int else math.inf
            if not (value is None if none else type(value) is kind and least <= value < most):
                reason = f"`{name}` is {value!r:.60}; expected a finite {kind.__name__}, at least {least}"
                raise _unusable(path, "state", ValueError(reason))
        return cls(**values)


_AT_LEAST = {"step": 0, "elapsed": 0.0, "validated": -1, "best_loss": 0.0, "best_step": 0, "loss_sum": 0.0}
_AT_LEAST |= {"loss_steps": 0, "norm_max": 0.0}


def resume_config(out: str | os.PathLike[str], **changes: Any) -> TrainConfig:
    """The configuration of the last checkpoint in `out`, with `changes` (limits, intervals, places, device).

    Raises:
        FileNotFoundError: there is no checkpoint in `out`.
        CheckpointError: it is damaged, or a change is not one that a resumed run may make.
    """
    path = Path(out) / LAST
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume in {Path(out)}: it has no {LAST}")
    stored = _stored_config(path, files.read_metadata(path))
    wanted = replace(stored, **{**changes, "out": os.fspath(out)})
    _check_same("configuration", path, fixed(wanted), fixed(stored))
    return wanted


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged.
    """
    return _stored_config(Path(path), files.read_metadata(Path(path)))


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> CausalLM | MaskedLM:
    """The language model of a checkpoint, last or best, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds a model that was given to `train` as a module.
    """
    path = Path(path)
    tensors, metadata = files.read_checkpoint(path, lambda name: name.startswith("model."))
    if "model" in metadata and metadata["model"] is None:
        raise CheckpointError(f"checkpoint {path} holds a model of the caller's own, not one of flashgau.models")
    make = model_class(_stored_config(path, metadata).objective)
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    try:
        description = ModelConfig.from_dict(section(path, metadata, "model"))
        check_shapes("it", {name: tuple(t.shape) for name, t in weights.items()}, make, description)
    except (TypeError, ValueError) as error:
        raise _unusable(path, "model", error) from error
    model = make(description)
    _check_same("model", path, _kinds(model.state_dict()), _kinds(weights))
    model.load_state_dict(weights)
    return model.to(device).eval()


def read_run(
    path: Path, config: TrainConfig, corpus: Corpus, model: nn.Module, description: dict[str, Any] | None
) -> tuple[State, dict[str, Tensor]]:
    """The state and the tensors in a checkpoint, after making sure that it belongs to the run of these.

    Raises:
        CheckpointError: it does not; the message names the differences.
    """
    tensors, metadata = files.read_checkpoint(path)
    _check_same("configuration", path, fixed(config), fixed(_stored_config(path, metadata)))
    ours, theirs = corpus.summary(), section(path, metadata, "data")
    ours["source"] = theirs.get("source", "")  # the text may have moved
    _check_same("data", path, ours, theirs)
    own = "model" in metadata and metadata["model"] is None  # it was given to `train`
    _check_same("model", path, description or {}, {} if own else section(path, metadata, "model"))
    _check_tensors(path, model, tensors)
    state = State.stored(path, section(path, metadata, "state"))
    if state.step and not any(name.startswith("optimizer.") for name in tensors):
        raise CheckpointError(f"checkpoint {path} holds weights alone, as {BEST} does; it cannot be resumed")
    return state, tensors


def fixed(config: TrainConfig) -> dict[str, Any]:
    """The fields that a resumed run cannot change."""
    return {name: value for name, value in config.to_dict().items() if name not in FREE}


def _check_same(what: str, path: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if found := differences(ours, theirs):
        raise CheckpointError(f"checkpoint {path} has another {what}: {found}")


def _stored_config(path: Path, metadata: Mapping[str, Any]) -> TrainConfig:
    """The configuration in the metadata of the checkpoint at `path`."""
    try:
        return TrainConfig.from_dict(section(path, metadata, "config"))
    except (TypeError, ValueError) as error:
        raise _unusable(path, "config", error) from error


def _unusable(path: Path, name: str, error: Exception) -> CheckpointError:
    """What is wrong with the section `name` of a checkpoint, as its own error, unless it is one already."""
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"checkpoint {path} cannot be used: its `{name}`: {error!s:.400}")


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype and shape of tensors, by name; of the optimizer's counts of steps any floating type will do."""
    return {
        name: f"{'float' if _is_count(name, t) else str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
        for name, t in tensors.items()
    }


def _is_count(name: str, tensor: Tensor) -> bool:
    return name.startswith("optimizer.step.") and tensor.is_floating_point()


def _check_tensors(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that the tensors of a checkpoint have the names, shapes and dtypes of those of `model` and of AdamW.

    A parameter that no gradient has reached yet has no moments.
    """
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        names = {key: f"optimizer.{key}.{name}" for key in parallel.MOMENTS}
        if parameter.requires_grad and not tensors.keys().isdisjoint(names.values()):
            expected |= {where: torch.empty(()) if key == "step" else parameter for key, where in names.items()}
    _check_same("model", path, _kinds(expected), _kinds(tensors))

"""The optimizer, the schedule of its learning rate, and when a run is over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from .config import TrainConfig
from .processes import Processes


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: weight matrices of linear and embedding layers decay, all else does not.

    Biases, norms, offset-scales and tables of relative biases are left alone: decay would pull them to a
    value that has no meaning for them (a scale to 0, say).
    """
    decayed = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """The optimizer of a model on `device`."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=device.type in ("cpu", "cuda"),
    )


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Learning rate of the optimizer step that `step` steps came before: linear warm-up times cosine decay.

        lr * min(1, (step + 1) / warmup) * (f + (1 - f) (1 + cos(pi * progress)) / 2),      f = lr_final

    Args:
        config: gives `lr`, `lr_final` and the warm-up.
        step: steps already taken.
        progress: share of the run that lies behind, 0 to 1: `step / steps`, or of the time when only that is
            limited.

    Example:
        >>> config = TrainConfig(lr=1.0, lr_final=0.5, warmup=4, steps=100)
        >>> learning_rate(config, 0, 0.0), learning_rate(config, 50, 0.5), learning_rate(config, 100, 1.0)
        (0.25, 0.75, 0.5)
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return config.lr * warm * (config.lr_final + (1.0 - config.lr_final) * cosine)


class Schedule:
    """How far a run is, by its limits of steps and of time.

    Args:
        config: gives the limits.
        processes: all of the run; the clock of the first one counts.
        elapsed: seconds of the whole run up to now.
    """

    config: TrainConfig
    processes: Processes
    elapsed: Callable[[], float]

    def __init__(self, config: TrainConfig, processes: Processes, elapsed: Callable[[], float]) -> None:
        self.config, self.processes, self.elapsed = config, processes, elapsed

    def limit_reached(self, step: int) -> Literal["steps", "time"] | None:
        """Which limit the run has reached, by the first process's clock."""
        if self.config.steps is not None and step >= self.config.steps:
            return "steps"
        if self.config.max_minutes is not None:
            late = self.elapsed() >= 60 * self.config.max_minutes
            return "time" if self.processes.largest(late and self.processes.first) else None
        return None

    def rate(self, step: int) -> float:
        """The learning rate of the next step: by steps if there is a limit of steps, else by the clock."""
        if self.config.steps is not None:
            progress = step / self.config.steps
        else:
            progress = self.processes.largest(self._clock_progress() if self.processes.first else 0.0)
        return learning_rate(self.config, step, progress)

    def progress(self, step: int) -> float:
        """Share of the run that is done, 0 to 1."""
        by_steps = 0.0 if self.config.steps is None else min(1.0, step / self.config.steps)
        return max(by_steps, self._clock_progress())

    def _clock_progress(self) -> float:
        limit = self.config.max_minutes
        return 0.0 if limit is None else min(1.0, self.elapsed() / (60 * limit))

"""What a run tells while it goes on, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Event:
    """What a callback of `train` is told.

    Attributes:
        kind: "start" (once; `values` describe model and data), "step" (after each optimizer step), "train"
            and "validation" (a row of the log), "save" (a checkpoint was written), "stopping" (a signal asked
            to stop).
        step: optimizer steps taken.
        progress: share of the run that is done, 0 to 1.
        values: the row of the log, or details.
    """

    kind: Literal["start", "step", "train", "validation", "save", "stopping"]
    step: int
    progress: float
    values: Mapping[str, Any] = field(default_factory=dict)


Callback = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended. Losses are means per predicted byte, in nats; a `None` was never measured.

    Attributes:
        stopped: "steps" or "time" (the limit that was reached), or "signal".
        signal: number of the signal that stopped the run, else None.
        step: optimizer steps taken in the whole run.
        bytes_seen: bytes of all windows of the whole run.
        train_loss: mean of the last row of the log.
        validation_loss: of the last validation.
        bits_per_byte: the same, divided by ln 2.
        best_validation_loss: the lowest validation loss, whose weights are in `best`.
        best_step: its step.
        tokens_per_second: bytes of windows per second, over the training steps of this call.
        elapsed_seconds: wall-clock time of the whole run, including validation and saving.
        parameters: number of trained parameters.
        data: sizes and fingerprint of the text.
        out: folder of the run.
        checkpoint: the last checkpoint, from which the run can be resumed.
        best: weights of the best validation; None before the first one.
        log: rows of the run as JSON lines.
        plot: the loss curve.
        model: the trained model, in evaluation mode. If it is sharded, a call takes all processes.
        history: the rows of the log.
    """

    stopped: Literal["steps", "time", "signal"]
    signal: int | None
    step: int
    bytes_seen: int
    train_loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    best_validation_loss: float | None
    best_step: int | None
    tokens_per_second: float | None
    elapsed_seconds: float
    parameters: int
    data: Mapping[str, Any]
    out: Path
    checkpoint: Path
    best: Path | None
    log: Path
    plot: Path
    model: nn.Module = field(repr=False, compare=False)
    history: Sequence[Mapping[str, Any]] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the model and the history, as JSON values."""
        kept = {name: value for name, value in vars(self).items() if name not in ("model", "history")}
        return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}

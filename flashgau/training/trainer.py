"""The training loop of a byte-level language model: exact to resume, safe to interrupt, in one process or several."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..files import atomic_write
from ..models import CausalLM, MaskedLM, ModelConfig
from ..models.files import check_shapes
from . import checkpoint as files
from . import parallel
from .checkpoint import CheckpointError, differences, section
from .config import FREE, TrainConfig, learning_rate
from .data import DROPOUT, Corpus, load_corpus, random_words, sample_starts, validation_starts
from .evaluation import batch_losses, loss_sum
from .log import Log
from .objective import count_targets, examples, mask_seeds, model_class, vocabulary
from .plots import loss_plot
from .processes import TIMEOUT, Processes, launched
from .signals import StopSignals

LAST, BEST = "last.safetensors", "best.safetensors"
LOG, PLOT, SETTINGS = "log.jsonl", "loss.png", "config.json"
_FILES = (LAST, BEST, LOG, SETTINGS, PLOT)
_LOCK = ".lock"
_PLOT_SECONDS = 10.0  # the loss curve is redrawn at the end, and at validations this long after the last time


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


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    model: nn.Module | None = None,
    callbacks: Iterable[Callback] = (),
    timeout: float = TIMEOUT,
) -> TrainResult:
    """Train a byte-level language model, writing checkpoints, a log and a loss curve to `config.out`.

    The loss is the mean of -log p(target) in nats: of the next byte, or of a masked one. The run ends at its limit of
    steps or minutes, or after the step in which SIGINT (Ctrl-C) or SIGTERM arrives; in each case it saves first. A
    second signal raises KeyboardInterrupt at once. (Signals are heeded only in the main thread.) The caller's random
    number generators are left as they were.

    A run that was stopped at any step, by a signal or by a crash, and is resumed, gives the same parameters
    bit for bit as one that never stopped, on the same machine and number of threads and processes, if its schedule
    follows steps.

    Started by `torchrun`, or in an existing process group of `torch.distributed`, all processes train one model: each
    takes its part of every batch, and the first alone writes files and calls callbacks. The result is that of one
    process, up to rounding; a checkpoint does not know how many there were. All must see the folder `config.out`.

    Args:
        config: everything that decides the run.
        resume: continue from `config.out`'s last checkpoint, whose fields must equal those of `config` but
            for limits, intervals, places and device.
        model: train this module rather than build `config.model`: (B, N) int64 bytes -> (B, N, 256) logits, or
            257 for both with the objective "mlm", whose mask is 256. It must be the same in every process, and be
            given again to resume.
        callbacks: each is called with every `Event`.
        timeout: seconds that a process waits for the others of several, whatever they do meanwhile.

    Raises:
        FileExistsError: `config.out` holds a run, and `resume` is False.
        FileNotFoundError: no such data, or no checkpoint to resume.
        CheckpointError: (a ValueError) the checkpoint is damaged, or of another model, configuration or data.
        ValueError: the text is too short, there is no such model, size or device, or the batch cannot be divided
            among the processes.
        FloatingPointError: the loss or its gradient became infinite or NaN; the last checkpoint is from
            before.
        OSError: something cannot be read or written; the last checkpoint is intact.
        TimeoutError: (an OSError) a process that `torchrun` started stands still or has ended, and is named; the last
            checkpoint is intact.

    Example:
        >>> import tempfile
        >>> from flashgau.training import TrainConfig, train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = Path(folder, "text"); _ = text.write_bytes(b"all work and no play " * 100)
        ...     model = nn.Sequential(nn.Embedding(256, 16), nn.Linear(16, 256))
        ...     config = TrainConfig(data=str(text), out=f"{folder}/run", steps=200, length=32, lr=0.03)
        ...     result = train(config, model=model)
        >>> result.stopped, result.step, result.bits_per_byte < 1.5
        ('steps', 200, True)
    """
    out = Path(config.out)
    if config.checkpointing and model is not None:
        raise ValueError("train: `checkpointing` is for the models of flashgau; expected a `model` that does it itself")
    with launched(timeout) as processes, contextlib.ExitStack() as held:
        processes.everywhere(lambda: _check_batch(config, processes))
        device = processes.everywhere(lambda: _device(config, processes))
        processes.at_first(lambda: _check_folder(out, resume))
        corpus = processes.everywhere(lambda: _corpus(config))
        processes.same("config", str(_fixed(config)))
        processes.same("data", f"the text {corpus.fingerprint}")
        held.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        description = None
        if model is None:
            model, description = processes.everywhere(lambda: _build(config))
        processes.at_first(lambda: held.enter_context(_locked(out)))
        processes.at_first(lambda: _check_folder(out, resume))  # another run may have ended here by now
        run = _Run(config, model, description, corpus, device, list(callbacks), processes)
        if resume:
            run.load(out / LAST)
        return run.go()


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
    _check_same("configuration", path, _fixed(wanted), _fixed(stored))
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


@dataclass
class _State:
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
    def stored(cls, path: Path, values: Mapping[str, Any]) -> _State:
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


class _Run:
    """One run: its model, optimizer, files and state. Every process has one, and does the same at the same time."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        description: dict[str, Any] | None,
        corpus: Corpus,
        device: torch.device,
        callbacks: list[Callback],
        processes: Processes,
    ) -> None:
        self.config, self.model, self.description = config, model, description
        self.corpus, self.device, self.processes = corpus, device, processes
        self.callbacks = callbacks if processes.first else []
        self.name = type(model).__name__  # before sharding, which changes the class
        self.out = Path(config.out)
        self.trained = parallel.distribute(model, processes, device, config.shard)
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=device.type in ("cpu", "cuda"),
        )
        self.state = _State()
        self.saved_step: int | None = None
        self.signal: int | None = None  # the one that all processes have agreed to heed
        self.log = Log(self.out / LOG)
        # Kept on the device between rows of the log: reading them makes the host wait for the device.
        self.loss_sum = torch.zeros((), device=device)
        self.norm_max = torch.zeros((), device=device)

    # ---- the loop

    def go(self) -> TrainResult:
        """From the current state to the end of the run."""
        self.began = time.perf_counter() - self.state.elapsed
        self.step_seconds, self.steps_here = 0.0, 0
        self.row_began, self.row_steps = 0.0, 0
        self.plotted = self.state.elapsed
        self.processes.at_first(lambda: files.remove_temporaries(*(self.out / name for name in _FILES)))
        with StopSignals(self._on_signal) as self.stop, self.log, parallel.without_view_warning(self.config.shard):
            if new := self.saved_step is None:
                # A folder that cannot be written shows now, not after an hour. And the checkpoint comes before all
                # other files: whatever kills the process, the folder then holds a run to resume, or none.
                self._write_last()
            self.processes.at_first(self._write_settings)
            self._tell("start", self._overview())
            if new:
                self._tell("save", {"checkpoint": str(self.out / LAST)})
            self._heed_signals()
            # Whether the run is over is decided once per step: the clock may reach its limit at any line.
            self.reached = self._limit_reached()
            self._validate_if_due()
            while not self.signal and not self.reached:
                self.take_step()
                self._heed_signals()
                self.reached = self._limit_reached()
                if self.reached or self.state.step % self.config.log_every == 0:
                    self._log_training()
                self._validate_if_due()
                if self.reached or self.signal or self.state.step % self.config.save_every == 0:
                    self.save()
            if self.saved_step != self.state.step or self.saved_validated != self.state.validated:
                self.save()  # stopped during a validation, or resumed only for the last one
            self._plot()
            return self._result()

    def take_step(self) -> None:
        """One optimizer step: `accumulate` forward and backward passes over this process's part of its windows."""
        config, step, processes, began = self.config, self.state.step, self.processes, time.perf_counter()
        rows, text = config.batch * config.accumulate, self.corpus.train
        starts = sample_starts(text.size, rows, config.length, config.seed, step)
        inputs, targets = examples(config.objective, text, starts, config.length, mask_seeds(config.seed, step, rows))
        # Every target of the step counts alike, in whichever pass and process. DDP and FSDP average gradients.
        share = processes.count / max(count_targets(targets), 1)
        # Each process has its own dropout, which like all else depends on the step alone.
        torch.manual_seed(int(random_words(DROPOUT, config.seed, step, processes.count)[processes.rank]))
        rate = learning_rate(config, step, self._schedule_progress())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        own = (config.accumulate, processes.count, -1, config.length)
        parts = zip(inputs.view(own)[:, processes.rank], targets.view(own)[:, processes.rank], strict=True)
        losses = torch.zeros_like(self.loss_sum)
        for number, (x, y) in enumerate(parts, 1):
            with parallel.only_last_pass(self.trained, number == config.accumulate):
                loss = loss_sum(self.trained, x, y, self.device, config.bf16) * share
                loss.backward()
            losses += loss.detach()
        self.loss_sum += processes.mean(losses)
        clip = math.inf if config.grad_clip is None else config.grad_clip
        norm = parallel.whole(nn.utils.clip_grad_norm_(list(self.names), clip))
        self.norm_max = torch.maximum(self.norm_max, norm.float())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.rate = rate
        self.state.step += 1
        self.state.loss_steps += 1
        self.steps_here += 1
        self.row_steps += 1
        self.step_seconds += time.perf_counter() - began
        self._tell("step")

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss over the fixed validation windows; None if a signal came meanwhile."""
        config, text = self.config, self.corpus.validation
        starts = validation_starts(text.size, config.eval_windows, config.length)
        total, count = 0.0, 0
        self.model.eval()
        try:
            for loss, targets in batch_losses(
                self.model,
                config.objective,
                text,
                starts,
                config.length,
                batch=config.batch,
                device=self.device,
                bf16=config.bf16,
                processes=self.processes,
            ):
                total, count = total + loss, count + targets
                self._heed_signals()
                if self.signal:
                    return None
        finally:
            self.model.train()
        total, count = self.processes.mean(torch.tensor([total, count], dtype=torch.float64)).tolist()
        self.processes.at_first(lambda: _check_masked(config, int(count)))
        return total / count

    def _validate_if_due(self) -> None:
        """Validate, unless this step was or need not be; keep the weights if they are the best so far."""
        state = self.state
        due = self.reached or state.step % self.config.eval_every == 0
        if not due or state.validated == state.step or self.signal:
            return
        self._read_sums()  # refuses weights that are not finite before they are called best
        loss = self.validate()
        if loss is None:
            return
        self._refuse_unless_finite("validation loss", loss)
        state.validated = state.step
        self._row("validation", {"loss": loss, "bits_per_byte": loss / math.log(2)})
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step
            weights = parallel.gather(self.model, self.processes)
            self.processes.at_first(lambda: files.write_checkpoint(self.out / BEST, weights, self._metadata()))
        if self.processes.largest(self._elapsed() - self.plotted) > _PLOT_SECONDS:
            self._plot()
        self._heed_signals()

    def _log_training(self) -> None:
        """One row: means since the last one, which may lie in an earlier part of a resumed run."""
        self._read_sums()
        state = self.state
        if state.loss_steps == 0:
            return
        loss = state.loss_sum / state.loss_steps
        self._row(
            "train",
            {
                "loss": loss,
                "bits_per_byte": loss / math.log(2),
                "lr": self.rate,
                "grad_norm": state.norm_max,
                "tokens_per_second": self._speed(),
            },
        )
        state.loss_sum, state.loss_steps, state.norm_max = 0.0, 0, 0.0
        self.loss_sum.zero_()
        self.norm_max.zero_()
        self.row_began, self.row_steps = self.step_seconds, 0

    def _speed(self) -> float | None:
        """Bytes per second since the last row. Read after `_read_sums`, which waits for the device."""
        seconds = self.step_seconds - self.row_began
        return self.row_steps * self.config.bytes_per_step / seconds if self.row_steps and seconds > 0 else None

    def _read_sums(self) -> None:
        """Bring the sums of loss and gradient norm to the host, and refuse them if they are not finite."""
        began = time.perf_counter()
        self.state.loss_sum, self.state.norm_max = self.loss_sum.item(), self.norm_max.item()
        self.step_seconds += time.perf_counter() - began
        self._refuse_unless_finite("loss", self.state.loss_sum)
        self._refuse_unless_finite("gradient", self.state.norm_max)

    def _refuse_unless_finite(self, what: str, value: float) -> None:
        """Raise an error, in all processes, if `value`, which is the same in all, is not finite."""

        def check() -> None:
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {what} is not finite at step {self.state.step}; try a lower lr or a longer warm-up "
                    f"(the checkpoint of step {self.saved_step} is intact)"
                )

        self.processes.at_first(check)

    def _plot(self) -> None:
        self.processes.at_first(lambda: loss_plot(self.log.rows, self.out / PLOT, self._title()))
        self.plotted = self._elapsed()

    # ---- stopping

    def _heed_signals(self) -> None:
        """Take note of a signal that came to any of the processes. All call this at the same points."""
        number = int(self.processes.largest(self.stop.signal or 0))
        if number and self.processes.first and not self.stop.reported and not self.signal:
            self._on_signal(number)  # it came to another process alone, or while this one was printing
        self.signal = number or self.signal

    # ---- time and progress

    def _elapsed(self) -> float:
        return time.perf_counter() - self.began

    def _limit_reached(self) -> Literal["steps", "time"] | None:
        """Which limit the run has reached, by the first process's clock."""
        if self.config.steps is not None and self.state.step >= self.config.steps:
            return "steps"
        if self.config.max_minutes is not None:
            late = self._elapsed() >= 60 * self.config.max_minutes
            return "time" if self.processes.largest(late and self.processes.first) else None
        return None

    def _schedule_progress(self) -> float:
        """Progress as the learning rate sees it: by steps if there is a limit of steps, else by the clock."""
        if self.config.steps is not None:
            return self.state.step / self.config.steps
        return self.processes.largest(self._clock_progress() if self.processes.first else 0.0)

    def _clock_progress(self) -> float:
        limit = self.config.max_minutes
        return 0.0 if limit is None else min(1.0, self._elapsed() / (60 * limit))

    def _progress(self) -> float:
        by_steps = 0.0 if self.config.steps is None else min(1.0, self.state.step / self.config.steps)
        return max(by_steps, self._clock_progress())

    # ---- saying what happens

    def _row(self, kind: Literal["train", "validation"], values: Mapping[str, Any]) -> None:
        step = self.state.step
        place = {"step": step, "bytes": step * self.config.bytes_per_step, "elapsed_seconds": self._elapsed()}
        row = {"kind": kind, **place, **values}
        self.log.rows.append(row)
        self.processes.at_first(lambda: self.log.append(row))
        self._tell(kind, row)

    def _tell(self, kind: Any, values: Mapping[str, Any] | None = None) -> None:
        event = Event(kind, self.state.step, self._progress(), values or {})
        for callback in self.callbacks:
            callback(event)

    def _on_signal(self, number: int) -> None:
        self._tell("stopping", {"signal": number})

    def _overview(self) -> dict[str, Any]:
        return {
            "model": self._title(),
            "parameters": self._parameters(),
            "device": str(self.device),
            "processes": self.processes.count,
            "steps": self.config.steps,
            "max_minutes": self.config.max_minutes,
            "out": str(self.out),
            "data": self.corpus.summary(),
        }

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.names if parameter.requires_grad)

    def _title(self) -> str:
        name = f"{self.config.model} {self.config.size}" if self.description else self.name
        masked = ", masked" if self.config.objective == "mlm" else ""
        return f"{name}{masked}, {self._parameters() / 1e6:.2f} M parameters, {self.config.length}-byte windows"

    def _result(self) -> TrainResult:
        state, rows = self.state, self.log.rows
        last = {row["kind"]: row["loss"] for row in rows}
        validation = last.get("validation")
        number = self.signal
        return TrainResult(
            stopped=self.reached if self.reached and not number else "signal",
            signal=number,
            step=state.step,
            bytes_seen=state.step * self.config.bytes_per_step,
            train_loss=last.get("train"),
            validation_loss=validation,
            bits_per_byte=None if validation is None else validation / math.log(2),
            best_validation_loss=state.best_loss,
            best_step=state.best_step,
            tokens_per_second=(
                self.steps_here * self.config.bytes_per_step / self.step_seconds if self.step_seconds > 0 else None
            ),
            elapsed_seconds=self._elapsed(),
            parameters=self._parameters(),
            data=self.corpus.summary(),
            out=self.out,
            checkpoint=self.out / LAST,
            best=self.out / BEST if state.best_step is not None else None,
            log=self.out / LOG,
            plot=self.out / PLOT,
            model=self.model.eval(),
            history=rows,
        )

    # ---- checkpoints

    def _metadata(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "model": self.description,
            "data": self.corpus.summary(),
            "state": asdict(self.state),
        }

    def save(self) -> None:
        """Write the last checkpoint, and tell of it."""
        self._write_last()
        self._tell("save", {"checkpoint": str(self.out / LAST)})

    def _write_last(self) -> None:
        """Write the whole state as the last checkpoint. The log up to here is on disk before it is."""
        self._read_sums()
        self.state.elapsed = self._elapsed()
        tensors = parallel.gather(self.model, self.processes, self.optimizer)

        def write() -> None:
            self.log.sync()
            files.write_checkpoint(self.out / LAST, tensors, self._metadata())

        self.processes.at_first(write)
        self.saved_step, self.saved_validated = self.state.step, self.state.validated

    def load(self, path: Path) -> None:
        """Take over the state in a checkpoint, after making sure that it belongs to this run.

        Raises:
            CheckpointError: it does not; the message names the differences.
        """
        tensors: dict[str, Tensor] = {}

        def read() -> tuple[_State, list[dict[str, Any]]]:
            """The state and the rows of the log. The tensors stay in this process until it scatters them."""
            found, metadata = files.read_checkpoint(path)
            _check_same("configuration", path, _fixed(self.config), _fixed(_stored_config(path, metadata)))
            ours, theirs = self.corpus.summary(), section(path, metadata, "data")
            ours["source"] = theirs.get("source", "")  # the text may have moved
            _check_same("data", path, ours, theirs)
            own = "model" in metadata and metadata["model"] is None  # it was given to `train`
            _check_same("model", path, self.description or {}, {} if own else section(path, metadata, "model"))
            _check_tensors(path, self.model, found)
            state = _State.stored(path, section(path, metadata, "state"))
            if state.step and not any(name.startswith("optimizer.") for name in found):
                raise CheckpointError(f"checkpoint {path} holds weights alone, as {BEST} does; it cannot be resumed")
            tensors.update(found)
            return state, self.log.rewind(state.step, state.validated)

        self.state, self.log.rows = self.processes.at_first(read)
        parallel.scatter(tensors, self.model, self.optimizer, self.processes)
        self.saved_step, self.saved_validated = self.state.step, self.state.validated
        self.loss_sum.fill_(self.state.loss_sum)
        self.norm_max.fill_(self.state.norm_max)

    def _write_settings(self) -> None:
        """The configuration for people to read; the checkpoint's own copy is what is resumed from."""
        settings = {
            "config": self.config.to_dict(),
            "model": self.description,
            "data": self.corpus.summary(),
            "device": str(self.device),
            "processes": self.processes.count,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        with atomic_write(self.out / SETTINGS) as stream:
            stream.write(json.dumps(settings, indent=2).encode() + b"\n")


def _check_folder(out: Path, resume: bool) -> None:
    """Refuse to overwrite a run, or to resume one that is not there."""
    if resume and not (out / LAST).exists():
        raise FileNotFoundError(f"nothing to resume in {out}: it has no {LAST}")
    present = [name for name in _FILES if (out / name).exists()]
    if present and not resume:
        raise FileExistsError(f"{out} already holds a run ({present[0]}); resume it, or choose another folder")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is not a folder")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The run's folder, made if need be, and held so that no second process trains in it meanwhile."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows: no such protection
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, f"another process is training in {out}") from error
        yield


def _build(config: TrainConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The model that `config` names, and its configuration as JSON values."""
    description = ModelConfig.named(f"{config.model}-{config.size}", vocab_size=vocabulary(config.objective))
    model = model_class(config.objective)(replace(description, checkpointing=config.checkpointing))
    return model, description.to_dict()  # what the model computes does not depend on `checkpointing`


def _check_batch(config: TrainConfig, processes: Processes) -> None:
    """Refuse a batch that cannot be divided equally."""
    if config.batch % processes.count:
        raise ValueError(
            f"batch: {config.batch} windows cannot be divided among {processes.count} processes; "
            f"expected a multiple of {processes.count}"
        )


def _corpus(config: TrainConfig) -> Corpus:
    """The text, if its parts are long enough."""
    corpus = load_corpus(config.data, validation_fraction=config.validation_fraction, exclude=config.out)
    for part, text in (("training", corpus.train), ("validation", corpus.validation)):
        if text.size < config.length + 1:
            raise ValueError(
                f"data: the {part} text has {text.size} bytes; expected more than length = {config.length}"
            )
    return corpus


def _device(config: TrainConfig, processes: Processes) -> torch.device:
    """The device that `config` names, if it can be used as asked; of several GPUs, this process's own."""
    several = processes.count > 1
    if config.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if config.device == "auto" or (config.device == "cuda" and several):
        number = torch.cuda.current_device()
        if several:
            number = torch.distributed.get_node_local_rank(number)
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"device: process {processes.rank} is number {number} of its machine, which has "
                f"{torch.cuda.device_count()} GPUs; expected one process per GPU"
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if several and config.device.startswith("cuda"):
        raise ValueError(f"device: {config.device!r} is one GPU for {processes.count} processes; expected 'cuda'")
    try:
        device = torch.device(config.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device: {config.device!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise ValueError("device: 'meta' cannot be used: it holds no numbers")
    return device


def _check_masked(config: TrainConfig, count: int) -> None:
    """Refuse validation windows of which the masks hide nothing; of any size worth validating they hide 15%."""
    if not count:
        raise ValueError(
            f"eval_windows: none of the bytes of {config.eval_windows} windows of {config.length} is masked; "
            "expected more windows, or longer ones"
        )


def _fixed(config: TrainConfig) -> dict[str, Any]:
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

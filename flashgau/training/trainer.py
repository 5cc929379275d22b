"""The training loop of a byte-level language model: exact to resume, safe to interrupt, in one process or several."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models import ModelConfig
from . import checkpoint as files
from . import parallel
from .config import TrainConfig
from .data import DROPOUT, Corpus, random_words, sample_starts, validation_starts
from .evaluation import batch_losses, loss_sum
from .folder import BEST, FILES, LAST, LOG, PLOT, check_folder, locked, write_settings
from .log import Log
from .objective import count_targets, examples, mask_seeds, model_class, vocabulary
from .optimization import Schedule, adamw
from .plots import check_installed, loss_plot
from .prepare import check_batch, check_masked, choose_device, read_corpus
from .processes import TIMEOUT, Processes, launched
from .restore import State, fixed, read_run
from .results import Callback, Event, TrainResult
from .share import Share, shared
from .signals import StopSignals

_PLOT_SECONDS = 10.0  # the loss curve is redrawn at the end, and at validations this long after the last time


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
    With `config.context_parallel` groups of so many take the same windows, and each process a slice of their bytes.

    Args:
        config: everything that decides the run.
        resume: continue from `config.out`'s last checkpoint, whose fields must equal those of `config` but
            for limits, intervals, places and device.
        model: train this module rather than build `config.model`: (B, N) int64 bytes -> (B, N, 256) logits, or
            257 for both with the objective "mlm", whose mask is 256; with `context_parallel` it takes `spread=`, as the
            models of flashgau do. It must be the same in every process, and be
            given again to resume.
        callbacks: each is called with every `Event`.
        timeout: seconds that a process waits for the others of several, whatever they do meanwhile.

    Raises:
        FileExistsError: `config.out` holds a run, and `resume` is False.
        FileNotFoundError: no such data, or no checkpoint to resume.
        CheckpointError: (a ValueError) the checkpoint is damaged, or of another model, configuration or data.
        ValueError: the text is too short, there is no such model, size or device, or the batch cannot be divided
            among the processes; with `context_parallel`, the processes into groups of so many, or a window among
            these.
        FloatingPointError: the loss or its gradient became infinite or NaN; the last checkpoint is from
            before.
        OSError: something cannot be read or written; the last checkpoint is intact.
        TimeoutError: (an OSError) a process that `torchrun` started stands still or has ended, and is named; the last
            checkpoint is intact.
        ImportError: matplotlib, which draws the curve, is not installed.

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
    check_installed()
    out = Path(config.out)
    if config.checkpointing and model is not None:
        raise ValueError("train: `checkpointing` is for the models of flashgau; expected a `model` that does it itself")
    with launched(timeout) as processes, contextlib.ExitStack() as held:
        processes.everywhere(lambda: check_batch(config, processes))
        device = processes.everywhere(lambda: choose_device(config, processes))
        processes.at_first(lambda: check_folder(out, resume))
        corpus = processes.everywhere(lambda: read_corpus(config))
        processes.same("config", str(fixed(config)))
        processes.same("data", f"the text {corpus.fingerprint}")
        held.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        description = None
        if model is None:
            model, description = processes.everywhere(lambda: _build(config))
        share = held.enter_context(shared(config, model, processes, timeout))
        processes.at_first(lambda: held.enter_context(locked(out)))
        processes.at_first(lambda: check_folder(out, resume))  # another run may have ended here by now
        run = _Run(config, model, description, corpus, device, list(callbacks), processes, share)
        if resume:
            run.load(out / LAST)
        return run.go()


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
        share: Share,
    ) -> None:
        self.config, self.model, self.description = config, model, description
        self.corpus, self.device, self.processes, self.share = corpus, device, processes, share
        self.callbacks = callbacks if processes.first else []
        self.name = type(model).__name__  # before sharding, which changes the class
        self.out = Path(config.out)
        self.trained = parallel.distribute(model, processes, device, config.shard)
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = adamw(model, config, device)
        self.state = State()
        self.saved_step: int | None = None
        self.signal: int | None = None  # the one that all processes have agreed to heed
        self.log = Log(self.out / LOG)
        self.schedule = Schedule(config, processes, self._elapsed)
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
        self.processes.at_first(lambda: files.remove_temporaries(*(self.out / name for name in FILES)))
        with StopSignals(self._on_signal) as self.stop, self.log, parallel.without_view_warning(self.config.shard):
            if new := self.saved_step is None:
                # A folder that cannot be written shows now, not after an hour. And the checkpoint comes before all
                # other files: whatever kills the process, the folder then holds a run to resume, or none.
                self._write_last()
            self.processes.at_first(lambda: write_settings(self.out, self._settings()))
            self._tell("start", self._overview())
            if new:
                self._tell("save", {"checkpoint": str(self.out / LAST)})
            self._heed_signals()
            # Whether the run is over is decided once per step: the clock may reach its limit at any line.
            self.reached = self.schedule.limit_reached(self.state.step)
            self._validate_if_due()
            while not self.signal and not self.reached:
                self.take_step()
                self._heed_signals()
                self.reached = self.schedule.limit_reached(self.state.step)
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
        """One optimizer step: `accumulate` forward and backward passes over this process's share of its windows."""
        config, step, processes, share = self.config, self.state.step, self.processes, self.share
        began = time.perf_counter()
        rows, text = config.batch * config.accumulate, self.corpus.train
        starts = sample_starts(text.size, rows, config.length, config.seed, step)
        inputs, targets = examples(config.objective, text, starts, config.length, mask_seeds(config.seed, step, rows))
        # Every target of the step counts alike, in whichever pass and process. DDP and FSDP average gradients.
        weight = processes.count / max(count_targets(targets), 1)
        # Each process has its own dropout, which like all else depends on the step alone.
        torch.manual_seed(int(random_words(DROPOUT, config.seed, step, processes.count)[processes.rank]))
        rate = self.schedule.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        own = (config.accumulate, share.count, -1, config.length)
        parts = zip(inputs.view(own)[:, share.rank], targets.view(own)[:, share.rank], strict=True)
        losses = torch.zeros_like(self.loss_sum)
        for number, (x, y) in enumerate(parts, 1):
            with parallel.only_last_pass(self.trained, number == config.accumulate):
                loss = loss_sum(self.trained, share.of(x), share.of(y), self.device, config.bf16, share.spread) * weight
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
                share=self.share,
            ):
                total, count = total + loss, count + targets
                self._heed_signals()
                if self.signal:
                    return None
        finally:
            self.model.train()
        total, count = self.processes.mean(torch.tensor([total, count], dtype=torch.float64)).tolist()
        self.processes.at_first(lambda: check_masked(config, int(count)))
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

    def _elapsed(self) -> float:
        return time.perf_counter() - self.began

    # ---- stopping

    def _heed_signals(self) -> None:
        """Take note of a signal that came to any of the processes. All call this at the same points."""
        number = int(self.processes.largest(self.stop.signal or 0))
        if number and self.processes.first and not self.stop.reported and not self.signal:
            self._on_signal(number)  # it came to another process alone, or while this one was printing
        self.signal = number or self.signal

    # ---- saying what happens

    def _row(self, kind: Literal["train", "validation"], values: Mapping[str, Any]) -> None:
        step = self.state.step
        place = {"step": step, "bytes": step * self.config.bytes_per_step, "elapsed_seconds": self._elapsed()}
        row = {"kind": kind, **place, **values}
        self.log.rows.append(row)
        self.processes.at_first(lambda: self.log.append(row))
        self._tell(kind, row)

    def _tell(self, kind: Any, values: Mapping[str, Any] | None = None) -> None:
        event = Event(kind, self.state.step, self.schedule.progress(self.state.step), values or {})
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
        return TrainResult(
            stopped=self.reached if self.reached and not self.signal else "signal",
            signal=self.signal,
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

    def _described(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "model": self.description, "data": self.corpus.summary()}

    def _metadata(self) -> dict[str, Any]:
        return {**self._described(), "state": asdict(self.state)}

    def _settings(self) -> dict[str, Any]:
        return {**self._described(), "device": str(self.device), "processes": self.processes.count}

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

        def read() -> tuple[State, list[dict[str, Any]]]:
            """The state and the rows of the log. The tensors stay in this process until it scatters them."""
            state, found = read_run(path, self.config, self.corpus, self.model, self.description)
            tensors.update(found)
            return state, self.log.rewind(state.step, state.validated)

        self.state, self.log.rows = self.processes.at_first(read)
        parallel.scatter(tensors, self.model, self.optimizer, self.processes)
        self.saved_step, self.saved_validated = self.state.step, self.state.validated
        self.loss_sum.fill_(self.state.loss_sum)
        self.norm_max.fill_(self.state.norm_max)


def _build(config: TrainConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The model that `config` names, and its configuration as JSON values."""
    description = ModelConfig.named(f"{config.model}-{config.size}", vocab_size=vocabulary(config.objective))
    model = model_class(config.objective)(replace(description, checkpointing=config.checkpointing))
    return model, description.to_dict()  # what the model computes does not depend on `checkpointing`

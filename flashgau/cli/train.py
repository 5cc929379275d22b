"""`flashgau train`: a byte-level language model on any text."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashgau.cli.console import FAILURE, dump_json, failing, make_console, seconds

if TYPE_CHECKING:
    from rich.console import Console

    from flashgau.training import Event, TrainResult

# Written here because asking flashgau.models would load PyTorch for a page of help; a test compares them.
_KINDS = "flash, flash-quad, transformer, transformer++, mc-tfm++"
_SIZES = "tiny, small, medium, base"


def train(
    model: Annotated[
        str | None, typer.Option(help=f"Kind of model: {_KINDS}. [default: flash]", metavar="KIND")
    ] = None,
    size: Annotated[str | None, typer.Option(help=f"Its size: {_SIZES}. [default: small]", metavar="NAME")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="clm: predict the next byte; mlm: fill in masked bytes. [default: clm]", metavar="clm|mlm"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text: any file, or a folder, whose files are split into training and validation. "
            "[default: Python's standard library]"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and loss curve.")] = Path("runs/train"),
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps. [default: 2000, or no limit with --max-minutes]")
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            help="Minutes after which the run ends, earlier parts of a resumed run included. "
            "Without --steps the learning rate follows the clock."
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows per forward pass, over all processes. [default: 8]")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Forward passes per optimizer step. [default: 1]")] = None,
    length: Annotated[int | None, typer.Option(help="Bytes per window. [default: 512]")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. [default: 0.001]")] = None,
    lr_final: Annotated[
        float | None, typer.Option(help="Learning rate at the end, as a fraction of --lr. [default: 0.1]")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Steps of linear warm-up. [default: 100, at most a tenth of --steps]")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Decoupled weight decay of matrices. [default: 0.1]")
    ] = None,
    grad_clip: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient; 0 for no limit. [default: 1.0]")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Compute layers again in the backward pass rather than keep what they computed.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard/--no-shard", help="Divide the parameters among the processes of torchrun.", show_default=False
        ),
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; parameters stay fp32.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches, masks and dropout. [default: 0]")] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of the text that is not trained on. [default: 0.05]")
    ] = None,
    eval_windows: Annotated[int | None, typer.Option(help="Most windows per validation. [default: 64]")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations. [default: 200]")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. [default: 200]")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between rows of the log. [default: 10]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... [default: auto]")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a process of torchrun waits for another before the run ends. [default: 600]",
            metavar="SECONDS",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out exactly where it stopped, with its own settings. "
            "Only limits, intervals, --data (if the text moved), --device, --checkpointing and --shard may be "
            "given anew.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the final report as JSON.")] = False,
) -> None:
    """Train a byte-level language model; Ctrl-C saves, --resume continues bit for bit.

    The folder --out receives last.safetensors (to resume), best.safetensors (weights of the best validation),
    log.jsonl, loss.png and config.json. Under torchrun several processes train one model; the checkpoint is the same.

    \b
    Examples:
      flashgau train --out runs/first --steps 500
      flashgau train --model transformer++ --size tiny --data book.txt --out runs/book
      flashgau train --objective mlm --model flash-quad --out runs/masked
      flashgau train --out runs/first --resume
      torchrun --nproc-per-node 2 --module flashgau train --out runs/two
    """
    import flashgau.training as training

    given: dict[str, Any] = {
        "model": model,
        "size": size,
        "objective": objective,
        "data": None if data is None else str(data.absolute()),
        "steps": steps,
        "max_minutes": max_minutes,
        "batch": batch,
        "accumulate": accumulate,
        "length": length,
        "lr": lr,
        "lr_final": lr_final,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "grad_clip": grad_clip,
        "checkpointing": checkpointing,
        "shard": shard,
        "bf16": bf16,
        "seed": seed,
        "validation_fraction": validation_fraction,
        "eval_windows": eval_windows,
        "eval_every": eval_every,
        "save_every": save_every,
        "log_every": log_every,
        "device": device,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("grad_clip") == 0:
        given["grad_clip"] = None
    if max_minutes is not None and steps is None and not resume:
        given["steps"] = None

    def configure() -> training.TrainConfig:
        return training.resume_config(out, **given) if resume else training.TrainConfig(out=str(out), **given)

    progress = ProgressDisplay(make_console(stderr=True))
    limit: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    with failing("train", "out of memory; try a smaller --batch with a larger --accumulate, or --checkpointing"):
        try:
            with training.launched(**limit) as processes:
                try:
                    config = processes.everywhere(configure)
                    with progress:
                        result = training.train(config, resume=resume, callbacks=[progress], **limit)
                except Exception as error:
                    if isinstance(error.__cause__, training.Elsewhere):
                        # The process that met it says so, and fails: to torchrun it is the cause.
                        raise typer.Exit() from None
                    raise
                if processes.first and json:
                    print(dump_json(result.to_dict()))
                elif processes.first:
                    _report(result)
        except TimeoutError as error:  # of processes that do not answer: one of the others says which
            if isinstance(error.__cause__, training.Elsewhere):
                raise typer.Exit(FAILURE) from None
            raise
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)


def _report(result: TrainResult) -> None:
    """The end of a run in a few lines on standard output."""
    speed = "" if result.tokens_per_second is None else f", {result.tokens_per_second:,.0f} bytes/s"
    print(f"{result.step} steps, {result.bytes_seen:,} bytes in {seconds(result.elapsed_seconds)}{speed}")
    if result.validation_loss is not None and result.best_validation_loss is not None:
        print(
            f"validation loss {result.validation_loss:.4f} nats = {result.bits_per_byte:.4f} bits per byte"
            f" (lowest {result.best_validation_loss:.4f} nats, at step {result.best_step})"
        )
    written = (result.checkpoint, result.best, result.log, result.plot)
    print("wrote " + " ".join(str(path) for path in written if path is not None))
    if result.signal is not None:
        print(
            f"stopped by {signal.Signals(result.signal).name}, and saved; to continue:"
            f" flashgau train --resume --out {shlex.quote(str(result.out))}"
        )


class ProgressDisplay:
    """A callback of `flashgau.training.train`: a progress bar, or plain lines where there is no terminal.

    Example:
        >>> from rich.console import Console
        >>> from flashgau.training import Event
        >>> row = {"loss": 1.0, "bits_per_byte": 1.4427, "tokens_per_second": 9e3}
        >>> with ProgressDisplay(Console(width=80)) as display:
        ...     display(Event("train", 10, 0.5, row))
        step 10  loss 1.0000  1.4427 bits/byte  9,000 bytes/s
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = console
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (
                "{task.fields[steps]}",
                "{task.fields[loss]}",
                "{task.fields[speed]}",
                "{task.fields[left]}",
            )
            self.bar = Progress(
                BarColumn(bar_width=24),
                *(TextColumn(column, markup=False) for column in columns),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=1.0, steps="starting", loss="", speed="", left="")
        self.limit: int | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        values = event.values
        if event.kind == "start":
            import time

            self.limit, self.began, self.began_at = values["steps"], time.monotonic(), event.progress
            if self.bar is not None:
                self.bar.start()  # not earlier: of several processes only the one that is told of events shows it
            text, count = values["data"], values["processes"]
            self._say(f"{values['model']}, on {values['device']}" + (f", {count} processes" if count > 1 else ""))
            self._say(
                f"text: {text['source']}: {text['train_bytes']:,} bytes for training,"
                f" {text['validation_bytes']:,} for validation"
            )
            if event.step:
                self._say(f"resumed at step {event.step}")
        elif event.kind == "stopping":
            self._say("stopping after this step, then saving; once more to quit at once")
        elif event.kind == "step" and self.bar is not None:
            self.bar.update(
                self.task,
                completed=event.progress,
                steps=self._steps(event.step),
                left=self._left(event.progress),
            )
        elif event.kind in ("train", "validation"):
            loss = f"loss {values['loss']:.4f}  {values['bits_per_byte']:.4f} bits/byte"
            speed = values.get("tokens_per_second")
            rate = "" if speed is None else f"{speed:,.0f} bytes/s"
            if event.kind == "validation":
                self._say(f"{self._steps(event.step)}  validation {loss}")
            elif self.bar is not None:
                self.bar.update(self.task, loss=loss, speed=rate)
            else:
                self._say(f"{self._steps(event.step)}  {loss}  {rate}")

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def _steps(self, step: int) -> str:
        return f"step {step}" if self.limit is None else f"step {step}/{self.limit}"

    def _left(self, progress: float) -> str:
        """Time left, from the speed since the start of this call."""
        import time

        done = progress - self.began_at
        if done <= 0:
            return ""
        return f"{seconds((time.monotonic() - self.began) * (1 - progress) / done)} left"

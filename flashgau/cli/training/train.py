"""`flashgau train`: a byte-level language model on any text."""

from __future__ import annotations

import inspect
import shlex
import signal
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from flashgau.cli.console import FAILURE, dump_json, failing, make_console, seconds
from flashgau.training.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from flashgau.training import Event, TrainResult

_PATHS = ("data", "out")  # fields that name files, which the configuration keeps as text


def _option_of(field: Field[Any], hint: Any) -> inspect.Parameter:
    """The option that sets a field of the configuration; but for `out` it is None where it is not given."""
    name, flag = field.name, field.name.replace("_", "-")
    text, shown, metavar = (field.metadata[key] for key in ("help", "shown", "metavar"))
    kind: Any = Path if name in _PATHS else next(k for k in (get_args(hint) or (hint,)) if k is not NoneType)
    default: Any = None
    if name == "out":
        default, option = Path(TrainConfig.out), typer.Option(help=text)
    elif kind is bool:
        option = typer.Option(f"--{flag}/--no-{flag}", help=text, show_default=False)
    else:
        option = typer.Option(help=f"{text} [default: {shown}]" if shown else text, metavar=metavar)
    annotation: Any = Annotated[kind if default else kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_options_of_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**given` an option for each field of the configuration that is described as one."""
    hints = get_type_hints(TrainConfig)
    generated = [_option_of(field, hints[field.name]) for field in fields(TrainConfig) if field.metadata]
    own = inspect.signature(command, eval_str=True).parameters.values()
    named = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    command.__signature__ = inspect.Signature([*generated, *named])  # type: ignore[attr-defined]
    return command


@_with_options_of_config
def train(
    *,
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
            "Only limits, intervals, --data (if the text moved), --device, --checkpointing, --shard and "
            "--context-parallel may be given anew.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the final report as JSON.")] = False,
    **given: Any,
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
      torchrun --nproc-per-node 4 --module flashgau train --out runs/long --length 65536 --context-parallel 4
    """
    import flashgau.training as training

    out: Path = given.pop("out")
    given = {name: value for name, value in given.items() if value is not None}
    if "data" in given:
        given["data"] = str(given["data"].absolute())
    if given.get("grad_clip") == 0:
        given["grad_clip"] = None
    if "max_minutes" in given and "steps" not in given and not resume:
        given["steps"] = None

    def configure() -> TrainConfig:
        return training.resume_config(out, **given) if resume else TrainConfig(out=str(out), **given)

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

    task: Any
    began: float
    began_at: float

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

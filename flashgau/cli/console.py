"""What every command shares: where it prints, how it fails, how it writes JSON."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

# Into a pipe or a file nothing is as narrow as a terminal, so tables are neither wrapped nor cut there.
PIPE_WIDTH = 400

FAILURE = 1
USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class Output(io.TextIOBase):
    """A standard stream whose reader may go away: what can no longer be written is dropped, and `lost` says why.

    It has no `buffer`, so that nobody writes past it.

    Args:
        stream: where the text goes; None in a process that was started without it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self.stream = stream
        self.lost: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's own."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        """It always looks so."""
        return True

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        """The stream's number, for those who ask a terminal for its size."""
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Let the stream write what it still holds."""
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self.lost is not None:
            return
        try:
            if self.stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            action(self.stream)
        except OSError as error:
            self.lost = error
            if self.stream is not None:
                # It keeps what it could not write, and would fail with it once more when Python ends.
                with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())
                    self.stream.flush()


def with_outputs(program: str, action: Callable[[], int]) -> int:
    """The exit status of `action`, which prints whatever it likes and is never ended by that.

    Inside, standard output and error are `Output`s, and a character that the encoding of standard output lacks becomes
    a question mark. If some of the output could not be written, a line on standard error says so, and a success becomes
    a failure. Only a reader that went away (`| head`) has had what it wanted: then the status stays. What is lost of
    standard error is not missed. Warnings are one line too.

    Args:
        program: begins the line.
        action: does everything, and returns an exit status.
    """
    standard = sys.stdout, sys.stderr
    if None in standard:
        # A file opened now would get the number of the stream that is not there, and whoever writes to that number
        # would write into the file.
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    out, err = Output(standard[0]), Output(standard[1])
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{program}: {' '.join(str(message).split())}\n"
    sys.stdout, sys.stderr = out, err
    try:
        with _replacing(standard[0]):
            status = action()
            out.flush()
        if out.lost is not None:
            print(f"{program}: cannot write to standard output: {out.lost.strerror}", file=err)
            if not isinstance(out.lost, BrokenPipeError):
                status = status or FAILURE
        return status
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = standard
        warnings.formatwarning = usual


@contextlib.contextmanager
def _replacing(stream: TextIO | None) -> Iterator[None]:
    """Inside, `stream` replaces what its encoding lacks. (Standard error does so by itself.)"""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    usual = stream.errors
    with contextlib.suppress(OSError):  # which it may have had before
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            stream.reconfigure(errors=usual)


def output_lost() -> bool:
    """Whether what is written to standard output from now on is lost."""
    return isinstance(sys.stdout, Output) and sys.stdout.lost is not None


def make_console(stderr: bool = False) -> Console:
    """A console on standard output (or error), plain text when that is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False)


def make_table(*columns: str, right: tuple[str, ...] = (), fixed: tuple[str, ...] = ()) -> Table:
    """A table in the commands' common style.

    The columns named in `right` are right-aligned numbers. Neither they nor those in `fixed` are wrapped.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True, header_style="bold")
    for column in columns:
        number = column in right
        table.add_column(column, justify="right" if number else "left", no_wrap=number or column in fixed)
    return table


def write_rows(path: Path, head: dict[str, Any], rows: list[Any]) -> None:
    """Write `head` and behind it `rows` as JSON, a line for each row, so that a change of one shows as such."""
    lines = ",\n".join(map(json.dumps, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{json.dumps({**head, 'rows': []}).removesuffix(']}')}\n{lines}\n]}}\n", encoding="utf-8")


Item = TypeVar("Item")


def counted(items: Iterator[Item], total: int, what: str) -> Iterator[Item]:
    """The items as they come, with a progress bar on standard error where that is a terminal."""
    from rich.progress import Progress

    console = make_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task)


@contextlib.contextmanager
def advancing(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, in all) that shows a progress bar on standard error until all is done, if that takes a while.

    There is none where standard error is no terminal, or where the first call says that all is done.
    """
    from rich.progress import Progress

    console = make_console(stderr=True)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    tasks: list[Any] = []

    def advance(done: int, total: int) -> None:
        if done == total:
            progress.stop()
        elif not tasks:
            progress.start()
            tasks.append(progress.add_task(what, total=total))
        if tasks:
            progress.update(tasks[0], completed=done)

    try:
        yield advance
    finally:
        progress.stop()


def fail(command: str, message: str, code: int = FAILURE) -> NoReturn:
    """End `command` with one line on standard error and an exit status (1 failure, 2 wrong use)."""
    print(f"flashgau {command}: {printable(' '.join(message.split()))}", file=sys.stderr)
    raise typer.Exit(code)


def usable_device(command: str, name: str) -> torch.device:
    """The device called `name`; one that cannot hold a number here ends `command` with the reason."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        fail(command, f"device {name!r} cannot be used: {reason}", USAGE)
    return device


def printable(text: str) -> str:
    """`text` with control characters, which a young model does write, shown as the replacement character.

    Example:
        >>> printable("def f():\\n\\treturn\\x1b[2J")
        'def f():\\n\\treturn\\ufffd[2J'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextlib.contextmanager
def failing(command: str, out_of_memory: str = "out of memory") -> Iterator[None]:
    """Inside, whatever is wrong with a user's files, numbers or memory ends `command` with one line.

    Args:
        command: whose line that is.
        out_of_memory: what to say when the memory does not suffice.
    """
    try:
        yield
    except MemoryError:
        fail(command, out_of_memory)
    except OSError as error:
        # Without Python's decoration of the system's errors.
        where = f": {error.filename}" if error.strerror and error.filename else ""
        fail(command, f"{error.strerror or error}{where}")
    except (ValueError, TypeError, ArithmeticError) as error:
        fail(command, str(error).removeprefix(f"{command}: ") or type(error).__name__)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")):
            raise
        fail(command, out_of_memory)


def jsonable(value: Any) -> Any:
    """`value` with what strict JSON cannot hold replaced: NaN and infinities become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def dump_json(value: Any) -> str:
    """`value` as indented strict JSON."""
    return json.dumps(jsonable(value), indent=2, allow_nan=False)


def seconds(value: float) -> str:
    """A duration for people.

    Example:
        >>> seconds(0.00042), seconds(0.0321), seconds(7.25), seconds(143.4)
        ('0.42 ms', '32.1 ms', '7.2 s', '2 min 23 s')
    """
    if not value < 1e10:
        return "centuries"
    if value < 1e-3:
        return f"{value * 1e3:.2f} ms"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    if value < 90:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def mebibytes(value: float) -> str:
    """A number of bytes for people, in MiB or GiB.

    Example:
        >>> mebibytes(3 << 20), mebibytes(5 << 30)
        ('3.0 MiB', '5.0 GiB')
    """
    if value < 1 << 30:
        return f"{value / (1 << 20):.1f} MiB"
    return f"{value / (1 << 30):.1f} GiB"

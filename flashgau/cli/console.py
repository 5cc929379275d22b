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
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Into a pipe or a file nothing is as narrow as a terminal, so tables are neither wrapped nor cut there.
PIPE_WIDTH = 400

FAILURE = 1
USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class Outlet(io.RawIOBase):
    """The bottom of a standard stream: what can no longer be written is dropped, and the reason is kept in `lost`.

    Args:
        sink: what takes the bytes; None in a process that was started without this stream.
    """

    def __init__(self, sink: Any) -> None:
        super().__init__()
        self.sink = sink
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.sink is not None and self.sink.isatty()

    def fileno(self) -> int:
        if self.sink is None:
            raise io.UnsupportedOperation("fileno")
        return self.sink.fileno()

    def write(self, data: Any) -> int:
        if self.lost is None:
            try:
                if self.sink is None:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                return self.sink.write(data)
            except OSError as error:
                self.lost = error
        return len(data)


class Output(io.TextIOWrapper):
    """A standard stream to which any text can be written in any encoding, whatever becomes of its reader.

    Args:
        stream: what it stands for; None if there is none.
        errors: what becomes of a character that its encoding lacks: "replace" writes a question mark.
    """

    def __init__(self, stream: Any, errors: str) -> None:
        buffer = None if stream is None else stream.buffer
        # Past the stream's own buffer, which would keep what it cannot write, and fail with it once more at the end.
        self.outlet = Outlet(getattr(buffer, "raw", buffer))
        super().__init__(
            io.BufferedWriter(self.outlet),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors=errors,
            line_buffering=getattr(stream, "line_buffering", True),
        )


def with_outputs(program: str, action: Callable[[], int]) -> int:
    """The exit status of `action`, which prints whatever it likes and is never ended by that.

    Inside, standard output and error are `Output`s. If some of the output could not be written, a line on standard
    error says so, and a success becomes a failure. Only a reader that went away (`| head`) has had what it wanted: then
    the status stays. What is lost of standard error is not missed. Warnings are one line too.

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
    for stream in standard:
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    replaced = [stream is None or hasattr(stream, "buffer") for stream in standard]
    out, err = (
        Output(stream, errors) if wanted else stream
        for stream, errors, wanted in zip(standard, ("replace", "backslashreplace"), replaced, strict=True)
    )
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{program}: {' '.join(str(message).split())}\n"
    sys.stdout, sys.stderr = out, err
    try:
        status = action()
        out.flush()
        lost = out.outlet.lost if isinstance(out, Output) else None
        if lost is not None:
            print(f"{program}: cannot write to standard output: {lost.strerror}", file=err)
            if not isinstance(lost, BrokenPipeError):
                status = status or FAILURE
        return status
    finally:
        with contextlib.suppress(OSError):
            out.flush()
            err.flush()
        sys.stdout, sys.stderr = standard
        warnings.formatwarning = usual


def output_lost() -> bool:
    """Whether what is written to standard output from now on is lost."""
    return isinstance(sys.stdout, Output) and sys.stdout.outlet.lost is not None


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


def fail(command: str, message: str, code: int = FAILURE) -> NoReturn:
    """End `command` with one line on standard error and an exit status (1 failure, 2 wrong use)."""
    print(f"flashgau {command}: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


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

"""What every command shares: where it prints, how it fails, how it writes JSON."""

from __future__ import annotations

import json
import math
import sys
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

"""The `flashgau` command.

Every command lives in a module of its own, which parses, calls and prints; what it calls lives in the other packages.
Nothing here imports PyTorch: a command does that when it runs, so `flashgau --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from flashgau.extras import MissingExtra, extra, wheel

with extra("cli"):
    import rich  # noqa: F401  # which commands import when they print
    import typer

from flashgau.cli import check, compile, convert, doctor, new_kernel, tune
from flashgau.cli.console import FAILURE, INTERRUPTED, USAGE, with_outputs

__all__ = ["app", "main"]

# The base of every wrong-use error. Newer versions of typer carry their own copy of click, so the class is
# reached through the one name that is public in all of them.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="flashgau",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _elsewhere() -> None:
    """In the place of a command of flashgau-training, where that is not installed: says so, whatever it is given."""
    with wheel("training"):
        import flashgau.cli.training.train  # noqa: F401


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"flashgau {version('flashgau')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def flashgau(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Attention, gated linear units, the Gated Attention Unit and FLASH: exact, and linear in memory.

    \b
    Examples:
      flashgau doctor
      flashgau check --op attention
      flashgau COMMAND --help
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


_train: Callable[..., None]
_sample: Callable[..., None]
_evaluate: Callable[..., None]
_export: Callable[..., None]
_demo: Callable[..., None]
_here: dict[str, Any] = {}
try:
    with wheel("training"):
        from flashgau.cli.training.demo import demo as _demo
        from flashgau.cli.training.eval import evaluate as _evaluate
        from flashgau.cli.training.export import export as _export
        from flashgau.cli.training.sample import sample as _sample
        from flashgau.cli.training.train import train as _train
except MissingExtra:
    _train = _sample = _evaluate = _export = _demo = _elsewhere
    _anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    _here = {"context_settings": _anything}

app.command(short_help="Versions, devices and backends of this machine.")(doctor.doctor)
app.command(short_help="Hold every operation to the fp64 reference here.")(check.check)
app.command(short_help="Compile every kernel for GPUs that are not there.")(compile.compile)
app.command(short_help="Find the fastest launch configurations for this GPU.")(tune.tune)
app.command("new-kernel", short_help="A Triton kernel of your own to begin from, and its test.")(new_kernel.new_kernel)
app.command("train", short_help="Train a byte-level language model.", **_here)(_train)
app.command("sample", short_help="Text that a trained model writes.", **_here)(_sample)
app.command("eval", short_help="Bits per byte of a text under a trained model.", **_here)(_evaluate)
app.command("export", short_help="A trained model as a folder of transformers.", **_here)(_export)
app.command(short_help="Weights of FLASH-pytorch and GAU-alpha, from file to file.")(convert.convert)
app.command("demo", short_help="All of it in five minutes, with a report.", **_here)(_demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 1 failure, 2 wrong use, 130 interrupted."""
    return with_outputs("flashgau", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="flashgau", standalone_mode=False)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "flashgau"
        message = " ".join(error.format_message().split())
        print(f"{where}: {message} (see `{where} --help`)", file=sys.stderr)
        return USAGE
    except MissingExtra as missing:
        print(f"flashgau: {missing}", file=sys.stderr)
        return FAILURE
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    return status if isinstance(status, int) else 0

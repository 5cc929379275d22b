"""`flashgau new-kernel`: a kernel of one's own to begin from; what is written is in `flashgau.cli.instruments`."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Annotated

import typer

from flashgau.cli.console import USAGE, fail
from flashgau.extras import instruments


def new_kernel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it will be called: a name of Python's.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write; made if it is not there.")] = Path("."),
) -> int:
    """Write a small Triton kernel that works, to change into yours, and its test.

    NAME.py has the definition in plain PyTorch, kernels forward and backward, launchers, a function with a derivative,
    and the search for its fastest block size. test_NAME.py holds it to the definition, without a GPU in Triton's
    interpreter. Nothing is overwritten.

    \b
    Examples:
      flashgau new-kernel my_gate
      flashgau new-kernel my_gate --out kernels/
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        fail("new-kernel", f"NAME is {name!r}; expected a name of Python's, such as my_gate", USAGE)
    with instruments():
        from flashgau.cli.instruments.written import write
    return write(name, out)

"""`flashgau new-kernel`: a kernel of one's own to begin from."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Annotated

import typer

from flashgau.cli.console import USAGE, fail

_TEMPLATES = Path(__file__).parent / "templates"


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
    files = {out / f"{name}.py": "kernel.py.txt", out / f"test_{name}.py": "test.py.txt"}
    for path in files:
        if path.exists():
            fail("new-kernel", f"{path} is there already; expected another name, or another --out", USAGE)
    out.mkdir(parents=True, exist_ok=True)
    for path, template in files.items():
        text = (_TEMPLATES / template).read_text(encoding="utf-8").replace("NAME", name)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        print(f"wrote {path}")
    print(f"run  pytest {out / f'test_{name}.py'}")
    return 0

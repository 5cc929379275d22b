"""`flashgau demo`: what is asked for; what it does is in `flashgau.cli.instruments`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from flashgau.cli.console import USAGE, fail
from flashgau.extras import instruments


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; an older one is renamed.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="How long to train.", metavar="MINUTES")] = 2.5,
    quick: Annotated[bool, typer.Option("--quick", help="Everything, in less than a minute.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """See it all in five minutes: checks, training, a sample, time and memory against length, and a report.

    The page OUT/report.html holds everything, plots included; OUT/demo.json has its numbers and OUT/training the
    trained model. Ctrl-C ends the demo with a report of what was done.

    \b
    Examples:
      flashgau demo
      flashgau demo --minutes 10 --out runs/longer
      flashgau demo --quick
    """
    if not 0 < minutes < math.inf:
        fail("demo", f"--minutes is {minutes}; expected a positive number", USAGE)
    with instruments():
        from flashgau.cli.instruments.demo import run
    run(out, minutes, quick, as_json)

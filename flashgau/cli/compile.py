"""`flashgau compile`: every kernel in every shipped configuration, for GPUs that need not be there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from flashgau.cli.console import FAILURE, USAGE, dump_json, fail, make_console, make_table

if TYPE_CHECKING:
    from flashgau.tuning.ahead import Row

TARGETS = "sm_80,sm_90,sm_100,gfx942"


def compile(
    target: Annotated[
        str, typer.Option(metavar="NAMES", help="Architectures, separated by commas, such as sm_90 or gfx942.")
    ] = TARGETS,
    processes: Annotated[
        int, typer.Option(metavar="N", min=0, max=1024, help="How many compile at once; 0 for one per processor.")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Compile every kernel in every shipped configuration, without the GPU.

    Tells registers, spills, shared memory and whether the matrix units are used. The exit status is 1 if a row is
    not ok: it takes more shared memory than the device has, or, in half precision, spills or does its products
    without the matrix units. (With all options at once it may spill.)

    \b
    Examples:
      flashgau compile
      flashgau compile --target sm_90 --json
    """
    from flashgau.ops.dispatch import unfit_triton

    if reason := unfit_triton(interpreting=False):
        fail("compile", reason)
    from rich.progress import Progress

    from flashgau.tuning import ahead

    names = [name.strip() for name in target.split(",") if name.strip()]
    try:
        jobs = ahead.jobs(names)
    except ValueError as error:
        fail("compile", str(error).removeprefix("compile: "), USAGE)
    rows = []
    errors = make_console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("compiling", total=len(jobs))
        for row in ahead.compile_all(jobs, processes or None):
            rows.append(row)
            progress.advance(task)
    rows.sort(key=lambda r: (names.index(r.target), r.kernel, r.dtype, r.shape))
    bad = [row for row in rows if not row.ok]
    if json:
        print(dump_json({"schema": "flashgau-compile", "schema_version": 1, "rows": [asdict(row) for row in rows]}))
        return FAILURE if bad else 0
    table = make_table(
        "target", "kernel", "dtype", "shape", "configuration", "registers", "spills", "shared", "matrix", "ok",
        right=("registers", "spills", "shared"),
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.target, row.kernel, row.dtype, row.shape,
            _configuration(row),
            str(row.registers), str(row.spills), str(row.shared_bytes), "yes" if row.tensor_core else "no",
            "ok" if row.ok else str(row.reason),
        )  # fmt: skip
    console = make_console()
    console.print(table)
    console.print(f"{len(rows)} kernels compiled, {len(bad)} not ok")
    return FAILURE if bad else 0


def _configuration(row: Row) -> str:
    """For the table; a dash for a call that failed before it chose one."""
    if not row.configuration:
        return "-"
    c = row.configuration
    block = f"{c['block_m']}x{c['block_n']}" + ("" if row.op == "attention" else f"x{c['block_k']}")
    return f"{block}, {c['num_warps']} warps, {c['num_stages']} stages"

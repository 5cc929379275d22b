"""`flashgau compile`: every kernel in every shipped configuration, for GPUs that need not be there."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashgau.cli import filters
from flashgau.cli.console import FAILURE, USAGE, counted, dump_json, fail, failing, make_console, make_table
from flashgau.extras import install, wheel

if TYPE_CHECKING:
    from flashgau.tuning.ahead import Row

TARGETS = "sm_80,sm_90,sm_100,gfx942"


def compile(
    target: Annotated[
        str, typer.Option(metavar="NAMES", help="Architectures, separated by commas, such as sm_90 or gfx942.")
    ] = TARGETS,
    op: filters.Op = None,
    shapes: filters.Shapes = None,
    kernel: filters.Kernel = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAMES", help="Only these of bf16, fp16 and fp32.")] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", min=32, max=2**20, help="Tokens of a sequence of the call.")
    ] = None,
    batch: filters.Batch = 1,
    heads: filters.Heads = 8,
    kv_heads: filters.KvHeads = None,
    width: Annotated[
        int | None,
        typer.Option(metavar="D", min=1, max=256, help="The exact head dimension, in the configuration of its class."),
    ] = None,
    processes: Annotated[
        int, typer.Option(metavar="N", min=0, max=1024, help="How many compile at once; 0 for one per processor.")
    ] = 0,
    loops: Annotated[
        bool, typer.Option("--loops", help="A row for every hot loop: what it holds, and modelled clocks.")
    ] = False,
    operations: Annotated[
        bool, typer.Option("--operations", help="A row for every operation: its launches, bytes, and modelled time.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --loops or --operations: fail if worse than this file has recorded."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --loops or --operations: record them, for --against.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Compile every kernel in every shipped configuration, without the GPU.

    Tells registers, spills, shared memory and whether the matrix units are used. The exit status is 1 if a row is
    not ok: it takes more shared memory than the device has, or, in half precision, spills inside a hot loop or does its
    products without the matrix units. (With all options at once it may spill.) Where flashgau-instruments, which finds
    loops, is not installed, spills beside matrix products are told and fail nothing.

    With --loops it tells what every loop of products holds, and how long a model takes it to run: instructions, matrix
    instructions, iterations of loads ahead, spills, exponentials under a product, clocks by pipe. With --against FILE
    the exit status is 1, too, if a loop is more than 5% longer than recorded, or worse in what it is held to.

    With --operations it tells of calls of stated sizes how many launches they make, the programs of the smallest, what
    they move and multiply per token, and a modelled time beside the floor; of --op and --dtype (bf16 unless given).
    With --against FILE the exit status is 1, too, if launches, bytes or time grew by more than 5%.

    \b
    Examples:
      flashgau compile
      flashgau compile --target sm_90 --json
      flashgau compile --loops --target sm_90 --op attention --dtype bf16
      flashgau compile --loops --target sm_90 --dtype bf16 --against bench/results/loops/sm_90.json
      flashgau compile --operations --target sm_90 --op gau_attention
      flashgau compile --target sm_90 --op attention --dtype bf16 --heads 32 --kv-heads 8 --width 80
    """
    from flashgau.ops.dispatch import unfit_triton

    if reason := unfit_triton(interpreting=False):
        fail("compile", reason)
    if loops and operations:
        fail("compile", "--loops and --operations are given; expected one of them", USAGE)
    if not (loops or operations) and (against or out):
        fail("compile", f"--{'against' if against else 'out'} is given without --loops or --operations", USAGE)
    if operations:
        names = filters.words("sm_90" if target == TARGETS else target)
        chosen = filters.operations("compile", op), filters.dtypes("compile", dtype)
        with wheel("instruments"):
            from flashgau.cli.instruments.operations import report
        return report(names, *chosen, processes, out, against, json)
    if loops:
        with wheel("instruments"):
            from flashgau.cli.instruments import loops as loop_reports
    from flashgau import tables
    from flashgau.tuning import ahead
    from flashgau.verification.candidates import Wanted

    wanted = Wanted(
        filters.operations("compile", op),
        filters.kernels("compile", kernel, tables.shipped_kernels() - {tables.FUSED}),
        filters.dtypes("compile", dtype),
        filters.widths("compile", shapes),
        filters.call_shape("compile", length, batch, heads, kv_heads, width),
    )
    names = filters.words(target)
    try:
        jobs = [job for job in ahead.jobs(names, wanted.shape) if wanted.compiles(job)]
    except ValueError as error:
        fail("compile", str(error).removeprefix("compile: "), USAGE)
    if not jobs:
        fail("compile", "there is no kernel of this target, operation, dtype and width at once", USAGE)
    with failing("compile"):
        before = None if against is None else loop_reports.read(against)
    rows = list(counted(ahead.compile_all(jobs, processes or None), len(jobs), "compiling"))
    rows.sort(key=lambda r: (names.index(r.target), r.kernel, r.dtype, r.shape))
    bad = [row for row in rows if not row.ok]
    if unknown := sum(row.loops is None and row.ok and row.spills > 0 for row in rows):
        print(
            f"{unknown} kernels spill; whether inside a hot loop, flashgau-instruments tells: {install('instruments')}",
            file=sys.stderr,
        )
    if loops:
        with failing("compile"):
            worse = loop_reports.report(rows, before, out, json)
        return FAILURE if bad or worse else 0
    if json:
        print(
            dump_json(
                {"schema": "flashgau-compile", "schema_version": 1, "rows": [_without_loops(row) for row in rows]}
            )
        )
        return FAILURE if bad else 0
    table = make_table(
        "target", "kernel", "dtype", "shape", "configuration", "registers", "spills", "shared", "matrix", "ok",
        right=("registers", "spills", "shared"),
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.target, row.kernel, row.dtype, row.shape,
            configuration(row),
            str(row.registers), str(row.spills), str(row.shared_bytes), "yes" if row.tensor_core else "no",
            "ok" if row.ok else str(row.reason),
        )  # fmt: skip
    console = make_console()
    console.print(table)
    console.print(f"{len(rows)} kernels compiled, {len(bad)} not ok")
    return FAILURE if bad else 0


def configuration(row: Row) -> str:
    """For the table; a dash for a call that failed before it chose one."""
    if not row.configuration:
        return "-"
    c = row.configuration
    block = f"{c['block_m']}x{c['block_n']}" + ("" if row.op == "attention" else f"x{c['block_k']}")
    traits = [name for name, value in c.items() if value is True]
    traits += [f"{c['maxnreg']} registers"] if c.get("maxnreg") else []
    return ", ".join([block, f"{c['num_warps']} warps", f"{c['num_stages']} stages", *traits])


def _without_loops(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != "loops"}

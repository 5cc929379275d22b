"""`flashgau tune`: measure launch configurations on this GPU, and keep the fastest in the user's table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashgau.cli import filters, merging
from flashgau.cli.console import (
    INTERRUPTED,
    USAGE,
    dump_json,
    fail,
    failing,
    make_console,
    make_table,
    seconds,
    usable_device,
)
from flashgau.extras import wheel

if TYPE_CHECKING:
    import torch

    from flashgau.tables.config import Config
    from flashgau.tables.table import Key, TableEntry
    from flashgau.tuning.ahead import Job
    from flashgau.tuning.searching import Search
    from flashgau.verification.candidates import Wanted


NO_ENTRY = "there is no entry of this operation, kernel, dtype and width at once"
TOP = 5  # candidates of an entry that a model lets through
LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal
SECONDS_EACH = 1.5  # of a candidate, compiled beside others: an assumption, until some are done


def block_text(choice: Any) -> str:
    """A configuration in a few words.

    Example:
        >>> block_text({"block_m": 64, "block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2}), block_text(True)
        ('64x32x16, 4 warps, 2 stages', 'one kernel')
    """
    from flashgau.tables.config import Config

    if isinstance(choice, bool):
        return "one kernel" if choice else "the vendor's library"
    return Config(**choice).text()


def _print_choices(rows: list[dict[str, Any]]) -> None:
    table = make_table("kernel", "bits", "width", "rows", "choice", "from", "ms", "gain", right=("bits", "ms", "gain"))
    for row in rows:
        gain = row["default_ms"] / row["ms"] if row["ms"] and row["default_ms"] else None
        table.add_row(
            row["kernel"] + (", options" if row["options"] else ""), str(8 * row["itemsize"]), str(row["width"] or ""),
            "few" if row["few_rows"] else "", block_text(row["choice"]), row["from"],
            f"{row['ms']:.3g}" if row["ms"] else "", f"{gain:.2f}x" if gain else "",
        )  # fmt: skip
    make_console().print(table)


def run_search(search: Search, limit: float, stop: Callable[[], bool]) -> bool:
    """Run a search until it is done, out of time, or `stop`; False if Ctrl-C ended it.

    A terminal has a progress bar, and what is no terminal a line now and then.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    def steps() -> Iterator[tuple[Job, str]]:
        for job, outcome in search.run(limit):
            yield job, outcome.reason or f"{outcome.ms:.3g} ms"
            if stop():
                return

    total, untried, began = len(search.candidates()), search.untried(), time.monotonic()
    known, said = total - untried, began
    _announce(search, limit)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = make_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=total)
        try:
            for done, (job, what) in enumerate(steps(), 1):
                now = time.monotonic()
                spent = now - began
                left = max(0.0, min(limit - spent, spent / max(1, done - known) * (total - done)))
                progress.update(task, advance=1, description=f"{seconds(left)} left; {job.key}: {what[:40]}")
                if not console.is_terminal and now - said >= LINE_EVERY:
                    said = now
                    print(f"{done} of {total}, {seconds(left)} left; {job.key}: {what}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            return False
    return True


def _announce(search: Search, limit: float) -> None:
    """How much there is to do, before it begins."""
    total, untried = len(search.candidates()), search.untried()
    known = f", {total - untried} of them known" if untried < total else ""
    time_left = f"about {seconds(untried * SECONDS_EACH)}, at most {seconds(limit)}"
    print(f"{total} candidates for {len(search.starts)} entries{known}; {time_left}", file=sys.stderr, flush=True)


def tune(
    op: filters.Op = None,
    shapes: filters.Shapes = None,
    kernel: filters.Kernel = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Only these of bf16, fp16 and fp32; bf16,fp32 unless given.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", min=32, max=2**20, help="Tokens of a timed call; 8192 unless given.")
    ] = None,
    batch: filters.Batch = 1,
    heads: filters.Heads = 8,
    kv_heads: filters.KvHeads = None,
    width: Annotated[
        int | None,
        typer.Option(metavar="D", min=1, max=256, help="The exact head dimension: times it, and tunes its class."),
    ] = None,
    minutes: Annotated[float, typer.Option(metavar="M", help="Stop after so long; a second run goes on.")] = 30.0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Which GPU: cuda, cuda:1.")] = "cuda",
    show_only: Annotated[
        bool, typer.Option("--show", help="Print the choices as they are, and measure nothing.")
    ] = False,
    model: Annotated[
        bool, typer.Option("--model", help="Rank the candidates by a model first, which needs no GPU.")
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="With --model: how many of an entry to print, and to measure; 5."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --show or --model: of an architecture, such as sm_90."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Copy your table to a file or folder, and measure nothing.")
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Put the table in a file into yours of its GPU; may be given several times."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Find faster launch configurations for this GPU, and use them from then on.

    Around each entry of the tables, blocks half and twice as large, 4 or 8 warps and 1 to 4 stages are tried: compiled
    first, held to the fp64 reference, then timed. The fastest goes into your own table, which every call asks first.
    What is measured is kept as it comes: after Ctrl-C, or when the time is over, the best so far is used, and the same
    command goes on from there.

    With --model the candidates are compiled and ranked by modelled clocks of their loops before anything is measured,
    and only the best --top of each entry are. Without a GPU, or with --target, the ranks are printed, and that is all.

    \b
    Examples:
      flashgau tune --minutes 60
      flashgau tune --op attention --shapes 64,128
      flashgau tune --op attention --dtype bf16 --length 4096 --batch 4 --heads 32 --kv-heads 8 --width 80
      flashgau tune --show --op glu
      flashgau tune --show --target sm_90
      flashgau tune --model --target sm_90 --kernel attention_forward --width 128 --top 8
      flashgau tune --export flashgau/tables/gpus/
      flashgau tune --merge first.json --merge second.json
    """
    if merge:
        with failing("tune"):
            return merging.merge(merge, as_json)
    if target is not None and not (show_only or model):
        fail(
            "tune", f"--target is {target!r} without --show or --model; what is measured is measured on --device", USAGE
        )
    if top is not None and not model:
        fail("tune", f"--top is {top} without --model, which ranks the candidates", USAGE)
    if model and not show_only and target is None and device == "cuda" and not _has_gpu():
        target = "sm_90"
    where = None if target is not None else _device(device)
    if not minutes > 0:
        fail("tune", f"--minutes is {minutes:g}; expected a positive number", USAGE)
    shape = filters.call_shape("tune", length, batch, heads, kv_heads, width)
    ops, widths = filters.operations("tune", op), filters.widths("tune", shapes)
    from flashgau.verification.candidates import Wanted

    wanted = Wanted(ops, _kernels(kernel, where), _dtypes(dtype, where, show_only), widths, shape)
    with failing("tune"):
        if model and where is None and not show_only:
            return _rank(target or "", wanted, top or TOP, as_json)
        if where is None or (show_only and export is None):
            return _show(where, target or "", wanted, as_json)
        return _tune(where, wanted, minutes, export, as_json, (top or TOP) if model else None)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _rank(target: str, wanted: Wanted, top: int, as_json: bool) -> int:
    """The candidates for a GPU that is not there."""
    from flashgau.verification import candidates

    try:
        starts = candidates.starts_of_target(target, wanted)
    except ValueError as error:  # the target is none
        fail("tune", str(error).removeprefix("compile: "), USAGE)
    if not starts:
        fail("tune", NO_ENTRY, USAGE)
    with wheel("instruments"):
        from flashgau.cli.instruments import ranking
    ranking.show(starts, ranking.rank(starts), top, as_json)
    return 0


def _show(where: torch.device | None, target: str, wanted: Wanted, as_json: bool) -> int:
    """The choices in force on a device, or without one those of a target."""
    from flashgau.verification import candidates

    try:
        rows = candidates.choices(where, wanted, target)
    except ValueError as error:  # the target is none
        fail("tune", str(error).removeprefix("compile: "), USAGE)
    if as_json:
        device = str(where or target)
        print(dump_json({"schema": "flashgau-tuning", "schema_version": 1, "device": device, "rows": rows}))
    else:
        _print_choices(rows)
    return 0


def _tune(
    where: torch.device,
    wanted: Wanted,
    minutes: float,
    export: Path | None,
    as_json: bool,
    top: int | None,
) -> int:
    """What `flashgau tune` does with options that are right; `top`: how many of an entry's candidates are measured."""
    from flashgau import tables
    from flashgau.verification import candidates

    if export is not None:
        return _export(where, export)
    from flashgau.tuning import ahead
    from flashgau.tuning.searching import Journal, Search

    path, bench = tables.user_path(where), candidates.Bench(where, shape=wanted.shape)
    before = candidates.starts(where, wanted)
    if not before:
        fail("tune", NO_ENTRY, USAGE)
    measured = candidates.versions() | candidates.shape_measured(wanted.shape)
    journal = Journal(path.with_suffix(".journal.jsonl"), measured)
    among = {} if top is None else _among(before, top)
    search = Search(before, bench.check, bench.clock, journal, ahead.compile_each, among)
    finished = run_search(search, 60 * minutes, lambda: bench.broken)
    found = search.best()
    if finished:
        candidates.keep(where, path, found)  # whose products the fused form is then timed with
        found |= candidates.fused_entries(bench, wanted)
    candidates.keep(where, path, found)
    _report(before, found, path, search, as_json)
    if bench.broken:
        fail("tune", "a candidate left the GPU unusable for this process; the same command goes on without it")
    return 0 if finished else INTERRUPTED


def _among(starts: list[Job], top: int) -> dict[Key, frozenset[Config]]:
    """The few candidates of each entry that the model ranks first."""
    with wheel("instruments"):
        from flashgau.cli.instruments import ranking
    return ranking.best(starts, top)


def _device(name: str) -> torch.device:
    """The device, if Triton runs on it."""
    from importlib.util import find_spec

    import torch

    from flashgau.ops import dispatch

    if find_spec("triton") is None:
        fail("tune", "Triton is not installed")
    where = usable_device("tune", name)
    reason = dispatch.explain("attention", where, torch.float32)["triton"]
    if reason is not None:
        fail("tune", f"Triton cannot run on {name!r}: {reason}", USAGE)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())  # as tensors name it
    return where


def _kernels(kernel: str | None, where: torch.device | None) -> frozenset[str] | None:
    from flashgau import tables

    measured = [] if where is None else tables.measured_tables(where)
    own = {key.kernel for found in measured for key in found.entries}
    return filters.kernels("tune", kernel, tables.shipped_kernels() | own)


def _dtypes(dtype: str | None, where: torch.device | None, show_only: bool) -> tuple[str, ...] | None:
    from flashgau.kernels import NO_INTERPRETED_BF16
    from flashgau.ops.dispatch import interprets_bf16

    names = filters.dtypes("tune", dtype)
    if names is None or where is None or show_only:
        return names
    if {"bf16", "fp16"} <= set(names):
        fail("tune", f"--dtype is {dtype!r}; bf16 and fp16 have the same entries: expected one of them", USAGE)
    if where.type == "cpu" and "bf16" in names and not interprets_bf16():
        fail("tune", f"--dtype is {dtype!r}; {NO_INTERPRETED_BF16}", USAGE)
    return names


def _export(where: torch.device, to: Path) -> int:
    from dataclasses import replace

    from flashgau import tables
    from flashgau.tables import table

    path = tables.user_path(where)
    own = table.usable(path)
    if own is None:
        fail("tune", f"there is no table of yours to export at {path}; `flashgau tune` makes it")
    shipped = tables.shipped_kernels()  # others know nothing of kernels of yours
    own = replace(own, entries={key: entry for key, entry in own.entries.items() if key.kernel in shipped})
    to = to / path.name if to.is_dir() or to.suffix != ".json" else to
    if to.exists():
        fail("tune", f"{to} exists already, and is left as it is; name another file", USAGE)
    table.write(to, own)
    print(f"wrote {to}: {len(own.entries)} entries of {own.gpu}")
    return 0


def _report(before: list[Job], found: dict[Key, TableEntry], path: Path, search: Search, as_json: bool) -> None:
    """What is launched now, what that gains over what is shipped, and what remains to be tried."""
    from dataclasses import asdict

    from flashgau.tables.config import Config

    shipped = {job.key: job.config for job in before}
    total, untried = len(search.candidates()), search.untried()
    rows = []
    for key, entry in sorted(found.items()):
        was, now = shipped.get(key), entry.choice
        rows.append({
            **key._asdict(), "shipped": asdict(was) if was else None, "changed": now != was,
            "choice": asdict(now) if isinstance(now, Config) else now, "ms": entry.ms, "default_ms": entry.default_ms,
        })  # fmt: skip
    if as_json:
        counts = {"candidates": total, "untried": untried}
        print(dump_json({"schema": "flashgau-tune", "schema_version": 1, "table": str(path), **counts, "rows": rows}))
        return
    numbers = ("ms shipped", "ms now", "gain")
    table = make_table("entry", "shipped", "now", *numbers, right=numbers)
    for key, row in zip(sorted(found), rows, strict=True):
        ms, was_ms = row["ms"], row["default_ms"]
        times = (f"{was_ms:.3g}", f"{ms:.3g}", f"{was_ms / ms:.2f}x") if was_ms else ("-", f"{ms:.3g}", "-")
        text = block_text(row["choice"]) if row["changed"] else "the same"
        table.add_row(str(key), block_text(row["shipped"] or False), text, *times)
    if table.row_count:
        make_console().print(table)
    changed = sum(row["changed"] for row in rows)
    print(f"{len(found)} entries measured, {changed} changed; {path if found else 'nothing was written'}")
    if untried:
        entries = f"{len(shipped.keys() - found.keys())} of {len(shipped)} entries have no measurement yet; "
        print(f"{untried} of {total} candidates are untried; {entries}the same command goes on")

"""`flashgau tune`: measure launch configurations on this GPU, and keep the fastest in the user's table."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from flashgau.cli.doctor import OPERATIONS

if TYPE_CHECKING:
    import torch

    from flashgau.tuning.ahead import Job
    from flashgau.tuning.search import Search
    from flashgau.tuning.table import Key, TableEntry

LENGTH, INTERPRETED_LENGTH = 8192, 32  # tokens of a timed call
FUSED_WIDTHS = (512, 1024, 2048, 4096)  # inner axes for which the maker of glu_linear's products is chosen
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Bench:
    """Checks and times candidates on one device.

    Attributes:
        broken: whether the device refuses all work since a candidate's, so that the process must end.
    """

    def __init__(self, device: torch.device, clock: Callable[[Callable[[], object]], float] | None = None) -> None:
        from flashgau import tuning

        self.device, self.broken = device, False
        self.interpreted = tuning.architecture(device) == "interpreter"
        self.median = clock or (_wall_clock if self.interpreted else _gpu_clock)
        self._operands: tuple[Any, Any] = None, None

    def check(self, job: Job) -> str | None:
        """Why a candidate's results are wrong, if they are: held to the fp64 reference on a small awkward call."""
        from flashgau.cli import configurations

        assert job.config is not None
        case = configurations.case_of(job.key, job.config, DTYPE_NAMES[job.dtype], self.interpreted)
        try:
            report = configurations.hold(case, self.device)
        except Exception as error:  # whatever a launch fails with is the candidate's fate
            return self._failed(error)
        worst = [row for row in report.rows if not row.ok]
        return f"{worst[0].name} is off by {worst[0].max_error:.1e}" if worst else None

    def clock(self, job: Job) -> float:
        """Milliseconds of the whole call of a candidate's launcher, all else launched as the tables say."""
        from flashgau import tuning
        from flashgau.cli.configurations import launched
        from flashgau.tuning.shipped import DTYPES, ENTRIES, Kept

        key = job.entry, job.dtype, job.width, job.kind
        if self._operands[0] != key:  # those of one entry at a time: they are large
            length = INTERPRETED_LENGTH if self.interpreted else LENGTH
            self._operands = key, Kept(DTYPES[job.dtype], self.device, length)
        make = self._operands[1]

        def call() -> None:
            make.rewind()
            ENTRIES[job.entry].call(job.kind, job.width, make, tuning.choose)

        assert job.config is not None
        with launched(job.key, job.config):
            return self.median(call)

    def fusing(self, itemsize: int, width: int, few_rows: bool) -> TableEntry:
        """Whether one kernel makes glu_linear's products faster than the vendor's library."""
        import torch

        from flashgau import tuning
        from flashgau.kernels.glu import glu_linear_forward
        from flashgau.tuning.shipped import Operands
        from flashgau.tuning.table import TableEntry

        make = Operands(torch.float32 if itemsize == 4 else torch.bfloat16, self.device)
        rows = 1 if few_rows else INTERPRETED_LENGTH if self.interpreted else LENGTH
        x, w, u = make(rows, width), make(4096, width), make(4096, width)
        options: dict[str, Any] = {"activation": "silu", "up_activation": "identity", "choose": tuning.choose}
        one, library = (
            self.median(lambda f=fused: glu_linear_forward(x, w, u, None, None, save=True, fused=f, **options))  # type: ignore[misc]
            for fused in (True, False)
        )
        return TableEntry(one < library, min(one, library), library)

    def _failed(self, error: Exception) -> str:
        import torch

        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                self.broken = True
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _gpu_clock(call: Callable[[], object]) -> float:
    """Median milliseconds, the cache emptied before each call."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=60, return_mode="median"))


def _wall_clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def versions() -> dict[str, str]:
    """Of what a measurement depends on."""
    import torch
    import triton

    import flashgau

    found = {"flashgau": flashgau.__version__, "torch": str(torch.__version__), "triton": triton.__version__}
    runtime = torch.version.hip or torch.version.cuda
    return found | ({"runtime": runtime} if runtime else {})


def starts(device: torch.device, ops: set[str], widths: list[int] | None) -> list[Job]:
    """A job for every entry, with the shipped configuration, around which others are tried."""
    from dataclasses import replace

    from flashgau import tuning
    from flashgau.cli.configurations import is_asked
    from flashgau.tuning import ahead, search

    arch = tuning.architecture(device)
    half = "fp16" if arch == "interpreter" else "bf16"
    jobs = search.tasks(ahead.target_here(device), ops, widths, (half, "fp32"))
    return [
        replace(job, config=tuning.shipped_config(device, job.key))
        for job in jobs
        if is_asked(job.key, arch == "interpreter")
    ]


def show(device: torch.device) -> list[dict[str, Any]]:
    """Every choice for a device: where it comes from, and what measuring it gave."""
    from dataclasses import asdict

    from flashgau import tuning
    from flashgau.kernels.common import Config

    sources = [*tuning.measured_tables(device), tuning.shipped_table(tuning.architecture(device))]
    rows = []
    for key in sorted({key for source in sources for key in source.entries}):
        source = next(source for source in sources if key in source.entries)
        entry = source.entries[key]
        choice = asdict(entry.choice) if isinstance(entry.choice, Config) else entry.choice
        where = source.gpu if source.measured else source.architecture
        rows.append({**key._asdict(), "choice": choice, "from": where, "ms": entry.ms, "default_ms": entry.default_ms})
    return rows


def block_text(choice: Any) -> str:
    """A configuration in a few words.

    Example:
        >>> block_text({"block_m": 64, "block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2}), block_text(True)
        ('64x32x16, 4 warps, 2 stages', 'one kernel')
    """
    if isinstance(choice, bool):
        return "one kernel" if choice else "the vendor's library"
    c = choice
    return f"{c['block_m']}x{c['block_n']}x{c['block_k']}, {c['num_warps']} warps, {c['num_stages']} stages"


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
    """Run a search under a progress bar, until it is done, out of time, or `stop`; False if Ctrl-C ended it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    def steps() -> Iterator[tuple[Job, str]]:
        for job, outcome in search.run(limit):
            yield job, outcome.reason or f"{outcome.ms:.3g} ms"
            if stop():
                return

    total, began = len(search.candidates()), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = make_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=total)
        try:
            for done, (job, what) in enumerate(steps(), 1):
                spent = time.monotonic() - began
                left = min(limit - spent, spent / done * (total - done))
                text = f"{seconds(max(0.0, left))} left; {job.key}: {what[:40]}"
                progress.update(task, advance=1, description=text)
        except KeyboardInterrupt:
            return False
    return True


def fused_entries(bench: Bench, ops: set[str]) -> dict[Key, TableEntry]:
    """Who makes the products of glu_linear, by inner axis and dtype."""
    from flashgau.tuning.table import FUSED, Key

    if "glu_linear" not in ops or bench.interpreted or bench.broken:
        return {}
    places = [
        Key(FUSED, itemsize, width, few) for itemsize in (2, 4) for width in FUSED_WIDTHS for few in (True, False)
    ]
    return {key: bench.fusing(key.itemsize, key.width, key.few_rows) for key in places}


def tune(
    op: Annotated[
        str | None, typer.Option(metavar="NAMES", help=f"Only these operations: {', '.join(OPERATIONS)}.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(metavar="WIDTHS", help="Only these classes of the head dimension, such as 64,128.")
    ] = None,
    minutes: Annotated[float, typer.Option(metavar="M", help="Stop after so long; a second run goes on.")] = 30.0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Which GPU: cuda, cuda:1.")] = "cuda",
    show_only: Annotated[
        bool, typer.Option("--show", help="Print the choices as they are, and measure nothing.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Copy your table to a file or folder, and measure nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Find faster launch configurations for this GPU, and use them from then on.

    Around each entry of the tables, blocks half and twice as large, 4 or 8 warps and 1 to 4 stages are tried: compiled
    first, held to the fp64 reference, then timed. The fastest goes into your own table, which every call asks first.
    What is measured is kept as it comes: after Ctrl-C, or when the time is over, the best so far is used, and the same
    command goes on from there.

    \b
    Examples:
      flashgau tune --minutes 60
      flashgau tune --op attention --shapes 64,128
      flashgau tune --show
      flashgau tune --export flashgau/tuning/gpus/
    """
    where = _device(device)
    if not minutes > 0:
        fail("tune", f"--minutes is {minutes:g}; expected a positive number", USAGE)
    ops = _names(op)
    widths = _widths(shapes)
    with failing("tune"):
        return _tune(where, ops, widths, minutes, show_only, export, as_json)


def _tune(
    where: torch.device,
    ops: set[str],
    widths: list[int] | None,
    minutes: float,
    show_only: bool,
    export: Path | None,
    as_json: bool,
) -> int:
    """What `flashgau tune` does with options that are right."""
    from flashgau import tuning

    if export is not None:
        return _export(where, export)
    if show_only:
        rows = show(where)
        if as_json:
            print(dump_json({"schema": "flashgau-tuning", "schema_version": 1, "device": str(where), "rows": rows}))
        else:
            _print_choices(rows)
        return 0

    from flashgau.tuning import ahead
    from flashgau.tuning.search import Journal, Search

    path, bench = tuning.user_path(where), Bench(where)
    before = starts(where, ops, widths)
    journal = Journal(path.with_suffix(".journal.jsonl"), versions())
    search = Search(before, bench.check, bench.clock, journal, ahead.compile_each)
    finished = run_search(search, 60 * minutes, lambda: bench.broken)
    found = search.best()
    if finished:
        _write(where, path, found)  # whose products the fused form is then timed with
        found |= fused_entries(bench, ops)
    _write(where, path, found)
    _report(before, found, path, as_json)
    if bench.broken:
        fail("tune", "a candidate left the GPU unusable for this process; the same command goes on without it")
    return 0 if finished else INTERRUPTED


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


def _names(op: str | None) -> set[str]:
    from flashgau.cli.configurations import LAYERS

    names = set(OPERATIONS) if op is None else {name.strip() for name in op.split(",") if name.strip()}
    if unknown := sorted(names - set(OPERATIONS)):
        fail("tune", f"no operation is called {unknown[0]!r}; there are {', '.join(OPERATIONS)}", USAGE)
    return names | (set(LAYERS) if "gau_attention" in names else set())


def _widths(shapes: str | None) -> list[int] | None:
    if shapes is None:
        return None
    words = [word.strip() for word in shapes.split(",") if word.strip()]
    if not words or not set(words) <= {"64", "128", "256"}:
        fail("tune", f"--shapes is {shapes!r}; expected some of 64, 128 and 256, separated by commas", USAGE)
    return [int(word) for word in words]


def _export(where: torch.device, to: Path) -> int:
    from flashgau import tuning
    from flashgau.tuning import table

    path = tuning.user_path(where)
    own = table.usable(path)
    if own is None:
        fail("tune", f"there is no table of yours to export at {path}; `flashgau tune` makes it")
    to = to / path.name if to.is_dir() or to.suffix != ".json" else to
    if to.exists():
        fail("tune", f"{to} exists already, and is left as it is; name another file", USAGE)
    table.write(to, own)
    print(f"wrote {to}: {len(own.entries)} entries of {own.gpu}")
    return 0


def _write(where: torch.device, path: Path, found: dict[Key, TableEntry]) -> None:
    """Put what was found into the user's table."""
    from flashgau import tuning
    from flashgau.tuning import table

    if found:
        date = datetime.date.today().isoformat()
        arch = tuning.architecture(where)
        table.merge(path, table.Table(tuning.gpu_name(where), arch, True, versions(), date, found))
        tuning.reload()


def _report(before: list[Job], found: dict[Key, TableEntry], path: Path, as_json: bool) -> None:
    """What is now launched otherwise than as shipped, and what it gains."""
    from dataclasses import asdict

    from flashgau.kernels.common import Config

    shipped = {job.key: job.config for job in before}
    rows = []
    for key, entry in sorted(found.items()):
        was, now = shipped.get(key), entry.choice
        rows.append({
            **key._asdict(), "shipped": asdict(was) if was else None, "changed": now != was,
            "choice": asdict(now) if isinstance(now, Config) else now, "ms": entry.ms, "default_ms": entry.default_ms,
        })  # fmt: skip
    if as_json:
        print(dump_json({"schema": "flashgau-tune", "schema_version": 1, "table": str(path), "rows": rows}))
        return
    numbers = ("ms shipped", "ms now", "gain")
    table = make_table("entry", "shipped", "now", *numbers, right=numbers)
    for key, row in zip(sorted(found), rows, strict=True):
        if row["changed"]:
            ms, was_ms = row["ms"], row["default_ms"]
            times = (f"{was_ms:.3g}", f"{ms:.3g}", f"{was_ms / ms:.2f}x") if was_ms else ("-", f"{ms:.3g}", "-")
            table.add_row(str(key), block_text(row["shipped"] or False), block_text(row["choice"]), *times)
    if table.row_count:
        make_console().print(table)
    print(f"{len(found)} entries measured, {table.row_count} changed; {path if found else 'nothing was written'}")

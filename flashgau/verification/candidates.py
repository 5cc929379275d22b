"""Launch configurations that might be faster: checked on a small awkward call, timed on a large one."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

import flashgau
from flashgau import tables
from flashgau.kernels.glu import glu_linear_forward
from flashgau.ops import dispatch
from flashgau.options import GluWeights
from flashgau.tables import table
from flashgau.tables.config import Config
from flashgau.tables.table import FUSED, Key, TableEntry
from flashgau.tuning import ahead, searching
from flashgau.tuning.ahead import Job, op_of
from flashgau.tuning.shipped import DTYPES, ENTRIES, CallShape, Kept, Operands
from flashgau.verification import configurations
from flashgau.verification.configurations import is_asked, launched

LENGTH, INTERPRETED_LENGTH = 8192, 32  # tokens of a timed call
FUSED_WIDTHS = (512, 1024, 2048, 4096)  # inner axes for which the maker of glu_linear's products is chosen
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Wanted:
    """Which entries are tuned, or shown, and the shape of the calls that are timed.

    Attributes:
        ops: operations, "projection" and "heads" among them; None for all.
        kernels: names of tables' entries; None for all.
        dtypes: "bf16", "fp16", "fp32"; None for half precision and fp32.
        widths: classes of the head dimension; what has no heads is wanted, too. None for all.
        shape: of the timed calls.
    """

    ops: frozenset[str] | None = None
    kernels: frozenset[str] | None = None
    dtypes: tuple[str, ...] | None = None
    widths: tuple[int, ...] | None = None
    shape: CallShape = field(default_factory=CallShape)

    def keeps(self, arch: str, key: Key) -> bool:
        """Whether an entry of the tables of an architecture, or of a GPU of it, is one of them."""
        ours = key.kernel in tables.shipped_kernels()
        wide = key.width if key.kernel != FUSED else 0  # whose width is no head's
        return (
            (self.ops is None or (ours and op_of(key.kernel) in self.ops))
            and (self.kernels is None or key.kernel in self.kernels)
            and (self.dtypes is None or key.itemsize in {DTYPES[dtype].itemsize for dtype in self.dtypes})
            and (self.widths is None or wide in (0, *self.widths))
            and (self.shape.width is None or wide == 0 or self._serves(arch, key, self.shape.width))
        )

    def compiles(self, job: Job) -> bool:
        """Whether a kernel in a dtype, on a target, is one of them."""
        exact = self.dtypes is None or job.dtype in self.dtypes
        return exact and self.starts(job) and self.keeps(ahead.table_of(job.target), job.key)

    def starts(self, job: Job) -> bool:
        """Whether calls of this shape may have few rows: a decoded token of many query heads on a key head has not."""
        return not (job.key.few_rows and op_of(job.entry) == "attention" and self.shape.groups > tables.FEW_ROWS)

    def _serves(self, arch: str, key: Key, width: int) -> bool:
        """Whether an entry's class is that of the exact width."""
        if key.kernel not in tables.shipped_kernels():
            return key.width >= width  # which classes there are is not known before something is measured
        try:
            return tables.key_in(arch, key._replace(width=width)).width == key.width
        except ValueError:  # wider than the kernel has
            return False


class Bench:
    """Checks and times candidates on one device.

    Args:
        device: where.
        clock: takes a call and gives its milliseconds.
        shape: of timed calls; their length, unless given, is `LENGTH`.

    Attributes:
        broken: whether the device refuses all work since a candidate's, so that the process must end.
    """

    device: torch.device
    broken: bool
    interpreted: bool
    median: Callable[[Callable[[], object]], float]
    shape: CallShape

    def __init__(
        self,
        device: torch.device,
        clock: Callable[[Callable[[], object]], float] | None = None,
        shape: CallShape = CallShape(),  # noqa: B008
    ) -> None:
        self.device, self.broken = device, False
        self.interpreted = tables.architecture(device) == "interpreter"
        self.median = clock or (_wall_clock if self.interpreted else _gpu_clock)
        self.shape = replace(shape, length=shape.length or (INTERPRETED_LENGTH if self.interpreted else LENGTH))
        self._operands: tuple[Any, Any] = None, None

    def check(self, job: Job) -> str | None:
        """Why a candidate's results are wrong, if they are: held to the fp64 reference on a small awkward call."""
        assert job.config is not None
        case = configurations.case_of(job.key, job.config, DTYPE_NAMES[job.dtype], small=self.interpreted)
        try:
            report = configurations.hold(case, self.device)
        except Exception as error:  # whatever a launch fails with is the candidate's fate
            return self.failed(error)
        worst = [row for row in report.rows if not row.ok]
        return f"{worst[0].name} is off by {worst[0].max_error:.1e}" if worst else None

    def clock(self, job: Job) -> float:
        """Milliseconds of the whole call of a candidate's launcher, all else launched as the tables say.

        Raises:
            NotTimed: if the call fails, or never asks for the entry.
        """
        key = job.entry, job.dtype, job.width, job.kind
        if self._operands[0] != key:  # those of one entry at a time: they are large
            self._operands = None, None  # the last ones are let go first
            self._operands = key, Kept(DTYPES[job.dtype], self.device, self.shape)
        make = self._operands[1]
        width = replace(job, shape=self.shape).exact_width

        def call() -> None:
            make.rewind()
            ENTRIES[job.entry].call(job.kind, width, make)

        assert job.config is not None
        try:
            with launched(job.key, job.config) as asked:
                ms = self.median(call)
        except Exception as error:  # such as too little memory for a large shape
            raise searching.NotTimed(self.failed(error)) from error
        if not asked:
            raise searching.NotTimed("a call of this shape never starts the kernel")
        return ms

    def fusing(self, itemsize: int, width: int, few_rows: bool) -> TableEntry:
        """Whether one kernel makes glu_linear's products faster than the vendor's library."""
        make = Operands(torch.float32 if itemsize == 4 else torch.bfloat16, self.device, self.shape)
        rows = 1 if few_rows else make.rows()
        x, w, u = make(rows, width), make(4096, width), make(4096, width)
        options: dict[str, Any] = {"activation": "silu", "up_activation": "identity"}
        one, library = (
            self.median(lambda f=fused: glu_linear_forward(x, GluWeights(w, u), save=True, fused=f, **options))  # type: ignore[misc]
            for fused in (True, False)
        )
        return TableEntry(one < library, min(one, library), library)

    def failed(self, error: Exception) -> str:
        """A failure in a line; it may have left the device unusable."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                self.broken = True
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _gpu_clock(call: Callable[[], object]) -> float:
    """Median milliseconds, the cache emptied before each call."""
    return float(do_bench(call, warmup=10, rep=60, return_mode="median"))


def _wall_clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def versions() -> dict[str, str]:
    """Of what a measurement depends on."""
    found = {"flashgau": flashgau.__version__, "torch": str(torch.__version__), "triton": triton.__version__}
    runtime = torch.version.hip or torch.version.cuda
    return found | ({"runtime": runtime} if runtime else {})


def starts(device: torch.device, wanted: Wanted) -> list[Job]:
    """A job for every entry, with the shipped configuration, around which others are tried."""
    arch = tables.architecture(device)
    without_bf16 = arch == "interpreter" and not dispatch.interprets_bf16()
    dtypes = wanted.dtypes or ("fp16" if without_bf16 else "bf16", "fp32")
    jobs = _jobs(ahead.target_here(device), arch, wanted, dtypes)
    return [replace(job, config=tables.shipped_config(device, job.key)) for job in jobs]


def starts_of_target(target: str, wanted: Wanted) -> list[Job]:
    """The same for a GPU that is not there, with the configurations of its architecture's table, in bf16 if not said.

    Raises:
        ValueError: for a target that is none.
    """
    arch = ahead.table_of(target)
    entries = tables.shipped_table(arch)
    jobs = _jobs(target, arch, wanted, wanted.dtypes or ("bf16",))
    return [replace(job, config=entries.config(job.key), shape=wanted.shape) for job in jobs]


def _jobs(target: str, arch: str, wanted: Wanted, dtypes: tuple[str, ...]) -> list[Job]:
    every_op = {op_of(name) for name in ENTRIES}
    return [
        job
        for job in searching.tasks(target, wanted.ops or every_op, wanted.widths, dtypes)
        if is_asked(job.key, fp16=job.dtype == "fp16") and wanted.keeps(arch, job.key) and wanted.starts(job)
    ]


def shape_measured(shape: CallShape) -> dict[str, str]:
    """What a journal's lines say of the shape of timed calls, beside the versions; nothing of the usual one."""
    usual = CallShape()
    found = {name: str(value) for name, value in asdict(shape).items() if value != getattr(usual, name)}
    return {f"timed {name}": value for name, value in found.items()}


def fused_entries(bench: Bench, wanted: Wanted) -> dict[Key, TableEntry]:
    """Who makes the products of glu_linear, by inner axis and dtype."""
    if bench.interpreted or bench.broken:
        return {}
    places = [
        Key(FUSED, itemsize, width, few) for itemsize in (2, 4) for width in FUSED_WIDTHS for few in (True, False)
    ]
    return {
        key: bench.fusing(key.itemsize, key.width, key.few_rows)
        for key in places
        if wanted.keeps(tables.architecture(bench.device), key)
    }


def choices(device: torch.device | None, wanted: Wanted = Wanted(), target: str = "") -> list[dict[str, Any]]:
    """Every choice for a device, or for a target such as "sm_90": where it comes from, and what measuring it gave."""
    arch = ahead.table_of(target) if device is None else tables.architecture(device)
    measured = [] if device is None else tables.measured_tables(device)
    sources = [*measured, tables.shipped_table(arch)]
    rows = []
    for key in sorted({key for source in sources for key in source.entries if wanted.keeps(arch, key)}):
        source = next(source for source in sources if key in source.entries)
        entry = source.entries[key]
        choice = asdict(entry.choice) if isinstance(entry.choice, Config) else entry.choice
        where = source.gpu if source.measured else source.architecture
        rows.append({**key._asdict(), "choice": choice, "from": where, "ms": entry.ms, "default_ms": entry.default_ms})
    return rows


def keep(where: torch.device, path: Path, found: dict[Key, TableEntry]) -> None:
    """Put what was found into the user's table."""
    if found:
        date = datetime.date.today().isoformat()
        arch = tables.architecture(where)
        table.merge(path, table.Table(tables.gpu_name(where), arch, True, versions(), date, found))
        tables.reload()

"""Finding faster configurations: which are tried, in what order, and what became of each.

Around the table's entry a space of neighbours: each block that the kernel has, halved or doubled; 4 or 8 warps; 1 to 4
stages. Candidates are compiled first, in parallel, and those that take too much shared memory, or are known to spill
in a hot loop, never run. The rest are held to the reference, then timed. Near neighbours of every kernel come before
distant ones of any, so that a search cut short has looked at all of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, product
from pathlib import Path

from flashgau.files import parse_json
from flashgau.tables.config import Config
from flashgau.tables.table import Fields, Key, TableEntry, config_of, key_of, time_of

from .ahead import Job, Row, op_of
from .shipped import ENTRIES

WARPS, STAGES = (4, 8), (1, 2, 3, 4)
NOISE = 0.02  # a gain below this is none

# The blocks that a kernel takes from its own entry, "=" for two that must be equal. (Those of a panel are set by the
# kernel that reads it or makes it.)
BLOCKS = {
    "attention_forward": "mn", "attention_dq": "mn", "attention_dkv": "mn", "attention_dbias": "=",
    "glu_forward": "n", "glu_backward": "n", "projection": "n", "heads": "m", "norm_forward": "n", "norm_backward": "n",
    "glu_linear": "mnk", "glu_linear_backward": "mnk",
    "gau_lse": "mn", "gau_weights": "n", "gau_product": "mnk", "gau_fused": "mnk",
    "gau_prologue": "mn", "gau_gradient": "mnk", "gau_dv": "nk", "gau_dq": "m",
    "mixed_chunk_states": "mnk", "mixed_chunk_weights": "mn", "mixed_chunk_fused": "mnk", "mixed_chunk_product": "mnk",
    "mixed_chunk_gradient": "mnk", "mixed_chunk_heads": "mn", "mixed_chunk_step": "nk",
    "mixed_chunk_step_close": "nk",
    "tangent": "mnk", "second_statistics": "mnk", "second_dq": "mnk", "second_dk": "mnk", "second_dv": "mnk",
    "second_dbias": "=",
}  # fmt: skip
# Without a loop whose loads could be begun ahead, and so without a pipeline.
_PASSES_ONCE = ("glu_forward", "glu_backward", "projection", "heads", "norm_forward", "norm_backward", "gau_prologue")


class NotTimed(Exception):
    """Why a clock could not time a candidate."""


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate: its milliseconds, or why it was not timed."""

    ms: float | None = None
    reason: str | None = None


def tasks(target: str, ops: Iterable[str], widths: Iterable[int] | None, dtypes: Iterable[str]) -> list[Job]:
    """One job for each entry of the tables of some operations, those in the first dtype first.

    Args:
        target: whose compiler is asked.
        ops: operations, "projection" and "heads" among them.
        widths: only these classes of the head dimension, and what has no heads; None for all.
        dtypes: "bf16" or "fp16", "fp32".
    """
    ops, wanted = set(ops), None if widths is None else {0, *widths}
    return [
        Job(target, name, dtype, width, _kind(entry.kinds[dtype]))
        for dtype in dtypes
        for name, entry in ENTRIES.items()
        for width in entry.widths
        if op_of(name) in ops and (wanted is None or width in wanted)
    ]


def _kind(kinds: tuple[str, ...]) -> str:
    """What to time: a causal call where there is one."""
    return next((kind for kind in kinds if "causal" in kind), kinds[0])


def space(key: Key, start: Config) -> list[tuple[int, Config]]:
    """The candidates around an entry, each with its distance: how many steps it is from `start`, which comes first.

    Example:
        >>> found = space(Key("attention_dq", 2, 64), Config(64, 64, 4, 2))
        >>> found[0] == (0, Config(64, 64, 4, 2)), len(found)
        (True, 72)
    """
    once = key.kernel in _PASSES_ONCE
    least = 1 if once else 16  # of a matrix instruction
    most = 8192 if once else 128 if key.kernel.startswith("mixed_chunk") else 256
    if key.itemsize == 4 and not once:  # IEEE products are unrolled: large blocks compile for minutes, and spill
        most = 64
    axes = BLOCKS[key.kernel]
    found: dict[Config, int] = {}
    steps = [(-1, 0, 1) if axis in axes or axes == "=" else (0,) for axis in "mnk"]
    for (m, n, k), warps, stages in product(product(*steps), WARPS, (start.num_stages,) if once else STAGES):
        if axes == "=" and not (m == n and k == 0):
            continue
        blocks = [
            _scaled(b, by) for b, by in zip((start.block_m, start.block_n, start.block_k), (m, n, k), strict=True)
        ]
        if all(by == 0 or least <= block <= most for block, by in zip(blocks, (m, n, k), strict=True)):
            config = replace(start, block_m=blocks[0], block_n=blocks[1], block_k=blocks[2], num_warps=warps)
            config = replace(config, num_stages=stages)
            found[config] = abs(m) + abs(n) * (axes != "=") + abs(k) + (warps != start.num_warps)
            found[config] += abs(stages - start.num_stages)
    found[start] = 0
    return sorted(((far, config) for config, far in found.items()), key=lambda item: item[0])


def candidates_of(starts: list[Job]) -> list[tuple[int, Job]]:
    """The candidates around some entries with their distances, the nearest first, and of these the first entry's."""
    found = [
        (far, replace(job, config=config))
        for job in starts
        if job.config is not None
        for far, config in space(job.key, job.config)
    ]
    return sorted(found, key=lambda item: item[0])


def _scaled(block: int, by: int) -> int:
    return block * 2 if by > 0 else block // 2 if by < 0 else block


class Journal:
    """Every finished measurement, a line each, in a file beside the user's table: what a second search need not repeat.

    Lines of other versions of the software, and what is no line of a journal, count for nothing, and stay.
    """

    path: Path
    versions: dict[str, str]

    def __init__(self, path: Path, versions: dict[str, str]) -> None:
        self.path, self.versions = path, versions

    def read(self) -> dict[tuple[Key, Config], Outcome]:
        """What is known."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        known = {}
        for line in lines:
            try:
                read = Fields(parse_json(line, "line"), "line")
                if read("versions", "an object", lambda x: isinstance(x, dict)) != self.versions:
                    continue
                key = key_of(Fields(read("key", "an object", lambda x: isinstance(x, dict)), "key"))
                reason = read("reason", "a string or null", lambda x: x is None or isinstance(x, str), None)
                ms = time_of(read, "ms") if reason is None else None
                known[key, config_of(read)] = Outcome(ms, reason)
            except ValueError:  # a line that was cut short
                continue
        return known

    def add(self, job: Job, outcome: Outcome) -> None:
        """Write a line."""
        assert job.config is not None
        row = {"key": job.key._asdict(), "config": asdict(job.config), **asdict(outcome), "versions": self.versions}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@dataclass
class Search:
    """A search, and what it has found.

    Attributes:
        starts: each entry's job, with the configuration that the tables have now.
        check: the reason why a candidate's results are wrong, or None.
        clock: milliseconds of a candidate's call, or `NotTimed` with the reason.
        journal: where measurements are kept.
        compile: gives jobs with their rows, as they are done, such as `ahead.compile_each`.
        among: of the entries named here only these candidates, and the one that they have.
    """

    starts: list[Job]
    check: Callable[[Job], str | None]
    clock: Callable[[Job], float]
    journal: Journal
    compile: Callable[[list[Job]], Iterator[tuple[Job, Row]]]
    among: Mapping[Key, frozenset[Config]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take from the journal what is known of these entries."""
        keys = {job.key for job in self.starts}
        read = self.journal.read().items()
        self.outcomes: dict[tuple[Key, Config], Outcome] = {place: what for place, what in read if place[0] in keys}

    def candidates(self) -> list[tuple[int, Job]]:
        """All of them with their distances, as `candidates_of` gives them."""
        return [
            (far, job)
            for far, job in candidates_of(self.starts)
            if far == 0 or job.key not in self.among or job.config in self.among[job.key]
        ]

    def untried(self) -> int:
        """How many candidates nothing is known of."""
        return sum(_place(job) not in self.outcomes for _, job in self.candidates())

    def run(
        self, seconds: float = math.inf, now: Callable[[], float] = time.monotonic
    ) -> Iterator[tuple[Job, Outcome]]:
        """Try the candidates for so long, and give each as it is done; those that are known are given first."""
        began = now()
        candidates = self.candidates()
        known = [(job, self.outcomes[place]) for _, job in candidates if (place := _place(job)) in self.outcomes]
        yield from known
        for _, level in groupby(candidates, key=lambda item: item[0]):
            work = [job for _, job in level if _place(job) not in self.outcomes]
            if work and now() - began < seconds:
                rows = self.compile(work)
                try:
                    for job, row in rows:
                        yield job, self._try(job, row)
                        if now() - began >= seconds:
                            return
                finally:
                    if hasattr(rows, "close"):
                        rows.close()  # and what is not compiled yet is not

    def _try(self, job: Job, row: Row) -> Outcome:
        reason = row.reason if not row.ok else self.check(job)
        try:
            outcome = Outcome(reason=reason) if reason is not None else Outcome(self.clock(job))
        except NotTimed as error:
            outcome = Outcome(reason=str(error))
        self.outcomes[_place(job)] = outcome
        self.journal.add(job, outcome)
        return outcome

    def best(self) -> dict[Key, TableEntry]:
        """The fastest configuration of every entry that was timed: the one it had, unless another gains something."""
        found = {}
        for job in self.starts:
            times = {c: what.ms for (key, c), what in self.outcomes.items() if key == job.key and what.ms is not None}
            assert job.config is not None
            default = times.get(job.config)
            if times:
                fastest = min(times, key=lambda c: times[c])
                if default is not None and times[fastest] > (1 - NOISE) * default:
                    fastest = job.config
                found[job.key] = TableEntry(fastest, times[fastest], default)
        return found


def _place(job: Job) -> tuple[Key, Config]:
    assert job.config is not None
    return job.key, job.config

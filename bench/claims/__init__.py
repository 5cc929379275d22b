"""Five figures of the papers, measured here: ``python -m bench claims NAME --scale cpu|gpu --minutes M``.

One file per claim says what its trials are, what they show and how it is drawn. What they share: `run.py` (journal,
resuming, budget), `train.py` (a training trial, a step to time), `contest.py` (equal budgets, the search for a learning
rate, paired seeds), `statistics.py` (intervals and verdicts), `draw.py`, and `command.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.claims.statistics import Verdict

Results = Mapping[str, dict[str, Any]]
"""What finished trials found, by their keys."""

NAMES = ("glu-variants", "gau-vs-transformer", "flash-lengths", "attention-memory", "gau-memory")


@dataclass(frozen=True)
class Settings:
    """What a run of a claim was told; all of it decides its trials.

    Attributes:
        claim: its name.
        scale: "cpu" or "gpu": which sizes, and where.
        minutes: budget of the whole claim.
        seeds: repetitions of every training run and every timing.
        data: file or folder of text; None is Python's standard library.
        threads: CPU threads for everyone.
        quick: sizes that only show that it works.
    """

    claim: str
    scale: str
    minutes: float
    seeds: int
    data: str | None = None
    threads: int = 1
    quick: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.scale == "gpu" else "cpu"


@dataclass(frozen=True)
class Trial:
    """One row of the journal: `run` names what is done (see `run.RUNNERS`), with the JSON values `spec`."""

    key: str
    run: str
    spec: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Claim:
    """A claim of the literature, and how it is tried.

    Attributes:
        name: of the command.
        title: of the plot.
        statement: what is claimed, in a sentence.
        published: the numbers, with their source.
        method: how it is tried with these settings, for the record.
        trials: those that can be told from the results so far, in their order; called again after every result.
        verdict: of the results.
        plot: draws a record (as `run.run` returns it) into a file.
    """

    name: str
    title: str
    statement: str
    published: Mapping[str, Any]
    method: Callable[[Settings], str]
    trials: Callable[[Settings, Results], list[Trial]]
    verdict: Callable[[Settings, Results], Verdict]
    plot: Callable[[dict[str, Any], Path], None]


def load(name: str) -> Claim:
    """The claim called `name`, one of `NAMES`."""
    claim = importlib.import_module(f"bench.claims.{name.replace('-', '_')}").CLAIM
    assert isinstance(claim, Claim)
    return claim

"""Tables of launch configurations in a folder of the test, and jobs of a search."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from flashgau import tables
from flashgau.tables.config import Config
from flashgau.tables.table import Key, Table
from flashgau.tuning import ahead

CPU = torch.device("cpu")
KEY = Key("attention_forward", 4, 64)
OTHER = Key("attention_dq", 4, 64)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The user's tables are in a folder of the test, and nothing read in it stays."""
    monkeypatch.setenv("FLASHGAU_TUNING", str(tmp_path))
    tables.reload()
    yield tmp_path
    tables.reload()


def user_table(**entries: Any) -> Table:
    return Table("interpreter", "interpreter", True, {"torch": "2"}, "2026-01-31", **entries)


def chosen(kernel: str = "attention_forward", width: int = 64, **traits: Any) -> Config:
    return tables.choose(kernel, torch.empty(1), width, **traits)


def job(config: Config = Config(64, 32), entry: str = "attention_forward", dtype: str = "fp32") -> ahead.Job:  # noqa: B008
    return ahead.Job("sm_80", entry, dtype, 64, "causal", config)


def fast_where(config: Config) -> float:
    """A clock for tests: milliseconds that a configuration takes, fastest with 64 rows, 64 keys and 1 stage."""
    return 1 + abs(config.block_m - 64) + abs(config.block_n - 64) + config.num_stages / 10


def row_of(j: ahead.Job, ok: bool = True) -> ahead.Row:
    return ahead.Row("attention", "forward_kernel", j.dtype, "", {}, j.target, ok=ok, reason=None if ok else "spills")


@pytest.fixture
def interpreted():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, and Triton compiles")

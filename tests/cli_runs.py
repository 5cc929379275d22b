"""Commands that do little, and what a demo finds."""

import pytest
import torch
from typer.testing import CliRunner

from flashgau.cli import doctor
from flashgau.cli.training import demo
from flashgau.cli.training import measuring as measure
from flashgau.verification import checking as check
from flashgau.verification.cases import all_cases

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and names that few encodings have."""
    from flashgau.models import CausalLM, ModelConfig

    place = tmp_path_factory.mktemp("\u2264\u00e9")
    CausalLM(ModelConfig(dim=8, depth=1, key_dim=4, chunk_size=4)).save(place / "\u00e9.safetensors")
    (place / "\u00d7.txt").write_text("\u00e9" * 500, encoding="utf-8")
    return place


@pytest.fixture
def small(monkeypatch, folder):
    """Every command does little."""
    from flashgau.models import CausalLM, ModelConfig
    from flashgau.training import trainer

    tiny = ModelConfig(dim=8, depth=1, key_dim=4, chunk_size=4)
    few_cases(monkeypatch, "glu")
    monkeypatch.setattr(trainer, "_build", lambda config: (CausalLM(tiny), tiny.to_dict()))
    monkeypatch.setattr(trainer, "loss_plot", lambda rows, path, title: path.write_bytes(b"plot"))
    monkeypatch.setattr(demo.Demo, "train", lambda self: self.say("\u2264\u00d7\ufffd"))
    monkeypatch.setattr(demo.Demo, "sample", lambda self: None)
    monkeypatch.setattr(demo.Demo, "measure", lambda self: None)
    monkeypatch.setattr("flashgau.tuning.ahead.compile_all", lambda jobs, processes: iter(()))
    monkeypatch.chdir(folder)


def few_cases(monkeypatch, op, count=3):
    """Let check run only the first cases of an operation."""
    cases = all_cases(op)[:count]
    monkeypatch.setattr("flashgau.verification.checking.all_cases", lambda *_: cases)


@pytest.fixture(scope="module")
def facts():
    """What a demo finds, small, with text that HTML must escape."""
    pairs = [(case, "eager") for case in all_cases("glu")[:3]]
    rows = check.run_cases(pairs, torch.device("cpu"))
    points = [
        measure.Point(provider, length, (1e-6 * length,), 1000 * length)
        for length in (256, 512)
        for provider in measure.PROVIDERS
    ]
    points[-1] = measure.Point("FLASH", 512, skipped="would take too long")
    log = [{"kind": "train", "step": step, "loss": 5.5 - 0.1 * step} for step in range(10)]
    return {
        "version": "1.2.3",
        "started": "2026-01-02 03:04 UTC",
        "finished": True,
        "seconds": 200.0,
        "device": "cpu",
        "doctor": doctor.collect(),
        "check": {
            "extent": "Everything",
            "cases": 3,
            "missed": 0,
            "seconds": 1.0,
            "summary": check.summary(rows),
            "rows": [vars(row) for row in rows],
        },
        "training": {
            "config": {"batch": 8, "accumulate": 1, "length": 512},
            "parameters": 12345,
            "step": 10,
            "elapsed_seconds": 150.0,
            "bits_per_byte": 2.5,
            "tokens_per_second": 1e4,
            "data_source": "<the library>",
            "interrupted": False,
            "log": [*log, {"kind": "validation", "step": 9, "loss": 4.7}],
        },
        "sample": {
            "prompt": "def ",
            "text": "f(a):\n    return a < b && '<script>'",
            "new_bytes": 30,
            "temperature": 0.8,
            "bytes_per_second": 100.0,
            "state_bytes": [4096, 4096],
        },
        "sizes": vars(measure.Sizes()),
        "measurements": [point.to_dict() for point in points],
    }

"""Small runs of training: a model, a text, a configuration, where a run stops, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from flashgau.models import MaskedLM, ModelConfig
from flashgau.training import Event, TrainConfig, train, trainer
from flashgau.training.checkpoint import read_checkpoint
from flashgau.training.folder import BEST, LAST, LOG

FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def quick_plots() -> Iterator[None]:
    """Drawing takes most of a short run's time; it is tested by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "loss_plot", lambda rows, path, title: path.write_bytes(b"plot"))
        yield


class Bigram(nn.Module):
    """The smallest language model with everything a run must restore: matrices, a norm, biases, and dropout."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(dim, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.norm(self.embed(tokens))))


def bigram(dim: int = 12) -> Bigram:
    torch.manual_seed(3)
    return Bigram(dim)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten small files with an easily learned text."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(10):
        words = " ".join(f"{number} potato {k}," for k in range(200))
        (folder / f"rhyme{number}.txt").write_text(words)
    return folder


@pytest.fixture
def config(text: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=str(text),
        out=str(tmp_path / "run"),
        steps=12,
        batch=3,
        accumulate=2,
        length=16,
        lr=0.02,
        warmup=3,
        eval_windows=6,
        eval_every=5,
        save_every=4,
        log_every=3,
        validation_fraction=0.2,
        device="cpu",
    )


def at_step(step: int, action: Callable[[], object], kind: str = "step") -> Callable[[Event], None]:
    """A callback that does something at one event."""
    return lambda event: action() if (event.kind, event.step) == (kind, step) else None


def interrupt(number: int = signal.SIGINT) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


CLOCK = ("elapsed_seconds", "tokens_per_second", "elapsed")


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves but what the clock decides: tensors of both checkpoints, state, log."""
    result: dict[str, Any] = {}
    for name in (LAST, BEST):
        tensors, metadata = read_checkpoint(folder / name)
        for key, tensor in tensors.items():
            result[f"{name} {key}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        result[f"{name} state"] = {k: v for k, v in metadata["state"].items() if k not in CLOCK}
    rows = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    result["log"] = [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]
    return result


def write_tree(folder: Path, tree: dict[str, bytes]) -> None:
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def masked_model(kind: str = "flash-quad", **options: Any) -> MaskedLM:
    torch.manual_seed(3)
    described = ModelConfig(kind=kind, dim=16, depth=2, heads=2, key_dim=8, chunk_size=8, vocab_size=257)
    return MaskedLM(described, **options)


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainConfig], dict[str, Any]]:
    """The outcome of a configuration's run without any stop, worked out once."""
    known: dict[str, dict[str, Any]] = {}

    def run(config: TrainConfig) -> dict[str, Any]:
        key = repr(replace(config, out="out"))
        if key not in known:
            out = tmp_path_factory.mktemp("whole") / "run"
            train(replace(config, out=str(out)), model=bigram())
            known[key] = outcome(out)
        return known[key]

    return run

"""Training: data, schedule, checkpoints, the loop, and `flashgau train`."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from checks import check_owned
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

from flashgau.cli.train import ProgressDisplay
from flashgau.cli.train import train as train_command
from flashgau.files import atomic_write
from flashgau.models import KINDS, SIZES, CausalLM, MaskedLM, ModelConfig
from flashgau.training import (
    CheckpointError,
    Event,
    TrainConfig,
    TrainResult,
    learning_rate,
    load_corpus,
    load_model,
    load_text,
    plots,
    resume_config,
    train,
    trainer,
)
from flashgau.training.checkpoint import (
    differences,
    read_checkpoint,
    read_metadata,
    write_checkpoint,
)
from flashgau.training.config import FREE, OBJECTIVES
from flashgau.training.data import (
    list_files,
    sample_starts,
    split_files,
    split_position,
    validation_starts,
    windows,
)
from flashgau.training.objective import MASK, examples, mask_seeds
from flashgau.training.trainer import BEST, LAST, LOG, PLOT, parameter_groups

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


# ---------------------------------------------------------------- schedule and configuration


@given(
    lr=st.floats(1e-6, 1.0),
    final=st.floats(0.0, 1.0),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 300),
)
def test_schedule_is_linear_warmup_times_cosine(lr: float, final: float, warmup: int, steps: int) -> None:
    config = TrainConfig(lr=lr, lr_final=final, warmup=warmup, steps=steps)
    rates = [learning_rate(config, step, step / steps) for step in range(steps + 1)]
    for step, rate in enumerate(rates):
        # cos(x) = 1 - 2 sin(x/2)^2: the same curve by another formula.
        decay = 1 - (1 - final) * math.sin(math.pi * step / steps / 2) ** 2
        warm = 1.0 if step + 1 >= warmup else (step + 1) / warmup
        assert rate == pytest.approx(lr * decay * warm, rel=1e-9, abs=1e-15 * lr)
        assert 0.0 <= rate <= lr
    if warmup <= steps:
        assert rates[steps] == pytest.approx(lr * final, abs=1e-15 * lr)
    after = rates[max(warmup - 1, 0) :]
    assert all(a >= b - 1e-15 for a, b in pairwise(after))


def test_default_warmup_is_at_most_a_tenth() -> None:
    assert TrainConfig(steps=50).warmup_steps == 5
    assert TrainConfig(steps=5000).warmup_steps == 100
    assert TrainConfig(steps=None, max_minutes=1).warmup_steps == 100
    assert TrainConfig(steps=5000, warmup=0).warmup_steps == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("steps", "batch", "accumulate", "length", "log_every", "eval_every", "save_every")),
        *((name, -3) for name in ("steps", "warmup", "eval_windows", "seed", "weight_decay", "grad_clip")),
        *((name, 1.5) for name in ("steps", "batch", "lr_final", "beta1", "beta2", "validation_fraction")),
        *((name, math.nan) for name in ("lr", "lr_final", "beta2", "weight_decay", "validation_fraction")),
        *((name, math.inf) for name in ("lr", "max_minutes", "grad_clip", "weight_decay")),
        *((name, "3") for name in ("batch", "lr", "bf16")),
        *((name, None) for name in ("batch", "lr", "seed", "model")),
        *(("batch", True), ("bf16", 1), ("seed", 2**63), ("out", ""), ("model", 5), ("data", 7)),
        *((name, 10**12) for name in ("batch", "length", "accumulate")),
        *((name, 10**400) for name in ("steps", "eval_windows", "lr", "max_minutes", "weight_decay")),
    ],
)
def test_configuration_refuses_by_name(field: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"TrainConfig: `{field}` is") as caught:
        TrainConfig(**{field: value})
    assert "expected" in str(caught.value)


def test_a_step_that_no_memory_holds_is_refused_before_any_work() -> None:
    assert TrainConfig(batch=2**12, accumulate=2**8, length=2**12).bytes_per_step == 2**32
    with pytest.raises(ValueError, match=r"`batch` is 4096, .*together 8589934592 bytes in a step; expected at most"):
        TrainConfig(batch=2**12, accumulate=2**9, length=2**12)


def test_configuration_needs_a_limit_and_known_fields() -> None:
    with pytest.raises(ValueError, match="both None"):
        TrainConfig(steps=None)
    with pytest.raises(ValueError, match="no field named momentum"):
        TrainConfig.from_dict({"momentum": 1})
    assert {field.name for field in fields(TrainConfig)} >= FREE
    assert TrainConfig(lr=1).lr.hex() == (1.0).hex()  # an integer is taken as the float it means


# ---------------------------------------------------------------- data

names = st.text("abcxyz_", min_size=1, max_size=6)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
# Contents without zero bytes, so that the separators divide a part into its files again.
contents = st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"\0", b"\1"))


def write_tree(folder: Path, tree: dict[str, bytes]) -> None:
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def files_of(part: np.ndarray) -> list[bytes]:
    joined = part.tobytes()
    assert joined[:1] == joined[-1:] == b"\0"
    return joined[1:-1].split(b"\0")


@given(
    tree=st.dictionaries(paths, contents, min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.99),
    order=st.randoms(use_true_random=False),
)
def test_folder_is_split_by_file(
    tree: dict[str, bytes], fraction: float, order: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = {k: v for k, v in tree.items() if not any(other.startswith(k + "/") for other in tree)}
    first, second = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    write_tree(first, tree)
    shuffled = list(tree.items())
    order.shuffle(shuffled)
    write_tree(second, dict(shuffled))
    assume(len(set(tree.values())) >= 2)
    corpus = load_corpus(first, validation_fraction=fraction)
    train_files, validation_files = files_of(corpus.train), files_of(corpus.validation)
    # Every distinct text once, none in both parts, both parts inhabited.
    assert sorted(train_files + validation_files) == sorted(set(tree.values()))
    assert train_files
    assert validation_files
    assert (len(train_files), len(validation_files)) == (corpus.train_files, corpus.validation_files)
    # The order of creation and the place do not matter; contents and split do.
    again = load_corpus(second, validation_fraction=fraction)
    assert again.fingerprint == corpus.fingerprint
    assert again.train.tobytes() == corpus.train.tobytes()
    name = sorted(tree)[0]
    (second / name).write_bytes(tree[name] + b"+")
    assert load_corpus(second, validation_fraction=fraction).fingerprint != corpus.fingerprint


@given(st.sets(paths, min_size=2, max_size=40), st.sets(paths, max_size=20), st.floats(0.05, 0.95))
def test_split_is_a_stable_partition(some: set[str], more: set[str], fraction: float) -> None:
    train_files, validation_files = split_files(sorted(some), fraction)
    assert train_files
    assert validation_files
    assert sorted(train_files + validation_files) == sorted(some)
    hashed_apart = len({split_position(path) < fraction for path in some}) == 2
    if hashed_apart:
        bigger = split_files(sorted(some | more), fraction)
        assert set(train_files) <= set(bigger[0])
        assert set(validation_files) <= set(bigger[1])


def test_split_fraction_is_the_share_of_files() -> None:
    positions = np.array([split_position(f"folder/file{number}.py") for number in range(20000)])
    for fraction in (0.05, 0.5, 0.9):
        deviation = (positions < fraction).mean() - fraction
        assert abs(deviation) < 5 * math.sqrt(fraction * (1 - fraction) / len(positions))


def test_which_files_of_a_folder_are_taken(tmp_path: Path) -> None:
    taken = {"b.txt": b"one", "a/z.py": b"two", "a.d/é.md": b"three", "late_zero": b"x" * 9000 + b"\0"}
    left = {
        ".hidden": b"h1",
        ".git/config": b"h2",
        "__pycache__/m.pyc": b"h3",
        "site-packages/p.py": b"h4",
        "empty": b"",
        "run/log.jsonl": b"own output",
    }
    write_tree(tmp_path, taken | left | {"binary": b"PK\0\1", "copy_of_b": b"one"})
    (tmp_path / "link_to_folder").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link_to_file").symlink_to(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "pipe")
    listed = list_files(tmp_path, exclude=tmp_path / "run")
    assert listed == sorted([*taken, "binary", "copy_of_b", "link_to_file"], key=os.fsencode)
    corpus = load_corpus(tmp_path, exclude=tmp_path / "run")
    assert corpus.train_files + corpus.validation_files == len(taken)


@given(content=st.binary(min_size=2, max_size=300), fraction=st.floats(0.01, 0.99))
def test_single_file_is_split_by_position(
    content: bytes, fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("one")
    (folder / "text").write_bytes(content)
    corpus = load_corpus(folder / "text", validation_fraction=fraction)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == content
    assert abs(corpus.validation.size - fraction * len(content)) <= 1
    assert 0 < corpus.validation.size < len(content)
    assert f"{corpus.validation.size} of {len(content)}" in corpus.source
    if b"\0" not in content:
        assert load_corpus(folder, validation_fraction=fraction).fingerprint == corpus.fingerprint


def test_whole_text_is_all_files_once(tmp_path: Path) -> None:
    write_tree(tmp_path / "folder", {"b": b"two", "a/c": b"one", "copy": b"two", "binary": b"\0", ".hidden": b"x"})
    assert load_text(tmp_path / "folder").tobytes() == b"\0one\0two\0"
    (tmp_path / "file").write_bytes(b"as it \0 is")
    assert load_text(tmp_path / "file").tobytes() == b"as it \0 is"
    for bad, error in (("nowhere", FileNotFoundError), ("folder/.hidden", ValueError)):
        with pytest.raises(error, match=r"data: .*expected"):
            load_text(tmp_path / bad)


def test_default_text_is_the_standard_library() -> None:
    corpus = load_corpus()
    total = corpus.train.size + corpus.validation.size
    assert total > 5e6
    assert corpus.train_files > 10 * corpus.validation_files > 0
    both = corpus.train.tobytes() + corpus.validation.tobytes()
    assert b"\0" + Path(os.__file__).read_bytes() + b"\0" in both
    assert b"\0" + Path(torch.__file__).read_bytes() + b"\0" not in both


@pytest.mark.parametrize(
    "case", ["missing", "empty folder", "only binary", "empty file", "one byte", "pipe", "fraction"]
)
def test_data_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    target, fraction, kind = tmp_path / "it", 0.05, ValueError
    if case == "missing":
        kind = FileNotFoundError
    elif case == "empty folder":
        target.mkdir()
    elif case == "only binary":
        write_tree(target, {"a": b"\0a", "b": b"b\0"})
    elif case == "pipe":
        os.mkfifo(target)
    else:
        target.write_bytes(b"x" if case == "one byte" else b"" if case == "empty file" else b"text")
        fraction = 1.0 if case == "fraction" else fraction
    with pytest.raises(kind, match=r"^data: ") as caught:
        load_corpus(target, validation_fraction=fraction)
    assert case == "fraction" or str(target) in str(caught.value)


@given(
    size=st.integers(2, 10**12),
    length=st.integers(1, 10**6),
    count=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
)
def test_sampling_is_a_pure_function_of_seed_and_step(size: int, length: int, count: int, seed: int, step: int) -> None:
    length = min(length, size - 1)
    starts = sample_starts(size, count, length, seed, step)
    np.random.seed(0)  # the global generator has no part in it
    assert np.array_equal(starts, sample_starts(size, count, length, seed, step))
    assert starts.min() >= 0
    assert starts.max() + length + 1 <= size
    # A process that needs only the first rows of a step finds the same ones.
    assert np.array_equal(sample_starts(size, (count + 1) // 2, length, seed, step), starts[: (count + 1) // 2])
    if size - length > 10**9 and count > 3:
        assert not np.array_equal(starts, sample_starts(size, count, length, seed, step + 1))
        assert not np.array_equal(starts, sample_starts(size, count, length, seed ^ 1, step))


def test_sampling_is_uniform_and_pinned() -> None:
    starts = np.concatenate([sample_starts(116, 100, 16, 1, step) for step in range(2000)])
    counts = np.bincount(starts, minlength=100)
    assert counts.size == 100
    chi_square = ((counts - 2000.0) ** 2 / 2000.0).sum()
    assert abs(chi_square - 99) < 6 * math.sqrt(2 * 99)
    # Written down once: another value means that old runs can no longer be continued exactly.
    assert sample_starts(10**6, 4, 512, seed=42, step=7).tolist() == PINNED_STARTS


PINNED_STARTS = [450035, 305826, 554236, 35131]


@given(size=st.integers(2, 5000), length=st.integers(1, 200), count=st.integers(1, 50))
@example(size=17, length=16, count=5)
def test_validation_windows_do_not_overlap(size: int, length: int, count: int) -> None:
    length = min(length, size - 1)
    starts = validation_starts(size, count, length)
    assert len(starts) == min(count, (size - 1) // length)
    assert starts[0] == 0
    assert all(np.diff(starts) >= length)
    assert starts[-1] + length + 1 <= size


def test_target_of_a_byte_is_the_next_byte() -> None:
    data = np.frombuffer(b"to be or not to be", dtype=np.uint8)
    inputs, targets = windows(data, np.array([0, 3]), 5)
    assert inputs.dtype == targets.dtype == torch.int64
    assert [bytes(row.tolist()) for row in inputs] == [b"to be", b"be or"]
    assert [bytes(row.tolist()) for row in targets] == [b"o be ", b"e or "]


@given(
    size=st.integers(60, 400),
    length=st.integers(1, 50),
    count=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
)
def test_masks_are_a_pure_function_of_seed_step_and_window(
    size: int, length: int, count: int, seed: int, step: int
) -> None:
    text = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    starts = sample_starts(size, count, length, seed, step)
    seeds = mask_seeds(seed, step, count)
    torch.manual_seed(0)  # the global generator has no part in it
    inputs, targets = examples("mlm", text, starts, length, seeds)
    # A process that needs only some of the windows makes the same masks, whatever the others are.
    for row in range(count):
        alone = slice(row, row + 1)
        x, y = examples("mlm", text, starts[alone], length, mask_seeds(seed, step, count)[alone])
        assert torch.equal(x[0], inputs[row])
        assert torch.equal(y[0], targets[row])
    original = torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))
    chosen = targets != -100
    assert torch.equal(targets[chosen], original[chosen])
    assert torch.equal(inputs[~chosen], original[~chosen])
    assert not np.intersect1d(seeds, mask_seeds(seed, step + 1, count)).size
    assert not np.intersect1d(seeds, mask_seeds(seed ^ 1, step, count)).size


def test_masks_hide_the_right_shares() -> None:
    text = np.full(10_000, 7, dtype=np.uint8)
    starts = np.arange(100) * 99
    inputs, targets = examples("mlm", text, starts, 99, mask_seeds(3, 5, 100))
    count = int((targets == 7).sum())
    assert abs(count - 0.15 * 9900) < 5 * math.sqrt(0.15 * 0.85 * 9900)
    hidden, kept = (int(((inputs == token) & (targets == 7)).sum()) for token in (MASK, 7))
    assert abs(hidden - 0.8 * count) < 5 * math.sqrt(0.16 * count)
    assert abs(kept - 0.1 * count) < 5 * math.sqrt(0.09 * count)


# ---------------------------------------------------------------- checkpoints

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    result = {}
    for name in draw(st.sets(st.text(max_size=5), max_size=5)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
        result[name] = numbers.to(dtype).movedim(0, -1) if shape else numbers.to(dtype)
    return result


@given(
    tensors=tensor_dicts(),
    state=st.dictionaries(st.text(max_size=4), st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
)
def test_checkpoint_round_trip(
    tensors: dict[str, torch.Tensor], state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("c") / "x.safetensors"
    write_checkpoint(path, tensors, {"state": state})
    loaded, metadata = read_checkpoint(path)
    assert metadata["state"] == state == read_metadata(path)["state"]
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert os.listdir(path.parent) == [path.name]


def test_what_a_checkpoint_gives_owns_its_memory(tmp_path: Path) -> None:
    """Odd sizes, after which the next tensor of a mapped file lies on a multiple of 8 bytes, or of less."""
    kinds = itertools.product((torch.float64, torch.float32, torch.bfloat16, torch.uint8), (1, 3, 7))
    tensors = {f"{i}": torch.arange(n, dtype=dtype) for i, (dtype, n) in enumerate(kinds)}
    write_checkpoint(tmp_path / "x.safetensors", tensors, {})
    found, _ = read_checkpoint(tmp_path / "x.safetensors")
    check_owned(found.values())
    some, _ = read_checkpoint(tmp_path / "x.safetensors", lambda name: name in "147")
    assert sorted(some) == ["1", "4", "7"]
    check_owned([*some.values(), *found.values()])


def test_a_resumed_run_owns_its_memory(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and moments as an uninterrupted run has them: on boundaries of 64 bytes, each for itself."""
    config = replace(config, size="tiny", steps=2, batch=1, accumulate=1, eval_windows=1)
    train(config)
    load, counts = trainer._Run.load, []

    def watched(run: Any, path: Path) -> None:
        load(run, path)
        moments = [t for state in run.optimizer.state.values() for t in state.values()]
        check_owned([*(p.detach() for p in run.model.parameters()), *moments])
        counts.append((len(moments), len(list(run.model.parameters()))))

    monkeypatch.setattr(trainer._Run, "load", watched)
    result = train(replace(config, steps=3), resume=True)
    ((moments, parameters),) = counts
    assert moments == 3 * parameters
    loaded = load_model(result.checkpoint)
    check_owned([*loaded.parameters(), *loaded.buffers()])


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("small") / "x.safetensors"
    tensors = {"model.a": torch.arange(12.0).reshape(3, 4), "model.b": torch.arange(4, dtype=torch.uint8)}
    write_checkpoint(path, tensors, {"state": {"step": 7}})
    return path, path.read_bytes()


@given(data=st.data())
def test_no_damage_goes_unnoticed(small_checkpoint: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = small_checkpoint
    good = read_checkpoint_bytes(path, whole)
    position = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    byte = data.draw(st.integers(1, 255))
    if kind == "flip":
        damaged = whole[:position] + bytes([whole[position] ^ byte]) + whole[position + 1 :]
    elif kind == "cut":
        damaged = whole[:position]
    else:
        damaged = whole[:position] + bytes([byte]) + whole[position:]
    try:
        seen = read_checkpoint_bytes(path, damaged)
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
    else:
        assert seen == good  # harmless: white space of the header, say


def read_checkpoint_bytes(path: Path, content: bytes) -> object:
    path.write_bytes(content)
    tensors, metadata = read_checkpoint(path)
    return {k: (t.dtype, t.tolist()) for k, t in tensors.items()}, metadata


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a file"):
        read_checkpoint(tmp_path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no training state"):
        read_checkpoint(tmp_path / "other.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.pt")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_checkpoint(tmp_path / "pickle.pt")


# What may stand in a file in the place of any value.
ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    10**9,
    10**12,
    10**400,
    1e30,
    -0.5,
    "",
    "a",
    "\ud800",
    "\x1b[31m\n",
    [],
    [[[1]]],
    {},
    {"a": 1},
]


@st.composite
def mutations(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """`whole` with one value somewhere in it replaced, left out, or added."""
    changed = json.loads(json.dumps(whole))
    place = changed
    while True:
        key = draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[key], dict) and place[key] and draw(st.booleans())):
            break
        place = place[key]
    kind = draw(st.sampled_from(["replace", "replace", "leave out", "add"]))
    if kind == "leave out":
        del place[key]
    else:
        place[key if kind == "replace" else "new"] = draw(st.sampled_from(ODD))
    return changed


def tiny_checkpoint() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a model that `load_model` can make."""
    described = ModelConfig(dim=8, depth=2, key_dim=4, chunk_size=4)
    data = {"source": "", "fingerprint": "", "train_bytes": 1, "train_files": 1}
    metadata = {"config": TrainConfig().to_dict(), "model": described.to_dict(), "data": data}
    state = {field.name: field.default for field in fields(trainer._State)}
    return {f"model.{k}": v for k, v in CausalLM(described).state_dict().items()}, {**metadata, "state": state}


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """What a CheckpointError of `read` says, or the path if there is none."""
    try:
        read(path)
    except CheckpointError as error:
        return str(error)
    return str(path)


@given(data=st.data())
def test_a_checkpoint_of_any_form_is_a_model_or_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    """In its right checksum anything may be written: nothing is allocated from it, and the file is named."""
    tensors, whole = tiny_checkpoint()
    path = tmp_path_factory.mktemp("form") / LAST
    write_checkpoint(path, tensors, data.draw(mutations(whole)))
    for read in (load_model, trainer.load_config, lambda file: resume_config(file.parent)):
        message = refusal(read, path)
        assert str(path) in message
        assert len(message) < 900


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model", {"dim": 10**9}, "its `model`: it describes no model of this version: Storage size"),
        ("model", {"dim": 10**6}, "does not fit its own configuration: .*1000000"),
        ("model", {"dim": 10**30}, "its `model`: it describes no model of this version"),
        ("model", {"depth": 100_000}, "`depth` is 100000, and there are 2 layers"),
        ("model", {"layer": {"option_of_2027": 1}}, "option_of_2027"),
        ("config", {"batch": 10**12}, "its `config`: TrainConfig: `batch` is 10{12}; expected at most"),
        ("config", {"steps": "many"}, "its `config`: TrainConfig: `steps` is 'many'; expected int"),
        ("config", {"momentum": 1}, "no field named momentum"),
    ],
)
def test_numbers_of_a_checkpoint_are_compared_before_they_are_used(
    part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors, metadata = tiny_checkpoint()
    write_checkpoint(tmp_path / LAST, tensors, metadata)
    assert load_model(tmp_path / LAST).config.dim == 8
    write_checkpoint(tmp_path / LAST, tensors, {**metadata, part: {**metadata[part], **changes}})
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / LAST)


@pytest.mark.parametrize(
    "text", ["", "7", "[]", "{", "NaN", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": []}']
)
def test_a_header_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    save_file({"model.a": torch.ones(2)}, tmp_path / "x", {"flashgau": text, "digest": digest})
    for read in (read_metadata, read_checkpoint, load_model, trainer.load_config):
        with pytest.raises(CheckpointError, match=r"checkpoint .*/x (is damaged: its header: not JSON|has format)"):
            read(tmp_path / "x")


@FIXTURES
@given(limit=st.integers(0, 4000))
def test_failure_at_any_byte_keeps_the_old_checkpoint(tmp_path_factory: pytest.TempPathFactory, limit: int) -> None:
    """A real failure of the system's write: files may not grow past `limit` bytes."""
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    write_checkpoint(path, {"a": torch.zeros(3)}, {"state": 1})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="previous one is intact") as caught:
            write_checkpoint(path, {"a": torch.zeros(1000)}, {"state": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_of_any_call_keeps_the_old_file(
    call: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(type(error)), atomic_write(tmp_path / "x") as stream:
        stream.write(b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_kill_while_writing_never_leaves_half_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, {"a": torch.zeros(50_000)}, {"state": 0})
    for delay in np.linspace(0.001, 0.02, 12):
        child = os.fork()
        if child == 0:
            for version in range(1, 10**6):
                write_checkpoint(path, {"a": torch.full((50_000,), version)}, {"state": version})
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tensors, metadata = read_checkpoint(path)
        assert (tensors["a"] == metadata["state"]).all()
    (tmp_path / ".mine.tmp").write_bytes(b"not ours")
    trainer.files.remove_temporaries(path)
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", path.name]


def test_differences_are_named_and_few() -> None:
    assert differences({"a": 1}, {"a": 1}) == ""
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == (
        "a is not in the checkpoint; b is 3 in the checkpoint, 2 here; c is only in the checkpoint"
    )
    assert differences(dict.fromkeys("abcdef", 1), {}).endswith("; and 2 more")


# ---------------------------------------------------------------- the loop


def test_loss_reaches_the_entropy_rate_of_a_markov_chain(tmp_path: Path) -> None:
    """The text is a Markov chain, so its entropy rate is known exactly, and a bigram model can reach it."""
    random_numbers = np.random.default_rng(5)
    chain = random_numbers.dirichlet(np.full(6, 0.3), size=6)
    values, vectors = np.linalg.eig(chain.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    entropy = -(stationary[:, None] * chain * np.log(np.maximum(chain, 1e-300))).sum()
    state, letters = 0, bytearray()
    for draw in random_numbers.random(40_000):
        state = min(int(np.searchsorted(np.cumsum(chain[state]), draw)), 5)
        letters.append(b"abcdef"[state])
    (tmp_path / "text").write_bytes(letters)

    config = TrainConfig(
        data=str(tmp_path / "text"),
        out=str(tmp_path / "run"),
        steps=120,
        length=64,
        lr=0.05,
        weight_decay=0.0,
        eval_every=60,
        validation_fraction=0.2,
    )
    model = bigram()
    model.dropout.p = 0.0
    result = train(config, model=model)
    assert result.history[0]["loss"] > 5.0  # before the first step: about ln 256 = 5.55
    assert result.validation_loss == pytest.approx(entropy, rel=0.04)
    assert result.bits_per_byte == pytest.approx(result.validation_loss / math.log(2))
    assert (result.stopped, result.bytes_seen) == ("steps", 120 * 8 * 64)
    assert not result.model.training


def test_first_step_is_adamw_by_hand(config: TrainConfig) -> None:
    """AdamW's first step moves every coordinate by lr * g / (|g| + eps), after decay of the matrices."""
    config = replace(config, steps=1, warmup=0, accumulate=1, grad_clip=None, weight_decay=0.3)
    model = bigram()
    model.dropout.p = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    corpus = load_corpus(config.data, validation_fraction=0.2)
    starts = sample_starts(corpus.train.size, config.batch, config.length, config.seed, 0)
    inputs, targets = windows(corpus.train, starts, config.length)
    logits = model(inputs)
    loss = -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    result = train(config, model=model)
    assert result.history[1]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert result.history[1]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for name, p in model.named_parameters():
        decay = 0.3 if name in ("embed.weight", "head.weight") else 0.0
        g = gradients[name]
        expected = before[name] * (1 - config.lr * decay) - config.lr * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-6  # elsewhere the last bit of the gradient decides
        torch.testing.assert_close(p.detach()[clear], expected[clear], rtol=1e-4, atol=1e-6)


def test_only_matrices_decay() -> None:
    decayed, free = parameter_groups(Bigram(), 0.1)
    assert [group["weight_decay"] for group in (decayed, free)] == [0.1, 0.0]
    assert sorted(p.ndim for p in decayed["params"]) == [2, 2]
    assert sorted(p.ndim for p in free["params"]) == [1, 1, 1]


def test_accumulation_is_a_larger_batch(config: TrainConfig, tmp_path: Path) -> None:
    """The same windows in one pass of six or three of two: the same gradient, to rounding."""
    results = []
    for accumulate in (1, 3):
        model = bigram()
        model.dropout.p = 0.0
        one = replace(
            config, batch=6 // accumulate, accumulate=accumulate, steps=4, out=str(tmp_path / str(accumulate))
        )
        results.append(train(one, model=model))
    first, second = results
    assert second.train_loss == pytest.approx(first.train_loss, rel=1e-5)
    for row, other in zip(first.history, second.history, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)


def masked_model(kind: str = "flash-quad", **options: Any) -> MaskedLM:
    torch.manual_seed(3)
    described = ModelConfig(kind=kind, dim=16, depth=2, heads=2, key_dim=8, chunk_size=8, vocab_size=257)
    return MaskedLM(described, **options)


def test_masked_accumulation_is_a_larger_batch(config: TrainConfig, tmp_path: Path) -> None:
    """Every masked byte counts alike, in whichever pass it is, though passes hide different numbers of them."""
    moments = []
    for accumulate in (1, 3):
        one = replace(config, objective="mlm", steps=3, out=str(tmp_path / str(accumulate)))
        one = replace(one, batch=6 // accumulate, accumulate=accumulate)
        train(one, model=masked_model(dtype=torch.float64))
        moments.append(read_checkpoint(Path(one.out, LAST))[0])
    for name, tensor in moments[0].items():
        torch.testing.assert_close(moments[1][name], tensor, rtol=1e-8, atol=1e-12, msg=name)


def test_first_masked_loss_is_cross_entropy_by_hand(config: TrainConfig) -> None:
    config = replace(config, objective="mlm", steps=1, accumulate=1, grad_clip=None)
    model = masked_model(dtype=torch.float64)
    text = load_corpus(config.data, validation_fraction=0.2).train
    starts = sample_starts(text.size, config.batch, config.length, config.seed, 0)
    inputs, targets = examples("mlm", text, starts, config.length, mask_seeds(config.seed, 0, config.batch))
    log_p = model(inputs).log_softmax(-1)
    picked = [-log_p[row, column, targets[row, column]].item() for row, column in (targets >= 0).nonzero().tolist()]
    result = train(config, model=model)
    assert result.history[1]["loss"] == pytest.approx(np.mean(picked), rel=1e-6)


def test_masked_model_learns_what_surrounds_a_byte(tmp_path: Path) -> None:
    """Stretches of one of eight letters: by itself a letter is 3 bits, and beside its neighbours next to nothing."""
    letters = np.random.default_rng(1).permuted(np.tile(np.arange(97, 105, dtype=np.uint8), (20, 1)), axis=1)
    (tmp_path / "text").write_bytes(letters.ravel().repeat(100).tobytes())
    config = TrainConfig(
        objective="mlm",
        data=str(tmp_path / "text"),
        out=str(tmp_path / "run"),
        steps=80,
        length=24,
        lr=0.02,
        validation_fraction=0.2,
        eval_every=80,
        device="cpu",
    )
    result = train(config, model=masked_model("flash"))
    assert result.history[0]["bits_per_byte"] > 7.5
    assert result.bits_per_byte is not None
    assert result.bits_per_byte < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_masked_run_stopped_and_resumed_is_bitwise_uninterrupted(
    kind: str, config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, objective="mlm", steps=6, eval_every=2)
    whole = train(replace(config, out=str(tmp_path / "whole")), model=masked_model(kind))
    for count, stop in enumerate((1, 4)):
        train(config, resume=count > 0, model=masked_model(kind), callbacks=[at_step(stop, interrupt())])
    train(resume_config(config.out), resume=True, model=masked_model(kind))
    assert outcome(Path(config.out)) == outcome(whole.out)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit(kind: str, objective: str, config: TrainConfig, tmp_path: Path) -> None:
    """What is computed again is the same; so a run may begin with it and go on without."""
    config = replace(config, model=kind, size="tiny", objective=objective, length=70, batch=1, eval_windows=2, steps=3)
    plain = train(replace(config, out=str(tmp_path / "plain")))
    stop = [at_step(2, interrupt())]
    train(replace(config, checkpointing=True), callbacks=stop)
    train(resume_config(config.out, checkpointing=False), resume=True)
    assert outcome(Path(config.out)) == outcome(plain.out)
    loaded = load_model(plain.checkpoint)
    assert type(loaded) is {"clm": CausalLM, "mlm": MaskedLM}[objective]
    assert loaded.config.vocab_size == {"clm": 256, "mlm": 257}[objective]
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(80)[None]), plain.model(torch.arange(80)[None]))


def test_checkpointing_of_a_callers_own_model_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="`checkpointing` is for the models of flashgau; expected"):
        train(replace(config, checkpointing=True), model=bigram())
    assert not Path(config.out).exists()


def test_validation_needs_a_masked_byte(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="none of the bytes of 1 windows of 1 is masked; expected more"):
        train(replace(config, objective="mlm", length=1, eval_windows=1), model=masked_model())


def test_gradient_clipping_bounds_what_the_optimizer_sees(config: TrainConfig, tmp_path: Path) -> None:
    """After one step, AdamW's first moment is (1 - beta1) times the clipped gradient."""
    norms = {}
    for clip in (None, 0.01):
        run = replace(config, steps=1, grad_clip=clip, beta1=0.5, out=str(tmp_path / str(clip)))
        train(run, model=bigram())
        tensors, _ = read_checkpoint(Path(run.out, LAST))
        moments = [t for name, t in tensors.items() if name.startswith("optimizer.exp_avg.")]
        norms[clip] = 2 * math.sqrt(sum(float(m.double().square().sum()) for m in moments))
    assert norms[None] > 0.1
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


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


@settings(FIXTURES, max_examples=12)
@given(
    stops=st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True).map(sorted),
    number=st.sampled_from([signal.SIGINT, signal.SIGTERM]),
)
@example(stops=[0], number=signal.SIGINT)
@example(stops=[5], number=signal.SIGINT)  # a validation is due at this step
@example(stops=[12], number=signal.SIGTERM)  # and the last one here
def test_stopped_and_resumed_is_bitwise_uninterrupted(
    stops: list[int],
    number: int,
    config: TrainConfig,
    uninterrupted: Callable[[TrainConfig], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = replace(config, out=str(tmp_path_factory.mktemp("parts") / "run"))
    for count, stop in enumerate(stops):
        kind = "start" if stop == 0 else "step"
        callback = at_step(stop, interrupt(number), kind)
        result = train(config, resume=count > 0, model=bigram(), callbacks=[callback])
        assert (result.stopped, result.signal, result.step) == ("signal", number, stop)
        assert read_metadata(result.checkpoint)["state"]["step"] == stop
    result = train(resume_config(config.out), resume=True, model=bigram())
    assert (result.stopped, result.step) == ("steps", 12)
    assert outcome(Path(config.out)) == uninterrupted(config)


@pytest.mark.parametrize("crash", [1, 4, 7, 11])
def test_crash_loses_only_the_steps_since_the_last_checkpoint(
    crash: int, config: TrainConfig, uninterrupted: Callable[[TrainConfig], dict[str, Any]]
) -> None:
    """An exception stands for a crash: nothing is saved after it. The log then is ahead of the checkpoint."""

    def fall_over() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, model=bigram(), callbacks=[at_step(crash, fall_over)])
    with (Path(config.out) / LOG).open("a") as log:
        log.write('{"kind": "train", "step": 1')  # and half a row
    assert read_metadata(Path(config.out, LAST))["state"]["step"] == (crash - 1) // 4 * 4
    (Path(config.out) / f".{LAST}.123.tmp").write_bytes(b"what a killed process leaves")
    train(config, resume=True, model=bigram())
    assert outcome(Path(config.out)) == uninterrupted(config)
    assert not list(Path(config.out).glob(".*.tmp"))


def test_other_intervals_do_not_change_the_result(config: TrainConfig, tmp_path: Path) -> None:
    first = train(config, model=bigram())
    other = replace(config, eval_every=2, save_every=5, log_every=1, out=str(tmp_path / "other"))
    second = train(other, model=bigram())
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert second.validation_loss == first.validation_loss
    steps = [row["step"] for row in second.history if row["kind"] == "validation"]
    assert steps == [0, 2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in second.history if row["kind"] == "train"] == list(range(1, 13))


def test_log_is_json_lines_with_means(config: TrainConfig, tmp_path: Path) -> None:
    coarse = train(config, model=bigram())
    fine = train(replace(config, log_every=1, out=str(tmp_path / "fine")), model=bigram())
    rows = [json.loads(line) for line in coarse.log.read_text().splitlines()]
    assert rows == list(coarse.history)
    every = {row["step"]: row for row in fine.history if row["kind"] == "train"}
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))
        assert row["bytes"] == row["step"] * 3 * 2 * 16
        if row["kind"] == "train":
            since = [every[step] for step in range(row["step"] - 2, row["step"] + 1)]
            assert row["loss"] == pytest.approx(np.mean([r["loss"] for r in since]), rel=1e-5)
            assert row["grad_norm"] == max(r["grad_norm"] for r in since)
            assert row["lr"] == learning_rate(config, row["step"] - 1, (row["step"] - 1) / 12)
            assert row["tokens_per_second"] > 0


def test_best_is_the_lowest_validation(config: TrainConfig) -> None:
    result = train(replace(config, lr=0.3, lr_final=1.0, steps=15), model=bigram())
    rows = {row["step"]: row["loss"] for row in result.history if row["kind"] == "validation"}
    assert result.best_validation_loss == min(rows.values())
    assert rows[result.best_step] == result.best_validation_loss
    assert result.best is not None
    with safe_open(result.best, "pt") as file:  # any safetensors reader will do
        assert all(name.startswith("model.") for name in file.keys())  # noqa: SIM118
    assert read_metadata(result.best)["state"]["step"] == result.best_step


class Clock:
    """A clock that goes on when a test says so, in the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        self.now += 1e-6  # no two readings are equal
        return self.now

    def ticks(self, seconds: float) -> Callable[[Event], None]:
        """A callback by which every step takes so long."""

        def told(event: Event) -> None:
            self.now += seconds if event.kind == "step" else 0.0

        return told


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(trainer, "time", found := Clock())
    return found


def test_minutes_alone_drive_the_schedule(config: TrainConfig, clock: Clock) -> None:
    config = replace(config, steps=None, max_minutes=0.6 / 60, log_every=1, eval_every=10**6, save_every=10**6)
    began = clock.now
    result = train(config, model=bigram(), callbacks=[clock.ticks(0.05)])
    assert result.stopped == "time"
    assert result.step == 12
    assert 0.6 <= result.elapsed_seconds <= clock.now - began < 0.65
    earlier = 0.0
    for row in result.history:
        if row["kind"] == "train":  # its step began between the row before it and this one
            low, high = (
                learning_rate(config, row["step"] - 1, seconds / 0.6) for seconds in (row["elapsed_seconds"], earlier)
            )
            assert low <= row["lr"] <= high
        earlier = row["elapsed_seconds"]
    # The time already spent is in the checkpoint, so the limit is one of the whole run.
    again = train(resume_config(config.out), resume=True, model=bigram())
    assert (again.stopped, again.step) == ("time", result.step)
    more = resume_config(config.out, max_minutes=60.0, steps=result.step + 2)
    longer = train(more, resume=True, model=bigram())
    assert (longer.stopped, longer.step) == ("steps", result.step + 2)
    assert longer.elapsed_seconds > result.history[-1]["elapsed_seconds"] >= 0.6


def test_minutes_beside_steps_only_stop(
    config: TrainConfig, uninterrupted: Callable[[TrainConfig], dict[str, Any]], clock: Clock
) -> None:
    result = train(replace(config, max_minutes=0.5 / 60), model=bigram(), callbacks=[clock.ticks(0.1)])
    assert result.stopped == "time"
    assert result.step == 5
    train(resume_config(config.out, max_minutes=60.0), resume=True, model=bigram())
    whole, parts = uninterrupted(config), outcome(Path(config.out))
    assert {k: v for k, v in parts.items() if k.startswith(f"{LAST} model")} == {
        k: v for k, v in whole.items() if k.startswith(f"{LAST} model")
    }


def test_steps_can_be_extended(config: TrainConfig) -> None:
    train(config, model=bigram())
    assert train(resume_config(config.out), resume=True, model=bigram()).step == 12
    assert train(resume_config(config.out, steps=14), resume=True, model=bigram()).step == 14


def test_second_signal_quits_at_once_and_handlers_return(config: TrainConfig) -> None:
    previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(config, model=bigram(), callbacks=[at_step(6, twice)])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == previous
    assert read_metadata(Path(config.out, LAST))["state"]["step"] == 4


def test_training_outside_the_main_thread(config: TrainConfig) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(train(config, model=bigram())))
    thread.start()
    thread.join()
    assert results[0].step == 12


def test_the_callers_random_numbers_are_left_alone(config: TrainConfig) -> None:
    torch.manual_seed(11)
    model = Bigram()
    state = torch.get_rng_state()
    train(config, model=model)
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_computes_in_bf16_and_keeps_fp32(config: TrainConfig, tmp_path: Path) -> None:
    seen = set()
    model = bigram()
    model.head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    result = train(replace(config, bf16=True), model=model)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    full = train(replace(config, out=str(tmp_path / "full")), model=bigram())
    assert result.validation_loss == pytest.approx(full.validation_loss, rel=0.02)


def test_events_tell_the_story(config: TrainConfig) -> None:
    events: list[Event] = []
    train(config, model=bigram(), callbacks=[events.append])
    assert events[0].kind == "start"
    assert events[0].values["parameters"] == sum(p.numel() for p in Bigram().parameters())
    assert [e.step for e in events if e.kind == "step"] == list(range(1, 13))
    assert [e.step for e in events if e.kind == "save"] == [0, 4, 8, 12]
    assert [e.step for e in events if e.kind == "validation"] == [0, 5, 10, 12]
    assert [e.step for e in events if e.kind == "train"] == [3, 6, 9, 12]
    assert [e.progress for e in events if e.kind == "step"] == pytest.approx([s / 12 for s in range(1, 13)])


def test_plot_is_a_picture(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "loss_plot", plots.loss_plot)
    picture = train(config, model=bigram()).plot.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert width > 600
    assert height > 400


# ---------------------------------------------------------------- what goes wrong


def test_full_disk_keeps_the_run(
    config: TrainConfig,
    uninterrupted: Callable[[TrainConfig], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device") as caught:
        train(config, model=bigram(), callbacks=[at_step(7, lambda: monkeypatch.setattr(os, "fsync", full))])
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert read_metadata(Path(config.out, LAST))["state"]["step"] == 4
    train(config, resume=True, model=bigram())
    assert outcome(Path(config.out)) == uninterrupted(config)


def test_full_disk_while_logging_names_the_log(config: TrainConfig) -> None:
    def shrink() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((Path(config.out) / LOG).stat().st_size + 10, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"cannot write .*log\.jsonl: File too large"):
            train(config, model=bigram(), callbacks=[at_step(6, shrink)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert train(config, resume=True, model=bigram()).step == 12


def test_unwritable_folder_shows_before_training(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/none")):
        with pytest.raises(OSError, match=r"."):
            train(replace(config, out=str(out)), model=bigram())


def test_existing_run_is_not_overwritten(config: TrainConfig) -> None:
    train(config, model=bigram())
    before = {path: path.read_bytes() for path in Path(config.out).iterdir()}
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(config, model=bigram())
    assert {path: path.read_bytes() for path in Path(config.out).iterdir()} == before


def test_two_processes_cannot_share_a_run(config: TrainConfig) -> None:
    def second() -> None:
        with pytest.raises(OSError, match="another process is training"):
            train(config, resume=True, model=bigram())

    assert train(config, model=bigram(), callbacks=[at_step(4, second)]).step == 12


@pytest.mark.parametrize("field", sorted({field.name for field in fields(TrainConfig)} - FREE))
def test_resume_refuses_another_configuration(field: str, config: TrainConfig) -> None:
    interrupted = train(config, model=bigram(), callbacks=[at_step(0, interrupt(), "start")])
    value = getattr(config, field)
    changed: Any = {"model": "gau", "size": "large", "objective": "mlm", "bf16": True}.get(field)
    if changed is None:
        changed = value * 0.5 if isinstance(value, float) else value + 1
    with pytest.raises(CheckpointError, match=f"another configuration: {field} is {value} .*, {changed} here"):
        resume_config(interrupted.out, **{field: changed})
    with pytest.raises(CheckpointError, match=f"{field} is {value} in the checkpoint"):
        train(replace(config, **{field: changed}), resume=True, model=bigram())


def test_resume_refuses_other_data_and_model(config: TrainConfig, text: Path, tmp_path: Path) -> None:
    train(config, model=bigram(), callbacks=[at_step(2, interrupt())])
    other = tmp_path / "other"
    for file in text.iterdir():
        write_tree(other, {file.name: file.read_bytes()})
    assert (
        train(replace(config, data=str(other)), resume=True, model=bigram(), callbacks=[at_step(3, interrupt())]).step
        == 3
    )
    before = (Path(config.out) / LAST).read_bytes()
    (other / "rhyme3.txt").write_bytes((other / "rhyme3.txt").read_bytes().swapcase())
    with pytest.raises(CheckpointError, match=r"another data: fingerprint is \w+ in the checkpoint, \w+ here"):
        train(replace(config, data=str(other)), resume=True, model=bigram())
    with pytest.raises(CheckpointError, match=r"embed\.weight is float32 \(256, 12\) in .*, float32 \(256, 13\) here"):
        train(config, resume=True, model=bigram(13))
    with pytest.raises(CheckpointError, match=r"0\.weight is not in the checkpoint"):
        train(config, resume=True, model=nn.Sequential(nn.Embedding(256, 256)))
    assert (Path(config.out) / LAST).read_bytes() == before


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    """Change a checkpoint, and make its checksums right."""
    tensors, metadata = read_checkpoint(path)
    change(tensors, metadata)
    write_checkpoint(path, tensors, {k: v for k, v in metadata.items() if k not in ("format", "tensors_digest")})


WRONG_RUNS: list[tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = [
    *(
        (
            lambda t, m, name=name, odd=odd: m["state"].update({name: odd}),
            rf"its `state`: `{name}` is .*; expected a finite",
        )
        for name, odd in [
            *(("step", "a"), ("step", -1), ("step", True), ("step", 1.0), ("step", 10**30)),
            *(("elapsed", None), ("elapsed", "1"), ("elapsed", -1.0), ("loss_steps", 1.5), ("validated", -2)),
            *(("best_loss", None), ("best_step", []), ("norm_max", {}), ("loss_sum", 3)),
        ]
    ),
    (lambda t, m: m["state"].update(more=1), "another state: more is only in the checkpoint"),
    (lambda t, m: m["state"].pop("step"), "another state: step is not in the checkpoint"),
    (lambda t, m: m.update(state=[]), r"its `state` is \[\]; expected an object"),
    (lambda t, m: m.pop("data"), "its `data` is None; expected an object"),
    (lambda t, m: m["data"].pop("fingerprint"), "another data: fingerprint is not in the checkpoint"),
    (lambda t, m: m.update(model=3), "its `model` is 3; expected an object"),
    (lambda t, m: m["config"].update(beta1="a"), "its `config`: TrainConfig: `beta1` is 'a'; expected float"),
    (lambda t, m: t.pop("optimizer.exp_avg.embed.weight"), "another model: optimizer.exp_avg.embed.weight is not in"),
    (
        lambda t, m: t.update({"optimizer.exp_avg.norm.bias": torch.zeros(3)}),
        r"bias is float32 \(3,\) in .* \(12,\) here",
    ),
    (lambda t, m: t.update({"optimizer.step.norm.bias": torch.zeros(2)}), r"norm.bias is float \(2,\) in the"),
    (
        lambda t, m: t.update({"optimizer.exp_avg.who": torch.zeros(1)}),
        "optimizer.exp_avg.who is only in the checkpoint",
    ),
    (lambda t, m: t.update({"junk": torch.zeros(1)}), "another model: junk is only in the checkpoint"),
]


@pytest.mark.parametrize("number", range(len(WRONG_RUNS)))
def test_resume_refuses_a_state_of_any_other_form(number: int, config: TrainConfig, interrupted: Path) -> None:
    change, message = WRONG_RUNS[number]
    shutil.copytree(interrupted, config.out)
    rewrite(Path(config.out, LAST), change)
    before = {path: path.read_bytes() for path in Path(config.out).iterdir()}
    with pytest.raises(CheckpointError, match=message):
        train(config, resume=True, model=bigram())
    assert {path: path.read_bytes() for path in Path(config.out).iterdir()} == before


@pytest.fixture(scope="module")
def interrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after four steps of the fixture `config`, with moments."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    options: dict[str, Any] = {"steps": 12, "batch": 3, "accumulate": 2, "length": 16, "lr": 0.02, "warmup": 3}
    options |= {"eval_windows": 6, "eval_every": 5, "save_every": 4, "log_every": 3, "validation_fraction": 0.2}
    config = TrainConfig(data=str(text), out=str(out), device="cpu", **options)
    train(config, model=bigram(), callbacks=[at_step(4, interrupt())])
    return out


def test_lines_that_are_no_rows_leave_the_log(config: TrainConfig, interrupted: Path) -> None:
    shutil.copytree(interrupted, config.out)
    log = Path(config.out, LOG)
    rows = log.read_bytes()
    odd: list[Any] = [
        7,
        [],
        {},
        {"step": 1},
        {"kind": "train", "step": "1", "loss": 1.0},
        {"kind": "x", "step": 1, "loss": 1.0},
    ]
    odd += [{"kind": "train", "step": 1, "loss": value} for value in (None, "a", 1e400, 10**400)]
    junk = b"\0\xff\n" + b"[" * 100_000 + b"\n" + b"".join(json.dumps(row).encode() + b"\n" for row in odd)
    log.write_bytes(junk + rows + junk)
    assert train(config, resume=True, model=bigram(), callbacks=[at_step(4, interrupt(), "start")]).step == 4
    assert log.read_bytes() == rows
    log.unlink()
    log.mkdir()
    with pytest.raises(ValueError, match=r"log\.jsonl: not a file"):
        train(config, resume=True, model=bigram())


def test_resume_from_weights_alone(config: TrainConfig) -> None:
    result = train(config, model=bigram())
    assert result.best is not None
    result.best.replace(result.checkpoint)
    with pytest.raises(CheckpointError, match="holds weights alone"):
        train(config, resume=True, model=bigram())


def test_resume_without_a_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    for call in (lambda: resume_config(tmp_path), lambda: train(config, resume=True, model=bigram())):
        with pytest.raises(FileNotFoundError, match="nothing to resume"):
            call()
    assert not Path(config.out).exists()


def test_diverging_run_stops_and_keeps_its_checkpoint(config: TrainConfig) -> None:
    def poison() -> None:
        with torch.no_grad():
            model.head.bias[0] = math.nan

    model = bigram()
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 6; .*step 4 is intact"):
        train(config, model=model, callbacks=[at_step(5, poison, "validation")])
    tensors, metadata = read_checkpoint(Path(config.out, LAST))
    assert metadata["state"]["step"] == 4
    assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("model."))


def test_text_shorter_than_a_window(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"0123456789" * 10)
    with pytest.raises(ValueError, match=r"validation text has 20 bytes; expected more than length = 32"):
        train(replace(config, data=str(tmp_path / "short"), length=32), model=bigram())
    assert not Path(config.out).exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", "cpu:x", "privateuseone"])
def test_devices_that_are_not_there(device: str, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=f"device: '{device}' cannot be used") as caught:
        train(replace(config, device=device), model=bigram())
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the command

app = typer.Typer(add_completion=False)
app.command()(train_command)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run `flashgau train` in this process, with the small model in the place of the named ones."""
    monkeypatch.setattr(trainer, "_build", lambda config: (bigram(), {"kind": config.model, "size": config.size}))
    common = [
        "--data",
        str(text),
        "--out",
        str(tmp_path / "run"),
        "--length",
        "16",
        "--validation-fraction",
        "0.2",
    ]

    def run(*arguments: str, plain: bool = False) -> Any:
        return CliRunner().invoke(app, [*arguments] if plain else [*common, *arguments])

    return run


def test_command_reports_as_json(command: Callable[..., Any], tmp_path: Path) -> None:
    result = command("--steps", "6", "--json", "--grad-clip", "0", "--bf16")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["step"] == 6
    assert report["stopped"] == "steps"
    assert "step 6/6  validation loss" in result.stderr
    stored = read_metadata(tmp_path / "run" / LAST)["config"]
    assert (stored["grad_clip"], stored["bf16"], stored["length"]) == (None, True, 16)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        LAST,
        BEST,
        LOG,
        PLOT,
        "config.json",
        ".lock",
    }
    again = command("--resume", "--out", str(tmp_path / "run"), "--steps", "8", plain=True)
    assert again.exit_code == 0
    assert "resumed at step 6" in again.stderr
    assert again.stdout.startswith("8 steps, ")
    assert len(again.stdout.splitlines()) == 3


def test_minutes_without_steps_lift_the_limit_of_steps(command: Callable[..., Any], tmp_path: Path) -> None:
    assert command("--max-minutes", "0.002").exit_code == 0
    stored = read_metadata(tmp_path / "run" / LAST)["config"]
    assert (stored["steps"], stored["max_minutes"]) == (None, 0.002)


BAD_CALLS = {
    "missing data": (["--data", "/no/such/text"], "does not exist"),
    "empty folder": (["--data", "EMPTY"], "no text in folder"),
    "bad steps": (["--steps", "0"], "`steps` is 0"),
    "bad rate": (["--lr", "nan"], "`lr` is nan"),
    "bad minutes": (["--max-minutes", "-1"], "`max_minutes` is -1.0"),
    "window too long": (["--length", "100000"], "expected more than length"),
    "bad device": (["--device", "cuda:77"], "cannot be used"),
    "no run": (["--resume", "--out", "EMPTY"], "nothing to resume"),
    "a run is there": (["--out", "RUN"], "already holds a run"),
    "out is a file": (["--out", "FILE"], "is not a folder"),
    "out under a file": (["--out", "FILE/x"], "Not a directory"),
    "out not permitted": (["--out", "/proc/x"], "/proc/x"),
    "other size": (
        ["--resume", "--out", "RUN", "--size", "huge"],
        "size is small in the checkpoint, huge here",
    ),
    "other data": (["--resume", "--out", "RUN", "--data", "FILE"], "has another data"),
    "other length": (
        ["--resume", "--out", "RUN", "--length", "17"],
        "length is 16 in the checkpoint, 17 here",
    ),
    "damaged": (["--resume", "--out", "DAMAGED"], "is damaged"),
    "cut off": (["--resume", "--out", "CUT"], "is damaged"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_give_one_line(case: str, command: Callable[..., Any], text: Path, tmp_path: Path) -> None:
    arguments, message = BAD_CALLS[case]
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("some text " * 100)
    if "RUN" in arguments or "DAMAGED" in arguments or "CUT" in arguments:
        assert command("--steps", "1", "--out", str(tmp_path / "RUN")).exit_code == 0
        whole = (tmp_path / "RUN" / LAST).read_bytes()
        write_tree(tmp_path, {f"CUT/{LAST}": whole[:-1], f"DAMAGED/{LAST}": whole[:-1] + bytes([whole[-1] ^ 1])})
    places = ("EMPTY", "FILE", "RUN", "DAMAGED", "CUT")
    result = command(*[re.sub(f"^({'|'.join(places)})", rf"{tmp_path}/\1", word) for word in arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("flashgau train: ")
    assert message in lines[0]


def test_full_disk_is_one_line(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = command("--steps", "2")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "No space left on device" in result.stderr


def test_help_states_the_defaults() -> None:
    options = {option.name: option for option in typer.main.get_command(app).params}
    assert options.keys() - {"resume", "json", "timeout"} == {field.name for field in fields(TrainConfig)} - {
        "beta1",
        "beta2",
    }
    assert all(option.help for option in options.values())
    assert f": {', '.join(KINDS)}." in options["model"].help
    assert f": {', '.join(SIZES)}." in options["size"].help
    assert all(name in options["objective"].help for name in OBJECTIVES)
    for field in fields(TrainConfig):
        if field.name in ("data", "max_minutes", "warmup", "checkpointing", "shard", "bf16", "beta1", "beta2"):
            continue
        option = options[field.name]
        stated = re.search(r"\[default: ([^,\]]+)", option.help)
        assert (stated[1] if stated else str(option.default)) == str(field.default)


def test_progress_bar_draws_in_a_terminal(config: TrainConfig) -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file, ProgressDisplay(console) as display:
        train(config, model=bigram(), callbacks=[display])
        shown = console.export_text()
        assert display.bar is not None
        task = display.bar.tasks[0]
        assert task.completed == 1.0
        assert task.fields["steps"] == "step 12/12"
        assert "bits/byte" in task.fields["loss"]
        assert "left" in task.fields["left"]
    assert "step 12/12  validation loss" in shown


DRIVER = """
import sys, time, torch
torch.set_num_threads(1)
from flashgau.training import trainer
take_step = trainer._Run.take_step
def take_step_or_wait(self):
    take_step(self)
    while self.state.step == 5 and not self.stop.signal:
        time.sleep(0.01)  # however late the signal comes, it comes in the middle of the run
trainer._Run.take_step = take_step_or_wait
from flashgau.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_ctrl_c_saves_and_the_resumed_run_is_bitwise_uninterrupted(config: TrainConfig, tmp_path: Path) -> None:
    """A real process, a real signal and a FLASH model; the same bits as in this process without any."""
    config = replace(config, size="tiny", batch=1, accumulate=1, length=80, eval_windows=2, steps=20)
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in config.to_dict().items()
        if name not in ("max_minutes", "checkpointing", "shard", "bf16", "beta1", "beta2")
    ]
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            whole = train(replace(config, out=str(tmp_path / "whole")))
            assert process.stderr is not None
            for line in process.stderr:
                if "step 3/20" in line:
                    process.send_signal(signal.SIGINT)
                    break
            output, errors = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "once more to quit at once" in errors
    assert "stopped by SIGINT, and saved" in output
    assert "Traceback" not in errors
    assert 3 <= read_metadata(Path(config.out, LAST))["state"]["step"] <= 5
    train(config, resume=True)
    assert outcome(Path(config.out)) == outcome(whole.out)
    loaded = load_model(whole.checkpoint)
    assert not loaded.training
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), whole.model(tokens))


ALONE = """
import os, sys, time, torch
torch.set_num_threads(1)
from flashgau.training import trainer
sys.path.insert(0, sys.argv[1])
from test_training import bigram
trainer._build = lambda config: (bigram(), {"kind": config.model})
trainer.loss_plot = lambda rows, path, title: path.write_bytes(b"plot")
take_step = trainer._Run.take_step
def take_step_and_wait(self):
    take_step(self)
    while self.state.step == 2 and not os.path.exists(sys.argv[2]):
        time.sleep(0.01)  # until the reader has gone
trainer._Run.take_step = take_step_and_wait
from flashgau.cli import main
sys.exit(main(["train", *sys.argv[3:]]))
"""


def test_a_reader_that_goes_away_does_not_end_a_training(text: Path, tmp_path: Path) -> None:
    """`flashgau train 2>&1 | head`: all steps are taken, logged and saved, and the process succeeds."""
    gone, out = tmp_path / "gone", tmp_path / "run"
    options = ["--data", str(text), "--out", str(out), "--steps", "9", "--log-every", "1", "--length", "16"]
    options += ["--save-every", "1000", "--eval-windows", "2", "--batch", "2", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-c", ALONE, str(Path(__file__).parent), str(gone), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        assert b"on cpu" in process.stdout.readline()
        process.stdout.close()
        gone.touch()
        assert process.wait() == 0
    assert read_metadata(out / LAST)["state"]["step"] == 9
    rows = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 10))


KILLED = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
from test_training import LAST, Path, TrainConfig, bigram, read_checkpoint, torch, train, trainer
torch.set_num_threads(1)
trainer.loss_plot = lambda rows, path, title: path.write_bytes(b"plot")
config, moments, kills, saved = TrainConfig(**json.loads(sys.argv[2])), random.Random(sys.argv[3]), 0, 0
last = Path(config.out, LAST)
while kills < 12:  # the run is longer than that, however fast the machine
    told, tell = os.pipe()
    child = os.fork()  # before this process has computed anything, so there are no threads to lose
    if child == 0:
        begun = last.exists()
        callback = lambda event: event.kind == "save" and os.write(tell, event.step.to_bytes(4, "big"))
        train(config, resume=begun, model=bigram(), callbacks=[callback])
        os._exit(0)
    os.close(tell)
    time.sleep(moments.random() ** 2 * 0.4)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    steps = os.read(told, 1 << 16)
    os.close(told)
    saved = max([saved, *(int.from_bytes(steps[i : i + 4], "big") for i in range(0, len(steps), 4))])
    if last.exists():  # whole, verified by its checksums, and at least the one that was last reported
        assert read_checkpoint(last)[1]["state"]["step"] >= saved, (saved, kills)
    assert last.exists() or not saved
    assert os.WIFSIGNALED(status), status
    kills += 1
print(saved)
"""


def test_killed_at_random_moments_no_checkpoint_is_lost(config: TrainConfig, tmp_path: Path) -> None:
    """SIGKILL, again and again, from the first moment on; in the end nothing can be told from a run in peace."""
    # A constant rate: the schedule does not depend on the number of steps, which the kills decide.
    config = replace(config, steps=10**9, lr_final=1.0, save_every=2, eval_every=10, log_every=5)
    seed = str(random.SystemRandom().random())
    arguments = [str(Path(__file__).parent), json.dumps(config.to_dict()), seed]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (seed, done.stderr)
    steps = int(done.stdout) // 10 * 10 + 30
    config = replace(config, steps=steps)
    whole = train(replace(config, out=str(tmp_path / "whole")), model=bigram())
    train(config, resume=(Path(config.out) / LAST).exists(), model=bigram())
    assert outcome(Path(config.out)) == outcome(whole.out), seed
    assert not list(Path(config.out).glob(".*.tmp"))


def test_named_models_that_do_not_exist(text: Path, tmp_path: Path) -> None:
    for arguments in (["--size", "gigantic"], ["--model", "rnn"]):
        result = CliRunner().invoke(app, ["--data", str(text), "--out", str(tmp_path / "run"), *arguments])
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert arguments[1] in result.stderr
        assert not (tmp_path / "run").exists()


def test_a_callers_own_model_is_not_loaded_by_name(config: TrainConfig) -> None:
    result = train(config, model=bigram())
    with pytest.raises(CheckpointError, match="a model of the caller's own"):
        load_model(result.checkpoint)

"""Training: what goes wrong, and what of the run stays."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from torch import nn
from training_runs import at_step, bigram, interrupt, outcome, write_tree

from flashgau.training import CheckpointError, TrainConfig, load_model, resume_config, train
from flashgau.training.checkpoint import read_checkpoint, read_metadata, write_checkpoint
from flashgau.training.config import FREE
from flashgau.training.folder import LAST, LOG

config = training_runs.config
quick_plots = training_runs.quick_plots
text = training_runs.text
uninterrupted = training_runs.uninterrupted


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


def test_a_callers_own_model_is_not_loaded_by_name(config: TrainConfig) -> None:
    result = train(config, model=bigram())
    with pytest.raises(CheckpointError, match="a model of the caller's own"):
        load_model(result.checkpoint)

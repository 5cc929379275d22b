"""Training by the command `flashgau train`."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
import typer
from training_runs import bigram, outcome, write_tree
from typer.testing import CliRunner

from flashgau.cli.training.train import ProgressDisplay
from flashgau.cli.training.train import train as train_command
from flashgau.models import KINDS, SIZES
from flashgau.training import TrainConfig, load_model, train, trainer
from flashgau.training.checkpoint import read_metadata
from flashgau.training.config import OBJECTIVES
from flashgau.training.folder import BEST, LAST, LOG, PLOT

config = training_runs.config
quick_plots = training_runs.quick_plots
text = training_runs.text

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
from training_runs import bigram
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


def test_named_models_that_do_not_exist(text: Path, tmp_path: Path) -> None:
    for arguments in (["--size", "gigantic"], ["--model", "rnn"]):
        result = CliRunner().invoke(app, ["--data", str(text), "--out", str(tmp_path / "run"), *arguments])
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert arguments[1] in result.stderr
        assert not (tmp_path / "run").exists()

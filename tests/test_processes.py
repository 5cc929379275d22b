"""Training in several processes: the same run as in one, whole or sharded, and checkpoints that go between them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from started import killed_at_the_end, started
from torch import nn
from training_runs import at_step, interrupt
from typer.testing import CliRunner

from flashgau.cli import app
from flashgau.models import CausalLM, MaskedLM, ModelConfig
from flashgau.training import Elsewhere, Processes, TrainConfig, launched, load_model, processes, train, trainer
from flashgau.training.checkpoint import read_checkpoint
from flashgau.training.folder import BEST, LAST, LOG

PAIR = 2


class Rough(nn.Module):
    """What a careless caller gives: dropout, a layer that is never used, and one that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unused = nn.Embedding(256, 6), nn.Linear(3, 3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(6, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.frozen(self.embed(tokens))))


def build(name: str) -> nn.Module:
    """In fp64, where "to rounding" leaves no room for mistakes."""
    torch.manual_seed(7)
    if name == "rough":
        return Rough().double()
    kind, objective = name.split(" ")
    config = ModelConfig(kind=kind, dim=16, depth=2, heads=2, key_dim=8, chunk_size=8, vocab_size=257)
    return (MaskedLM if objective == "mlm" else CausalLM)(config, dtype=torch.float64)


def configuration(folder: Path, out: str, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "data": str(folder / "text"),
        "out": str(folder / out),
        "steps": 5,
        "batch": 4,
        "accumulate": 2,
        "length": 20,
        "lr": 0.01,
        "grad_clip": 0.5,
        "eval_windows": 5,
        "eval_every": 2,
        "save_every": 2,
        "log_every": 2,
        "validation_fraction": 0.3,
        "device": "cpu",
    }
    return TrainConfig(**(options | changes))


# (folder, model, changes of the configuration, (process, step) of a signal, resume)
RUNS: list[tuple[str, str, dict[str, Any], tuple[int, int] | None, bool]] = [
    ("whole-clm", "flash clm", {}, None, False),
    ("shard-clm", "flash clm", {"shard": True}, None, False),
    ("whole-mlm", "transformer++ mlm", {"objective": "mlm"}, None, False),
    ("shard-mlm", "flash-quad mlm", {"objective": "mlm", "shard": True, "accumulate": 1}, None, False),
    ("whole-mc", "mc-tfm++ mlm", {"objective": "mlm", "accumulate": 3}, None, False),
    ("shard-plain", "transformer clm", {"shard": True}, None, False),
    ("shard-parts", "flash clm", {"shard": True}, (1, 3), False),
    ("shard-parts", "flash clm", {"shard": True}, None, True),
    ("to-one", "flash clm", {"shard": True}, (0, 3), False),
    ("from-one", "flash clm", {"shard": True}, None, True),
    ("from-one-whole", "flash clm", {}, None, True),
    ("rough", "rough", {"shard": True}, None, False),
    ("rough-parts", "rough", {"shard": True}, (0, 2), False),
    ("rough-parts", "rough", {"shard": True}, None, True),
    ("clock", "flash clm", {"steps": None, "max_minutes": 1e-3}, None, False),
    ("odd", "flash clm", {"batch": 3}, None, False),
    ("whole-clm", "flash clm", {}, None, False),
    ("nan", "flash clm", {"lr": 1e300}, None, False),
    ("nowhere", "flash clm", {"data": "PROCESS"}, None, False),
    ("other", "flash clm", {"seed": -1}, None, False),
]


UNBROKEN = [
    *("whole-clm", "shard-clm", "whole-mlm", "shard-mlm", "whole-mc", "shard-plain"),
    *("from-one", "from-one-whole"),
]


def stand_still(*ignored: Any) -> None:
    """Until somebody kills this process."""
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


def lose_one(rank: int, folder: Path, port: str) -> None:
    """A run of the command as torchrun starts it, in which the second process stands still; what the first one says."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(PAIR), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update(place, TORCHELASTIC_RUN_ID="still", TORCHELASTIC_USE_AGENT_STORE="True")
    if rank:  # in its next step, or if it is so slow that the first one gives up before
        trainer._Run.take_step = stand_still  # type: ignore[method-assign]
        processes._RollCall.__exit__ = stand_still  # type: ignore[method-assign]
    timeout = "1000" if rank else "2"
    said = CliRunner().invoke(app, ["train", "--resume", "--out", str(folder / "still"), "--timeout", timeout])
    (folder / "still.json").write_text(json.dumps({"code": said.exit_code, "said": said.stderr}))


def work(rank: int, place: str, port: str) -> None:
    """One of the two processes: every run in turn, and what became of it as JSON. The second one does not come back."""
    torch.set_num_threads(1)
    folder = Path(place)
    trainer.loss_plot = lambda rows, path, title: path.write_bytes(b"plot")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=PAIR)
    results: list[dict[str, Any]] = []
    take_step = trainer._Run.take_step
    for out, model, changes, stop, resume in RUNS:
        if changes.get("data"):
            changes = {"data": str(folder / "text") if rank == 0 else "/no/such/text"}
        if changes.get("seed"):
            changes = {"seed": rank}

        now = [0.0]  # by the clock of the second process the run would never end
        clock = SimpleNamespace(perf_counter=lambda now=now: now[0])
        trainer.time = clock if out == "clock" else time  # type: ignore[attr-defined]

        def step_and_stop(run: Any, stop: Any = stop, now: list[float] = now) -> None:
            take_step(run)
            now[0] += 0.025 if rank == 0 else 1e-6
            if (rank, run.state.step) == stop:
                signal.raise_signal(signal.SIGTERM)

        trainer._Run.take_step = step_and_stop  # type: ignore[method-assign]
        events: list[str] = []
        try:
            result = train(
                configuration(folder, out, **changes),
                resume=resume,
                model=build(model),
                callbacks=[lambda event, events=events: events.append(event.kind)],
            )
        except (ValueError, OSError, ArithmeticError) as error:
            other = isinstance(error.__cause__, Elsewhere)
            results.append({"error": type(error).__name__, "message": str(error), "elsewhere": other})
        else:
            results.append({**result.to_dict(), "events": events, "rows": result.history})
    (folder / f"results{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    trainer._Run.take_step = take_step  # type: ignore[method-assign]
    lose_one(rank, folder, port)


@pytest.fixture(scope="module")
def quick_plots() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "loss_plot", lambda rows, path, title: path.write_bytes(b"plot"))
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, quick_plots: None) -> tuple[Path, list[list[dict[str, Any]]]]:
    """All runs in two processes: their folder, and the results of each process."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "text").write_text(" ".join(f"{k} potato, {k + 1} potato" for k in range(200)))
    for out in ("from-one", "from-one-whole"):
        train(configuration(folder, out), model=build("flash clm"), callbacks=[at_step(3, interrupt(signal.SIGTERM))])
    train(
        configuration(folder, "still", size="tiny", accumulate=1, steps=9),
        callbacks=[at_step(1, interrupt(signal.SIGTERM))],
    )
    (folder / "still.safetensors").write_bytes((folder / "still" / LAST).read_bytes())
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # which torchrun would keep
    workers = [started("test_processes", rank, folder, store.port) for rank in range(PAIR)]
    with killed_at_the_end(workers):
        errors = [workers[0].communicate(timeout=600)[1]]
        workers[1].kill()  # it stands still
        errors.append(workers[1].communicate()[1])
    assert [worker.returncode for worker in workers] == [0, -signal.SIGKILL], "\n".join(errors)
    assert not re.search("Warning|Error", "".join(errors)), errors
    return folder, [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(PAIR)]


def result_of(pair: Any, out: str, number: int = -1) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run, and both processes' results of its last part (or another one)."""
    folder, results = pair
    places = [place for place, run in enumerate(RUNS) if run[0] == out]
    return folder / out, [rank[places[number]] for rank in results]


def assert_equal_runs(ours: Path, theirs: Path, **tolerance: float) -> None:
    """Weights, moments and rows of the log are equal, up to rounding if `tolerance` says so."""
    for file in (LAST, BEST):
        (tensors, one), (expected, other) = read_checkpoint(ours / file), read_checkpoint(theirs / file)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], msg=name, **tolerance)
        assert one["state"]["step"] == other["state"]["step"]
    rows, others = ([json.loads(line) for line in (p / LOG).read_text().splitlines()] for p in (ours, theirs))
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for key in row.keys() - {"elapsed_seconds", "tokens_per_second"}:
            # Sums of losses are kept in fp32, whatever the model's dtype.
            rounded = tolerance["rtol"] > 0 and key in ("loss", "bits_per_byte", "grad_norm")
            assert row[key] == (pytest.approx(other[key], rel=1e-6) if rounded else other[key])


ROUNDING = {"rtol": 1e-8, "atol": 1e-12}
EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.mark.parametrize("out", UNBROKEN)
def test_two_processes_are_one_to_rounding(out: str, pair: Any) -> None:
    """Also where one process began, and two, sharded or not, went on."""
    folder, results = result_of(pair, out, 0)
    model, changes = next(run[1:3] for run in RUNS if run[0] == out)
    alone = folder.with_name(f"{out}-alone")
    train(replace(configuration(folder.parent, alone.name, **changes), shard=False), model=build(model))
    assert_equal_runs(folder, alone, **ROUNDING)
    assert [(result["stopped"], result["step"]) for result in results] == [("steps", 5)] * PAIR
    assert results[0]["validation_loss"] == results[1]["validation_loss"]


def test_a_checkpoint_of_two_continues_in_one(pair: Any) -> None:
    folder, results = result_of(pair, "to-one")
    assert [(r["stopped"], r["signal"], r["step"]) for r in results] == [("signal", signal.SIGTERM, 3)] * PAIR
    alone = folder.with_name("to-one-alone")
    config = configuration(folder.parent, "to-one")
    assert train(config, resume=True, model=build("flash clm")).step == 5
    train(replace(config, out=str(alone)), model=build("flash clm"))
    assert_equal_runs(folder, alone, **ROUNDING)


@pytest.mark.parametrize(("parts", "whole"), [("shard-parts", "shard-clm"), ("rough-parts", "rough")])
def test_two_processes_stopped_and_resumed_are_bitwise_uninterrupted(parts: str, whole: str, pair: Any) -> None:
    """Wherever the signal came, both stop after the same step. Dropout differs between them, and repeats."""
    folder, results = result_of(pair, parts, 0)
    step = 3 if parts == "shard-parts" else 2
    assert [(r["stopped"], r["signal"], r["step"]) for r in results] == [("signal", signal.SIGTERM, step)] * PAIR
    assert_equal_runs(folder, folder.with_name(whole), **EXACT)


def test_only_the_first_process_speaks(pair: Any) -> None:
    _, (first, second) = result_of(pair, "whole-clm", 0)
    assert first["events"].count("step") == 5
    assert second["events"] == []
    _, (first, second) = result_of(pair, "shard-parts", 0)
    assert "stopping" in first["events"]  # although the signal came to the second


def test_the_clock_of_the_first_process_ends_a_run_for_all(pair: Any) -> None:
    _, results = result_of(pair, "clock")
    assert [r["stopped"] for r in results] == ["time"] * PAIR
    assert results[0]["step"] == results[1]["step"] == 3  # of 0.025 seconds, in 0.06
    rates = [[row["lr"] for row in r["rows"] if row["kind"] == "train"] for r in results]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("odd", "ValueError", "batch: 3 windows cannot be divided among 2 processes; expected a multiple of 2"),
        ("whole-clm", "FileExistsError", "already holds a run"),
        ("nan", "FloatingPointError", "is not finite at step"),
        ("nowhere", "FileNotFoundError", "data: /no/such/text does not exist"),
        ("other", "ValueError", "config: process 1 has {.*'seed': 1.*}; expected {.*'seed': 0.*}, as process 0 has"),
    ],
)
def test_errors_are_raised_in_all_processes_and_reported_by_one(out: str, error: str, message: str, pair: Any) -> None:
    _, results = result_of(pair, out)
    assert [r["error"] for r in results] == [error] * PAIR
    assert all(re.search(message, r["message"]) for r in results)
    assert sorted(r["elsewhere"] for r in results) == [False, True]


def test_a_process_that_stands_still_ends_the_run_with_its_number(pair: Any) -> None:
    """In one line, and the last checkpoint is what it was."""
    folder, _ = pair
    found = json.loads((folder / "still.json").read_text())
    assert found["code"] == 1
    *_, last = found["said"].splitlines()
    assert last == (
        "flashgau train: process 1 does not answer, and stands still or has ended; the others waited up to 2 seconds"
    )
    assert found["said"].count("flashgau train:") == 1
    assert (folder / "still" / LAST).read_bytes() == (folder / "still.safetensors").read_bytes()


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer")


@pytest.mark.parametrize(
    ("others", "error", "message", "elsewhere"),
    [
        ([None, "lost", None], LOST, "processes 1, 3 do not answer, and stand still or have ended; the others", False),
        (["lost", "failed", "done"], LOST, "process 2 failed", True),
        (["lost", "done", "lost"], LOST, "lost each other; one may be slower than 0 seconds: .*peer", False),
        ([None, None, None], dist.DistStoreError("wait timeout"), "processes 1, 2, 3 do not answer", False),
        ([None, None, None], RuntimeError("a shape is wrong"), None, False),
        ([None, None, None], KeyboardInterrupt(), None, False),
    ],
)
def test_what_those_that_are_left_say_of_the_others(
    others: list[Any], error: BaseException, message: str | None, elsewhere: bool
) -> None:
    """An error that is no other process's fault stays as it is, and waits for nobody."""
    store = dist.HashStore()
    store.set("flashgau/0", "done")  # in an earlier run

    def run(rank: int, count: int, words: list[Any], error: BaseException) -> None:
        with processes._RollCall(store, rank, count, 0.0):
            for other, word in enumerate(words, 1):
                if word:
                    store.set(f"flashgau/{other}", word)
            raise error

    with pytest.raises(TimeoutError if message else type(error), match=message) as caught:
        run(0, 4, others, error)
    assert isinstance(caught.value.__cause__, Elsewhere) == elsewhere
    assert store.get("flashgau/0") == (b"lost" if message else b"failed")
    with pytest.raises(TimeoutError) as caught:
        run(4, 6, [], LOST)  # the first process is there, and reports
    assert isinstance(caught.value.__cause__, Elsewhere)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), True, "5"])
def test_no_time_to_wait(timeout: Any, tmp_path: Path) -> None:
    said = r"timeout: .* is no time to wait; expected a number of seconds from 1 to 1e6"
    with pytest.raises(ValueError, match=said), launched(timeout):
        pass
    if isinstance(timeout, float):
        done = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), "--timeout", str(timeout)])
        assert done.exit_code == 1
        assert re.fullmatch(rf"flashgau train: {said}\n", done.stderr)
        assert not (tmp_path / "run").exists()


def test_alone_everything_is_what_it_was() -> None:
    with launched() as processes:
        assert processes == Processes()
    assert processes.largest(3.0) == processes.mean(torch.tensor(3.0)) == 3.0
    with pytest.raises(ZeroDivisionError) as caught:
        processes.everywhere(lambda: 1 // 0)
    assert caught.value.__cause__ is None


def test_torchrun_trains_one_model(pair: Any, tmp_path: Path) -> None:
    """The command as users start it: one report, one checkpoint, of the same numbers as without torchrun."""
    options = ["--data", str(pair[0] / "text"), "--size", "tiny", "--length", "64", "--batch", "2", "--steps", "3"]
    options += ["--eval-windows", "2", "--device", "cpu", "--seed", "3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PAIR)]
    command = [*launch, "--module", "flashgau", "train", *options, "--shard", "--out", str(tmp_path / "two"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert done.stderr.count("on cpu, 2 processes") == 1
    alone = train(
        TrainConfig(
            data=str(pair[0] / "text"),
            out=str(tmp_path / "one"),
            size="tiny",
            length=64,
            batch=2,
            steps=3,
            eval_windows=2,
            device="cpu",
            seed=3,
        )
    )
    assert report["validation_loss"] == pytest.approx(alone.validation_loss, rel=1e-5)
    assert report["parameters"] == alone.parameters
    loaded = load_model(tmp_path / "two" / LAST)
    for name, ours in loaded.state_dict().items():
        torch.testing.assert_close(ours, alone.model.state_dict()[name], rtol=1e-3, atol=1e-5)

"""Training: a run that was stopped and resumed leaves the bits of one without any stop."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training_runs import FIXTURES, at_step, bigram, interrupt, masked_model, outcome

from flashgau.models import KINDS, CausalLM, MaskedLM
from flashgau.training import Event, TrainConfig, learning_rate, load_model, resume_config, train, trainer
from flashgau.training.checkpoint import read_metadata
from flashgau.training.config import OBJECTIVES
from flashgau.training.folder import LAST, LOG

config = training_runs.config
quick_plots = training_runs.quick_plots
text = training_runs.text
uninterrupted = training_runs.uninterrupted


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


KILLED = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
from training_runs import LAST, Path, TrainConfig, bigram, read_checkpoint, torch, train, trainer
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

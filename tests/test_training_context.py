"""Training with windows cut among processes (`context_parallel`): the run of one process, and its checkpoints."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from started import finish, started
from torch import nn
from training_runs import at_step, interrupt

from flashgau.models import CausalLM, MaskedLM, ModelConfig
from flashgau.models.config import KINDS
from flashgau.training import Elsewhere, TrainConfig, evaluation, train, trainer
from flashgau.training.checkpoint import read_checkpoint
from flashgau.training.folder import BEST, LAST

STEPS = 20
MOST = 4  # processes
LONGEST = timedelta(minutes=5)  # that one of them waits for another


class Bigram(nn.Module):
    """A model that takes no slices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed(tokens)


def build(name: str) -> nn.Module:
    """In fp64."""
    torch.manual_seed(7)
    if name == "bigram":
        return Bigram().double()
    kind, objective, *narrow = name.split(" ")
    options: dict[str, Any] = {"kind": kind, "hidden": 2 if narrow else None, "checkpointing": kind == "flash-quad"}
    config = ModelConfig(dim=12, depth=2, heads=3, key_dim=8, chunk_size=8, vocab_size=257, **options)
    return (MaskedLM if objective == "mlm" else CausalLM)(config, dtype=torch.float64)


def configuration(folder: Path, out: str, model: str, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "data": str(folder / "text"),
        "out": str(folder / out),
        "objective": "mlm" if model.endswith("mlm") else "clm",
        "steps": STEPS,
        "batch": 2,
        "length": 20,  # two chunks of 8, and half a one
        "lr": 0.01,
        "grad_clip": 0.5,
        "eval_windows": 3,
        "eval_every": 5,
        "save_every": STEPS,
        "log_every": 5,
        "validation_fraction": 0.3,
        "device": "cpu",
    }
    return TrainConfig(**(options | changes))


SELDOM = {"eval_every": STEPS, "eval_windows": 1, "log_every": STEPS}  # all steps, and little else
FEW = {"steps": 3, "eval_every": 2, "save_every": 2, "log_every": 1}
# (folder, processes, model, changes of the configuration, step of a signal, resume)
RUNS: list[tuple[str, int, str, dict[str, Any], int | None, bool]] = [
    ("two-flash", 2, "flash clm", {"context_parallel": 2}, None, False),
    ("two-quad", 2, "flash-quad mlm", {"context_parallel": 2, **SELDOM}, None, False),
    ("two-plain", 2, "transformer clm", {"context_parallel": 2, **SELDOM}, None, False),
    ("two-gated", 2, "transformer++ mlm", {"context_parallel": 2}, None, False),
    ("two-mixed", 2, "mc-tfm++ clm", {"context_parallel": 2, **SELDOM}, None, False),
    ("three-flash", 3, "flash clm", {"context_parallel": 3}, None, False),
    ("three-flash-masked", 3, "flash mlm", {"context_parallel": 3, **SELDOM}, None, False),
    ("three-quad", 3, "flash-quad clm", {"context_parallel": 3}, None, False),
    ("three-plain", 3, "transformer mlm", {"context_parallel": 3, **SELDOM}, None, False),
    ("three-gated", 3, "transformer++ clm", {"context_parallel": 3, **SELDOM}, None, False),
    ("three-mixed", 3, "mc-tfm++ mlm", {"context_parallel": 3, **SELDOM}, None, False),
    ("shard", 2, "flash clm", {"context_parallel": 2, "shard": True, "accumulate": 2, **FEW}, None, False),
    ("mesh", 4, "flash clm", {"context_parallel": 2, **FEW}, None, False),
    ("mesh-shard", 4, "transformer mlm", {"context_parallel": 2, "shard": True, "accumulate": 2, **FEW}, None, False),
    ("from-one", 2, "flash clm", {"context_parallel": 2, **FEW}, None, True),
    ("to-one", 2, "flash clm", {"context_parallel": 2, **FEW}, 2, False),
    ("to-mesh", 2, "flash clm", {"context_parallel": 2, **FEW}, 2, False),
    ("to-mesh", 4, "flash clm", {"context_parallel": 2, "shard": True, **FEW}, None, True),
    ("divisor", 4, "flash clm", {"context_parallel": 3}, None, False),
    ("groups", 4, "flash clm", {"context_parallel": 2, "batch": 3}, None, False),
    ("chunks", 4, "flash clm", {"context_parallel": 4}, None, False),
    ("columns", 3, "flash-quad clm narrow", {"context_parallel": 3}, None, False),
    ("no-spread", 2, "bigram", {"context_parallel": 2}, None, False),
]
ERRORS = {
    "divisor": "context_parallel: 4 processes cannot be divided into groups of 3; expected a divisor of 4",
    "groups": "batch: 3 windows cannot be divided among 2 groups of 2 processes; expected a multiple of 2",
    "chunks": "context_parallel: 4 processes cannot share a window: cut_tokens: `parts` is 4; expected 1 to 3, as a "
    "`length` of 20 tokens has 3 chunks of 8",
    "columns": "context_parallel_gau: `v` has E = 2 columns; expected at least one for each of the 3 processes",
    "no-spread": "train: `model` is a Bigram, whose forward takes no `spread`; expected one that does, with "
    "context_parallel = 2",
}


def losses_of(config: TrainConfig, model: nn.Module, **options: Any) -> tuple[Any, list[float]]:
    """A run, and the losses of all its passes as they are added up in this process: the log has them in fp32."""
    losses: list[float] = []

    def recorded(*args: Any) -> torch.Tensor:
        losses.append((loss := evaluation.loss_sum(*args)).item())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "loss_plot", lambda rows, path, title: path.write_bytes(b"plot"))
        patch.setattr(trainer, "loss_sum", recorded)
        return train(config, model=model, **options), losses


def work(rank: int, place: str) -> None:
    """One of the processes: the runs of two, three and four of them in turn; what became of each as JSON."""
    torch.set_num_threads(1)
    folder = Path(place)
    results: dict[int, Any] = {}
    for count in range(2, MOST + 1):
        if rank >= count:
            continue
        meeting = f"file://{folder / f'meeting{count}'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=LONGEST)
        for number, (out, processes, model, changes, stop, resume) in enumerate(RUNS):
            if processes != count:
                continue
            try:
                result, losses = losses_of(
                    configuration(folder, out, model, **changes),
                    build(model),
                    resume=resume,
                    callbacks=[at_step(stop, interrupt(signal.SIGTERM))] if stop else [],
                )
            except ValueError as error:
                results[number] = {"error": str(error), "elsewhere": isinstance(error.__cause__, Elsewhere)}
            else:
                results[number] = {"step": result.step, "validation": result.validation_loss, "losses": losses}
        dist.destroy_process_group()
    (folder / f"results{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    """All runs: their folder, and for each the results of its processes."""
    folder = tmp_path_factory.mktemp("context")
    (folder / "text").write_text(" ".join(f"{k} potato, {k + 1} potato" for k in range(200)))
    losses_of(
        configuration(folder, "from-one", "flash clm", **FEW),
        build("flash clm"),
        callbacks=[at_step(2, interrupt(signal.SIGTERM))],
    )
    workers = [started("test_training_context", rank, folder) for rank in range(MOST)]
    said = finish(workers, 4 * LONGEST.total_seconds())
    assert not re.search("Warning|Error", said), said
    found = [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(MOST)]
    return folder, [[found[rank][str(place)] for rank in range(run[1])] for place, run in enumerate(RUNS)]


def place_of(out: str) -> int:
    """Where the last run of that folder is."""
    return max(place for place, run in enumerate(RUNS) if run[0] == out)


def close(ours: Any, theirs: Any, what: str) -> None:
    """Equal to 1e-10 of the larger of 1 and the largest value."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    assert a.shape == b.shape, what
    error = float((a - b).abs().max()) if a.numel() else 0.0
    assert error <= 1e-10 * max(1.0, float(b.abs().max())), (what, error)


def check_checkpoints(ours: Path, theirs: Path) -> None:
    """The same names, weights and moments."""
    for file in (LAST, BEST):
        (tensors, one), (expected, other) = read_checkpoint(ours / file), read_checkpoint(theirs / file)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            close(tensor, expected[name], f"{file} {name}")
        assert one["state"]["step"] == other["state"]["step"]


UNBROKEN = [run[0] for run in RUNS if run[0].startswith(("two-", "three-"))] + ["shard", "mesh", "mesh-shard"]


@pytest.mark.parametrize("out", UNBROKEN)
def test_processes_that_share_windows_are_one(out: str, runs: Any) -> None:
    """Losses of every step, weights, moments and the validation, after 20 steps or 3; also beside other windows."""
    folder, found = runs
    place = place_of(out)
    _, _, model, changes, _, _ = RUNS[place]
    config = replace(configuration(folder, out, model, **changes), shard=False, context_parallel=1)
    alone, losses = losses_of(replace(config, out=str(folder / f"{out}-alone")), build(model))
    results = found[place]
    assert [result["step"] for result in results] == [config.steps] * len(results)
    passes = list(zip(*(result["losses"] for result in results), strict=True))
    assert len(passes) == config.steps * config.accumulate
    close([sum(own) for own in passes], losses, "losses")
    close([result["validation"] for result in results], [alone.validation_loss] * len(results), "validation")
    check_checkpoints(folder / out, folder / f"{out}-alone")


def test_every_kind_of_model_is_trained_by_two_and_by_three() -> None:
    """For as many steps as are asked for, the tests above say."""
    complete = {(run[1], run[2].split(" ")[0]) for run in RUNS if run[0] in UNBROKEN and "steps" not in run[3]}
    assert complete == set(product((2, 3), KINDS))


@pytest.mark.parametrize("out", ["from-one", "to-one", "to-mesh"])
def test_checkpoints_continue_in_other_processes(out: str, runs: Any) -> None:
    """From one to two that share windows, and the reverse, and to two such pairs, sharded."""
    folder, found = runs
    config = replace(configuration(folder, out, "flash clm", **FEW))
    if out == "to-one":
        assert [result["step"] for result in found[place_of(out)]] == [2, 2]
        assert losses_of(config, build("flash clm"), resume=True)[0].step == 3
    else:
        assert {result["step"] for result in found[place_of(out)]} == {3}
    losses_of(replace(config, out=str(folder / f"{out}-alone")), build("flash clm"))
    check_checkpoints(folder / out, folder / f"{out}-alone")


@pytest.mark.parametrize("out", ERRORS)
def test_what_cannot_be_cut_is_refused_before_anything_is_written(out: str, runs: Any) -> None:
    folder, found = runs
    results = found[place_of(out)]
    assert [result["error"] for result in results] == [ERRORS[out]] * len(results)
    assert sorted(result["elsewhere"] for result in results) == [False] + [True] * (len(results) - 1)
    assert not (folder / out).exists()


def test_one_process_has_no_others(runs: Any) -> None:
    folder, _ = runs
    config = configuration(folder, "one", "flash clm", context_parallel=2)
    with pytest.raises(ValueError, match="context_parallel: 1 process cannot be divided into groups of 2; expected a"):
        train(config, model=build("flash clm"))
    with pytest.raises(ValueError, match="`context_parallel` is 0; expected a positive number"):
        configuration(folder, "one", "flash clm", context_parallel=0)

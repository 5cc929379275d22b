"""Training: the loop, against what it should compute, and what it tells."""

from __future__ import annotations

import json
import math
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs
from safetensors import safe_open
from training_runs import Bigram, at_step, bigram, masked_model

from flashgau.training import Event, TrainConfig, TrainResult, learning_rate, load_corpus, plots, train, trainer
from flashgau.training.checkpoint import read_checkpoint, read_metadata
from flashgau.training.data import sample_starts, windows
from flashgau.training.folder import LAST
from flashgau.training.objective import examples, mask_seeds
from flashgau.training.optimization import parameter_groups

config = training_runs.config
quick_plots = training_runs.quick_plots
text = training_runs.text


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

"""`flashgau sample`, `flashgau eval`, and what they stand on: decoding and the loss of a whole text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from flashgau.cli import app, main
from flashgau.models import KINDS, CausalLM, Encoder, MaskedLM, ModelConfig, sample
from flashgau.training import TrainConfig, evaluate, load_model, load_text, train, trainer
from flashgau.training.folder import BEST, LAST
from flashgau.training.objective import examples, fixed_mask_seeds

WRONG_MODELS: dict[str, str] = {
    "option_of_2027": json.dumps({"class": "CausalLM", "config": {"layer": {"option_of_2027": 1}}}),
    "no_class": json.dumps({"config": {}}),
    "no_object": "7",
    "not_json": "{",
    "wrong_type": json.dumps({"class": "CausalLM", "config": {"dim": "a"}}),
    "unhashable": json.dumps({"class": [], "config": {}}),
    "nested": "[" * 100_000,
    "digits": '{"class": "CausalLM", "config": {"dim": ' + "9" * 5000 + "}}",
    "wide": json.dumps({"class": "CausalLM", "config": {"dim": 10**9, "depth": 1}}),
    "wider": json.dumps({"class": "CausalLM", "config": {"dim": 10**30, "depth": 1}}),
    "deep": json.dumps({"class": "CausalLM", "config": {"depth": 100_000}}),
    "colour": json.dumps({"class": "\x1b[31m\n", "config": {}}),
}

SENTENCE = "one potato, two potato, three potato, four; "


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a short run of each objective, and models of other kinds."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_text(SENTENCE * 60)
    (folder / "short").write_text(SENTENCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "loss_plot", lambda rows, path, title: path.write_bytes(b"plot"))
        for objective in ("clm", "mlm"):
            config = TrainConfig(
                objective=objective,
                data=str(folder / "text"),
                out=str(folder / objective),
                size="tiny",
                model="transformer++",
                steps=20,
                batch=4,
                length=32,
                lr=3e-3,
                eval_windows=2,
                eval_every=20,
                device="cpu",
            )
            train(config)
    small = ModelConfig(dim=8, depth=1, key_dim=4, chunk_size=4)
    CausalLM(small).save(folder / "saved.safetensors")
    Encoder(small).save(folder / "encoder.safetensors")
    CausalLM(ModelConfig(dim=8, depth=1, key_dim=4, chunk_size=4, vocab_size=300)).save(folder / "words.safetensors")
    lost = CausalLM(small)
    with torch.no_grad():
        lost.stack.embedding.weight[3, 4] = math.nan
    lost.save(folder / "nan.safetensors")
    for name, description in WRONG_MODELS.items():
        save_file({"stack.layers.0.a": torch.zeros(1)}, folder / f"wrong_{name}", {"flashgau_model": description})
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- decoding --------------------------------------------------------------------------------------------------------

VARIANTS: list[tuple[str, dict[str, Any]]] = [(kind, {}) for kind in KINDS] + [
    ("flash", {"spec": "lucidrains", "layer": {"token_shift": True}}),
    ("flash-quad", {"spec": "gau-alpha"}),
    ("mc-tfm++", {"checkpointing": True, "tied": False}),
]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
@given(prompts=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=5)
@torch.no_grad()
def test_generation_draws_from_the_parallel_forward(
    kind: str, changes: dict[str, Any], prompts: list[int], seed: int
) -> None:
    """Each new token of unequal prompts is drawn from the logits of the whole text so far, by the same generator."""
    torch.manual_seed(0)
    described = ModelConfig(kind=kind, dim=16, depth=2, heads=2, key_dim=8, chunk_size=4, vocab_size=23, **changes)
    model = CausalLM(described, dtype=torch.float64).eval()
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 9, "top_p": 0.9}
    new, rows, lengths = 7, torch.arange(len(prompts)), torch.tensor(prompts)
    text = torch.zeros(len(prompts), max(prompts) + new, dtype=torch.long)
    text[:, : max(prompts)] = torch.randint(23, (len(prompts), max(prompts)))
    prompt, generator = text[:, : max(prompts)].clone(), torch.Generator().manual_seed(seed)
    for step in range(new):
        logits = model(text, lengths + step)[rows, lengths + step - 1]
        text[rows, lengths + step] = sample(logits, generator=generator, **options)
    expected = torch.stack([text[row, n : n + new] for row, n in enumerate(prompts)])
    assert torch.equal(model.generate(prompt, new, lengths=lengths, seed=seed, **options), expected)


def drawn(logits: list[float], **options: Any) -> set[int]:
    """The tokens that 4000 draws give: all that can be drawn, if they are few and about equally likely."""
    rows = torch.tensor([logits]).expand(4000, len(logits))
    return set(sample(rows, generator=torch.Generator().manual_seed(1), **options).tolist())


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-320, 1e-40, 1e-38])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e38])
def test_the_coldest_draw_is_the_most_likely_token(temperature: float, scale: float) -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(2)).mul(scale)
    logits[:, 3] = -torch.inf
    assert torch.equal(sample(logits, temperature), logits.argmax(-1))
    assert drawn([-1e30, 2.0, -torch.inf, 2.0], temperature=temperature) <= {1, 3}


@pytest.mark.parametrize("temperature", [1e30, 1e300, 1.7e308])
def test_the_hottest_draw_is_any_token_that_can_be_drawn(temperature: float) -> None:
    assert drawn([5.0, -torch.inf, -1e3, 0.0], temperature=temperature) == {0, 2, 3}


@pytest.mark.parametrize("count", range(1, 9))
def test_the_fewest_tokens_that_reach_a_probability(count: int) -> None:
    """Of eight tokens of 1/8 each, k reach k/8 exactly, and not one more is taken; k - 1 do not reach it."""
    assert len(drawn([0.0] * 8, top_p=count / 8)) == count
    assert len(drawn([0.0] * 8 + [-torch.inf] * 5, top_p=count / 8)) == count
    assert len(drawn([0.0] * 8, top_p=(count - 0.5) / 8)) == count
    assert len(drawn([0.0] * 16 + [-1.0], top_k=8, top_p=count / 8)) == count
    assert len(drawn([0.0] * 9, top_k=count)) == count  # of equally likely ones too
    assert drawn([0.0, 4.0, 4.0, 9.0], top_p=1e-320) == {3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"temperature": value}, f"`temperature` is {value}") for value in (math.inf, math.nan, -1.0)),
        ({"top_k": 0}, "`top_k` is 0; expected at least 1"),
        *(({"top_p": value}, f"`top_p` is {value}; expected more than 0") for value in (0.0, 1.5, math.nan)),
    ],
)
def test_sampling_refuses_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sample: {message}"):
        sample(torch.zeros(1, 4), **options)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_refused(wrong: float, temperature: float) -> None:
    for row in ([0.0, wrong, 1.0], [-math.inf] * 3):
        with pytest.raises(ValueError, match="sample: `logits` are NaN or infinite"):
            sample(torch.tensor([[0.0, 1.0, 2.0], row]), temperature)


def test_seeds_are_those_of_64_bits() -> None:
    model = CausalLM(ModelConfig(dim=8, depth=1, key_dim=4, chunk_size=4)).eval()
    prompt = torch.zeros(1, 3, dtype=torch.long)
    texts = [model.generate(prompt, 30, seed=seed) for seed in (0, 2**63 + 1, 2**64 - 1, np.uint64(2**64 - 1))]
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1], texts[2])
    assert torch.equal(texts[2], texts[3])
    for seed in (-1, 2**64, 10**20):
        with pytest.raises(ValueError, match=rf"generate: `seed` is {seed}; expected an integer from 0 to 2\^64 - 1"):
            model.generate(prompt, 3, seed=seed)


# --- sample ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["clm", f"clm/{BEST}"])
def test_sample_is_what_the_model_generates(where: str, runs: Path) -> None:
    options = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "seed": 5}
    model = load_model(runs / "clm" / BEST)
    new = model.generate(torch.tensor([list(b"two pot")]), 120, **options)
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = run("sample", runs / where, "--prompt", "two pot", "--max-new", 120, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    text = bytes(new[0].tolist()).decode(errors="replace")
    assert report["text"] == "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    assert (report["new_bytes"], report["stopped"], report["seed"]) == (120, False, 5)
    plain = run("sample", runs / where, "--prompt", "two pot", "--max-new", 120, *flags)
    assert plain.stdout == "two pot" + report["text"] + "\n"


def test_sample_stops_and_draws_anew(runs: Path) -> None:
    free = [json.loads(run("sample", runs / "clm", "--max-new", 80, "--json").stdout) for _ in range(2)]
    assert free[0]["seed"] != free[1]["seed"]
    assert free[0]["text"] != free[1]["text"]
    again = run("sample", runs / "clm", "--max-new", 80, "--seed", free[0]["seed"], "--json")
    assert json.loads(again.stdout)["text"] == free[0]["text"]
    command = ("sample", runs / "clm", "--temperature", 0, "--prompt", "one", "--max-new", 200)
    whole = json.loads(run(*command, "--json").stdout)["text"]
    letter = next(c for c in whole if c.isalpha())
    stopped = json.loads(run(*command, "--stop", letter, "--stop", r"\n", "--json").stdout)
    assert stopped["stopped"]
    assert stopped["text"] == whole[: whole.index(letter) + 1]
    assert json.loads(run(*command[:-1], 0, "--json").stdout)["new_bytes"] == 0


def test_sample_at_any_temperature_and_seed(runs: Path) -> None:
    command = ("sample", runs / "saved.safetensors", "--max-new", 20, "--prompt", "one", "--temperature")
    cold = [run(*command, temperature, "--seed", 2**64 - 1).stdout for temperature in ("0", "1e-40", "1e-320")]
    assert cold[0] == cold[1] == cold[2] != ""
    assert run(*command, "1e30").exit_code == 0


def test_sample_takes_a_saved_model(runs: Path) -> None:
    assert json.loads(run("sample", runs / "saved.safetensors", "--max-new", 3, "--json").stdout)["new_bytes"] == 3


# --- eval ------------------------------------------------------------------------------------------------------------


def clm_by_hand(model: Callable[[torch.Tensor], torch.Tensor], text: bytes, context: int) -> float:
    """-log p of every byte but the first, one at a time, from those before it in its window."""
    total = 0.0
    for place in range(1, len(text)):
        first = (place - 1) // context * context
        logits = model(torch.tensor([list(text[first:place])]))[0, -1].double()
        total -= float(logits.log_softmax(-1)[text[place]])
    return total / (len(text) - 1)


@pytest.mark.parametrize("context", [1, 7, 32, 500])
@torch.no_grad()
def test_eval_is_the_loss_by_hand(context: int, runs: Path) -> None:
    text = (runs / "short").read_bytes()
    result = run("eval", runs / "clm", "--data", runs / "short", "--context", context, "--batch", 3, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    expected = clm_by_hand(load_model(runs / "clm" / BEST), text, context)
    assert report["loss"] == pytest.approx(expected, rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-5)
    assert (report["targets"], report["bytes"], report["objective"]) == (len(text) - 1, len(text), "clm")
    assert report["context"] == min(context, len(text) - 1)


@torch.no_grad()
def test_eval_of_a_masked_model_is_the_loss_by_hand(runs: Path) -> None:
    text, model = load_text(runs / "text"), load_model(runs / "mlm" / BEST)
    report = json.loads(run("eval", runs / "mlm", "--data", runs / "text", "--json").stdout)
    assert report["context"] == 32  # as in training
    losses = []
    full, rest = divmod(text.size, 32)
    for places, length in ((np.arange(full) * 32, 32), (np.array([full * 32]), rest)):
        inputs, targets = examples("mlm", text, places, length, fixed_mask_seeds(len(places)))
        for x, y in zip(inputs, targets, strict=True):
            log_p = model(x[None])[0].double().log_softmax(-1)
            losses += [-float(log_p[i, y[i]]) for i in range(length) if y[i] >= 0]
    assert report["targets"] == len(losses)
    assert abs(report["targets"] - 0.15 * text.size) < 5 * math.sqrt(0.15 * 0.85 * text.size)
    assert report["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_eval_of_the_validation_text_is_the_validation_of_the_run(objective: str, runs: Path) -> None:
    """Where validation takes every window of its text, it is what `flashgau eval` says of that text."""
    text = np.frombuffer((runs / "text").read_bytes(), np.uint8)
    config = TrainConfig(
        objective=objective,
        data=str(runs / "text"),
        out=str(runs / f"again-{objective}"),
        size="tiny",
        steps=2,
        batch=3,
        length=32,
        validation_fraction=(4 * 32 + 1) / text.size,
        eval_windows=4,
        device="cpu",
    )
    result = train(config)
    part = text[-result.data["validation_bytes"] :]
    assert part.size == 4 * 32 + 1
    part = part if objective == "clm" else part[:-1]
    found = evaluate(load_model(result.checkpoint), part, context=32, objective=objective)
    assert found.loss == pytest.approx(result.validation_loss, rel=1e-6)


@given(size=st.integers(2, 90), context=st.integers(1, 40), batch=st.integers(1, 5))
@settings(max_examples=25)
def test_every_byte_but_the_first_is_predicted_once(size: int, context: int, batch: int) -> None:
    """A model that knows nothing but how often each byte comes: its loss is the empirical cross-entropy."""
    text = np.random.default_rng(size).integers(0, 4, size, dtype=np.uint8)
    logits = torch.randn(256, generator=torch.Generator().manual_seed(1)).double()
    model = nn.Embedding.from_pretrained(logits.expand(256, 256))
    told: list[int] = []
    found = evaluate(model, text, context=context, batch=batch, told=told.append)
    counts = torch.bincount(torch.from_numpy(text[1:].astype(np.int64)), minlength=256)
    expected = -(counts * logits.log_softmax(-1)).sum() / counts.sum()
    assert found.targets == size - 1
    assert found.loss == pytest.approx(expected.item(), rel=1e-9)
    assert told == sorted(set(told))
    assert told[-1] == size - 1


def test_eval_leaves_the_model_as_it_was_and_refuses_nonsense() -> None:
    model = nn.Sequential(nn.Embedding(257, 257), nn.Dropout(0.5)).train()
    text = np.arange(50, dtype=np.uint8)
    assert evaluate(model, text, context=8).loss == evaluate(model, text, context=8).loss
    assert model.training
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"context": 0}, text, "`context` is 0; expected at least 1"),
        ({"context": 4, "batch": 0}, text, "`batch` is 0"),
        ({"context": 4, "objective": "rtd"}, text, "`objective` is 'rtd'; expected 'clm' or 'mlm'"),
        ({"context": 4}, text[:1], r"`text` has shape \(1,\)"),
        ({"context": 4}, text.astype(np.int64), "dtype int64; expected"),
        ({"context": 1, "objective": "mlm"}, text[:2], "2 bytes, none of which is masked"),
    ]
    for options, given_text, message in cases:
        with pytest.raises(ValueError, match=rf"evaluate: .*{message}"):
            evaluate(model, given_text, **options)


# --- help and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sample", "eval", "train"])
def test_help_has_examples_on_lines_of_their_own(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"\n  Examples:\n    flashgau {command} " in result.stdout


FAILURES: list[tuple[list[str], int, str]] = [
    (["sample", "NOWHERE"], 1, "does not exist"),
    (["sample", "a" * 5000], 1, "File name too long: aaa"),
    (["eval", "clm", "--data", "a" * 5000], 1, "File name too long: aaa"),
    (["sample", "."], 1, "checkpoint . is not a file"),
    (["sample", "/dev/null"], 1, "checkpoint /dev/null is not a file"),
    (["sample", "text"], 1, "damaged or not a safetensors file"),
    (["sample", "mlm"], 1, "holds a masked model, which fills in bytes; expected a causal one"),
    (["sample", "encoder.safetensors"], 1, "holds a Encoder with a vocabulary of 256; expected a CausalLM"),
    (["sample", "words.safetensors"], 1, "holds a CausalLM with a vocabulary of 300; expected a CausalLM of 256"),
    (["sample", "clm", "--prompt", ""], 2, "--prompt is empty"),
    (["sample", "clm", "--stop", "ab"], 2, "--stop is 'ab'; expected one character"),
    (["sample", "clm", "--stop", "é"], 2, "expected one character of one byte"),
    (["sample", "clm", "--top-p", "0"], 1, "`top_p` is 0.0; expected more than 0"),
    (["sample", "clm", "--temperature", "-1"], 2, "--temperature"),
    (["sample", "saved.safetensors", "--prompt", "a", "--temperature", "inf"], 2, "--temperature is inf"),
    (["sample", "saved.safetensors", "--prompt", "a", "--temperature", "nan"], 2, "--temperature"),
    (["sample", "saved.safetensors", "--seed", "99999999999999999999"], 2, "'--seed'"),
    (["check", "--seed", "99999999999999999999"], 2, "'--seed'"),
    (["sample", "nan.safetensors"], 1, "nan.safetensors holds weights that are infinite or no numbers"),
    *((["sample", f"wrong_{name}"], 1, f"wrong_{name} ") for name in WRONG_MODELS),
    (["eval", "wrong_deep", "--data", "text"], 1, "wrong_deep "),
    (["sample", "clm", "--device", "abacus"], 2, "device 'abacus' cannot be used"),
    (["sample"], 2, "CHECKPOINT"),
    (["eval", "clm"], 2, "--data"),
    (["eval", "clm", "--data", "NOWHERE"], 1, "does not exist; expected a file or a folder"),
    (["eval", "saved.safetensors", "--data", "text"], 1, "expected --context"),
    (["eval", "clm", "--data", "text", "--context", "0"], 2, "--context"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), FAILURES, ids=lambda value: str(value)[:40])
def test_failures_are_one_line(
    arguments: list[str],
    status: int,
    message: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    assert main(arguments) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith(f"flashgau {arguments[0]}: ")
    assert message in output.err


def test_masked_checkpoints_are_masked_models(runs: Path) -> None:
    assert type(load_model(runs / "mlm" / LAST)) is MaskedLM
    assert type(load_model(runs / "clm" / LAST)) is CausalLM

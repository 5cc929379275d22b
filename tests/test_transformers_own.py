"""flashgau's models as models of transformers: the same numbers, and everything that works on such models works."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys

import pytest
import torch
from cli_runs import runner
from hypothesis import given
from hypothesis import strategies as st
from small_models import VARIANTS, causal, config, stirred, tokens
from test_extras import run_without
from torch import nn
from transformers_wheel import hooked  # noqa: F401  # a fixture

from flashgau.models import CausalLM, Encoder, MaskedLM, ModelConfig

transformers = pytest.importorskip("transformers", minversion="5.5")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

from flashgau.integrations import transformers as ours  # noqa: E402

EXACT = {"rtol": 1e-10, "atol": 1e-11}
each = pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=[kind for kind, _ in VARIANTS])
each_class = pytest.mark.parametrize("name", ["FlashGauModel", "FlashGauForCausalLM", "FlashGauForMaskedLM"])


def small(name, **changes):
    """A model of this class, in fp32."""
    torch.manual_seed(0)
    values = {"dim": 24, "depth": 2, "key_dim": 8, "chunk_size": 4, "vocab_size": 23}
    return stirred(getattr(ours, name)(ours.FlashGauConfig(**(values | changes))))


def first(output):
    """Logits or hidden vectors."""
    return output.logits if "logits" in output else output.last_hidden_state


@each
def test_logits_files_and_greedy_tokens_are_those_of_the_native_model(kind, changes, tmp_path):
    native = causal(kind, **changes)
    text = tokens(2, 11)
    model = ours.to_transformers(native)
    assert torch.equal(model(text).logits, native(text))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.native() == native.config
    assert again.dtype == torch.float64
    assert not any(x.data_ptr() % 64 for x in again.parameters())
    assert torch.equal(again(text).logits, native(text))
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(text).last_hidden_state, native.stack(text)[0])
    found = again.generate(text, max_new_tokens=9, do_sample=False)
    assert torch.equal(found[:, 11:], native.generate(text, 9, temperature=0))


@each
def test_beams_are_those_without_a_cache(kind, changes):
    model, text = ours.to_transformers(causal(kind, **changes)), tokens(2, 6)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    assert torch.equal(model.generate(text, **options), model.generate(text, use_cache=False, **options))


@each
def test_padding_on_either_side_changes_nothing(kind, changes):
    model, text = ours.to_transformers(causal(kind, **changes)), tokens(1, 7)
    whole, alone = tokens(1, 11, seed=1), model(text).logits
    for padded in (slice(4, None), slice(7)):
        batch, mask = torch.full((2, 11), 10**6), torch.zeros(2, 11)  # padding is not even a token
        batch[0], batch[1, padded] = whole, text
        mask[0], mask[1, padded] = 1, 1
        torch.testing.assert_close(model(batch, attention_mask=mask).logits[1:, padded], alone, **EXACT)
    left = torch.cat((whole, torch.cat((torch.zeros(1, 4, dtype=torch.int64), text), 1)))
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
    found = model.generate(left, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(found[1:, 11:], model.generate(text, max_new_tokens=5, do_sample=False)[:, 7:])
    assert torch.equal(found[:1], model.generate(whole, max_new_tokens=5, do_sample=False))


def test_a_cache_is_constant_written_in_place_and_continued_later():
    model, text = small("FlashGauForCausalLM"), tokens(1, 9)
    with torch.no_grad():
        cache = model(text[:, :5], use_cache=True).past_key_values
        kept, memory = copy.deepcopy(cache), cache.state.layers[0].memory.kv
        before = memory.clone()
        logits = model(text[:, 5:], past_key_values=cache).logits
        assert cache.state.layers[0].memory.kv is memory
        assert not torch.equal(memory, before)
        torch.testing.assert_close(logits, model(text).logits[:, 5:], rtol=1e-4, atol=1e-5)
        assert (cache.get_seq_length(), kept.get_seq_length()) == (9, 5)
        # What generate is given it continues, and does not read again.
        found = model.generate(text, past_key_values=kept, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, model.generate(text, max_new_tokens=4, do_sample=False))
        kept.reset()
        assert kept.state is None
    with pytest.raises(ValueError, match="FlashGauCache"):
        cache.crop(1)


def test_weights_written_unnoticed_are_seen_by_the_next_generate():
    model, text = small("FlashGauForCausalLM"), tokens(1, 5)
    model.generate(text, max_new_tokens=3, do_sample=False)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape) * 0.3)  # as merging an adapter does
    found = model.generate(text, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, model.generate(text, max_new_tokens=6, do_sample=False, use_cache=False))


def test_losses_are_those_of_the_native_models():
    text = tokens(2, 11)
    native = causal("flash")
    loss = ours.to_transformers(native)(text, labels=text).loss
    torch.testing.assert_close(loss.double(), native.loss(text), rtol=1e-6, atol=0)
    masked = stirred(MaskedLM(config("flash-quad"), dtype=torch.float64))
    targets = text.masked_fill(text < 12, -100)
    loss = ours.to_transformers(masked)(text, labels=targets).loss
    torch.testing.assert_close(loss.double(), masked.loss(text, targets), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [MaskedLM, Encoder])
def test_models_that_see_all_keep_seeing_all(make, tmp_path):
    native, text = stirred(make(config("flash"), dtype=torch.float64)), tokens(2, 9)
    model = ours.to_transformers(native)
    assert torch.equal(first(model(text)), native(text))
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForMaskedLM if make is MaskedLM else transformers.AutoModel
    assert torch.equal(first(auto.from_pretrained(tmp_path)(text)), native(text))
    hidden = transformers.AutoModel.from_pretrained(tmp_path)(text).last_hidden_state
    assert torch.equal(hidden, native.stack(text)[0])


def test_a_folder_is_loaded_in_bf16(tmp_path):
    model, text = small("FlashGauForCausalLM"), tokens(2, 9)
    model.save_pretrained(tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    difference = (half(text).logits.float() - model(text).logits).abs().max()
    assert difference < 0.05 * model(text).logits.abs().max()
    assert half.generate(text, max_new_tokens=4).shape == (2, 13)


# What transformers tests of its own models, whose tests are not in its wheel.


@each_class
def test_a_saved_model_is_the_model(name, tmp_path):
    model, text = small(name), tokens(2, 9)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(first(again(text)), first(model(text)))
    assert torch.equal(first(copy.deepcopy(model)(text)), first(model(text)))
    assert model(text, return_dict=False)[0].equal(first(model(text)))
    assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name == "input_ids"


@each_class
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized(name, tied):
    model, text = small(name, tie_word_embeddings=tied, head_bias=True), tokens(2, 9)
    before = first(model(text))
    model.resize_token_embeddings(30)
    after = first(model(text + 0))
    assert model.config.vocab_size == 30
    assert first(model(torch.full((1, 4), 29))).isfinite().all()
    if name != "FlashGauModel":
        assert after.shape[-1] == 30
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(after[..., : before.shape[-1]], before)


@each_class
def test_recomputed_layers_have_the_same_gradients(name):
    model, text = small(name).train(), tokens(2, 9)
    plain = torch.autograd.grad(first(model(text)).square().sum(), list(model.parameters()))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again = torch.autograd.grad(first(model(text)).square().sum(), list(model.parameters()))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("bias", ["toeplitz", "alibi"])
def test_what_a_file_lacks_begins_as_in_a_new_model(bias, tmp_path):
    layer = {"bias": bias} if bias == "alibi" else {}
    kind = "transformer" if layer else "flash"
    model = small("FlashGauForCausalLM", kind=kind, layer=layer, norm="scalenorm")
    model.save_pretrained(tmp_path, state_dict={"lm_head.weight": model.lm_head.weight.clone()})
    found = ours.FlashGauForCausalLM.from_pretrained(tmp_path).state_dict(keep_vars=True)
    for key, p in ours.FlashGauForCausalLM(model.config).state_dict().items():
        x = found[key]
        assert x.isfinite().all(), key
        if p.numel() > 8 and "embedding" not in key and "lm_head" not in key:
            assert abs(x.std() - p.std()) < 0.01, key
            assert abs(x.mean() - p.mean()) < 0.01, key
    if layer:
        loaded = ours.FlashGauForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(
            loaded.model.stack.layers[0].attention.rel_bias.slopes,
            model.model.stack.layers[0].attention.rel_bias.slopes,
        )


def test_refusals_name_what_came():
    model, text = small("FlashGauForCausalLM"), tokens(2, 5)
    embedded, holes = torch.zeros(2, 5, 24), torch.tensor([[1, 0, 1, 1, 1]] * 2)
    for options, message in (
        ({"inputs_embeds": embedded}, "inputs_embeds"),
        ({"input_ids": text, "output_hidden_states": True}, "output_hidden_states"),
        ({"input_ids": text, "position_ids": text}, "position_ids"),
        ({"input_ids": text, "attention_mask": holes}, "between tokens"),
        ({"input_ids": text, "attention_mask": holes[:, :4]}, r"shape \(2, 4\)"),
        ({"attention_mask": holes}, "input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**options)
    with pytest.raises(TypeError, match="DynamicCache"):
        model(text, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(text, attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 2), max_new_tokens=2)
    with pytest.raises(ValueError, match="`kind` is 'rnn'"):
        ours.FlashGauConfig(kind="rnn")
    with pytest.raises(TypeError, match="Linear"):
        ours.to_transformers(nn.Linear(2, 2))


def test_a_configuration_goes_by_both_names():
    found = ours.FlashGauConfig(hidden_size=40, num_hidden_layers=3, tied=False, vocab_size=9)
    assert (found.dim, found.depth, found.native().tied, found.native().vocab_size) == (40, 3, False, 9)
    assert ours.FlashGauConfig.from_dict(found.to_dict()).native() == found.native()


# The tokenizer.


@pytest.mark.parametrize("masked", [False, True])
def test_tokens_are_bytes_and_every_text_comes_back(masked, tmp_path):
    ours.byte_tokenizer(masked).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 256 + masked
    assert tokenizer.mask_token_id == (256 if masked else None)
    batch = tokenizer(["ab", "c"], padding=True)
    assert batch["attention_mask"] == [[1, 1], [1, 0] if masked else [0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert 256 * masked == tokenizer("[MASK]", split_special_tokens=False).input_ids[0] * masked

    @given(st.text() | st.sampled_from(["\u0100[MASK]\0", " \r\n ", "\u0120a", "<s>"]))
    def goes_and_returns(text):
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text

    goes_and_returns()


# The command, and all of it in a row.


@pytest.fixture
def run(tmp_path):
    """A file with a model of bytes."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(dim=16, depth=2, key_dim=8, chunk_size=8))
    model.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def command(*arguments):
    """What a command prints, and its status."""
    from flashgau.cli import app

    done = runner.invoke(app, ["export", *map(str, arguments)])
    return done.exit_code, done.output


def test_export_overwrites_nothing_and_fails_in_one_line(run, tmp_path):
    folder = tmp_path / "new" / "exported"
    code, said = command(run, folder)
    assert (code, said.count("\n")) == (0, 1), said
    assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    before = {p: p.read_bytes() for p in folder.iterdir()}
    for source, target in ((run, folder), (run, run), (tmp_path / "none", tmp_path / "x"), (run, run / "below")):
        code, said = command(source, target)
        assert (code, said.count("\n")) == (1, 1), said
    assert before == {p: p.read_bytes() for p in folder.iterdir()}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def python(code, *arguments):
    """What a program in a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_without_transformers_the_command_says_so(run, tmp_path):
    code = f"from flashgau.cli import main; raise SystemExit(main(['export', {str(run)!r}, {str(tmp_path / 'x')!r}]))"
    done = run_without({"transformers"}, code)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "flashgau[transformers]" in done.stderr


FOUND = """
import sys, site
site.addsitedir(sys.argv[2])
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
assert not any(name.split(".")[0] == "flashgau" for name in sys.modules)
assert AutoConfig.from_pretrained(sys.argv[1]).model_type == "flashgau"
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(tokenizer("caf\\u00e9").input_ids)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.generate(**tokenizer("caf\\u00e9", return_tensors="pt"), max_new_tokens=6, do_sample=False).tolist()[0])
"""
LOADING = """
import sys, warnings
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(tokenizer("caf\\u00e9").input_ids)
assert not any(name.startswith("flashgau") for name in sys.modules)
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print("model type `flashgau`" in str(error))
import flashgau.integrations.transformers
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.generate(**tokenizer("caf\\u00e9", return_tensors="pt"), max_new_tokens=6, do_sample=False).tolist()[0])
"""


def loaded_elsewhere(folder, native, place):
    """Load and generate in processes of their own: with flashgau-transformers nothing is imported by name. Without it,
    transformers has no way for a package to announce a model, so one import is needed, and enough; the tokenizer needs
    none."""
    prompt = list("caf\u00e9".encode())
    new = native.generate(torch.tensor([prompt]), 6, temperature=0).tolist()[0]
    for code, expected in ((FOUND, [prompt, prompt + new]), (LOADING, [prompt, True, prompt + new])):
        status, printed, said = python(code, folder, place)
        assert (status, printed.splitlines()) == (0, list(map(str, expected))), said


def tuned(model, folder, **options):
    """The losses of a few steps of Trainer on one text."""
    text = torch.tensor(list(b"one potato, two potato, three potato, four. "))
    rows = [{"input_ids": text, "labels": text} for _ in range(64)]
    args = transformers.TrainingArguments(
        str(folder), max_steps=16, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=4,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_train_export_load_generate_tune_save_and_load(tmp_path, monkeypatch, hooked):  # noqa: F811
    from flashgau.training import TrainConfig, load_model, train, trainer

    tiny = ModelConfig(dim=16, depth=2, key_dim=8, chunk_size=8)
    monkeypatch.setattr(trainer, "loss_plot", lambda rows, path, title: path.write_bytes(b"plot"))
    monkeypatch.setattr(trainer, "_build", lambda config: (CausalLM(tiny), tiny.to_dict()))
    (tmp_path / "text.txt").write_text("one potato, two potato, three potato, four. " * 100)
    train(
        TrainConfig(
            data=str(tmp_path / "text.txt"), out=str(tmp_path / "run"), steps=6, batch=2, length=32, warmup=2,
            eval_windows=2, max_minutes=None,
        )
    )  # fmt: skip
    assert command(tmp_path / "run", tmp_path / "exported")[0] == 0
    loaded_elsewhere(tmp_path / "exported", load_model(tmp_path / "run" / "best.safetensors"), hooked)
    pytest.importorskip("accelerate")  # which Trainer needs
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    losses = tuned(model, tmp_path / "tuned", gradient_checkpointing=True)
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    text = torch.tensor([list(b"two potato")])
    assert torch.equal(again(text).logits, model(text).logits)


# Adapters: what takes the place of a projection is called, where layers otherwise read weights.


class Adapted(nn.Linear):
    """x W^T + b, and something more."""

    def forward(self, x):
        return super().forward(x) + self.more(x)


@each
def test_replaced_projections_are_called(kind, changes):
    native, text = causal(kind, **changes), tokens(2, 9)
    adapted = copy.deepcopy(native)
    for layer, merged in zip(list(adapted.modules()), list(native.modules()), strict=True):
        if type(layer) is nn.Linear:
            more = torch.randn(layer.weight.shape, dtype=torch.float64) * 0.1
            layer.__class__, layer.more = Adapted, nn.Linear(*more.shape[::-1], bias=False, dtype=torch.float64)
            layer.more.weight.data.copy_(more)
            merged.weight.data += more
    torch.testing.assert_close(adapted(text), native(text), **EXACT)
    adapted.loss(text).backward()
    native.loss(text).backward()
    mores = [m.more.weight.grad for m in adapted.modules() if type(m) is Adapted]
    whole = [m.weight.grad for m in native.modules() if type(m) is nn.Linear]
    torch.testing.assert_close(mores, whole, **EXACT)
    assert torch.equal(adapted.generate(text, 6, temperature=0), native.generate(text, 6, temperature=0))


@pytest.mark.parametrize("kind", ["flash", "flash-quad", "transformer++"])
def test_lora_learns_and_merges(kind, tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    model = small("FlashGauForCausalLM", kind=kind, vocab_size=256)
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapters = [p for n, p in found.named_parameters() if "lora_B" in n]
    assert all(p.requires_grad for p in adapters)
    losses = tuned(found, tmp_path)
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.abs().max() > 0 for p in adapters)
    text = torch.tensor([list(b"two potato")])
    before = found.eval()(input_ids=text).logits
    found.save_pretrained(tmp_path / "adapter")
    base = small("FlashGauForCausalLM", kind=kind, vocab_size=256)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=text).logits, before)
    torch.testing.assert_close(found.merge_and_unload()(text).logits, before, rtol=1e-4, atol=1e-4)

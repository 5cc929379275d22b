"""Language models: what is saved is what is loaded, and files that hold no model."""

import errno
import io
import json
import os

import pytest
import safetensors.torch as safetensors
import torch
from checks import check_owned
from small_models import VARIANTS, causal, config, stirred, tokens

from flashgau.models import KINDS, CausalLM, Encoder, MaskedLM, load


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind):
    model, text, file = causal(kind), tokens(1, 9), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = CausalLM(config(kind), dtype=torch.float64).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(text), model(text))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_class", [CausalLM, MaskedLM, Encoder])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_a_saved_model_is_the_model(kind, changes, model_class, dtype, tmp_path):
    model, text = stirred(model_class(config(kind, **changes)).to(dtype)), tokens(2, 9)
    path = tmp_path / "model.safetensors"
    model.save(path)
    again = load(str(path))
    assert type(again) is model_class
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(text), model(text))
    assert all(p.requires_grad for p in again.parameters())
    # Any reader of safetensors sees the weights under their names.
    weights = safetensors.load_file(path)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert {value.dtype for value in again.state_dict().values()} == {dtype}
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_a_loaded_model_owns_its_memory(kind, changes, tmp_path):
    model = stirred(CausalLM(config(kind, **changes), dtype=torch.float64))
    path = tmp_path / "model.safetensors"
    model.save(path)
    again = load(path)
    check_owned([*again.parameters(), *again.buffers()])
    path.write_bytes(bytes(path.stat().st_size))  # what becomes of the file is nothing to it
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_model_keeps_a_dtype_per_tensor(tmp_path):
    model = causal("flash").to(torch.bfloat16)
    model.stack.layers[1].float()
    model.save(tmp_path / "x")
    for name, value in load(tmp_path / "x").state_dict().items():
        assert value.dtype == (torch.float32 if "layers.1." in name else torch.bfloat16)


def test_saving_leaves_existing_files_alone(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"mine")
    model = causal("flash")
    with pytest.raises(FileExistsError, match=r"model\.safetensors, which exists; expected a new name, or `overwrite"):
        model.save(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left on device; the previous one"):
                model.save(path, overwrite=True)
        assert path.read_bytes() == b"mine"
    with pytest.raises(OSError, match=r"cannot write .*none"):
        model.save(tmp_path / "none" / "model.safetensors")
    assert os.listdir(tmp_path) == [path.name]
    model.save(path, overwrite=True)
    assert torch.equal(load(path)(tokens(1, 5)), model(tokens(1, 5)))


def test_files_that_hold_no_model(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="where no file is; expected one that a model's `save` wrote"):
        load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(path)
    safetensors.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no model's configuration"):
        load(path)

    model = causal("flash")
    model.save(path, overwrite=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(path)


def test_a_header_of_another_kind_is_one_line_before_anything_is_made_of_it(tmp_path):
    """A number in a header costs nothing: neither the memory nor the time of as many layers or channels."""
    path, model = tmp_path / "x.safetensors", causal("flash")
    values, weights = model.config.to_dict(), model.state_dict()
    described = {"class": "CausalLM", "config": values}

    def changed(**changes):
        return described | {"config": values | changes}

    integers = {name: value.to(torch.int64) for name, value in weights.items()}
    deep = 0
    for _ in range(900):
        deep = [deep]
    cases = [
        ("[" * 100_000, "recursion"),
        ("{", "describes no model of this version"),
        ("[]", "expected a `class` and its `config`"),
        ({"config": values}, "expected a `class` and its `config`"),
        ({"class": "CausalLM"}, "expected a `class` and its `config`"),
        ({"class": ["CausalLM"], "config": values}, "describes no model of this version"),
        ({"class": "CausalLM", "config": 3}, "expected values by names of fields"),
        (changed(dim="a"), "`dim` is 'a'; expected an int"),
        (changed(dim=True), "`dim` is True; expected an int"),
        (changed(dim=24.0), "`dim` is 24.0; expected an int"),
        (changed(hidden=-1), "`hidden` is -1; expected at least 1"),
        (changed(tied=1), "`tied` is 1; expected True or False"),
        (changed(spec=None), "`spec` is None; expected a str"),
        (changed(layer=[1]), "expected a dict of keyword arguments"),
        (changed(kind="lion"), "`kind` is 'lion'"),
        (changed(layer={"option_of_2027": 1}), "option_of_2027"),
        (changed(layer={"score": "relu3"}), "`score` is 'relu3'"),
        (changed(layer={"lin_normalizer": "words"}), "`lin_normalizer` is 'words'"),
        (changed(layer={"token_shift": "no"}), "`token_shift` is 'no'; expected True or False"),
        (changed(layer={"norm": "norm_of_2027"}), "norm_of_2027"),
        (changed(layer={"rotary_dim": "all"}), "`rotary_dim` is 'all'"),
        (changed(layer={"qk_dropout": 2.0}), "`qk_dropout` is 2.0"),
        (changed(layer={"deep": deep}), "deep"),
        (changed(layer={"device": "cpu"}), "device"),
        (changed(norm="norm_of_2027"), "norm_of_2027"),
        (changed(depth=100_000), "`depth` is 100000, and there are 2 layers"),
        (changed(dim=10**6), r"stack.embedding.weight has shape \(23, 24\), expected \(23, 1000000\)"),
        (changed(dim=10**9), "describes no model of this version|expected"),
        (changed(vocab_size=10**12), r"expected \(1000000000000, 24\)"),
        (changed(hidden=10**18), "describes no model of this version|expected"),
        (changed(hidden=10**30), "describes no model of this version"),
        (changed(chunk_size=10**9), r"expected \(1999999999,\)"),
        (changed(kind="transformer", heads=24, layer={"head_dim": 10**9}), "missing|expected"),
        (changed(kind="transformer", layer={"device": "cpu", "head_dim": 10**9}), "device"),
        (
            changed(kind="transformer++", layer={"bias": "alibi", "head_dim": 10**6, "rotary_dim": 0}),
            "missing|expected",
        ),
    ]
    for description, message in cases:
        text = description if isinstance(description, str) else json.dumps(description)
        safetensors.save_file(weights, path, {"flashgau_model": text})
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        said = str(caught.value)
        assert said.startswith(f"load: {path} ")
        assert "\n" not in said
        assert len(said) < 800 + len(str(path))
    safetensors.save_file(integers, path, {"flashgau_model": json.dumps(described)})
    with pytest.raises(ValueError, match=r"in torch\.int64; expected a floating type"):
        load(path)
    safetensors.save_file(
        weights | {"x" * 9000 + "\n": torch.zeros(1)}, path, {"flashgau_model": json.dumps(described)}
    )
    with pytest.raises(ValueError, match=r"does not fit its own configuration: unexpected xxx.* \.\.\.$"):
        load(path)
    safetensors.save_file(weights, path, {"flashgau_model": json.dumps(described)})
    assert torch.equal(load(path)(tokens(1, 9)), model(tokens(1, 9)))


def test_a_model_without_numbers_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"save: `stack\.embedding\.weight` is on the device 'meta'"):
        CausalLM(config("flash"), device="meta").save(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_files_of_other_models(tmp_path):
    path, model = tmp_path / "x.safetensors", causal("flash")
    described = {"class": "CausalLM", "config": model.config.to_dict()}
    weights = model.state_dict()
    del weights["stack.norm.weight"]
    for description, message in (
        (described, r"does not fit its own configuration: (?s:.*)stack\.norm\.weight"),
        (described | {"class": "Lion"}, "holds a Lion; expected one of CausalLM, MaskedLM, Encoder"),
        (described | {"config": {"colour": 1}}, "no field is called colour"),
    ):
        safetensors.save_file(weights, path, {"flashgau_model": json.dumps(description)})
        with pytest.raises(ValueError, match=message):
            load(path)

"""`flashgau convert`: files of FLASH-pytorch and GAU-alpha to flashgau's and back, and what it refuses."""

import json

import pytest
import safetensors.torch as safetensors
import torch
from safetensors import safe_open
from test_gau_alpha import detached, gau_alpha_state

from flashgau import models
from flashgau.cli import main
from flashgau.convert import from_flash_pytorch, from_gau_alpha, load_layer

GAU_SHAPES = {
    "norm.g": (1,), "rel_pos_bias.relative_attention_bias.weight": (32, 1),
    "to_hidden.0.weight": (64, 16), "to_hidden.0.bias": (64,), "to_qk.0.weight": (8, 16), "to_qk.0.bias": (8,),
    "offsetscale.gamma": (2, 8), "offsetscale.beta": (2, 8), "to_out.0.weight": (16, 32), "to_out.0.bias": (16,),
}  # fmt: skip
FLASH_SHAPES = {
    name.replace("offsetscale", "qk_offset_scale").replace("to_out.0", "to_out"): (4, 8) if "offset" in name else shape
    for name, shape in GAU_SHAPES.items()
}


def drawn(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def refused(capsys, status, *arguments):
    """The one line that a conversion which fails prints; it writes nothing."""
    assert convert(*arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("flashgau convert: ") or status == 2
    return line


LAYERS = {
    "gau": (GAU_SHAPES, ["--causal"], {"causal": True}),
    "gau with options": (
        GAU_SHAPES,
        ["--no-causal", "--laplace", "--no-residual", "--padded-length", "40"],
        {"causal": False, "laplace_attn_fn": True, "add_residual": False, "padded_length": 40},
    ),
    "flash": (FLASH_SHAPES, ["--causal", "--group-size", "16"], {"causal": True, "group_size": 16}),
    "flash with options": (
        FLASH_SHAPES,
        ["--no-causal", "--shift-tokens", "--padded-length", "40"],
        {"causal": False, "shift_tokens": True, "padded_length": 40},
    ),
    "flash with positions": (
        FLASH_SHAPES | {"norm.weight": (16,), "norm.bias": (16,)},
        ["--causal"],
        {"causal": True},
    ),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_the_library_makes_of_its_state(name, suffix, tmp_path, capsys):
    shapes, arguments, hints = LAYERS[name]
    state = drawn(shapes)
    if "positions" in name:
        state.pop("norm.g")
        state["rotary_pos_emb.freqs"] = (1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)).double()
    source, out = tmp_path / f"theirs.{suffix}", tmp_path / "ours.safetensors"
    (torch.save if suffix == "pt" else safetensors.save_file)(state, source)
    assert convert(source, out, *arguments) == 0
    printed = capsys.readouterr().out
    kind = "FLASH" if "flash" in name else "GAU"
    assert f"FLASH-pytorch's {kind}, dim 16, hidden 32, key_dim 8, dtype float64" in printed
    assert ("taken as" in printed) == (not set(hints) >= {"causal", "laplace_attn_fn", "add_residual"})
    layer, expected = load_layer(out), from_flash_pytorch(state, **hints)
    assert type(layer).__name__ == kind
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    for options in ({}, {"lengths": torch.tensor([40, 11])}):
        assert torch.equal(layer(x, **options), expected(x, **options))


@pytest.mark.parametrize("head", [True, False])
def test_gau_alpha(head, tmp_path, capsys):
    state = detached(gau_alpha_state(head))
    source, out = tmp_path / "pytorch_model.bin", tmp_path / "ours.safetensors"
    torch.save(state, source)
    assert convert(source, out, "--json", "--token-type", "1") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["found"], facts["depth"], facts["vocab_size"], facts["dtype"]) == ("GAU-alpha", 3, 40, "float64")
    tokens = torch.randint(40, (2, 30))
    model = models.load(out)
    assert type(model).__name__ == facts["class"] == ("MaskedLM" if head else "Encoder")
    assert torch.equal(model(tokens), from_gau_alpha(state, token_type=1)(tokens))


@pytest.mark.parametrize("kind", ["FLASHTransformer", "FLASH", "GAU"])
def test_there_and_back(kind, tmp_path, capsys):
    """The weights come back as they were, and the model between computes the same."""
    package = pytest.importorskip("flash_pytorch.flash_pytorch")
    options = {"dim": 24, "query_key_dim": 8, "causal": True}
    options |= {} if kind == "GAU" else {"group_size": 16}
    options |= {"num_tokens": 40, "depth": 2} if kind == "FLASHTransformer" else {}
    theirs = getattr(package, kind)(**options).double().eval()
    source, out, back = tmp_path / "theirs.pt", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    torch.save(theirs.state_dict(), source)
    assert convert(source, out, "--causal", *([] if kind == "GAU" else ["--group-size", "16"])) == 0
    x = torch.randint(40, (2, 50)) if kind == "FLASHTransformer" else torch.randn(2, 50, 24, dtype=torch.float64)
    ours = (models.load if kind == "FLASHTransformer" else load_layer)(out)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)
    assert convert(out, back, "--to", "flash-pytorch") == 0
    assert convert(out, tmp_path / "back.pt", "--to", "flash-pytorch") == 0
    assert f"flashgau's {type(ours).__name__}" in capsys.readouterr().out
    for again in (safetensors.load_file(back), torch.load(tmp_path / "back.pt", weights_only=True)):
        torch.testing.assert_close(again, dict(theirs.state_dict()), rtol=0, atol=1e-7)


def test_what_cannot_go_back_is_named(tmp_path, capsys):
    config = models.ModelConfig(kind="flash-quad", dim=8, depth=1, key_dim=4)
    models.CausalLM(config).save(tmp_path / "ours.safetensors")
    arguments = (tmp_path / "ours.safetensors", tmp_path / "out", "--to", "flash-pytorch")
    assert "no counterpart for kind 'flash-quad'" in refused(capsys, 1, *arguments)
    assert "--causal says what" in refused(capsys, 2, *arguments, "--causal")


@pytest.mark.parametrize("name", ["a.ckpt.index", "a.ckpt.data-00000-of-00001", "a.h5", "saved_model.pb", "a.npz"])
def test_tensorflow_is_refused_by_name(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"anything")
    line = refused(capsys, 1, tmp_path / name, tmp_path / "out")
    assert name in line
    assert "torch.save" in line
    if name == "saved_model.pb":
        assert str(tmp_path) in refused(capsys, 1, tmp_path, tmp_path / "out")
    if name.endswith(".index"):  # its name without the ending is how TensorFlow itself calls it
        assert "TensorFlow" in refused(capsys, 1, tmp_path / "a.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def saved(place, state):
    torch.save(state, place)
    return place


REFUSED = {
    "nobody's": (1, [], {"a.weight": torch.ones(2)}, r"theirs.pt: it holds a.weight; expected one of"),
    "too many names": (1, [], {f"w{i}": torch.ones(1) for i in range(900)}, "and 894 more; expected one of"),
    "causal or not": (2, [], drawn(GAU_SHAPES), "holds a GAU, causal or not; expected --causal or --no-causal"),
    "of others": (2, ["--causal", "--group-size", "8"], drawn(GAU_SHAPES), "holds a GAU, which has no --group-size"),
    "token type": (2, ["--causal", "--token-type", "0"], drawn(GAU_SHAPES), "which has no --token-type"),
    "gau-alpha": (2, ["--causal"], detached(gau_alpha_state()), "holds a GAU-alpha, which has no --causal"),
    "lacking": (1, ["--causal"], {"offsetscale.gamma": torch.ones(2, 8)}, "theirs.pt: not the state dict of a GAU"),
    "form": (1, ["--causal"], drawn({**GAU_SHAPES, "to_qk.0.bias": (7,)}), "bias has shape (7,), expected (8,)"),
    "no tensors": (1, ["--causal"], {"model": drawn(GAU_SHAPES)}, "'model' is a dict"),
    "segment": (1, ["--token-type", "2"], detached(gau_alpha_state()), "`token_type` is 2; expected 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_one_line(name, tmp_path, capsys):
    status, arguments, state, words = REFUSED[name]
    line = refused(capsys, status, saved(tmp_path / "theirs.pt", state), tmp_path / "out", *arguments)
    assert words in line
    assert len(line) < 1000 + 2 * len(str(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["theirs.pt", "theirs.safetensors", "none.pt"])
@pytest.mark.parametrize("to", ["flashgau", "flash-pytorch"])
def test_damaged_files_are_named(name, to, tmp_path, capsys):
    if name != "none.pt":
        (tmp_path / name).write_bytes(b"\x80\x02damaged")
    line = refused(capsys, 1, tmp_path / name, tmp_path / "out", "--to", to)
    assert name in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 9, 100, 700, -1])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_cut_off(cut, suffix, tmp_path, capsys):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    (torch.save if suffix == "pt" else safetensors.save_file)(drawn(GAU_SHAPES), whole)
    path.write_bytes(whole.read_bytes()[:cut])
    assert f"cut.{suffix}" in refused(capsys, 1, path, tmp_path / "out", "--causal")


def test_nothing_is_overwritten(tmp_path, capsys):
    source = saved(tmp_path / "theirs.pt", drawn(GAU_SHAPES))
    (tmp_path / "out").write_text("mine")
    assert "is there already" in refused(capsys, 2, source, tmp_path / "out", "--causal")
    assert (tmp_path / "out").read_text() == "mine"
    assert "expected one of flashgau, flash-pytorch" in refused(capsys, 2, source, tmp_path / "new", "--to", "jax")
    assert str(tmp_path / "none") in refused(capsys, 1, source, tmp_path / "none" / "out", "--causal")


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "transformer"},
        {"depth": 2},
        {"depth": 10**9},
        {"hidden": 10**9},
        {"chunk_size": 10**12},
        {"layer": {"device": "cuda"}},
        {"layer": {"causal": {}, "rotary_dim": -3}},
        {"layer": {"attention_fn": "os.system"}},
    ],
)
def test_a_layer_whose_description_was_changed_is_refused_or_loads(changed, tmp_path):
    path, other = tmp_path / "layer", tmp_path / "other"
    assert convert(saved(tmp_path / "theirs.pt", drawn(GAU_SHAPES)), path, "--causal") == 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata["flashgau_model"])
    described["config"] |= changed
    safetensors.save_file(safetensors.load_file(path), other, metadata | {"flashgau_model": json.dumps(described)})
    if "chunk_size" in changed:  # which a GAU has not
        assert load_layer(other).dim == 16
        return
    with pytest.raises(ValueError, match=r"other (describes no model|does not fit)"):
        load_layer(other)


def test_a_layer_is_no_model_and_a_model_no_layer(tmp_path, capsys):
    assert convert(saved(tmp_path / "theirs.pt", drawn(GAU_SHAPES)), tmp_path / "layer", "--causal") == 0
    with pytest.raises(ValueError, match="it holds a GAU; expected one of CausalLM, MaskedLM, Encoder"):
        models.load(tmp_path / "layer")
    models.CausalLM("flash-tiny").save(tmp_path / "model")
    with pytest.raises(ValueError, match="it holds a CausalLM; expected one of GAU, FLASH"):
        load_layer(tmp_path / "model")


def test_logits_of_the_published_port(tmp_path, capsys):
    """With the package `gau-alpha`, which is that port, in fp64; texts of at least 16 tokens, as the page says."""
    pytest.importorskip("transformers")
    try:
        import gau_alpha
    except ImportError as error:  # also for a version of transformers that it does not know
        pytest.skip(f"gau-alpha cannot be imported: {error}")
    config = gau_alpha.GAUAlphaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=4, attention_key_size=16
    )
    torch.manual_seed(0)
    theirs = gau_alpha.GAUAlphaForMaskedLM(config).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.bin")
    assert convert(tmp_path / "theirs.bin", tmp_path / "ours.safetensors") == 0
    tokens, lengths = torch.randint(1, 60, (3, 200)), torch.tensor([200, 90, 16])
    valid = torch.arange(200) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(input_ids=tokens * valid).logits[valid]
        found = models.load(tmp_path / "ours.safetensors")(tokens, lengths)[valid]
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # its sines are fp32

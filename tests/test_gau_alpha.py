"""GAU-alpha's weights here: the model held to the published description, written down plainly."""

import math

import pytest
import safetensors.torch as safetensors
import torch
from checks import check_owned

from flashgau.convert import from_gau_alpha
from flashgau.models import Encoder, MaskedLM, ModelConfig

TIGHT = {"rtol": 1e-8, "atol": 1e-8}
# With S = 8 the rotary frequencies are 1, 0.1, 0.01 and 0.001, and fp32 numbers there as here.
V, T, D, E, S, DEPTH = 40, 2, 10, 14, 8, 3
WORDS, TYPES = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"


def gau_alpha_state(head=True, seed=0):
    """A state dict of GAU-alpha in fp64, leaves that take gradients; sizes as above."""
    shapes = {WORDS: (V, D), TYPES: (T, D)}
    for i in range(DEPTH):
        gau = f"encoder.layer.{i}.gau."
        shapes |= {gau + "i_dense.weight": (2 * E + S, D), gau + "o_dense.weight": (D, E)}
        shapes |= {gau + "q_scaleoffset.weight": (S,), gau + "k_scaleoffset.weight": (S,)}
    if head:
        shapes = {"gau_alpha." + key: shape for key, shape in shapes.items()} | {DECODER: (V, D)}
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    return {key: draw(shape).requires_grad_() for key, shape in shapes.items()}


def gau_alpha(state, tokens, lengths, token_type=0, fewest=16):
    """Logits, or hidden vectors without an output matrix: word and type embeddings and RMS; then per layer a gated
    attention unit, the residual sum and RMS. Softmax over the row's valid keys, scaled by log_512 of their number."""
    prefix = "gau_alpha." if DECODER in state else ""
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    x = rms(state[prefix + WORDS][tokens] + state[prefix + TYPES][token_type])
    n = tokens.shape[1]
    frequency = torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float32).double()
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(n)[:, None] * frequency)
    hidden = torch.arange(n) >= lengths[:, None, None]
    factor = lengths.double().clamp(min=fewest).log()[:, None, None] / math.log(512)
    for i in range(DEPTH):
        i_dense, o_dense, for_q, for_k = (
            state[f"{prefix}encoder.layer.{i}.gau.{name}.weight"]
            for name in ("i_dense", "o_dense", "q_scaleoffset", "k_scaleoffset")
        )
        u, v, z = torch.nn.functional.silu(x @ i_dense.T).split((E, E, S), -1)
        # <turned q, turned k> is the real part of the product of complex numbers.
        q, k = (torch.view_as_complex((z * scale).unflatten(-1, (-1, 2))) * turn for scale in (for_q, for_k))
        products = (q @ k.mH).real / math.sqrt(S)
        weights = (factor * products).masked_fill(hidden, -math.inf).softmax(-1)
        x = rms(x + (u * (weights @ v)) @ o_dense.T)
    return x @ state[DECODER].T if DECODER in state else x


def detached(state):
    return {key: value.detach() for key, value in state.items()}


def random_text(lengths, seed=0):
    tokens = torch.randint(V, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.tensor(lengths)


@pytest.mark.parametrize("token_type", range(T))
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("lengths", [[40, 40], [50, 17, 3, 1]])
def test_outputs_and_gradients(head, lengths, token_type):
    state, (tokens, lengths) = gau_alpha_state(head), random_text(lengths)
    model = from_gau_alpha(detached(state), token_type=token_type)
    assert type(model) is (MaskedLM if head else Encoder)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    expected, y = gau_alpha(state, tokens, lengths, token_type)[valid], model(tokens, lengths)[valid]
    torch.testing.assert_close(y, expected, **TIGHT)

    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    expected.backward(weight)
    y.backward(weight)
    prefix = "gau_alpha." if head else ""
    got = {name: p.grad for name, p in model.named_parameters()}
    want = lambda key: state[prefix + key].grad
    words = got.pop("stack.embedding.weight")
    torch.testing.assert_close(words, want(WORDS), **TIGHT)
    # Each token adds the type's row once, so its gradient is the sum of theirs.
    torch.testing.assert_close(words.sum(0), want(TYPES)[token_type], **TIGHT)
    for i in range(DEPTH):
        gau, layer = f"encoder.layer.{i}.gau.", f"stack.layers.{i}."
        torch.testing.assert_close(got.pop(layer + "to_hidden.weight"), want(gau + "i_dense.weight"), **TIGHT)
        torch.testing.assert_close(got.pop(layer + "to_out.weight"), want(gau + "o_dense.weight"), **TIGHT)
        both = torch.stack([want(gau + f"{way}_scaleoffset.weight") for way in "qk"])
        torch.testing.assert_close(got.pop(layer + "offset_scale.gamma"), both, **TIGHT)
    if head:
        torch.testing.assert_close(got.pop("head_weight"), state[DECODER].grad, **TIGHT)
    assert not got


def test_short_texts_count_sixteen_keys():
    state = gau_alpha_state()
    model = from_gau_alpha(detached(state))
    for n in (9, 15, 16, 30):
        tokens, lengths = random_text([n])
        bare = gau_alpha(state, tokens, lengths, fewest=1)
        assert torch.allclose(model(tokens), bare, rtol=0, atol=1e-8) == (n >= 16)


def test_packed_texts_are_alone():
    model = from_gau_alpha(detached(gau_alpha_state()))
    tokens, _ = random_text([20, 20])
    packed = torch.cat([tokens[0, :9], tokens[1]])[None]
    y = model(packed, cu_seqlens=torch.tensor([0, 9, 29]))
    torch.testing.assert_close(y[:, :9], model(tokens[:1, :9]), **TIGHT)
    torch.testing.assert_close(y[:, 9:], model(tokens[1:]), **TIGHT)


def test_the_output_matrix_as_asked_for():
    state, (tokens, lengths) = detached(gau_alpha_state()), random_text([20])
    encoder = from_gau_alpha(state, mlm=False)
    assert type(encoder) is Encoder
    torch.testing.assert_close(encoder(tokens) @ state[DECODER].T, from_gau_alpha(state)(tokens), **TIGHT)
    # GAU-alpha ties its output matrix to the word embeddings, so a file may leave it out.
    words = state.pop(DECODER), state["gau_alpha." + WORDS]
    tied = from_gau_alpha(state, mlm=True)
    assert type(tied) is MaskedLM
    torch.testing.assert_close(tied(tokens), gau_alpha(state | {DECODER: words[1]}, tokens, lengths), **TIGHT)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_and_modules(name, tmp_path):
    state, (tokens, _) = detached(gau_alpha_state()), random_text([20])
    expected = from_gau_alpha(state)(tokens)
    (safetensors.save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    model = from_gau_alpha(tmp_path / name)
    assert torch.equal(model(tokens), expected)
    check_owned(model.parameters())

    module = torch.nn.Module()
    module.state_dict = lambda: state
    assert torch.equal(from_gau_alpha(module)(tokens), expected)


def test_the_configuration_survives_json_and_dtype_is_kept():
    model = from_gau_alpha({key: value.to(torch.bfloat16) for key, value in detached(gau_alpha_state()).items()})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert ModelConfig.from_json(model.config.to_json()) == model.config


def test_everything_wrong_is_listed_at_once():
    state = detached(gau_alpha_state())
    del state["gau_alpha." + TYPES], state["gau_alpha.encoder.layer.2.gau.q_scaleoffset.weight"]
    state["gau_alpha.encoder.layer.1.gau.i_dense.weight"] = torch.zeros(3, 3)
    state["gau_alpha.encoder.layer.0.gau.o_dense.weight"] = torch.zeros(14)
    state["classifier.weight"] = torch.zeros(2, D)
    with pytest.raises(ValueError, match="from_gau_alpha: not the state dict of a GAU-alpha") as caught:
        from_gau_alpha(state)
    for words in (
        "missing gau_alpha.embeddings.token_type_embeddings.weight (T, 10)",
        "missing gau_alpha.encoder.layer.2.gau.q_scaleoffset.weight (8,)",
        "gau_alpha.encoder.layer.1.gau.i_dense.weight has shape (3, 3), expected (36, 10)",
        "gau_alpha.encoder.layer.0.gau.o_dense.weight has shape (14,), expected (10, 14)",
        "unexpected classifier.weight",
    ):
        assert words in str(caught.value)


def test_a_layer_left_out_is_missed():
    state = {key: value for key, value in detached(gau_alpha_state()).items() if ".layer.1." not in key}
    with pytest.raises(ValueError, match=r"missing gau_alpha\.encoder\.layer\.1\.gau\.i_dense\.weight \(36, 10\)") as e:
        from_gau_alpha(state)
    assert "unexpected" not in str(e.value)


ERRORS = {
    "nothing": (lambda s: from_gau_alpha({}), ValueError, r"missing encoder.layer.0.gau.i_dense.weight \(2e\+S, d\)"),
    "type": (lambda s: from_gau_alpha(3), TypeError, "from_gau_alpha: `source` is a int"),
    "mlm": (lambda s: from_gau_alpha(s, mlm="yes"), TypeError, "`mlm` is 'yes'; expected True, False or None"),
    "token type": (lambda s: from_gau_alpha(s, token_type=2), ValueError, "`token_type` is 2; expected 0 to 1"),
    "file": (lambda s: from_gau_alpha("none.bin"), FileNotFoundError, "`source` is none.bin, where no file is"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call(detached(gau_alpha_state()))

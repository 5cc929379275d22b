"""Language models: configurations, parameters, and what is refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import TIGHT, VARIANTS, VOCAB, causal, config, stirred, tokens

from flashgau.models import KINDS, SIZES, CausalLM, Encoder, MaskedLM, ModelConfig


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_named_configurations(kind, size):
    named = ModelConfig.named(f"{kind}-{size}", checkpointing=True)
    assert named.kind == kind
    assert named.checkpointing
    assert ModelConfig.from_json(named.to_json()) == named
    assert json.loads(named.to_json()) == named.to_dict()
    model = CausalLM(named, device="meta")
    if size == "base":
        assert 100e6 < model.num_parameters() < 125e6
    if size == "tiny":
        assert model.num_parameters() < 1e6


def test_configuration_survives_tuples():
    order = ("quad_q", "lin_q", "quad_k", "lin_k")
    named = ModelConfig(layer={"head_order": order})
    assert ModelConfig.from_dict(named.to_dict()) == named
    assert CausalLM(named, device="meta").stack.layers[0].head_order == order


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_start_small_and_the_loss_at_log_vocab(kind):
    torch.manual_seed(1)
    model = CausalLM(config(kind, dim=64))
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            assert abs(p.std() - 0.02) < 0.002, name
    assert abs(model.loss(tokens(8, 64)) - math.log(VOCAB)) < 0.1


def test_tied_matrices_count_once_and_are_stored_once():
    tied, untied = CausalLM(config("flash")), CausalLM(config("flash", tied=False, head_bias=True))
    assert untied.num_parameters() - tied.num_parameters() == VOCAB * 24 + VOCAB
    storages = [t.data_ptr() for t in tied.state_dict().values()]
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_an_encoder_is_the_masked_model_without_its_head(kind, changes):
    masked = stirred(MaskedLM(config(kind, **changes), dtype=torch.float64))
    encoder = Encoder(masked.config, dtype=torch.float64)
    encoder.stack.load_state_dict(masked.stack.state_dict())
    text, lengths = tokens(2, 9), torch.tensor([9, 4])
    torch.testing.assert_close(masked.head(encoder(text, lengths)), masked(text, lengths), **TIGHT)
    assert encoder.num_parameters() <= masked.num_parameters()


def test_embedding_norm_is_before_the_first_layer():
    model = causal("flash", embedding_norm="rms", positions="scaled_sin", depth=1)
    embedded = model.stack.embedding.weight + model.stack.positions(torch.zeros(VOCAB, dtype=torch.int64))
    rms = embedded / (embedded.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    text = torch.arange(VOCAB)[:, None]
    expected = model.head(model.stack.norm(model.stack.layers[0](rms[:, None])))
    torch.testing.assert_close(model(text), expected, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_bf16(kind):
    torch.manual_seed(0)
    model, text = CausalLM(config(kind)), tokens(2, 20)
    exact = model.loss(text)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(text)
        new = model.generate(text, 4, temperature=0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.02
    assert new.shape == (2, 4)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["flash", "transformer++"])
def test_bf16_parameters(kind):
    model, text = CausalLM(config(kind)).to(torch.bfloat16), tokens(2, 20)
    loss = model.loss(text)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.generate(text, 3, temperature=0).shape == (2, 3)


def test_torch_compile():
    model, text = CausalLM(config("flash")), tokens(1, 9)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(text), model(text))


def test_cross_entropy_counts_only_the_targets():
    model, text = MaskedLM(config("flash")), tokens(1, 9)
    targets = torch.full_like(text, -100)
    targets[0, 4] = 3
    expected = F.cross_entropy(model(text)[0, 4:5], torch.tensor([3]))
    torch.testing.assert_close(model.loss(text, targets), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "64"}, "`dim` is '64'; expected an int"),
        ({"depth": True}, "`depth` is True; expected an int"),
        ({"tied": "no"}, "`tied` is 'no'; expected True or False"),
        ({"layer": {"x": torch.zeros(1)}}, "`layer` is no JSON object"),
        ({"layer": "fast"}, "`layer` is 'fast'; expected a dict"),
    ],
)
def test_configurations_of_the_wrong_types_are_refused(changes, message):
    with pytest.raises(TypeError, match=f"ModelConfig: {message}"):
        ModelConfig(**changes)


one = tokens(1, 4)
ERRORS = {
    "kind": (lambda: ModelConfig(kind="rnn"), "`kind` is 'rnn'; expected one of flash"),
    "positive": (lambda: ModelConfig(depth=0), "`depth` is 0"),
    "positions": (lambda: ModelConfig(positions="learned"), "`positions` is 'learned'"),
    "name": (lambda: ModelConfig.named("flash-huge"), "no configuration is called 'flash-huge'"),
    "field": (lambda: ModelConfig.from_dict({"width": 3}), "no field is called width"),
    "shape": (lambda: causal("flash")(one[0]), r"`tokens` has shape \(4,\); expected \(B, N\)"),
    "range": (lambda: causal("flash")(one + VOCAB), "expected 0 to 22"),
    "loss": (lambda: causal("flash").loss(one[:, :1]), "N at least 2"),
    "targets": (lambda: MaskedLM(config("flash")).loss(one, one[:, :2]), "`targets` has shape"),
    "packed-state": (
        lambda: causal("flash")(one, cu_seqlens=torch.tensor([0, 4]), return_state=True),
        "`cu_seqlens` and a state",
    ),
    "prompt": (lambda: causal("flash").generate(one[:, :0], 3), "`prompt` has shape"),
    "new": (lambda: causal("flash").generate(one, -1), "`max_new_tokens` is -1"),
    "lengths": (lambda: causal("flash").generate(one, 1, lengths=torch.tensor([5])), "numbers from 1 to 4"),
    "temperature": (lambda: causal("flash").generate(one, 1, temperature=-1.0), "`temperature` is -1"),
    "top_k": (lambda: causal("flash").generate(one, 1, top_k=0), "`top_k` is 0"),
    "top_p": (lambda: causal("flash").generate(one, 1, top_p=1.5), "`top_p` is 1.5"),
    "keys": (
        lambda: causal("flash-quad", layer={"normalizer": "keys"}).generate(one, 1),
        'normalizer "keys" divides by the full length',
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_tokens_must_be_integers():
    with pytest.raises(TypeError, match=r"torch.float32; expected an integer type"):
        CausalLM(config("flash"))(torch.zeros(1, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        CausalLM(config("flash", layer={"colour": 1}))

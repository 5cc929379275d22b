"""flashgau inside transformers: `patch_glu`."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers_models import IDS, build, close, gradients

import flashgau
from flashgau.integrations.transformers import patch_glu

transformers = pytest.importorskip("transformers", minversion="5.5")


def t5(activation="gated-gelu"):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, feed_forward_proj=activation, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2", "gemma3", "modernbert", "t5"])
def test_a_patched_model_computes_the_same(kind):
    model = t5().double() if kind == "t5" else build(kind, "eager")
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if kind == "t5" else {})}
    results = []
    keys = list(model.state_dict())
    for patched in (False, True):
        if patched:
            names = patch_glu(model)
            assert len(names) == (4 if kind == "t5" else 2)
            assert patch_glu(model) == names
            assert list(model.state_dict()) == keys
            assert all("forward" in model.get_submodule(name).__dict__ for name in names)
        logits = model(**inputs).logits
        results.append((logits.detach(), gradients(model, logits.square().sum())))
    close(results[0][0], results[1][0], 1e-11)
    for name, gradient in results[0][1].items():
        close(results[1][1][name], gradient, 1e-11 * max(1.0, gradient.abs().max().item()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in twin.parameters():
            parameter.data.zero_()  # its own, not the original's
        assert not torch.equal(twin(**inputs).logits, results[0][0])
    close(model(**inputs).logits.detach(), results[1][0], 1e-11)


def test_patched_projections_fuse_only_while_they_are_plain(monkeypatch):
    calls = []
    for name in ("glu", "glu_linear"):
        real = getattr(flashgau, name)
        monkeypatch.setattr(flashgau, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    model = build("llama", "eager")
    patch_glu(model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    wanted = type(mlp).forward(mlp, x)

    def used():
        calls.clear()
        close(mlp(x), wanted, 1e-12)
        return list(calls)

    assert used() == ["glu_linear"]
    fired = []
    for part, expected in ((mlp.up_proj, ["glu"]), (mlp.act_fn, []), (mlp.down_proj, ["glu_linear"])):
        handle = part.register_forward_hook(lambda *_: fired.append(1))
        assert used() == expected
        assert len(fired) == 1
        handle.remove()
        fired.clear()
    torch.nn.utils.parametrize.register_parametrization(mlp.gate_proj, "weight", nn.Identity())
    assert used() == ["glu"]
    torch.nn.utils.parametrize.remove_parametrizations(mlp.gate_proj, "weight")
    assert used() == ["glu_linear"]
    del mlp.forward
    assert used() == []


def test_t5_keeps_wo_in_fp32_and_its_dropout():
    model = t5().to(torch.bfloat16).train()
    layer = model.encoder.block[0].layer[1].DenseReluDense
    layer.wo.float()
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    torch.manual_seed(1)
    wanted = layer(x)
    patch_glu(model)
    torch.manual_seed(1)
    got = layer(x)
    assert got.dtype == wanted.dtype == torch.float32
    close(got, wanted, 2e-2)
    assert torch.equal(got == 0, wanted == 0)


class Gated(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.down_proj, self.act_fn = nn.Linear(12, 8), act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clipped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=50.0)) * self.up_proj(x))


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Extra(Gated):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("other", [Clipped, Swapped, Residual, Extra, lambda: nn.Linear(3, 3)])
def test_other_arithmetic_is_left_alone(other):
    model = nn.Sequential(other(), Gated())
    assert patch_glu(model) == ["1"]
    with pytest.raises(ValueError, match=r"nothing to patch in Sequential; expected .*gate_proj, up_proj, down_proj"):
        patch_glu(model[:1])


ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "linear": "identity",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_what_they_compute(name):
    model = nn.Sequential(Gated(transformers.activations.ACT2FN[name])).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    wanted = model(x)
    assert patch_glu(model) == ["0"]
    assert model[0].forward.args[-1] == ACTIVATIONS[name]
    close(model(x), wanted, 1e-12)


def test_an_activation_that_flashgau_does_not_have_is_reported():
    model = nn.Sequential(Gated(), Gated(transformers.activations.ACT2FN["quick_gelu"]), Gated(nn.Mish()))
    with pytest.warns(UserWarning, match=r"activation: 1 \(QuickGELUActivation\), 2 \(Mish\)"):
        assert patch_glu(model) == ["0"]


def test_a_forward_replaced_by_others_is_reported():
    model = nn.Sequential(Gated(), Gated())
    model[0].forward = functools.partial(Gated.forward, model[0])
    with pytest.warns(UserWarning, match=r"replaced by other code: 0$"):
        assert patch_glu(model) == ["1"]


def test_weights_on_the_meta_device_and_the_random_state_do_not_matter():
    with torch.device("meta"):
        assert patch_glu(nn.Sequential(Gated())) == ["0"]
    model = Gated()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch_glu(model) == [""]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        patch_glu({})

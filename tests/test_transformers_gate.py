"""flashgau inside transformers: `patch_attention_gate`."""

from __future__ import annotations

import copy
import functools
import pickle
import types

import pytest
import torch
from torch import nn
from transformers_models import GATED, IDS, NAME, build, close, gradients

import flashgau
from flashgau.integrations.transformers import patch_attention_gate

transformers = pytest.importorskip("transformers", minversion="5.5")
pytest.importorskip("transformers.models.qwen3_5")

LAYER = "model.layers.1.self_attn"
PADDING = torch.tensor([[1] * 11, [0] * 4 + [1] * 7, [1] * 6 + [0] * 5])


@pytest.fixture
def gates(monkeypatch):
    """The gates that calls of `flashgau.attention` get."""
    found, real = [], flashgau.attention
    monkeypatch.setattr(flashgau, "attention", lambda *a, **k: found.append(k.get("gate")) or real(*a, **k))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", GATED)
def test_a_patched_model_computes_the_same(kind, padded, dtype, gates):
    mask = PADDING if padded else torch.ones_like(PADDING)
    tight = 1e-11 if dtype == torch.float64 else 2e-6
    results = {}
    hows = ("unpatched", "patched") if padded else ("eager", "unpatched", "patched")  # eager: NaN from padding, in fp64
    for how in hows:
        model = build(kind, "eager" if how == "eager" else NAME, dtype)
        if how == "patched":
            keys = list(model.state_dict())
            assert patch_attention_gate(model) == patch_attention_gate(model) == [LAYER]
            assert list(model.state_dict()) == keys
        gates.clear()
        logits = model(input_ids=IDS, attention_mask=mask if padded else None).logits
        assert [gate is not None for gate in gates] == {"eager": [], "unpatched": [False], "patched": [True]}[how]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        loss = (logits * weights)[mask.bool()].sum()
        results[how] = logits.detach()[mask.bool()], gradients(model, loss)
    assert gates[0].untyped_storage().nbytes() == 2 * gates[0].nbytes  # read where its projection left it
    for other in hows[:-1]:
        tolerance = tight if other == "unpatched" else 5e-6  # eager attention's softmax is in fp32
        close(results["patched"][0], results[other][0], tolerance)
        assert results["patched"][1].keys() == results[other][1].keys()
        for name, gradient in results[other][1].items():
            close(results["patched"][1][name], gradient, tolerance * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("kind", GATED)
def test_a_patched_model_generates_the_same(kind, gates):
    model = build(kind, dtype=torch.float32)
    mask = PADDING.clone()
    mask[2] = 1
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    ids = torch.where(mask.bool(), IDS, 0)
    wanted = model.generate(ids, output_logits=True, **options)
    patch_attention_gate(model)
    gates.clear()
    got = model.generate(ids, output_logits=True, **options)
    assert len(gates) == 6
    assert all(gate is not None for gate in gates)
    assert torch.equal(got.sequences, wanted.sequences)
    close(torch.stack(got.logits), torch.stack(wanted.logits), 1e-5)


def test_prefix_and_then_single_tokens_equal_all_at_once():
    model = build("qwen3_5")
    patch_attention_gate(model)
    with torch.no_grad():
        whole, cache = model(input_ids=IDS).logits, transformers.DynamicCache(config=model.config)
        parts = [model(input_ids=x, past_key_values=cache, use_cache=True).logits for x in IDS.split((8, 1, 1, 1), 1)]
    close(torch.cat(parts, 1), whole, 1e-6)  # the linear layers compute in fp32


def test_the_patch_can_be_undone_copied_and_left(gates):
    model = build("qwen3_5")
    wanted = model(input_ids=IDS).logits.detach()
    patch_attention_gate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in twin.parameters():
            parameter.data.zero_()  # its own, not the original's
        assert not torch.equal(twin(input_ids=IDS).logits, wanted)
    model.set_attn_implementation("eager")
    gates.clear()
    close(model(input_ids=IDS).logits.detach(), wanted)
    assert gates == []
    model.set_attn_implementation(NAME)
    del model.get_submodule(LAYER).forward
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert gates == [None]


def test_hooks_of_the_parts_are_called_and_dropout_acts():
    model = build("qwen3_5", attention_dropout=0.5).train()
    results = []
    for patched in (False, True):
        if patched:
            patch_attention_gate(model)
        fired = []
        handle = model.get_submodule(LAYER).q_proj.register_forward_hook(lambda *_, fired=fired: fired.append(1))
        torch.manual_seed(1)
        results.append(model(input_ids=IDS).logits.detach())
        handle.remove()
        assert fired == [1]
    close(*results, 1e-11)
    assert not torch.allclose(results[0], model.eval()(input_ids=IDS).logits, atol=1e-3)


def test_a_layer_set_to_another_attention_is_refused():
    model = build("qwen3_5", "sdpa")
    with pytest.raises(ValueError, match=rf"attention of {LAYER} is 'sdpa'; expected flashgau's.*set_attn_impl"):
        patch_attention_gate(model)
    assert "forward" not in vars(model.get_submodule(LAYER))


def _of(change):
    """A layer's class whose forward does something else with the gate, or beside it."""
    base = transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5Attention
    kind = types.new_class(f"Other{change.__name__}", (base,))

    def forward(self, *args, **options):
        return change(self, base.forward, *args, **options)

    kind.forward = forward
    kind.__module__ = base.__module__
    return kind


def residual(layer, forward, hidden_states, *args, **options):
    out, weights = forward(layer, hidden_states, *args, **options)
    return out + hidden_states, weights


def uncached(layer, forward, hidden_states, cos_sin, mask, cache=None, **options):
    return forward(layer, hidden_states, cos_sin, mask, None, **options)


def sharpened(layer, forward, *args, **options):
    layer.scaling, scaling = 2 * layer.scaling, layer.scaling
    out = forward(layer, *args, **options)
    layer.scaling = scaling
    return out


@pytest.mark.parametrize("change", [residual, uncached, sharpened])
def test_layers_that_compute_something_else_are_named_and_left_alone(change):
    model = build("qwen3_5")
    model.get_submodule(LAYER).__class__ = _of(change)
    with pytest.raises(ValueError, match=rf"nothing to patch in .*, for {LAYER} \(Other{change.__name__}\) cannot be"):
        patch_attention_gate(model)
    both = nn.ModuleList([model, build("qwen3_5")])
    with pytest.warns(UserWarning, match=rf"they compute something else: 0\.{LAYER} \(Other"):
        assert patch_attention_gate(both) == [f"1.{LAYER}"]


def test_other_models_and_forwards_replaced_by_others_are_refused():
    for kind in ("llama", "qwen3"):  # which have no gate
        with pytest.raises(ValueError, match=r"nothing to patch in \w+; expected attention layers .*as in Qwen3-Next"):
            patch_attention_gate(build(kind))
    model = build("qwen3_5")
    layer = model.get_submodule(LAYER)
    layer.forward = functools.partial(type(layer).forward, layer)
    with pytest.warns(UserWarning, match=rf"replaced by other code: 0\.{LAYER}"):
        patch_attention_gate(nn.ModuleList([model, build("qwen3_5")]))
    with pytest.raises(TypeError, match=r"`model` is a dict; expected a torch\.nn\.Module"):
        patch_attention_gate({})


def test_weights_on_the_meta_device_and_the_random_state_do_not_matter():
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM._from_config(
            transformers.Qwen3_5TextConfig(**GATED["qwen3_5"][2]), attn_implementation=NAME
        )
    assert patch_attention_gate(model) == [LAYER]
    assert torch.equal(torch.get_rng_state(), state)

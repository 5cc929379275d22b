"""flashgau inside transformers: what is refused, and registering."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers_models import IDS, NAME, build, close

import flashgau
from flashgau.integrations.transformers import attention as ours
from flashgau.integrations.transformers import register_attention

transformers = pytest.importorskip("transformers", minversion="5.5")
masking = pytest.importorskip("transformers.masking_utils")


def test_masks_that_are_not_sequences_and_a_window_are_refused():
    call = {"batch_size": 1, "q_length": 9, "kv_length": 9}
    image = masking.or_masks(masking.causal_mask_function, lambda b, h, q, k: (q < 3) & (k < 3))
    where = r"as causal attention it would differ at 3 places, first in row 0, where query 0 sees key 1"
    with pytest.raises(ValueError, match=where):
        ours._attention_mask(**call, mask_function=image, use_vmap=True)
    fewer = masking.and_masks(masking.causal_mask_function, lambda b, h, q, k: k != 4)
    with pytest.raises(ValueError, match=r"where query 4 does not see key 4"):
        ours._attention_mask(**call, mask_function=fewer)
    chunks = masking.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"not one of sequences and a window"):
        ours._attention_mask(1, 3, 9, q_offset=6, mask_function=chunks, local_size=4)


def test_a_window_of_nothing_gives_nothing():
    encoded = ours._attention_mask(
        2, 3, 5, 2, mask_function=masking.sliding_window_causal_mask_function(0), local_size=0
    )
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)
    assert not ours._attention_forward(nn.Module(), q, k, k, encoded)[0].any()


def test_masks_of_another_make_that_mean_the_same_are_taken(monkeypatch):
    monkeypatch.setattr("flashgau.integrations.transformers.intervals._BLOCK", 20)  # several blocks
    call = {"batch_size": 1, "q_length": 9, "kv_length": 9}
    plain = masking.or_masks(masking.causal_mask_function, lambda b, h, q, k: k == q)
    assert ours._facts(ours._attention_mask(**call, mask_function=plain, use_vmap=True)).kind == ours._PLAIN
    chunks = masking.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))  # three sequences
    encoded = ours._attention_mask(**call, mask_function=chunks, local_size=4)
    visible = masking.sdpa_mask(**call, mask_function=chunks, allow_is_causal_skip=False)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    wanted = (0.5 * q @ k.mT).masked_fill(~visible, float("-inf")).softmax(-1) @ v
    close(ours._attention_forward(nn.Module(), q, k, v, encoded)[0], wanted.transpose(1, 2), 1e-12)


def test_refused_inputs_of_a_model():
    model = build("llama")
    holes = torch.ones_like(IDS)
    holes[1, 3] = 0
    with pytest.raises(ValueError, match=r"`attention_mask` is \[1, 1, 1, 0, 1, .* in row 1, with a hole"):
        model(input_ids=IDS, attention_mask=holes)
    for mask in (
        torch.ones(3, 1, 11, 11, dtype=torch.bool),
        torch.zeros(3, 1, 11, 11),
        torch.ones(1, 2000, 1, 1).long(),
    ):
        with pytest.raises(ValueError, match=r"is a torch\.\w+ tensor of shape .*attn_implementation='sdpa'"):
            model(input_ids=IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=IDS, output_attentions=True)
    with pytest.raises(ValueError, match=r"LlamaAttention passes 'position_bias' to its attention"):
        model(input_ids=IDS, position_bias=torch.zeros(1, 4, 11, 11))
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="ends before the last query"):
        model(input_ids=IDS[:, :1], past_key_values=cache, attention_mask=torch.ones_like(IDS))


def test_the_relative_bias_of_t5_is_refused():
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, vocab_size=50)
    model = transformers.T5EncoderModel._from_config(config, attn_implementation=NAME)
    # Before 5.10 or so T5 adds the mask to its scores by itself, which fails for the shape.
    for length in range(1, 12):
        with pytest.raises((ValueError, RuntimeError), match=r"'position_bias'|computes with its attention mask"):
            model(input_ids=IDS[:, :length])


def test_refused_calls_of_the_attention_function():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 9, 4)
    layer = nn.Module()
    with pytest.raises(ValueError, match="neither a mask nor `is_causal`"):
        ours._attention_forward(layer, q, q, q, None)
    with pytest.raises(ValueError, match="5 queries and 9 keys"):
        ours._attention_forward(layer, q, k, k, None, is_causal=True)
    with pytest.raises(ValueError, match="`sliding_window` is 4 without a mask"):
        ours._attention_forward(layer, q, q, q, None, is_causal=True, sliding_window=4)
    with pytest.raises(ValueError, match=r"is for B = 1, M = 5, N = 5; expected the layer's B = 1, M = 5, N = 9"):
        ours._attention_forward(layer, q, k, k, ours._attention_mask(1, 5, 5))
    with pytest.raises(ValueError, match="is list; expected"):
        ours._attention_forward(layer, q, q, q, [1])
    layer.is_causal = True  # which layers say by attribute as well
    got = ours._attention_forward(layer, q, q, q, None, sliding_window=64)[0]
    close(got, flashgau.attention(q, q, q, causal=True).transpose(1, 2), 1e-6)
    window = masking.sliding_window_bidirectional_mask_function(2)
    with pytest.raises(ValueError, match="3 queries beside 5 keys in a mask that is 2 keys ahead with 2 keys back"):
        ours._attention_mask(1, 3, 5, mask_function=window, local_size=2)
    with pytest.raises(ValueError, match="query 2 stands at key 6 of 5"):
        ours._attention_mask(1, 3, 5, q_offset=4)


@pytest.mark.parametrize(
    "name", ["eager", "sdpa", "flash_attention_2", "flex_attention", "flashgau", "paged_x", "a/b", ""]
)
def test_names_that_mean_something_to_transformers_are_refused(name):
    with pytest.raises(ValueError, match="`name` is"):
        register_attention(name)


def test_registering():
    assert register_attention() == register_attention("FlashGAU") == "FlashGAU"
    assert register_attention("another_name") == "another_name"
    transformers.AttentionInterface.register("somebody_elses", lambda *_: None)
    transformers.AttentionMaskInterface.register("his_mask", lambda *_: None)
    for name in ("somebody_elses", "his_mask"):
        with pytest.raises(ValueError, match="registered already"):
            register_attention(name)
    with pytest.raises(TypeError, match="expected a string"):
        register_attention(3)
    model = build("llama", "eager")
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == NAME


def test_without_transformers_or_with_an_old_one_the_error_says_so(monkeypatch):
    # Not `transformers`, which may have replaced itself in the meantime.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.40.0")
    with pytest.raises(ImportError, match=r"this is transformers 4\.40\.0; expected transformers 5\.5 or later"):
        register_attention()

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(ours.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="cannot be imported"):
        register_attention()

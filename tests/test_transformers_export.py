"""flashgau inside transformers: models that are exported, and models that compute with their mask."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers_models import IDS, NAME, build, close, gemma3_text

from flashgau.integrations.transformers import attention as ours

transformers = pytest.importorskip("transformers", minversion="5.5")


def test_a_decoder_is_exported_for_any_batch_and_length():
    model, auto = build("mistral", num_hidden_layers=2), torch.export.Dim.AUTO
    shapes = {"input_ids": {0: auto, 1: auto}, "use_cache": None}
    program = torch.export.export(model, (IDS,), {"use_cache": False}, dynamic_shapes=shapes, strict=False).module()
    other = torch.randint(1, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    for ids in (IDS, other):
        close(program(ids, use_cache=False).logits, model(ids, use_cache=False).logits, 1e-12)


def test_an_exported_decoder_takes_padding_and_stops_at_what_it_was_not_exported_for():
    model = build("llama", num_hidden_layers=2)
    mask = torch.ones_like(IDS)
    mask[1, :4], mask[2, 9:] = 0, 0
    places = torch.arange(11).expand(3, -1)
    inputs = {"attention_mask": mask, "position_ids": places, "use_cache": False}
    program = torch.export.export(model, (IDS,), inputs, strict=False).module()
    for valid in (mask, mask.flip(1)):
        inputs = {"attention_mask": valid, "position_ids": places, "use_cache": False}
        close(program(IDS, **inputs).logits[valid.bool()], model(IDS, **inputs).logits[valid.bool()], 1e-12)
    holes = mask.clone()
    holes[0, 3] = 0
    with pytest.raises(RuntimeError, match=r"flashgau: `attention_mask` has a hole"):
        program(IDS, attention_mask=holes, position_ids=places, use_cache=False)
    inputs = {"position_ids": places, "use_cache": False}
    program = torch.export.export(model, (IDS,), inputs, strict=False).module()
    with pytest.raises(RuntimeError, match=r"flashgau: `position_ids` pack several sequences"):
        program(IDS, position_ids=places % 6, use_cache=False)


def test_an_export_that_cannot_be_says_why():
    model = build("llama")
    with pytest.raises(Exception, match=r"flashgau finds the sequences of a mask in its values.*strict=False"):
        torch.export.export(model, (IDS,), {"use_cache": False}, strict=True)
    torch.manual_seed(0)
    model = transformers.Gemma3TextModel(gemma3_text(use_bidirectional_attention=True)).eval()
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=r"flashgau: torch.export has no values.*attn_implementation='sdpa'"):
        torch.export.export(model, (IDS,), strict=False)


def test_models_that_compute_with_their_mask_are_told_so():
    """Unseen, a matrix of biases was added to a description of sequences, and the shapes did not fit."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    beit = transformers.BeitModel(
        transformers.BeitConfig(**sizes, image_size=16, patch_size=4, use_relative_position_bias=True)
    )
    doge = transformers.DogeModel(transformers.DogeConfig(**sizes, num_key_value_heads=2, vocab_size=50))
    for model, x in ((beit, torch.randn(1, 3, 16, 16)), (doge, IDS)):
        model.eval().set_attn_implementation(NAME)
        with pytest.raises(
            ValueError, match=r"flashgau: this model computes with its attention mask by itself \((add|ne)\)"
        ):
            model(x)
    mask = ours._attention_mask(2, 3, 3)
    for call in (lambda: 1.0 - mask, lambda: mask == 0, lambda: torch.zeros(2, 4, 3, 3) + mask[:, :, :, :3]):
        with pytest.raises(ValueError, match="computes with its attention mask"):
            call()
    for same in (mask.clone(), mask.to("cpu"), copy.deepcopy(mask), mask[:, :, :, :3]):
        assert ours._facts(same) == ours._facts(mask)

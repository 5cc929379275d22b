"""`attention_fn`: a layer with another operation in place of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import randn

import flashgau
from flashgau import nn

LAYERS: dict[str, Any] = {
    "attention": lambda **options: nn.MultiHeadAttention(8, 2, rotary_dim=2, bias="t5", **options),
    "gau_attention": lambda **options: nn.GAU(8, key_dim=4, normalizer="row", **options),
    "mixed_chunk_attention": lambda **options: nn.FLASH(8, key_dim=4, chunk_size=4, **options),
    "heads": lambda **options: nn.MultiHeadMixedChunk(8, 2, chunk_size=4, **options),
}
OPERATIONS = {name: getattr(flashgau, name, flashgau.mixed_chunk_attention) for name in LAYERS}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_called_as_the_layers_own(name, causal):
    """With it, the layer is the same: padded, packed, in parts, token by token."""
    calls = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return OPERATIONS[name](*args, **kwargs)

    torch.manual_seed(0)
    plain = LAYERS[name](causal=causal)
    own = LAYERS[name](causal=causal, attention_fn=watched)
    own.load_state_dict(plain.state_dict())
    x = randn(0, 2, 11, 8)
    cases: list[dict[str, Any]] = [{}, {"lengths": torch.tensor([11, 5])}]
    for options in cases:
        torch.testing.assert_close(own(x, **options), plain(x, **options), rtol=1e-5, atol=1e-6)
    packed = {"cu_seqlens": torch.tensor([0, 4, 11])}
    torch.testing.assert_close(own(x[:1], **packed), plain(x[:1], **packed), rtol=1e-5, atol=1e-6)
    assert len(calls) == 3
    if causal:
        y, state = own(x[:, :10], return_state=True)
        step, _ = own.step(x[:, 10:], state)
        torch.testing.assert_close(torch.cat((y, step), 1), plain(x), rtol=1e-4, atol=1e-5)
        assert len(calls) == 5


@pytest.mark.parametrize("name", LAYERS)
def test_its_result_is_what_the_layer_goes_on_with(name):
    layer = LAYERS[name](attention_fn=lambda *args, **kwargs: torch.zeros_like(OPERATIONS[name](*args, **kwargs)))
    x = randn(0, 2, 7, 8)
    without = layer(x)
    torch.testing.assert_close(without, layer(x.roll(1, 1)).roll(-1, 1))  # every token alone


@pytest.mark.parametrize("name", LAYERS)
def test_what_cannot_be_called_is_refused(name):
    with pytest.raises(TypeError, match=r"`attention_fn` is a str; expected a function that is called as flashgau\."):
        LAYERS[name](attention_fn="fast")

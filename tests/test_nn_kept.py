"""Cosines and sines that layers keep: as fresh ones, made once, longer when needed, and never a part of the layer."""

import copy
import gc
import pickle
from unittest import mock

import pytest
import torch
from strategies import randn
from torch import Tensor

import flashgau
from flashgau.nn import FLASH, GAU, RotaryBias, RotaryEmbedding, kept


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Each test begins without tables."""
    monkeypatch.setattr(kept, "_shared", type(kept._shared)())


def never(*args, **kwargs):
    raise AssertionError("made anew")


def fresh(embedding: RotaryEmbedding, x: Tensor, start: int = 0) -> list[Tensor]:
    positions = torch.arange(start, start + x.shape[-2])
    return list(embedding.turns(x, positions=positions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_kept_is_fresh_bit_for_bit(dtype):
    """Whatever came before: longer, shorter, from a later position, and of another embedding of the same base."""
    for length, start in ((5, 0), (300, 0), (1, 511), (1, 512), (40, 700), (3, 0), (0, 0), (0, 9)):
        embedding, x = RotaryEmbedding(8), randn(0, 2, length, 12, dtype=dtype)
        for found, expected in zip(embedding.turns(x, start), fresh(embedding, x, start), strict=True):
            assert torch.equal(found, expected)
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_second_call_makes_nothing():
    x, embedding = randn(0, 1, 20, 8), RotaryEmbedding()
    embedding(x)
    with mock.patch.object(RotaryEmbedding, "_made", never):
        embedding(x)
        RotaryEmbedding(8)(x[:, 3:], 3)  # of another layer
        with pytest.raises(AssertionError, match="made anew"):
            RotaryEmbedding(8, base=100.0)(x)
        with pytest.raises(AssertionError, match="made anew"):
            embedding(x.double())
    bias = RotaryBias(8)
    bias(20)
    with mock.patch("flashgau.nn.biases.rank_turns", never), mock.patch("flashgau.nn.biases.rotary_bias", never):
        bias(7), RotaryBias(8)(256)


@pytest.mark.parametrize("length", [1, 2, 7, 256, 257, 300])
def test_a_rank_form_of_kept_distances_is_the_function(length):
    bias = RotaryBias(8, dtype=torch.float64)
    bias(3)
    inputs = [bias.a, bias.b]
    weights = randn(1, 2 * length - 1, dtype=torch.float64)
    expected = flashgau.rotary_bias(*inputs, length)
    torch.testing.assert_close(bias(length), expected)
    for a, e in zip(*(torch.autograd.grad(y, inputs, weights) for y in (bias(length), expected)), strict=True):
        torch.testing.assert_close(a, e)


def test_longer_ones_leave_the_shorter_where_a_graph_may_read_them():
    embedding = RotaryEmbedding()
    cos, _ = embedding.turns(randn(0, 1, 10, 8))
    before, place = cos.clone(), cos.data_ptr()
    embedding.turns(randn(0, 1, 3000, 8))
    ((_, tables),) = embedding._kept._held.items()
    assert place in [made[0].data_ptr() for made in tables.made]
    assert torch.equal(cos, before)


def test_a_graph_that_is_captured_makes_its_own():
    """The memory of what is made then is the graph's."""
    embedding, table = RotaryEmbedding(), kept.Kept()
    x = mock.Mock(spec=Tensor, is_cuda=True)
    x.__class__ = Tensor
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        mock.patch.object(kept, "type", return_value=Tensor, create=True),
    ):
        assert table.get("key", x, 4, 10, never) is None
    assert embedding._kept.get("other", randn(0, 1), 4, 3, never) is None  # more than are kept


def test_copies_and_saved_layers_have_none():
    for layer in (FLASH(8, key_dim=4, chunk_size=4), GAU(8, key_dim=4), RotaryBias(8)):
        x = 5 if isinstance(layer, RotaryBias) else randn(0, 1, 5, 8)
        y = layer(x)
        assert not [name for name in layer.state_dict() if "kept" in name or "cos" in name]
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            held = [m._kept._held for m in other.modules() if hasattr(m, "_kept")]
            assert held
            assert not any(held)
            assert torch.equal(other(x), y)


def test_they_are_freed_with_the_last_layer():
    layers = [RotaryEmbedding(8) for _ in range(2)]
    turns = [layer.turns(randn(0, 1, 5, 8)) for layer in layers]
    assert len(kept._shared) == 1
    del layers
    gc.collect()
    assert not kept._shared
    assert turns[0][0].shape == (5, 4)


def test_what_is_made_without_gradients_serves_training():
    """An inference tensor could not be saved for a backward."""
    layer, x = GAU(8, key_dim=4), randn(0, 1, 5, 8)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


def test_transforms_and_traces_make_their_own():
    """A tensor of theirs does not outlive them; and what was made before may be used with other parameters."""
    layer, x = GAU(8, key_dim=4), randn(0, 2, 5, 8)
    expected, parameters = layer(x), dict(layer.named_parameters())
    shared = dict(kept._shared)
    kept._shared.clear()
    layer = GAU(8, key_dim=4)
    layer.load_state_dict(parameters)

    def of_parameters(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))

    torch.testing.assert_close(of_parameters(parameters, x), expected)
    layer = copy.deepcopy(layer)
    kept._shared.clear()
    found = torch.func.grad(lambda p: of_parameters(p, x).sum())(parameters)
    assert not any(tables.made for tables in kept._shared.values())
    expected_grads = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    for a, e in zip(found.values(), expected_grads, strict=True):
        torch.testing.assert_close(a, e)
    assert shared
    with torch.device("meta"):
        there = GAU(8, key_dim=4)
        assert there(torch.empty(1, 5, 8)).shape == (1, 5, 8)
    torch.testing.assert_close(layer(x), expected)  # those of another device are others

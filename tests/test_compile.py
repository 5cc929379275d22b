"""Layers and language models under torch.compile and torch.export: one graph, for any batch and length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import randn
from torch import Tensor

import flashgau
from flashgau import nn
from flashgau.models import CausalLM, MaskedLM, ModelConfig

ANY = torch.export.Dim.DYNAMIC
SIZES = {"dim": 16, "depth": 1, "heads": 2, "key_dim": 8, "chunk_size": 4, "vocab_size": 11}


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


STEPPED: dict[str, Callable[[], Any]] = {
    "FLASH": lambda: nn.FLASH(8, key_dim=4, chunk_size=4, causal=True),
    "MultiHeadMixedChunk": lambda: nn.MultiHeadMixedChunk(8, heads=2, chunk_size=4, causal=True),
    "GAU": lambda: nn.GAU(8, key_dim=4, causal=True, normalizer="row"),
    "MultiHeadAttention": lambda: nn.MultiHeadAttention(8, heads=2, causal=True),
}


@pytest.mark.parametrize("name", STEPPED)
def test_step_compiles_whole(name):
    """One graph without a break, and the values of the plain step: through the ends of chunks, which the rows of the
    batch reach at different times."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = STEPPED[name]().eval()
    x = randn(0, 2, 9, 8)
    compiled = torch.compile(layer.step, backend="eager", fullgraph=True)
    with torch.no_grad():
        _, plain = layer(x[:, :3], lengths=torch.tensor([3, 1]), return_state=True)
        _, state = layer(x[:, :3], lengths=torch.tensor([3, 1]), return_state=True)
        for i in range(3, 9):
            expected, plain = layer.step(x[:, i : i + 1], plain)
            out, state = compiled(x[:, i : i + 1], state)
            near(out, expected)
    if hasattr(state, "memory"):
        plain, state = plain.memory, state.memory
    if isinstance(state, flashgau.MixedChunkState):
        for a, b in zip(state.tensors(), plain.tensors(), strict=True):
            near(a, b)


def test_one_graph_of_a_step_serves_every_step():
    """Where the state has a constant size."""
    torch.compiler.reset()
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    layer = nn.FLASH(8, key_dim=4, chunk_size=4, causal=True).eval()
    compiled = torch.compile(layer.step, backend=keep, fullgraph=True)
    with torch.no_grad():
        _, state = layer(randn(0, 1, 2, 8), return_state=True)
        for i in range(6):
            _, state = compiled(randn(i, 1, 1, 8), state)
    assert len(graphs) == 1


LAYERS: dict[str, Callable[[], Any]] = {
    "FLASH": lambda: nn.FLASH(8, key_dim=4, chunk_size=4, causal=True),
    "GAU, rotary": lambda: nn.GAU(8, key_dim=4, causal=True),
    "GAU, t5": lambda: nn.GAU(8, key_dim=4, spec="lucidrains"),
    "GAU, table": lambda: nn.GAU(8, key_dim=4, bias="toeplitz", max_length=40),
    "MultiHeadAttention": lambda: nn.MultiHeadAttention(8, heads=2, bias="alibi"),
}
MODELS: dict[str, Callable[[], Any]] = {
    "flash": lambda: CausalLM(ModelConfig(kind="flash", **SIZES)),
    "flash-quad": lambda: MaskedLM(ModelConfig(kind="flash-quad", **SIZES)),
}


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in LAYERS), ("GAU, rotary", True)])
def test_layers_are_exported_for_any_length(name, strict):
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    exported = torch.export.export(layer, (randn(0, 2, 6, 8),), dynamic_shapes=({0: ANY, 1: ANY},), strict=strict)
    for shape in ((2, 6), (3, 5), (1, 33), (2, 1)):
        x = randn(1, *shape, 8)
        near(exported.module()(x), layer(x))


@pytest.mark.parametrize(("name", "strict"), [("flash", False), ("flash", True), ("flash-quad", False)])
def test_models_are_exported_for_any_length(name, strict):
    torch.manual_seed(0)
    model = MODELS[name]().eval()

    def inputs(batch: int, n: int) -> dict[str, Tensor]:
        return {"tokens": torch.arange(batch * n).view(batch, n) % 11, "lengths": torch.arange(batch) % n + 1}

    shapes = {"tokens": {0: ANY, 1: ANY}, "lengths": {0: ANY}}
    exported = torch.export.export(model, (), inputs(2, 6), dynamic_shapes=shapes, strict=strict).module()
    for batch, n in ((2, 6), (3, 5), (2, 33)):
        given = inputs(batch, n)
        for out, expected, valid in zip(exported(**given), model(**given), given["lengths"], strict=True):
            near(out[:valid], expected[:valid])


def test_sizes_of_a_traced_program_are_numbers():
    """What depends on the length, as a window or a scale may, is checked like the number that it will be."""

    class Halves(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            n = q.shape[2]
            return flashgau.attention(q, q, q, window=(n // 2, 0), scale=1 / n)

    exported = torch.export.export(Halves(), (randn(0, 2, 2, 6, 4),), dynamic_shapes=({0: ANY},), strict=False)
    q = randn(1, 3, 2, 6, 4)
    near(exported.module()(q), Halves()(q))

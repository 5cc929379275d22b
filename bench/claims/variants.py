"""Models of a trial: those of `flashgau.models`, and what ablations change in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from flashgau import gau_attention
from flashgau.models import ModelConfig
from flashgau.models.stack import TransformerBlock
from flashgau.nn import GAU, FeedForward, GatedFeedForward, MultiHeadAttention
from flashgau.nn.feedforward import VARIANTS
from flashgau.training.objective import model_class, vocabulary

Spec = dict[str, Any]
"""A model as JSON: "config", fields of a `ModelConfig`; "objective"; and what is changed: "feedforward", "mixer"."""


def model_spec(objective: str, change: dict[str, Any] | None = None, **config: Any) -> Spec:
    """The specification of a model; `change` may have "feedforward" and "mixer"."""
    return {"objective": objective, "config": {**config, "vocab_size": vocabulary(objective)}, **(change or {})}


def build(spec: Spec, seed: int = 0, device: str = "cpu") -> nn.Module:
    """The model, with the weights of `seed`: models of equal shapes get equal ones, and so do equal shapes around
    feed-forward layers that differ, which are drawn after all else."""
    torch.manual_seed(seed)
    name = spec.get("feedforward")
    config = spec["config"] | ({"hidden": 1} if name else {})  # whose draws depend on no width
    model = model_class(spec["objective"])(ModelConfig.from_dict(config), device=device)
    if name:
        torch.manual_seed(seed + 1)
        for block in (m for m in model.modules() if isinstance(m, TransformerBlock)):
            made = (spec["config"]["dim"], spec["config"]["hidden"], name)
            block.feedforward = (GatedFeedForward if name in VARIANTS else FeedForward)(*made, device=device)
    if mixer := spec.get("mixer"):
        kind, function = MIXERS[mixer]
        layers: list[Any] = [m for m in model.modules() if isinstance(m, kind)]
        for layer in layers:
            layer.attention_fn = function
    return model


def parameters(spec: Spec) -> int:
    """Of those that are used: a unit without its gate has none of the gate's."""
    return _counted(json.dumps(spec, sort_keys=True))


@cache  # asked again after every trial
def _counted(text: str) -> int:
    spec = json.loads(text)
    model = build(spec, device="meta")
    unused = 0
    if spec.get("mixer") == "no gate":
        unused = sum(m.hidden * (m.dim + 1) for m in model.modules() if isinstance(m, GAU))
    return sum(p.numel() for p in model.parameters()) - unused


def sized(spec: Spec, wanted: int) -> Spec:
    """The same with the `hidden` width, a multiple of 8, that brings the number of parameters nearest to `wanted`."""

    def at(hidden: int) -> Spec:
        return {**spec, "config": {**spec["config"], "hidden": hidden}}

    one, two = parameters(at(8)), parameters(at(16))
    return at(8 * max(1, 1 + round((wanted - one) / (two - one))))


# ---- what stands in place of an operation, called as that is


def gau_of_heads(heads: int, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **options: Any) -> Tensor:
    """The queries, keys, values and gates of a GAU, divided among heads."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).movedim(-2, 1).flatten(0, 1)  # (B H, N, ..)

    out = gau_attention(split(q), split(k), split(v), split(gate), **options)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (-1, heads)).movedim(1, -2).flatten(-2)


def gau_without_gate(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **options: Any) -> Tensor:
    """A v alone."""
    out = gau_attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out


def gau_formula(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, causal: bool, rel_bias: Tensor | None,
                **options: Any) -> Tensor:  # fmt: skip
    """relu2 attention as a textbook writes it, with its N x N scores, every one in memory."""
    n = q.shape[1]
    places = torch.arange(n, device=q.device)
    seen = (places + 1)[:, None] if causal else n
    scores = q @ k.mT / (seen if options["normalizer"] == "row" else n)
    if rel_bias is not None:
        middle = rel_bias.shape[-1] // 2
        scores = scores + rel_bias[..., middle + places[None] - places[:, None]].to(scores.dtype)
    weights = torch.relu(scores).square()
    return gate * ((weights.tril() if causal else weights) @ v)


def relu2_heads(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **options: Any) -> Tensor:
    """Multi-head attention (B, H, N, D) with squared ReLU of the scores over the number of keys seen."""
    b, h = q.shape[:2]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = gau_attention(*flat, causal=causal, normalizer="row")
    assert isinstance(out, Tensor)
    return out.unflatten(0, (b, h))


def attention_formula(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **options: Any) -> Tensor:
    """Softmax attention as a textbook writes it, with its N x N scores."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ v


MIXERS: dict[str, tuple[type[nn.Module], Callable[..., Tensor]]] = {
    "4 heads": (GAU, partial(gau_of_heads, 4)),
    "no gate": (GAU, gau_without_gate),
    "gau formula": (GAU, gau_formula),
    "relu2 heads": (MultiHeadAttention, relu2_heads),
    "attention formula": (MultiHeadAttention, attention_formula),
}

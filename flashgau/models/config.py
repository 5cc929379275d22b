"""What a model is: one dataclass, with sizes by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

CONSTANT_STATE = ("flash", "mc-tfm++")  # kinds that decode with a state of constant size
KINDS = ("flash", "flash-quad", "transformer", "transformer++", "mc-tfm++")
UNIT_KINDS = ("flash", "flash-quad")  # stacks of gated units, two of which replace attention + feed-forward

# What the annotations below say, for values out of a file.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a str"),
    "str | None": ((str, type(None)), "a str or None"),
    "int": ((int,), "an int"),
    "int | None": ((int, type(None)), "an int or None"),
    "bool": ((bool,), "True or False"),
    "dict[str, Any]": ((dict,), "a dict of keyword arguments"),
}

# dim, pairs of attention and feed-forward layer, heads, key_dim, chunk_size, vocab_size. "base" is the paper's.
SIZES = {
    "tiny": (128, 2, 4, 64, 64, 256),
    "small": (256, 4, 4, 128, 128, 256),
    "medium": (512, 6, 8, 128, 256, 256),
    "base": (768, 12, 12, 128, 256, 32000),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a language model. It goes to JSON and back.

    Kinds: "flash" (FLASH layers), "flash-quad" (GAU layers), "transformer" (attention and feed-forward, absolute
    positions), "transformer++" (RoPE and a gated feed-forward), "mc-tfm++" (that with mixed chunk attention).

    Attributes:
        kind: one of the five.
        vocab_size: number of tokens; 256 for bytes.
        dim: d, model width.
        depth: layers: gated units, or pairs of attention and feed-forward.
        hidden: e of a gated unit or width of a feed-forward layer; None for the layer's default.
        heads: attention heads of the transformers.
        kv_heads: their key and value heads; None for as many.
        key_dim: S of the gated units.
        chunk_size: C of "flash" and "mc-tfm++".
        feedforward: activation of "transformer", GLU variant of the "++" kinds; None for gelu and swiglu.
        norm: final norm, and the norms in transformer blocks.
        embedding_norm: norm of the embeddings and their positions, before the first layer.
        positions: what is added to the embeddings, "none" or "scaled_sin"; None for scaled_sin in "transformer" only.
        spec: preset of the gated units.
        layer: further keyword arguments of the gated unit or attention layer, such as {"score": "laplace"}.
        tied: the output matrix is the embedding.
        head_bias: the output has a bias.
        checkpointing: recompute each layer in the backward pass rather than store its activations.

    Example:
        >>> config = ModelConfig.named("flash-tiny", depth=2)
        >>> config.dim, config.depth, ModelConfig.from_json(config.to_json()) == config
        (128, 2, True)
    """

    kind: str = "flash"
    vocab_size: int = 256
    dim: int = 256
    depth: int = 8
    hidden: int | None = None
    heads: int = 4
    kv_heads: int | None = None
    key_dim: int = 128
    chunk_size: int = 128
    feedforward: str | None = None
    norm: str = "layernorm"
    embedding_norm: str = "none"
    positions: str | None = None
    spec: str = "paper"
    layer: dict[str, Any] = field(default_factory=dict)
    tied: bool = True
    head_bias: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            kinds, expected = _TYPES[str(f.type)]
            value = getattr(self, f.name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise TypeError(f"ModelConfig: `{f.name}` is {value!r}; expected {expected}")
            if int in kinds and isinstance(value, int) and value < 1:
                raise ValueError(f"ModelConfig: `{f.name}` is {value}; expected at least 1")
        if self.kind not in KINDS:
            raise ValueError(f"ModelConfig: `kind` is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.positions not in (None, "none", "scaled_sin"):
            raise ValueError(f"ModelConfig: `positions` is {self.positions!r}; expected 'none' or 'scaled_sin'")
        try:
            # What JSON makes of it (tuples become lists), so that a configuration equals its own copy on disk.
            object.__setattr__(self, "layer", json.loads(json.dumps(self.layer)))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"ModelConfig: `layer` is no JSON object ({error}); expected plain values") from error

    @classmethod
    def named(cls, name: str, **changes: Any) -> ModelConfig:
        """The configuration called KIND-SIZE, with some fields changed; sizes: tiny, small, medium, base.

        "base" is the GAU paper's (about 110 million parameters with 32,000 tokens); the others take bytes.
        """
        kind, _, size = name.rpartition("-")
        if kind not in KINDS or size not in SIZES:
            raise ValueError(
                f"ModelConfig: no configuration is called {name!r}; expected KIND-SIZE with a kind of "
                f"{', '.join(KINDS)} and a size of {', '.join(SIZES)}"
            )
        dim, pairs, heads, key_dim, chunk_size, vocab_size = SIZES[size]
        values: dict[str, Any] = {
            "kind": kind,
            "vocab_size": vocab_size,
            "dim": dim,
            "depth": 2 * pairs if kind in UNIT_KINDS else pairs,
            "heads": heads,
            "key_dim": key_dim,
            "chunk_size": chunk_size,
        }
        return cls.from_dict(values | changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration with these fields; the others have their defaults.

        Raises:
            ValueError: there is no such field, or its value is not possible.
            TypeError: a value is of another type, or `values` are none by name.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"ModelConfig: `values` is a {type(values).__name__}; expected values by names of fields")
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ValueError(
                f"ModelConfig: no field is called {', '.join(unknown)}; fields: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Read what `to_json` wrote; errors are those of `from_dict`, and ValueError for what is no JSON."""
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("ModelConfig: `text` is nested too deeply; expected what `to_json` wrote") from error
        return cls.from_dict(values)

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

"""Weights of elsewhere as files: whose they are, and single gated units in the form of a model's file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import CausalLM, MaskedLM, ModelConfig
from ..models.config import UNIT_KINDS
from ..models.files import read_model, write_model
from ..models.stack import make_layer
from ..nn import FLASH, GAU
from .state import State

GAU_ALPHA = "GAU-alpha"
# What tells a kind: the end of a name. The first that is there counts.
MARKS = {
    GAU_ALPHA: "embeddings.word_embeddings.weight",
    "FLASHTransformer": "token_emb.weight",
    "FLASH": "qk_offset_scale.gamma",
    "GAU": "offsetscale.gamma",
}


def kind_of(state: State) -> str:
    """Whose weights these are: a key of `MARKS`.

    Raises:
        ValueError: nobody's that is known.

    Example:
        >>> kind_of({"offsetscale.gamma": torch.ones(2, 8)})
        'GAU'
    """
    for kind, mark in MARKS.items():
        if mark in state or (kind == GAU_ALPHA and any(key.endswith(f".{mark}") for key in state)):
            return kind
    names = sorted(state)
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    expected = ", ".join(f"{mark} ({kind})" for kind, mark in MARKS.items())
    raise ValueError(f"it holds {', '.join(names[:6]) or 'no tensors'}{more}; expected one of {expected}")


def save_layer(layer: GAU | FLASH, path: str | os.PathLike[str]) -> None:
    """Write a layer that `from_flash_pytorch` made to a new file, which `load_layer` reads."""
    sizes: dict[str, Any] = {"dim": layer.dim, "hidden": layer.hidden, "key_dim": layer.key_dim}
    options: dict[str, Any] = {
        "causal": layer.causal,
        "norm": "layernorm" if isinstance(layer.norm, nn.LayerNorm) else "scalenorm_clamped",
        "score": layer.score,
    }
    if isinstance(layer, FLASH):
        sizes |= {"kind": "flash", "chunk_size": layer.chunk_size}
        options |= {"token_shift": layer.token_shift, "lin_normalizer": layer.lin_normalizer}
        options["rotary_dim"] = 0 if layer.rotary is None else layer.rotary.dim
    else:
        sizes["kind"] = "flash-quad"
        options |= {"normalizer": layer.normalizer, "residual": layer.residual}
    config = ModelConfig(depth=1, spec="lucidrains", layer=options, **sizes)
    write_model(path, type(layer).__name__, config, layer.state_dict(), False)


def load_layer(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> GAU | FLASH:
    """The single layer that `flashgau convert` wrote to `path`, in evaluation mode, in the dtype it was saved in.

    Args:
        path: the file.
        device: where the parameters go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds no layer.
    """
    layer: Any = read_model(path, device, _LAYERS)
    return layer.eval()


def load_convertible(path: Path) -> Any:
    """The model or layer in a file of flashgau's that `to_flash_pytorch` may take."""
    return read_model(path, "cpu", {"CausalLM": CausalLM, "MaskedLM": MaskedLM, **_LAYERS})


def _layer(config: ModelConfig, **factory: Any) -> nn.Module:
    if config.kind not in UNIT_KINDS:
        raise ValueError(f"`kind` is {config.kind!r}; expected one of {', '.join(UNIT_KINDS)}")
    options = dict(config.layer)
    causal = options.pop("causal", False)
    return make_layer(replace(config, layer=options), causal, **factory)


_LAYERS: dict[str, Callable[..., nn.Module]] = {"GAU": _layer, "FLASH": _layer}

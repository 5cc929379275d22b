"""Weights of GAU-alpha, an encoder of gated attention units, to flashgau."""

from __future__ import annotations

from typing import Any

import torch

from ..models import Encoder, MaskedLM, ModelConfig
from ..tensors import differences
from .state import Source, State, layer_count, read_state, shapes_of, size_of

PREFIX = "gau_alpha."  # of the encoder's keys in a model with a head
WORDS, TYPES = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"
# Of each layer, with their shapes: i_dense makes gate, value and the shared z, in this order.
LAYER: dict[str, tuple[str, ...]] = {
    "gau.i_dense.weight": ("2e+S", "d"),
    "gau.o_dense.weight": ("d", "e"),
    "gau.q_scaleoffset.weight": ("S",),
    "gau.k_scaleoffset.weight": ("S",),
}


def from_gau_alpha(source: Source, *, mlm: bool | None = None, token_type: int = 0) -> MaskedLM | Encoder:
    """Make the flashgau model that computes what GAU-alpha computes.

    GAU-alpha is the encoder of Su Jianlin and others (github.com/ZhuiyiTechnology/GAU-alpha); the names are those of
    its PyTorch port (github.com/JunnYu/GAU-alpha-pytorch). Outputs and gradients are equal up to rounding, padded rows
    with `lengths` included (the port takes every token 0 for padding, flashgau looks at `lengths` only). Texts under 16
    tokens follow bert4keras, whose softmax_plus counts at least 16 keys; the port counts the keys as they are. Dropout
    is not carried over: compare in `eval()`.

    A text here is one segment: row `token_type` of the token type embeddings is added to all word embeddings.

    Args:
        source: the model, its state dict, or the path of one (.safetensors, or a file of `torch.save`).
        mlm: whether the result predicts tokens. None: if there is an output matrix. True without one ties it to the
            word embeddings, as GAU-alpha does; False leaves it out.
        token_type: which segment the texts are.

    Returns:
        `MaskedLM`, or `Encoder` without an output matrix, of kind "flash-quad" with `spec="gau-alpha"`; device and
        dtype are the source's.

    Raises:
        ValueError: keys or shapes are not those of GAU-alpha; all of them are listed.
        TypeError: an argument is of no known kind.
        FileNotFoundError: there is no such file.

    Example:
        >>> import torch
        >>> shapes = {
        ...     "embeddings.word_embeddings.weight": (100, 16), "embeddings.token_type_embeddings.weight": (2, 16),
        ...     "encoder.layer.0.gau.i_dense.weight": (72, 16), "encoder.layer.0.gau.o_dense.weight": (16, 32),
        ...     "encoder.layer.0.gau.q_scaleoffset.weight": (8,), "encoder.layer.0.gau.k_scaleoffset.weight": (8,),
        ... }
        >>> encoder = from_gau_alpha({key: torch.randn(shape) for key, shape in shapes.items()})
        >>> tuple(encoder(torch.randint(100, (2, 30))).shape)
        (2, 30, 16)
    """
    if mlm is not None and not isinstance(mlm, bool):
        raise TypeError(f"from_gau_alpha: `mlm` is {mlm!r}; expected True, False or None")
    state = read_state("from_gau_alpha", source)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state) else ""
    depth = layer_count(state, f"{prefix}encoder.layer")
    layers = [f"{prefix}encoder.layer.{i}." for i in range(depth)]
    sizes = _sizes(state, prefix, layers)
    expected: dict[str, tuple[str, ...]] = {prefix + WORDS: ("V", "d"), prefix + TYPES: ("T", "d")}
    for layer in layers or [f"{prefix}encoder.layer.0."]:
        expected |= {layer + key: shape for key, shape in LAYER.items()}
    if DECODER in state:
        expected[DECODER] = ("V", "d")
    known = {key: tuple(sizes.get(axis, axis) for axis in shape) for key, shape in expected.items()}
    problems = differences(shapes_of(state), known)
    if problems:
        raise ValueError(f"from_gau_alpha: not the state dict of a GAU-alpha: {'; '.join(problems)}")
    if not isinstance(token_type, int) or not 0 <= token_type < sizes["T"]:
        raise ValueError(f"from_gau_alpha: `token_type` is {token_type!r}; expected 0 to {sizes['T'] - 1}")

    config = ModelConfig(
        kind="flash-quad",
        vocab_size=sizes["V"],
        dim=sizes["d"],
        depth=depth,
        hidden=sizes["e"],
        key_dim=sizes["S"],
        norm="none",
        embedding_norm="rms",
        spec="gau-alpha",
        tied=False,  # its output matrix is the word embeddings without the token type's
    )
    words = state[prefix + WORDS]
    mapped = {"stack.embedding.weight": words + state[prefix + TYPES][token_type]}
    for i, layer in enumerate(layers):
        dense, out, q, k = (state[layer + key] for key in LAYER)
        mapped |= {
            f"stack.layers.{i}.to_hidden.weight": dense,
            f"stack.layers.{i}.to_out.weight": out,
            f"stack.layers.{i}.offset_scale.gamma": torch.stack((q, k)),
        }
    factory: dict[str, Any] = {"device": words.device, "dtype": words.dtype}
    model: MaskedLM | Encoder
    if mlm or (mlm is None and DECODER in state):
        mapped["head_weight"] = state.get(DECODER, words)
        model = MaskedLM(config, **factory)
    else:
        model = Encoder(config, **factory)
    model.load_state_dict(mapped)
    return model


def _sizes(state: State, prefix: str, layers: list[str]) -> dict[str, int]:
    """The sizes that most tensors agree on, by their letters; a letter that nothing tells is left out."""
    q_k = [layer + f"gau.{head}_scaleoffset.weight" for layer in layers for head in "qk"]
    dense, out = ([layer + f"gau.{way}_dense.weight" for layer in layers] for way in "io")
    found = {
        "V": size_of(state, [(prefix + WORDS, 2, 0), (DECODER, 2, 0)]),
        "T": size_of(state, [(prefix + TYPES, 2, 0)]),
        "d": size_of(state, [*((key, 2, 1) for key in (prefix + WORDS, *dense)), *((key, 2, 0) for key in out)]),
        "e": size_of(state, [(key, 2, 1) for key in out]),
        "S": size_of(state, [(key, 1, 0) for key in q_k]),
    }
    sizes = {letter: size for letter, size in found.items() if size is not None}
    if "e" in sizes and "S" in sizes:
        sizes["2e+S"] = 2 * sizes["e"] + sizes["S"]
    return sizes

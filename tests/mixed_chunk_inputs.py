"""Inputs of `flashgau.mixed_chunk_attention`, and its states together."""

from dataclasses import fields

from backends import dtypes_of
from hypothesis import strategies as st
from strategies import Call, randn, seeds
from torch import Tensor

import flashgau


def draw_dense(data, backend, *, chunk=None, chunks=None, dtype=None, **options) -> Call:
    """A call without padding, packing or states."""
    dtype = dtype or data.draw(st.sampled_from(dtypes_of(backend)))
    few = backend == "triton"  # programs that an interpreter goes through
    chunk = chunk or data.draw(st.integers(1, 5 if few else 9))
    if chunks is None:
        n = data.draw(st.integers(1, (2 if few else 4) * chunk + 2))
    else:
        n = chunk * chunks
    b = data.draw(st.sampled_from([1, 2] if few else [1, 2, 3]))
    width, value_width = data.draw(st.sampled_from([(8, 8), (5, 19), (16, 3)]))
    seed = data.draw(seeds)
    widths = [width] * 4 + [value_width] * data.draw(st.integers(1, 2))
    operands = tuple(randn(seed + i, b, n, w, dtype=dtype) for i, w in enumerate(widths))
    kwargs = {"chunk_size": chunk, "score": data.draw(st.sampled_from(["relu2", "laplace"]))}
    kwargs["lin_normalizer"] = data.draw(st.sampled_from(["tokens", 4]))
    if data.draw(st.booleans()):
        kwargs["rel_bias"] = randn(seed + 9, 2 * chunk + 1, dtype=dtype)
    return Call("mixed_chunk_attention", operands, kwargs | options)


def concatenated_state(state: flashgau.MixedChunkState) -> list[Tensor]:
    return [getattr(state, f.name) for f in fields(state)]

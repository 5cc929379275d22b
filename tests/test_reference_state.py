"""The reference's mixed chunk state."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from flashgau.reference.mixed_chunk import MixedChunkState
from hypothesis import given
from hypothesis import strategies as st
from reference_values import close, leaves, pad, randoms, seeds
from torch import Tensor

from flashgau import reference

FIELDS = ("kv", "quad_k", "lin_k", "v", "position")


def mixed_inputs(seed: int, batch: int, n: int) -> tuple[list[Tensor], Tensor]:
    *inputs, bias = randoms(seed, *[(batch, n, 2)] * 4, *[(batch, n, 3)] * 2, (batch, 9))
    return inputs, bias


@given(seeds, st.integers(1, 4), st.integers(0, 9), st.data())
def test_a_sequence_continues_from_its_state(seed, chunk, n, data):
    inputs, bias = mixed_inputs(seed, 2, n)
    options: dict[str, Any] = {"chunk_size": chunk, "causal": True, "rel_bias": bias, "return_state": True}
    expected, last = reference.mixed_chunk_attention(*inputs, **options)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    state, outs = None, []
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        out, state = reference.mixed_chunk_attention(
            *(x[:, start:stop] for x in inputs), initial_state=state, **options
        )
        outs.append(out)
    close(torch.cat(outs, 1), expected)
    for name in FIELDS:
        close(getattr(state, name), getattr(last, name))
    assert last.position.tolist() == [n, n]
    assert last.open_tokens.tolist() == [n % chunk] * 2
    closed = n - n % chunk
    close(last.kv, inputs[3][:, :closed].mT @ inputs[4][:, :closed])
    for x, kept in ((inputs[1], last.quad_k), (inputs[3], last.lin_k), (inputs[4], last.v)):
        close(kept, pad(x[:, closed:], chunk, 0.0, 1))


@given(seeds, st.integers(1, 3), st.integers(1, 7), st.sampled_from(["tokens", 1.5]))
def test_token_by_token_is_parallel(seed, chunk, n, lin_normalizer):
    inputs, bias = mixed_inputs(seed, 2, n)
    options: dict[str, Any] = {"rel_bias": bias, "lin_normalizer": lin_normalizer, "score": "laplace"}
    _, state = reference.mixed_chunk_attention(
        *(x[:, :0] for x in inputs), chunk_size=chunk, causal=True, return_state=True, **options
    )
    outs = []
    for i in range(n):
        out, state = reference.mixed_chunk_step(*(x[:, i : i + 1] for x in inputs), state=state, **options)
        outs.append(out)
    expected = reference.mixed_chunk_attention(*inputs, chunk_size=chunk, causal=True, **options)
    close(torch.cat(outs, 1), expected)


@given(
    seeds,
    st.lists(st.integers(0, 7), min_size=2, max_size=2),
    st.lists(st.integers(0, 5), min_size=2, max_size=2),
)
def test_states_of_padded_and_packed_sequences(seed, first, second):
    """Two sequences of different lengths, continued by different lengths: padded, then packed, as alone."""
    options: dict[str, Any] = {"chunk_size": 3, "causal": True, "return_state": True}
    inputs, _ = mixed_inputs(seed, 2, 12)
    cut = [
        [torch.cat([x[b : b + 1, : first[b]] for b in range(2)], 1) for x in inputs],
        [torch.cat([x[b : b + 1, first[b] : first[b] + second[b]] for b in range(2)], 1) for x in inputs],
    ]
    bounds = [torch.tensor([0, *x]).cumsum(0) for x in (first, second)]
    _, state = reference.mixed_chunk_attention(*(x[:, :7] for x in inputs), lengths=torch.tensor(first), **options)
    _, packed_state = reference.mixed_chunk_attention(*cut[0], cu_seqlens=bounds[0], **options)
    for name in FIELDS:
        close(getattr(packed_state, name), getattr(state, name))
    out, state = reference.mixed_chunk_attention(*cut[1], cu_seqlens=bounds[1], initial_state=state, **options)
    expected, alone = reference.mixed_chunk_attention(
        *inputs, lengths=torch.tensor(first) + torch.tensor(second), **options
    )
    close(out[0], torch.cat([expected[b, first[b] : first[b] + second[b]] for b in range(2)]))
    for name in FIELDS:
        close(getattr(state, name), getattr(alone, name))


def test_gradients_flow_through_the_state():
    inputs, bias = mixed_inputs(0, 1, 8)
    options: dict[str, Any] = {"chunk_size": 3, "causal": True, "rel_bias": bias}
    whole, parts = leaves(inputs), leaves(inputs)
    reference.mixed_chunk_attention(*whole, **options).square().sum().backward()
    a, state = reference.mixed_chunk_attention(*(x[:, :5] for x in parts), return_state=True, **options)
    b = reference.mixed_chunk_attention(*(x[:, 5:] for x in parts), initial_state=state, **options)
    (a.square().sum() + b.square().sum()).backward()
    for x, y in zip(parts, whole, strict=True):
        close(x.grad, y.grad)


def test_state_ignores_rows_past_the_open_tokens_and_selects_rows():
    inputs, _ = mixed_inputs(0, 2, 5)
    options: dict[str, Any] = {"chunk_size": 3, "causal": True}
    _, state = reference.mixed_chunk_attention(*inputs, return_state=True, **options)
    expected = reference.mixed_chunk_attention(*inputs, initial_state=state, **options)
    dirty = {name: getattr(state, name).clone() for name in ("quad_k", "lin_k", "v")}
    for x in dirty.values():
        x[:, 2:] = math.nan
    close(reference.mixed_chunk_attention(*inputs, initial_state=replace(state, **dirty), **options), expected)
    index = torch.tensor([1, 1, 0])
    picked = state.select(index)
    assert isinstance(picked, MixedChunkState)
    assert picked.chunk_size == 3
    out = reference.mixed_chunk_attention(*(x[index] for x in inputs), initial_state=picked, **options)
    close(out, expected[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_half_inputs_keeps_a_wide_sum(dtype):
    inputs = [x.to(dtype) for x in mixed_inputs(0, 2, 5)[0]]
    options: dict[str, Any] = {"chunk_size": 3, "causal": True, "return_state": True}
    out, state = reference.mixed_chunk_attention(*inputs, **options)
    out2, state2 = reference.mixed_chunk_step(*(x[:, :1] for x in inputs), state=state)
    assert out.dtype == out2.dtype == dtype
    for s in (state, state2):
        assert s.kv.dtype == torch.float32
        assert s.quad_k.dtype == s.lin_k.dtype == s.v.dtype == dtype


def test_state_of_an_empty_batch():
    inputs, _ = mixed_inputs(0, 0, 4)
    _, state = reference.mixed_chunk_attention(*inputs, chunk_size=3, causal=True, return_state=True)
    assert [tuple(getattr(state, name).shape) for name in FIELDS] == [
        (0, 2, 3),
        (0, 3, 2),
        (0, 3, 2),
        (0, 3, 3),
        (0,),
    ]

"""flashgau inside transformers: what its masks mean, and what the attention function makes of them."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers_models import IDS, build, close

import flashgau
from flashgau.integrations.transformers import attention as ours

masking = pytest.importorskip("transformers.masking_utils")


@st.composite
def batches(draw):
    """Rows of tokens with padding on both sides, of which some are in a cache, dynamic or static."""
    batch, queries, past = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 5))
    total = past + queries
    rows = [sorted(draw(st.tuples(st.integers(0, total), st.integers(0, total)))) for _ in range(batch)]
    mask = torch.tensor([[a <= i < b for i in range(total)] for a, b in rows]) if draw(st.booleans()) else None
    window = draw(st.none() | st.integers(1, 7))
    causal = draw(st.booleans())
    spare = draw(st.integers(0, 3)) if causal else 0
    if not causal and window is not None:
        past, mask = 0, None if mask is None else mask[:, past:]
    offset = torch.tensor(past) if draw(st.booleans()) else past
    if not causal and window is not None:
        offset = past
    return batch, queries, past, spare, offset, mask, window, causal


@given(batches(), st.booleans(), st.integers(0, 2**31))
def test_any_batch_equals_softmax_with_transformers_own_mask(case, opaque, seed):
    batch, queries, past, spare, offset, mask, window, causal = case
    keys = past + queries + spare
    factory = {
        (True, True): masking.sliding_window_causal_mask_function,
        (False, True): masking.sliding_window_bidirectional_mask_function,
        (True, False): lambda _: masking.causal_mask_function,
        (False, False): lambda _: masking.bidirectional_mask_function,
    }[causal, window is not None](window)
    function = (lambda *places: factory(*places)) if opaque else factory  # known by evaluation, known by comparison
    call = {"batch_size": batch, "q_length": queries, "kv_length": keys, "q_offset": offset, "mask_function": function}
    call |= {"attention_mask": mask, "local_size": window, "allow_is_causal_skip": False}
    visible = masking.sdpa_mask(**call)
    encoded = ours._attention_mask(**call)

    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, h, 4, dtype=torch.float64, generator=generator).transpose(1, 2)
        for n, h in ((queries, 4), (keys, 2), (keys, 2))
    )
    tokens = torch.arange(keys) < past + queries
    if mask is not None:
        tokens = tokens & nn.functional.pad(mask, (0, spare))
    for x in (k, v):  # padding and slots of the cache that are not used yet hold rubbish
        x.transpose(1, 2)[~tokens.expand(batch, -1)] = float("nan")
    layer = nn.Module()
    got, matrix = ours._attention_forward(layer, q, k, v, encoded, scaling=0.3)
    assert matrix is None
    assert got.shape == (batch, queries, 4, 4)

    clean_k, clean_v = (x.nan_to_num().repeat_interleave(2, 1) for x in (k, v))
    scores = (0.3 * q @ clean_k.mT).masked_fill(~visible, float("-inf"))
    wanted = (scores.softmax(-1).nan_to_num() @ clean_v).transpose(1, 2)
    if mask is not None and (causal or window is not None):  # at padding 0, or what it would see were it none
        assert got.isfinite().all()
        assert opaque or not causal or not got[~mask[:, past:]].any()
        got, wanted = (x.masked_fill(~mask[:, past:, None, None], 0) for x in (got, wanted))
    close(got, wanted, 1e-12)
    lost = encoded.clone()  # as on another device: what the host knew is read again
    assert ours._facts(lost) == ours._facts(encoded)


@given(st.integers(1, 3), st.integers(1, 9), st.none() | st.integers(1, 5), st.integers(0, 2**31))
def test_any_packing_equals_softmax_with_transformers_own_mask(batch, length, window, seed):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=generator) < 0.4
    starts[:, 0] = True
    place = torch.arange(length).expand(batch, -1)
    position_ids = place - torch.where(starts, place, 0).cummax(1).values
    packed = masking.find_packed_sequence_indices(position_ids)
    factory = masking.causal_mask_function if window is None else masking.sliding_window_causal_mask_function(window)
    if packed is not None and hasattr(masking, "packed_sequence_compatibility_function"):
        factory = masking.packed_sequence_compatibility_function(factory, position_ids, packed)
    elif packed is not None:  # older versions
        factory = masking.and_masks(factory, masking.packed_sequence_mask_function(packed))
    call = {"batch_size": batch, "q_length": length, "kv_length": length, "mask_function": factory}
    call |= {"local_size": window, "allow_is_causal_skip": False}
    visible, encoded = masking.sdpa_mask(**call), ours._attention_mask(**call)
    q, k, v = (torch.randn(batch, 2, length, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    wanted = (0.5 * q @ k.mT).masked_fill(~visible, float("-inf")).softmax(-1) @ v
    close(ours._attention_forward(nn.Module(), q, k, v, encoded)[0], wanted.transpose(1, 2), 1e-12)


def asymmetric(left, right):
    """As moonshine, T5Gemma 2 and others make it: `left` keys back, `right` ahead."""
    return lambda b, h, q, k: ((q >= k) & (q - k <= left)) | ((q < k) & (k - q <= right))


@given(
    st.integers(1, 2), st.integers(1, 8), st.integers(0, 9), st.integers(0, 9), st.sampled_from(("and", "or", "plain")),
    st.sampled_from(("none", "left", "right", "packed")), st.integers(0, 2**31),
)  # fmt: skip
def test_a_window_is_found_in_the_mask_whoever_made_it(batch, length, left, right, how, padding, seed):
    """Without a word about the window beside the mask."""
    window = asymmetric(left, right)
    function = {
        "and": masking.and_masks(masking.bidirectional_mask_function, window),
        "or": masking.or_masks(masking.sliding_window_causal_mask_function(left + 1), window),
        "plain": window,
    }[how]
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if padding == "packed":
        numbers = torch.randint(0, 2, (batch, length), generator=generator).cumsum(1)
        function = masking.and_masks(function, masking.packed_sequence_mask_function(numbers))
    elif padding != "none":
        mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
        mask = mask.flip(1) if padding == "left" else mask
    call = {"batch_size": batch, "q_length": length, "kv_length": length, "mask_function": function}
    call |= {"attention_mask": mask, "use_vmap": padding != "packed"}
    visible, encoded = masking.sdpa_mask(**call, allow_is_causal_skip=False), ours._attention_mask(**call)
    q, k, v = (torch.randn(batch, 2, length, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    wanted = ((0.5 * q @ k.mT).masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(1, 2)
    got = ours._attention_forward(nn.Module(), q, k, v, encoded)[0]
    token = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    close(got[token], wanted[token], 1e-12)


@given(st.integers(2, 7), st.integers(0, 2**31))
def test_any_mask_is_computed_or_refused(length, seed):
    """Whatever a mask of ones and zeros says: never another one."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(1, length, length, generator=generator) < torch.rand((), generator=generator) ** 0.3
    table = table if seed % 2 else table & torch.ones(length, length).tril().bool()
    call = {
        "batch_size": 1,
        "q_length": length,
        "kv_length": length,
        "mask_function": lambda b, h, q, k: table[b, q, k],
    }
    q, k, v = (torch.randn(1, 2, length, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    try:
        encoded = ours._attention_mask(**call)
    except ValueError as error:
        message = str(error)
    else:
        wanted = (0.5 * q @ k.mT).masked_fill(~table, float("-inf")).softmax(-1) @ v
        close(ours._attention_forward(nn.Module(), q, k, v, encoded)[0], wanted.transpose(1, 2), 1e-12)
        return
    row, query, sees, key = re.search(
        r"first in row (\d+), where query (\d+) (sees|does not see) key (\d+)", message
    ).groups()
    assert bool(table[int(row), int(query), int(key)]) == (sees == "sees")


def test_masks_are_known_by_comparison_and_cheap(monkeypatch):
    def evaluated(*_, **__):
        raise AssertionError("evaluated")

    call = {"batch_size": 2, "q_length": 6, "kv_length": 6}
    monkeypatch.setattr(masking, "sdpa_mask", evaluated)
    for function in (
        masking.causal_mask_function,
        masking.bidirectional_mask_function,
        masking.sliding_window_causal_mask_function(3),
        masking.sliding_window_bidirectional_mask_function(3),
    ):
        assert ours._attention_mask(**call, mask_function=function, local_size=3).numel() == 1024
    with pytest.raises(AssertionError, match="evaluated"):  # another window than the argument says
        ours._attention_mask(**call, mask_function=masking.sliding_window_causal_mask_function(2), local_size=3)
    q = torch.randn(1, 6, 2, 4).transpose(1, 2)
    assert ours._end_to_end(torch.randn(3, 6, 2, 4).transpose(1, 2))._base is not None  # a view, not a copy
    assert ours._attention_forward(nn.Module(), q, q, q, ours._attention_mask(1, 6, 6))[0].shape == (1, 6, 2, 4)


def test_right_padding_goes_by_lengths_and_no_padding_by_nothing(monkeypatch):
    seen = []
    real = flashgau.attention
    monkeypatch.setattr(flashgau, "attention", lambda *a, **k: seen.append(k) or real(*a, **k))
    model = build("llama")
    right = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [1] + [0] * 10])
    for mask in (None, torch.ones_like(right), right, right.flip(1)):
        model(input_ids=IDS, attention_mask=mask)
    kinds = [(k["lengths"] is not None, k["cu_seqlens"] is not None) for k in seen[::2]]
    assert kinds == [(False, False), (False, False), (True, False), (False, True)]
    assert seen[4]["lengths"].tolist() == [11, 6, 1]

"""The reference by its own laws, and what it keeps under dropout."""

import math
from typing import Any

import pytest
import torch
from flashgau.reference.attention import dropout_kept, philox
from hypothesis import given
from hypothesis import strategies as st
from reference_values import SCORES, close, pad, randoms, seeds
from torch import Tensor

from flashgau import reference

# ---------------------------------------------------------------- laws


@given(seeds, st.integers(1, 7), st.booleans())
def test_attention_ignores_the_order_of_keys_and_keeps_constants(seed, n, has_sinks):
    q, k, v, sinks = randoms(seed, (1, 2, 3, 4), (1, 2, n, 4), (1, 2, n, 2), (2,))
    options = {"sinks": sinks} if has_sinks else {}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    expected = reference.attention(q, k, v, **options)
    close(reference.attention(q, k[:, :, order], v[:, :, order], **options), expected)
    if not has_sinks:
        close(reference.attention(q, k, torch.full_like(v, 3.0)), torch.full((1, 2, 3, 2), 3.0).double())


@given(seeds, st.integers(0, 8))
def test_attention_over_split_keys_merges_by_lse(seed, cut):
    q, k, v = randoms(seed, (2, 2, 3, 4), (2, 2, 8, 4), (2, 2, 8, 5))
    parts = [
        reference.attention(q, k[:, :, part], v[:, :, part], return_lse=True) for part in (slice(0, cut), slice(cut, 8))
    ]
    out, lse = reference.attention(q, k, v, return_lse=True)
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    close(merged, lse)
    close(sum(o * (part_lse - merged).exp()[..., None] for o, part_lse in parts), out)


@given(seeds, st.integers(1, 6), st.integers(0, 6))
def test_causal_prefix_is_stable(seed, prefix, more):
    """What a causal token gets does not depend on what follows, if the normaliser does not."""
    n = prefix + more
    q, k, v = randoms(seed, (1, n, 2), (1, n, 2), (1, n, 3))

    def heads(*xs: Tensor) -> list[Tensor]:
        return [x[:, None] for x in xs]

    cut = [x[:, :prefix] for x in (q, k, v)]
    full = reference.attention(*heads(q, k, v), causal=True)
    close(reference.attention(*heads(*cut), causal=True), full[:, :, :prefix])
    for normalizer in ("row", 4.0):
        for score in SCORES[:2]:
            options = {"causal": True, "score": score, "normalizer": normalizer}
            full = reference.gau_attention(q, k, v, **options)
            close(reference.gau_attention(*cut, **options), full[:, :prefix])
            # Fewer queries than keys stand at the end: this is how decoding calls it.
            close(reference.gau_attention(q[:, prefix:], k, v, **options), full[:, prefix:])
    full = reference.mixed_chunk_attention(q, k, k, q, v, causal=True, chunk_size=3)
    close(
        reference.mixed_chunk_attention(*(x[:, :prefix] for x in (q, k, k, q, v)), causal=True, chunk_size=3),
        full[:, :prefix],
    )


def test_one_chunk_is_gau_and_no_chunks_is_linear():
    *four, v, bias = randoms(0, *[(1, 6, 2)] * 4, (1, 6, 3), (11,))
    options = {"rel_bias": bias, "causal": True}
    out = reference.mixed_chunk_attention(*four, v, chunk_size=6, **options)
    close(out, reference.gau_attention(four[0], four[1], v, normalizer=6, **options))
    # With scores pushed to zero by the bias, what is left of the non-causal form is (lin_q lin_k^T) v / N.
    off = torch.full((11,), -1e3, dtype=torch.float64)
    out = reference.mixed_chunk_attention(*four, v, chunk_size=2, rel_bias=off)
    close(out, four[2] @ four[3].mT @ v / 6)


# ---------------------------------------------------------------- dropout


def philox_by_ints(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 with Python's own integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ k0, y % 2**32, (x >> 32) ^ d ^ k1, x % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors published with Random123 (Salmon et al. 2011)."""
    assert philox_by_ints(counter, key) == words
    assert tuple(x.item() for x in philox(tuple(torch.tensor(c) for c in counter), key)) == words


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.9]))
def test_kept_set_is_the_function_of_seed_and_place(seed, number, p):
    kept = dropout_kept(torch.tensor([seed]), p, number, 2, 3, 6)
    assert (kept == dropout_kept(seed, p, number, 2, 3, 6)).all()
    for h in range(2):
        for i in range(3):
            for j in range(6):
                word = philox_by_ints((j // 4, i, h, number), (seed % 2**32, (seed >> 32) % 2**32))[j % 4]
                assert kept[h, i, j].item() == (word >= math.floor(p * 2**32))


@given(seeds, st.sampled_from([0.0, 0.3, 1.0]))
def test_dropout_scales_the_kept_weights_and_nothing_else(seed, p):
    q, k, sinks = randoms(seed, (2, 2, 5, 3), (2, 2, 5, 3), (2,))
    v = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)  # so that the output is the matrix of weights
    options: dict[str, Any] = {"sinks": sinks, "causal": True, "return_lse": True}
    weights, lse = reference.attention(q, k, v, **options)
    out, lse_d = reference.attention(q, k, v, dropout_p=p, dropout_seed=seed, **options)
    kept = torch.stack([dropout_kept(seed, p, b, 2, 5, 5) for b in range(2)])
    close(out, weights * kept / (1 - p) if p < 1 else torch.zeros_like(weights))
    close(lse_d, lse)


@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_dropout_of_packed_sequences_is_that_of_rows(seed, sizes):
    rows = [randoms(seed + g, *[(2, n, 3)] * 3) for g, n in enumerate(sizes)]
    packed = [torch.cat(xs, 1)[None] for xs in zip(*rows, strict=True)]
    padded = [torch.stack([pad(x, 6, 0.0, 1) for x in xs]) for xs in zip(*rows, strict=True)]
    drop: dict[str, Any] = {"dropout_p": 0.4, "dropout_seed": seed}
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    out = reference.attention(*packed, cu_seqlens=bounds, **drop)[0]
    by_row = reference.attention(*padded, lengths=torch.tensor(sizes), **drop)
    close(out, torch.cat([by_row[g, :, :n] for g, n in enumerate(sizes)], 1))


def test_dropout_drops_its_share_and_draws_its_seed_from_torch():
    kept = dropout_kept(7, 0.25, 0, 4, 64, 64).double()
    assert abs(kept.mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    q = torch.randn(1, 1, 8, 4)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(reference.attention(q, q, q, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])

"""flash-attn's functions, against the formula written out row by row in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flash_attn_formula import draw, formula, heads, same, slopes, slopes_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashgau
from flashgau.integrations import flash_attn as fa

SIZES = st.sampled_from((0, 1, 2, 5, 9))
WINDOWS = st.sampled_from(((-1, -1), (2, 0), (-1, 1), (3, -1), (0, 0)))

options = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "window_size": WINDOWS,
        "softcap": st.sampled_from((0.0, 1.5)),
        "softmax_scale": st.sampled_from((0.3, 1.0)),
    },
)


@given(batch=st.integers(1, 3), m=SIZES, n=SIZES, heads=heads, options=options, slopes=slopes)
def test_batch(batch: int, m: int, n: int, heads: tuple[int, int], options: dict[str, Any], slopes: Any) -> None:
    q, k, v = draw(batch, m, heads[0], 4), draw(batch, n, heads[1], 4, seed=1), draw(batch, n, heads[1], 3, seed=2)
    given_slopes, own = slopes_of(slopes, batch, heads[0])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, nothing = fa.flash_attn_func(*leaves, alibi_slopes=given_slopes, return_attn_probs=True, **options)
    rows = [formula(q[b], k[b], v[b], alibi_slopes=own[b], **options) for b in range(batch)]
    expected, expected_lse = (torch.stack(part) for part in zip(*rows, strict=True))
    assert nothing is None
    same(out, expected)
    same(lse, expected_lse)
    weight = draw(*out.shape, seed=9)
    grads = torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True)
    # The formula's gradient is NaN where a row sees nothing; ours is zero there.
    for got, wanted in zip(grads, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        same(got[torch.isfinite(wanted)], wanted[torch.isfinite(wanted)])
        assert bool(torch.isfinite(got).all())


@given(
    lengths=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4),
    heads=heads,
    options=options,
    slopes=slopes,
    page=st.sampled_from((None, 1, 4)),
)
def test_packed(
    lengths: list[tuple[int, int]], heads: tuple[int, int], options: dict[str, Any], slopes: Any, page: int | None
) -> None:
    ms, ns = zip(*lengths, strict=True)
    q = draw(sum(ms), heads[0], 4)
    ks, vs = ([draw(n, heads[1], width, seed=i + 7 * width) for i, n in enumerate(ns)] for width in (4, 3))
    k, v = torch.cat(ks), torch.cat(vs)
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (ms, ns))
    given_slopes, own = slopes_of(slopes, len(lengths), heads[0])
    table = None
    if page is not None:  # pages in reverse order, NaN where nothing is held
        width = max(1, -(-max(ns) // page))
        table = torch.arange(len(ns) * width).flip(0).view(len(ns), width).int()
        k, v = (torch.full((len(ns) * width, page, heads[1], x.shape[-1]), math.nan).double() for x in (k, v))
        for pool, rows in ((k, ks), (v, vs)):
            for i, row in enumerate(rows):
                for t in range(len(row)):
                    pool[table[i, t // page], t % page] = row[t]
    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max(ms), max(ns), alibi_slopes=given_slopes, block_table=table,
        return_attn_probs=True, **options,
    )  # fmt: skip
    parts = [formula(x, ks[i], vs[i], alibi_slopes=own[i], **options) for i, x in enumerate(q.split(list(ms)))]
    same(out, torch.cat([part for part, _ in parts]))
    same(lse, torch.cat([part for _, part in parts], dim=1))


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=3),
    m=st.sampled_from((1, 2, 8)),
    new=st.sampled_from((None, 0, 1, 2)),
    heads=heads,
    options=options,
    slopes=slopes,
    rotary=st.sampled_from((None, True, False)),
    leftpad=st.booleans(),
    place=st.sampled_from(("rows", "chosen rows", "pages")),
)
def test_cache(
    rows: list[tuple[int, int]], m: int, new: int | None, heads: tuple[int, int], options: dict[str, Any],
    slopes: Any, rotary: bool | None, leftpad: bool, place: str,
) -> None:  # fmt: skip
    """The cache's valid tokens and the new ones count; all else, NaN included, does not, and nothing else changes."""
    capacity, batch = 8, len(rows)
    q = draw(batch, m, heads[0], 4)
    pads = [pad if leftpad else 0 for pad, _ in rows]
    held = [pad + count for pad, (_, count) in zip(pads, rows, strict=True)]
    held = [min(x, capacity - (new or 0)) for x in held]
    pads = [min(x) for x in zip(pads, held, strict=True)]
    index = table = None
    if place == "pages":
        page, width = 2, capacity // 2
        table = torch.arange(batch * width).flip(0).view(batch, width)
        shape = (batch * width, page)
    elif place == "chosen rows":
        index, shape = torch.arange(batch).flip(0) + 1, (batch + 2, capacity)
    else:
        shape = (batch, capacity)

    def slot(b: int, t: int) -> tuple[int, int]:
        if table is not None:
            return int(table[b, t // 2]), t % 2
        return (b if index is None else int(index[b])), t

    caches = [torch.full((*shape, heads[1], width), math.nan, dtype=torch.float64) for width in (4, 3)]
    for cache, values in zip(
        caches, (draw(batch, capacity, heads[1], 4), draw(batch, capacity, heads[1], 3)), strict=True
    ):
        for b in range(batch):
            for t in range(pads[b], held[b]):
                cache[slot(b, t)] = values[b, t]
    before = [cache.clone() for cache in caches]
    k = v = cos = sin = None
    if new is not None:
        k, v = draw(batch, new, heads[1], 4, seed=3), draw(batch, new, heads[1], 3, seed=4)
        if rotary is not None:
            angle = draw(2 * capacity, 1)
            cos, sin = angle.cos(), angle.sin()
    given_slopes, own = slopes_of(slopes, batch, heads[0])
    out, lse = fa.flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, torch.tensor(held), index, torch.tensor(pads) if leftpad else None, table,
        rotary_interleaved=bool(rotary), alibi_slopes=given_slopes, return_softmax_lse=True, **options,
    )  # fmt: skip

    def turned(x: Tensor, position: int) -> Tensor:
        if cos is None or sin is None:
            return x
        a, b = (0, 1)  # one pair of channels turns: neighbours and halves are the same two
        x = x.clone()
        c, s = cos[position], sin[position]
        x[..., a], x[..., b] = x[..., a] * c - x[..., b] * s, x[..., b] * c + x[..., a] * s
        return x

    standing = options.get("causal", False) or options.get("window_size", (-1, -1)) != (-1, -1)
    for b in range(batch):
        keys, values = ([c[slot(b, t)] for t in range(pads[b], held[b])] for c in before)
        for t in range(new or 0):
            assert k is not None
            assert v is not None
            keys.append(turned(k[b, t], held[b] + t))
            values.append(v[b, t])
            before[0][slot(b, held[b] + t)], before[1][slot(b, held[b] + t)] = keys[-1], values[-1]
        empty = [torch.zeros(0, heads[1], width, dtype=torch.float64) for width in (4, 3)]
        own_k, own_v = (torch.stack(x) if x else none for x, none in zip((keys, values), empty, strict=True))
        own_q = torch.stack([turned(q[b, i], held[b] + i * standing) for i in range(m)])
        expected, expected_lse = formula(own_q, own_k, own_v, alibi_slopes=own[b], **options)
        same(out[b], expected)
        same(lse[b], expected_lse)
    for cache, wanted in zip(caches, before, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_rotary_pairs_neighbours_or_halves() -> None:
    q, cache = draw(1, 1, 1, 6), [torch.zeros(1, 3, 1, 6).double() for _ in range(2)]
    k, v = draw(1, 1, 1, 6, seed=1), draw(1, 1, 1, 6, seed=2)
    angle = draw(3, 2)
    for interleaved, pairs in ((True, ((0, 1), (2, 3))), (False, ((0, 2), (1, 3)))):
        fa.flash_attn_with_kvcache(q, *cache, k, v, angle.cos(), angle.sin(), 1, rotary_interleaved=interleaved)
        wanted = k[0, 0, 0].clone()
        for i, (a, b) in enumerate(pairs):
            turn = torch.polar(torch.ones((), dtype=torch.float64), angle[1, i])
            z = torch.complex(k[0, 0, 0, a], k[0, 0, 0, b]) * turn
            wanted[a], wanted[b] = z.real, z.imag
        same(cache[0][0, 1, 0], wanted)


def test_packed_tensors_are_read_in_place_and_differentiated() -> None:
    qkv = draw(2, 7, 3, 4, 5).requires_grad_()
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv.unbind(2))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    weight = draw(2, 7, 4, 5, seed=1)
    wanted = torch.autograd.grad((fa.flash_attn_func(q, k, v, causal=True) * weight).sum(), (q, k, v))
    for result, leaf in (
        (fa.flash_attn_qkvpacked_func(qkv, causal=True), qkv),
        (fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), qkv),
    ):
        torch.testing.assert_close(torch.autograd.grad((result * weight).sum(), leaf)[0], torch.stack(wanted, 2))
    row = qkv.detach()[0]
    apart = fa.flash_attn_varlen_func(*row.unbind(1), cu, cu, 4, 4, causal=True)
    assert torch.equal(fa.flash_attn_varlen_qkvpacked_func(row, cu, 4, causal=True), apart)
    assert torch.equal(fa.flash_attn_varlen_kvpacked_func(row[:, 0], row[:, 1:], cu, cu, 4, 4, causal=True), apart)
    same(apart, torch.cat([formula(*row[a:b].unbind(1), causal=True)[0] for a, b in ((0, 3), (3, 7))]))


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(5)
    q, k, v = draw(1, 200, 8, 4), draw(1, 200, 8, 4, seed=1), torch.ones(1, 200, 8, 1).double()
    out = fa.flash_attn_func(q, k, v, dropout_p=0.25)
    assert abs(float(out.mean()) - 1) < 0.01
    assert float(out.std()) > 0.01
    assert torch.equal(fa.flash_attn_func(q, k, v, dropout_p=1.0), torch.zeros_like(out))


def test_max_seqlen_as_a_tensor_and_as_a_number_of_a_graph() -> None:
    q, slopes = draw(12, 2, 16), torch.tensor([0.5, 0.25]).double()
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)

    def read(q: Tensor, cu: Tensor, n: Any) -> Tensor:
        return fa.flash_attn_varlen_func(q, q, q, cu, cu, n, n, causal=True, alibi_slopes=slopes)

    def item(q: Tensor, cu: Tensor) -> Tensor:
        return read(q, cu, cu.diff().max().item())

    wanted = read(q, cu, 7)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        same(read(q, cu, torch.tensor(7, dtype=dtype)), wanted)
    torch._dynamo.reset()
    same(torch.compile(read, backend="eager", fullgraph=True)(q, cu, cu.diff().max()), wanted)
    same(torch.compile(item, backend="eager", fullgraph=True)(q, cu), wanted)
    with pytest.raises(ValueError, match="`max_seqlen_q` is 6; expected at least 7"):
        read(q, cu, torch.tensor(6))
    for wrong in (torch.tensor(7.0), torch.tensor([7, 7]), 7.0, True):
        with pytest.raises(TypeError, match="`max_seqlen_q`"):
            read(q, cu, wrong)


NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_integers_do_not_wrap(dtype: torch.dtype) -> None:
    """Lengths near the type's end, whose sums and products are past it."""
    n = 100  # of int8's 127: with 30 new tokens, and as 100 pages of 3 tokens, past it and past 255
    cache, new, q = draw(2, 140, 1, 4), draw(2, 30, 1, 4, seed=1), draw(2, 1, 1, 4, seed=2)
    held, pads = torch.tensor([n, 3]), torch.tensor([n - 1, 0])
    results = []
    for kind in (torch.int64, dtype):
        caches = cache.clone(), cache.clone()
        out = fa.flash_attn_with_kvcache(
            q, *caches, new, new, cache_seqlens=held.to(kind), cache_leftpad=pads.to(kind),
            cache_batch_idx=torch.tensor([1, 0]).to(kind),
        )  # fmt: skip
        pool = draw(100, 3, 1, 4, seed=3)
        table = torch.arange(100).flip(0).view(1, 100)
        paged = fa.flash_attn_with_kvcache(q[:1], pool, pool, cache_seqlens=290, block_table=table.to(kind))
        cu = torch.tensor([0, 20, 120])
        row = draw(120, 1, 4, seed=4)
        packed = fa.flash_attn_varlen_func(row, row, row, cu.to(kind), cu.to(kind), n, n, causal=True)
        ends = torch.tensor([0, 100])
        pages = fa.flash_attn_varlen_func(
            row[:n], pool, pool, ends.to(kind), ends.to(kind), n, n, block_table=table.to(kind)
        )
        angle = draw(300, 2)
        turned = fa.apply_rotary_emb(row[None], angle.cos(), angle.sin(), seqlen_offsets=torch.tensor([n]).to(kind))
        apart = fa.apply_rotary_emb(
            row, angle.cos(), angle.sin(), seqlen_offsets=torch.tensor([n, 5]).to(kind), cu_seqlens=cu.to(kind)
        )
        mask = torch.ones(3, 300, dtype=torch.int64).to(kind)
        tokens, _, offsets, longest, used = fa.unpad_input(torch.zeros(3, 300, 1), mask, mask)
        assert (longest, offsets.tolist(), used.tolist(), len(tokens)) == (300, [0, 300, 600, 900], [300] * 3, 900)
        chosen = fa.index_first_axis(row, torch.tensor([n, 3]).to(kind))
        padded = fa.pad_input(row[:2], torch.tensor([n, 3]).to(kind), 3, 100)
        results.append((out, *caches, paged, packed, pages, turned, apart, chosen, padded))
    for wanted, got in zip(*results, strict=True):
        assert torch.equal(wanted, got)


# What code around flash-attn imports beside attention.


@given(
    lengths=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3),
    unused=st.booleans(),
    width=st.sampled_from(((), (3,), (2, 3))),
)
def test_padding_is_taken_out_and_put_back(lengths: list[list[bool]], unused: bool, width: tuple[int, ...]) -> None:
    mask = torch.tensor(lengths)
    other = mask.roll(1, 1) & ~mask if unused else None
    kept = mask if other is None else mask | other
    x = draw(*mask.shape, *width).requires_grad_()
    tokens, places, cu, longest, used = fa.unpad_input(x, mask.int(), None if other is None else other.to(torch.uint8))
    same(tokens, x[kept])
    assert cu.dtype == used.dtype == torch.int32
    assert cu.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert used.tolist() == mask.sum(1).tolist()
    assert longest == max(kept.sum(1).tolist())
    same(fa.index_first_axis(x.flatten(0, 1), places), tokens)
    back = fa.pad_input(tokens, places, *mask.shape)
    shape = (*mask.shape, *[1] * len(width))
    same(back, torch.where(kept.view(shape), x, 0))
    weight = draw(*x.shape, seed=1)
    (gradient,) = torch.autograd.grad((back * weight).sum(), x)
    same(gradient, torch.where(kept.view(shape), weight, 0))


def test_unpadded_attention_equals_attention_of_the_padded_batch() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    qkv = draw(2, 4, 3, 2, 8)
    rows, places, cu, longest, _ = fa.unpad_input(qkv, mask)
    out = fa.pad_input(fa.flash_attn_varlen_qkvpacked_func(rows, cu, longest, causal=True), places, 2, 4)
    wanted = flashgau.attention(*qkv.permute(2, 0, 3, 1, 4), causal=True, lengths=mask.sum(1))
    assert isinstance(wanted, Tensor)
    same(out, wanted.transpose(1, 2))


@given(
    offsets=st.sampled_from((0, 3, "rows")),
    packed=st.booleans(),
    interleaved=st.booleans(),
    pairs=st.integers(1, 3),
    inplace=st.booleans(),
)
def test_rotary(offsets: Any, packed: bool, interleaved: bool, pairs: int, inplace: bool) -> None:
    """Against complex numbers turned one by one, and its gradient, which is the turn back."""
    lengths = (2, 0, 3) if packed else (4, 4)
    start = torch.tensor([1, 4, 2][: len(lengths)]) if offsets == "rows" else offsets
    starts = start.tolist() if isinstance(start, Tensor) else [offsets] * len(lengths)
    rows = [draw(n, 2, 7, seed=i) for i, n in enumerate(lengths)]
    x = torch.cat(rows) if packed else torch.stack(rows)
    cu = torch.tensor([0, *lengths]).cumsum(0).int() if packed else None
    angle = draw(12, pairs)

    def turned(row: Tensor, first: int, sign: int) -> Tensor:
        row, positions = row.clone(), torch.arange(len(row)) + first
        for i in range(pairs):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
            turn = torch.polar(torch.ones(()).double(), sign * angle[positions, i])[:, None]
            z = torch.complex(row[..., a], row[..., b]) * turn
            row[..., a], row[..., b] = z.real, z.imag
        return row

    leaf = x.clone().requires_grad_()
    given_x = leaf.clone() if inplace else leaf
    got = fa.apply_rotary_emb(given_x, angle.cos(), angle.sin(), interleaved, inplace, start, cu, max_seqlen=4)
    assert (got is given_x) == inplace
    join = torch.cat if packed else torch.stack
    same(got, join([turned(row, first, 1) for row, first in zip(rows, starts, strict=True)]))
    weight = draw(*x.shape, seed=8)
    parts = weight.split(list(lengths)) if packed else weight.unbind(0)
    (gradient,) = torch.autograd.grad((got * weight).sum(), leaf)
    same(gradient, join([turned(row, first, -1) for row, first in zip(parts, starts, strict=True)]))

"""flash-attn's functions, against the formula written out row by row in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashgau.integrations import flash_attn as fa

SIZES = st.sampled_from((0, 1, 2, 5, 9))
WINDOWS = st.sampled_from(((-1, -1), (2, 0), (-1, 1), (3, -1), (0, 0)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q (M, H, D), k (N, Hkv, D), v (N, Hkv, E) give (M, H, E) and the log-sum-exp (H, M)."""
    (m, heads, dim), n = q.shape, k.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    s = torch.einsum("mhd,nhd->hmn", q, k) * (dim**-0.5 if softmax_scale is None else softmax_scale)
    s = softcap * torch.tanh(s / softcap) if softcap > 0 else s
    distance = torch.arange(n) - (torch.arange(m)[:, None] + n - m)
    if alibi_slopes is not None:
        s = s - alibi_slopes.double()[:, None, None] * distance.abs()
    left, right = window_size
    hidden = torch.zeros(m, n, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    if causal:
        hidden |= distance > 0
    s = s.masked_fill(hidden, -math.inf)
    return torch.einsum("hmn,nhe->mhe", torch.softmax(s, -1).nan_to_num(0.0), v), s.logsumexp(-1)


options = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "window_size": WINDOWS,
        "softcap": st.sampled_from((0.0, 1.5)),
        "softmax_scale": st.sampled_from((0.3, 1.0)),
    },
)
heads = st.sampled_from(((1, 1), (4, 2), (3, 3), (4, 1)))
slopes = st.sampled_from((None, "heads", "rows"))


def slopes_of(kind: str | None, rows: int, count: int) -> tuple[Tensor | None, list[Tensor | None]]:
    """The argument, and each row's own."""
    if kind is None:
        return None, [None] * rows
    values = torch.rand(rows, count, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    return (values, list(values)) if kind == "rows" else (values[0], [values[0]] * rows)


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


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


Q, C = draw(2, 3, 4, 8), draw(2, 6, 2, 8)
CU = torch.tensor([0, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fa.flash_attn_func(Q, C, C[:, :5]), ValueError, "`v` has shape"),
        (lambda: fa.flash_attn_func(Q[:, :, :3], C, C), ValueError, "`q` has 3 heads"),
        (lambda: fa.flash_attn_func(Q, C, C, window_size=3), TypeError, "`window_size` is 3"),
        (lambda: fa.flash_attn_func(Q, C, C, window_size=(-2, 0)), ValueError, r"`window_size\[0\]` is -2"),
        (lambda: fa.flash_attn_func(Q, C, C, alibi_slopes=torch.ones(3)), ValueError, "`alibi_slopes` has shape"),
        (lambda: fa.flash_attn_func(Q, C, C, dropout_p=2), ValueError, "dropout_p"),
        (lambda: fa.flash_attn_qkvpacked_func(Q), ValueError, "`qkv` has shape"),
        (lambda: fa.flash_attn_kvpacked_func(Q, None), TypeError, "`kv` is a NoneType"),
        (lambda: fa.flash_attn_varlen_func(Q[0], C[0], C[0], CU, CU, 2, 2), ValueError, "cu_seqlens_k"),
        (lambda: fa.flash_attn_varlen_func(Q[0], Q[0], Q[0], CU, CU, 1, 2), ValueError, "`max_seqlen_q` is 1"),
        (lambda: fa.flash_attn_varlen_func(Q[0], Q[0], Q[0], CU.float(), CU, 2, 2), TypeError, "cu_seqlens_q"),
        (
            lambda: fa.flash_attn_varlen_func(Q[0], C, C, CU, CU, 2, 2, block_table=CU.view(1, 3)),
            ValueError,
            "`block_table` has shape",
        ),
        (lambda: fa.flash_attn_with_kvcache(Q, C[:1], C[:1]), ValueError, "`k_cache` has 1 rows"),
        (lambda: fa.flash_attn_with_kvcache(Q, C, C, C), ValueError, "`v` is missing"),
        (lambda: fa.flash_attn_with_kvcache(Q, C, C, C[:, :1], C[:, :1]), ValueError, "`cache_seqlens` is missing"),
        (lambda: fa.flash_attn_with_kvcache(Q, C, C, C[:, :1], C[:, :1], cache_seqlens=6), ValueError, "at most 5"),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, C[:, :1], C[:, :1], cache_seqlens=torch.tensor([5, 6])),
            ValueError,
            "from 0 to 5",
        ),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, cache_batch_idx=torch.tensor([0, 2])),
            ValueError,
            "`cache_batch_idx` is",
        ),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, cache_seqlens=2, cache_leftpad=torch.tensor([0, 3])),
            ValueError,
            "`cache_leftpad` is",
        ),
        (lambda: fa.flash_attn_with_kvcache(Q, C, C, rotary_cos=draw(9, 4)), ValueError, "`rotary_sin` is missing"),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, C[:, :1], C[:, :1], draw(7, 4), draw(7, 4), 5),
            ValueError,
            "at least 8 positions",
        ),
        (
            lambda: fa.flash_attn_with_kvcache(Q, C, C, block_table=torch.tensor([[0], [2]])),
            ValueError,
            "`block_table` is",
        ),
    ],
)  # fmt: skip
def test_bad_calls_are_refused_by_name(call: Any, error: type[Exception], words: str) -> None:
    before = C.clone()
    with pytest.raises(error, match=words):
        call()
    assert torch.equal(C, before)

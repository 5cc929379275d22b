"""Attention's kernel on keys and values in pages: as on a gathered copy of them, and without making one."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import kernel_calls
import pytest
import torch
from checks import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import randn, seeds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from flashgau.kernels import attention as launchers

import flashgau
from flashgau.contract import operands, validate
from flashgau.integrations import flash_attn as fa
from flashgau.integrations.flash_attn import helpers, kvcache, varlen
from flashgau.options import AttentionOptions, Layout, Pages
from flashgau.tables.config import Config

pytestmark = kernel_calls.pytestmark


def pool_of(rows: Tensor, table: Tensor, page: int, leftpad: Tensor, counts: Tensor, spare: int) -> Tensor:
    """Rows (B, N, H, D) laid into pages (pages, H, page, D) of odd strides; NaN is all that no sequence holds."""
    shape = [x + 1 for x in (int(table.max()) + spare, page, *rows.shape[2:])]
    pool = torch.full(shape, math.nan, dtype=rows.dtype)[1:, :page, : rows.shape[2], : rows.shape[3]]
    for b, (first, count) in enumerate(zip(leftpad.tolist(), counts.tolist(), strict=True)):
        for t in range(count):
            slot = first + t
            pool[table[b, slot // page], slot % page] = rows[b, t]
    return pool.transpose(1, 2)


@given(
    seed=seeds,
    page=st.sampled_from((1, 3, 16, 20, 32)),
    pages=st.integers(1, 4),
    batch=st.integers(1, 3),
    m=st.sampled_from((1, 2, 17)),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1))),
    leftpad=st.booleans(),
    packed=st.booleans(),
    split=st.sampled_from((1, 7, 400)),
    block=st.sampled_from((16, 32)),
    options=st.fixed_dictionaries(
        {"causal": st.booleans()},
        optional={"window": st.sampled_from(((5, 3), (9, None), (None, 0))), "softcap": st.just(2.0)},
    ),
    biased=st.booleans(),
    sinks=st.booleans(),
)
def test_pages_are_as_a_gathered_copy(
    seed, page, pages, batch, m, heads, leftpad, packed, split, block, options, biased, sinks
) -> None:
    generator = torch.Generator().manual_seed(seed)
    capacity = page * pages
    table = torch.randperm(batch * pages + 2, generator=generator)[: batch * pages].view(batch, pages).int()
    first = torch.randint(0, capacity + 1, (batch,), generator=generator) * leftpad
    counts = (torch.rand(batch, generator=generator) * 1.2 * (capacity - first + 1)).long().clamp(max=capacity - first)
    k, v = (randn(seed + i, batch, capacity, heads[1], width) for i, width in ((1, 8), (2, 5)))
    for x in (k, v):
        x[torch.arange(capacity) >= counts[:, None]] = 0
    q = randn(seed, batch, heads[0], m, 8)
    longest, given = max(capacity, m), dict(options)
    if biased:
        given["rel_bias"] = randn(seed + 3, 1, heads[0], 2 * longest - 1).expand(batch, -1, -1)
    if sinks:
        given["sinks"] = randn(seed + 4, heads[0])
    in_pages = [pool_of(x, table, page, first, counts, spare=1 + seed % 2) for x in (k, v)]
    dense = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, int(m == capacity))).transpose(1, 2) for x in (k, v)]
    where = Pages(table, first if leftpad else None)
    with mock.patch.object(launchers, "processors", return_value=split):
        run = lambda *args, **more: launchers.attention_forward(
            *args, **{**given, **more}, config=Config(16, block), check=True
        )
        wanted = run(q, *dense, lengths=counts)
        found = run(q, *in_pages, lengths=counts, pages=where)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b) if m != capacity else close(a, b) is None  # blocks of keys are the same ones
        if packed:
            ends, ends_k = torch.arange(batch + 1) * m, torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            row = q.transpose(1, 2).reshape(1, batch * m, *q.shape[1::2]).transpose(1, 2)
            layout, more = Layout(None, ends, ends_k), {}
            if biased:
                more["rel_bias"] = given["rel_bias"][:1]
            out, lse = run(row, *in_pages, layout=layout, pages=where, **more)
            close(out[0].unflatten(1, (batch, m)).transpose(0, 1), wanted.out)
            close(lse[0].unflatten(1, (batch, m)).transpose(0, 1), wanted.lse)


def test_numbers_that_name_no_page_read_some_page() -> None:
    """On a GPU nobody looks at them: the rows that have them are nonsense, but of this cache, and others are right."""
    n_pages, page = 5, 16
    storage = torch.full((n_pages + 8, 2, page, 8), math.nan)
    pool = storage[4:-4]
    pool.copy_(randn(0, *pool.shape))
    q = randn(1, 3, 4, 1, 8)
    table = torch.tensor([[3, 1], [-1, 2**31 - 1], [5, -(2**31)]], dtype=torch.int32)
    clamped = table.clamp(0, n_pages - 1)
    for block in (16, 32):  # a page has whole blocks, and has not
        run = partial(launchers.attention_forward, q, pool, pool, config=Config(16, block))
        for far in (10**9, -(10**9), 32):
            a = run(block_table=table, lengths=torch.tensor([20, far, 32]))
            b = run(block_table=clamped, lengths=torch.tensor([20, max(min(far, 32), 0), 32]))
            assert torch.equal(a.out, b.out)
            assert torch.isfinite(a.out).all()
            lengths, leftpad = torch.tensor([20, -far, far]), torch.tensor([10**9, -(10**9), 10])
            a = run(block_table=table, lengths=lengths, leftpad=leftpad)
            lengths = torch.tensor([0, max(min(-far, 32), 0), max(min(far, 22), 0)])
            b = run(block_table=clamped, lengths=lengths, leftpad=leftpad.clamp(0, 32))
            assert torch.equal(a.out, b.out)
            assert torch.isfinite(a.out).all()
        ends = torch.tensor([0, 1, 2, 3]), torch.tensor([-7, 2**31 - 1, 4, 10**9])
        row = q.transpose(0, 2)
        out, _ = launchers.attention_forward(
            row, pool, pool, block_table=table, cu_seqlens=ends[0], cu_seqlens_k=ends[1], config=Config(16, block)
        )
        assert torch.isfinite(out).all()


def test_pages_past_two_to_the_31() -> None:
    """Pages, and tokens in a page, 2^27 elements apart; most of the memory between them is never touched."""
    storage, table = torch.empty(20 * 2**27, dtype=torch.float16), torch.tensor([[17, 3, 18, 0]])
    q = randn(0, 1, 2, 1, 8).half()
    for shape, strides in (((19, 1, 16, 8), (2**27, 8, 8, 1)), ((1, 1, 19, 8), (8, 8, 2**27, 1))):
        far = storage.as_strided(shape, strides)
        near = randn(1, *shape).half()
        far.copy_(near)
        for leftpad in (None, torch.tensor([5])):
            where = {"block_table": table % shape[0], "leftpad": leftpad, "lengths": torch.tensor([shape[2] * 4 - 9])}
            a, b = (launchers.attention_forward(q, x, x, config=Config(16, 16), **where) for x in (near, far))
            assert torch.equal(a.out, b.out)


def test_a_cache_without_pages_and_pages_without_tokens_hold_nothing() -> None:
    q, table = randn(0, 2, 2, 1, 8), torch.zeros(2, 3, dtype=torch.int32)
    for shape in ((0, 1, 16, 8), (4, 1, 0, 8)):
        out, lse = launchers.attention_forward(q, torch.zeros(shape), torch.zeros(shape), block_table=table)
        assert not out.any()
        assert (lse == -math.inf).all()
    out, _ = launchers.attention_forward(q, *[torch.zeros(4, 1, 16, 8)] * 2, block_table=table[:, :0])
    assert not out.any()


@given(
    seed=seeds,
    place=st.sampled_from(("pages", "chosen rows", "rows")),
    held=st.lists(st.integers(0, 14), min_size=1, max_size=3),
    pads=st.sampled_from((None, 0, 3)),
    new=st.sampled_from((None, 1, 2)),
    m=st.sampled_from((1, 5, 16)),
    causal=st.booleans(),
    slopes=st.sampled_from((None, "heads", "rows")),
)
def test_a_cache_is_read_in_place(seed, place, held, pads, new, m, causal, slopes) -> None:
    """The same on Triton, which reads it where it is, as on eager, which gathers; all else holds NaN."""
    batch, capacity, page = len(held), 16, 4
    lengths = torch.tensor(held, dtype=torch.int32)
    leftpad = None if pads is None else torch.minimum(lengths, torch.tensor(pads)).int()
    table = index = None
    shape = (batch, capacity)
    if place == "pages":
        table, shape = torch.arange(batch * 4).flip(0).view(batch, 4).int() + 1, (batch * 4 + 2, page)
    elif place == "chosen rows":
        index, shape = torch.arange(batch).flip(0) + 1, (batch + 2, capacity)
    caches = [torch.full((*shape, 2, width), math.nan) for width in (8, 6)]
    for i, cache in enumerate(caches):
        rows = (
            cache[table.long()].flatten(1, 2) if table is not None else cache[:batch] if index is None else cache[index]
        )
        inside = torch.arange(capacity) < lengths[:, None]
        rows = torch.where(inside[..., None, None], randn(seed + i, *rows.shape), rows)
        if table is not None:
            cache[table.long()] = rows.unflatten(1, (4, page))
        else:
            cache[torch.arange(batch) if index is None else index] = rows
    q = randn(seed + 2, batch, m, 4, 8)
    k, v = (None, None) if new is None else (randn(seed + 3, batch, new, 2, 8), randn(seed + 4, batch, new, 2, 6))
    alibi = None if slopes is None else randn(5, *([batch] if slopes == "rows" else []), 4).abs()
    results = []
    for backend in ("eager", "triton"):
        own = [cache.clone() for cache in caches]
        with flashgau.use_backend(backend):
            out, lse = fa.flash_attn_with_kvcache(
                q, *own, k, v, cache_seqlens=lengths, cache_batch_idx=index, cache_leftpad=leftpad, block_table=table,
                causal=causal, alibi_slopes=alibi, return_softmax_lse=True,
            )  # fmt: skip
        results.append((out, lse, *(cache.nan_to_num(7.0) for cache in own)))
    for got, wanted in zip(results[1], results[0], strict=True):
        close(got, wanted, ulps=64)


@given(seed=seeds, ns=st.lists(st.sampled_from((0, 1, 7, 12)), min_size=1, max_size=3), slopes=st.booleans())
def test_packed_queries_read_pages(seed, ns, slopes) -> None:
    ms, page, width = [(seed >> i) % 4 for i in range(len(ns))], 4, 3
    table = torch.arange(len(ns) * width).flip(0).view(len(ns), width)
    rows = [randn(seed + i, len(ns), page * width, 2, 8) for i in (0, 1)]
    k, v = (pool_of(x, table, page, torch.zeros(len(ns)).long(), torch.tensor(ns), 1).transpose(1, 2) for x in rows)
    q = randn(seed + 2, sum(ms), 4, 8)
    ends, ends_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (ms, ns))
    results = []
    for backend in ("eager", "triton"):
        with flashgau.use_backend(backend):
            results.append(fa.flash_attn_varlen_func(
                q, k, v, ends, ends_k, max(ms), max(ns), causal=True, return_attn_probs=True, block_table=table,
                alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.2]) if slopes else None,
            ))  # fmt: skip
    for got, wanted in zip(results[1][:2], results[0][:2], strict=True):
        close(got, wanted, ulps=64)


def test_gradients_flow_into_pages() -> None:
    """On Triton too: they are gathered then."""
    q, pool = randn(0, 3, 2, 8), randn(1, 4, 4, 2, 8)
    ends, table = torch.tensor([0, 1, 3]), torch.tensor([[3, 0], [1, 1]])
    grads = []
    for backend in ("eager", "triton"):
        leaves = [x.clone().requires_grad_() for x in (q, pool, pool)]
        with flashgau.use_backend(backend):
            out = fa.flash_attn_varlen_func(*leaves, ends, torch.tensor([0, 5, 13]), 2, 8, block_table=table)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, wanted in zip(*grads, strict=True):
        close(got, wanted, ulps=64)


class Recorded(TorchDispatchMode):
    """The names of PyTorch's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def recorded(call: Any) -> set[str]:
    """What a call asks of PyTorch, on a device whose values are not read and where kernels are launched, not run."""
    with ExitStack() as stack:
        for module in (validate, operands, helpers, kvcache, varlen):
            stack.enter_context(mock.patch.object(module, "readable", return_value=False))
        for name in ("forward_kernel", "merge_kernel"):
            stack.enter_context(mock.patch.object(launchers, name, mock.MagicMock()))
        stack.enter_context(flashgau.use_backend("triton"))
        found = stack.enter_context(Recorded())
        call()
    return found.names


def test_a_call_gathers_nothing_and_waits_for_nothing() -> None:
    """So it can be recorded in a CUDA graph: no value is read, and no shape depends on one."""
    pool, table = randn(0, 9, 16, 2, 8), torch.tensor([[4, 1, 7], [0, 2, 5]], dtype=torch.int32)
    q, new = randn(1, 2, 1, 4, 8), randn(2, 2, 1, 2, 8)
    held, ends = torch.tensor([30, 5], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    cached = lambda *args, **kwargs: lambda: fa.flash_attn_with_kvcache(q, pool, pool, *args, **kwargs)
    waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item"}
    for call, gathers in (
        (cached(cache_seqlens=held, block_table=table, causal=True), False),
        (cached(cache_seqlens=held // 16, block_table=table, cache_leftpad=held // 16, softcap=3.0), False),
        (cached(cache_seqlens=held // 16, cache_batch_idx=table[:, 0]), False),
        (cached(new, new, cache_seqlens=held, block_table=table), True),  # where the new ones are written
        (lambda: fa.flash_attn_varlen_func(q[:, 0], pool, pool, ends, ends * 20, 1, 40, block_table=table), False),
    ):
        names = recorded(call)
        assert not names & waits
        assert not names & {"index", "index_select", "cat", "take"}
        assert gathers == bool(names & {"gather", "index_put_", "index_put"})


def test_pages_are_refused_by_name() -> None:
    q, pool, table = randn(0, 2, 4, 1, 8), randn(1, 5, 2, 16, 8), torch.zeros(2, 3, dtype=torch.int64)
    run = lambda **given: launchers.attention_forward(q, pool, pool, check=True, **{"block_table": table, **given})
    run()
    for wrong, error, words in (
        ({"block_table": table - 1}, ValueError, "`block_table` is .*; expected numbers of pages, 0 to 4"),
        ({"block_table": table[:1]}, ValueError, r"`block_table` has shape \(1, 3\); expected \(B, width\) with B = 2"),
        ({"block_table": table.float()}, TypeError, "`block_table` has dtype torch.float32; expected an integer"),
        ({"leftpad": torch.zeros(3).int()}, ValueError, r"`leftpad` has shape \(3,\); expected \(B,\)"),
        ({"lengths": torch.tensor([49, 1])}, ValueError, "`lengths` holds 49; expected values from 0 to N = 48"),
        ({"cu_seqlens": torch.tensor([0, 1])}, ValueError, "`q` has B = 2; expected B = 1 with `cu_seqlens`"),
        ({"rel_bias": torch.zeros(2, 4, 93)}, ValueError, "`rel_bias` covers P = 47 .*; expected P >= 48"),
    ):
        with pytest.raises(error, match=words):
            run(**wrong)
    with pytest.raises(ValueError, match="attention_forward: `cu_seqlens_k` is missing; expected offsets"):
        launchers.attention_forward(
            q[:1], pool, pool, Layout(None, torch.tensor([0, 1])), AttentionOptions(), Pages(table[:1]), check=True
        )

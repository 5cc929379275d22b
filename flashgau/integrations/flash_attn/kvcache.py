"""Attention to a cache of keys and values, into which new ones are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.contract.validate import Arguments, autocast, readable
from flashgau.ops.dispatch import resolve
from flashgau.options import Pages

from .common import alibi, attend_batch, attend_packed, checked_options, checked_pages, of_segments, segments
from .helpers import rotary_tables, turn, within


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention to a cache of keys and values, into which new ones are first written **in place**.

    Row b sees the cache's tokens from `cache_leftpad[b]` up to `cache_seqlens[b]` and the T new ones behind them;
    what the rest of the cache holds does not matter, NaN included. As in flash-attn there is no gradient.

    Args:
        q: queries (B, M, Hq, D).
        k_cache: keys (rows, capacity, Hkv, D), or with `block_table` (pages, tokens of a page, Hkv, D).
        v_cache: values, likewise with E.
        k: new keys (B, T, Hkv, D), written at positions `cache_seqlens` and following.
        v: new values (B, T, Hkv, E).
        rotary_cos: (positions, R/2), turns the first R channels of q and k by their positions, `cache_seqlens` and
            following (q is all at `cache_seqlens` unless causal or in a window, as flash-attn has it). Needs `k`.
        rotary_sin: the same for the sine.
        cache_seqlens: how many tokens the cache holds, an int or (B,) integers; needed with `k`, else all of it.
        cache_batch_idx: (B,) the cache's row of each row of q.
        cache_leftpad: (B,) where the cache's tokens begin; 0 unless given.
        block_table: (B, pages of a row). On Triton pages, and rows of `cache_batch_idx`, are read where they are,
            unless autocast makes another dtype of them; else they are gathered, which copies.
        softmax_scale: as in `flash_attn_func`.
        causal: query i of M sees tokens up to length + i - M, where length counts the new ones.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        rotary_interleaved: channels 2i and 2i + 1 turn together, else i and i + R/2.
        alibi_slopes: (Hq,) or (B, Hq).
        num_splits: accepted; the result does not depend on it.
        return_softmax_lse: also return the log-sum-exp (B, Hq, M).

    Returns:
        (B, M, Hq, E), or (out, log-sum-exp).

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before the cache is
            touched. Values on a GPU are not read.

    Source: the interface of Dao's flash-attn 2.

    Example:
        >>> import torch
        >>> cache = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8)
        >>> q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)
        >>> flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=0, causal=True).shape
        torch.Size([1, 1, 4, 8])
        >>> bool((cache[0][0, 0] == k[0, 0]).all())
        True
    """
    args = Arguments("flash_attn_with_kvcache")
    (q,) = autocast(q)
    args.tensor("q", q, "B M Hq D")
    cached = "rows capacity" if block_table is None else "pages page"
    args.tensor("k_cache", _as_cast(k_cache), f"{cached} Hkv D")
    args.tensor("v_cache", _as_cast(v_cache), f"{cached} Hkv E")
    args.at_least_one("D", "E")
    options = checked_options(args, softmax_scale, causal, window_size, softcap, False, return_softmax_lse)
    args.integer("num_splits", num_splits, 0, "a whole number >= 0")
    args.flag("rotary_interleaved", rotary_interleaved)
    if (k is None) != (v is None):
        args.fail("v" if v is None else "k", "is missing", "both `k` and `v`, or neither")
    if k is not None:
        args.tensor("k", _as_cast(k), "B T Hkv D")
        args.tensor("v", _as_cast(v), "B T Hkv E")
        _writable(args, "k_cache", k_cache)
        _writable(args, "v_cache", v_cache)
    batch, new = q.shape[0], 0 if k is None else k.shape[1]
    capacity, block_table, cache_batch_idx = _capacity(args, k_cache, block_table, cache_batch_idx)
    begin, held = _extent(args, q, cache_seqlens, cache_leftpad, new, capacity, k is not None)
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(args, rotary_cos, rotary_sin, held, max(new, q.shape[1]), k is not None)
    bias = alibi(args, alibi_slopes, max(q.shape[1], capacity), "B")
    # All checks of `attend` are among these, and the last of them is whether a backend can run: then it is written.
    backend = resolve("attention", None, q.device, q.dtype, max(args.sizes["D"], args.sizes["E"]), args.op)

    if k is not None and v is not None:
        place = held[:, None] + torch.arange(new, device=q.device)  # (B, T)
        if rotary_cos is not None and rotary_sin is not None:
            standing = causal or tuple(window_size) != (-1, -1)
            steps = torch.arange(q.shape[1], device=q.device) * int(standing)
            q = turn(q, rotary_cos, rotary_sin, held[:, None] + steps, rotary_interleaved)
            k = turn(k, rotary_cos, rotary_sin, place, rotary_interleaved)
        if block_table is not None:
            size = k_cache.shape[1]
            where = block_table.gather(1, place // size).long(), place % size
        else:
            rows = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx
            where = rows[:, None].expand_as(place), place
        k_cache[where], v_cache[where] = k.to(k_cache.dtype), v.to(v_cache.dtype)

    end, plain = held + new, block_table is None and cache_batch_idx is None
    # Where there are as many queries as the cache has room for, `lengths` would cut them too, but beside pages.
    lengths_suffice = cache_leftpad is None and q.shape[1] != capacity
    if backend == "triton" and not (plain and lengths_suffice) and q.dtype == k_cache.dtype == v_cache.dtype:
        table = block_table
        if table is None:  # a row is a page
            table = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx
            table = table[:, None]
        heads_first = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        pages, count = Pages(table), end
        if cache_leftpad is not None:
            pages, count = Pages(table, begin), end - begin
        out, lse = attend_batch(args, *heads_first, lengths=count, pages=pages, rel_bias=bias, **options)
        out = out.transpose(1, 2)
        return (out, lse) if return_softmax_lse else out

    if block_table is not None:
        keys, values = (x[block_table.long()].flatten(1, 2) for x in (k_cache, v_cache))
    elif cache_batch_idx is not None:
        keys, values = (x[cache_batch_idx] for x in (k_cache, v_cache))
    else:
        keys, values = k_cache, v_cache
    if lengths_suffice:
        heads_first = (x.transpose(1, 2) for x in (q, keys, values))
        out, lse = attend_batch(args, *heads_first, lengths=end, rel_bias=bias, backend=backend, **options)
        out = out.transpose(1, 2)
    else:
        cu_q, cu_k = segments(torch.full_like(end, q.shape[1]), begin, end, capacity)
        queries, keys, values = (x.reshape(-1, *x.shape[2:]) for x in (q, keys, values))
        out, lse = attend_packed(args, queries, keys, values, cu_q, cu_k, of_segments(bias), backend=backend, **options)
        out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    return (out, lse) if return_softmax_lse else out


def _as_cast(x: Any) -> Any:
    """What autocast will make of x, but for the values: a cache is not copied to be looked at."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return x
    (cast,) = autocast(x.new_empty(()))
    return x if cast.dtype == x.dtype else cast.expand(x.shape)


def _writable(args: Arguments, name: str, cache: Tensor) -> None:
    """Rows of a cache that share their memory cannot be written one by one."""
    if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
        args.fail(name, f"has strides {cache.stride()}", "memory of its own for every token, as new ones are written")
    if cache.is_inference() and not torch.is_inference_mode_enabled():
        args.fail(name, "was made in inference mode", "a call in inference mode, as PyTorch lets no other write it")


def _capacity(args: Arguments, cache: Tensor, table: Any, index: Any) -> tuple[int, Tensor | None, Tensor | None]:
    """How many tokens a row of the cache may hold, and the checked table of pages and rows."""
    batch = args.sizes["B"]
    if table is not None:
        if index is not None:
            args.fail("cache_batch_idx", "was given together with `block_table`", "at most one of them")
        table, capacity = checked_pages(args, table, "B")
        return capacity, table, None
    if index is not None:
        index = args.indices("cache_batch_idx", index, "B")
        within(args, "cache_batch_idx", index, 0, cache.shape[0] - 1, f"rows of the cache, 0 to {cache.shape[0] - 1}")
        index = index.long()
    elif cache.shape[0] != batch:
        args.fail("k_cache", f"has {cache.shape[0]} rows", f"{batch} as `q` has, or `cache_batch_idx`")
    return cache.shape[1], None, index


def _extent(
    args: Arguments, q: Tensor, seqlens: Any, leftpad: Any, new: int, capacity: int, writes: bool
) -> tuple[Tensor, Tensor]:
    """Where each row's tokens begin, and how many slots are taken before the new ones: (B,) int64 each."""
    if seqlens is None:
        if writes:
            args.fail("cache_seqlens", "is missing", "an int or (B,) integers together with `k` and `v`")
        seqlens = capacity
    if not isinstance(seqlens, Tensor):
        args.integer("cache_seqlens", seqlens, 0, "an int >= 0 or (B,) integers")
        if seqlens + new > capacity:
            room = f"at most {capacity - new}: the cache has room for {capacity} tokens, and {new} are new"
            args.fail("cache_seqlens", f"is {seqlens}", room)
        held = torch.full((q.shape[0],), int(seqlens), device=q.device)
    else:
        seqlens = args.indices("cache_seqlens", seqlens, "B")
        expected = f"values from 0 to {capacity - new}: the cache has room for {capacity} tokens, and {new} are new"
        within(args, "cache_seqlens", seqlens, 0, capacity - new, expected)
        held = seqlens.long()
    if leftpad is None:
        return torch.zeros_like(held), held
    leftpad = args.indices("cache_leftpad", leftpad, "B")
    if readable(held):
        within(args, "cache_leftpad", leftpad, 0, held, f"values from 0 to `cache_seqlens`, {held.tolist()}")
    return leftpad.long(), held


def _check_rotary(args: Arguments, cos: Any, sin: Any, held: Tensor, tokens: int, writes: bool) -> None:
    if cos is None or sin is None:
        args.fail("rotary_cos" if cos is None else "rotary_sin", "is missing", "both tables or neither")
    if not writes:
        args.fail("rotary_cos", "was given without `k` and `v`", "new keys to turn: cached ones are taken as they are")
    rotary_tables(args, ("rotary_cos", "rotary_sin"), cos, sin)
    if readable(held) and len(held) and int(held.max()) + tokens > cos.shape[0]:
        needed = int(held.max()) + tokens
        args.fail("rotary_cos", f"has shape {tuple(cos.shape)}", f"at least {needed} positions")

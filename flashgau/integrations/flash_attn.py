"""The functions of flash-attn under their own names and signatures, computed by `flashgau.attention`.

    from flashgau.integrations.flash_attn import flash_attn_func  # instead of: from flash_attn import ...

They run on any device, in fp32 and fp64 too, and with any head width. Tensors have the tokens before the heads,
(B, N, H, D), a window side of -1 is open, softcap 0 is none. Signatures as of flash-attn 2.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.ops.attention import attend
from flashgau.ops.bias import alibi_bias
from flashgau.ops.dispatch import resolve
from flashgau.ops.validate import Arguments, autocast, readable

from .flash_attn_helpers import apply_rotary_emb, index_first_axis, pad_input, rotary_tables, turn, unpad_input, within
from .packing import end_to_end

__all__ = [
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "pad_input",
    "unpad_input",
]

# What `flashgau.attention` calls the arguments of these functions.
_THEIRS = {
    "cu_seqlens": "cu_seqlens_q",
    "lengths": "cache_seqlens",
    "rel_bias": "alibi_slopes",
    "scale": "softmax_scale",
    "window": "window_size",
}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Softmax attention of a batch of sequences of one length.

    Args:
        q: queries (B, M, Hq, D).
        k: keys (B, N, Hkv, D), Hq a multiple of Hkv.
        v: values (B, N, Hkv, E).
        dropout_p: probability that a weight is dropped; 0 in evaluation. Which ones follows from PyTorch's default
            generator, but they are not those that flash-attn would drop.
        softmax_scale: factor of q k^T, 1/sqrt(D) unless given.
        causal: query i of M sees keys up to i + N - M.
        window_size: (left, right), keys in [i + N - M - left, i + N - M + right]; -1 leaves a side open.
        softcap: bound of the scores; 0 is none.
        alibi_slopes: (Hq,) or (B, Hq), fp32 or as q: adds -slope |i + N - M - j|.
        deterministic: accepted; gradients always are.
        return_attn_probs: also return the log-sum-exp (B, Hq, M) fp32, and None where flash-attn gives the
            probabilities for its own tests.

    Returns:
        (B, M, Hq, E) in the dtype of q, or (out, log-sum-exp, None).

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before any work.

    Source: the interface of Dao's flash-attn 2; Dao 2023 (arXiv 2307.08691).

    Example:
        >>> import torch
        >>> q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 9, 2, 8)
        >>> flash_attn_func(q, k, k, causal=True, window_size=(3, 0)).shape
        torch.Size([2, 5, 4, 8])
    """
    args = Arguments("flash_attn_func")
    q, k, v = autocast(q, k, v)
    args.tensor("q", q, "B M Hq D")
    args.tensor("k", k, "B N Hkv D")
    args.tensor("v", v, "B N Hkv E")
    return _batch(
        args, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with keys and values in one tensor.

    Args:
        q: queries (B, M, Hq, D).
        kv: keys and values (B, N, 2, Hkv, D), read in place.
        dropout_p: as in `flash_attn_func`.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`.
        deterministic: as in `flash_attn_func`.
        return_attn_probs: as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.

    Example:
        >>> import torch
        >>> flash_attn_kvpacked_func(torch.randn(1, 5, 4, 8), torch.randn(1, 9, 2, 2, 8)).shape
        torch.Size([1, 5, 4, 8])
    """
    args = Arguments("flash_attn_kvpacked_func")
    q, kv = autocast(q, kv)
    args.tensor("q", q, "B M Hq D")
    k, v = _unpacked(args, "kv", kv, "B N 2 Hkv D")
    return _batch(
        args, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with queries, keys and values in one tensor.

    Args:
        qkv: (B, N, 3, H, D), read in place.
        dropout_p: as in `flash_attn_func`.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        alibi_slopes: as in `flash_attn_func`.
        deterministic: as in `flash_attn_func`.
        return_attn_probs: as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.

    Example:
        >>> import torch
        >>> flash_attn_qkvpacked_func(torch.randn(1, 9, 3, 2, 8), causal=True).shape
        torch.Size([1, 9, 2, 8])
    """
    args = Arguments("flash_attn_qkvpacked_func", {"q": "qkv"})
    (qkv,) = autocast(qkv)
    q, k, v = _unpacked(args, "qkv", qkv, "B N 3 Hq D")
    return _batch(
        args, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Softmax attention of G sequences packed end to end, each of its own length.

    Args:
        q: queries (total queries, Hq, D).
        k: keys (total keys, Hkv, D), or with `block_table` pages (pages, tokens of a page, Hkv, D).
        v: values, likewise with E.
        cu_seqlens_q: (G+1,) integers, the ends of the sequences of queries after a leading 0.
        cu_seqlens_k: the same for keys; with `block_table` their differences are the lengths.
        max_seqlen_q: the longest sequence of queries, an int or a tensor of one. Only the size of the ALiBi bias
            follows from it; a tensor that is not on the CPU is not read.
        max_seqlen_k: the longest sequence of keys, likewise.
        dropout_p: as in `flash_attn_func`.
        softmax_scale: as in `flash_attn_func`.
        causal: as in `flash_attn_func`, for each sequence.
        window_size: as in `flash_attn_func`.
        softcap: as in `flash_attn_func`.
        alibi_slopes: (Hq,); or (G, Hq), for which the sequences are computed one by one, and the host waits for
            `cu_seqlens_q`.
        deterministic: accepted; gradients always are.
        return_attn_probs: also return the log-sum-exp (Hq, total queries) fp32, and None.
        block_table: (G, pages of a sequence) integers: where its keys are. The pages are gathered, which copies.

    Returns:
        (total queries, Hq, E) in the dtype of q, or (out, log-sum-exp, None).

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before any work. Values on a
            GPU are not read.

    Source: the interface of Dao's flash-attn 2.

    Example:
        >>> import torch
        >>> q, cu = torch.randn(7, 4, 8), torch.tensor([0, 2, 7], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, q, q, cu, cu, 5, 5, causal=True).shape
        torch.Size([7, 4, 8])
    """
    args = Arguments("flash_attn_varlen_func")
    q, k, v = autocast(q, k, v)
    args.tensor("q", q, "M Hq D")
    args.tensor("k", k, "N Hkv D" if block_table is None else "pages page Hkv D")
    args.tensor("v", v, "N Hkv E" if block_table is None else "pages page Hkv E")
    return _varlen(
        args, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, block_table,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with keys and values in one tensor.

    Args:
        q: queries (total queries, Hq, D).
        kv: keys and values (total keys, 2, Hkv, D), read in place.
        cu_seqlens_q: as in `flash_attn_varlen_func`.
        cu_seqlens_k: as in `flash_attn_varlen_func`.
        max_seqlen_q: as in `flash_attn_varlen_func`.
        max_seqlen_k: as in `flash_attn_varlen_func`.
        dropout_p: as in `flash_attn_varlen_func`.
        softmax_scale: as in `flash_attn_varlen_func`.
        causal: as in `flash_attn_varlen_func`.
        window_size: as in `flash_attn_varlen_func`.
        softcap: as in `flash_attn_varlen_func`.
        alibi_slopes: as in `flash_attn_varlen_func`.
        deterministic: as in `flash_attn_varlen_func`.
        return_attn_probs: as in `flash_attn_varlen_func`.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_varlen_func`.

    Example:
        >>> import torch
        >>> q, kv, cu = torch.randn(7, 4, 8), torch.randn(7, 2, 2, 8), torch.tensor([0, 2, 7])
        >>> flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 5, 5).shape
        torch.Size([7, 4, 8])
    """
    args = Arguments("flash_attn_varlen_kvpacked_func")
    q, kv = autocast(q, kv)
    args.tensor("q", q, "M Hq D")
    k, v = _unpacked(args, "kv", kv, "N 2 Hkv D")
    return _varlen(
        args, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, None,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor.

    Args:
        qkv: (total tokens, 3, H, D), read in place.
        cu_seqlens: (G+1,) integers, the ends of the sequences after a leading 0.
        max_seqlen: the longest sequence, an int or a tensor of one.
        dropout_p: as in `flash_attn_varlen_func`.
        softmax_scale: as in `flash_attn_varlen_func`.
        causal: as in `flash_attn_varlen_func`.
        window_size: as in `flash_attn_varlen_func`.
        softcap: as in `flash_attn_varlen_func`.
        alibi_slopes: as in `flash_attn_varlen_func`.
        deterministic: as in `flash_attn_varlen_func`.
        return_attn_probs: as in `flash_attn_varlen_func`.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_varlen_func`.

    Example:
        >>> import torch
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(7, 3, 2, 8), torch.tensor([0, 2, 7]), 5).shape
        torch.Size([7, 2, 8])
    """
    args = Arguments(
        "flash_attn_varlen_qkvpacked_func",
        {
            "q": "qkv", "cu_seqlens_q": "cu_seqlens", "cu_seqlens_k": "cu_seqlens", "max_seqlen_q": "max_seqlen",
            "max_seqlen_k": "max_seqlen",
        },
    )  # fmt: skip
    (qkv,) = autocast(qkv)
    q, k, v = _unpacked(args, "qkv", qkv, "N 3 Hq D")
    return _varlen(
        args, q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, None,
    )  # fmt: skip


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
        cache_batch_idx: (B,) the cache's row of each row of q; the rows are gathered, which copies.
        cache_leftpad: (B,) where the cache's tokens begin; 0 unless given.
        block_table: (B, pages of a row): the pages are gathered, which copies.
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
    options = _options(args, softmax_scale, causal, window_size, softcap, False, return_softmax_lse)
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
    bias = _alibi(args, alibi_slopes, max(q.shape[1], capacity), "B")
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
            where = block_table.gather(1, place // size), place % size
        else:
            rows = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx
            where = rows[:, None].expand_as(place), place
        k_cache[where], v_cache[where] = k.to(k_cache.dtype), v.to(v_cache.dtype)

    if block_table is not None:
        keys, values = (x[block_table].flatten(1, 2) for x in (k_cache, v_cache))
    elif cache_batch_idx is not None:
        keys, values = (x[cache_batch_idx] for x in (k_cache, v_cache))
    else:
        keys, values = k_cache, v_cache
    end = held + new
    if cache_leftpad is None and q.shape[1] != capacity:  # where they are equal, `lengths` would cut the queries too
        heads_first = (x.transpose(1, 2) for x in (q, keys, values))
        out, lse = _attend(args, *heads_first, lengths=end, rel_bias=bias, backend=backend, **options)
        out = out.transpose(1, 2)
    else:
        cu_q, cu_k = _segments(torch.full_like(end, q.shape[1]), begin, end, capacity)
        queries, keys, values = (x.reshape(-1, *x.shape[2:]) for x in (q, keys, values))
        out, lse = _packed(args, queries, keys, values, cu_q, cu_k, _of_segments(bias), backend=backend, **options)
        out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    return (out, lse) if return_softmax_lse else out


def _batch(
    args: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    slopes: Tensor | None,
    deterministic: bool,
    more: bool,
) -> Any:
    """A batch of sequences, (B, ., H, .), whose tensors were checked."""
    options = _options(args, scale, causal, window, softcap, deterministic, more)
    bias = _alibi(args, slopes, max(args.sizes["M"], args.sizes["N"]), "B")
    out, lse = _attend(args, *(x.transpose(1, 2) for x in (q, k, v)), rel_bias=bias, dropout_p=dropout_p, **options)
    return _result(out.transpose(1, 2), lse, more)


def _varlen(
    args: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int | Tensor,
    max_k: int | Tensor,
    dropout_p: float,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    slopes: Tensor | None,
    deterministic: bool,
    more: bool,
    table: Tensor | None,
) -> Any:
    """Sequences packed end to end, (., H, .), whose tensors were checked."""
    options = _options(args, scale, causal, window, softcap, deterministic, more)
    cu_q, cu_k = args.indices("cu_seqlens_q", cu_q, "G+1"), args.indices("cu_seqlens_k", cu_k, "G+1")
    args.sizes["G"] = args.sizes["G+1"] - 1
    capacity = 0
    if table is not None:
        table, capacity = _pages(args, table, "G")
    total_k = args.sizes["N"] if table is None else int(cu_k[-1]) if readable(cu_k) and len(cu_k) else 0
    longest = max(
        _longest(args, "q", cu_q, max_q, args.sizes["M"], "M" if "M" in args.sizes else "N"),
        _longest(args, "k", cu_k, max_k, total_k, "N"),
        capacity,
    )
    bias = _alibi(args, slopes, longest, "G")
    if table is not None:
        lengths = cu_k.diff().long()
        if readable(lengths) and len(lengths) and (most := int(lengths.max())) > capacity:
            got = f"holds {args.sizes['width']} pages of {args.sizes['page']} tokens a sequence"
            args.fail("block_table", got, f"room for {most} tokens")
        k, v = (x[table].flatten(0, 2) for x in (k, v))
        cu_q, cu_k = _segments(cu_q.diff().long(), torch.zeros_like(lengths), lengths, capacity)
        bias = _of_segments(bias)
    out, lse = _packed(args, q, k, v, cu_q, cu_k, bias, dropout_p=dropout_p, **options)
    return _result(out, lse, more)


def _attend(
    args: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    rel_bias: Tensor | None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`flashgau.attention` and its log-sum-exp; what it refuses, it refuses in the words of the caller."""
    names = dict(args.names or {})
    names |= {ours: names.get(theirs, theirs) for ours, theirs in _THEIRS.items()}
    out, lse = attend(
        Arguments(args.op, names), q, k, v, causal, scale, window, softcap, rel_bias, None, lengths, cu_seqlens,
        cu_seqlens_k, dropout_p, None, True, backend,
    )  # fmt: skip
    return out, lse


def _packed(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences (tokens, H, .): (tokens, H, E) and the log-sum-exp (H, tokens)."""
    if bias is not None and bias.ndim == 3:  # one packed row has one bias: sequence by sequence
        ends = list(zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False))
        parts = [
            _packed(
                args, q[a:b], k[c:d], v[c:d], cu_q.new_tensor([0, b - a]), cu_k.new_tensor([0, d - c]), own, **options
            )
            for (a, b, c, d), own in zip(ends, bias, strict=True)
        ]
        if not parts:
            return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[1], 0)
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = _attend(args, *rows, cu_seqlens=cu_q, cu_seqlens_k=cu_k, rel_bias=bias, **options)
    return out[0].transpose(0, 1), lse[0]


def _segments(queries: Tensor, begin: Tensor, end: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """Rows of `held` tokens as one packed row: (queries, keys) is cut into (0, before), (M, valid), (0, behind)."""
    none = torch.zeros_like(queries)
    return end_to_end((none, begin), (queries, end - begin), (none, held - end))


def _of_segments(bias: Tensor | None) -> Tensor | None:
    """A bias of each row, for each of the row's segments."""
    return bias.repeat_interleave(3, dim=0) if bias is not None and bias.ndim == 3 else bias


def _unpacked(args: Arguments, name: str, x: Any, axes: str) -> tuple[Tensor, ...]:
    """The parts of a packed tensor, (B, N, 2 or 3, H, D) or without B."""
    letters = axes.split()
    place = next(i for i, letter in enumerate(letters) if letter.isdigit())
    args.sizes[letters[place]] = int(letters[place])
    args.tensor(name, x, axes)
    sizes = args.sizes
    sizes["E"] = sizes["D"]
    sizes.setdefault("M", sizes["N"])
    sizes.setdefault("Hkv", sizes.get("Hq", 0))
    return x.unbind(place)


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


def _options(
    args: Arguments, scale: Any, causal: Any, window: Any, softcap: Any, deterministic: Any, more: Any
) -> dict[str, Any]:
    """The options that are named or valued differently there."""
    args.flag("causal", causal)
    args.flag("deterministic", deterministic)
    args.flag("return_softmax_lse" if args.op.endswith("kvcache") else "return_attn_probs", more)
    if scale is not None:
        args.number("softmax_scale", scale, "a finite number or None")
    args.number("softcap", softcap, "a number, 0 for none")
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        args.fail("window_size", f"is {window!r}", "a pair (left, right) of whole numbers, -1 for open", TypeError)
    for i, side in enumerate(window):
        args.integer(f"window_size[{i}]", side, -1, "a whole number >= 0, or -1 for open")
    if not args.heads_in_groups():
        args.fail("q", f"has {args.sizes['Hq']} heads", f"a multiple of {args.sizes['Hkv']}, the heads of the keys")
    seen = tuple(None if side == -1 else int(side) for side in window)
    return {
        "causal": causal,
        "scale": scale,
        "window": None if seen == (None, None) else seen,
        "softcap": softcap if softcap > 0 else None,
    }


def _alibi(args: Arguments, slopes: Any, longest: int, rows: str) -> Tensor | None:
    """The bias of slopes (H,) as (H, 2P-1), of (rows, H) as (rows, H, 2P-1)."""
    if slopes is None:
        return None
    args.per_head("alibi_slopes", slopes, "Hq" if getattr(slopes, "ndim", 1) == 1 else f"{rows} Hq")
    if slopes.dtype in (torch.float16, torch.bfloat16):
        slopes = slopes.float()
    return alibi_bias(slopes.flatten(), max(longest, 1)).unflatten(0, slopes.shape) if slopes.numel() else None


def _longest(args: Arguments, side: str, cu: Tensor, given: Any, total: int, letter: str) -> int:
    """Check offsets and `max_seqlen`, and return a length that no sequence exceeds.

    Only ALiBi needs it. What would have to be waited for, a tensor on a GPU or a number inside a traced graph, is not
    read: the number of all tokens serves as well.
    """
    name, expected = f"max_seqlen_{side}", "a whole number >= 0, or a tensor of one"
    actual = args.offsets(f"cu_seqlens_{side}", cu, total, letter)
    if isinstance(given, Tensor):
        if given.numel() != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            args.fail(name, f"has shape {tuple(given.shape)} and dtype {given.dtype}", expected, TypeError)
        if not readable(given):
            return total
        given = int(given)
    if torch.compiler.is_compiling() or isinstance(given, torch.SymInt):
        return total
    args.integer(name, given, 0, expected)
    if actual > given:
        args.fail(name, f"is {given}", f"at least {actual}, the longest sequence")
    return min(int(given), total)


def _pages(args: Arguments, table: Any, rows: str) -> tuple[Tensor, int]:
    """Check a table of pages; the table, and how many tokens a row of it may hold."""
    table = args.indices("block_table", table, f"{rows} width")
    last = args.sizes["pages"] - 1
    within(args, "block_table", table, 0, last, f"numbers of pages, 0 to {last}")
    return table.long(), args.sizes["width"] * args.sizes["page"]


def _capacity(args: Arguments, cache: Tensor, table: Any, index: Any) -> tuple[int, Tensor | None, Tensor | None]:
    """How many tokens a row of the cache may hold, and the checked table of pages and rows."""
    batch = args.sizes["B"]
    if table is not None:
        if index is not None:
            args.fail("cache_batch_idx", "was given together with `block_table`", "at most one of them")
        table, capacity = _pages(args, table, "B")
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


def _result(out: Tensor, lse: Tensor, more: bool) -> Any:
    return (out, lse, None) if more else out

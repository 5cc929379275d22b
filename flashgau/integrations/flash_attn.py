"""The functions of flash-attn under their own names and signatures, computed by `flashgau.attention`.

    from flashgau.integrations.flash_attn import flash_attn_func  # instead of: from flash_attn import ...

They run on any device, in fp32 and fp64 too, and with any head width. Tensors have the tokens before the heads,
(B, N, H, D), a window side of -1 is open, softcap 0 is none. Signatures as of flash-attn 2.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.nn.rotary import rotate
from flashgau.ops.attention import attention
from flashgau.ops.bias import alibi_bias
from flashgau.ops.validate import Arguments, readable

from .packing import end_to_end

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


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
    args.tensor("q", q, "B M Hq D")
    args.tensor("k", k, "B N Hkv D")
    args.tensor("v", v, "B N Hkv E")
    options = _options(args, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs)
    bias = _alibi(args, alibi_slopes, max(args.sizes["M"], args.sizes["N"]), "B")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention(q, k, v, rel_bias=bias, dropout_p=dropout_p, return_lse=True, **options)
    return _result(out.transpose(1, 2), lse, return_attn_probs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_func` with keys and values in one tensor.

    Args:
        q: queries (B, M, Hq, D).
        kv: keys and values (B, N, 2, Hkv, D), read in place.
        args: the other arguments of `flash_attn_func`, in its order.
        kwargs: the same by name.

    Returns:
        As `flash_attn_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.

    Example:
        >>> import torch
        >>> flash_attn_kvpacked_func(torch.randn(1, 5, 4, 8), torch.randn(1, 9, 2, 2, 8)).shape
        torch.Size([1, 5, 4, 8])
    """
    k, v = _unpacked("flash_attn_kvpacked_func", "kv", kv, "B N 2 Hkv D")
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_func` with queries, keys and values in one tensor.

    Args:
        qkv: (B, N, 3, H, D), read in place.
        args: the other arguments of `flash_attn_func`, in its order.
        kwargs: the same by name.

    Returns:
        As `flash_attn_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.

    Example:
        >>> import torch
        >>> flash_attn_qkvpacked_func(torch.randn(1, 9, 3, 2, 8), causal=True).shape
        torch.Size([1, 9, 2, 8])
    """
    q, k, v = _unpacked("flash_attn_qkvpacked_func", "qkv", qkv, "B N 3 H D")
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
        cu_seqlens_q: (G+1,) int32, the ends of the sequences of queries after a leading 0.
        cu_seqlens_k: the same for keys; with `block_table` their differences are the lengths.
        max_seqlen_q: the longest sequence of queries; used for the size of the ALiBi bias.
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
    args.tensor("q", q, "M Hq D")
    args.tensor("k", k, "N Hkv D" if block_table is None else "pages page Hkv D")
    args.tensor("v", v, "N Hkv E" if block_table is None else "pages page Hkv E")
    options = _options(args, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs)
    longest = 0
    for side, cu, given in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        args.indices(f"cu_seqlens_{side}", cu, "G+1")
        args.integer(f"max_seqlen_{side}", given, 0, "a whole number >= 0")
        if readable(cu) and (actual := int(cu.diff().max()) if len(cu) > 1 else 0) > given:
            args.fail(f"max_seqlen_{side}", f"is {given}", f"at least {actual}, the longest sequence")
        longest = max(longest, int(given))
    args.sizes["G"] = cu_seqlens_q.shape[0] - 1
    capacity = 0 if block_table is None else _pages(args, block_table, "G")
    bias = _alibi(args, alibi_slopes, max(longest, capacity), "G")
    if block_table is not None:
        lengths = cu_seqlens_k.diff().long()
        if readable(lengths) and len(lengths) and (most := int(lengths.max())) > capacity:
            got = f"holds {args.sizes['width']} pages of {args.sizes['page']} tokens a sequence"
            args.fail("block_table", got, f"room for {most} tokens")
        k, v = (x[block_table.long()].flatten(0, 2) for x in (k, v))
        begin = torch.zeros_like(lengths)
        cu_seqlens_q, cu_seqlens_k = _segments(cu_seqlens_q.diff().long(), begin, lengths, capacity)
        bias = _of_segments(bias)
    out, lse = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, bias, dropout_p=dropout_p, **options)
    return _result(out, lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_varlen_func` with keys and values in one tensor.

    Args:
        q: queries (total queries, Hq, D).
        kv: keys and values (total keys, 2, Hkv, D), read in place.
        args: the other arguments of `flash_attn_varlen_func`, in its order.
        kwargs: the same by name.

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
    k, v = _unpacked("flash_attn_varlen_kvpacked_func", "kv", kv, "N 2 Hkv D")
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Any:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor.

    Args:
        qkv: (total tokens, 3, H, D), read in place.
        cu_seqlens: (G+1,) int32, the ends of the sequences after a leading 0.
        max_seqlen: the longest sequence.
        args: the other arguments of `flash_attn_varlen_func`, in its order.
        kwargs: the same by name.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_varlen_func`.

    Example:
        >>> import torch
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(7, 3, 2, 8), torch.tensor([0, 2, 7]), 5).shape
        torch.Size([7, 2, 8])
    """
    q, k, v = _unpacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, "N 3 H D")
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


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
    args.tensor("q", q, "B M Hq D")
    cached = "rows capacity" if block_table is None else "pages page"
    args.tensor("k_cache", k_cache, f"{cached} Hkv D")
    args.tensor("v_cache", v_cache, f"{cached} Hkv E")
    options = _options(args, softmax_scale, causal, window_size, softcap, False, return_softmax_lse)
    args.integer("num_splits", num_splits, 0, "a whole number >= 0")
    args.flag("rotary_interleaved", rotary_interleaved)
    if (k is None) != (v is None):
        args.fail("v" if v is None else "k", "is missing", "both `k` and `v`, or neither")
    if k is not None:
        args.tensor("k", k, "B T Hkv D")
        args.tensor("v", v, "B T Hkv E")
    batch, new = q.shape[0], 0 if k is None else k.shape[1]
    capacity = _capacity(args, k_cache, block_table, cache_batch_idx)
    begin, held = _extent(args, q, cache_seqlens, cache_leftpad, new, capacity, k is not None)
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(args, rotary_cos, rotary_sin, held, max(new, q.shape[1]), k is not None)
    bias = _alibi(args, alibi_slopes, max(q.shape[1], capacity), "B")

    if k is not None and v is not None:
        place = held[:, None] + torch.arange(new, device=q.device)  # (B, T)
        if rotary_cos is not None and rotary_sin is not None:
            standing = causal or tuple(window_size) != (-1, -1)
            steps = torch.arange(q.shape[1], device=q.device) * int(standing)
            q = _turn(q, rotary_cos, rotary_sin, held[:, None] + steps, rotary_interleaved)
            k = _turn(k, rotary_cos, rotary_sin, place, rotary_interleaved)
        if block_table is not None:
            size = k_cache.shape[1]
            where = block_table.long().gather(1, place // size), place % size
        else:
            rows = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx.long()
            where = rows[:, None].expand_as(place), place
        k_cache[where], v_cache[where] = k, v

    if block_table is not None:
        keys, values = (x[block_table.long()].flatten(1, 2) for x in (k_cache, v_cache))
    elif cache_batch_idx is not None:
        keys, values = (x[cache_batch_idx.long()] for x in (k_cache, v_cache))
    else:
        keys, values = k_cache, v_cache
    end = held + new
    if cache_leftpad is None and q.shape[1] != capacity:  # where they are equal, `lengths` would cut the queries too
        heads_first = (x.transpose(1, 2) for x in (q, keys, values))
        out, lse = attention(*heads_first, lengths=end, rel_bias=bias, return_lse=True, **options)
        out = out.transpose(1, 2)
    else:
        cu_q, cu_k = _segments(torch.full_like(end, q.shape[1]), begin, end, capacity)
        queries, keys, values = (x.reshape(-1, *x.shape[2:]) for x in (q, keys, values))
        out, lse = _packed(queries, keys, values, cu_q, cu_k, _of_segments(bias), **options)
        out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    return (out, lse) if return_softmax_lse else out


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences (tokens, H, .): (tokens, H, E) and the log-sum-exp (H, tokens)."""
    if bias is not None and bias.ndim == 3:  # one packed row has one bias: sequence by sequence
        ends = list(zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False))
        parts = [
            _packed(q[a:b], k[c:d], v[c:d], cu_q.new_tensor([0, b - a]), cu_k.new_tensor([0, d - c]), own, **options)
            for (a, b, c, d), own in zip(ends, bias, strict=True)
        ]
        if not parts:
            return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[1], 0)
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = attention(*rows, cu_seqlens=cu_q, cu_seqlens_k=cu_k, rel_bias=bias, return_lse=True, **options)
    return out[0].transpose(0, 1), lse[0]


def _segments(queries: Tensor, begin: Tensor, end: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """Rows of `held` tokens as one packed row: (queries, keys) is cut into (0, before), (M, valid), (0, behind)."""
    none = torch.zeros_like(queries)
    return end_to_end((none, begin), (queries, end - begin), (none, held - end))


def _of_segments(bias: Tensor | None) -> Tensor | None:
    """A bias of each row, for each of the row's segments."""
    return bias.repeat_interleave(3, dim=0) if bias is not None and bias.ndim == 3 else bias


def _turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate x (B, T, H, D) by the tables' rows at `positions` (B, T), in fp32 (fp64 for fp64 tables)."""
    kind = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = (table[positions][:, :, None].to(kind) for table in (cos, sin))
    return rotate(x, cos, sin, interleaved=interleaved)


def _unpacked(op: str, name: str, x: Any, axes: str) -> tuple[Tensor, ...]:
    letters = axes.split()
    place = next(i for i, letter in enumerate(letters) if letter.isdigit())
    expected = f"a torch.Tensor of shape ({', '.join(letters)})"
    args = Arguments(op)
    if not isinstance(x, Tensor):
        args.fail(name, f"is a {type(x).__name__}", expected, TypeError)
    if x.ndim != len(letters) or x.shape[place] != int(letters[place]):
        args.fail(name, f"has shape {tuple(x.shape)}", expected.removeprefix("a torch.Tensor of shape "))
    return x.unbind(place)


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


def _within(args: Arguments, name: str, x: Tensor, low: Any, high: Any, expected: str) -> None:
    """Check the values, where reading them costs nothing."""
    if readable(x) and bool(((x < low) | (x > high)).any()):
        args.fail(name, f"is {x.tolist()}", expected)


def _pages(args: Arguments, table: Any, rows: str) -> int:
    """Check a table of pages, and return how many tokens a row of it may hold."""
    args.indices("block_table", table, f"{rows} width")
    last = args.sizes["pages"] - 1
    _within(args, "block_table", table, 0, last, f"numbers of pages, 0 to {last}")
    return args.sizes["width"] * args.sizes["page"]


def _capacity(args: Arguments, cache: Tensor, table: Any, index: Any) -> int:
    """How many tokens a row of the cache may hold."""
    batch = args.sizes["B"]
    if table is not None:
        if index is not None:
            args.fail("cache_batch_idx", "was given together with `block_table`", "at most one of them")
        return _pages(args, table, "B")
    if index is not None:
        args.indices("cache_batch_idx", index, "B")
        _within(args, "cache_batch_idx", index, 0, cache.shape[0] - 1, f"rows of the cache, 0 to {cache.shape[0] - 1}")
    elif cache.shape[0] != batch:
        args.fail("k_cache", f"has {cache.shape[0]} rows", f"{batch} as `q` has, or `cache_batch_idx`")
    return cache.shape[1]


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
        args.indices("cache_seqlens", seqlens, "B")
        expected = f"values from 0 to {capacity - new}: the cache has room for {capacity} tokens, and {new} are new"
        _within(args, "cache_seqlens", seqlens, 0, capacity - new, expected)
        held = seqlens.long()
    if leftpad is None:
        return torch.zeros_like(held), held
    args.indices("cache_leftpad", leftpad, "B")
    if readable(held):
        _within(args, "cache_leftpad", leftpad, 0, held, f"values from 0 to `cache_seqlens`, {held.tolist()}")
    return leftpad.long(), held


def _check_rotary(args: Arguments, cos: Any, sin: Any, held: Tensor, tokens: int, writes: bool) -> None:
    if cos is None or sin is None:
        args.fail("rotary_cos" if cos is None else "rotary_sin", "is missing", "both tables or neither")
    if not writes:
        args.fail("rotary_cos", "was given without `k` and `v`", "new keys to turn: cached ones are taken as they are")
    args.per_head("rotary_cos", cos, "positions pairs")
    args.per_head("rotary_sin", sin, "positions pairs")
    if 2 * cos.shape[1] > args.sizes["D"]:
        got = f"has shape {tuple(cos.shape)}"
        args.fail("rotary_cos", got, f"at most D / 2 = {args.sizes['D'] // 2} pairs of channels")
    if readable(held) and len(held) and int(held.max()) + tokens > cos.shape[0]:
        needed = int(held.max()) + tokens
        args.fail("rotary_cos", f"has shape {tuple(cos.shape)}", f"at least {needed} positions")


def _result(out: Tensor, lse: Tensor, more: bool) -> Any:
    return (out, lse, None) if more else out

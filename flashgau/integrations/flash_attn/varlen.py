"""Attention of sequences packed end to end, each of its own length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.contract.validate import Arguments, autocast, readable
from flashgau.ops.autograd import needs_grad
from flashgau.ops.dispatch import resolve
from flashgau.options import Pages

from .common import (
    Given,
    alibi,
    attend_packed,
    attend_packed_pages,
    checked_pages,
    of_segments,
    result,
    segments,
    unpacked,
)


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
        block_table: (G, pages of a sequence) integers: where its keys are. On Triton they are read there, unless
            gradients or dropout are wanted or slopes are (G, Hq); else the pages are gathered, which copies.

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
    given = Given(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _varlen(args, q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), given, block_table)


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
    k, v = unpacked(args, "kv", kv, "N 2 Hkv D")
    given = Given(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _varlen(args, q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), given)


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
    q, k, v = unpacked(args, "qkv", qkv, "N 3 Hq D")
    given = Given(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _varlen(args, q, k, v, (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen), given)


def _varlen(
    args: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: tuple[Tensor, Tensor],
    longest_of: tuple[int | Tensor, int | Tensor],
    given: Given,
    table: Tensor | None = None,
) -> Any:
    """Sequences packed end to end, (., H, .), whose tensors were checked. Ends and longest, of queries and of keys."""
    options, (cu_q, cu_k), (max_q, max_k) = given.checked(args), ends, longest_of
    cu_q, cu_k = args.indices("cu_seqlens_q", cu_q, "G+1"), args.indices("cu_seqlens_k", cu_k, "G+1")
    args.sizes["G"] = args.sizes["G+1"] - 1
    capacity = 0
    if table is not None:
        table, capacity = checked_pages(args, table, "G")
    total_k = args.sizes["N"] if table is None else int(cu_k[-1]) if readable(cu_k) and len(cu_k) else 0
    longest = max(
        _longest(args, "q", cu_q, max_q, args.sizes["M"], "M" if "M" in args.sizes else "N"),
        _longest(args, "k", cu_k, max_k, total_k, "N"),
        capacity,
    )
    bias = alibi(args, given.slopes, longest, "G")
    if table is not None:
        if readable(cu_k) and len(cu_k) > 1 and (most := int(cu_k.diff().max())) > capacity:
            got = f"holds {args.sizes['width']} pages of {args.sizes['page']} tokens a sequence"
            args.fail("block_table", got, f"room for {most} tokens")
        if _reads_pages(args, q, k, v, bias, given.dropout_p):
            out, lse = attend_packed_pages(args, q, k, v, Pages(table), cu_q, cu_k, rel_bias=bias, **options)
            return result(out, lse, given.more)
        lengths = cu_k.diff().long()
        k, v = (x[table.long()].flatten(0, 2) for x in (k, v))
        cu_q, cu_k = segments(cu_q.diff().long(), torch.zeros_like(lengths), lengths, capacity)
        bias = of_segments(bias)
    out, lse = attend_packed(args, q, k, v, cu_q, cu_k, bias, dropout_p=given.dropout_p, **options)
    return result(out, lse, given.more)


def _reads_pages(args: Arguments, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float) -> bool:
    """Whether kernels read keys and values in their pages, which have no gradient then.

    Not for one bias a sequence, which are computed one by one, nor with dropout, whose choice would be another.
    """
    width = max(args.sizes["D"], args.sizes["E"])
    if resolve("attention", None, q.device, q.dtype, width, args.op) != "triton" or dropout_p != 0:
        return False
    return not needs_grad(q, k, v, bias) and (bias is None or bias.ndim == 2)


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

"""Attention of a batch of sequences of one length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashgau.contract.validate import Arguments, autocast

from .common import Given, alibi, attend_batch, result, unpacked


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
    given = Given(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _batch(args, q, k, v, given)


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
    k, v = unpacked(args, "kv", kv, "B N 2 Hkv D")
    given = Given(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _batch(args, q, k, v, given)


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
    q, k, v = unpacked(args, "qkv", qkv, "B N 3 Hq D")
    given = Given(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _batch(args, q, k, v, given)


def _batch(args: Arguments, q: Tensor, k: Tensor, v: Tensor, given: Given) -> Any:
    """A batch of sequences, (B, ., H, .), whose tensors were checked."""
    options = given.checked(args)
    bias = alibi(args, given.slopes, max(args.sizes["M"], args.sizes["N"]), "B")
    out, lse = attend_batch(
        args, *(x.transpose(1, 2) for x in (q, k, v)), rel_bias=bias, dropout_p=given.dropout_p, **options
    )
    return result(out.transpose(1, 2), lse, given.more)

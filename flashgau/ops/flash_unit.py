"""A whole FLASH layer between norm and residual sum as one operator. For `flashgau.nn`; not public."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from flashgau.eager import flash_unit as flash_unit_eager

from . import autograd, dispatch
from .operation import Operation
from .validate import Arguments, autocast, widened


def runs_whole(x: Tensor) -> bool:
    """Whether a FLASH layer on x should run as one operator: where its attention would run on the eager backend."""
    return dispatch.resolve("mixed_chunk_attention", None, x.device, x.dtype) == "eager"


def flash_unit(
    x: Tensor,
    to_hidden: torch.nn.Linear,
    gamma: Tensor,
    beta: Tensor | None,
    to_out: torch.nn.Linear,
    *,
    residual: Tensor | None,
    angles: Tensor | None,
    interleaved: bool,
    order: list[int],
    chunk_size: int,
    score: str,
    causal: bool,
    lin_normalizer: str | float,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """y = (u * mixed_chunk(heads, v)) W_o + b_o (+ residual), [u, v, z] = silu(x W + b), heads = RoPE(gamma z + beta).

    x (B, N, d); `order` names the rows of gamma and beta that make quad_q, quad_k, lin_q and lin_k; angles
    (1 or B, N, pairs). Source: Hua et al. 2022 (arXiv 2202.10447), section 3.2.
    """
    x, w, b, w_out, b_out = autocast(x, to_hidden.weight, to_hidden.bias, to_out.weight, to_out.bias)
    args = Arguments("FLASH")
    args.tensor("x", x, "B N d")
    args.sequences(lengths, cu_seqlens)
    lengths = widened(lengths)
    args.relative_bias(rel_bias, "B", chunk_size, "the chunk size")
    cos, sin = (angles.cos(), angles.sin()) if angles is not None else (None, None)
    inside = residual if residual is not None and residual.dtype == x.dtype else None
    bias = rel_bias.expand(x.shape[0], -1) if rel_bias is not None else None
    tokens = None if lin_normalizer == "tokens" else float(lin_normalizer)
    save = autograd.needs_grad(x, w, b, gamma, beta, w_out, b_out, rel_bias)
    y, *_ = _flash_unit(
        x, w, b, gamma, beta, w_out, b_out, inside, bias, cos, sin, lengths, cu_seqlens,
        options=FlashOptions(order, interleaved, chunk_size, score, causal, tokens), save=save, backend="eager",
    )  # fmt: skip
    return y if residual is None or inside is not None else y + residual


class FlashOptions(NamedTuple):
    """What a FLASH layer is computed with, beside its tensors."""

    order: list[int]
    interleaved: bool
    chunk_size: int
    score: str
    causal: bool
    lin_normalizer: Optional[float]  # None: the number of tokens summed


def _results(
    x: Tensor, w: Tensor, gamma: Tensor, w_out: Tensor, cu_seqlens: Tensor | None, chunk_size: int, causal: bool,
    save: bool, **_: Any,
) -> list[Tensor | None]:  # fmt: skip
    y = x.new_empty(x.shape)
    if not save:
        return [y, None, None, None]
    narrow, wide = gamma.shape[1], w_out.shape[1]
    count = flash_unit_eager.state_count(x, chunk_size, narrow, wide, causal, cu_seqlens)
    starts = x.new_empty(count, narrow, wide, dtype=torch.promote_types(x.dtype, torch.float32))
    return [y, x.new_empty(*x.shape[:2], w.shape[0]), x.new_empty(*x.shape[:2], wide), starts]


_flash_unit = Operation(
    "flash_unit",
    inputs="x w b? gamma beta? w_out b_out? residual+ rel_bias?",
    data="cos? sin? lengths? cu_seqlens?",
    results="y",
    saved="before products starts",
    options=FlashOptions,
    shapes=_results,
    op="flash_unit",
    error="FLASH",
)

"""A whole FLASH layer between norm and residual sum as one operator. For `flashgau.nn`; not public."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from flashgau.eager import flash_unit as flash_unit_eager

from . import autograd, dispatch
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
        order, interleaved, chunk_size, score, causal, tokens, save, "eager",
    )  # fmt: skip
    return y if residual is None or inside is not None else y + residual


@autograd.operator("flash_unit")
def _flash_unit(
    x: Tensor,
    w: Tensor,
    b: Optional[Tensor],
    gamma: Tensor,
    beta: Optional[Tensor],
    w_out: Tensor,
    b_out: Optional[Tensor],
    residual: Optional[Tensor],
    rel_bias: Optional[Tensor],
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    lengths: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    order: list[int],
    interleaved: bool,
    chunk_size: int,
    score: str,
    causal: bool,
    lin_normalizer: Optional[float],
    save: bool,
    backend: str,
) -> list[Tensor]:
    return autograd.run(
        "flash_unit", backend, "flash_unit_forward", x, w, b, gamma, beta, w_out, b_out, residual, cos, sin,
        order=order, interleaved=interleaved, chunk_size=chunk_size, score=score, causal=causal,
        lin_normalizer=lin_normalizer, rel_bias=rel_bias, lengths=lengths, cu_seqlens=cu_seqlens, save=save,
    )  # fmt: skip


@_flash_unit.register_fake
def _(
    x: Tensor,
    w: Tensor,
    b: Optional[Tensor],
    gamma: Tensor,
    beta: Optional[Tensor],
    w_out: Tensor,
    b_out: Optional[Tensor],
    residual: Optional[Tensor],
    rel_bias: Optional[Tensor],
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    lengths: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    order: list[int],
    interleaved: bool,
    chunk_size: int,
    score: str,
    causal: bool,
    lin_normalizer: Optional[float],
    save: bool,
    backend: str,
) -> list[Tensor | None]:
    y = x.new_empty(x.shape)
    if not save:
        return [y, None, None, None]
    narrow, wide = gamma.shape[1], w_out.shape[1]
    count = flash_unit_eager.state_count(x, chunk_size, narrow, wide, causal, cu_seqlens)
    states = x.new_empty(count, narrow, wide, dtype=torch.promote_types(x.dtype, torch.float32))
    return [y, x.new_empty(*x.shape[:2], w.shape[0]), x.new_empty(*x.shape[:2], wide), states]


@autograd.operator("flash_unit_backward")
def _flash_unit_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Optional[Tensor],
    gamma: Tensor,
    beta: Optional[Tensor],
    w_out: Tensor,
    b_out: Optional[Tensor],
    rel_bias: Optional[Tensor],
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    lengths: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    before: Tensor,
    products: Tensor,
    starts: Tensor,
    order: list[int],
    interleaved: bool,
    chunk_size: int,
    score: str,
    causal: bool,
    lin_normalizer: Optional[float],
    backend: str,
) -> list[Tensor]:
    return autograd.run(
        "flash_unit", backend, "flash_unit_backward", dy, x, w, b, gamma, beta, w_out, b_out, cos, sin, before,
        products, starts,
        order=order, interleaved=interleaved, chunk_size=chunk_size, score=score, causal=causal,
        lin_normalizer=lin_normalizer, rel_bias=rel_bias, lengths=lengths, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_flash_unit_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Optional[Tensor],
    gamma: Tensor,
    beta: Optional[Tensor],
    w_out: Tensor,
    b_out: Optional[Tensor],
    rel_bias: Optional[Tensor],
    *rest: Any,
) -> list[Tensor | None]:
    plain = [t.new_empty(t.shape) for t in (x, w, w[:, 0], gamma, gamma, w_out, w_out[:, 0])]
    return [*plain, None if rel_bias is None else rel_bias.new_empty(rel_bias.shape)]


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, w, b, gamma, beta, w_out, b_out, _, *data = inputs[:13]
    ctx.save_for_backward(x, w, b, gamma, beta, w_out, b_out, *data, *output[1:])
    ctx.options = *inputs[13:19], inputs[20]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    dy = grads[0]
    if dy is None:
        return (None,) * 21
    *inner, dbias = _flash_unit_backward(dy, *ctx.saved_tensors, *ctx.options)
    return *autograd.only_needed(ctx, [*inner, dy, dbias]), *[None] * 12


_flash_unit.register_autograd(_differentiate, setup_context=_save)
autograd.refuse_second_derivative("FLASH", _flash_unit_backward)

"""The projections inside GAU and FLASH layers, fused with what follows them. For `flashgau.nn`; not public."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, dispatch
from .validate import autocast


def projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Sequence[int],
    *,
    silu: int = 0,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """x W^T + b cut into parts of these widths, each a tensor of its own, the first `silu` of them under silu.

    x (..., d), weight (sum of widths, d) and bias as in torch.nn.Linear; a `residual` (..., width) is added to the
    one part of a projection. Source: [u, v, z] of Hua et al. 2022 (arXiv 2202.10447), code 1.
    """
    x, weight, bias = autocast(x, weight, bias)
    name = dispatch.resolve_inner("projection", x.device, x.dtype)
    inside = residual if residual is not None and residual.dtype == x.dtype else None
    if name == "reference":
        y = F.linear(x, weight, bias)
        parts = [F.silu(part) if i < silu else part for i, part in enumerate(y.split(list(widths), -1))]
        inside = None
    else:
        save = autograd.needs_grad(x, weight, bias)
        parts = _projection(x, weight, bias, inside, list(widths), silu, save, name)[: len(widths)]
    return parts if residual is None or inside is not None else [parts[0] + residual]


def heads(
    z: Tensor, gamma: Tensor, beta: Tensor | None, angles: Tensor | None = None, *, interleaved: bool = False
) -> list[Tensor]:
    """gamma_h silu(z) + beta_h, turned by rotary angles: z (B, N, S) -> H tensors (B, N, S).

    gamma, beta (H, S); angles (1 or B, N, pairs) in fp32 turn the first 2 * pairs channels, paired by halves or,
    if `interleaved`, with their neighbours.
    """
    cos, sin = (angles.cos(), angles.sin()) if angles is not None else (None, None)
    name = dispatch.resolve_inner("heads", z.device, z.dtype)
    if name != "reference":
        return _heads(z, gamma, beta, cos, sin, interleaved, name)
    made = F.silu(z)[:, None] * gamma[:, None].to(z.dtype)
    made = made if beta is None else made + beta[:, None].to(z.dtype)
    if cos is not None and sin is not None:
        pairs = cos.shape[-1]
        cos, sin = cos[:, None].to(z.dtype), sin[:, None].to(z.dtype)
        turning, rest = made[..., : 2 * pairs], made[..., 2 * pairs :]
        a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
        pair = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        made = torch.cat([turned, rest], -1)
    return list(made.unbind(1))


@autograd.operator("projection")
def _projection(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    widths: list[int],
    silu: int,
    save: bool,
    backend: str,
) -> list[Tensor]:
    parts, saved = autograd.run(
        "projection", backend, "projection_forward", x.device, x, weight, bias, residual, widths, silu=silu, save=save
    )
    return [*parts, *saved]


@_projection.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    widths: list[int],
    silu: int,
    save: bool,
    backend: str,
) -> list[Tensor]:
    kept = [] if not (silu and save) else [sum(widths)] if backend == "triton" else widths[:silu]
    return [x.new_empty(*x.shape[:-1], width) for width in [*widths, *kept]]


@autograd.operator("projection_backward")
def _projection_backward(
    dparts: list[Tensor],
    x: Tensor,
    weight: Tensor,
    saved: list[Tensor],
    silu: int,
    backend: str,
) -> list[Tensor]:
    return list(
        autograd.run("projection", backend, "projection_backward", x.device, dparts, x, weight, saved, silu=silu)
    )


@_projection_backward.register_fake
def _(dparts: list[Tensor], x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])]


def _save_projection(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weight, _, _, widths, ctx.silu, _, ctx.backend = inputs
    ctx.widths = widths
    ctx.set_materialize_grads(False)  # or zeros would be made for the saved parts, which have no gradient
    ctx.save_for_backward(x, weight, *output[len(widths) :])


def _differentiate_projection(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, weight, *saved = ctx.saved_tensors
    dparts = [
        x.new_zeros(*x.shape[:-1], width) if grad is None else grad
        for grad, width in zip(grads, ctx.widths, strict=False)
    ]
    results = _projection_backward(dparts, x, weight, saved, ctx.silu, ctx.backend)
    return *autograd.only_needed(ctx, [*results, grads[0]]), None, None, None, None


_projection.register_autograd(_differentiate_projection, setup_context=_save_projection)
autograd.refuse_second_derivative("projection", _projection_backward)


@autograd.operator("heads")
def _heads(
    z: Tensor,
    gamma: Tensor,
    beta: Optional[Tensor],
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    interleaved: bool,
    backend: str,
) -> list[Tensor]:
    return autograd.run("heads", backend, "heads_forward", z.device, z, gamma, beta, cos, sin, interleaved=interleaved)


@_heads.register_fake
def _(z: Tensor, gamma: Tensor, *rest: Any) -> list[Tensor]:
    return [z.new_empty(z.shape) for _ in range(gamma.shape[0])]


@autograd.operator("heads_backward")
def _heads_backward(
    douts: list[Tensor],
    z: Tensor,
    gamma: Tensor,
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    interleaved: bool,
    backend: str,
) -> list[Tensor]:
    return list(
        autograd.run("heads", backend, "heads_backward", z.device, douts, z, gamma, cos, sin, interleaved=interleaved)
    )


@_heads_backward.register_fake
def _(douts: list[Tensor], z: Tensor, gamma: Tensor, *rest: Any) -> list[Tensor]:
    return [z.new_empty(z.shape), gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape)]


def _save_heads(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    z, gamma, beta, cos, sin, *ctx.options = inputs
    ctx.has_beta = beta is not None
    ctx.save_for_backward(z, gamma, cos, sin)


def _differentiate_heads(ctx: Any, douts: list[Tensor]) -> tuple[Tensor | None, ...]:
    results = _heads_backward(list(douts), *ctx.saved_tensors, *ctx.options)
    return *autograd.only_needed(ctx, results), None, None, None, None


_heads.register_autograd(_differentiate_heads, setup_context=_save_heads)
autograd.refuse_second_derivative("heads", _heads_backward)

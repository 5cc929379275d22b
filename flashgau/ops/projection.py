"""The projections of GAU and FLASH layers, fused with what follows them. For `flashgau.nn`; not public."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, dispatch
from .validate import autocast


def gated_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    angles: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """u, v and the heads of [u, v, z] = silu(x W^T + b), head h being gamma_h z + beta_h turned by rotary angles.

    x (B, N, d), weight (2e + S, d) and bias as in torch.nn.Linear; gamma, beta (H, S); angles (1 or B, N, pairs) in
    fp32 turn the first 2 * pairs channels, paired by halves or, if `interleaved`, with their neighbours. Returns u and
    v (B, N, e), and H tensors (B, N, S). Source: Hua et al. 2022 (arXiv 2202.10447), code 1 and equation 4.
    """
    x, weight, bias = autocast(x, weight, bias)
    cos, sin = (angles.cos(), angles.sin()) if angles is not None else (None, None)
    name = dispatch.resolve_inner("projection", x.device, x.dtype)
    count, narrow = gamma.shape
    if name != "reference":
        save = autograd.needs_grad(x, weight, bias, gamma, beta)
        u, v, *rest = _gated_projection(x, weight, bias, gamma, beta, cos, sin, interleaved, save, name)
        return u, v, rest[:count]
    wide = (weight.shape[0] - narrow) // 2
    u, v, z = F.silu(F.linear(x, weight, bias)).split((wide, wide, narrow), -1)
    heads = z[:, None] * gamma[:, None].to(z.dtype)
    heads = heads if beta is None else heads + beta[:, None].to(z.dtype)
    if cos is not None and sin is not None:
        pairs = cos.shape[-1]
        cos, sin = cos[:, None].to(z.dtype), sin[:, None].to(z.dtype)
        turning, rest = heads[..., : 2 * pairs], heads[..., 2 * pairs :]
        a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
        pair = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        heads = torch.cat([turned, rest], -1)
    return u, v, list(heads.unbind(1))


def projection(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x W^T + b (+ residual): x (..., d), weight (width, d) and bias as in torch.nn.Linear, residual (..., width)."""
    x, weight, bias = autocast(x, weight, bias)
    name = dispatch.resolve_inner("projection", x.device, x.dtype)
    inside = residual if residual is not None and residual.dtype == x.dtype and name != "reference" else None
    y = F.linear(x, weight, bias) if name == "reference" else _projection(x, weight, bias, inside, name)
    return y if residual is None or inside is not None else y + residual


@autograd.operator("gated_projection")
def _gated_projection(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    gamma: Tensor,
    beta: Optional[Tensor],
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    interleaved: bool,
    save: bool,
    backend: str,
) -> list[Tensor]:
    return autograd.run(
        "projection", backend, "gated_projection_forward", x, weight, bias, gamma, beta, cos, sin,
        interleaved=interleaved, save=save,
    )  # fmt: skip


@_gated_projection.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    gamma: Tensor,
    beta: Optional[Tensor],
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    interleaved: bool,
    save: bool,
    backend: str,
) -> list[Tensor]:
    count, narrow = gamma.shape
    wide = (weight.shape[0] - narrow) // 2
    kept = [] if not save else [weight.shape[0]] if backend == "triton" else [wide, wide, narrow]
    return [x.new_empty(*x.shape[:-1], width) for width in (wide, wide, *[narrow] * count, *kept)]


@autograd.operator("gated_projection_backward")
def _gated_projection_backward(
    du: Tensor,
    dv: Tensor,
    dheads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    saved: list[Tensor],
    interleaved: bool,
    backend: str,
) -> list[Tensor]:
    return autograd.run(
        "projection", backend, "gated_projection_backward", du, dv, dheads, x, weight, gamma, cos, sin, saved,
        interleaved=interleaved,
    )  # fmt: skip


@_gated_projection_backward.register_fake
def _(
    du: Tensor, dv: Tensor, dheads: list[Tensor], x: Tensor, weight: Tensor, gamma: Tensor, *rest: Any
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, weight, weight[:, 0], gamma, gamma)]


def _save_gated(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weight, _, gamma, _, cos, sin, ctx.interleaved, _, ctx.backend = inputs
    ctx.shapes = [part.shape for part in output[: 2 + gamma.shape[0]]]
    ctx.set_materialize_grads(False)  # or zeros would be made for the saved parts, which have no gradient
    ctx.save_for_backward(x, weight, gamma, cos, sin, *output[len(ctx.shapes) :])


def _differentiate_gated(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, weight, gamma, cos, sin, *saved = ctx.saved_tensors
    du, dv, *dheads = (
        x.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=False)
    )
    results = _gated_projection_backward(
        du, dv, dheads, x, weight, gamma, cos, sin, saved, ctx.interleaved, ctx.backend
    )  # fmt: skip
    return *autograd.only_needed(ctx, results), None, None, None, None, None


_gated_projection.register_autograd(_differentiate_gated, setup_context=_save_gated)
autograd.refuse_second_derivative("gated_projection", _gated_projection_backward)


@autograd.operator("projection")
def _projection(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: Optional[Tensor], backend: str) -> Tensor:
    return autograd.run("projection", backend, "projection_forward", x, weight, bias, residual)


@_projection.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@autograd.operator("projection_backward")
def _projection_backward(dy: Tensor, x: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
    return autograd.run("projection", backend, "projection_backward", dy, x, weight)


@_projection_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
    return [x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])]


def _save_projection(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_projection(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    results = _projection_backward(dy, *ctx.saved_tensors, ctx.backend)
    return *autograd.only_needed(ctx, [*results, dy]), None


_projection.register_autograd(_differentiate_projection, setup_context=_save_projection)
autograd.refuse_second_derivative("projection", _projection_backward)

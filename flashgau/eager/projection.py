"""The projections of a gated attention unit, panel by panel of tokens, so that intermediates stay in cache.

`parts` is a linear layer whose output is cut into parts and activated; `heads` makes queries and keys from the
shared vector z by OffsetScale and rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..options import Angles, ProjectionWeights, takes_fields
from .common import Workspace, accumulator, add_product, factor_dtype, panels


@takes_fields
def gated_projection_forward(
    x: Tensor, weights: ProjectionWeights, angles: Angles = Angles(), save: bool = False
) -> list[Tensor]:
    """u, v, the heads and, if `save`, the parts of x W^T + b: u (unless the result is that), v and z before silu."""
    weight, bias, gamma, beta, raw_gate = weights
    narrow = gamma.shape[1]
    wide = (weight.shape[0] - narrow) // 2
    (u, v, z), saved = parts_forward(x, weight, bias, None, [wide, wide, narrow], silu=_silu(raw_gate), save=save)
    return [u, v, *heads_forward(z, gamma, beta, angles), *([*saved, z] if save else [])]


@takes_fields
def gated_projection_backward(
    du: Tensor,
    dv: Tensor,
    dheads: list[Tensor],
    x: Tensor,
    weights: ProjectionWeights,
    saved: list[Tensor],
    angles: Angles = Angles(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, gamma and beta."""
    *before, z = saved
    dz, dgamma, dbeta = heads_backward(dheads, z, weights.gamma, angles)
    return *parts_backward([du, dv, dz], x, weights.weight, before, silu=_silu(weights.raw_gate)), dgamma, dbeta


def _silu(raw_gate: bool) -> range:
    """Which of u, v and z are activated with the product that makes them: z is where heads are made of it."""
    return range(1 if raw_gate else 0, 2)


def projection_forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x W^T + b, and the residual if there is one."""
    (y,), _ = parts_forward(x, weight, bias, residual, [weight.shape[0]], silu=range(0), save=False)
    return y


def projection_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return parts_backward([dy], x, weight, [], silu=range(0))


def parts_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    widths: list[int],
    *,
    silu: range,
    save: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Parts (..., width) of x W^T + b, those with a number in `silu` under it, and these before it if `save`.

    A residual is added to the only part.
    """
    rows = x.reshape(-1, x.shape[-1])
    factor = factor_dtype(x)
    weights = weight.to(factor).split(widths)
    biases = bias.to(factor).split(widths) if bias is not None else [None] * len(widths)
    results = [x.new_empty(*x.shape[:-1], width) for width in widths]
    kept = [torch.empty_like(results[i]) for i in silu] if save else []
    parts, saved = ([t.view(rows.shape[0], t.shape[-1]) for t in tensors] for tensors in (results, kept))
    for r in panels(rows):
        panel = rows[r].to(factor)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            out = parts[i][r]
            before = out if i not in silu else saved[i - silu.start][r] if saved else torch.empty_like(out)
            h = before if before.dtype == factor else None
            h = torch.mm(panel, w.T, out=h) if b is None else torch.addmm(b, panel, w.T, out=h)
            if residual is not None:
                h += residual.reshape(rows.shape[0], -1)[r]
            if h is not before:
                before.copy_(h)
            if i in silu:
                _silu_into(h, out)
    return results, kept


def parts_backward(
    dparts: list[Tensor], x: Tensor, weight: Tensor, saved: list[Tensor], *, silu: range
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    rows = x.reshape(-1, x.shape[-1])
    factor, acc = factor_dtype(x), accumulator(x.dtype)
    widths = [d.shape[-1] for d in dparts]
    weights = weight.to(factor).split(widths)
    dweight = torch.zeros(weight.shape, dtype=acc, device=x.device)
    dbias = dweight.new_zeros(weight.shape[0])
    dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
    flat = [d.reshape(-1, width) for d, width in zip(dparts, widths, strict=True)]
    before = [h.reshape(-1, h.shape[-1]) for h in saved]
    workspace = Workspace()
    for r in panels(rows):
        panel = rows[r].to(factor)
        dpanel = dx[r] if dx.dtype == factor else workspace.like("dx", panel)
        for i, (w, dw, db) in enumerate(zip(weights, dweight.split(widths), dbias.split(widths), strict=True)):
            d = flat[i][r].to(factor)
            if i in silu:
                d = torch.ops.aten.silu_backward(d, before[i - silu.start][r].to(factor))
            db += d.sum(0)
            if i == 0:
                torch.mm(d, w, out=dpanel)
            else:
                dpanel.addmm_(d, w)
            add_product(dw, d.T, panel, workspace)
        if dx.dtype != factor:
            dx[r] = dpanel
    return dx.view(x.shape), dweight.to(weight.dtype), dbias.to(weight.dtype)


def heads_forward(z: Tensor, gamma: Tensor, beta: Tensor | None, angles: Angles) -> list[Tensor]:
    """z (B, N, S) -> each gamma_h silu(z) + beta_h, the first channels turned by angles (1 or B, N, pairs)."""
    acc, (cos, sin, interleaved) = accumulator(z.dtype), angles
    whole = outs = [z.new_empty(z.shape) for _ in range(gamma.shape[0])]
    if z.shape[1] == 1:  # one token of many sequences: as one sequence of many tokens
        z, *outs = (x.transpose(0, 1) for x in (z, *whole))
        cos, sin = (None if x is None else x.transpose(0, 1) for x in (cos, sin))
    gamma, beta = gamma.to(acc)[:, None], beta.to(acc)[:, None] if beta is not None else None
    for b, r in _rows(z):
        panel = torch.nn.functional.silu(z[b, r].to(acc))
        turned = panel * gamma if beta is None else torch.addcmul(beta, panel, gamma)
        if cos is not None and sin is not None:
            turn(turned, *_angles(cos, sin, b, r), interleaved)
        for out, head in zip(outs, turned, strict=True):
            out[b, r] = head
    return whole


def heads_backward(douts: list[Tensor], z: Tensor, gamma: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, gamma and beta."""
    acc, (cos, sin, interleaved) = accumulator(z.dtype), angles
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    wide = gamma.to(acc)[:, None]
    dgamma, dbeta = (torch.zeros(gamma.shape, dtype=acc, device=z.device) for _ in range(2))
    for b, r in _rows(z):
        d = torch.stack([dout[b, r] for dout in douts]).to(acc)
        if cos is not None and sin is not None:
            c, s = _angles(cos, sin, b, r)
            turn(d, c, -s, interleaved)  # a rotation's gradient turns back
        dbeta += d.sum(1)
        before = z[b, r].to(acc)
        dz[b, r] = torch.ops.aten.silu_backward((d * wide).sum(0), before).to(dz.dtype)
        dgamma += d.mul_(torch.nn.functional.silu(before)).sum(1)
    return dz, dgamma.to(gamma.dtype), dbeta.to(gamma.dtype)


def _silu_into(h: Tensor, out: Tensor) -> None:
    if h.dtype == out.dtype:
        torch.ops.aten.silu.out(h, out=out)
    else:
        out.copy_(torch.ops.aten.silu_(h))


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Turn pairs of the leading channels of x (..., n, S) in place by angles (..., n, pairs)."""
    turning = x[..., : 2 * cos.shape[-1]]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    new_a = (a * cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(new_a)


def _angles(cos: Tensor, sin: Tensor, b: int, r: slice) -> tuple[Tensor, Tensor]:
    row = b if cos.shape[0] > 1 else 0
    return cos[row, r], sin[row, r]


def _rows(z: Tensor) -> Iterator[tuple[int, slice]]:
    for b in range(z.shape[0]):
        for r in panels(z[b]):
            yield b, r

"""The projections around gated attention in its layer (Hua et al. 2022, code 1 and equation 4).

gated projection  [u | v | z] = x W^T + b: one product of the vendor's library, then silu writes u and v to separate
                  tensors and the heads are computed from z in that result, without a copy; the backward writes the
                  gradients of all three into one tensor, for one product each. Where attention's kernels apply silu to
                  their gate, u is a product of its own, and neither written nor read again
heads             gamma_h silu(z) + beta_h and the rotation of RoPE, all heads while z is in registers
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashgau.options import Angles, ProjectionWeights

from .common import VARYING, Choose, Config, chosen_by, launcher, products
from .glu import Matrix, activate, block_of, elementwise, load, places, slope, store
from .guarded import guarded
from .sums import summed


@guarded
@triton.jit(do_not_specialize=VARYING)
def silu_kernel(x, out, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = silu(x), a block of ROWS x COLUMNS per program."""
    o_row, o_column, _ = block_of(n_rows, n_columns, ROWS, COLUMNS)
    mask = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
    store(out, o_row, o_column, activate(load(x, o_row, o_column, mask), "silu"), mask)


@guarded
@triton.jit(do_not_specialize=VARYING)
def silu_backward_kernel(dout, x, dx, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dx = dout silu'(x)."""
    o_row, o_column, _ = block_of(n_rows, n_columns, ROWS, COLUMNS)
    mask = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
    b_dx = load(dout, o_row, o_column, mask) * slope(load(x, o_row, o_column, mask), "silu")
    store(dx, o_row, o_column, b_dx, mask)


@triton.jit
def partners(o_channel, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each channel: the number of its pair, whether it is the second of it, its partner, which is itself where it is
    not rotated, and whether it is."""
    if INTERLEAVED:
        second = o_channel % 2 == 1
        o_pair = o_channel // 2
        o_partner = tl.where(second, o_channel - 1, o_channel + 1)
    else:
        second = o_channel >= PAIRS
        o_pair = o_channel % PAIRS
        o_partner = tl.where(second, o_channel - PAIRS, o_channel + PAIRS)
    turns = o_channel < 2 * PAIRS
    return o_pair, second, tl.where(turns, o_partner, o_channel), turns


@triton.jit
def rotation(cos, sin, o_token, m_token, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """cos and signed sin of each channel, the index of its partner channel, and whether it is rotated."""
    o_pair, second, o_partner, turns = partners(tl.arange(0, BLOCK), PAIRS, INTERLEAVED)
    mask = m_token[:, None] & turns[None, :]
    o_angle = o_token.to(tl.int64)[:, None] * PAIRS + o_pair[None, :]
    b_cos = tl.load(cos + o_angle, mask=mask, other=1.0).to(tl.float32)
    b_sin = tl.load(sin + o_angle, mask=mask, other=0.0).to(tl.float32)
    return b_cos, tl.where(second[None, :], b_sin, -b_sin), o_partner, turns[None, :]


@triton.jit
def scaled(b_z, gamma, beta, o_channel, S: tl.constexpr):
    """gamma z + beta of some channels."""
    b_head = b_z * tl.load(gamma + o_channel, mask=o_channel < S, other=0.0).to(tl.float32)[None, :]
    if beta is not None:
        b_head += tl.load(beta + o_channel, mask=o_channel < S, other=0.0).to(tl.float32)[None, :]
    return b_head


@guarded
@triton.jit(do_not_specialize=VARYING)
def heads_kernel(
    z, gamma, beta, cos, sin, outs, n_rows, n_tokens, angle_batch,
    H: tl.constexpr, S: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Each head's gamma silu(z) + beta, rotated, of a block of rows. `outs` is one pointer per head."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row, o_channel = o_row < n_rows, tl.arange(0, BS)
    mask = m_row[:, None] & (o_channel < S)[None, :]
    b_z = activate(tl.load(places(z, o_row, o_channel), mask=mask, other=0.0).to(tl.float32), "silu")
    if cos is not None:
        o_token = o_row % n_tokens + o_row // n_tokens * angle_batch
        b_cos, b_sin, o_partner, turns = rotation(cos, sin, o_token, m_row, PAIRS, INTERLEAVED, BS)
        b_other = activate(tl.load(places(z, o_row, o_partner), mask=mask, other=0.0).to(tl.float32), "silu")
    for h in tl.static_range(H):
        p_beta = beta
        if beta is not None:
            p_beta += h * S
        b_head = scaled(b_z, gamma + h * S, p_beta, o_channel, S)
        if cos is not None:
            b_turned = scaled(b_other, gamma + h * S, p_beta, o_partner, S)
            b_head = tl.where(turns, b_head * b_cos + b_turned * b_sin, b_head)
        p_out = outs[h] + o_row[:, None] * S + o_channel[None, :]
        tl.store(p_out, b_head.to(outs[h].dtype.element_ty), mask=mask)


@guarded
@triton.jit(do_not_specialize=VARYING)
def heads_backward_kernel(
    douts, z, gamma, cos, sin, dz, shares, n_rows, n_tokens, angle_batch,
    H: tl.constexpr, S: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dZ of a block of rows, and its share of dGamma and dBeta (programs, 2, H, S). Gradients are rotated back."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_row, o_channel = o_row < n_rows, tl.arange(0, BS)
    m_channel = o_channel < S
    mask = m_row[:, None] & m_channel[None, :]
    b_z = tl.load(places(z, o_row, o_channel), mask=mask, other=0.0).to(tl.float32)
    if cos is not None:
        o_token = o_row % n_tokens + o_row // n_tokens * angle_batch
        b_cos, b_sin, o_partner, turns = rotation(cos, sin, o_token, m_row, PAIRS, INTERLEAVED, BS)
    b_dz = tl.zeros([BM, BS], tl.float32)
    for h in tl.static_range(H):
        b_d = tl.load(places(douts[h], o_row, o_channel), mask=mask, other=0.0).to(tl.float32)
        if cos is not None:
            b_other = tl.load(places(douts[h], o_row, o_partner), mask=mask, other=0.0).to(tl.float32)
            b_d = tl.where(turns, b_d * b_cos - b_other * b_sin, b_d)
        b_dz += b_d * tl.load(gamma + h * S + o_channel, mask=m_channel, other=0.0).to(tl.float32)[None, :]
        p_share = shares + (tl.program_id(0).to(tl.int64) * 2 * H + h) * S + o_channel
        tl.store(p_share, tl.sum(products(b_d, activate(b_z, "silu")), 0), mask=m_channel)
        tl.store(p_share + H * S, tl.sum(b_d, 0), mask=m_channel)
    b_dz *= slope(b_z, "silu")
    tl.store(places(dz, o_row, o_channel), b_dz.to(dz.pointer.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


@launcher
def gated_projection_forward(
    x: Tensor,
    weights: ProjectionWeights,
    angles: Angles = Angles(),
    save: bool = False,
    *,
    config: Config | Choose | None = None,
) -> list[Tensor]:
    """u, v, the heads of z and, if `save`, x W^T + b of all that is activated here, in one."""
    weight, bias, gamma, beta, raw_gate = weights
    first = (weight.shape[0] - gamma.shape[1]) // 2 if raw_gate else 0
    own, other = ((weight[s], None if bias is None else bias[s]) for s in (slice(0, first), slice(first, None)))
    outs = [torch.nn.functional.linear(x, *own)] if raw_gate else []
    wide = torch.nn.functional.linear(x, *other)
    *halves, z = _parts(wide, weights)
    for half in halves:
        outs.append(half.new_empty(half.shape))
        elementwise(silu_kernel, "projection", (half, outs[-1]), chosen_by(config))
    outs += heads_forward(z, gamma, beta, angles, config=config)
    return [*outs, wide] if save else outs


@launcher
def gated_projection_backward(
    du: Tensor,
    dv: Tensor,
    dheads: list[Tensor],
    x: Tensor,
    weights: ProjectionWeights,
    saved: list[Tensor],
    angles: Angles = Angles(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, weight, bias (None without one), gamma and beta.

    Those of what was saved are in one tensor, for one product each.
    """
    (wide,), (weight, bias, gamma, _, raw_gate) = saved, weights
    dwide = wide.new_empty(wide.shape)
    *halves, z = _parts(wide, weights)
    *dhalves, dz = _parts(dwide, weights)
    for d, half, dhalf in zip((dv,) if raw_gate else (du, dv), halves, dhalves, strict=True):
        flat = tuple(t.reshape(-1, t.shape[-1]) for t in (d, half, dhalf))  # the last must be a view: it is written to
        elementwise(silu_backward_kernel, "projection", flat, chosen_by(config))
    dgamma, dbeta = heads_backward(dheads, z, gamma, angles, dz, config=config)
    if not raw_gate:
        return *projection_backward(dwide, x, weight, bias, config=config), dgamma, dbeta
    first, rows = du.shape[-1], x.reshape(-1, x.shape[-1])
    du, dwide = (d.reshape(-1, d.shape[-1]) for d in (du, dwide))
    dx = (dwide @ weight[first:]).addmm_(du, weight[:first])
    dweight, dbias = weight.new_empty(weight.shape), None if bias is None else bias.new_empty(bias.shape)
    for d, part in ((du, slice(0, first)), (dwide, slice(first, None))):
        torch.mm(d.T, rows, out=dweight[part])
        if dbias is not None:
            torch.sum(d, 0, out=dbias[part])
    return dx.view(x.shape), dweight, dbias, dgamma, dbeta


def projection_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, config: Config | Choose | None = None
) -> Tensor:
    """x W^T + b, and the residual if there is one."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y.add_(residual)


def projection_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, config: Config | Choose | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias; None without one."""
    flat = dy.reshape(-1, dy.shape[-1])
    dbias = None if bias is None else flat.sum(0)
    return (dy @ weight).view(x.shape), flat.T @ x.reshape(-1, x.shape[-1]), dbias


@launcher
def heads_forward(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    angles: Angles,
    *,
    config: Config | Choose | None = None,
) -> list[Tensor]:
    """z (B, N, S) -> each gamma_h silu(z) + beta_h, the first channels rotated by angles (1 or B, N, pairs)."""
    outs = [z.new_empty(z.shape) for _ in range(gamma.shape[0])]
    if z.numel():
        beta = beta if beta is None else beta.contiguous()
        config = chosen_by(config)("heads", z, 0)
        heads_kernel[(triton.cdiv(z.shape[0] * z.shape[1], config.block_m),)](
            _matrix(z), gamma.contiguous(), beta, *_angles(angles), tuple(outs),
            *_sizes(z, gamma, angles, config.block_m), **config.launch(),
        )  # fmt: skip
    return outs


@launcher
def heads_backward(
    douts: list[Tensor],
    z: Tensor,
    gamma: Tensor,
    angles: Angles,
    dz: Tensor,
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of gamma and beta; that of z is written to `dz`, which may have any strides."""
    config = chosen_by(config)("heads", z, 0)
    programs = triton.cdiv(z.shape[0] * z.shape[1], config.block_m)
    if z.numel() == 0:
        return torch.zeros_like(gamma), torch.zeros_like(gamma)
    shares = z.new_empty(programs, 2, *gamma.shape, dtype=torch.float32)
    heads_backward_kernel[(programs,)](
        tuple(_matrix(d) for d in douts), _matrix(z), gamma.contiguous(), *_angles(angles), _matrix(dz), shares,
        *_sizes(z, gamma, angles, config.block_m), **config.launch(),
    )  # fmt: skip
    dgamma, dbeta = summed(shares, gamma.dtype)
    return dgamma, dbeta


def _parts(wide: Tensor, weights: ProjectionWeights) -> list[Tensor]:
    """u, v and z within [u | v | z] (..., 2e + S); without u, if that is not activated here."""
    narrow, halves = weights.gamma.shape[1], 1 if weights.raw_gate else 2
    half = (wide.shape[-1] - narrow) // halves
    return list(wide.split((*[half] * halves, narrow), -1))


def _matrix(x: Tensor) -> Matrix:
    rows = x.reshape(-1, x.shape[-1])
    return Matrix(rows, *rows.stride())


def _angles(angles: Angles) -> tuple[Tensor | None, Tensor | None]:
    cos, sin, _ = angles
    return (None, None) if cos is None or sin is None or not cos.shape[-1] else (cos.contiguous(), sin.contiguous())


def _sizes(z: Tensor, gamma: Tensor, angles: Angles, rows: int) -> tuple[Any, ...]:
    """Number of rows and tokens, the batch stride of the angles, and the compile-time constants."""
    (b, n, s), (cos, _, interleaved) = z.shape, angles
    angle_batch, pairs = (0, 0) if cos is None else (n if cos.shape[0] > 1 else 0, cos.shape[-1])
    return b * n, n, angle_batch, gamma.shape[0], s, pairs, interleaved, rows, max(16, triton.next_power_of_2(s))

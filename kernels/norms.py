"""Normalisations of rows: LayerNorm (Ba et al. 2016), RMSNorm (Zhang and Sennrich 2019), ScaleNorm (Nguyen and Salazar
2019).

    forward    y = w xhat + b, with xhat = (x - mean) / deviation; the mean is LayerNorm's alone
    backward   dx = (w dy - mean(w dy xhat) xhat - mean(w dy)) / deviation, the last mean LayerNorm's alone, and a share
               of dw and db, the sums over rows of dy xhat and dy

A program holds whole rows in registers, so each way reads its tensors once. The backward computes the statistics again,
in fp32, and keeps nothing but x. Its programs go through consecutive rows, and their shares are summed in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashgau.options import NormOptions

from .common import VARYING, Choose, Config, Heads, chosen_by, heads, launcher, processors, products, row_pointers
from .gated import load_tile, store_tile
from .guarded import guarded
from .sums import summed

_PROGRAMS = 4  # of the backward, for each processor


@triton.jit
def normalised(b_x, m_column, eps, D: tl.constexpr, KIND: tl.constexpr):
    """xhat of rows (0 in out-of-range columns), 1 / deviation, and whether that moves with x."""
    if KIND == "layernorm":
        b_x = tl.where(m_column[None, :], b_x - (tl.sum(b_x, 1) / D)[:, None], 0.0)
    b_square = tl.sum(products(b_x, b_x), 1) / D
    b_moves = b_square == b_square
    if KIND == "clamped":
        b_deviation = tl.sqrt(b_square)
        b_moves = b_deviation >= eps
        b_inverse = 1.0 / tl.where(b_deviation < eps, eps, b_deviation)  # tl.maximum would drop a NaN on a GPU
    else:
        b_inverse = 1.0 / tl.sqrt(b_square + eps)
    return b_x * b_inverse[:, None], b_inverse, b_moves


@triton.jit
def load_weight(weight, o_column, D: tl.constexpr, SCALAR: tl.constexpr):
    """One factor for each column, or for all."""
    if SCALAR:
        b_weight = tl.load(weight + 0 * o_column)
    else:
        b_weight = tl.load(weight + o_column, mask=o_column < D, other=0.0)
    return b_weight.to(tl.float32)[None, :]


@guarded
@triton.jit(do_not_specialize=VARYING)
def norm_kernel(
    x, weight, bias, out, n_rows, n_tokens, eps,
    D: tl.constexpr, KIND: tl.constexpr, SCALAR: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y of a block of rows."""
    o_row, o_column = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    m_row, m_column = o_row < n_rows, o_column < D
    p_x = row_pointers(x, o_row // n_tokens, 0, o_row % n_tokens)
    b_y, _inverse, _moves = normalised(
        load_tile(x, p_x, m_row, o_column, D, BD).to(tl.float32), m_column, eps, D, KIND
    )  # fmt: skip
    if weight is not None:
        b_y *= load_weight(weight, o_column, D, SCALAR)
    if bias is not None:
        b_y += load_weight(bias, o_column, D, False)
    p_out = row_pointers(out, o_row // n_tokens, 0, o_row % n_tokens)
    store_tile(out, p_out, m_row, o_column, b_y, D, BD)


@guarded
@triton.jit(do_not_specialize=VARYING)
def norm_backward_kernel(
    dy, x, weight, bias, dx, shares, n_rows, n_tokens, span, eps,
    D: tl.constexpr, KIND: tl.constexpr, SCALAR: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx of `span` rows, and their share of dw and db, side by side, in a row of `shares`."""
    o_column = tl.arange(0, BD)
    m_column = o_column < D
    b_dweight = tl.zeros([BM, BD], tl.float32)
    b_dbias = tl.zeros([BM, BD], tl.float32)
    first = tl.program_id(0) * span
    for i in range(0, span, BM):
        o_row = first + i + tl.arange(0, BM)
        m_row = o_row < tl.minimum(first + span, n_rows)
        p_dy = row_pointers(dy, o_row // n_tokens, 0, o_row % n_tokens)
        p_x = row_pointers(x, o_row // n_tokens, 0, o_row % n_tokens)
        b_do = load_tile(dy, p_dy, m_row, o_column, D, BD).to(tl.float32)
        b_x = load_tile(x, p_x, m_row, o_column, D, BD).to(tl.float32)
        b_xhat, b_inverse, b_moves = normalised(b_x, m_column, eps, D, KIND)
        b_wdy = b_do
        if weight is not None:
            b_wdy *= load_weight(weight, o_column, D, SCALAR)
        b_along = tl.where(b_moves, tl.sum(products(b_wdy, b_xhat), 1) / D, 0.0)
        b_dx = b_wdy - b_along[:, None] * b_xhat
        if KIND == "layernorm":
            b_dx -= (tl.sum(b_wdy, 1) / D)[:, None]
        p_dx = row_pointers(dx, o_row // n_tokens, 0, o_row % n_tokens)
        store_tile(dx, p_dx, m_row, o_column, b_dx * b_inverse[:, None], D, BD)
        if weight is not None:
            b_dweight += products(b_do, b_xhat)
        if bias is not None:
            b_dbias += b_do
    if shares is not None:
        OF_WEIGHT: tl.constexpr = 0 if weight is None else 1 if SCALAR else D
        OF_BIAS: tl.constexpr = 0 if bias is None else D
        p_share = shares + tl.program_id(0).to(tl.int64) * (OF_WEIGHT + OF_BIAS)
        if weight is not None:
            b_sum = tl.sum(b_dweight, 0)
            if SCALAR:
                tl.store(p_share, tl.sum(b_sum, 0))
            else:
                tl.store(p_share + o_column, b_sum, mask=m_column)
        if bias is not None:
            tl.store(p_share + OF_WEIGHT + o_column, tl.sum(b_dbias, 0), mask=m_column)


# ---------------------------------------------------------------- launchers


@launcher
def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: NormOptions,
    *,
    config: Config | Choose | None = None,
) -> Tensor:
    """Rows of x (..., d) over their deviation, times `weight` (d,) or (1,), plus `bias` (d,), in x's type."""
    out = x.new_empty(x.shape)
    if x.numel():
        block, launch = _block(chosen_by(config)("norm_forward", x, 0), x.shape[-1])
        n_rows = x.numel() // x.shape[-1]
        norm_kernel[(triton.cdiv(n_rows, block["BM"]),)](
            _rows(x), _packed(weight), _packed(bias), _rows(out), n_rows, _tokens(x), options.eps,
            **_traits(x, weight, options), **block, **launch,
        )  # fmt: skip
    return out


@launcher
def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: NormOptions,
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias; None where there is no such input."""
    dx, like = x.new_empty(x.shape), weight if weight is not None else bias
    if x.numel() == 0:
        dweight, dbias = (None if w is None else w.new_zeros(w.shape) for w in (weight, bias))
        return dx, dweight, dbias
    block, launch = _block(chosen_by(config)("norm_backward", x, 0), x.shape[-1])
    n_rows = x.numel() // x.shape[-1]
    n_blocks = triton.cdiv(n_rows, block["BM"])
    span = triton.cdiv(n_blocks, _PROGRAMS * processors(x.device)) * block["BM"]
    programs = triton.cdiv(n_rows, span)
    widths = [0 if w is None else w.numel() for w in (weight, bias)]
    shares = None if like is None else x.new_empty(programs, sum(widths), dtype=torch.float32)
    norm_backward_kernel[(programs,)](
        _rows(dy), _rows(x), _packed(weight), bias, _rows(dx), shares, n_rows, _tokens(x), span, options.eps,
        **_traits(x, weight, options), **block, **launch,
    )  # fmt: skip
    if like is None or shares is None:
        return dx, None, None
    sums = summed(shares, like.dtype).split(widths)
    dweight, dbias = (None if w is None else s.to(w.dtype) for w, s in zip((weight, bias), sums, strict=True))
    return dx, dweight, dbias


def _rows(x: Tensor) -> Heads:
    """x (..., d) as (outer, n, d), in place where up to three axes describe it."""
    while x.dim() < 3:
        x = x[None]
    return heads(x.reshape(-1, 1, *x.shape[-2:]))


def _packed(w: Tensor | None) -> Tensor | None:
    return None if w is None else w.contiguous()


def _tokens(x: Tensor) -> int:
    """The axis of rows that `_rows` leaves."""
    return x.shape[-2] if x.dim() > 1 else 1


def _traits(x: Tensor, weight: Tensor | None, options: NormOptions) -> dict[str, Any]:
    """What a kernel is compiled for, beside its block."""
    kind = "clamped" if options.clamp else options.kind
    return {"D": x.shape[-1], "KIND": kind, "SCALAR": weight is not None and weight.numel() == 1}


def _block(config: Config, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Whole rows, as many as a configuration's block has room for; wider ones than that have more warps."""
    columns = triton.next_power_of_2(width)
    size = config.block_m * config.block_n
    warps = min(16, config.num_warps * max(1, columns // size))
    return {"BM": max(1, size // columns), "BD": columns}, {**config.launch(), "num_warps": warps}

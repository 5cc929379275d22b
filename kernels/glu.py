"""Gated linear units (Shazeer 2020): elementwise, and as the epilogue of the product that computes both inputs.

    glu             act(g) * up_act(u): three tensors are read or written
    glu_backward    dG and dU from dO, g and u, recomputing the activations: five tensors are read or written
    linear          g = x Wg^T + bg and u = x Wu^T + bu in one product, with the unit as its epilogue
    linear_backward the same product, with the unit's backward as its epilogue: for a training step that kept no g and u

Arithmetic is fp32, and a result is rounded once. Tensors of any shape and stride are passed as matrices: axes that are
contiguous with each other in memory are merged (`as_matrices`).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashgau import tables
from flashgau.options import GluOptions, GluWeights

from .common import LOG2_E, VARYING, Choose, Config, chosen_by, launcher, matmul_precision
from .guarded import guarded


class Matrix(NamedTuple):
    """A tensor (row, column) as a kernel takes it."""

    pointer: Any
    row: int
    column: int


# ---------------------------------------------------------------- activations


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x), see `flashgau.glu` for the names. A NaN stays one."""
    if ACTIVATION == "identity":
        y = x
    elif ACTIVATION == "sigmoid":
        y, _ = logistic(x)
    elif ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    elif ACTIVATION == "gelu":
        b_size, b_density, b_ratio = normal_tail(x)
        y = tl.maximum(x, 0.0) - b_size * (b_density * b_ratio)
    elif ACTIVATION == "gelu_tanh":
        b_right, _ = logistic(tanh_argument(x))
        y = x * b_right
    else:
        tl.static_assert(ACTIVATION == "silu")
        b_right, _ = logistic(x)
        y = x * b_right
    return y


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at x; 0 for relu at 0. The compiler merges what both compute at the same x."""
    if ACTIVATION == "identity":
        d = tl.full(x.shape, 1.0, tl.float32)
    elif ACTIVATION == "sigmoid":
        b_right, b_left = logistic(x)
        d = b_right * b_left
    elif ACTIVATION == "relu":
        d = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        d = tl.where(x <= 0, 0.0, 2 * x)
    elif ACTIVATION == "gelu":
        b_size, b_density, b_ratio = normal_tail(x)
        b_left = b_density * (b_ratio - 0.3989422804014327 * b_size)  # Phi(-|x|) - |x| phi(x), of 1 / sqrt(2 pi)
        d = tl.where(x < 0, b_left, 1 - b_left)
    elif ACTIVATION == "gelu_tanh":
        b_right, b_left = logistic(tanh_argument(x))
        d = b_right + x * b_right * b_left * (1.5957691216057308 * (1 + 0.134145 * x * x))
    else:
        tl.static_assert(ACTIVATION == "silu")
        b_right, b_left = logistic(x)
        d = b_right * (1 + x * b_left)
    return d


@triton.jit
def reciprocal(y):
    """1 / y for 1 <= y < 2^64, to 2^-22 of it: two instructions, where a division takes nine."""
    return tl.rsqrt(y * y)


@triton.jit
def logistic(x):
    """sigma(x) and sigma(-x) = 1 - sigma(x), the smaller of which is no difference."""
    b_small = tl.exp2(-tl.abs(x) * LOG2_E)
    b_large = reciprocal(1 + b_small)
    b_small *= b_large
    return tl.where(x < 0, b_small, b_large), tl.where(x < 0, b_large, b_small)


@triton.jit
def tanh_argument(x):
    """2 sqrt(2 / pi) (x + 0.044715 x^3), whose logistic function is the (1 + tanh(..)) / 2 of the approximate gelu."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def normal_tail(x):
    """a = |x|, exp(-a^2 / 2), and the ratio r of the normal distribution to it: Phi(-a) = exp(-a^2 / 2) r(a).

    r is a polynomial of degree 8 in v = a / (1 + 0.2875 a), a minimax fit on 0 <= a <= 14.2 (where Phi in fp32 ends) of
    the error relative to (1 + a^2 / 4) r: 9.5e-9, and 3.8e-9 beside 1 once multiplied. With correctly rounded functions
    Phi is then right to 2^-24, and to (4 + a^2) 2^-24 of itself, most of it the exponent's rounding. Beyond 16, where
    Phi is 0, a stays 16, so that infinities have the limits of x Phi and of its slope.
    """
    b_size = tl.minimum(tl.abs(x), 16.0, propagate_nan=tl.PropagateNan.ALL)
    v = b_size * reciprocal(1 + 0.2875 * b_size)
    b_ratio = 1.891247393359663e-6 * v - 1.948110366356559e-5
    b_ratio = b_ratio * v + 2.5275570806115866e-5
    b_ratio = b_ratio * v + 3.3511564834043384e-4
    b_ratio = b_ratio * v + 3.3910575439222157e-4
    b_ratio = b_ratio * v - 2.22151018679142e-2
    b_ratio = b_ratio * v + 0.13530583679676056
    b_ratio = b_ratio * v - 0.39894238114356995
    b_ratio = b_ratio * v + 0.5
    return b_size, tl.exp2(-0.7213475204444817 * (b_size * b_size)), b_ratio


@triton.jit
def gated(b_g, b_u, ACTIVATION: tl.constexpr, UP_ACTIVATION: tl.constexpr):
    """The unit itself: act(g) * up_act(u)."""
    return activate(b_g, ACTIVATION) * activate(b_u, UP_ACTIVATION)


@triton.jit
def gated_backward(b_do, b_g, b_u, ACTIVATION: tl.constexpr, UP_ACTIVATION: tl.constexpr):
    """dG = dO * up_act(u) * act'(g) and dU = dO * act(g) * up_act'(u)."""
    b_dg = b_do * activate(b_u, UP_ACTIVATION) * slope(b_g, ACTIVATION)
    b_du = b_do * activate(b_g, ACTIVATION) * slope(b_u, UP_ACTIVATION)
    return b_dg, b_du


# ---------------------------------------------------------------- elementwise


@triton.jit
def places(x, o_row, o_column):
    """Pointers to a block of a matrix; offsets are 64-bit, for tensors past 2^31 elements."""
    return x.pointer + tl.cast(o_row, tl.int64)[:, None] * x.row + tl.cast(o_column, tl.int64)[None, :] * x.column


@triton.jit
def load(x, o_row, o_column, mask):
    """A block of a matrix, as fp32."""
    return tl.load(places(x, o_row, o_column), mask=mask).to(tl.float32)


@triton.jit
def store(x, o_row, o_column, block, mask):
    """Write a block of a matrix, rounded to its type."""
    tl.store(places(x, o_row, o_column), block.to(x.pointer.dtype.element_ty), mask=mask)


@triton.jit
def block_of(n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of this program's block, and whether the matrix holds all of it."""
    i_block = tl.program_id(0).to(tl.int64)
    n_blocks = tl.cdiv(n_columns, COLUMNS)
    row = i_block // n_blocks * ROWS
    column = i_block % n_blocks * COLUMNS
    whole = (row + ROWS <= n_rows) & (column + COLUMNS <= n_columns)
    return row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), whole


@guarded
@triton.jit(do_not_specialize=["n_rows"])
def glu_kernel(
    gate, up, out, n_rows, n_columns,
    ACTIVATION: tl.constexpr, UP_ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = act(gate) * up_act(up), a block of ROWS x COLUMNS per program."""
    o_row, o_column, whole = block_of(n_rows, n_columns, ROWS, COLUMNS)
    if whole:  # without a mask, loads and stores are vectorised for any width
        b_g, b_u = load(gate, o_row, o_column, None), load(up, o_row, o_column, None)
        store(out, o_row, o_column, gated(b_g, b_u, ACTIVATION, UP_ACTIVATION), None)
    else:
        mask = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
        b_g, b_u = load(gate, o_row, o_column, mask), load(up, o_row, o_column, mask)
        store(out, o_row, o_column, gated(b_g, b_u, ACTIVATION, UP_ACTIVATION), mask)


@guarded
@triton.jit(do_not_specialize=["n_rows"])
def glu_backward_kernel(
    dout, gate, up, dgate, dup, n_rows, n_columns,
    ACTIVATION: tl.constexpr, UP_ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Both gradients of a block of ROWS x COLUMNS per program."""
    o_row, o_column, whole = block_of(n_rows, n_columns, ROWS, COLUMNS)
    if whole:
        b_do = load(dout, o_row, o_column, None)
        b_g, b_u = load(gate, o_row, o_column, None), load(up, o_row, o_column, None)
        b_dg, b_du = gated_backward(b_do, b_g, b_u, ACTIVATION, UP_ACTIVATION)
        store(dgate, o_row, o_column, b_dg, None)
        store(dup, o_row, o_column, b_du, None)
    else:
        mask = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
        b_do = load(dout, o_row, o_column, mask)
        b_g, b_u = load(gate, o_row, o_column, mask), load(up, o_row, o_column, mask)
        b_dg, b_du = gated_backward(b_do, b_g, b_u, ACTIVATION, UP_ACTIVATION)
        store(dgate, o_row, o_column, b_dg, mask)
        store(dup, o_row, o_column, b_du, mask)


# ---------------------------------------------------------------- inside the product


@triton.jit
def tile_of(n_rows, n_columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Rows of this program's tile, and its first column. Tiles run down GROUP blocks of rows, so neighbours share
    weights."""
    i_tile = tl.program_id(0)
    n_across = tl.cdiv(n_columns, BN)
    first = i_tile // (GROUP * n_across) * GROUP
    height = tl.minimum(tl.cdiv(n_rows, BM) - first, GROUP)
    i_in_group = i_tile % (GROUP * n_across)
    o_row = (first + i_in_group % height).to(tl.int64) * BM + tl.arange(0, BM)
    return o_row, (i_in_group // height).to(tl.int64) * BN


@triton.jit
def inner(x, p_rows, o_k, n_inner, WHOLE: tl.constexpr):
    """A block along a product's inner axis; all rows are in range, and if WHOLE all of the axis, too."""
    p_x = p_rows[:, None] + (o_k * x.column)[None, :]
    if WHOLE:
        block = tl.load(p_x)
    else:
        block = tl.load(p_x, mask=(o_k < n_inner)[None, :], other=0.0)
    return block


@triton.jit
def both_sides(
    x, w_gate, w_up, o_row, column, n_rows, n_columns, n_inner,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x Wg^T and x Wu^T of one tile, in fp32, left and right half; out-of-range rows and columns repeat the last one.

    One product makes both: rows of Wg and of Wu alternate in its second factor, and so columns of g and u in the
    result, in which each thread holds pairs of neighbours. On Hopper the first factor is then read once for both.
    """
    p_x = x.pointer + tl.minimum(o_row, n_rows - 1) * x.row
    i_side = tl.arange(0, 2 * BN)
    o_both = tl.minimum(column + i_side // 2, n_columns - 1)
    bytes_of: tl.constexpr = x.pointer.dtype.element_ty.primitive_bitwidth // 8
    gap = (w_up.pointer.to(tl.int64) - w_gate.pointer.to(tl.int64)) // 16 * (16 // bytes_of)  # `_alternating`
    p_w = w_gate.pointer + tl.where(i_side % 2 == 0, o_both * w_gate.row, gap + o_both * w_up.row)
    b_both = tl.zeros([BM, 2 * BN], tl.float32)
    for start in range(0, n_inner, BK):
        o_k = start + tl.arange(0, BK).to(tl.int64)
        b_x = inner(x, p_x, o_k, n_inner, WHOLE)
        b_w = inner(w_gate, p_w, o_k, n_inner, WHOLE)
        b_both = tl.dot(b_x, b_w.T, b_both, input_precision=PRECISION)
    return tl.split(tl.permute(tl.reshape(b_both, [BM, 2, BN]), (0, 2, 1)))


@triton.jit
def apart(b_both, b_gate, b_up, o_column, n_columns, BM: tl.constexpr, BN: tl.constexpr):
    """g and u of columns in which they alternate, with their biases."""
    b_g, b_u = tl.split(tl.reshape(b_both, [BM, BN, 2]))
    o_column = tl.minimum(o_column, n_columns - 1)
    if b_gate is not None:
        b_g += tl.load(b_gate + o_column).to(tl.float32)[None, :]
    if b_up is not None:
        b_u += tl.load(b_up + o_column).to(tl.float32)[None, :]
    return b_g, b_u


@guarded
@triton.jit(do_not_specialize=VARYING)
def linear_kernel(
    x, w_gate, w_up, b_gate, b_up, out, g, u, n_rows, n_columns, n_inner,
    ACTIVATION: tl.constexpr, UP_ACTIVATION: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out, and of g and u if the backward needs them."""
    o_row, column = tile_of(n_rows, n_columns, BM, BN, GROUP)
    b_left, b_right = both_sides(
        x, w_gate, w_up, o_row, column, n_rows, n_columns, n_inner, WHOLE, PRECISION, BM, BN, BK
    )  # fmt: skip
    for half in tl.static_range(2):  # in turn, for want of registers
        o_column = column + half * (BN // 2) + tl.arange(0, BN // 2)
        b_g, b_u = apart(b_left if half == 0 else b_right, b_gate, b_up, o_column, n_columns, BM, BN // 2)
        mask = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
        if g is not None:
            store(g, o_row, o_column, b_g, mask)
            store(u, o_row, o_column, b_u, mask)
        store(out, o_row, o_column, gated(b_g, b_u, ACTIVATION, UP_ACTIVATION), mask)


@guarded
@triton.jit(do_not_specialize=VARYING)
def linear_backward_kernel(
    dout, x, w_gate, w_up, b_gate, b_up, dg, du, n_rows, n_columns, n_inner,
    ACTIVATION: tl.constexpr, UP_ACTIVATION: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of dG and dU, from recomputed g and u."""
    o_row, column = tile_of(n_rows, n_columns, BM, BN, GROUP)
    b_left, b_right = both_sides(
        x, w_gate, w_up, o_row, column, n_rows, n_columns, n_inner, WHOLE, PRECISION, BM, BN, BK
    )  # fmt: skip
    for half in tl.static_range(2):
        o_column = column + half * (BN // 2) + tl.arange(0, BN // 2)
        b_g, b_u = apart(b_left if half == 0 else b_right, b_gate, b_up, o_column, n_columns, BM, BN // 2)
        mask = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]
        b_do = load(dout, o_row, o_column, mask)
        b_dg, b_du = gated_backward(b_do, b_g, b_u, ACTIVATION, UP_ACTIVATION)
        store(dg, o_row, o_column, b_dg, mask)
        store(du, o_row, o_column, b_du, mask)


# ---------------------------------------------------------------- launchers


@launcher
def glu_forward(
    gate: Tensor,
    up: Tensor | None = None,
    options: GluOptions = GluOptions(),
    save: bool = False,
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, None]:
    """act(gate) * up_act(up); without `up` the last axis of `gate` holds [gate | up], which is read in place.

    The second result, what to keep for the backward, is None: the backward computes it again.
    """
    gate, up = _halves(gate, up)
    out = gate.new_empty(gate.shape)
    elementwise(glu_kernel, "glu_forward", (gate, up, out), chosen_by(config), *options)
    return out, None


@launcher
def glu_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor | None = None,
    activated: None = None,
    options: GluOptions = GluOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `gate` and `up`; of the packed tensor and None when they came packed."""
    dgate = gate.new_empty(gate.shape)
    dup = up.new_empty(up.shape) if up is not None else None
    tensors = dout, *_halves(gate, up), *_halves(dgate, dup)
    elementwise(glu_backward_kernel, "glu_backward", tensors, chosen_by(config), *options)
    return dgate, dup


@launcher
def glu_linear_forward(
    x: Tensor,
    weights: GluWeights,
    options: GluOptions = GluOptions(),
    save: bool = False,
    *,
    fused: bool | None = None,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """glu(x Wg^T + bg, x Wu^T + bu), and both pre-activations if the backward will want them (`save`).

    Not `fused`: two products of the vendor's library, then the elementwise kernel. None: what is faster by the table.
    """
    w_gate, w_up, b_gate, b_up = weights
    rows, shape = _rows(x), (*x.shape[:-1], w_gate.shape[0])
    if _is_fused(fused, x, w_gate, options):
        out = x.new_empty(shape)
        g, u = (x.new_empty(shape) if save else None for _ in range(2))
        flat = (None if t is None else _rows(t) for t in (out, g, u))
        operands = rows, *_alternating(weights), *flat
        _product(linear_kernel, "glu_linear", operands, rows, w_gate, options, chosen_by(config))
        return out, g, u
    g, u = (_affine(rows, w, b).view(shape) for w, b in ((w_gate, b_gate), (w_up, b_up)))
    out, _ = glu_forward(g, u, options, config=config)
    return (out, g, u) if save else (out, None, None)


@launcher
def glu_linear_backward(
    dout: Tensor,
    x: Tensor,
    weights: GluWeights,
    g: Tensor | None = None,
    u: Tensor | None = None,
    options: GluOptions = GluOptions(),
    *,
    fused: bool | None = None,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_gate, w_up, b_gate and b_up, from g and u or, with None, by making those again.

    dG and dU lie side by side in one matrix, so that dx and both weights' gradients are one product each.
    """
    w_gate, w_up, b_gate, b_up = weights
    rows, d, n = _rows(x), _rows(dout), w_gate.shape[0]
    both = x.new_empty(rows.shape[0], 2 * n)
    if g is None or u is None:
        if _is_fused(fused, x, w_gate, options):
            operands = d, rows, *_alternating(weights), *_halves(both, None)
            _product(linear_backward_kernel, "glu_linear_backward", operands, rows, w_gate, options, chosen_by(config))
        else:
            g, u = _affine(rows, w_gate, b_gate), _affine(rows, w_up, b_up)
    if g is not None and u is not None:
        tensors = d, _rows(g), _rows(u), *_halves(both, None)
        elementwise(glu_backward_kernel, "glu_backward", tensors, chosen_by(config), *options)
    dx = both @ torch.cat([w_gate, w_up])  # one sum over both, rounded once
    dw = both.T @ rows
    db = both.sum(0)
    return dx.view(x.shape), dw[:n], dw[n:], db[:n], db[n:]


def _is_fused(fused: bool | None, x: Tensor, w_gate: Tensor, options: GluOptions) -> bool:
    return tables.fuses_glu_linear(x, w_gate, options) if fused is None else fused


def elementwise(kernel: Any, name: str, tensors: tuple[Tensor, ...], choose: Choose, *traits: str) -> None:
    """Launch an elementwise kernel over tensors of one shape; `traits` are what else it is compiled for."""
    if tensors[-1].numel() == 0:
        return
    matrices = as_matrices(*tensors)
    n_rows, n_columns = matrices[0].shape
    config = choose(name, tensors[0], 0)
    size = config.block_m * config.block_n
    columns = min(size, triton.next_power_of_2(n_columns))
    rows = min(size // columns, triton.next_power_of_2(n_rows))
    grid = (triton.cdiv(n_rows, rows) * triton.cdiv(n_columns, columns),)
    kernel[grid](
        *(Matrix(m, *m.stride()) for m in matrices), n_rows, n_columns, *traits, rows, columns, **config.launch()
    )


def _product(
    kernel: Any,
    name: str,
    operands: tuple[Tensor | None, ...],
    rows: Tensor,
    w: Tensor,
    options: GluOptions,
    choose: Choose,
) -> None:
    """Launch a kernel that multiplies `rows` by two matrices of weights."""
    (n_rows, k), n_columns = rows.shape, w.shape[0]
    if n_rows * n_columns == 0:
        return
    config = choose(name, rows, 0, rows=n_rows)
    grid = (triton.cdiv(n_rows, config.block_m) * triton.cdiv(n_columns, config.block_n),)
    taken = (_taken(t) for t in operands)
    kernel[grid](
        *taken, n_rows, n_columns, k, *options, k % config.block_k == 0, matmul_precision(rows.dtype),
        config.block_m, config.block_n, config.block_k, 8, **config.launch(),
    )  # fmt: skip


def _alternating(weights: GluWeights) -> GluWeights:
    """Weights whose rows a product can read in turn: their columns have one stride, and a multiple of 16 bytes lies
    between them. Others are copied."""
    w_gate, w_up, *biases = weights
    if w_gate.stride(1) != w_up.stride(1) or (w_up.data_ptr() - w_gate.data_ptr()) % 16:
        w_gate, w_up = (w.clone(memory_format=torch.contiguous_format) for w in (w_gate, w_up))
    return GluWeights(w_gate, w_up, *biases)


def _taken(x: Tensor | None) -> Any:
    """A matrix with its strides; a bias, made contiguous."""
    return x if x is None else x.contiguous() if x.dim() == 1 else Matrix(x, *x.stride())


def as_matrices(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as matrices of one shape, read in place where two axes can describe each of them.

    Axes that are contiguous with each other in every tensor are merged. If more than two remain, each tensor that is
    not contiguous is copied; the results of a kernel always are, or are halves of such, and two axes describe them.
    """
    sizes, strides = [1], [[0] for _ in tensors]
    for axis, size in enumerate(tensors[0].shape):
        if size == 1:
            continue
        steps = [t.stride(axis) for t in tensors]
        if sizes[-1] == 1:
            sizes[-1], strides = size, [[*s[:-1], step] for s, step in zip(strides, steps, strict=True)]
        elif all(s[-1] == step * size for s, step in zip(strides, steps, strict=True)):
            sizes[-1], strides = sizes[-1] * size, [[*s[:-1], step] for s, step in zip(strides, steps, strict=True)]
        else:
            sizes, strides = [*sizes, size], [[*s, step] for s, step in zip(strides, steps, strict=True)]
    if len(sizes) > 2:
        width = tensors[0].shape[-1]
        return [(t if _is_rows(t) else t.contiguous()).view(-1, width) for t in tensors]
    if len(sizes) == 1:
        sizes, strides = [1, *sizes], [[0, *s] for s in strides]
    return [t.as_strided(sizes, s) for t, s in zip(tensors, strides, strict=True)]


def _is_rows(t: Tensor) -> bool:
    """Whether all axes but the last can be merged without a copy."""
    ahead = [(s, n) for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    return all(a == b * n for (a, _), (b, n) in pairwise(ahead))


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    half = gate.shape[-1] // 2
    return gate[..., :half], gate[..., half:]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _affine(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, w, bias)

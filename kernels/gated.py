"""What gated and mixed chunk attention share: scores and their derivatives, wide tensors, the gate's gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LOG2_E,
    VARYING,
    Choose,
    Config,
    Heads,
    Sequences,
    blocks_of,
    bounds,
    heads,
    is_visible,
    matmul_precision,
    place,
    processors,
    products,
    row_pointers,
    toeplitz,
)
from .glu import activate, gated_backward
from .guarded import guarded
from .own_scores import own_hidden, own_scores

_PANEL_BYTES = 2**25  # of a panel of scores, which should stay in the L2 cache (50 MiB on an H200)
_MOST_BYTES = 2**30  # of one that must be larger to occupy the device


class GatedRule(NamedTuple):
    """Options of the scores. A field that is None is compiled out."""

    left: Any  # None: every key before
    right: Any  # 0 for a causal mask, else None
    scale: float  # what q k is multiplied by: 1 / n of a given normaliser, or 1 / sqrt(S) of a softmax
    bias: Any  # pointer to (B, 2 max_distance + 1)
    bias_batch: int
    max_distance: int
    aux: Any = None  # what a user's function of the scores reads


# ---------------------------------------------------------------- scores


@triton.jit
def scores(b_qk, b_scale, rule, p_bias, o_position, o_key, n, MASKED: tl.constexpr, SIZES: tl.constexpr):
    """S of a block, -inf where the key is hidden, and its slope, that of a user's function. The scale, and blocks of
    positions and keys, broadcast against it."""
    b_slope = 1.0
    b_s = b_qk * b_scale
    if SIZES.SCORE_MOD is not None:
        b_s, b_slope = own_scores(b_s, b_slope, rule.aux, 0 * o_position, o_position, o_key, n, SIZES)
    if rule.bias is not None:
        # Out-of-range rows have positions >= n, where the bias is undefined.
        b_s += toeplitz(p_bias, o_key - o_position, rule.max_distance, (o_key < n) & (o_position < n))
    if MASKED:
        b_s = tl.where(is_visible(rule, o_position, o_key, n), b_s, -float("inf"))
    if SIZES.SCORE_MOD is not None or SIZES.WEIGHT_MOD is not None:
        b_s, b_slope = own_hidden(b_s, b_slope, o_position, o_key, n)
    return b_s, b_slope


@triton.jit
def bias_pointer(rule, row):
    """Pointer to the bias at distance 0; a placeholder if there is no bias."""
    p_bias = 0
    if rule.bias is not None:
        p_bias = rule.bias + tl.cast(row, tl.int64) * rule.bias_batch + rule.max_distance
    return p_bias


@triton.jit
def probs(b_s, b_lse, SCORE: tl.constexpr):
    """A of a block of scores: relu(S)^2, the Laplace function of [MEGA] section 3.5, or exp(S - LSE)."""
    if SCORE == "relu2":
        b_a = tl.where(b_s < 0, 0.0, b_s * b_s)  # tl.maximum would drop a NaN on a GPU
    elif SCORE == "laplace":
        # mu = sqrt(1 / 2), sigma = sqrt(1 / (4 pi)): (S - mu) / (sigma sqrt 2)
        b_a = 0.5 + 0.5 * tl.erf((b_s - 0.7071067811865476) * 2.5066282746310002)
    else:
        tl.static_assert(SCORE == "softmax")
        b_a = tl.exp2((b_s - tl.where(b_lse == -float("inf"), float("inf"), b_lse)) * LOG2_E)
    return b_a


@triton.jit
def score_gradient(b_da, b_s, b_a, b_delta, SCORE: tl.constexpr):
    """dS from dA: dA times the derivative of A by S; of a softmax A (dA - delta)."""
    if SCORE == "relu2":
        b_ds = b_da * tl.where(b_s < 0, 0.0, 2 * b_s)
    elif SCORE == "laplace":  # the derivative is the normal density of mean mu and deviation sigma
        b_z = b_s - 0.7071067811865476
        b_ds = b_da * 1.4142135623730951 * tl.exp(-6.283185307179586 * b_z * b_z)
    else:
        tl.static_assert(SCORE == "softmax")
        b_ds = b_a * (b_da - b_delta)
    return b_ds


@triton.jit
def rounded_to_tf32(b_x):
    """Round to tf32 (10 mantissa bits), ties away from zero: tensor cores truncate their operands instead."""
    b_bits = (b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)


@triton.jit
def factors(b_a, b_x):
    """Weights, or their gradients, and the tensor they multiply, converted to one type.

    With an fp16 tensor the weights stay fp32 and the product is tf32: (q k / n)^2 can overflow, and often underflows,
    in fp16.
    """
    if b_x.dtype == tl.float16:
        b_a, b_x = rounded_to_tf32(b_a.to(tl.float32)), b_x.to(tl.float32)
    else:
        b_a = b_a.to(b_x.dtype)
    return b_a, b_x


def bias_rule(rel_bias: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The last fields of a `GatedRule`: the bias (B, 2P-1), the stride of its rows, and P - 1."""
    if rel_bias is None:
        return None, 0, 0
    rel_bias = rel_bias if rel_bias.stride(-1) == 1 else rel_bias.contiguous()
    return rel_bias, rel_bias.stride(0), rel_bias.shape[-1] // 2


def precisions(x: Tensor) -> tuple[str, str, Tensor]:
    """Precision of products of inputs, of products of weights (see `factors`), and a tensor of the weights' type."""
    inputs = matmul_precision(x.dtype)
    if x.dtype != torch.float16:
        return inputs, inputs, x
    return inputs, "ieee" if torch.version.hip else "tf32", x.new_empty(0, dtype=torch.float32)


# ---------------------------------------------------------------- blocks of wide tensors


@triton.jit
def load_tile(x, p_rows, m_rows, o_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of rows of x; zeros in out-of-range rows and columns."""
    p_x = p_rows[:, None] + tl.cast(o_column, tl.int64)[None, :] * x.column
    mask = m_rows[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (o_column < WIDTH)[None, :]
    return tl.load(p_x, mask=mask, other=0.0)


@triton.jit
def store_tile(x, p_rows, m_rows, o_column, block, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write some columns of rows of x."""
    p_x = p_rows[:, None] + tl.cast(o_column, tl.int64)[None, :] * x.column
    mask = m_rows[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (o_column < WIDTH)[None, :]
    tl.store(p_x, block.to(x.pointer.dtype.element_ty), mask=mask)


def rows(x: Tensor | None) -> Heads | None:
    """A tensor (B, N, columns) as `Heads` with a single head."""
    return None if x is None else heads(x.unsqueeze(1))


def room_for_panel(like: Tensor, per_block: int, blocks: int, programs: int = 0) -> tuple[Tensor, int]:
    """Memory for the scores of as many blocks as `_PANEL_BYTES` hold, at least one, and their number.

    `programs`, if given: how many a launch has for each block. Then it is memory for as many as give two programs to
    each processor, if that is more, as far as `_MOST_BYTES` hold them; what is left for another launch gives one each.
    """
    size = per_block * like.element_size()
    step = _PANEL_BYTES // size
    if programs:
        count = processors(like.device)
        busy = max(1, min(blocks, 2 * count // programs))
        while (busy - 1) * programs >= count and 0 < blocks % busy * programs < count:
            busy -= 1
        step = max(step, min(busy, _MOST_BYTES // size))
    step = max(1, min(blocks, step))
    return like.new_empty(step * per_block), step


# ---------------------------------------------------------------- the gate


@triton.jit
def load_gate(gate, p_rows, m_rows, o_column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(gate) of some columns of rows, in fp32; act(0) in out-of-range rows and columns."""
    return activate(load_tile(gate, p_rows, m_rows, o_column, WIDTH, BLOCK).to(tl.float32), ACTIVATION)


@guarded
@triton.jit(do_not_specialize=VARYING)
def prologue_kernel(
    dout, gate, product, dx, dgate, delta,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k, n_blocks,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dX = act(gate) * dO, dGate = X * dO * act'(gate) and delta = rowsum(dX * X) of a block of rows; each only if it
    is asked for."""
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    i_block, _, i_seq = place(tl.program_id(0), n_blocks, 1, sequences, sequences.cu_seqlens_q, max_seqlen_q, 1, BM)
    row, first_m, m, stored, _, _, _ = bounds(sequences, i_seq)
    o_query = i_block * BM + tl.arange(0, BM)
    m_row, m_stored = o_query < m, o_query < stored
    b_delta = tl.zeros([BM], tl.float32)
    for start in range(0, E, BE):
        o_column = start + tl.arange(0, BE)
        b_do = load_tile(dout, row_pointers(dout, row, 0, first_m + o_query), m_row, o_column, E, BE).to(tl.float32)
        p_product = row_pointers(product, row, 0, first_m + o_query)
        b_x = load_tile(product, p_product, m_row, o_column, E, BE).to(tl.float32)
        b_dx = b_do
        if gate is not None:
            p_gate = row_pointers(gate, row, 0, first_m + o_query)
            b_gate = load_tile(gate, p_gate, m_row, o_column, E, BE).to(tl.float32)
            b_dgate, b_dx = gated_backward(b_do, b_gate, b_x, ACTIVATION, "identity")
            store_tile(dx, row_pointers(dx, row, 0, first_m + o_query), m_stored, o_column, b_dx, E, BE)
            p_dgate = row_pointers(dgate, row, 0, first_m + o_query)
            store_tile(dgate, p_dgate, m_stored, o_column, b_dgate, E, BE)
        b_delta += tl.sum(products(b_dx, b_x), 1)
    if delta is not None:
        tl.store(delta + tl.cast(row, tl.int64) * max_seqlen_q + first_m + o_query, b_delta, mask=m_row)


def prologue(
    sequences: Sequences,
    dout: Tensor,
    gate: Tensor | None,
    product: Tensor | None,
    dgate: Tensor | None,
    activation: str,
    choose: Choose,
    softmax: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dX of X = `product` in O = act(gate) * X, with dGate written where there is a gate; and a softmax's delta."""
    if product is None:
        return dout, None
    b, m, e = dout.shape
    dx = dout if gate is None else dout.new_empty(dout.shape)
    delta = dout.new_empty(b, m, dtype=torch.float32) if softmax else None
    config: Config = choose("gau_prologue", dout, 0)
    n_blocks = blocks_of(sequences, m, 1, config.block_m)
    prologue_kernel[(n_blocks * (b if sequences.cu_seqlens_q is None else 1),)](
        rows(dout), rows(gate), rows(product), rows(dx), rows(dgate), delta, *sequences, n_blocks,
        E=e, BE=config.block_n, BM=config.block_m, ACTIVATION=activation, **config.launch(),
    )  # fmt: skip
    return dx, delta


def sums_like(sums: Tensor | None, x: Tensor | None) -> Tensor | None:
    """Accumulated gradients of x in the type of x."""
    return None if sums is None or x is None else sums.to(x.dtype)

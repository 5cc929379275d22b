"""Quadratic gated attention (Hua et al. 2022): O = gate * (A V), A an elementwise score or a softmax of q k^T.

One head, and values thousands of columns wide: a row of the result does not fit a program's registers, so a block of
scores is computed once and used for many columns. Two variants:

    fused      (narrow values) a program computes A for its rows and multiplies it with a tile of columns of V
    panels     (wide values) A of some rows against all keys is written to a panel, sized to stay in the L2 cache; the
               same product, with the gate as its epilogue, reads A from there

The backward has panels only, of keys. A score's derivative is a function of the score, so no statistics of the forward
are needed but the LSE of a softmax, which is recomputed:

    prologue   dX = gate * dO, dGate = X * dO, for a softmax delta = rowsum(dX * X)
    gradient   for a panel of keys A^T and dS^T: dA = dX V^T, dS = dA * score'(S), or A (dA - delta)
    dkv        dV = A^T dX and dK = dS^T (scale Q), both complete after the panel
    dq, dbias  scale dS K and the diagonal sums of dS, added to the sums of the panels before

Panels are processed in order on one stream and each sum has one writer, so that results are bitwise repeatable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashgau.options import GatedOptions, Layout

from .common import (
    FUSED_ADDITION,
    LOG2_E,
    VARYING,
    Choose,
    Config,
    Sequences,
    Sizes,
    blocks_of,
    bounds,
    chosen_by,
    first_slot,
    is_visible,
    keys_seen,
    launcher,
    load_rows,
    place,
    row_pointers,
    rows_seeing,
    sequences_of,
)
from .gated import (
    GatedRule,
    bias_pointer,
    bias_rule,
    factors,
    load_tile,
    precisions,
    probs,
    prologue,
    room_for_panel,
    rows,
    score_gradient,
    scores,
    store_tile,
    sums_like,
)

_FUSED_WIDTH = 512  # of the values; up to it, recomputing scores for each tile is cheaper than storing them


# ---------------------------------------------------------------- scores


@triton.jit
def scales(rule, o_position, n, SCALING: tl.constexpr):
    """What a row's q k^T is multiplied with: 1 / n by the rule of the normaliser, or a softmax's factor."""
    b_scale = tl.zeros(o_position.shape, tl.float32) + rule.scale
    visible = n + 0 * o_position
    if rule.right is not None:
        visible = tl.maximum(o_position + 1, 0)
    if SCALING == "keys":
        b_scale = 1.0 / tl.maximum(n + 0 * o_position, 1).to(tl.float32)
    elif SCALING == "row":
        b_scale = 1.0 / tl.maximum(visible, 1).to(tl.float32)
    elif SCALING == "log":  # to the base 512
        b_scale *= tl.log(tl.maximum(visible, 16).to(tl.float32)) * 0.16029944898766260
    else:
        tl.static_assert(SCALING == "number")
    return b_scale


# ---------------------------------------------------------------- blocks


@triton.jit
def panel_pointers(panel, i_slot, width, o_column, BLOCK: tl.constexpr):
    """A block of rows of a panel (slots, BLOCK, width), and some of its columns."""
    o_row = tl.cast(i_slot, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return panel + o_row[:, None] * width + o_column[None, :]


@triton.jit
def probs_block(
    b_q, b_scale, b_lse, k, p_k, rule, p_bias, o_position, o_key, n,
    SIZES: tl.constexpr, SCORE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A of a block of rows against a block of keys."""
    b_k = load_rows(k, p_k + tl.cast(o_key, tl.int64) * k.token, o_key < n, SIZES.S, SIZES.BS, not MASKED)
    b_qk = tl.dot(b_q, b_k.T, input_precision=SIZES.PRECISION)
    b_s = scores(b_qk, b_scale[:, None], rule, p_bias, o_position[:, None], o_key[None, :], n, MASKED)
    return probs(b_s, b_lse[:, None], SCORE)


@triton.jit
def load_lse(lse, row, max_seqlen_q, o_token, m_row, SCORE: tl.constexpr):
    """The LSE of rows (softmax only). Out-of-range rows have -inf, which gives weights of 0."""
    b_lse = tl.zeros(o_token.shape, tl.float32)
    if SCORE == "softmax":
        b_lse = tl.load(lse + tl.cast(row, tl.int64) * max_seqlen_q + o_token, mask=m_row, other=-float("inf"))
    return b_lse


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=VARYING)
def lse_kernel(
    q, k, lse, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, n_blocks,
    SIZES: tl.constexpr,  # S, BS, BM, BN, PRECISION
    SCALING: tl.constexpr,
):  # fmt: skip
    """LSE of a block of rows; -inf for a row that sees nothing."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance)
    i_block, _, i_seq = place(tl.program_id(0), n_blocks, 1, sequences, sequences.cu_seqlens_q, max_seqlen_q, 1, BM)
    row, first_m, m, _, first_n, n, _ = bounds(sequences, i_seq)
    o_query = i_block * BM + tl.arange(0, BM)
    o_position, m_row = o_query + n - m, o_query < m
    b_q = load_rows(q, row_pointers(q, row, 0, first_m + o_query), m_row, SIZES.S, SIZES.BS, False)
    b_scale, p_bias = scales(rule, o_position, n, SCALING), bias_pointer(rule, row)
    p_k = row_pointers(k, row, 0, first_n)
    last = tl.minimum(i_block * BM + BM, m) - 1
    _, _, full_stop, stop = keys_seen(rule, i_block * BM + n - m, last + n - m, n, BN)
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for phase in tl.static_range(2):  # unmasked blocks, then masked ones
        for j in range(0 if phase == 0 else full_stop, full_stop if phase == 0 else stop, BN):
            o_key = j + tl.arange(0, BN)
            b_k = load_rows(k, p_k + tl.cast(o_key, tl.int64) * k.token, o_key < n, SIZES.S, SIZES.BS, phase == 0)
            b_qk = tl.dot(b_q, b_k.T, input_precision=SIZES.PRECISION)
            b_s = scores(b_qk, b_scale[:, None], rule, p_bias, o_position[:, None], o_key[None, :], n, phase != 0)
            b_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_pivot = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_p = tl.exp2((b_s - b_pivot[:, None]) * LOG2_E)
            b_l = b_l * tl.exp2((b_m - b_pivot) * LOG2_E) + tl.sum(b_p, 1)
            b_m = b_new
    b_lse = tl.where(b_l == 0, -float("inf"), b_m + tl.log(tl.where(b_l == 0, 1.0, b_l)))
    tl.store(lse + tl.cast(row, tl.int64) * max_seqlen_q + first_m + o_query, b_lse, mask=m_row)


@triton.jit(do_not_specialize=VARYING)
def probs_kernel(
    q, k, lse, panel, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, n_blocks, first_block, n_across, panel_width,
    SIZES: tl.constexpr,  # S, BS, BM, BN, PRECISION
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """One block of a panel (blocks of rows, BM, keys): A, up to the last key that a row of the block sees."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance)
    i_slot = tl.program_id(0) // n_across
    i_block, _, i_seq = place(first_block + i_slot, n_blocks, 1, sequences, sequences.cu_seqlens_q, max_seqlen_q, 1, BM)
    row, first_m, m, _, first_n, n, _ = bounds(sequences, i_seq)
    last = tl.minimum(i_block * BM + BM, m) - 1
    _, _, _, stop = keys_seen(rule, i_block * BM + n - m, last + n - m, n, BN)
    o_key = tl.program_id(0) % n_across * BN + tl.arange(0, BN)
    if tl.program_id(0) % n_across * BN >= stop:
        return
    o_query = i_block * BM + tl.arange(0, BM)
    o_position, m_row = o_query + n - m, o_query < m
    b_q = load_rows(q, row_pointers(q, row, 0, first_m + o_query), m_row, SIZES.S, SIZES.BS, False)
    b_lse = load_lse(lse, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
    b_scale, p_bias = scales(rule, o_position, n, SCALING), bias_pointer(rule, row)
    p_k = row_pointers(k, row, 0, first_n)
    b_a = probs_block(b_q, b_scale, b_lse, k, p_k, rule, p_bias, o_position, o_key, n, SIZES, SCORE, True)
    tl.store(panel_pointers(panel, i_slot, panel_width, o_key, BM), b_a.to(panel.dtype.element_ty))


@triton.jit(do_not_specialize=VARYING)
def product_kernel(
    q, k, v, gate, lse, panel, product, out,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, n_blocks, first_block, panel_width,
    SIZES: tl.constexpr,  # S, E, BS, BE, BM, BN, PRECISION, FACTORS
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """X = A V and gate * X of a block of rows and a tile of columns; without a panel, A is computed here."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance)
    n_tiles = tl.cdiv(SIZES.E, SIZES.BE)
    i_slot = tl.program_id(0) // n_tiles
    o_column = tl.program_id(0) % n_tiles * SIZES.BE + tl.arange(0, SIZES.BE)
    i_block, _, i_seq = place(first_block + i_slot, n_blocks, 1, sequences, sequences.cu_seqlens_q, max_seqlen_q, 1, BM)
    row, first_m, m, stored, first_n, n, _ = bounds(sequences, i_seq)
    if i_block * BM >= stored:
        return
    o_query = i_block * BM + tl.arange(0, BM)
    o_position, m_row = o_query + n - m, o_query < m
    last = tl.minimum(i_block * BM + BM, m) - 1
    _, _, full_stop, stop = keys_seen(rule, i_block * BM + n - m, last + n - m, n, BN)
    p_v = row_pointers(v, row, 0, first_n)
    b_acc = tl.zeros([BM, SIZES.BE], tl.float32)
    if panel is not None:
        for j in range(0, stop, BN):
            o_key = j + tl.arange(0, BN)
            b_a = tl.load(panel_pointers(panel, i_slot, panel_width, o_key, BM))
            b_v = load_tile(v, p_v + tl.cast(o_key, tl.int64) * v.token, o_key < n, o_column, SIZES.E, SIZES.BE)
            b_a, b_v = factors(b_a, b_v)
            b_acc = tl.dot(b_a, b_v, b_acc, input_precision=SIZES.FACTORS)
    else:
        b_q = load_rows(q, row_pointers(q, row, 0, first_m + o_query), m_row, SIZES.S, SIZES.BS, False)
        b_lse = load_lse(lse, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
        b_scale, p_bias = scales(rule, o_position, n, SCALING), bias_pointer(rule, row)
        p_k = row_pointers(k, row, 0, first_n)
        for phase in tl.static_range(2):  # unmasked blocks, then masked ones
            for j in range(0 if phase == 0 else full_stop, full_stop if phase == 0 else stop, BN):
                o_key = j + tl.arange(0, BN)
                b_a = probs_block(
                    b_q, b_scale, b_lse, k, p_k, rule, p_bias, o_position, o_key, n, SIZES, SCORE, phase != 0
                )
                b_v = load_tile(v, p_v + tl.cast(o_key, tl.int64) * v.token, o_key < n, o_column, SIZES.E, SIZES.BE)
                b_a, b_v = factors(b_a, b_v)
                b_acc = tl.dot(b_a, b_v, b_acc, input_precision=SIZES.FACTORS)
    b_acc = tl.where(m_row[:, None], b_acc, 0.0)
    m_stored = o_query < stored
    if product is not None:
        p_product = row_pointers(product, row, 0, first_m + o_query)
        store_tile(product, p_product, m_stored, o_column, b_acc, SIZES.E, SIZES.BE)
    if gate is not None:
        p_gate = row_pointers(gate, row, 0, first_m + o_query)
        b_acc *= load_tile(gate, p_gate, m_row, o_column, SIZES.E, SIZES.BE).to(tl.float32)
    store_tile(out, row_pointers(out, row, 0, first_m + o_query), m_stored, o_column, b_acc, SIZES.E, SIZES.BE)


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    q, k, v, dx, lse, delta, panel, dpanel,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, n_blocks, first_block, n_across, panel_width,
    SIZES: tl.constexpr,  # S, E, BS, BE, BM, BN, PRECISION
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """One block of both panels (blocks of keys, BN, queries): A^T, and dS^T from dA = dX V^T."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance)
    i_slot = tl.program_id(0) // n_across
    i_block, _, i_seq = place(first_block + i_slot, n_blocks, 1, sequences, sequences.cu_seqlens_k, max_seqlen_k, 1, BN)
    row, first_m, m, _, first_n, n, _ = bounds(sequences, i_seq)
    first_row = tl.program_id(0) % n_across * BM
    start, _, _, stop = rows_seeing(rule, i_block * BN, tl.minimum(i_block * BN + BN, n) - 1, m, n, 1, BM)
    if (first_row < start) | (first_row >= stop):
        return
    o_key, o_query = i_block * BN + tl.arange(0, BN), first_row + tl.arange(0, BM)
    o_position, m_row, m_key = o_query + n - m, o_query < m, o_key < n
    p_v, p_dx = row_pointers(v, row, 0, first_n + o_key), row_pointers(dx, row, 0, first_m + o_query)
    b_da = tl.zeros([BN, BM], tl.float32)
    for column in range(0, SIZES.E, SIZES.BE):
        o_column = column + tl.arange(0, SIZES.BE)
        b_v = load_tile(v, p_v, m_key, o_column, SIZES.E, SIZES.BE)
        b_dx = load_tile(dx, p_dx, m_row, o_column, SIZES.E, SIZES.BE)
        b_da = tl.dot(b_v, b_dx.T, b_da, input_precision=SIZES.PRECISION)
    b_q = load_rows(q, row_pointers(q, row, 0, first_m + o_query), m_row, SIZES.S, SIZES.BS, False)
    b_k = load_rows(k, row_pointers(k, row, 0, first_n + o_key), m_key, SIZES.S, SIZES.BS, False)
    b_kq = tl.dot(b_k, b_q.T, input_precision=SIZES.PRECISION)
    b_scale, p_bias = scales(rule, o_position, n, SCALING), bias_pointer(rule, row)
    b_s = scores(b_kq, b_scale[None, :], rule, p_bias, o_position[None, :], o_key[:, None], n, True)
    b_lse = load_lse(lse, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
    b_delta = load_lse(delta, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
    b_a = probs(b_s, b_lse[None, :], SCORE)
    b_ds = score_gradient(b_da, b_s, b_a, tl.where(m_row, b_delta, 0.0)[None, :], SCORE)
    tl.store(panel_pointers(panel, i_slot, panel_width, o_query, BN), b_a.to(panel.dtype.element_ty))
    tl.store(panel_pointers(dpanel, i_slot, panel_width, o_query, BN), b_ds.to(dpanel.dtype.element_ty))


@triton.jit(do_not_specialize=VARYING)
def dkv_kernel(
    panel, x, out, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, n_blocks, first_block, panel_width,
    SIZES: tl.constexpr,  # E, BE, BM, BN, FACTORS
    SCALING: tl.constexpr,
):  # fmt: skip
    """dV = A^T dX, or with SCALING dK = dS^T (scale Q), of a block of keys of a panel and a tile of columns."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, None, 0, 0)
    n_tiles = tl.cdiv(SIZES.E, SIZES.BE)
    i_slot = tl.program_id(0) // n_tiles
    o_column = tl.program_id(0) % n_tiles * SIZES.BE + tl.arange(0, SIZES.BE)
    i_block, _, i_seq = place(first_block + i_slot, n_blocks, 1, sequences, sequences.cu_seqlens_k, max_seqlen_k, 1, BN)
    row, first_m, m, _, first_n, n, stored = bounds(sequences, i_seq)
    if i_block * BN >= stored:
        return
    o_key = i_block * BN + tl.arange(0, BN)
    start, _, _, stop = rows_seeing(rule, i_block * BN, tl.minimum(i_block * BN + BN, n) - 1, m, n, 1, BM)
    p_x = row_pointers(x, row, 0, first_m)
    b_acc = tl.zeros([BN, SIZES.BE], tl.float32)
    for r in range(start, stop, BM):
        o_query = r + tl.arange(0, BM)
        b_p = tl.load(panel_pointers(panel, i_slot, panel_width, o_query, BN))
        b_x = load_tile(x, p_x + tl.cast(o_query, tl.int64) * x.token, o_query < m, o_column, SIZES.E, SIZES.BE)
        if SCALING is not None:
            b_p = b_p * scales(rule, o_query + n - m, n, SCALING)[None, :]
        b_p, b_x = factors(b_p, b_x)
        b_acc = tl.dot(b_p, b_x, b_acc, input_precision=SIZES.FACTORS)
    b_acc = tl.where((o_key < n)[:, None], b_acc, 0.0)
    store_tile(out, row_pointers(out, row, 0, first_n + o_key), o_key < stored, o_column, b_acc, SIZES.E, SIZES.BE)


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    dpanel, k, dq, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, n_blocks, n_key_blocks, first_block, last_block, panel_width,
    SIZES: tl.constexpr,  # S, BS, BM, BN, FACTORS
    SCALING: tl.constexpr,
):  # fmt: skip
    """dQ += scale dS K of a block of rows, over the keys of a panel: its blocks first_block..last_block."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, None, 0, 0)
    i_block, _, i_seq = place(tl.program_id(0), n_blocks, 1, sequences, sequences.cu_seqlens_q, max_seqlen_q, 1, BM)
    row, first_m, m, _, first_n, n, _ = bounds(sequences, i_seq)
    last = tl.minimum(i_block * BM + BM, m) - 1
    _, _, _, stop = keys_seen(rule, i_block * BM + n - m, last + n - m, n, BN)
    first = first_slot(sequences, i_seq, n_key_blocks, BN)
    low = tl.maximum(first_block - first, 0)
    high = tl.minimum(last_block - first, tl.cdiv(stop, BN))
    if low >= high:
        return
    o_query = i_block * BM + tl.arange(0, BM)
    b_acc = tl.zeros([BM, SIZES.BS], tl.float32)
    for i in range(low, high):
        o_key = i * BN + tl.arange(0, BN)
        b_ds = tl.load(panel_pointers(dpanel, first + i - first_block, panel_width, o_query, BN))
        b_k = load_rows(k, row_pointers(k, row, 0, first_n + o_key), o_key < n, SIZES.S, SIZES.BS, False)
        b_ds, b_k = factors(b_ds, b_k)
        b_acc = tl.dot(b_ds.T, b_k, b_acc, input_precision=SIZES.FACTORS)
    b_acc *= scales(rule, o_query + n - m, n, SCALING)[:, None]
    o_column = tl.arange(0, SIZES.BS)
    p_dq = row_pointers(dq, row, 0, first_m + o_query)
    b_acc += load_tile(dq, p_dq, o_query < m, o_column, SIZES.S, SIZES.BS)
    store_tile(dq, p_dq, o_query < m, o_column, b_acc, SIZES.S, SIZES.BS)


@triton.jit(do_not_specialize=VARYING)
def dbias_kernel(
    dpanel, dbias, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    right, max_distance, n_blocks, n_across, first_block, last_block, panel_width, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dBias += dS of a panel's keys, summed along a block of BD diagonals j - p."""
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, 0.0, None, 0, 0)
    i_batch = tl.program_id(0) // n_across
    o_bias = tl.program_id(0) % n_across * BD + tl.arange(0, BD)
    low = first_block
    high = last_block
    if sequences.cu_seqlens_q is None:  # the blocks of this row of the batch
        low = tl.maximum(first_block, i_batch * n_blocks)
        high = tl.minimum(last_block, i_batch * n_blocks + n_blocks)
    b_dbias = tl.zeros([BD], tl.float32)
    for i in range(low, high):
        i_block, _, i_seq = place(i, n_blocks, 1, sequences, sequences.cu_seqlens_k, max_seqlen_k, 1, BN)
        _, _, m, _, _, n, _ = bounds(sequences, i_seq)
        o_key = (i_block * BN + tl.arange(0, BN))[:, None]
        o_position = o_key - (o_bias - max_distance)[None, :]
        o_query = o_position - (n - m)
        mask = is_visible(rule, o_position, o_key, n) & (o_query >= 0) & (o_query < m)
        o_row = tl.cast(i - first_block, tl.int64) * BN + tl.arange(0, BN)
        b_ds = tl.load(dpanel + o_row[:, None] * panel_width + o_query, mask=mask, other=0.0)
        b_dbias += tl.sum(b_ds.to(tl.float32), 0)
    width = 2 * max_distance + 1
    p_dbias = dbias + tl.cast(i_batch, tl.int64) * width + o_bias
    tl.store(p_dbias, b_dbias + tl.load(p_dbias, mask=o_bias < width, other=0.0), mask=o_bias < width)


# ---------------------------------------------------------------- launchers


class _GatedCall(NamedTuple):
    """What all kernels of one call share."""

    sequences: Sequences
    rule: tuple[Any, ...]  # scale, right, bias, bias_batch, max_distance
    score: str  # of `probs`
    scaling: str  # of `scales`
    rows: int  # of the batch that have blocks of their own: 1 when packed
    width: int  # S as a block
    max_seqlens: tuple[int, int]  # queries and keys of the longest sequence
    precision: str  # of products of inputs
    factors: str  # of products of weights, see `factors`
    probs_like: Tensor  # a tensor of their type


@launcher
def gau_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
    save: bool = False,
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output (B, M, E) and, when the backward will want it (`save` and a gate), the ungated product A v."""
    b, m, s = q.shape
    n, e = k.shape[1], v.shape[2]
    out = q.new_empty(b, m, e)
    product = q.new_empty(b, m, e) if save and gate is not None else None
    if out.numel() == 0 or n == 0:
        return out.zero_(), product if product is None else product.zero_()
    call = _call(q, k, layout, options)
    choose = chosen_by(config)
    lse = _lse(call, q, k, choose)
    panels = e > _FUSED_WIDTH or m <= 16
    config = choose("gau_product" if panels else "gau_fused", call.probs_like, call.width, rows=m)
    n_blocks = blocks_of(call.sequences, m, 1, config.block_m)
    total = n_blocks * call.rows
    n_tiles = triton.cdiv(e, config.block_n)
    scoring = {"SCORE": call.score, "SCALING": call.scaling}
    sizes = {"S": s, "BS": call.width, "BM": config.block_m, "BN": config.block_k}

    def multiply(first: int, count: int, panel: Tensor | None, panel_width: int) -> None:
        product_kernel[(count * n_tiles,)](
            rows(q), rows(k), rows(v), rows(gate), lse, panel, rows(product), rows(out), *call.sequences,
            *call.rule, n_blocks, first, panel_width,
            Sizes(**sizes, E=e, BE=config.block_n, PRECISION=call.precision, FACTORS=call.factors),
            **scoring, **config.launch(),
        )  # fmt: skip

    if not panels:
        multiply(0, total, None, 0)
        return out, product
    n_across = triton.cdiv(call.max_seqlens[1], config.block_k)
    panel_width = n_across * config.block_k
    making = choose("gau_weights", call.probs_like, call.width, rows=m)
    panel, step = room_for_panel(call.probs_like, config.block_m * panel_width, total)
    for first in range(0, total, step):
        count = min(step, total - first)
        probs_kernel[(count * n_across,)](
            rows(q), rows(k), lse, panel, *call.sequences, *call.rule, n_blocks, first, n_across, panel_width,
            Sizes(**sizes, PRECISION=call.precision), **scoring, **making.launch(),
        )  # fmt: skip
        multiply(first, count, panel, panel_width)
    return out, product


@launcher
def gau_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    product: Tensor | None,
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, gate and rel_bias (B, 2P-1); None where there is no such input."""
    b, m, s = q.shape
    n, e, rel_bias = k.shape[1], v.shape[2], options.rel_bias
    product = None if gate is None else product  # which is empty then
    dq = q.new_zeros(b, m, s, dtype=torch.float32)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dgate = gate.new_empty(gate.shape) if gate is not None else None
    dbias = q.new_zeros(rel_bias.shape, dtype=torch.float32) if rel_bias is not None else None
    if m * e == 0 or n == 0 or b == 0:
        dgate = dgate if dgate is None else dgate.zero_()
        return dq.to(q.dtype), dk.zero_(), dv.zero_(), dgate, sums_like(dbias, rel_bias)
    call = _call(q, k, layout, options)
    choose = chosen_by(config)
    lse = _lse(call, q, k, choose)
    if call.score == "softmax" and product is None:
        product, _ = gau_attention_forward(q, k, v, None, layout, options, config=choose)
    dx, delta = prologue(call.sequences, dout, gate, product, dgate, choose, softmax=call.score == "softmax")

    config, values, queries = (
        choose(name, call.probs_like, call.width) for name in ("gau_gradient", "gau_dv", "gau_dq")
    )
    bm, bn = config.block_m, config.block_n
    n_blocks, n_row_blocks = blocks_of(call.sequences, n, 1, bn), blocks_of(call.sequences, m, 1, bm, rest=False)
    total, n_across = n_blocks * call.rows, triton.cdiv(call.max_seqlens[0], bm)
    panel_width = n_across * bm
    panel, step = room_for_panel(call.probs_like, 2 * bn * panel_width, total)
    panel, dpanel = panel.view(2, -1)
    scaling, rule = {"SCALING": call.scaling}, call.rule
    blocks = {"BM": bm, "BN": bn}
    for first in range(0, total, step):
        count = min(step, total - first)
        gradient_kernel[(count * n_across,)](
            rows(q), rows(k), rows(v), rows(dx), lse, delta, panel, dpanel, *call.sequences, *rule, n_blocks, first,
            n_across, panel_width,
            Sizes(S=s, E=e, BS=call.width, BE=config.block_k, **blocks, PRECISION=call.precision),
            SCORE=call.score, **scaling, **config.launch(),
        )  # fmt: skip
        dkv_kernel[(count * triton.cdiv(e, values.block_n),)](
            panel, rows(dx), rows(dv), *call.sequences, *rule[:2], n_blocks, first, panel_width,
            Sizes(E=e, BE=values.block_n, **blocks, FACTORS=call.factors), SCALING=None, **values.launch(),
        )  # fmt: skip
        dkv_kernel[(count * triton.cdiv(s, min(call.width, 64)),)](
            dpanel, rows(q), rows(dk), *call.sequences, *rule[:2], n_blocks, first, panel_width,
            Sizes(E=s, BE=min(call.width, 64), **blocks, FACTORS=call.factors), **scaling, **queries.launch(),
        )  # fmt: skip
        dq_kernel[(n_row_blocks * call.rows,)](
            dpanel, rows(k), rows(dq), *call.sequences, *rule[:2], n_row_blocks, n_blocks, first, first + count,
            panel_width, Sizes(S=s, BS=call.width, **blocks, FACTORS=call.factors), **scaling, **queries.launch(),
        )  # fmt: skip
        if dbias is not None:
            across = triton.cdiv(dbias.shape[-1], 64)
            dbias_kernel[(b * across,)](
                dpanel, dbias, *call.sequences, rule[1], rule[4], n_blocks, across, first, first + count, panel_width,
                BD=64, BN=bn, **FUSED_ADDITION,
            )  # fmt: skip
    return dq.to(q.dtype), dk, dv, dgate, sums_like(dbias, rel_bias)


def _call(q: Tensor, k: Tensor, layout: Layout, options: GatedOptions) -> _GatedCall:
    """The options as the kernels take them."""
    score, normalizer, causal, rel_bias = options
    cu_seqlens = layout.cu_seqlens
    softmax = score.startswith("softmax")
    if softmax:
        scaling, scale = "log" if score == "softmax_plus" else "number", q.shape[-1] ** -0.5
    else:
        scaling, scale = ("number", 1 / float(normalizer)) if not isinstance(normalizer, str) else (normalizer, 1.0)
    max_seqlens = q.shape[1], k.shape[1]
    if cu_seqlens is not None:  # the only value read on the host: panels as wide as the packed batch would be many
        most = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
        max_seqlens = (min(max(most, 1), k.shape[1]),) * 2
    precision, factors, probs_like = precisions(q)
    return _GatedCall(
        sequences=sequences_of(q.shape[0], q.shape[1], k.shape[1], *layout),
        rule=(scale, 0 if causal else None, *bias_rule(rel_bias)),
        score="softmax" if softmax else score,
        scaling=scaling,
        rows=q.shape[0] if cu_seqlens is None else 1,
        width=max(16, triton.next_power_of_2(q.shape[-1])),
        max_seqlens=max_seqlens,
        precision=precision,
        factors=factors,
        probs_like=probs_like,
    )


def _lse(call: _GatedCall, q: Tensor, k: Tensor, choose: Choose) -> Tensor | None:
    """The LSE (B, M) of a softmax's rows; None for another score."""
    if call.score != "softmax":
        return None
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    config: Config = choose("gau_lse", q, call.width)
    n_blocks = blocks_of(call.sequences, q.shape[1], 1, config.block_m, rest=False)
    sizes = Sizes(S=q.shape[-1], BS=call.width, BM=config.block_m, BN=config.block_n, PRECISION=call.precision)
    lse_kernel[(n_blocks * call.rows,)](
        rows(q), rows(k), lse, *call.sequences, *call.rule, n_blocks, sizes, SCALING=call.scaling, **config.launch(),
    )  # fmt: skip
    return lse

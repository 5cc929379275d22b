"""Quadratic gated attention (Hua et al. 2022): O = act(gate) * (A V), A an elementwise score or a softmax of q k^T.

One head, and values thousands of columns wide: a row of the result does not fit a program's registers, so a block of
scores is computed once and used for many columns. Two variants:

    fused      (narrow values) a program computes A for its rows and multiplies it with a tile of columns of V
    panels     (wide values) A of some rows against all keys is written to a panel, sized to stay in the L2 cache; the
               same product, with the gate as its epilogue, reads A from there

The backward has panels only, of keys. A score's derivative is a function of the score, so no statistics of the forward
are needed but the LSE of a softmax, which is recomputed:

    prologue   dX = act(gate) * dO, dGate = X * dO * act'(gate), for a softmax delta = rowsum(dX * X)
    gradient   for a panel of keys A^T and dS^T: dA = dX V^T, dS = dA * score'(S), or A (dA - delta)
    dkv        dV = A^T dX and dK = dS^T (scale Q), both complete after the panel
    dq, dbias  scale dS K and the diagonal sums of dS, added to the sums of the panels before

Panels are processed in order on one stream and each sum has one writer, so that results are bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LOG2_E,
    VARYING,
    Sequences,
    bounds,
    first_slot,
    is_visible,
    keys_seen,
    load_rows,
    place,
    row_pointers,
    rows_seeing,
)
from .gated import (
    GatedRule,
    bias_pointer,
    factors,
    load_gate,
    load_tile,
    probs,
    score_gradient,
    scores,
    store_tile,
)
from .guarded import guarded
from .own_scores import own_weight_slopes, own_weights

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
    b_s, _ = scores(b_qk, b_scale[:, None], rule, p_bias, o_position[:, None], o_key[None, :], n, MASKED, SIZES)
    if SIZES.WEIGHT_MOD is not None:
        b_a = own_weights(b_s, SIZES)
    else:
        b_a = probs(b_s, b_lse[:, None], SCORE)
    return b_a


@triton.jit
def load_lse(lse, row, max_seqlen_q, o_token, m_row, SCORE: tl.constexpr):
    """The LSE of rows (softmax only). Out-of-range rows have -inf, which gives weights of 0."""
    b_lse = tl.zeros(o_token.shape, tl.float32)
    if SCORE == "softmax":
        b_lse = tl.load(lse + tl.cast(row, tl.int64) * max_seqlen_q + o_token, mask=m_row, other=-float("inf"))
    return b_lse


# ---------------------------------------------------------------- forward


@guarded
@triton.jit(do_not_specialize=VARYING)
def lse_kernel(
    q, k, lse, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, aux, n_blocks,
    SIZES: tl.constexpr,  # S, BS, BM, BN, PRECISION, and a user's functions
    SCALING: tl.constexpr,
):  # fmt: skip
    """LSE of a block of rows; -inf for a row that sees nothing."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance, aux)
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
            b_s, _slope = scores(
                b_qk, b_scale[:, None], rule, p_bias, o_position[:, None], o_key[None, :], n, phase != 0, SIZES
            )
            b_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_pivot = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_p = tl.exp2((b_s - b_pivot[:, None]) * LOG2_E)
            b_l = b_l * tl.exp2((b_m - b_pivot) * LOG2_E) + tl.sum(b_p, 1)
            b_m = b_new
    b_lse = tl.where(b_l == 0, -float("inf"), b_m + tl.log(tl.where(b_l == 0, 1.0, b_l)))
    tl.store(lse + tl.cast(row, tl.int64) * max_seqlen_q + first_m + o_query, b_lse, mask=m_row)


@guarded
@triton.jit(do_not_specialize=VARYING)
def probs_kernel(
    q, k, lse, panel, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, aux, n_blocks, first_block, n_across, panel_width,
    SIZES: tl.constexpr,  # S, BS, BM, BN, PRECISION, and a user's functions
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """One block of a panel (blocks of rows, BM, keys): A, up to the last key that a row of the block sees."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance, aux)
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


@guarded
@triton.jit(do_not_specialize=VARYING)
def product_kernel(
    q, k, v, gate, lse, panel, product, out,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, aux, n_blocks, first_block, panel_width,
    SIZES: tl.constexpr,  # S, E, BS, BE, BM, BN, GATE, PRECISION, FACTORS
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """X = A V and act(gate) * X of a block of rows and a tile of columns; without a panel, A is computed here."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance, aux)
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
        b_acc *= load_gate(gate, p_gate, m_row, o_column, SIZES.E, SIZES.BE, SIZES.GATE)
    store_tile(out, row_pointers(out, row, 0, first_m + o_query), m_stored, o_column, b_acc, SIZES.E, SIZES.BE)


# ---------------------------------------------------------------- backward


@guarded
@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    q, k, v, dx, lse, delta, panel, dpanel, dbias_panel,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, aux, n_blocks, first_block, n_across, panel_width,
    SIZES: tl.constexpr,  # S, E, BS, BE, BM, BN, PRECISION, and a user's functions
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """One block of both panels (blocks of keys, BN, queries): A^T, and dS^T from dA = dX V^T.

    A bias is added after a user's function of the scores: its panel, if there is one, is without that function's slope.
    """
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance, aux)
    i_slot = tl.program_id(0) // n_across
    i_block, _, i_seq = place(first_block + i_slot, n_blocks, 1, sequences, sequences.cu_seqlens_k, max_seqlen_k, 1, BN)
    row, first_m, m, _, first_n, n, _ = bounds(sequences, i_seq)
    first_row = tl.program_id(0) % n_across * BM
    start, _, _, stop = rows_seeing(rule, i_block * BN, tl.minimum(i_block * BN + BN, n) - 1, m, n, BM)
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
    b_s, b_slope = scores(b_kq, b_scale[None, :], rule, p_bias, o_position[None, :], o_key[:, None], n, True, SIZES)
    b_lse = load_lse(lse, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
    b_delta = load_lse(delta, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
    if SIZES.WEIGHT_MOD is not None:
        b_a = own_weights(b_s, SIZES)
        b_ds = b_da * own_weight_slopes(b_s, SIZES)
    else:
        b_a = probs(b_s, b_lse[None, :], SCORE)
        b_ds = score_gradient(b_da, b_s, b_a, tl.where(m_row, b_delta, 0.0)[None, :], SCORE)
    if dbias_panel is not None:
        p_bias_panel = panel_pointers(dbias_panel, i_slot, panel_width, o_query, BN)
        tl.store(p_bias_panel, b_ds.to(dbias_panel.dtype.element_ty))
    if SIZES.SCORE_MOD is not None:
        b_ds *= b_slope
    tl.store(panel_pointers(panel, i_slot, panel_width, o_query, BN), b_a.to(panel.dtype.element_ty))
    tl.store(panel_pointers(dpanel, i_slot, panel_width, o_query, BN), b_ds.to(dpanel.dtype.element_ty))


@guarded
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
    start, _, _, stop = rows_seeing(rule, i_block * BN, tl.minimum(i_block * BN + BN, n) - 1, m, n, BM)
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


@guarded
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


@guarded
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

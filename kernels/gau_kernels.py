"""Quadratic gated attention (Hua et al. 2022): O = act(gate) * (A V), A an elementwise score or a softmax of q k^T.

One head, and values thousands of columns wide: a row of the result does not fit a program's registers, so a block of
scores is computed once and used for many columns. Two variants:

    fused      (narrow values) a program computes A for its rows and multiplies it with a tile of columns of V
    panels     (wide values) A of some rows against all keys is written to a panel, of as many rows as it takes to
               occupy the device; the same product, with the gate as its epilogue, reads A from there

The backward has panels only, of keys. A score's derivative is a function of the score, so no statistics of the forward
are needed but the LSE of a softmax, which is recomputed:

    prologue   dX = act(gate) * dO, dGate = X * dO * act'(gate), for a softmax delta = rowsum(dX * X)
    gradient   for a panel of keys A^T and scale dS^T: dA = dX V^T, dS = dA * score'(S), or A (dA - delta)
    dkv        dV = A^T dX and dK = (scale dS)^T Q, both complete after the panel
    dq, dbias  (scale dS) K and the diagonal sums of dS, added to the sums of the panels before

The scale of a row is in the panel, where no product has to know of it. Panels are processed in order on one stream and
each sum has one writer, so that results are bitwise repeatable. Programs of the forward and of dQ begin with the last
rows, which in a causal call see most keys; blocks of keys begin with the first, which most rows see.
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


@triton.jit
def store_gated(
    b_x, gate, product, out, row, i_part, first_m, o_query, m, stored, o_column,
    SIZES: tl.constexpr,  # E, BE, GATE
):  # fmt: skip
    """Write X and act(gate) * X, each if it is asked for; zeros in rows of padding."""
    m_row, m_stored = o_query < m, o_query < stored
    b_x = tl.where(m_row[:, None], b_x, 0.0)
    if product is not None:
        p_product = row_pointers(product, row, 0, first_m + o_query)
        store_tile(product, p_product, m_stored, o_column, b_x, SIZES.E, SIZES.BE)
    if gate is not None:
        p_gate = row_pointers(gate, row, 0, first_m + o_query)
        b_x *= load_gate(gate, p_gate, m_row, o_column, SIZES.E, SIZES.BE, SIZES.GATE)
    p_out = row_pointers(out, row, i_part, first_m + o_query)
    store_tile(out, p_out, m_stored, o_column, b_x, SIZES.E, SIZES.BE)


@triton.jit
def share_of(stop, n_parts, BLOCK: tl.constexpr):
    """From and to which of the keys before `stop` a program goes: all, or one of `n_parts` runs of whole blocks."""
    first = 0
    if n_parts is not None:
        run = tl.cdiv(tl.cdiv(stop, BLOCK), n_parts) * BLOCK
        first = tl.minimum(tl.program_id(1) * run, stop)
        stop = tl.minimum(first + run, stop)
    return first, stop


@triton.jit
def panel_place(i_place, n_blocks, sequences, ends, tokens, BLOCK: tl.constexpr):
    """(block, sequence) in the order in which panels have them: the first blocks of all rows of the batch, then the
    second ones. So the blocks of a panel, in a causal call, take about as long as each other."""
    if sequences.cu_seqlens_q is None:
        i_block = i_place // sequences.n_sequences
        i_seq = i_place % sequences.n_sequences
    else:
        i_block, _, i_seq = place(i_place, n_blocks, 1, sequences, ends, tokens, 1, BLOCK)
    return i_block, i_seq


@triton.jit
def places_of_keys(sequences, i_seq, BLOCK: tl.constexpr):
    """The inverse: where a sequence's first block of keys is, and how far its blocks are apart."""
    first = i_seq
    step = sequences.n_sequences
    if sequences.cu_seqlens_q is not None:
        first = first_slot(sequences, i_seq, 0, BLOCK)
        step = 1
    return first, step


@triton.jit
def blocks_between(first_place, last_place, first, step):
    """Which blocks of a sequence have places from first_place to last_place."""
    low = (tl.maximum(first_place - first, 0) + step - 1) // step
    return low, (tl.maximum(last_place - first, 0) + step - 1) // step


@triton.jit
def heavy_first():
    """The program's number, backwards: in a causal call later rows see more keys, and what is begun last should be
    short."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


# ---------------------------------------------------------------- forward


@guarded
@triton.jit(do_not_specialize=VARYING)
def lse_kernel(
    q, k, lse, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, aux, n_blocks, n_rows, n_parts,
    SIZES: tl.constexpr,  # S, BS, BM, BN, PRECISION, and a user's functions
    SCALING: tl.constexpr,
):  # fmt: skip
    """LSE of a block of rows, or of a part of its keys; -inf for a row that sees nothing."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance, aux)
    i_block, i_seq = panel_place(heavy_first(), n_blocks, sequences, sequences.cu_seqlens_q, max_seqlen_q, BM)
    row, first_m, m, _, first_n, n, _ = bounds(sequences, i_seq)
    o_query = i_block * BM + tl.arange(0, BM)
    o_position, m_row = o_query + n - m, o_query < m
    b_q = load_rows(q, row_pointers(q, row, 0, first_m + o_query), m_row, SIZES.S, SIZES.BS, False)
    b_scale, p_bias = scales(rule, o_position, n, SCALING), bias_pointer(rule, row)
    p_k = row_pointers(k, row, 0, first_n)
    last = tl.minimum(i_block * BM + BM, m) - 1
    _, _, full_stop, stop = keys_seen(rule, i_block * BM + n - m, last + n - m, n, BN)
    first, stop = share_of(stop, n_parts, BN)
    full_stop = tl.minimum(tl.maximum(full_stop, first), stop)
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for phase in tl.static_range(2):  # unmasked blocks, then masked ones
        for j in range(first if phase == 0 else full_stop, full_stop if phase == 0 else stop, BN):
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
    p_lse = lse + tl.cast(tl.program_id(1), tl.int64) * n_rows + tl.cast(row, tl.int64) * max_seqlen_q
    tl.store(p_lse + first_m + o_query, b_lse, mask=m_row)


@guarded
@triton.jit(do_not_specialize=VARYING)
def probs_kernel(
    q, k, lse, panel, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, aux, n_blocks, first_block, n_across, panel_width,
    SIZES: tl.constexpr,  # S, BS, BM, BN, PRECISION, and a user's functions
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """Every n_across-th block of keys of a slot of the panel (slots, BM, keys): A, up to the last key that a row
    sees."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance, aux)
    i_slot = heavy_first() // n_across
    i_block, i_seq = panel_place(first_block + i_slot, n_blocks, sequences, sequences.cu_seqlens_q, max_seqlen_q, BM)
    row, first_m, m, _, first_n, n, _ = bounds(sequences, i_seq)
    last = tl.minimum(i_block * BM + BM, m) - 1
    _, _, _, stop = keys_seen(rule, i_block * BM + n - m, last + n - m, n, BN)
    o_query = i_block * BM + tl.arange(0, BM)
    o_position, m_row = o_query + n - m, o_query < m
    b_q = load_rows(q, row_pointers(q, row, 0, first_m + o_query), m_row, SIZES.S, SIZES.BS, False)
    b_lse = load_lse(lse, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
    b_scale, p_bias = scales(rule, o_position, n, SCALING), bias_pointer(rule, row)
    p_k = row_pointers(k, row, 0, first_n)
    for j in range(heavy_first() % n_across * BN, stop, n_across * BN):
        o_key = j + tl.arange(0, BN)
        b_a = probs_block(b_q, b_scale, b_lse, k, p_k, rule, p_bias, o_position, o_key, n, SIZES, SCORE, True)
        tl.store(panel_pointers(panel, i_slot, panel_width, o_key, BM), b_a.to(panel.dtype.element_ty))


@guarded
@triton.jit(do_not_specialize=VARYING)
def product_kernel(
    q, k, v, gate, lse, panel, product, out,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, aux, n_blocks, first_block, panel_width, n_parts,
    SIZES: tl.constexpr,  # S, E, BS, BE, BM, BN, GATE, PRECISION, FACTORS
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """X = A V and act(gate) * X of a block of rows and a tile of columns; without a panel, A is computed here.

    With parts, those of the second axis of the grid, a program has some of the keys, and their X is all it writes.
    """
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance, aux)
    n_tiles = tl.cdiv(SIZES.E, SIZES.BE)
    i_slot = heavy_first() // n_tiles
    o_column = heavy_first() % n_tiles * SIZES.BE + tl.arange(0, SIZES.BE)
    i_block, i_seq = panel_place(first_block + i_slot, n_blocks, sequences, sequences.cu_seqlens_q, max_seqlen_q, BM)
    row, first_m, m, stored, first_n, n, _ = bounds(sequences, i_seq)
    if i_block * BM >= stored:
        return
    o_query = i_block * BM + tl.arange(0, BM)
    o_position, m_row = o_query + n - m, o_query < m
    last = tl.minimum(i_block * BM + BM, m) - 1
    _, _, full_stop, stop = keys_seen(rule, i_block * BM + n - m, last + n - m, n, BN)
    first, stop = share_of(stop, n_parts, BN)
    p_v = row_pointers(v, row, 0, first_n)
    b_acc = tl.zeros([BM, SIZES.BE], tl.float32)
    if panel is not None:
        for j in range(first, stop, BN):
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
        full_stop = tl.minimum(tl.maximum(full_stop, first), stop)
        for phase in tl.static_range(2):  # unmasked blocks, then masked ones
            for j in range(first if phase == 0 else full_stop, full_stop if phase == 0 else stop, BN):
                o_key = j + tl.arange(0, BN)
                b_a = probs_block(
                    b_q, b_scale, b_lse, k, p_k, rule, p_bias, o_position, o_key, n, SIZES, SCORE, phase != 0
                )
                b_v = load_tile(v, p_v + tl.cast(o_key, tl.int64) * v.token, o_key < n, o_column, SIZES.E, SIZES.BE)
                b_a, b_v = factors(b_a, b_v)
                b_acc = tl.dot(b_a, b_v, b_acc, input_precision=SIZES.FACTORS)
    i_part = tl.program_id(1)
    store_gated(b_acc, gate, product, out, row, i_part, first_m, o_query, m, stored, o_column, SIZES)


@guarded
@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    parts, gate, product, out, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    n_blocks, n_parts,
    SIZES: tl.constexpr,  # E, BE, PARTS, GATE
):  # fmt: skip
    """X, the sum of its parts, and act(gate) * X: one row and a tile of columns, PARTS parts at once."""
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    n_tiles = tl.cdiv(SIZES.E, SIZES.BE)
    i_row, _, i_seq = place(
        tl.program_id(0) // n_tiles, n_blocks, 1, sequences, sequences.cu_seqlens_q, max_seqlen_q, 1, 1
    )
    row, first_m, m, stored, _, _, _ = bounds(sequences, i_seq)
    if i_row >= stored:
        return
    o_column = tl.program_id(0) % n_tiles * SIZES.BE + tl.arange(0, SIZES.BE)
    p_parts = row_pointers(parts, row, 0, first_m + i_row)
    b_x = tl.zeros([SIZES.BE], tl.float32)
    for first in range(0, n_parts, SIZES.PARTS):
        o_part = first + tl.arange(0, SIZES.PARTS)
        p_part = p_parts + tl.cast(o_part, tl.int64) * parts.head
        b_x += tl.sum(load_tile(parts, p_part, o_part < n_parts, o_column, SIZES.E, SIZES.BE), 0)
    o_query = i_row + tl.arange(0, 1)
    store_gated(b_x[None, :], gate, product, out, row, 0, first_m, o_query, m, stored, o_column, SIZES)


# ---------------------------------------------------------------- backward


@triton.jit
def fill_panels(
    b_da, q, k, lse, delta, panel, dpanel, dbias_panel, rule, row, first_m, m, first_n, n, max_seqlen_q, i_slot,
    panel_width, o_query, o_key, SIZES: tl.constexpr, SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """Write A^T and scale dS^T of a block of keys and a block of queries."""
    o_position, m_row = o_query + n - m, o_query < m
    b_q = load_rows(q, row_pointers(q, row, 0, first_m + o_query), m_row, SIZES.S, SIZES.BS, False)
    b_k = load_rows(k, row_pointers(k, row, 0, first_n + o_key), o_key < n, SIZES.S, SIZES.BS, False)
    b_kq = tl.dot(b_k, b_q.T, input_precision=SIZES.PRECISION)
    b_scale, p_bias = scales(rule, o_position, n, SCALING)[None, :], bias_pointer(rule, row)
    b_s, b_slope = scores(b_kq, b_scale, rule, p_bias, o_position[None, :], o_key[:, None], n, True, SIZES)
    b_lse = load_lse(lse, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
    b_delta = load_lse(delta, row, max_seqlen_q, first_m + o_query, m_row, SCORE)
    if SIZES.WEIGHT_MOD is not None:
        b_a = own_weights(b_s, SIZES)
        b_ds = b_da * own_weight_slopes(b_s, SIZES)
    else:
        b_a = probs(b_s, b_lse[None, :], SCORE)
        b_ds = score_gradient(b_da, b_s, b_a, tl.where(m_row, b_delta, 0.0)[None, :], SCORE)
    if dbias_panel is not None:
        p_bias_panel = panel_pointers(dbias_panel, i_slot, panel_width, o_query, SIZES.BN)
        tl.store(p_bias_panel, b_ds.to(dbias_panel.dtype.element_ty))
    b_ds *= b_scale
    if SIZES.SCORE_MOD is not None:
        b_ds *= b_slope
    tl.store(panel_pointers(panel, i_slot, panel_width, o_query, SIZES.BN), b_a.to(panel.dtype.element_ty))
    tl.store(panel_pointers(dpanel, i_slot, panel_width, o_query, SIZES.BN), b_ds.to(dpanel.dtype.element_ty))


@guarded
@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    q, k, v, dx, lse, delta, panel, dpanel, dbias_panel,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, bias, bias_batch, max_distance, aux, n_blocks, first_block, n_across, panel_width,
    SIZES: tl.constexpr,  # S, E, BS, BE, BM, BN, PRECISION, and a user's functions
    SCORE: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """Every n_across-th block of queries of a slot of both panels (slots, BN keys, queries): A^T, and scale dS^T from
    dA = dX V^T.

    A bias is added after the scale and a user's function of the scores: its panel, if there is one, is without them.
    More than 128 queries are two products that share V: one that wide would not leave registers for their addresses.
    """
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    HALF: tl.constexpr = min(BM, 128)
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, bias, bias_batch, max_distance, aux)
    i_slot = tl.program_id(0) // n_across
    i_block, i_seq = panel_place(first_block + i_slot, n_blocks, sequences, sequences.cu_seqlens_k, max_seqlen_k, BN)
    row, first_m, m, _, first_n, n, _ = bounds(sequences, i_seq)
    start, _, _, stop = rows_seeing(rule, i_block * BN, tl.minimum(i_block * BN + BN, n) - 1, m, n, BM)
    o_key = i_block * BN + tl.arange(0, BN)
    p_v = row_pointers(v, row, 0, first_n + o_key)
    for first_row in range(start + tl.program_id(0) % n_across * BM, stop, n_across * BM):
        o_query = first_row + tl.arange(0, HALF)
        p_dx = row_pointers(dx, row, 0, first_m + o_query)
        b_da = tl.zeros([BN, HALF], tl.float32)
        b_rest = b_da
        for column in range(0, SIZES.E, SIZES.BE):
            o_column = column + tl.arange(0, SIZES.BE)
            b_v = load_tile(v, p_v, o_key < n, o_column, SIZES.E, SIZES.BE)
            b_dx = load_tile(dx, p_dx, o_query < m, o_column, SIZES.E, SIZES.BE)
            b_da = tl.dot(b_v, b_dx.T, b_da, input_precision=SIZES.PRECISION)
            if BM > HALF:
                p_rest = p_dx + tl.cast(HALF, tl.int64) * dx.token
                b_dx = load_tile(dx, p_rest, o_query + HALF < m, o_column, SIZES.E, SIZES.BE)
                b_rest = tl.dot(b_v, b_dx.T, b_rest, input_precision=SIZES.PRECISION)
        for half in tl.static_range(BM // HALF):
            fill_panels(
                b_da if half == 0 else b_rest, q, k, lse, delta, panel, dpanel, dbias_panel, rule, row, first_m, m,
                first_n, n, max_seqlen_q, i_slot, panel_width, o_query + half * HALF, o_key, SIZES, SCORE, SCALING,
            )  # fmt: skip


@triton.jit
def product_of_keys(
    panel, x, out, rule, sequences, i_slot, i_block, i_seq, panel_width, i_tile,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """out = P^T X of a block of keys of a panel and a tile of columns."""
    BN: tl.constexpr = SIZES.BN
    row, first_m, m, _, first_n, n, stored = bounds(sequences, i_seq)
    o_key, o_column = i_block * BN + tl.arange(0, BN), i_tile * BLOCK + tl.arange(0, BLOCK)
    start, _, _, stop = rows_seeing(rule, i_block * BN, tl.minimum(i_block * BN + BN, n) - 1, m, n, SIZES.BK)
    p_x = row_pointers(x, row, 0, first_m)
    b_acc = tl.zeros([BN, BLOCK], tl.float32)
    for r in range(start, stop, SIZES.BK):
        o_query = r + tl.arange(0, SIZES.BK)
        b_p = tl.load(panel_pointers(panel, i_slot, panel_width, o_query, BN))
        b_x = load_tile(x, p_x + tl.cast(o_query, tl.int64) * x.token, o_query < m, o_column, WIDTH, BLOCK)
        b_p, b_x = factors(b_p, b_x)
        b_acc = tl.dot(b_p, b_x, b_acc, input_precision=SIZES.FACTORS)
    b_acc = tl.where((o_key < n)[:, None], b_acc, 0.0)
    store_tile(out, row_pointers(out, row, 0, first_n + o_key), o_key < stored, o_column, b_acc, WIDTH, BLOCK)


@guarded
@triton.jit(do_not_specialize=VARYING)
def dkv_kernel(
    panel, dpanel, dx, q, dv, dk, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    right, n_blocks, first_block, n_slots, panel_width,
    SIZES: tl.constexpr,  # S, E, BS, BE, BN, BK, FACTORS
):  # fmt: skip
    """dV = A^T dX or, behind all tiles of it, dK = (scale dS)^T Q: a block of keys of a panel, a tile of columns."""
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, 0.0, None, 0, 0)
    n_tiles, n_narrow = tl.cdiv(SIZES.E, SIZES.BE), tl.cdiv(SIZES.S, SIZES.BS)
    wide = tl.program_id(0) < n_slots * n_tiles
    i_tile = tl.program_id(0) - tl.where(wide, 0, n_slots * n_tiles)
    i_slot = i_tile // tl.where(wide, n_tiles, n_narrow)
    i_tile = i_tile % tl.where(wide, n_tiles, n_narrow)
    i_block, i_seq = panel_place(first_block + i_slot, n_blocks, sequences, sequences.cu_seqlens_k, max_seqlen_k, BN)
    _, _, _, _, _, _, stored = bounds(sequences, i_seq)
    if i_block * BN >= stored:
        return
    if wide:
        product_of_keys(
            panel, dx, dv, rule, sequences, i_slot, i_block, i_seq, panel_width, i_tile, SIZES.E, SIZES.BE, SIZES
        )
    else:
        product_of_keys(
            dpanel, q, dk, rule, sequences, i_slot, i_block, i_seq, panel_width, i_tile, SIZES.S, SIZES.BS, SIZES
        )


@guarded
@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    dpanel, k, sums, dq, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    right, n_blocks, first_block, last_block, panel_width,
    SIZES: tl.constexpr,  # S, BS, BM, BN, FACTORS
):  # fmt: skip
    """dQ = (scale dS) K of a block of rows, over the keys of a panel, the places first_block..last_block. Where another
    panel has more of the rows' keys, it goes on from `sums`."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, 0.0, None, 0, 0)
    i_block, i_seq = panel_place(heavy_first(), n_blocks, sequences, sequences.cu_seqlens_q, max_seqlen_q, BM)
    row, first_m, m, stored, first_n, n, _ = bounds(sequences, i_seq)
    last = tl.minimum(i_block * BM + BM, m) - 1
    _, _, _, stop = keys_seen(rule, i_block * BM + n - m, last + n - m, n, BN)
    seen = tl.cdiv(stop, BN)
    first, step = places_of_keys(sequences, i_seq, BN)
    low, high = blocks_between(first_block, last_block, first, step)
    high = tl.minimum(high, seen)
    if (low >= high) & ((seen > 0) | (first_block > 0)):  # of rows that see nothing the first panel writes zeros
        return
    o_query, o_column = i_block * BM + tl.arange(0, BM), tl.arange(0, SIZES.BS)
    b_acc = tl.zeros([BM, SIZES.BS], tl.float32)
    for i in range(low, high):
        o_key = i * BN + tl.arange(0, BN)
        b_ds = tl.load(panel_pointers(dpanel, first + i * step - first_block, panel_width, o_query, BN))
        b_k = load_rows(k, row_pointers(k, row, 0, first_n + o_key), o_key < n, SIZES.S, SIZES.BS, False)
        b_ds, b_k = factors(b_ds, b_k)
        b_acc = tl.dot(b_ds.T, b_k, b_acc, input_precision=SIZES.FACTORS)
    m_row = o_query < m
    if sums is not None:
        p_sums = row_pointers(sums, row, 0, first_m + o_query)
        if low > 0:
            b_acc += load_tile(sums, p_sums, m_row, o_column, SIZES.S, SIZES.BS)
        if high < seen:
            store_tile(sums, p_sums, m_row, o_column, b_acc, SIZES.S, SIZES.BS)
            return
    b_acc = tl.where(m_row[:, None], b_acc, 0.0)
    p_dq = row_pointers(dq, row, 0, first_m + o_query)
    store_tile(dq, p_dq, o_query < stored, o_column, b_acc, SIZES.S, SIZES.BS)


@guarded
@triton.jit(do_not_specialize=VARYING)
def dbias_kernel(
    dpanel, dbias, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, right, max_distance, n_blocks, n_across, first_block, last_block, panel_width,
    BD: tl.constexpr, BN: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """dBias += dS of a panel's keys, summed along a block of BD diagonals j - p. The panel has dS with SCALING."""
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, scale, None, 0, 0)
    i_batch = tl.program_id(0) // n_across
    o_bias = tl.program_id(0) % n_across * BD + tl.arange(0, BD)
    first = i_batch
    step = n_sequences
    if sequences.cu_seqlens_q is not None:  # all blocks, of all sequences
        first = 0
        step = 1
    low, high = blocks_between(first_block, last_block, first, step)
    b_dbias = tl.zeros([BD], tl.float32)
    for j in range(low, high):
        i = first + j * step
        i_block, i_seq = panel_place(i, n_blocks, sequences, sequences.cu_seqlens_k, max_seqlen_k, BN)
        _, _, m, _, _, n, _ = bounds(sequences, i_seq)
        o_key = (i_block * BN + tl.arange(0, BN))[:, None]
        o_position = o_key - (o_bias - max_distance)[None, :]
        o_query = o_position - (n - m)
        mask = is_visible(rule, o_position, o_key, n) & (o_query >= 0) & (o_query < m)
        o_row = tl.cast(i - first_block, tl.int64) * BN + tl.arange(0, BN)
        b_ds = tl.load(dpanel + o_row[:, None] * panel_width + o_query, mask=mask, other=0.0)
        b_ds = b_ds.to(tl.float32)
        if SCALING is not None:
            b_ds *= 1.0 / scales(rule, o_position, n, SCALING)
        b_dbias += tl.sum(b_ds, 0)
    width = 2 * max_distance + 1
    p_dbias = dbias + tl.cast(i_batch, tl.int64) * width + o_bias
    tl.store(p_dbias, b_dbias + tl.load(p_dbias, mask=o_bias < width, other=0.0), mask=o_bias < width)

"""Tangents and second derivatives of attention, with a softmax or with elementwise weights, by one set of kernels.

With S = scale q k^T, capped, + bias, weights A = f(S) and O = (A D) v, D of dropout, along tangents of q, k, v and bias

    tS = s' scale (tq k^T + q tk^T) + tbias         tO = (tA D) v + (A D) tv,  tA = f'(S) (tS - mu)

mu is rowsum(P tS) of a softmax P, the tangent of its LSE, and 0 of elementwise weights. The second derivatives are the
gradients of <g, tO> + <gamma, mu>. With dA = D (g v^T) and tdA = D (g tv^T), the gradients of tS and of S are

    dtS = f'(S) (dA - delta)         dS = f''(S) (tS - mu) (dA - delta) + f'(S) (tdA - kappa)

Of a softmax f, f' and f'' are all P, delta = rowsum(P dA) - gamma, and kappa = rowsum(P ((tS - mu) dA + tdA)); of
elementwise weights delta and kappa are 0. There P is exp(S - LSE) over its sum: the rounding of an LSE moves all of a
row alike, which differences such as tS - mu would not survive. What dtS and dS say of q k^T and of its tangent gives
the results:

    d(tq k^T + q tk^T) = scale s' dtS         d(q k^T) = scale (s' dS + s'' tS dtS), where tS is without s' and bias

    tangent       rows, over the keys they see: tO and mu, a tile of columns at a time
    statistics    rows of a softmax: 1 / sum of exp(S - LSE), mu, delta and kappa
    second_dq     rows, over the keys they see
    second_dk     keys, over the rows that see them
    second_dv     the same, a tile of columns at a time
    second_dbias  diagonals of a relative bias, over the queries

A sink is a key with the value 0. Rows and keys are as in `attention_kernels.py`: nothing is as large as all pairs, and
each result has one writer. Gated attention has one head, and values of any width, of which tiles are read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_kernels import (
    AttentionRule,
    bias_pointers,
    block_of_rows,
    kept_at,
    keys_of_block,
    queries_at,
    row_offsets,
    rows_of_block,
)
from .common import (
    VARYING,
    Sequences,
    bounds,
    is_visible,
    load_rows,
    place,
    products,
    row_pointers,
    rows_seeing,
    store_rows,
    tanh,
    toeplitz,
)
from .gated import factors, load_tile, probs, store_tile
from .gau_kernels import scales
from .guarded import guarded


class Tensors(NamedTuple):
    """What the kernels read: operands, tangents, and the gradient of the tangent of the result, as `Heads`."""

    q: Any
    k: Any
    v: Any
    tq: Any
    tk: Any
    tv: Any
    g: Any = None
    tbias: Any = None  # pointer, with the strides of the bias
    tsinks: Any = None  # pointer to (Hq,)


class Statistics(NamedTuple):
    """Of the rows of a softmax, pointers to (B, Hq, M) in fp32. What is None is 0."""

    lse: Any = None
    inverse: Any = None  # of the sum of exp(S - LSE), which is 1 but for rounding
    mu: Any = None
    delta: Any = None
    kappa: Any = None


class Rows(NamedTuple):
    """A block of rows: each one's query, head, position, whether it is in range, and what it multiplies."""

    o_query: Any
    o_head: Any
    o_position: Any
    m_row: Any
    o_flat: Any  # where the rows are in (B, Hq, M)
    p_g: Any
    p_bias: Any
    p_tbias: Any
    b_scale: Any
    b_q: Any
    b_tq: Any


class Keys(NamedTuple):
    """A block of keys."""

    o_key: Any
    m_key: Any
    p_v: Any
    p_tv: Any
    b_k: Any
    b_tk: Any


# ---------------------------------------------------------------- blocks


@triton.jit
def rows_along(
    tensors, rule, sequences, i_seq, row, first_m, n, o_query, o_head, o_position, m_row, n_heads, SIZES: tl.constexpr
):
    """A block of rows, with their queries."""
    p_q = row_pointers(tensors.q, row, o_head, first_m + o_query)
    p_tq = row_pointers(tensors.tq, row, o_head, first_m + o_query)
    p_g = p_q
    if tensors.g is not None:
        p_g = row_pointers(tensors.g, row, o_head, first_m + o_query)
    tilt = AttentionRule(
        rule.scale, None, None, None, tensors.tbias, rule.bias_batch, rule.bias_head, rule.max_distance
    )
    return Rows(
        o_query, o_head, o_position, m_row,
        row_offsets(sequences, i_seq, 0, n_heads, o_query, o_head, first_m, row),
        p_g, bias_pointers(rule, row, o_head), bias_pointers(tilt, row, o_head),
        scales(rule, o_position, n, SIZES.SCALING),
        load_rows(tensors.q, p_q, m_row, SIZES.D, SIZES.BD, False),
        load_rows(tensors.tq, p_tq, m_row, SIZES.D, SIZES.BD, False),
    )  # fmt: skip


@triton.jit
def keys_along(tensors, row, i_head, first_n, o_key, m_key, SIZES: tl.constexpr):
    """A block of keys, with pointers to their values."""
    p_k = row_pointers(tensors.k, row, i_head, first_n + o_key)
    p_tk = row_pointers(tensors.tk, row, i_head, first_n + o_key)
    return Keys(
        o_key, m_key,
        row_pointers(tensors.v, row, i_head, first_n + o_key),
        row_pointers(tensors.tv, row, i_head, first_n + o_key),
        load_rows(tensors.k, p_k, m_key, SIZES.D, SIZES.BD, False),
        load_rows(tensors.tk, p_tk, m_key, SIZES.D, SIZES.BD, False),
    )  # fmt: skip


@triton.jit
def numbers_of(rows, numbers):
    """A number for each row, 0 out of range; zeros if there are none."""
    b_x = tl.zeros(rows.o_query.shape, tl.float32)
    if numbers is not None:
        b_x = tl.load(numbers + rows.o_flat, mask=rows.m_row, other=0.0)
    return b_x


@triton.jit
def lse_of(rows, lse):
    """The LSE of rows, -inf of those that see nothing or are out of range; zeros for elementwise weights."""
    b_lse = tl.zeros(rows.o_query.shape, tl.float32)
    if lse is not None:
        b_lse = tl.load(lse + rows.o_flat, mask=rows.m_row, other=-float("inf"))
    return b_lse


# ---------------------------------------------------------------- scores and weights


@triton.jit
def scores_along(rows, keys, tensors, rule, n, SIZES: tl.constexpr):
    """S of a block, -inf where hidden; tS, 0 there; s', and s'' times the tangent of the scaled product."""
    b_s = tl.dot(rows.b_q, keys.b_k.T, input_precision=SIZES.PRECISION)
    b_ts = tl.dot(rows.b_tq, keys.b_k.T, input_precision=SIZES.PRECISION)
    b_ts = tl.dot(rows.b_q, keys.b_tk.T, b_ts, input_precision=SIZES.PRECISION)
    b_s *= rows.b_scale[:, None]
    b_ts *= rows.b_scale[:, None]
    b_slope = 1.0
    b_bend = 0.0
    if rule.softcap is not None:
        b_t = tanh(b_s / rule.softcap)
        b_slope = 1 - b_t * b_t
        b_bend = -2 * b_t * b_slope / rule.softcap * b_ts
        b_s = b_t * rule.softcap
        b_ts *= b_slope
    o_position, o_key = rows.o_position[:, None], keys.o_key[None, :]
    m_there = (o_key < n) & (o_position < n)  # elsewhere a bias is undefined
    if rule.bias is not None:
        b_s += toeplitz(rows.p_bias[:, None], o_key - o_position, rule.max_distance, m_there)
    if tensors.tbias is not None:
        b_ts += toeplitz(rows.p_tbias[:, None], o_key - o_position, rule.max_distance, m_there)
    m_seen = is_visible(rule, o_position, o_key, n) & keys.m_key[None, :]
    return tl.where(m_seen, b_s, -float("inf")), tl.where(m_seen, b_ts, 0.0), b_slope, b_bend


@triton.jit
def weights(rows, statistics, b_s, SCORE: tl.constexpr):
    """f(S), f'(S) and f''(S) of a block of scores."""
    b_a = probs(b_s, lse_of(rows, statistics.lse)[:, None], SCORE)
    if statistics.inverse is not None:
        b_a *= numbers_of(rows, statistics.inverse)[:, None]
    b_first = b_a
    b_second = b_a
    if SCORE == "relu2":
        b_first = tl.where(b_s < 0, 0.0, 2 * b_s)
        b_second = tl.where(b_s <= 0, 0.0, 2.0)
    elif SCORE == "laplace":
        b_z = tl.where(b_s == -float("inf"), 0.0, b_s - 0.7071067811865476)
        b_first = tl.where(b_s == -float("inf"), 0.0, 1.4142135623730951 * tl.exp(-6.283185307179586 * b_z * b_z))
        b_second = -12.566370614359172 * b_z * b_first
    return b_a, b_first, b_second


@triton.jit
def dropped(b_x, rows, keys, rule, i_seq, SIZES: tl.constexpr, COLUMNS: tl.constexpr):
    """A block times D."""
    if rule.seed is not None:
        b_x *= kept_at(rule, i_seq, rows.o_head[:, None], rows.o_query, keys.o_key, SIZES.BM, COLUMNS)
    return b_x


@triton.jit
def weight_gradients(rows, keys, tensors, rule, i_seq, SIZES: tl.constexpr, COLUMNS: tl.constexpr):
    """dA and its tangent of a block, over all columns of the values."""
    b_da = tl.zeros([SIZES.BM, COLUMNS], tl.float32)
    b_tda = tl.zeros([SIZES.BM, COLUMNS], tl.float32)
    for first in range(0, SIZES.E, SIZES.BE):
        o_column = first + tl.arange(0, SIZES.BE)
        b_g = load_tile(tensors.g, rows.p_g, rows.m_row, o_column, SIZES.E, SIZES.BE)
        b_v = load_tile(tensors.v, keys.p_v, keys.m_key, o_column, SIZES.E, SIZES.BE)
        b_da = tl.dot(b_g, b_v.T, b_da, input_precision=SIZES.PRECISION)
        b_tv = load_tile(tensors.tv, keys.p_tv, keys.m_key, o_column, SIZES.E, SIZES.BE)
        b_tda = tl.dot(b_g, b_tv.T, b_tda, input_precision=SIZES.PRECISION)
    b_da = dropped(b_da, rows, keys, rule, i_seq, SIZES, COLUMNS)
    return b_da, dropped(b_tda, rows, keys, rule, i_seq, SIZES, COLUMNS)


@triton.jit
def sink_along(rows, b_lse, tensors, rule):
    """The probability of a sink, and its tangent."""
    b_p = tl.zeros(rows.o_query.shape, tl.float32)
    b_ts = tl.zeros(rows.o_query.shape, tl.float32)
    if rule.sinks is not None:
        b_p = probs(tl.load(rule.sinks + rows.o_head).to(tl.float32), b_lse, "softmax")
    if tensors.tsinks is not None:
        b_ts += tl.load(tensors.tsinks + rows.o_head).to(tl.float32)
    return b_p, b_ts


@triton.jit
def over(b_x, b_sum):
    """x / sum; of rows that see nothing x."""
    return b_x / tl.where(b_sum == 0, 1.0, b_sum)


@triton.jit
def score_gradients(rows, keys, tensors, statistics, rule, i_seq, n, SIZES: tl.constexpr, COLUMNS: tl.constexpr):
    """Gradients of a block of S, of q k^T and of its tangent."""
    b_s, b_ts, b_slope, b_bend = scores_along(rows, keys, tensors, rule, n, SIZES)
    b_da, b_tda = weight_gradients(rows, keys, tensors, rule, i_seq, SIZES, COLUMNS)
    _, b_first, b_second = weights(rows, statistics, b_s, SIZES.SCORE)
    b_ts -= numbers_of(rows, statistics.mu)[:, None]
    b_da -= numbers_of(rows, statistics.delta)[:, None]
    b_tda -= numbers_of(rows, statistics.kappa)[:, None]
    b_dts = b_first * b_da
    b_ds = b_second * b_ts * b_da + b_first * b_tda
    b_dx = (b_ds * b_slope + b_dts * b_bend) * rows.b_scale[:, None]
    return b_ds, b_dx, b_dts * b_slope * rows.b_scale[:, None]


@triton.jit
def add_product(b_a, b_x, b_sum, SIZES: tl.constexpr):
    """sum + A X, in the precision of products of weights."""
    b_a, b_x = factors(b_a, b_x)
    return tl.dot(b_a, b_x, b_sum, input_precision=SIZES.FACTORS)


# ---------------------------------------------------------------- the tangent


@guarded
@triton.jit(do_not_specialize=VARYING)
def tangent_kernel(
    tensors, lse, out, tlse, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_kv_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, FACTORS, SCORE, SCALING
):  # fmt: skip
    """tO of a block of rows and a tile of columns, and tLSE.

    For a softmax O is summed beside, and tO about the mean of tS so far: of a sum about zero, which mu O would be taken
    from in the end, only the rounding would be left where one key has all weight.
    """
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = AttentionRule(
        scale, left, right, softcap, bias, bias_batch, bias_head, max_distance, sinks, seed, threshold, dropout_scale,
        aux,
    )  # fmt: skip
    i_block, i_head, i_seq, row, first_m, m, stored, first_n, n = block_of_rows(sequences, n_blocks, n_kv_heads, SIZES)
    if i_block < 0:
        return
    o_query, o_head, o_position, m_row = rows_of_block(i_block, i_head, m, n, SIZES)
    rows = rows_along(
        tensors, rule, sequences, i_seq, row, first_m, n, o_query, o_head, o_position, m_row,
        n_kv_heads * SIZES.GROUPS, SIZES,
    )  # fmt: skip
    o_column = tl.program_id(1) * SIZES.BE + tl.arange(0, SIZES.BE)
    b_out = tl.zeros([BM, SIZES.BE], tl.float32)
    b_tout = tl.zeros([BM, SIZES.BE], tl.float32)
    b_sum, b_mu = sink_along(rows, lse_of(rows, lse), tensors, rule)
    b_mu = tl.where(b_sum == 0, 0.0, b_mu)  # of what is no row
    b_rest = tl.zeros([BM], tl.float32)
    start, _whole, _last, stop = keys_of_block(rule, i_block, m, n, SIZES)
    for j in range(start, stop, BN):
        o_key = j + tl.arange(0, BN)
        keys = keys_along(tensors, row, i_head, first_n, o_key, o_key < n, SIZES)
        b_s, b_ts, _slope, _bend = scores_along(rows, keys, tensors, rule, n, SIZES)
        b_a, b_ta, _second = weights(rows, Statistics(lse), b_s, SIZES.SCORE)
        if SIZES.SCORE == "softmax":
            b_more = tl.sum(b_a + 0.0, 1)
            b_step = over(tl.sum(products(b_a, b_ts), 1) - b_mu * b_more, b_sum + b_more)
            b_mu += b_step
            b_tout -= b_step[:, None] * b_out
            b_ts -= b_mu[:, None]
            b_rest += tl.sum(products(b_a, b_ts), 1) - b_step * b_sum
            b_sum += b_more
        b_ta *= b_ts
        b_a = dropped(b_a, rows, keys, rule, i_seq, SIZES, BN)
        b_ta = dropped(b_ta, rows, keys, rule, i_seq, SIZES, BN)
        b_v = load_tile(tensors.v, keys.p_v, keys.m_key, o_column, SIZES.E, SIZES.BE)
        b_tv = load_tile(tensors.tv, keys.p_tv, keys.m_key, o_column, SIZES.E, SIZES.BE)
        b_tout = add_product(b_ta, b_v, b_tout, SIZES)
        b_tout = add_product(b_a, b_tv, b_tout, SIZES)
        if SIZES.SCORE == "softmax":
            b_out = add_product(b_a, b_v, b_out, SIZES)
    if SIZES.SCORE == "softmax":
        b_tout -= b_rest[:, None] * b_out
    m_stored = o_query < stored
    b_tout = tl.where(m_row[:, None], b_tout, 0.0)
    store_tile(out, row_pointers(out, row, o_head, first_m + o_query), m_stored, o_column, b_tout, SIZES.E, SIZES.BE)
    if tlse is not None:
        m_first = 0 * o_query + tl.program_id(1) == 0  # of a row's programs
        tl.store(tlse + rows.o_flat, b_mu + b_rest, mask=m_stored & m_first)


# ---------------------------------------------------------------- second derivatives


@guarded
@triton.jit(do_not_specialize=VARYING)
def statistics_kernel(
    tensors, lse, dlse, inverse, mu, delta, kappa,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_kv_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, SCORE, SCALING
):  # fmt: skip
    """The `Statistics` of a block of rows of a softmax, in fp32 sums over the keys they see."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = AttentionRule(
        scale, left, right, softcap, bias, bias_batch, bias_head, max_distance, sinks, seed, threshold, dropout_scale,
        aux,
    )  # fmt: skip
    i_block, i_head, i_seq, row, first_m, m, stored, first_n, n = block_of_rows(sequences, n_blocks, n_kv_heads, SIZES)
    if i_block < 0:
        return
    o_query, o_head, o_position, m_row = rows_of_block(i_block, i_head, m, n, SIZES)
    rows = rows_along(
        tensors, rule, sequences, i_seq, row, first_m, n, o_query, o_head, o_position, m_row,
        n_kv_heads * SIZES.GROUPS, SIZES,
    )  # fmt: skip
    b_lse = lse_of(rows, lse)
    b_sum, b_mu = sink_along(rows, b_lse, tensors, rule)
    b_delta = tl.zeros([BM], tl.float32)
    b_kappa = tl.zeros([BM], tl.float32)
    start, _whole, _last, stop = keys_of_block(rule, i_block, m, n, SIZES)
    for j in range(start, stop, BN):
        o_key = j + tl.arange(0, BN)
        keys = keys_along(tensors, row, i_head, first_n, o_key, o_key < n, SIZES)
        b_s, b_ts, _slope, _bend = scores_along(rows, keys, tensors, rule, n, SIZES)
        b_da, b_tda = weight_gradients(rows, keys, tensors, rule, i_seq, SIZES, BN)
        b_p = probs(b_s, b_lse[:, None], SIZES.SCORE)
        # Means of this block, and from there on sums of differences: those of uncentred products would cancel.
        b_more = tl.sum(b_p + 0.0, 1)
        b_ahead = over(tl.sum(products(b_p, b_ts), 1), b_more)
        b_level = over(tl.sum(products(b_p, b_da), 1), b_more)
        b_change = products(b_ts - b_ahead[:, None], b_da - b_level[:, None]) + b_tda
        b_kappa += tl.sum(products(b_p, b_change), 1)
        b_ahead -= b_mu
        b_level -= b_delta
        b_share = over(b_more, b_sum + b_more)
        b_kappa += b_sum * b_share * b_ahead * b_level
        b_mu += b_share * b_ahead
        b_delta += b_share * b_level
        b_sum += b_more
    b_inverse = over(1.0, b_sum)
    b_kappa *= b_inverse
    if dlse is not None:  # it may be NaN for a row without visible keys
        b_delta -= tl.load(dlse + rows.o_flat, mask=m_row & (b_lse != -float("inf")), other=0.0)
    m_stored = o_query < stored
    tl.store(inverse + rows.o_flat, b_inverse, mask=m_stored)
    tl.store(mu + rows.o_flat, b_mu, mask=m_stored)
    tl.store(delta + rows.o_flat, b_delta, mask=m_stored)
    tl.store(kappa + rows.o_flat, b_kappa, mask=m_stored)


@guarded
@triton.jit(do_not_specialize=VARYING)
def second_dq_kernel(
    tensors, statistics, dq, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_kv_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, FACTORS, SCORE, SCALING
):  # fmt: skip
    """dQ = d(q k^T) K + d(tq k^T + q tk^T) tK of a block of rows, over the keys they see."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = AttentionRule(
        scale, left, right, softcap, bias, bias_batch, bias_head, max_distance, sinks, seed, threshold, dropout_scale,
        aux,
    )  # fmt: skip
    i_block, i_head, i_seq, row, first_m, m, stored, first_n, n = block_of_rows(sequences, n_blocks, n_kv_heads, SIZES)
    if i_block < 0:
        return
    o_query, o_head, o_position, m_row = rows_of_block(i_block, i_head, m, n, SIZES)
    rows = rows_along(
        tensors, rule, sequences, i_seq, row, first_m, n, o_query, o_head, o_position, m_row,
        n_kv_heads * SIZES.GROUPS, SIZES,
    )  # fmt: skip
    b_dq = tl.zeros([BM, SIZES.BD], tl.float32)
    start, _whole, _last, stop = keys_of_block(rule, i_block, m, n, SIZES)
    for j in range(start, stop, BN):
        o_key = j + tl.arange(0, BN)
        keys = keys_along(tensors, row, i_head, first_n, o_key, o_key < n, SIZES)
        _ds, b_dx, b_dtx = score_gradients(rows, keys, tensors, statistics, rule, i_seq, n, SIZES, BN)
        b_dq = add_product(b_dx, keys.b_k, b_dq, SIZES)
        b_dq = add_product(b_dtx, keys.b_tk, b_dq, SIZES)
    b_dq = tl.where(m_row[:, None], b_dq, 0.0)
    store_rows(dq, row_pointers(dq, row, o_head, first_m + o_query), o_query < stored, b_dq, SIZES.D, SIZES.BD)


@guarded
@triton.jit(do_not_specialize=VARYING)
def second_dk_kernel(
    tensors, statistics, dk, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_kv_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, FACTORS, SCORE, SCALING
):  # fmt: skip
    """dK = d(q k^T)^T Q + d(tq k^T + q tk^T)^T tQ of a block of keys, over the rows of its heads that see them."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = AttentionRule(
        scale, left, right, softcap, bias, bias_batch, bias_head, max_distance, sinks, seed, threshold, dropout_scale,
        aux,
    )  # fmt: skip
    i_block, i_head, i_seq = place(
        tl.program_id(0), n_blocks, n_kv_heads, sequences, sequences.cu_seqlens_k, max_seqlen_k, 1, BN
    )
    row, first_m, m, _stored_m, first_n, n, stored = bounds(sequences, i_seq)
    if i_block * BN >= stored:
        return
    o_key = i_block * BN + tl.arange(0, BN)
    keys = keys_along(tensors, row, i_head, first_n, o_key, o_key < n, SIZES)
    b_dk = tl.zeros([BN, SIZES.BD], tl.float32)
    start, _whole, _last, stop = rows_seeing(rule, i_block * BN, tl.minimum(i_block * BN + BN, n) - 1, m, n, BM)
    for i_group in range(SIZES.GROUPS):
        for i in range(start, stop, BM):
            o_query = i + tl.arange(0, BM)
            o_head = 0 * o_query + i_head * SIZES.GROUPS + i_group
            rows = rows_along(
                tensors, rule, sequences, i_seq, row, first_m, n, o_query, o_head, o_query + n - m, o_query < m,
                n_kv_heads * SIZES.GROUPS, SIZES,
            )  # fmt: skip
            _ds, b_dx, b_dtx = score_gradients(rows, keys, tensors, statistics, rule, i_seq, n, SIZES, BN)
            b_dk = add_product(b_dx.T, rows.b_q, b_dk, SIZES)
            b_dk = add_product(b_dtx.T, rows.b_tq, b_dk, SIZES)
    b_dk = tl.where((o_key < n)[:, None], b_dk, 0.0)
    store_rows(dk, row_pointers(dk, row, i_head, first_n + o_key), o_key < stored, b_dk, SIZES.D, SIZES.BD)


@guarded
@triton.jit(do_not_specialize=VARYING)
def second_dv_kernel(
    tensors, statistics, dv, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_kv_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, FACTORS, SCORE, SCALING
):  # fmt: skip
    """dV = (tA D)^T g of a block of keys and a tile of columns, over the rows of its heads that see them."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = AttentionRule(
        scale, left, right, softcap, bias, bias_batch, bias_head, max_distance, sinks, seed, threshold, dropout_scale,
        aux,
    )  # fmt: skip
    i_block, i_head, i_seq = place(
        tl.program_id(0), n_blocks, n_kv_heads, sequences, sequences.cu_seqlens_k, max_seqlen_k, 1, BN
    )
    row, first_m, m, _stored_m, first_n, n, stored = bounds(sequences, i_seq)
    if i_block * BN >= stored:
        return
    o_key = i_block * BN + tl.arange(0, BN)
    keys = keys_along(tensors, row, i_head, first_n, o_key, o_key < n, SIZES)
    o_column = tl.program_id(1) * SIZES.BE + tl.arange(0, SIZES.BE)
    b_dv = tl.zeros([BN, SIZES.BE], tl.float32)
    start, _whole, _last, stop = rows_seeing(rule, i_block * BN, tl.minimum(i_block * BN + BN, n) - 1, m, n, BM)
    for i_group in range(SIZES.GROUPS):
        for i in range(start, stop, BM):
            o_query = i + tl.arange(0, BM)
            o_head = 0 * o_query + i_head * SIZES.GROUPS + i_group
            rows = rows_along(
                tensors, rule, sequences, i_seq, row, first_m, n, o_query, o_head, o_query + n - m, o_query < m,
                n_kv_heads * SIZES.GROUPS, SIZES,
            )  # fmt: skip
            b_s, b_ts, _slope, _bend = scores_along(rows, keys, tensors, rule, n, SIZES)
            _a, b_ta, _second = weights(rows, statistics, b_s, SIZES.SCORE)
            b_ta *= b_ts - numbers_of(rows, statistics.mu)[:, None]
            b_ta = dropped(b_ta, rows, keys, rule, i_seq, SIZES, BN)
            b_g = load_tile(tensors.g, rows.p_g, rows.m_row, o_column, SIZES.E, SIZES.BE)
            b_dv = add_product(b_ta.T, b_g, b_dv, SIZES)
    b_dv = tl.where((o_key < n)[:, None], b_dv, 0.0)
    store_tile(dv, row_pointers(dv, row, i_head, first_n + o_key), o_key < stored, o_column, b_dv, SIZES.E, SIZES.BE)


@guarded
@triton.jit(do_not_specialize=VARYING)
def second_dbias_kernel(
    tensors, statistics, dbias, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, SCORE, SCALING
):  # fmt: skip
    """dBias of a block of BN = BM distances j - p, over all queries: dS summed along diagonals."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    COLUMNS: tl.constexpr = BM + BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = AttentionRule(
        scale, left, right, softcap, bias, bias_batch, bias_head, max_distance, sinks, seed, threshold, dropout_scale,
        aux,
    )  # fmt: skip
    i_block = tl.program_id(0) % n_blocks
    i_head = tl.program_id(0) // n_blocks % n_heads
    i_batch = tl.program_id(0) // n_blocks // n_heads
    nearest = i_block * BN - rule.max_distance  # distance of the first diagonal
    o_step = tl.arange(0, BM)[:, None] + tl.zeros([1, BN], tl.int32)
    b_dbias = tl.zeros([BN], tl.float32)
    first_seq = i_batch
    last_seq = i_batch + 1
    if sequences.cu_seqlens_q is not None:
        last_seq = sequences.n_sequences
    for i_seq in range(first_seq, last_seq):
        row, first_m, m, _stored_m, first_n, n, _stored_n = bounds(sequences, i_seq)
        start, stop = queries_at(rule, nearest, m, n, BM, BN)
        for i in range(start, stop, BM):
            o_query = i + tl.arange(0, BM)
            o_key = i + n - m + nearest + tl.arange(0, COLUMNS)
            rows = rows_along(
                tensors, rule, sequences, i_seq, row, first_m, n, o_query, 0 * o_query + i_head, o_query + n - m,
                o_query < m, n_heads, SIZES,
            )  # fmt: skip
            m_key = (o_key >= 0) & (o_key < n)
            keys = keys_along(tensors, row, i_head // SIZES.GROUPS, first_n, o_key, m_key, SIZES)
            b_ds, _dx, _dtx = score_gradients(rows, keys, tensors, statistics, rule, i_seq, n, SIZES, COLUMNS)
            # Element (r, c) of dS is on diagonal c - r: shift row r to the left by r, and sum the columns.
            b_dbias += tl.sum(tl.gather(b_ds, o_step + tl.arange(0, BN)[None, :], 1), 0)
    o_bias = i_block * BN + tl.arange(0, BN)
    width = 2 * rule.max_distance + 1
    p_dbias = dbias + (tl.cast(i_batch, tl.int64) * n_heads + i_head) * width + o_bias
    tl.store(p_dbias, b_dbias, mask=o_bias < width)

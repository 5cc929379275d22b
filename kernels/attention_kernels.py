"""Softmax attention: FlashAttention's passes (Dao et al. 2022, algorithms 1 and 4; Dao 2023) with every option.

In the forward and for dQ, queries that share a key head are rows of the same blocks: row r of a program is query
r // GROUPS of head r % GROUPS of the group, so that one decoded token gives GROUPS rows. A program of dK and dV walks
the heads of its group, one after another, and sums over them. Keys and values are never expanded. A row sees an
interval of keys: blocks outside it are skipped, and those inside it for all rows need no mask (`common.keys_seen`).

    forward     rows, over the keys they see: running maximum and sum, then O and LSE
    merge       combines the results of split keys by their maxima and sums (few rows, many keys)
    delta       rowsum(dO * O) - dLSE, which is subtracted from a row's dP, and LSE as P's exponents subtract it
    dq          rows, over the keys they see
    dkv         keys, over the rows that see them
    dbias       diagonals of a relative bias, over the queries

The last three recompute P = exp(S - LSE). Each result has one writer and no atomics, so it is bitwise repeatable.

A user's functions (`own_scores.py`) are sizes: SCORE_MOD of a block of scores, WEIGHT_MOD in the place of softmax, and
their slopes. What is absent is compiled out. An elementwise weight has no maximum, no sum, no LSE and no delta.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    LN_2,
    LOG2_E,
    LOWEST,
    VARYING,
    Sequences,
    bounds,
    is_visible,
    keys_seen,
    load_rows,
    place,
    products,
    row_pointers,
    rows_seeing,
    store_rows,
    tanh,
    toeplitz,
)
from .glu import activate, gated_backward
from .guarded import guarded
from .own_scores import own_hidden, own_scores, own_weight_slopes, own_weights


class AttentionRule(NamedTuple):
    """Options of the scores. A field that is None is compiled out; windows and caps may change without recompiling.

    With a scale alone, a query sees every key. `right=0` is a causal mask.
    """

    scale: float
    left: Any = None  # a query at position p sees the keys p - left .. p + right
    right: Any = None
    softcap: Any = None
    bias: Any = None  # pointer to (B, Hq, 2 max_distance + 1); may be float32 when q is half
    bias_batch: int = 0
    bias_head: int = 0
    max_distance: int = 0
    sinks: Any = None  # pointer to (Hq,)
    seed: Any = None  # pointer to the seed of dropout
    threshold: int = -(2**31)  # random 32-bit words below it are dropped; less 2^31, for a signed comparison
    dropout_scale: float = 1.0  # 1 / (1 - dropout)
    aux: Any = None  # what a user's function of the scores reads


class PagedKeys(NamedTuple):
    """Where keys and values are that lie in pages, (pages, Hkv, PAGE, .): their `batch` stride is that of pages.

    Values of the table are not checked on a GPU: they are clamped, so that wrong ones read some page.
    """

    table: Any  # pointer to (sequences, pages of a sequence), contiguous
    leftpad: Any  # pointer to (sequences,): where a sequence's keys begin in its pages; None for 0
    n_pages: int


class PagesOfSequence(NamedTuple):
    """Where the keys of one sequence are."""

    paged: PagedKeys
    p_table: Any  # pointer to its row of the table
    leftpad: Any  # where its keys begin in its pages


class Beside(NamedTuple):
    """What few calls of the forward have."""

    paged: Any = None  # a PagedKeys
    gate: Any = None  # SIZES.GATE of it multiplies O,
    product: Any = None  # which itself goes here, if anywhere


@triton.jit
def is_plain(rule, SIZES: tl.constexpr):
    """Whether a score is no more than the product of its query and key, scaled."""
    return rule.softcap is None and rule.bias is None and SIZES.SCORE_MOD is None and SIZES.WEIGHT_MOD is None


@triton.jit
def directed(b_x, rule, SIZES: tl.constexpr):
    """Queries or keys, negated for a negative scale of plain scores, whose maximum is then that of the products."""
    if is_plain(rule, SIZES):
        b_x = tl.where(rule.scale < 0, -b_x, b_x)
    return b_x


@triton.jit
def exponent_factor(rule, SIZES: tl.constexpr):
    """What makes plain `scores` exponents of 2, the unit of their maxima and LSE in the kernels; else these stay
    natural, and the factor is 1. Of a scale of 0 it is the smallest number, for 0 * inf is NaN."""
    factor = 1.0
    if is_plain(rule, SIZES):
        factor = tl.maximum(tl.abs(rule.scale) * LOG2_E, 1.1754943508222875e-38).to(tl.float32)
    return factor


@triton.jit
def exponentials(b_s, b_m, factor, rule, SIZES: tl.constexpr):
    """e^(S - m). Of plain scores in one multiply-add before the exponential; else a large S must not overflow."""
    if is_plain(rule, SIZES):
        b_e = tl.exp2(b_s * factor - b_m)
    else:
        b_e = tl.exp2((b_s - b_m) * LOG2_E)
    return b_e


@triton.jit
def decay(b_m, b_new, PLAIN: tl.constexpr):
    """e^(m - m'), of maxima in base 2 for plain scores."""
    return tl.exp2(b_m - b_new) if PLAIN else tl.exp2((b_m - b_new) * LOG2_E)


@triton.jit
def log_sum(b_m, b_l, PLAIN: tl.constexpr):
    """LSE = m + log l."""
    return (b_m + tl.log2(b_l)) * LN_2 if PLAIN else b_m + tl.log(b_l)


@triton.jit
def scores(b_qk, rule, p_bias, o_head, o_position, o_key, n, MASKED: tl.constexpr, SIZES: tl.constexpr):
    """S of a block, and its slope: that of the softcap and of a user's function. Heads, positions and keys broadcast
    against the block. Plain ones are not scaled: `exponentials` do it, in one instruction with a subtraction."""
    b_slope = 1.0
    b_s = b_qk
    if not is_plain(rule, SIZES):
        b_s *= rule.scale
    if rule.softcap is not None:
        b_t = tanh(b_s / rule.softcap)
        b_slope = 1 - b_t * b_t
        b_s = b_t * rule.softcap
    if SIZES.SCORE_MOD is not None:
        b_s, b_slope = own_scores(b_s, b_slope, rule.aux, o_head, o_position, o_key, n, SIZES)
    if rule.bias is not None:
        # Out-of-range rows have positions >= n, where the bias is undefined.
        b_s += toeplitz(p_bias, o_key - o_position, rule.max_distance, (o_key < n) & (o_position < n))
    if MASKED:
        b_s = tl.where(is_visible(rule, o_position, o_key, n), b_s, -float("inf"))
    if SIZES.SCORE_MOD is not None or SIZES.WEIGHT_MOD is not None:
        b_s, b_slope = own_hidden(b_s, b_slope, o_position, o_key, n)
    return b_s, b_slope


@triton.jit
def bias_pointers(rule, row, o_head):
    """Pointers to each head's bias at distance 0; a placeholder if there is no bias."""
    p_bias = o_head
    if rule.bias is not None:
        p_bias = (
            rule.bias
            + tl.cast(row, tl.int64) * rule.bias_batch
            + tl.cast(o_head, tl.int64) * rule.bias_head
            + rule.max_distance
        )
    return p_bias


@triton.jit
def kept(rule, i_seq, o_head, o_query, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout's mask [ROWS, BLOCK] for keys from `start`, a multiple of 4: Philox-4x32-10 of seed and position.

    One counter (key // 4, query, head, sequence) gives the words of four neighbouring keys.
    """
    zero = tl.zeros([ROWS, BLOCK // 4], tl.int32)
    o_four = start // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = tl.philox(
        tl.load(rule.seed), zero + o_four[None, :], zero + o_query[:, None], zero + o_head[:, None], zero + i_seq
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= rule.threshold


@triton.jit
def kept_at(rule, i_seq, i_head, o_query, o_key, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Dropout's factor, 0 or 1/(1-p), for arbitrary keys: each element selects its own Philox word."""
    zero = tl.zeros([ROWS, COLUMNS], tl.int32)
    o_word = (zero + o_key[None, :]) & 3
    w0, w1, w2, w3 = tl.philox(
        tl.load(rule.seed), zero + (o_key >> 2)[None, :], zero + o_query[:, None], zero + i_head, zero + i_seq
    )
    word = tl.where(o_word == 0, w0, tl.where(o_word == 1, w1, tl.where(o_word == 2, w2, w3)))
    return tl.where((word ^ 0x80000000).to(tl.int32, bitcast=True) >= rule.threshold, rule.dropout_scale, 0.0)


@triton.jit
def row_offsets(sequences, i_seq, i_head, n_heads, o_query, o_head, first_m, row):
    """Offsets of rows in a contiguous (B, Hq, M) tensor, such as LSE and delta."""
    return (tl.cast(row, tl.int64) * n_heads + o_head) * sequences.max_seqlen_q + first_m + o_query


@triton.jit
def block_of_rows(sequences, n_blocks, n_kv_heads, SIZES: tl.constexpr):
    """(block of rows, key head, sequence) of a program, and the `bounds` of the sequence.

    Of a causal mask, blocks with the most keys come first. A negative block has nothing to do.
    """
    GROUPS: tl.constexpr = SIZES.GROUPS
    BM: tl.constexpr = SIZES.BM
    i_block, i_head, i_seq = place(
        tl.program_id(0), n_blocks, n_kv_heads, sequences, sequences.cu_seqlens_q, sequences.max_seqlen_q, GROUPS, BM
    )  # fmt: skip
    row, first_m, m, stored, first_n, n, _stored_n = bounds(sequences, i_seq)
    i_block = (stored * GROUPS + BM - 1) // BM - 1 - i_block
    return i_block, i_head, i_seq, row, first_m, m, stored, first_n, n


@triton.jit
def rows_of_block(i_block, i_head, m, n, SIZES: tl.constexpr):
    """Query, head and position of each row, and whether it is in range."""
    o_row = i_block * SIZES.BM + tl.arange(0, SIZES.BM)
    o_query, o_head = o_row // SIZES.GROUPS, i_head * SIZES.GROUPS + o_row % SIZES.GROUPS
    return o_query, o_head, o_query + n - m, o_query < m


@triton.jit
def keys_of_block(rule, i_block, m, n, SIZES: tl.constexpr):
    """Blocks of keys that a block of rows sees, as `in_blocks` returns them."""
    last = tl.minimum((i_block * SIZES.BM + SIZES.BM - 1) // SIZES.GROUPS, m - 1)
    return keys_seen(rule, i_block * SIZES.BM // SIZES.GROUPS + n - m, last + n - m, n, SIZES.BN)


@triton.jit
def keys_in_pages(paged, sequences, i_seq, m, n, PAGE: tl.constexpr):
    """A sequence whose keys are in pages: pointer to its row of the table, first key, numbers of queries and keys.

    The axis of keys is as long as a row of the table has room for, of packed queries as long as all of its rows.
    """
    capacity = sequences.max_seqlen_k
    if sequences.cu_seqlens_q is None:
        m = sequences.max_seqlen_q  # whose number `lengths` does not tell, as they are no tokens of the pages
    else:
        capacity = (capacity // tl.maximum(sequences.n_sequences, 1)).to(tl.int32)
    leftpad = 0
    if paged.leftpad is not None:
        # Not of rows before the first sequence or after the last, which have no keys.
        leftpad = tl.load(paged.leftpad + i_seq, mask=n > 0, other=0)
        leftpad = tl.minimum(tl.maximum(leftpad, 0), capacity).to(tl.int32)
    p_table = paged.table + tl.cast(i_seq, tl.int64) * (capacity // PAGE)
    return p_table, leftpad, m, tl.minimum(n, capacity - leftpad).to(tl.int32)


@triton.jit
def slots_of_keys(pages, start, n, WHOLE: tl.constexpr, SIZES: tl.constexpr):
    """The pages of a block of keys from `start` on, the first slot in them, and the keys' slots behind that one.

    WHOLE: all keys exist.
    """
    first, o_slot = 0, start + tl.arange(0, SIZES.BN)
    if pages.paged.leftpad is None and SIZES.PAGE % SIZES.BN == 0:  # a block lies in one page
        o_page = start // SIZES.PAGE
        first, o_slot = start - o_page * SIZES.PAGE, tl.arange(0, SIZES.BN)
        o_page = tl.load(pages.p_table + o_page)
    else:
        m_key = o_slot < n
        o_token = (pages.leftpad + o_slot).to(tl.uint32)  # of which a quotient by a power of two is a shift
        o_page = (o_token // SIZES.PAGE).to(tl.int32)
        o_slot = (o_token % SIZES.PAGE).to(tl.int32)
        if WHOLE:
            o_page = tl.load(pages.p_table + o_page)
        else:
            o_page = tl.load(pages.p_table + o_page, mask=m_key, other=0)
    return tl.minimum(tl.maximum(o_page, 0), pages.paged.n_pages - 1), first, o_slot


@triton.jit
def keys_of(x, row, head, first, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SIZES: tl.constexpr):
    """The keys or values of a sequence's head, for `load_keys`: a pointer to the first (in pages, to the first of all),
    or a descriptor, which copies a block in one instruction and has zeros in the place of keys past the last."""
    p_x = row_pointers(x, row, head, first)
    if SIZES.DESCRIBED is not None:
        p_x = tl.make_tensor_descriptor(p_x, [tl.maximum(n, 1), WIDTH], [x.token, 1], [SIZES.BN, BLOCK])
    return p_x


@triton.jit
def load_keys(
    x, p_x, start, n, pages, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, SIZES: tl.constexpr
):
    """The block of keys from `start` on; zeros past the last. WHOLE: there are none.

    NEAR: a page, or a block where there are none, lies within 2^31 elements. Offsets in it are 32-bit then, and kept
    from block to block, which takes registers.
    """
    if SIZES.DESCRIBED is not None:
        block = p_x.load([start, 0])
    else:
        o_key = start + tl.arange(0, SIZES.BN)
        m_key = o_key < n
        first, o_slot = start, tl.arange(0, SIZES.BN)
        if SIZES.PAGE is not None:
            o_page, first, o_slot = slots_of_keys(pages, start, n, WHOLE, SIZES)
            p_x += o_page.to(tl.uint32).to(tl.int64) * x.batch  # a number of a page is not negative: half a product
            o_key = first + o_slot
        if SIZES.NEAR is None:
            p_rows = p_x + o_key.to(tl.int64) * x.token
        else:
            p_rows = p_x + tl.cast(first, tl.int64) * x.token + o_slot * x.token
        block = load_rows(x, p_rows, m_key, WIDTH, BLOCK, WHOLE)
    return block


@triton.jit
def as_computed(b_p, WANTED: tl.constexpr):
    """P that a loop hands on, bit for bit, as if it were made here: a left factor that Triton then leaves in registers,
    which saves its way through shared memory."""
    if WANTED and b_p.dtype.primitive_bitwidth == 16:
        b_p = b_p.to(tl.int16, bitcast=True).to(b_p.dtype, bitcast=True)
    return b_p


@guarded
@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_kv_heads, n_parts,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION; ASYNCHRONOUS, DESCRIBED, NEAR; PAGE, GATE, `beside`
    beside=None,  # a Beside; its gate and product are not for `n_parts`
):  # fmt: skip
    """O and LSE of a block of rows; with `n_parts`, of every n-th part of its keys."""
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
    pages, row_k = None, row
    if SIZES.PAGE is not None:
        p_table, leftpad, m, n = keys_in_pages(beside.paged, sequences, i_seq, m, n, SIZES.PAGE)
        pages, row_k, first_n = PagesOfSequence(beside.paged, p_table, leftpad), 0, 0
    o_query, o_head, o_position, m_row = rows_of_block(i_block, i_head, m, n, SIZES)
    p_bias = bias_pointers(rule, row, o_head)
    b_q = load_rows(q, row_pointers(q, row, o_head, first_m + o_query), m_row, SIZES.D, SIZES.BD, False)
    b_q = directed(b_q, rule, SIZES)
    factor = exponent_factor(rule, SIZES)
    p_k = keys_of(k, row_k, i_head, first_n, n, SIZES.D, SIZES.BD, SIZES)
    p_v = keys_of(v, row_k, i_head, first_n, n, SIZES.E, SIZES.BE, SIZES)

    # The range of keys that the rows see, restricted to this program's part.
    start, full_start, full_stop, stop = keys_of_block(rule, i_block, m, n, SIZES)
    i_part = tl.program_id(1)
    if n_parts is not None:
        per_part = ((stop - start + BN - 1) // BN + n_parts - 1) // n_parts * BN
        start += i_part * per_part
        stop = tl.minimum(start + per_part, stop)
        full_start = tl.minimum(tl.maximum(full_start, start), tl.maximum(stop, start))
        full_stop = tl.maximum(tl.minimum(full_stop, stop // BN * BN), full_start)

    # A sink is an additional key with value 0: the maximum starts with its score, the sum with exp(0) = 1.
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    if rule.sinks is not None:
        b_sink = tl.load(rule.sinks + o_head).to(tl.float32)
        if is_plain(rule, SIZES):
            b_sink *= LOG2_E
        if n_parts is not None:
            b_sink = tl.where(i_part == 0, b_sink, -float("inf"))
        b_m = b_sink
        b_l = tl.where(b_sink == -float("inf"), 0.0, 1.0)
    b_acc = tl.zeros([BM, SIZES.BE], tl.float32)

    # Where products run beside other instructions, that of a block and its values is begun together with the scores of
    # the next block, whose softmax then hides it. The first is one of zeros, from behind the keys.
    b_p = tl.zeros([BM, BN], v.pointer.dtype.element_ty)
    for phase in tl.static_range(3):  # masked blocks on the left, unmasked, masked on the right
        if phase != 0 or rule.left is not None:
            lo = start if phase == 0 else (full_start if phase == 1 else full_stop)
            hi = full_start if phase == 0 else (full_stop if phase == 1 else stop)
            for j in range(lo, hi, BN):
                o_key = j + tl.arange(0, BN)
                b_k = load_keys(k, p_k, j, n, pages, SIZES.D, SIZES.BD, phase == 1, SIZES)
                b_qk = tl.dot(b_q, b_k.T, input_precision=SIZES.PRECISION)
                if SIZES.ASYNCHRONOUS is not None:
                    before = tl.where(j > start, j - BN, tl.maximum(n, 1))
                    b_v = load_keys(v, p_v, before, n, pages, SIZES.E, SIZES.BE, False, SIZES)
                    b_p = as_computed(b_p, phase == 1 and SIZES.BE <= 128)  # masks and wide values need the registers
                    b_acc = tl.dot(b_p, b_v, b_acc, input_precision=SIZES.PRECISION)
                b_s, _ = scores(
                    b_qk, rule, p_bias[:, None], o_head[:, None], o_position[:, None], o_key[None, :], n, phase != 1,
                    SIZES,
                )  # fmt: skip
                if SIZES.WEIGHT_MOD is not None:
                    b_weight = own_weights(b_s, SIZES)
                else:
                    b_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
                    b_pivot = tl.maximum(b_new, LOWEST)  # no visible key so far: avoids inf - inf
                    b_weight = exponentials(b_s, b_pivot[:, None], factor, rule, SIZES)
                    b_alpha = decay(b_m, b_pivot, is_plain(rule, SIZES))
                    b_l = b_l * b_alpha + tl.sum(b_weight, 1)
                    b_acc *= b_alpha[:, None]
                    b_m = b_new
                if rule.seed is not None:
                    b_weight = tl.where(kept(rule, i_seq, o_head, o_query, j, BM, BN), b_weight, 0.0)
                b_p = b_weight.to(b_p.dtype)
                if SIZES.ASYNCHRONOUS is None:
                    b_v = load_keys(v, p_v, j, n, pages, SIZES.E, SIZES.BE, phase == 1, SIZES)
                    b_acc = tl.dot(b_p, b_v, b_acc, input_precision=SIZES.PRECISION)
    if SIZES.ASYNCHRONOUS is not None:  # the last block; if there is none, one past the keys, which is zeros
        last = tl.where(start < stop, start + (stop - start - 1) // BN * BN, tl.maximum(n, 1))
        b_v = load_keys(v, p_v, last, n, pages, SIZES.E, SIZES.BE, False, SIZES)
        b_acc = tl.dot(b_p, b_v, b_acc, input_precision=SIZES.PRECISION)

    # LSE = m + log l. A row that sees nothing has O = 0 and LSE = -inf. The sum of elementwise weights is O itself.
    if SIZES.WEIGHT_MOD is not None:
        b_acc = tl.where(m_row[:, None], b_acc * rule.dropout_scale, 0.0)
    else:
        b_divisor = tl.where(b_l == 0, 1.0, b_l)
        b_acc *= (rule.dropout_scale / b_divisor)[:, None]
        b_acc = tl.where(m_row[:, None], b_acc, 0.0)
        b_lse = tl.where(m_row & (b_l != 0), log_sum(b_m, b_divisor, is_plain(rule, SIZES)), -float("inf"))
    p_out = row_pointers(out, row, o_head, first_m + o_query)
    if SIZES.WEIGHT_MOD is None:
        p_lse = lse + row_offsets(sequences, i_seq, i_head, n_kv_heads * SIZES.GROUPS, o_query, o_head, first_m, row)
    if n_parts is not None:
        all_rows = tl.cast(sequences.max_seqlen_q, tl.int64) * n_kv_heads * SIZES.GROUPS
        if sequences.cu_seqlens_q is None:
            all_rows *= sequences.n_sequences
        p_out += i_part * all_rows * SIZES.E
        if SIZES.WEIGHT_MOD is None:
            p_lse += i_part * all_rows
            # Maximum and sum are stored separately: LSE = m + log l loses low bits of l when m is large.
            tl.store(p_lse + n_parts * all_rows, tl.where(m_row, b_l, 0.0), mask=o_query < stored)
            b_lse = b_m
    if SIZES.GATE is not None:
        if beside.product is not None:
            p_product = row_pointers(beside.product, row, o_head, first_m + o_query)
            store_rows(beside.product, p_product, o_query < stored, b_acc, SIZES.E, SIZES.BE)
        p_gate = row_pointers(beside.gate, row, o_head, first_m + o_query)
        b_gate = load_rows(beside.gate, p_gate, m_row, SIZES.E, SIZES.BE, False)
        b_acc *= activate(b_gate.to(tl.float32), SIZES.GATE)
    store_rows(out, p_out, o_query < stored, b_acc, SIZES.E, SIZES.BE)
    if SIZES.WEIGHT_MOD is None:
        tl.store(p_lse, b_lse, mask=o_query < stored)


@guarded
@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    parts, sums, out, lse, gate, product, n_rows, n_parts, n_heads, n_tokens,
    E: tl.constexpr, BE: tl.constexpr, PARTS: tl.constexpr, PLAIN: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Parts (n_parts, rows, E), with maxima m and sums l (2, n_parts, rows), combined: O ~ sum of l e^m O_part.

    One program per row reads PARTS parts at once; where there are more, the next ones follow as blocks of keys do. A
    gate multiplies O, which itself goes to `product`.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BE)
    b_acc = tl.zeros([BE], tl.float32)
    b_m = -float("inf")
    b_l = 0.0
    for start in range(0, n_parts, PARTS):
        o_part = start + tl.arange(0, PARTS)
        m_part = o_part < n_parts
        o_flat = tl.cast(o_part, tl.int64) * n_rows + i_row
        b_part_m = tl.load(sums + o_flat, mask=m_part, other=-float("inf"))
        b_part_l = tl.load(sums + tl.cast(n_parts, tl.int64) * n_rows + o_flat, mask=m_part, other=0.0)
        m_whole = m_part[:, None] & (o_column[None, :] < E)
        b_part = tl.load(parts + o_flat[:, None] * E + o_column[None, :], mask=m_whole, other=0.0)
        b_new = tl.maximum(b_m, tl.max(b_part_m, 0))
        b_pivot = tl.maximum(b_new, LOWEST)
        b_alpha = decay(b_m, b_pivot, PLAIN)
        b_weight = products(decay(b_part_m, b_pivot, PLAIN), b_part_l)
        b_acc = b_acc * b_alpha + tl.sum(products(b_part, b_weight[:, None]), 0)
        b_l = b_l * b_alpha + tl.sum(b_weight, 0)
        b_m = b_new
    b_divisor = tl.where(b_l == 0, 1.0, b_l)
    b_lse = tl.where(b_l == 0, -float("inf"), log_sum(b_m, b_divisor, PLAIN))
    b_out = b_acc / b_divisor
    if product is not None:
        tl.store(product + i_row * E + o_column, b_out.to(product.dtype.element_ty), mask=o_column < E)
    if gate is not None:
        p_gate = row_pointers(gate, i_row // n_tokens // n_heads, i_row // n_tokens % n_heads, i_row % n_tokens)
        m_gate = o_column < tl.where(b_l == 0, 0, E)  # that of padding may be anything
        b_gate = tl.load(p_gate + tl.cast(o_column, tl.int64) * gate.column, mask=m_gate, other=0.0)
        b_out *= activate(b_gate.to(tl.float32), GATE)
    tl.store(out + i_row * E + o_column, b_out.to(out.dtype.element_ty), mask=o_column < E)
    tl.store(lse + i_row, b_lse)


@guarded
@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    dout, out, lse, dlse, pivot, delta,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k, n_blocks, n_heads,
    gate, dx, dgate,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, PLAIN: tl.constexpr,
    GATE: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE for a block of queries of one head, and the pivot of its exponentials: LSE, in base
    2 for plain scores, and infinity for a row that sees nothing, whose P is then 0.

    With a gate, dO is the gradient of GATE(gate) O: that of O, `dx`, and that of the gate, which has a number for each
    column or PER_HEAD one, are written first.
    """
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    i_block, i_head, i_seq = place(
        tl.program_id(0), n_blocks, n_heads, sequences, sequences.cu_seqlens_q, max_seqlen_q, 1, BM
    )
    row, first_m, m, stored, _, _, _ = bounds(sequences, i_seq)
    o_query = i_block * BM + tl.arange(0, BM)
    m_row = o_query < m
    b_dout = load_rows(dout, row_pointers(dout, row, i_head, first_m + o_query), m_row, E, BE, False)
    b_out = load_rows(out, row_pointers(out, row, i_head, first_m + o_query), m_row, E, BE, False)
    if gate is not None:
        b_gate = load_rows(gate, row_pointers(gate, row, i_head, first_m + o_query), m_row, E, BE, False).to(tl.float32)
        b_dgate, b_dx = gated_backward(b_dout.to(tl.float32), b_gate, b_out.to(tl.float32), GATE, "identity")
        b_dout = b_dx.to(dx.pointer.dtype.element_ty)
        store_rows(dx, row_pointers(dx, row, i_head, first_m + o_query), o_query < stored, b_dout, E, BE)
        p_dgate = row_pointers(dgate, row, i_head, first_m + o_query)
        if PER_HEAD:
            tl.store(p_dgate, tl.sum(b_dgate + 0.0, 1).to(dgate.pointer.dtype.element_ty), mask=o_query < stored)
        else:
            store_rows(dgate, p_dgate, o_query < stored, b_dgate, E, BE)
    b_delta = tl.sum(products(b_dout.to(tl.float32), b_out.to(tl.float32)), 1)
    o_flat = row_offsets(sequences, i_seq, i_head, n_heads, o_query, i_head, first_m, row)
    b_lse = tl.load(lse + o_flat, mask=m_row, other=-float("inf"))
    if dlse is not None:  # it may be NaN for a row without visible keys
        b_delta -= tl.load(dlse + o_flat, mask=m_row & (b_lse != -float("inf")), other=0.0)
    tl.store(delta + o_flat, b_delta, mask=o_query < stored)
    b_pivot = tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2_E if PLAIN else b_lse)
    tl.store(pivot + o_flat, b_pivot, mask=o_query < stored)


@guarded
@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    q, k, v, dout, lse, delta, dq, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sink_deltas, seed, threshold, dropout_scale, aux, n_blocks, n_kv_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, and a user's functions
):  # fmt: skip
    """dQ = scale dS K of a block of rows, over the keys they see.

    With sinks also rowsum(P * dP) in fp32, which is rowsum(dO * O) but for the rounding of O: the gradient of a sink is
    a sum of it over all rows, where the terms may cancel and roundings stay.
    """
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = AttentionRule(
        scale, left, right, softcap, bias, bias_batch, bias_head, max_distance, None, seed, threshold, dropout_scale,
        aux,
    )  # fmt: skip
    i_block, i_head, i_seq, row, first_m, m, stored, first_n, n = block_of_rows(sequences, n_blocks, n_kv_heads, SIZES)
    if i_block < 0:
        return
    o_query, o_head, o_position, m_row = rows_of_block(i_block, i_head, m, n, SIZES)
    p_bias = bias_pointers(rule, row, o_head)
    b_q = load_rows(q, row_pointers(q, row, o_head, first_m + o_query), m_row, SIZES.D, SIZES.BD, False)
    b_q = directed(b_q, rule, SIZES)
    factor = exponent_factor(rule, SIZES)
    b_dout = load_rows(dout, row_pointers(dout, row, o_head, first_m + o_query), m_row, SIZES.E, SIZES.BE, False)
    if SIZES.WEIGHT_MOD is None:
        o_flat = row_offsets(sequences, i_seq, i_head, n_kv_heads * SIZES.GROUPS, o_query, o_head, first_m, row)
        b_lse = tl.load(lse + o_flat, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta + o_flat, mask=m_row, other=0.0)
    p_k = keys_of(k, row, i_head, first_n, n, SIZES.D, SIZES.BD, SIZES)
    p_v = keys_of(v, row, i_head, first_n, n, SIZES.E, SIZES.BE, SIZES)

    start, full_start, full_stop, stop = keys_of_block(rule, i_block, m, n, SIZES)
    b_dq = tl.zeros([BM, SIZES.BD], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for phase in tl.static_range(3):
        if phase != 0 or rule.left is not None:
            lo = start if phase == 0 else (full_start if phase == 1 else full_stop)
            hi = full_start if phase == 0 else (full_stop if phase == 1 else stop)
            for j in range(lo, hi, BN):
                o_key = j + tl.arange(0, BN)
                b_k = load_keys(k, p_k, j, n, None, SIZES.D, SIZES.BD, phase == 1, SIZES)
                b_v = load_keys(v, p_v, j, n, None, SIZES.E, SIZES.BE, phase == 1, SIZES)
                b_qk = tl.dot(b_q, b_k.T, input_precision=SIZES.PRECISION)
                b_s, b_slope = scores(
                    b_qk, rule, p_bias[:, None], o_head[:, None], o_position[:, None], o_key[None, :], n, phase != 1,
                    SIZES,
                )  # fmt: skip
                if SIZES.WEIGHT_MOD is None:
                    b_p = exponentials(b_s, b_lse[:, None], factor, rule, SIZES)
                b_dp = tl.dot(b_dout, b_v.T, input_precision=SIZES.PRECISION)
                if rule.seed is not None:
                    b_dp = tl.where(kept(rule, i_seq, o_head, o_query, j, BM, BN), b_dp * rule.dropout_scale, 0.0)
                if SIZES.WEIGHT_MOD is not None:
                    b_ds = b_dp * own_weight_slopes(b_s, SIZES) * b_slope
                else:
                    b_ds = b_p * (b_dp - b_delta[:, None]) * b_slope
                    if sink_deltas is not None:
                        b_sum += tl.sum(products(b_p, b_dp), 1)
                b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=SIZES.PRECISION)
    b_dq = tl.where(m_row[:, None], b_dq * rule.scale, 0.0)
    store_rows(dq, row_pointers(dq, row, o_head, first_m + o_query), o_query < stored, b_dq, SIZES.D, SIZES.BD)
    if sink_deltas is not None:
        tl.store(sink_deltas + o_flat, b_sum, mask=m_row)


@triton.jit
def load_numbers(p_x, m_x, other, WHOLE: tl.constexpr):
    """A number for each row. WHOLE: all rows are in range."""
    if WHOLE:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=m_x, other=other)
    return b_x


@guarded
@triton.jit(do_not_specialize=VARYING)
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_kv_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, and a user's functions
):  # fmt: skip
    """dK = scale dS^T Q and dV = P^T dO of a block of keys, over the rows of all heads of the group that see them."""
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
    row, first_m, m, _, first_n, n, stored = bounds(sequences, i_seq)
    if i_block * BN >= stored:
        return

    o_key = i_block * BN + tl.arange(0, BN)
    m_key = o_key < n
    b_k = load_rows(k, row_pointers(k, row, i_head, first_n + o_key), m_key, SIZES.D, SIZES.BD, False)
    b_k = directed(b_k, rule, SIZES)
    factor = exponent_factor(rule, SIZES)
    b_v = load_rows(v, row_pointers(v, row, i_head, first_n + o_key), m_key, SIZES.E, SIZES.BE, False)
    b_dk = tl.zeros([BN, SIZES.BD], tl.float32)
    b_dv = tl.zeros([BN, SIZES.BE], tl.float32)
    # Out-of-range keys are masked at the store, and need no mask here.
    last = tl.minimum(i_block * BN + BN, n) - 1
    start, full_start, full_stop, stop = rows_seeing(rule, i_block * BN, last, m, n, BM)
    # A launch of dV alone has no other product beside its exponentials: where products run beside other instructions,
    # that of a block is begun with the scores of the next one, as in the forward. The first is one of zeros.
    SKEWED: tl.constexpr = SIZES.ONLY == "dv" and SIZES.ASYNCHRONOUS is not None
    for i_group in range(SIZES.GROUPS):
        o_head = i_head * SIZES.GROUPS + i_group
        p_bias = bias_pointers(rule, row, o_head)
        b_held = tl.zeros([BN, BM], dout.pointer.dtype.element_ty)
        for phase in tl.static_range(3):
            if phase != 0 or rule.right is not None:
                lo = start if phase == 0 else (full_start if phase == 1 else full_stop)
                hi = full_start if phase == 0 else (full_stop if phase == 1 else stop)
                for i in range(lo, hi, BM):
                    o_query = i + tl.arange(0, BM)
                    m_row = o_query < m
                    o_position = o_query + n - m
                    p_q = row_pointers(q, row, o_head, first_m + o_query)
                    b_q = load_rows(q, p_q, m_row, SIZES.D, SIZES.BD, phase == 1)
                    p_dout = row_pointers(dout, row, o_head, first_m + o_query)
                    if SKEWED:
                        o_before = tl.maximum(i - BM, start) + tl.arange(0, BM)
                        p_dout = row_pointers(dout, row, o_head, first_m + o_before)
                        b_dout = load_rows(dout, p_dout, o_before < m, SIZES.E, SIZES.BE, phase == 1)
                    else:
                        b_dout = load_rows(dout, p_dout, m_row, SIZES.E, SIZES.BE, phase == 1)
                    if SIZES.WEIGHT_MOD is None:
                        o_flat = row_offsets(
                            sequences, i_seq, i_head, n_kv_heads * SIZES.GROUPS, o_query, o_head, first_m, row
                        )
                        b_lse = load_numbers(lse + o_flat, m_row, float("inf"), phase == 1)
                        b_delta = load_numbers(delta + o_flat, m_row, 0.0, phase == 1)
                    # S^T, keys by rows: P^T and dS^T are then left operands of tl.dot without a transposition.
                    b_kq = tl.dot(b_k, b_q.T, input_precision=SIZES.PRECISION)
                    if SKEWED:
                        b_held = as_computed(b_held, phase == 1)
                        b_dv = tl.dot(b_held, b_dout, b_dv, input_precision=SIZES.PRECISION)
                    if SIZES.ONLY != "dv":
                        b_dp = tl.dot(b_v, b_dout.T, input_precision=SIZES.PRECISION)
                    b_s, b_slope = scores(
                        b_kq, rule, p_bias, o_head, o_position[None, :], o_key[:, None], n, phase != 1, SIZES
                    )
                    if SIZES.WEIGHT_MOD is not None:
                        b_p = own_weights(b_s, SIZES)
                    else:
                        b_p = exponentials(b_s, b_lse[None, :], factor, rule, SIZES)
                    b_weight = b_p
                    if rule.seed is not None:
                        m_kept = kept(rule, i_seq, o_head, o_query, i_block * BN, BM, BN).T
                        b_weight = tl.where(m_kept, b_p * rule.dropout_scale, 0.0)
                    if SKEWED:
                        b_held = b_weight.to(b_held.dtype)
                    elif SIZES.ONLY != "dk":
                        b_dv = tl.dot(b_weight.to(b_dout.dtype), b_dout, b_dv, input_precision=SIZES.PRECISION)
                    if SIZES.ONLY != "dv":
                        if rule.seed is not None:
                            b_dp = tl.where(m_kept, b_dp * rule.dropout_scale, 0.0)
                        if SIZES.WEIGHT_MOD is not None:
                            b_ds = b_dp * own_weight_slopes(b_s, SIZES) * b_slope
                        else:
                            b_ds = b_p * (b_dp - b_delta[None, :]) * b_slope
                        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=SIZES.PRECISION)
        if SKEWED:
            o_last = start + tl.maximum(stop - start - 1, 0) // BM * BM + tl.arange(0, BM)
            p_dout = row_pointers(dout, row, o_head, first_m + o_last)
            m_last = o_last < tl.where(start < stop, m, 0)  # no row may see these keys
            b_dout = load_rows(dout, p_dout, m_last, SIZES.E, SIZES.BE, False)
            b_dv = tl.dot(b_held, b_dout, b_dv, input_precision=SIZES.PRECISION)
    if SIZES.ONLY != "dv":
        b_dk = tl.where(m_key[:, None], b_dk * rule.scale, 0.0)
        store_rows(dk, row_pointers(dk, row, i_head, first_n + o_key), o_key < stored, b_dk, SIZES.D, SIZES.BD)
    if SIZES.ONLY != "dk":
        b_dv = tl.where(m_key[:, None], b_dv, 0.0)
        store_rows(dv, row_pointers(dv, row, i_head, first_n + o_key), o_key < stored, b_dv, SIZES.E, SIZES.BE)


@triton.jit
def queries_at(rule, nearest, m, n, BM: tl.constexpr, BN: tl.constexpr):
    """The range of queries that have a key at one of BN distances, of which `nearest` is the first."""
    start = tl.maximum(m - n - nearest - BN + 1, 0) // BM * BM
    stop = tl.minimum(m - nearest, m)
    if rule.right is not None:
        stop = tl.where(nearest > rule.right, 0, stop)
    if rule.left is not None:
        stop = tl.where(nearest + BN - 1 < -rule.left, 0, stop)
    return start, stop


@guarded
@triton.jit(do_not_specialize=VARYING)
def dbias_kernel(
    q, k, v, dout, lse, delta, dbias, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    scale, left, right, softcap, bias, bias_batch, bias_head, max_distance,
    sinks, seed, threshold, dropout_scale, aux, n_blocks, n_heads,
    SIZES: tl.constexpr,  # GROUPS, D, E, BD, BE, BM, BN, PRECISION, and a user's functions
):  # fmt: skip
    """dBias of a block of BN = BM distances j - p, over all queries: dS summed along diagonals."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = AttentionRule(
        scale, left, right, softcap, bias, bias_batch, bias_head, max_distance, sinks, seed, threshold, dropout_scale,
        aux,
    )  # fmt: skip
    i_block = tl.program_id(0) % n_blocks
    i_head = tl.program_id(0) // n_blocks % n_heads
    i_batch = tl.program_id(0) // n_blocks // n_heads
    nearest = i_block * BN - rule.max_distance  # distance of the first diagonal
    o_column = tl.arange(0, BM + BN)
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
            o_position = o_query + n - m
            o_key = i + n - m + nearest + o_column
            m_row = o_query < m
            m_key = (o_key >= 0) & (o_key < n)
            b_q = load_rows(q, row_pointers(q, row, i_head, first_m + o_query), m_row, SIZES.D, SIZES.BD, False)
            p_dout = row_pointers(dout, row, i_head, first_m + o_query)
            b_dout = load_rows(dout, p_dout, m_row, SIZES.E, SIZES.BE, False)
            i_kv_head = i_head // SIZES.GROUPS
            b_k = load_rows(k, row_pointers(k, row, i_kv_head, first_n + o_key), m_key, SIZES.D, SIZES.BD, False)
            b_v = load_rows(v, row_pointers(v, row, i_kv_head, first_n + o_key), m_key, SIZES.E, SIZES.BE, False)
            if SIZES.WEIGHT_MOD is None:
                o_flat = row_offsets(sequences, i_seq, i_head, n_heads, o_query, i_head, first_m, row)
                b_lse = tl.load(lse + o_flat, mask=m_row, other=float("inf"))
                b_delta = tl.load(delta + o_flat, mask=m_row, other=0.0)
            b_qk = tl.dot(b_q, b_k.T, input_precision=SIZES.PRECISION)
            p_bias = bias_pointers(rule, row, i_head)
            b_s, _ = scores(b_qk, rule, p_bias, i_head, o_position[:, None], o_key[None, :], n, True, SIZES)
            if SIZES.WEIGHT_MOD is not None:  # P's place has its slope
                b_p = tl.where(m_key[None, :], own_weight_slopes(b_s, SIZES), 0.0)
                b_delta = tl.zeros([BM], tl.float32)
            else:
                b_p = tl.where(m_key[None, :], exponentials(b_s, b_lse[:, None], 1.0, rule, SIZES), 0.0)
            b_dp = tl.dot(b_dout, b_v.T, input_precision=SIZES.PRECISION)
            if rule.seed is not None:
                b_dp *= kept_at(rule, i_seq, i_head, o_query, o_key, BM, BM + BN)
            b_ds = b_p * (b_dp - b_delta[:, None])
            # Element (r, c) of dS is on diagonal c - r: shift row r to the left by r, and sum the columns.
            b_dbias += tl.sum(tl.gather(b_ds, o_step + tl.arange(0, BN)[None, :], 1), 0)
    o_bias = i_block * BN + tl.arange(0, BN)
    width = 2 * rule.max_distance + 1
    p_dbias = dbias + (tl.cast(i_batch, tl.int64) * n_heads + i_head) * width + o_bias
    tl.store(p_dbias, b_dbias, mask=o_bias < width)

"""FLASH's mixed chunk attention (Hua et al. 2022, section 3.2): O = act(gate) * (A V + lin_Q KV / n), chunk by chunk.

A is local, C x C for each chunk of C tokens; KV (S, E) is the sum of lin_K^T V over the chunks before (all chunks, if
not causal). Once each chunk's KV is known, all chunks are independent:

    states    sums of lin_K^T V, over the chunks of a segment, one state stored per chunk (before adding it)
    carry     the segments' totals, summed over the segments before; none if a sequence is one segment
    probs     A of some chunks to a panel in the L2 cache (values of one tile of columns: computed in `product`)
    product   [lin_Q | A] [KV ; V] as one product, with the gate as its epilogue

The backward sums in reverse order: dKV is the sum of lin_Q^T dX / n over the chunks after.

    prologue  dX = act(gate) * dO, dGate = X * dO * act'(gate)
    states, carry   KV again, and dKV
    linear    dlin_Q = dX KV^T / n and dlin_K = V dKV^T
    gradient  A^T and dS of some chunks to panels, from dA = dX V^T
    product   dV = [lin_K | A^T] [dKV ; dX]
    heads     dquad_Q and dquad_K from dS; the bias's gradient is summed over chunks, and then along diagonals

A slot is an index of chunks: a sequence of n tokens has ceil(n / C) consecutive slots; between packed sequences there
may be an empty one. Each sum has one writer, so that results are bitwise repeatable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    VARYING,
    Sequences,
    bounds,
    first_slot,
    load_rows,
    place,
    products,
    row_pointers,
    store_rows,
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
from .glu import activate
from .guarded import guarded

# ---------------------------------------------------------------- chunks


class Chunk(NamedTuple):
    """A chunk: its sequence, its ordinal in it, its batch row, its first token in that row, its number of tokens."""

    sequence: Any
    ordinal: Any
    row: Any
    first: Any
    tokens: Any
    stored: Any  # rows of results to write, including padding (zeros)
    of: Any  # tokens of the sequence


class States(NamedTuple):
    """What chunks read: the sums of their segment before them, and the sums before the segment."""

    running: Any  # pointer to (slots, S, E); None if not causal
    base: Any  # pointer to (segments, S, E), or to (sequences, S, E) if not causal; None: nothing to add


@triton.jit
def chunk_at(i_slot, n_chunks, sequences, C: tl.constexpr):
    """The chunk in a slot."""
    i_chunk, _, i_seq = place(i_slot, n_chunks, 1, sequences, sequences.cu_seqlens_q, sequences.max_seqlen_q, 1, C)
    row, first, n, stored, _, _, _ = bounds(sequences, i_seq)
    tokens = tl.minimum(tl.maximum(n - i_chunk * C, 0), C)
    stored = tl.minimum(stored - i_chunk * C, C)
    return Chunk(i_seq, i_chunk, row, first + i_chunk * C, tokens, stored, n)


@triton.jit
def inverse_divisor(inv_norm, closed_tokens, i_seq, i_chunk, n, C: tl.constexpr, CAUSAL: tl.constexpr):
    """1 / n of a chunk's global part: as given, or 1 over the tokens that were summed."""
    if inv_norm is not None:
        result = inv_norm
    elif CAUSAL:
        before = tl.cast(i_chunk * C, tl.int64)
        if closed_tokens is not None:
            before += tl.load(closed_tokens + i_seq, mask=n > 0, other=0)
        result = 1.0 / tl.maximum(before, 1).to(tl.float32)
    else:
        result = 1.0 / tl.maximum(n, 1).to(tl.float32)
    return result


@triton.jit
def state_pointers(states, i_state, o_row, o_column, S: tl.constexpr, E: tl.constexpr):
    """A tile of a state (S, E)."""
    p_row = states + tl.cast(i_state, tl.int64) * S * E + tl.cast(o_row, tl.int64) * E
    return p_row[:, None] + o_column[None, :]


@triton.jit
def load_state(states, i_state, i_base, o_row, o_column, SIZES: tl.constexpr):
    """A tile of the state that a chunk reads: the sum within its segment plus the sum before the segment."""
    mask = (o_row < SIZES.S)[:, None] & (o_column < SIZES.E)[None, :]
    if states.running is None:
        p_base = state_pointers(states.base, i_base, o_row, o_column, SIZES.S, SIZES.E)
        b_state = tl.load(p_base, mask=mask, other=0.0)
    else:
        p_running = state_pointers(states.running, i_state, o_row, o_column, SIZES.S, SIZES.E)
        b_state = tl.load(p_running, mask=mask, other=0.0)
        if states.base is not None:
            p_base = state_pointers(states.base, i_base, o_row, o_column, SIZES.S, SIZES.E)
            b_base = tl.load(p_base, mask=mask, other=0.0)
            b_state = (b_state.to(tl.float32) + b_base).to(states.running.dtype.element_ty)
    return b_state


@triton.jit
def base_of(chunk, sequences, n_segments, chunks_per_segment, C: tl.constexpr, CAUSAL: tl.constexpr):
    """Which base a chunk's state adds to: that of its segment, or the sum over its whole sequence."""
    i_base = chunk.sequence
    if CAUSAL:
        i_base = first_slot(sequences, chunk.sequence, n_segments, C * chunks_per_segment)
        i_base += chunk.ordinal // chunks_per_segment
    return i_base


# ---------------------------------------------------------------- states


@guarded
@triton.jit(do_not_specialize=VARYING)
def states_kernel(
    x, y, states, totals, closed_tokens, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    lin_inv_norm, n_chunks, n_segments, chunks_per_segment,
    SIZES: tl.constexpr,  # C, S, E, BS, BE, BK, PRECISION
    CAUSAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A tile of a segment's sums of x^T y: before each of its chunks (BACKWARD: after it, over n), and over all."""
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    n_across = tl.cdiv(SIZES.E, SIZES.BE)
    i_tile = tl.program_id(0) % (n_across * tl.cdiv(SIZES.S, SIZES.BS))
    i_slot = tl.program_id(0) // (n_across * tl.cdiv(SIZES.S, SIZES.BS))
    span = SIZES.C * chunks_per_segment
    i_segment, _, i_seq = place(i_slot, n_segments, 1, sequences, sequences.cu_seqlens_q, max_seqlen_q, 1, span)
    row, first, n, _, _, _, _ = bounds(sequences, i_seq)
    o_row = i_tile // n_across * SIZES.BS + tl.arange(0, SIZES.BS)
    o_column = i_tile % n_across * SIZES.BE + tl.arange(0, SIZES.BE)
    m_tile = (o_row < SIZES.S)[:, None] & (o_column < SIZES.E)[None, :]
    first_chunk = i_segment * chunks_per_segment
    count = tl.maximum(tl.minimum(tl.cdiv(n, SIZES.C) - first_chunk, chunks_per_segment), 0)
    slot = first_slot(sequences, i_seq, n_chunks, SIZES.C)
    p_x, p_y = row_pointers(x, row, 0, first), row_pointers(y, row, 0, first)
    b_sum = tl.zeros([SIZES.BS, SIZES.BE], tl.float32)
    for i in range(0, count):
        i_chunk = first_chunk + i
        if BACKWARD:
            i_chunk = first_chunk + count - 1 - i
        if states is not None:
            p_state = state_pointers(states, slot + i_chunk, o_row, o_column, SIZES.S, SIZES.E)
            tl.store(p_state, b_sum.to(states.dtype.element_ty), mask=m_tile)
        tokens = tl.minimum(n - i_chunk * SIZES.C, SIZES.C)
        if CAUSAL and not BACKWARD:  # an incomplete chunk is not added to the state
            tokens = tl.where(tokens == SIZES.C, SIZES.C, 0)
        # Tensor cores truncate accumulators: one per chunk, added in fp32.
        b_own = tl.zeros([SIZES.BS, SIZES.BE], tl.float32)
        for j in range(0, tokens, SIZES.BK):
            o_token = j + tl.arange(0, SIZES.BK)
            o_there = tl.cast(i_chunk * SIZES.C + o_token, tl.int64)
            b_x = load_tile(x, p_x + o_there * x.token, o_token < tokens, o_row, SIZES.S, SIZES.BS)
            b_y = load_tile(y, p_y + o_there * y.token, o_token < tokens, o_column, SIZES.E, SIZES.BE)
            b_own = tl.dot(b_x.T, b_y, b_own, input_precision=SIZES.PRECISION)
        if BACKWARD:
            b_own *= inverse_divisor(lin_inv_norm, closed_tokens, i_seq, i_chunk, n, SIZES.C, CAUSAL)
        b_sum += b_own
    tl.store(state_pointers(totals, i_slot, o_row, o_column, SIZES.S, SIZES.E), b_sum, mask=m_tile)


@guarded
@triton.jit(do_not_specialize=VARYING)
def carry_kernel(
    totals, start, result,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k, n_segments, span,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Segments' totals become what came before them (BACKWARD: comes after); `start` and all totals go to `result`."""
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    i_seq = tl.program_id(0) // tl.cdiv(SIZE, BLOCK)
    o_state = tl.program_id(0) % tl.cdiv(SIZE, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    m_state = o_state < SIZE
    _, _, n, _, _, _, _ = bounds(sequences, i_seq)
    p_first = totals + tl.cast(first_slot(sequences, i_seq, n_segments, span), tl.int64) * SIZE + o_state
    count = tl.cdiv(n, span)
    b_sum = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        b_sum += tl.load(start + tl.cast(i_seq, tl.int64) * SIZE + o_state, mask=m_state, other=0.0)
    for i in range(0, count):
        i_segment = i
        if BACKWARD:
            i_segment = count - 1 - i
        p_total = p_first + tl.cast(i_segment, tl.int64) * SIZE
        b_total = tl.load(p_total, mask=m_state, other=0.0)
        tl.store(p_total, b_sum, mask=m_state)
        b_sum += b_total
    tl.store(result + tl.cast(i_seq, tl.int64) * SIZE + o_state, b_sum, mask=m_state)


# ---------------------------------------------------------------- products


@triton.jit
def chunk_rows(x, chunk, o_row, SIZES: tl.constexpr):
    """Whole rows of a chunk, zeros after its last token."""
    p_x = row_pointers(x, chunk.row, 0, chunk.first + o_row)
    return load_rows(x, p_x, o_row < chunk.tokens, SIZES.S, SIZES.BS, False)


@triton.jit
def local_scores(chunk, rule, p_bias, b_q, k, o_query, o_key, SIZES: tl.constexpr):
    """S of some queries of a chunk against some of its keys; -inf where the key is hidden."""
    b_k = chunk_rows(k, chunk, o_key, SIZES)
    b_qk = tl.dot(b_q, b_k.T, input_precision=SIZES.PRECISION)
    b_s, _ = scores(b_qk, rule.scale, rule, p_bias, o_query[:, None], o_key[None, :], chunk.tokens, True, SIZES)
    return b_s


@triton.jit
def panel_block(panel, i_slot, o_row, o_column, WIDTH: tl.constexpr):
    """Pointers into a panel (slots, WIDTH, WIDTH)."""
    p_row = panel + (tl.cast(i_slot, tl.int64) * WIDTH + o_row) * WIDTH
    return p_row[:, None] + o_column[None, :]


@triton.jit
def is_hidden(chunk, rule, first_query, first_key, BM: tl.constexpr):
    """Whether none of the BM queries sees any key from the first on."""
    hidden = (first_query >= chunk.tokens) | (first_key >= chunk.tokens)
    if rule.right is not None:
        hidden = hidden | (first_key > first_query + BM - 1)
    return hidden


@guarded
@triton.jit(do_not_specialize=VARYING)
def probs_kernel(
    q, k, panel, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    inv_norm, right, bias, bias_batch, max_distance, n_chunks, first_block,
    SIZES: tl.constexpr,  # C, S, BS, BM, BN, WIDTH, PRECISION
    SCORE: tl.constexpr,
):  # fmt: skip
    """A block of a chunk's A, to its panel; zeros where no query sees a key."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, inv_norm, bias, bias_batch, max_distance)
    BLOCKS: tl.constexpr = (SIZES.WIDTH // BM) * (SIZES.WIDTH // BN)
    i_slot, i_block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    chunk = chunk_at(first_block + i_slot, n_chunks, sequences, SIZES.C)
    if chunk.tokens == 0:
        return
    first_query, first_key = i_block // (SIZES.WIDTH // BN) * BM, i_block % (SIZES.WIDTH // BN) * BN
    o_query, o_key = first_query + tl.arange(0, BM), first_key + tl.arange(0, BN)
    p_panel = panel_block(panel, i_slot, o_query, o_key, SIZES.WIDTH)
    if is_hidden(chunk, rule, first_query, first_key, BM):
        tl.store(p_panel, tl.zeros([BM, BN], panel.dtype.element_ty))
        return
    b_q, p_bias = chunk_rows(q, chunk, o_query, SIZES), bias_pointer(rule, chunk.row)
    b_s = local_scores(chunk, rule, p_bias, b_q, k, o_query, o_key, SIZES)
    tl.store(p_panel, probs(b_s, 0.0, SCORE).to(panel.dtype.element_ty))


@guarded
@triton.jit(do_not_specialize=VARYING)
def product_kernel(
    q, k, lin, x, panel, states, gate, product, out, closed_tokens,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    inv_norm, right, bias, bias_batch, max_distance, lin_inv_norm, n_chunks, n_segments, chunks_per_segment,
    first_block,
    SIZES: tl.constexpr,  # C, S, E, BS, BM, BE, BK, WIDTH, GATE, PRECISION, FACTORS
    SCORE: tl.constexpr, CONTINUED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """[lin | A] [KV ; x] of some rows of a chunk and a tile of columns, and that times act(gate).

    Forward lin is lin_Q / n, and x the values. BACKWARD it gives dV: lin is lin_K, A transposed, KV is dKV, x is dX.
    """
    BM: tl.constexpr = SIZES.BM
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, inv_norm, bias, bias_batch, max_distance)
    CAUSAL: tl.constexpr = right is not None
    n_tiles = tl.cdiv(SIZES.E, SIZES.BE)
    BLOCKS: tl.constexpr = (SIZES.C + BM - 1) // BM
    i_slot = tl.program_id(0) // (n_tiles * BLOCKS)
    first_row = tl.program_id(0) // n_tiles % BLOCKS * BM
    o_column = tl.program_id(0) % n_tiles * SIZES.BE + tl.arange(0, SIZES.BE)
    chunk = chunk_at(first_block + i_slot, n_chunks, sequences, SIZES.C)
    if first_row >= chunk.stored:
        return
    o_row = first_row + tl.arange(0, BM)
    m_row = o_row < chunk.tokens
    b_acc = tl.zeros([BM, SIZES.BE], tl.float32)

    # The global part. The first chunk has one only with an initial state; an incomplete one gets no dV from it.
    reads = chunk.tokens > 0
    if CAUSAL and BACKWARD:
        reads = chunk.tokens == SIZES.C
    elif CAUSAL and not CONTINUED:
        reads = (chunk.ordinal > 0) & (chunk.tokens > 0)
    i_base = base_of(chunk, sequences, n_segments, chunks_per_segment, SIZES.C, CAUSAL)
    p_lin = row_pointers(lin, chunk.row, 0, chunk.first + o_row)
    KS: tl.constexpr = SIZES.BK if SIZES.BK < SIZES.BS else SIZES.BS
    for s in range(0, tl.where(reads, SIZES.S, 0), KS):
        o_s = s + tl.arange(0, KS)
        b_lin = load_tile(lin, p_lin, m_row, o_s, SIZES.S, KS)
        b_kv = load_state(states, first_block + i_slot, i_base, o_s, o_column, SIZES)
        b_kv, b_lin = factors(b_kv, b_lin)
        b_acc = tl.dot(b_lin, b_kv, b_acc, input_precision=SIZES.FACTORS)
    if not BACKWARD:
        b_acc *= inverse_divisor(lin_inv_norm, closed_tokens, chunk.sequence, chunk.ordinal, chunk.of, SIZES.C, CAUSAL)

    start, stop = 0, chunk.tokens
    if CAUSAL and BACKWARD:
        start = first_row // SIZES.BK * SIZES.BK
    elif CAUSAL:
        stop = tl.minimum(first_row + BM, chunk.tokens)
    p_x = row_pointers(x, chunk.row, 0, chunk.first)
    if panel is None:
        b_q, p_bias = chunk_rows(q, chunk, o_row, SIZES), bias_pointer(rule, chunk.row)
    for j in range(start, stop, SIZES.BK):
        o_other = j + tl.arange(0, SIZES.BK)
        if panel is None:
            b_s = local_scores(chunk, rule, p_bias, b_q, k, o_row, o_other, SIZES)
            b_a = probs(b_s, 0.0, SCORE)
        elif BACKWARD:
            b_a = tl.load(panel_block(panel, i_slot, o_other, o_row, SIZES.WIDTH), mask=m_row[None, :], other=0.0).T
        else:
            b_a = tl.load(panel_block(panel, i_slot, o_row, o_other, SIZES.WIDTH), mask=m_row[:, None], other=0.0)
        p_other = p_x + tl.cast(o_other, tl.int64) * x.token
        b_x = load_tile(x, p_other, o_other < chunk.tokens, o_column, SIZES.E, SIZES.BE)
        b_a, b_x = factors(b_a, b_x)
        b_acc = tl.dot(b_a, b_x, b_acc, input_precision=SIZES.FACTORS)

    b_acc = tl.where(m_row[:, None], b_acc, 0.0)
    m_stored = o_row < chunk.stored
    if product is not None:
        p_product = row_pointers(product, chunk.row, 0, chunk.first + o_row)
        store_tile(product, p_product, m_stored, o_column, b_acc, SIZES.E, SIZES.BE)
    if gate is not None:
        p_gate = row_pointers(gate, chunk.row, 0, chunk.first + o_row)
        b_acc *= load_gate(gate, p_gate, m_row, o_column, SIZES.E, SIZES.BE, SIZES.GATE)
    store_tile(out, row_pointers(out, chunk.row, 0, chunk.first + o_row), m_stored, o_column, b_acc, SIZES.E, SIZES.BE)


# ---------------------------------------------------------------- backward


@guarded
@triton.jit(do_not_specialize=VARYING)
def linear_kernel(
    x, states, out, closed_tokens, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    lin_inv_norm, n_chunks, n_segments, chunks_per_segment,
    SIZES: tl.constexpr,  # C, S, E, BM, BN, BK, FACTORS
    CAUSAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """dlin_Q = dX KV^T / n of some rows of a chunk and a tile of columns; BACKWARD dlin_K = V dKV^T."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    n_tiles = tl.cdiv(SIZES.S, BN)
    BLOCKS: tl.constexpr = (SIZES.C + BM - 1) // BM
    i_slot = tl.program_id(0) // (n_tiles * BLOCKS)
    first_row = tl.program_id(0) // n_tiles % BLOCKS * BM
    o_s = tl.program_id(0) % n_tiles * BN + tl.arange(0, BN)
    chunk = chunk_at(i_slot, n_chunks, sequences, SIZES.C)
    if first_row >= chunk.stored:
        return
    o_row = first_row + tl.arange(0, BM)
    reads = first_row < chunk.tokens
    if CAUSAL and BACKWARD:
        reads = chunk.tokens == SIZES.C
    i_base = base_of(chunk, sequences, n_segments, chunks_per_segment, SIZES.C, CAUSAL)
    p_x = row_pointers(x, chunk.row, 0, chunk.first + o_row)
    b_acc = tl.zeros([BM, BN], tl.float32)
    for e in range(0, tl.where(reads, SIZES.E, 0), SIZES.BK):
        o_column = e + tl.arange(0, SIZES.BK)
        b_x = load_tile(x, p_x, o_row < chunk.tokens, o_column, SIZES.E, SIZES.BK)
        b_state = load_state(states, i_slot, i_base, o_s, o_column, SIZES)
        b_state, b_x = factors(b_state, b_x)
        b_acc = tl.dot(b_x, b_state.T, b_acc, input_precision=SIZES.FACTORS)
    if not BACKWARD:
        b_acc *= inverse_divisor(lin_inv_norm, closed_tokens, chunk.sequence, chunk.ordinal, chunk.of, SIZES.C, CAUSAL)
    p_out = row_pointers(out, chunk.row, 0, chunk.first + o_row)
    store_tile(out, p_out, o_row < chunk.stored, o_s, b_acc, SIZES.S, BN)


@guarded
@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    q, k, v, dx, panel, dpanel, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    inv_norm, right, bias, bias_batch, max_distance, n_chunks, first_block,
    SIZES: tl.constexpr,  # C, S, E, BS, BM, BN, BK, WIDTH, PRECISION
    SCORE: tl.constexpr,
):  # fmt: skip
    """A block of a chunk's A, and of dS from dA = dX V^T, to their panels; zeros where no query sees a key."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, inv_norm, bias, bias_batch, max_distance)
    BLOCKS: tl.constexpr = (SIZES.WIDTH // BM) * (SIZES.WIDTH // BN)
    i_slot, i_block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    chunk = chunk_at(first_block + i_slot, n_chunks, sequences, SIZES.C)
    if chunk.tokens == 0:
        return
    first_query, first_key = i_block // (SIZES.WIDTH // BN) * BM, i_block % (SIZES.WIDTH // BN) * BN
    o_query, o_key = first_query + tl.arange(0, BM), first_key + tl.arange(0, BN)
    p_panel = panel_block(panel, i_slot, o_query, o_key, SIZES.WIDTH)
    p_dpanel = panel_block(dpanel, i_slot, o_query, o_key, SIZES.WIDTH)
    if is_hidden(chunk, rule, first_query, first_key, BM):
        tl.store(p_panel, tl.zeros([BM, BN], panel.dtype.element_ty))
        tl.store(p_dpanel, tl.zeros([BM, BN], dpanel.dtype.element_ty))
        return
    p_dx = row_pointers(dx, chunk.row, 0, chunk.first + o_query)
    p_v = row_pointers(v, chunk.row, 0, chunk.first + o_key)
    b_da = tl.zeros([BM, BN], tl.float32)
    for e in range(0, SIZES.E, SIZES.BK):
        o_column = e + tl.arange(0, SIZES.BK)
        b_dx = load_tile(dx, p_dx, o_query < chunk.tokens, o_column, SIZES.E, SIZES.BK)
        b_v = load_tile(v, p_v, o_key < chunk.tokens, o_column, SIZES.E, SIZES.BK)
        b_da = tl.dot(b_dx, b_v.T, b_da, input_precision=SIZES.PRECISION)
    b_q, p_bias = chunk_rows(q, chunk, o_query, SIZES), bias_pointer(rule, chunk.row)
    b_s = local_scores(chunk, rule, p_bias, b_q, k, o_query, o_key, SIZES)
    b_a = probs(b_s, 0.0, SCORE)
    tl.store(p_panel, b_a.to(panel.dtype.element_ty))
    tl.store(p_dpanel, score_gradient(b_da, b_s, b_a, 0.0, SCORE).to(dpanel.dtype.element_ty))


@guarded
@triton.jit(do_not_specialize=VARYING)
def heads_kernel(
    q, k, dq, dk, dpanel, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    inv_norm, right, n_chunks, first_block,
    SIZES: tl.constexpr,  # C, S, BS, BM, BN, WIDTH, FACTORS
):  # fmt: skip
    """dquad_Q = dS quad_K / n and dquad_K = dS^T quad_Q / n of some rows of a chunk."""
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    BLOCKS: tl.constexpr = (SIZES.C + BM - 1) // BM
    i_slot, first_row = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BM
    chunk = chunk_at(first_block + i_slot, n_chunks, sequences, SIZES.C)
    if first_row >= chunk.stored:
        return
    o_row = first_row + tl.arange(0, BM)
    m_row, m_stored = o_row < chunk.tokens, o_row < chunk.stored
    stop, start = chunk.tokens, 0
    if right is not None:
        stop, start = tl.minimum(first_row + BM, chunk.tokens), first_row // BN * BN
    b_acc = tl.zeros([BM, SIZES.BS], tl.float32)
    for j in range(0, stop, BN):
        o_key = j + tl.arange(0, BN)
        b_ds = tl.load(panel_block(dpanel, i_slot, o_row, o_key, SIZES.WIDTH), mask=m_row[:, None], other=0.0)
        b_ds, b_k = factors(b_ds, chunk_rows(k, chunk, o_key, SIZES))
        b_acc = tl.dot(b_ds, b_k, b_acc, input_precision=SIZES.FACTORS)
    store_rows(dq, row_pointers(dq, chunk.row, 0, chunk.first + o_row), m_stored, b_acc * inv_norm, SIZES.S, SIZES.BS)
    b_acc = tl.zeros([BM, SIZES.BS], tl.float32)
    for j in range(start, chunk.tokens, BN):
        o_query = j + tl.arange(0, BN)
        b_ds = tl.load(panel_block(dpanel, i_slot, o_query, o_row, SIZES.WIDTH), mask=m_row[None, :], other=0.0)
        b_ds, b_q = factors(b_ds, chunk_rows(q, chunk, o_query, SIZES))
        b_acc = tl.dot(b_ds.T, b_q, b_acc, input_precision=SIZES.FACTORS)
    store_rows(dk, row_pointers(dk, chunk.row, 0, chunk.first + o_row), m_stored, b_acc * inv_norm, SIZES.S, SIZES.BS)


@guarded
@triton.jit(do_not_specialize=VARYING)
def dbias_kernel(
    dpanel, total, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    n_chunks, first_block, last_block, first_row,
    C: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of the sum of dS (B, WIDTH, WIDTH) over a row's chunks: adds those of a panel."""
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    ACROSS: tl.constexpr = WIDTH // BLOCK
    i_batch, i_block = first_row + tl.program_id(0) // (ACROSS * ACROSS), tl.program_id(0) % (ACROSS * ACROSS)
    o_query = i_block // ACROSS * BLOCK + tl.arange(0, BLOCK)
    o_key = i_block % ACROSS * BLOCK + tl.arange(0, BLOCK)
    low, high = first_block, last_block
    if sequences.cu_seqlens_q is None:  # the chunks of this row of the batch
        low = tl.maximum(first_block, i_batch * n_chunks)
        high = tl.minimum(last_block, i_batch * n_chunks + n_chunks)
    p_total = panel_block(total, i_batch, o_query, o_key, WIDTH)
    b_total = tl.load(p_total)
    for i in range(low, high):
        chunk = chunk_at(i, n_chunks, sequences, C)
        m_there = (o_query < chunk.tokens)[:, None] & (o_key < chunk.tokens)[None, :]
        p_ds = panel_block(dpanel, i - first_block, o_query, o_key, WIDTH)
        b_total += tl.load(p_ds, mask=m_there, other=0.0).to(tl.float32)
    tl.store(p_total, b_total)


# ---------------------------------------------------------------- one token


@triton.jit
def open_rows(x, held, i_row, place, c, o_column, C: tl.constexpr, WIDTH: tl.constexpr, BC: tl.constexpr):
    """BC rows of an open chunk from c on, with the new token at its place and zeros after it."""
    o_chunk = c + tl.arange(0, BC)
    p_held, m_held = open_block(held, i_row, c, o_column, C, WIDTH, BC)
    b_held = tl.load(p_held, mask=(o_chunk < place)[:, None] & m_held, other=0.0)
    b_new = tl.load(row_pointers(x, i_row, 0, 0) + o_column * x.column, mask=o_column < WIDTH, other=0.0)
    return tl.where((o_chunk == place)[:, None], b_new[None, :], b_held)


@triton.jit
def open_block(held, i_row, c, o_column, C: tl.constexpr, WIDTH: tl.constexpr, BC: tl.constexpr):
    """Pointers to BC rows of an open chunk (B, C, WIDTH) from c on, and which are in it."""
    o_chunk = c + tl.arange(0, BC)
    p_row = held + (tl.cast(i_row, tl.int64) * C + o_chunk) * WIDTH
    return p_row[:, None] + o_column[None, :], (o_chunk < C)[:, None] & (o_column < WIDTH)[None, :]


@triton.jit
def keep_token(x, held, i_row, place, o_column, C: tl.constexpr, WIDTH: tl.constexpr):
    """Write the new token, or some of its columns, to its place in the open chunk."""
    b_new = tl.load(row_pointers(x, i_row, 0, 0) + o_column * x.column, mask=o_column < WIDTH)
    p_held = held + (tl.cast(i_row, tl.int64) * C + place) * WIDTH + o_column
    tl.store(p_held, b_new.to(held.dtype.element_ty), mask=o_column < WIDTH)


@guarded
@triton.jit(do_not_specialize=VARYING)
def step_kernel(
    quad_q, quad_k, lin_q, lin_k, v, gate, kv, held_quad_k, held_lin_k, held_v, position, out,
    inv_norm, bias, bias_batch, max_distance, lin_inv_norm,
    SIZES: tl.constexpr,  # C, S, E, BS, BE, BC, GATE
    SCORE: tl.constexpr,
):  # fmt: skip
    """One token: a tile of its output, and its row of the open chunk. Nobody reads that row, but takes the token."""
    n_tiles = tl.cdiv(SIZES.E, SIZES.BE)
    i_row, i_tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    seen = tl.load(position + i_row)
    place = tl.cast(seen % SIZES.C, tl.int32)
    o_s = tl.arange(0, SIZES.BS).to(tl.int64)
    o_column = (i_tile * SIZES.BE + tl.arange(0, SIZES.BE)).to(tl.int64)
    m_s, m_column = o_s < SIZES.S, o_column < SIZES.E
    rule = GatedRule(None, 0, inv_norm, bias, bias_batch, max_distance)
    p_bias = bias_pointer(rule, i_row)
    b_quad_q = tl.load(row_pointers(quad_q, i_row, 0, 0) + o_s * quad_q.column, mask=m_s, other=0.0).to(tl.float32)
    b_lin_q = tl.load(row_pointers(lin_q, i_row, 0, 0) + o_s * lin_q.column, mask=m_s, other=0.0).to(tl.float32)
    p_kv = state_pointers(kv, i_row, o_s, o_column, SIZES.S, SIZES.E)
    b_kv = tl.load(p_kv, mask=m_s[:, None] & m_column[None, :], other=0.0)
    b_out = tl.sum(products(b_lin_q[:, None], b_kv), 0)
    if lin_inv_norm is not None:
        b_out *= lin_inv_norm
    else:
        b_out /= tl.maximum(seen - place, 1).to(tl.float32)
    for c in range(0, place + 1, SIZES.BC):
        o_chunk = c + tl.arange(0, SIZES.BC)
        b_quad_k = open_rows(quad_k, held_quad_k, i_row, place, c, o_s, SIZES.C, SIZES.S, SIZES.BC)
        b_v = open_rows(v, held_v, i_row, place, c, o_column, SIZES.C, SIZES.E, SIZES.BC)
        b_s = tl.sum(products(b_quad_k.to(tl.float32), b_quad_q[None, :]), 1)
        b_s, _slope = scores(b_s, inv_norm, rule, p_bias, place + 0 * o_chunk, o_chunk, place + 1, True, SIZES)
        b_a = probs(b_s, 0.0, SCORE)
        b_out += tl.sum(products(b_a[:, None], b_v.to(tl.float32)), 0)
    keep_token(v, held_v, i_row, place, o_column, SIZES.C, SIZES.E)
    if i_tile == 0:
        keep_token(quad_k, held_quad_k, i_row, place, o_s, SIZES.C, SIZES.S)
        keep_token(lin_k, held_lin_k, i_row, place, o_s, SIZES.C, SIZES.S)
    if gate is not None:
        p_gate = row_pointers(gate, i_row, 0, 0) + o_column * gate.column
        b_out *= activate(tl.load(p_gate, mask=m_column, other=0.0).to(tl.float32), SIZES.GATE)
    p_out = out + tl.cast(i_row, tl.int64) * SIZES.E + o_column
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_column)


@guarded
@triton.jit(do_not_specialize=VARYING)
def close_kernel(
    kv, held_quad_k, held_lin_k, held_v, position,
    SIZES: tl.constexpr,  # C, S, E, BS, BE, BC, PRECISION
):  # fmt: skip
    """After a token: count it, and if it fills the open chunk, add that to the sum and empty it. A program per row."""
    i_row = tl.program_id(0)
    seen = tl.load(position + i_row) + 1
    tl.store(position + i_row, seen)
    if seen % SIZES.C != 0:
        return
    o_s = tl.arange(0, SIZES.BS).to(tl.int64)
    for e in range(0, SIZES.E, SIZES.BE):
        o_column = (e + tl.arange(0, SIZES.BE)).to(tl.int64)
        b_own = tl.zeros([SIZES.BS, SIZES.BE], tl.float32)
        for c in range(0, SIZES.C, SIZES.BC):
            p_lin_k, m_lin_k = open_block(held_lin_k, i_row, c, o_s, SIZES.C, SIZES.S, SIZES.BC)
            p_v, m_v = open_block(held_v, i_row, c, o_column, SIZES.C, SIZES.E, SIZES.BC)
            b_lin_k, b_v = tl.load(p_lin_k, mask=m_lin_k, other=0.0), tl.load(p_v, mask=m_v, other=0.0)
            b_own = tl.dot(b_lin_k.T, b_v, b_own, input_precision=SIZES.PRECISION)
        p_kv = state_pointers(kv, i_row, o_s, o_column, SIZES.S, SIZES.E)
        m_kv = (o_s < SIZES.S)[:, None] & (o_column < SIZES.E)[None, :]
        tl.store(p_kv, tl.load(p_kv, mask=m_kv, other=0.0) + b_own, mask=m_kv)
    tl.debug_barrier()  # all of it is read
    for c in range(0, SIZES.C, SIZES.BC):
        p_quad_k, m_quad_k = open_block(held_quad_k, i_row, c, o_s, SIZES.C, SIZES.S, SIZES.BC)
        p_lin_k, m_lin_k = open_block(held_lin_k, i_row, c, o_s, SIZES.C, SIZES.S, SIZES.BC)
        tl.store(p_quad_k, tl.zeros([SIZES.BC, SIZES.BS], held_quad_k.dtype.element_ty), mask=m_quad_k)
        tl.store(p_lin_k, tl.zeros([SIZES.BC, SIZES.BS], held_lin_k.dtype.element_ty), mask=m_lin_k)
        for e in range(0, SIZES.E, SIZES.BE):
            o_column = (e + tl.arange(0, SIZES.BE)).to(tl.int64)
            p_v, m_v = open_block(held_v, i_row, c, o_column, SIZES.C, SIZES.E, SIZES.BC)
            tl.store(p_v, tl.zeros([SIZES.BC, SIZES.BE], held_v.dtype.element_ty), mask=m_v)

"""FLASH's mixed chunk attention (Hua et al. 2022, section 3.2): O = act(gate) * (A V + lin_Q KV / n), chunk by chunk.

A is local, C x C for each chunk of C tokens; KV (S, E) is the sum of lin_K^T V over the chunks before (all chunks, if
not causal). A sequence is cut into segments of whole chunks, only as many as it takes to fill the device:

    states    a segment's sum of lin_K^T V; none if a sequence is one segment
    carry     the segments' sums become the sums over all segments before
    probs     A of all chunks to panels (values of one tile of columns: computed in `scan`)
    scan      through a segment's chunks with a tile of KV in registers: [lin_Q | A] [KV / n ; V], with the gate as its
              epilogue, then KV += lin_K^T V

The backward scans in reverse order: dKV is the sum of lin_Q^T dX / n over the chunks after.

    states, carry   dKV between segments; on the way dX = act(gate) * dO and dGate = X * dO * act'(gate)
    prologue        these two if a sequence is one segment
    probs, scan     dV = [lin_K | A^T] [dKV ; dX]; each chunk's dKV is stored
    gradient        dS of some chunks to panels, from dA = dX V^T; beside it dlin_Q = dX KV^T / n, dlin_K = V dKV^T
    heads           dquad_Q and dquad_K from dS; the bias's gradient is summed over chunks, and then along diagonals

A slot is an index of chunks: a sequence of n tokens has ceil(n / C) consecutive slots; between packed sequences there
may be an empty one. Slots of segments likewise. Each sum has one writer, so that results are bitwise repeatable.
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
from .glu import activate, gated_backward
from .guarded import guarded

# ---------------------------------------------------------------- chunks and segments


class Chunk(NamedTuple):
    """A chunk: its sequence, its ordinal in it, its batch row, its first token in that row, its number of tokens."""

    sequence: Any
    ordinal: Any
    row: Any
    first: Any
    tokens: Any
    stored: Any  # rows of results to write, including padding (zeros)
    of: Any  # tokens of the sequence


class Segment(NamedTuple):
    """A segment: its sequence with batch row and first token, its ordinal in it, and which of its chunks it has."""

    sequence: Any
    row: Any
    first: Any
    of: Any  # tokens of the sequence
    stored: Any  # rows of results to write for the sequence, including padding
    ordinal: Any
    first_chunk: Any
    chunks: Any  # how many, those of padding alone included


@triton.jit
def chunk_of(i_seq, i_chunk, row, first, n, stored, C: tl.constexpr):
    """A chunk of a sequence."""
    tokens = tl.minimum(tl.maximum(n - i_chunk * C, 0), C)
    return Chunk(i_seq, i_chunk, row, first + i_chunk * C, tokens, tl.minimum(stored - i_chunk * C, C), n)


@triton.jit
def chunk_at(i_slot, n_chunks, sequences, C: tl.constexpr):
    """The chunk in a slot."""
    i_chunk, _, i_seq = place(i_slot, n_chunks, 1, sequences, sequences.cu_seqlens_q, sequences.max_seqlen_q, 1, C)
    row, first, n, stored, _, _, _ = bounds(sequences, i_seq)
    return chunk_of(i_seq, i_chunk, row, first, n, stored, C)


@triton.jit
def segment_at(i_slot, n_segments, chunks_per_segment, sequences, C: tl.constexpr):
    """The segment in a slot."""
    span = C * chunks_per_segment
    ordinal, _, i_seq = place(i_slot, n_segments, 1, sequences, sequences.cu_seqlens_q, sequences.max_seqlen_q, 1, span)
    row, first, n, stored, _, _, _ = bounds(sequences, i_seq)
    first_chunk = ordinal * chunks_per_segment
    chunks = tl.maximum(tl.minimum(tl.cdiv(stored, C) - first_chunk, chunks_per_segment), 0)
    return Segment(i_seq, row, first, n, stored, ordinal, first_chunk, chunks)


@triton.jit
def chunk_in(segment, i, C: tl.constexpr, BACKWARD: tl.constexpr):
    """The chunk that a scan comes to after i others of its segment."""
    i_chunk = segment.first_chunk + i
    if BACKWARD:
        i_chunk = segment.first_chunk + segment.chunks - 1 - i
    return chunk_of(segment.sequence, i_chunk, segment.row, segment.first, segment.of, segment.stored, C)


@triton.jit
def is_last(segment, chunks_per_segment, C: tl.constexpr, BACKWARD: tl.constexpr):
    """Whether scans end with this segment: it is the last that has tokens; BACKWARD the first."""
    last = 0
    if not BACKWARD:
        last = tl.maximum(tl.cdiv(segment.of, C * chunks_per_segment), 1) - 1
    return segment.ordinal == last


@triton.jit
def inverse_divisor(n, inv_norm):
    """1 / n of a global part: as given, or 1 over the tokens that were summed."""
    if inv_norm is not None:
        result = inv_norm
    else:
        result = 1.0 / tl.maximum(n, 1).to(tl.float32)
    return result


@triton.jit
def chunk_divisor(chunk, inv_norm, closed_tokens, C: tl.constexpr, CAUSAL: tl.constexpr):
    """1 / n of a chunk."""
    n = chunk.of
    if CAUSAL:
        n = tl.cast(chunk.ordinal * C, tl.int64)
        if closed_tokens is not None:
            n += tl.load(closed_tokens + chunk.sequence, mask=chunk.of > 0, other=0)
    return inverse_divisor(n, inv_norm)


@triton.jit
def state_pointers(states, i_state, o_row, o_column, S: tl.constexpr, E: tl.constexpr):
    """A tile of a state (S, E)."""
    p_row = states + tl.cast(i_state, tl.int64) * S * E + tl.cast(o_row, tl.int64) * E
    return p_row[:, None] + o_column[None, :]


# ---------------------------------------------------------------- states


@triton.jit
def summed_tokens(chunk, C: tl.constexpr, CAUSAL: tl.constexpr, BACKWARD: tl.constexpr):
    """How many of a chunk's tokens enter the sum: an incomplete chunk is not added to the state, but dX of it is."""
    tokens = chunk.tokens
    if CAUSAL and not BACKWARD:
        tokens = tl.where(tokens == C, tokens, 0)
    return tokens


@triton.jit
def chunk_sum(lin, x, chunk, tokens, o_row, o_column, SIZES: tl.constexpr):
    """A tile of lin^T x over the first tokens of a chunk.

    Tensor cores truncate accumulators: one per chunk, to be added in fp32.
    """
    p_lin, p_x = row_pointers(lin, chunk.row, 0, chunk.first), row_pointers(x, chunk.row, 0, chunk.first)
    b_own = tl.zeros([SIZES.BS, SIZES.BE], tl.float32)
    for j in range(0, tokens, SIZES.BK):
        o_token = j + tl.arange(0, SIZES.BK)
        o_there = tl.cast(o_token, tl.int64)
        b_lin = load_tile(lin, p_lin + o_there * lin.token, o_token < tokens, o_row, SIZES.S, SIZES.BS)
        b_x = load_tile(x, p_x + o_there * x.token, o_token < tokens, o_column, SIZES.E, SIZES.BE)
        b_own = tl.dot(b_lin.T, b_x, b_own, input_precision=SIZES.PRECISION)
    return b_own


@triton.jit
def gated_chunk_sum(lin, dout, gate, product, dx, dgate, chunk, stores, o_row, o_column, SIZES: tl.constexpr):
    """A tile of lin^T dX over a chunk; who `stores` writes dX = act(gate) * dO and dGate on the way."""
    b_own = tl.zeros([SIZES.BS, SIZES.BE], tl.float32)
    for j in range(0, chunk.stored, SIZES.BK):
        o_token = j + tl.arange(0, SIZES.BK)
        o_there = chunk.first + o_token
        m_there, m_stored = o_token < chunk.tokens, o_token < tl.where(stores, chunk.stored, 0)
        p_lin, p_do = row_pointers(lin, chunk.row, 0, o_there), row_pointers(dout, chunk.row, 0, o_there)
        p_gate, p_product = row_pointers(gate, chunk.row, 0, o_there), row_pointers(product, chunk.row, 0, o_there)
        b_do = load_tile(dout, p_do, m_there, o_column, SIZES.E, SIZES.BE).to(tl.float32)
        b_gate = load_tile(gate, p_gate, m_there, o_column, SIZES.E, SIZES.BE).to(tl.float32)
        b_product = load_tile(product, p_product, m_there, o_column, SIZES.E, SIZES.BE).to(tl.float32)
        b_lin = load_tile(lin, p_lin, m_there, o_row, SIZES.S, SIZES.BS)
        b_dgate, b_dx = gated_backward(b_do, b_gate, b_product, SIZES.GATE, "identity")
        b_dx = b_dx.to(dx.pointer.dtype.element_ty)
        store_tile(dx, row_pointers(dx, chunk.row, 0, o_there), m_stored, o_column, b_dx, SIZES.E, SIZES.BE)
        p_dgate = row_pointers(dgate, chunk.row, 0, o_there)
        store_tile(dgate, p_dgate, m_stored, o_column, b_dgate, SIZES.E, SIZES.BE)
        b_own = tl.dot(b_lin.T, b_dx, b_own, input_precision=SIZES.PRECISION)
    return b_own


@guarded
@triton.jit(do_not_specialize=VARYING)
def states_kernel(
    lin, x, dout, gate, product, dgate, totals, closed_tokens,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    lin_inv_norm, n_segments, chunks_per_segment,
    SIZES: tl.constexpr,  # C, S, E, BS, BE, BK, GATE, PRECISION
    CAUSAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A tile of a segment's sum of lin^T x (BACKWARD: over n); causal zeros for the last one, which none follows.

    With a gate x is dX, which is written here, and so is dGate; see `gated_chunk_sum`.
    """
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    n_across = tl.cdiv(SIZES.E, SIZES.BE)
    i_tile = tl.program_id(0) % (n_across * tl.cdiv(SIZES.S, SIZES.BS))
    i_slot = tl.program_id(0) // (n_across * tl.cdiv(SIZES.S, SIZES.BS))
    segment = segment_at(i_slot, n_segments, chunks_per_segment, sequences, SIZES.C)
    o_row = i_tile // n_across * SIZES.BS + tl.arange(0, SIZES.BS)
    o_column = i_tile % n_across * SIZES.BE + tl.arange(0, SIZES.BE)
    count = segment.chunks
    if CAUSAL and gate is None:
        count = tl.where(is_last(segment, chunks_per_segment, SIZES.C, BACKWARD), 0, count)
    b_sum = tl.zeros([SIZES.BS, SIZES.BE], tl.float32)
    for i in range(0, count):
        chunk = chunk_in(segment, i, SIZES.C, BACKWARD)
        if gate is None:
            b_own = chunk_sum(lin, x, chunk, summed_tokens(chunk, SIZES.C, CAUSAL, BACKWARD), o_row, o_column, SIZES)
        else:
            stores = i_tile < n_across
            b_own = gated_chunk_sum(lin, dout, gate, product, x, dgate, chunk, stores, o_row, o_column, SIZES)
        if BACKWARD:
            b_own *= chunk_divisor(chunk, lin_inv_norm, closed_tokens, SIZES.C, CAUSAL)
        b_sum += b_own
    m_tile = (o_row < SIZES.S)[:, None] & (o_column < SIZES.E)[None, :]
    tl.store(state_pointers(totals, i_slot, o_row, o_column, SIZES.S, SIZES.E), b_sum, mask=m_tile)


@guarded
@triton.jit(do_not_specialize=VARYING)
def carry_kernel(
    totals, start, result, states,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k, lin_inv_norm, n_segments, span,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Causal, segments' totals become `start` and what came before them (BACKWARD: comes after).

    Else `start` and all totals go to `result`, and what chunks read, over n, to `states`.
    """
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    i_seq = tl.program_id(0) // tl.cdiv(SIZE, BLOCK)
    o_state = tl.program_id(0) % tl.cdiv(SIZE, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    m_state = o_state < SIZE
    _, _, n, _, _, _, _ = bounds(sequences, i_seq)
    p_first = totals + tl.cast(first_slot(sequences, i_seq, n_segments, span), tl.int64) * SIZE + o_state
    p_own = tl.cast(i_seq, tl.int64) * SIZE + o_state
    count = tl.maximum(tl.cdiv(n, span), 1)  # a sequence without tokens has a segment, too
    b_sum = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        b_sum += tl.load(start + p_own, mask=m_state, other=0.0)
    for i in tl.range(0, count, num_stages=4):  # several loads in flight
        i_segment = i
        if BACKWARD:
            i_segment = count - 1 - i
        p_total = p_first + tl.cast(i_segment, tl.int64) * SIZE
        b_total = tl.load(p_total, mask=m_state, other=0.0)
        if CAUSAL:
            tl.store(p_total, b_sum, mask=m_state)
        b_sum += b_total
    if not CAUSAL:
        tl.store(result + p_own, b_sum, mask=m_state)
        if not BACKWARD:
            b_sum *= inverse_divisor(n, lin_inv_norm)
        tl.store(states + p_own, b_sum.to(states.dtype.element_ty), mask=m_state)


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
    """Pointers into a panel (slots, WIDTH, WIDTH), which is written whole for a chunk that has tokens."""
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
    inv_norm, right, bias, bias_batch, max_distance, n_chunks,
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
    chunk = chunk_at(i_slot, n_chunks, sequences, SIZES.C)
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


@triton.jit
def local_part(chunk, rule, q, k, x, panel, i_slot, first_row, o_column, SIZES: tl.constexpr, SCORE: tl.constexpr,
               BACKWARD: tl.constexpr):  # fmt: skip
    """A x of some rows of a chunk and a tile of columns; BACKWARD A^T x. A is read, or made, a block at a time."""
    o_row = first_row + tl.arange(0, SIZES.BM)
    start, stop = 0, chunk.tokens
    if rule.right is not None and BACKWARD:
        start = first_row // SIZES.BK * SIZES.BK
    elif rule.right is not None:
        stop = tl.minimum(first_row + SIZES.BM, chunk.tokens)
    p_x = row_pointers(x, chunk.row, 0, chunk.first)
    p_bias = bias_pointer(rule, chunk.row)
    if panel is None and not BACKWARD:
        b_q = chunk_rows(q, chunk, o_row, SIZES)
    b_acc = tl.zeros([SIZES.BM, SIZES.BE], tl.float32)
    for j in range(start, stop, SIZES.BK):
        o_other = j + tl.arange(0, SIZES.BK)
        if panel is None and BACKWARD:
            b_q = chunk_rows(q, chunk, o_other, SIZES)
            b_a = probs(local_scores(chunk, rule, p_bias, b_q, k, o_other, o_row, SIZES), 0.0, SCORE).T
        elif panel is None:
            b_a = probs(local_scores(chunk, rule, p_bias, b_q, k, o_row, o_other, SIZES), 0.0, SCORE)
        elif BACKWARD:
            b_a = tl.load(panel_block(panel, i_slot, o_other, o_row, SIZES.WIDTH)).T
        else:
            b_a = tl.load(panel_block(panel, i_slot, o_row, o_other, SIZES.WIDTH))
        p_other = p_x + tl.cast(o_other, tl.int64) * x.token
        b_x = load_tile(x, p_other, o_other < chunk.tokens, o_column, SIZES.E, SIZES.BE)
        b_a, b_x = factors(b_a, b_x)
        b_acc = tl.dot(b_a, b_x, b_acc, input_precision=SIZES.FACTORS)
    return b_acc


class Carried(NamedTuple):
    """What a scan takes from before its segment, and leaves; each is a pointer, or None."""

    starts: Any  # (segments, S, E): sums before the segments
    states: Any  # (slots, S, E): what chunks read
    result: Any  # (sequences, S, E): what is summed in the end
    closed_tokens: Any  # (sequences,): tokens before a sequence


@guarded
@triton.jit(do_not_specialize=VARYING)
def scan_kernel(
    q, k, reader, summed, x, panel, carried, gate, product, out,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    inv_norm, right, bias, bias_batch, max_distance, lin_inv_norm, n_chunks, n_segments, chunks_per_segment, n_parts,
    SIZES: tl.constexpr,  # C, S, E, BS, BM, BE, BK, WIDTH, GATE, PRECISION, FACTORS
    SCORE: tl.constexpr, CONTINUED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """[reader | A] [KV ; x] of a segment's chunks and a tile of columns, and that times act(gate), KV at hand.

    Forward KV is the sum of lin_K^T V over the chunks before, over n; `reader` is lin_Q, `summed` lin_K, x the values.
    BACKWARD it gives dV: KV is dKV, the sum of lin_Q^T dX / n over the chunks after, `reader` lin_K, `summed` lin_Q, A
    transposed, x is dX. Not causal KV does not change. What chunks read goes to `states`, what is summed in the end to
    `result`; without `out` these are all. Parts of a segment share its chunks' rows, and each sums KV for itself.
    """
    CAUSAL: tl.constexpr = right is not None
    starts, states, result = carried.starts, carried.states, carried.result
    closed_tokens = carried.closed_tokens
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, inv_norm, bias, bias_batch, max_distance)
    n_tiles = tl.cdiv(SIZES.E, SIZES.BE)
    i_slot, i_part = tl.program_id(0) // (n_tiles * n_parts), tl.program_id(0) // n_tiles % n_parts
    segment = segment_at(i_slot, n_segments, chunks_per_segment, sequences, SIZES.C)
    o_s, o_column = tl.arange(0, SIZES.BS), tl.program_id(0) % n_tiles * SIZES.BE + tl.arange(0, SIZES.BE)
    is_sequence = segment.sequence < n_sequences
    b_sum = tl.zeros([SIZES.BS, SIZES.BE], tl.float32)
    if starts is not None:
        i_start = i_slot if CAUSAL else segment.sequence
        p_start = state_pointers(starts, i_start, o_s, o_column, SIZES.S, SIZES.E)
        m_start = (o_s < tl.where(is_sequence, SIZES.S, 0))[:, None] & (o_column < SIZES.E)[None, :]
        b_sum += tl.load(p_start, mask=m_start, other=0.0)
    ends = is_last(segment, chunks_per_segment, SIZES.C, BACKWARD) & is_sequence
    first_of_sequence = first_slot(sequences, segment.sequence, n_chunks, SIZES.C)
    for i in range(0, segment.chunks):
        chunk = chunk_in(segment, i, SIZES.C, BACKWARD)
        inverse = chunk_divisor(chunk, lin_inv_norm, closed_tokens, SIZES.C, CAUSAL)
        i_chunk = first_of_sequence + chunk.ordinal
        b_state = b_sum
        if CAUSAL and not BACKWARD:
            b_state *= inverse
        if states is not None:
            b_state = b_state.to(states.dtype.element_ty)
            o_stop = tl.where((chunk.tokens > 0) & (i_part == 0), SIZES.S, 0)
            p_state = state_pointers(states, i_chunk, o_s, o_column, SIZES.S, SIZES.E)
            tl.store(p_state, b_state, mask=(o_s < o_stop)[:, None] & (o_column < SIZES.E)[None, :])
        if out is not None:
            # The first chunk has a global part only with an initial state; an incomplete one gets no dV from it.
            reads = chunk.tokens > 0
            if CAUSAL and BACKWARD:
                reads = chunk.tokens == SIZES.C
            elif CAUSAL and not CONTINUED:
                reads = chunk.ordinal > 0
            for first_row in range(i_part * SIZES.BM, chunk.stored, n_parts * SIZES.BM):
                o_row = first_row + tl.arange(0, SIZES.BM)
                m_row, m_stored = o_row < chunk.tokens, o_row < chunk.stored
                b_acc = local_part(chunk, rule, q, k, x, panel, i_chunk, first_row, o_column, SIZES, SCORE, BACKWARD)
                p_reader = row_pointers(reader, chunk.row, 0, chunk.first + o_row)
                m_reader = o_row < tl.where(reads, chunk.tokens, 0)
                b_reader = load_rows(reader, p_reader, m_reader, SIZES.S, SIZES.BS, False)
                b_kv, b_reader = factors(b_state, b_reader)
                b_acc = tl.dot(b_reader, b_kv, b_acc, input_precision=SIZES.FACTORS)
                b_acc = tl.where(m_row[:, None], b_acc, 0.0)
                if product is not None:
                    p_product = row_pointers(product, chunk.row, 0, chunk.first + o_row)
                    store_tile(product, p_product, m_stored, o_column, b_acc, SIZES.E, SIZES.BE)
                if gate is not None:
                    p_gate = row_pointers(gate, chunk.row, 0, chunk.first + o_row)
                    b_acc *= load_gate(gate, p_gate, m_row, o_column, SIZES.E, SIZES.BE, SIZES.GATE)
                p_out = row_pointers(out, chunk.row, 0, chunk.first + o_row)
                store_tile(out, p_out, m_stored, o_column, b_acc, SIZES.E, SIZES.BE)
        if CAUSAL:
            wanted = i + 1 < segment.chunks
            if result is not None:
                wanted = wanted | ends
            tokens = tl.where(wanted, summed_tokens(chunk, SIZES.C, CAUSAL, BACKWARD), 0)
            b_own = chunk_sum(summed, x, chunk, tokens, o_s, o_column, SIZES)
            if BACKWARD:
                b_own *= inverse
            b_sum += b_own
    if result is not None:
        p_result = state_pointers(result, segment.sequence, o_s, o_column, SIZES.S, SIZES.E)
        o_stop = tl.where(ends & (i_part == 0), SIZES.S, 0)
        tl.store(p_result, b_sum, mask=(o_s < o_stop)[:, None] & (o_column < SIZES.E)[None, :])


# ---------------------------------------------------------------- backward


@triton.jit
def linear_part(x, states, out, chunk, i_state, first_row, reads, o_s, SIZES: tl.constexpr):
    """x KV^T of some rows of a chunk and a tile of columns."""
    o_row = first_row + tl.arange(0, SIZES.BM)
    p_x = row_pointers(x, chunk.row, 0, chunk.first + o_row)
    b_acc = tl.zeros([SIZES.BM, SIZES.BN], tl.float32)
    for e in range(0, tl.where(reads, SIZES.E, 0), SIZES.BK):
        o_column = e + tl.arange(0, SIZES.BK)
        b_x = load_tile(x, p_x, o_row < chunk.tokens, o_column, SIZES.E, SIZES.BK)
        p_state = state_pointers(states, i_state, o_s, o_column, SIZES.S, SIZES.E)
        b_state = tl.load(p_state, mask=(o_s < SIZES.S)[:, None] & (o_column < SIZES.E)[None, :], other=0.0)
        b_state, b_x = factors(b_state, b_x)
        b_acc = tl.dot(b_x, b_state.T, b_acc, input_precision=SIZES.FACTORS)
    p_out = row_pointers(out, chunk.row, 0, chunk.first + o_row)
    store_tile(out, p_out, o_row < chunk.stored, o_s, b_acc, SIZES.S, SIZES.BN)


@guarded
@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    q, k, v, dx, states, dstates, dlin_q, dlin_k, dpanel,
    lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    inv_norm, right, bias, bias_batch, max_distance, n_chunks, first_block,
    SIZES: tl.constexpr,  # C, S, E, BS, BM, BN, BK, WIDTH, PRECISION, FACTORS
    SCORE: tl.constexpr,
):  # fmt: skip
    """What is summed over all columns of dX and V, of which a chunk's programs share every read of memory.

    Some make dS from dA = dX V^T, a block for its panel, zeros where no query sees a key; the others some rows and
    columns of dlin_Q = dX KV^T / n, in whose states the divisor is, or of dlin_K = V dKV^T.
    """
    BM: tl.constexpr = SIZES.BM
    BN: tl.constexpr = SIZES.BN
    CAUSAL: tl.constexpr = right is not None
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    rule = GatedRule(None, right, inv_norm, bias, bias_batch, max_distance)
    BLOCKS: tl.constexpr = (SIZES.WIDTH // BM) * (SIZES.WIDTH // BN)
    ROWS: tl.constexpr = (SIZES.C + BM - 1) // BM
    TILES: tl.constexpr = ROWS * ((SIZES.S + BN - 1) // BN)
    i_slot, i_block = tl.program_id(0) // (BLOCKS + 2 * TILES), tl.program_id(0) % (BLOCKS + 2 * TILES)
    chunk = chunk_at(first_block + i_slot, n_chunks, sequences, SIZES.C)
    if i_block >= BLOCKS:
        i_tile = (i_block - BLOCKS) // 2
        first_row, o_s = i_tile % ROWS * BM, i_tile // ROWS * BN + tl.arange(0, BN)
        i_state = first_block + i_slot if CAUSAL else chunk.sequence
        if first_row < chunk.stored:
            reads = first_row < chunk.tokens
            if (i_block - BLOCKS) % 2 == 0:
                linear_part(dx, states, dlin_q, chunk, i_state, first_row, reads, o_s, SIZES)
            else:
                if CAUSAL:  # an incomplete chunk is in no state
                    reads = chunk.tokens == SIZES.C
                linear_part(v, dstates, dlin_k, chunk, i_state, first_row, reads, o_s, SIZES)
        return
    if chunk.tokens == 0:
        return
    first_query, first_key = i_block // (SIZES.WIDTH // BN) * BM, i_block % (SIZES.WIDTH // BN) * BN
    o_query, o_key = first_query + tl.arange(0, BM), first_key + tl.arange(0, BN)
    p_dpanel = panel_block(dpanel, i_slot, o_query, o_key, SIZES.WIDTH)
    if is_hidden(chunk, rule, first_query, first_key, BM):
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
        b_ds = tl.load(panel_block(dpanel, i_slot, o_row, o_key, SIZES.WIDTH))
        b_ds, b_k = factors(b_ds, chunk_rows(k, chunk, o_key, SIZES))
        b_acc = tl.dot(b_ds, b_k, b_acc, input_precision=SIZES.FACTORS)
    b_acc = tl.where(m_row[:, None], b_acc, 0.0)
    store_rows(dq, row_pointers(dq, chunk.row, 0, chunk.first + o_row), m_stored, b_acc * inv_norm, SIZES.S, SIZES.BS)
    b_acc = tl.zeros([BM, SIZES.BS], tl.float32)
    for j in range(start, chunk.tokens, BN):
        o_query = j + tl.arange(0, BN)
        b_ds = tl.load(panel_block(dpanel, i_slot, o_query, o_row, SIZES.WIDTH))
        b_ds, b_q = factors(b_ds, chunk_rows(q, chunk, o_query, SIZES))
        b_acc = tl.dot(b_ds.T, b_q, b_acc, input_precision=SIZES.FACTORS)
    b_acc = tl.where(m_row[:, None], b_acc, 0.0)
    store_rows(dk, row_pointers(dk, chunk.row, 0, chunk.first + o_row), m_stored, b_acc * inv_norm, SIZES.S, SIZES.BS)


@guarded
@triton.jit(do_not_specialize=VARYING)
def dbias_kernel(
    dpanel, total, lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k,
    n_chunks, n_parts, first_block, last_block, first_row,
    C: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of sums of dS (B, parts, WIDTH, WIDTH), each of every n_parts-th chunk of a row: adds one panel."""
    sequences = Sequences(lengths, cu_seqlens_q, cu_seqlens_k, n_sequences, max_seqlen_q, max_seqlen_k)
    ACROSS: tl.constexpr = WIDTH // BLOCK
    i_batch, i_block = first_row + tl.program_id(0) // (ACROSS * ACROSS * n_parts), tl.program_id(0) % (ACROSS * ACROSS)
    i_part = tl.program_id(0) // (ACROSS * ACROSS) % n_parts
    o_query = i_block // ACROSS * BLOCK + tl.arange(0, BLOCK)
    o_key = i_block % ACROSS * BLOCK + tl.arange(0, BLOCK)
    start = 0
    low, high = first_block, last_block
    if sequences.cu_seqlens_q is None:  # the chunks of this row of the batch
        start = i_batch * n_chunks
        low = tl.maximum(first_block, start)
        high = tl.minimum(last_block, start + n_chunks)
    p_total = panel_block(total, i_batch * n_parts + i_part, o_query, o_key, WIDTH)
    rows_before = tl.where(first_block <= start, 0, WIDTH)  # that hold sums already: none before the first chunk
    b_total = tl.load(p_total, mask=(o_query < rows_before)[:, None], other=0.0)
    for i in range(low + i_part, high, n_parts):
        chunk = chunk_at(i, n_chunks, sequences, C)
        p_ds = panel_block(dpanel, i - first_block, o_query, o_key, WIDTH)
        b_total += tl.load(p_ds, mask=(o_query < chunk.tokens)[:, None], other=0.0).to(tl.float32)
    tl.store(p_total, b_total)


@guarded
@triton.jit(do_not_specialize=VARYING)
def diagonals_kernel(total, out, n_rows, n_columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of panels `total` (B, n_rows, WIDTH), one below the other, by j - i = t - n_columns // 2: out (B, t)."""
    n_blocks = tl.cdiv(n_columns, BLOCK)
    i_batch = tl.program_id(0) // n_blocks
    o_t = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_rows, BLOCK):
        o_row = first + tl.arange(0, BLOCK)
        o_key = (o_row % WIDTH)[:, None] + (o_t - n_columns // 2)[None, :]
        p_row = total + (tl.cast(i_batch, tl.int64) * n_rows + o_row) * WIDTH
        mask = (o_row < n_rows)[:, None] & (o_key >= 0) & (o_key < WIDTH)
        b_sum += tl.sum(tl.load(p_row[:, None] + o_key, mask=mask, other=0.0), 0)
    p_out = out + tl.cast(i_batch, tl.int64) * n_columns + o_t
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=o_t < n_columns)


# ---------------------------------------------------------------- one token


@triton.jit
def open_rows(b_new, held, i_row, place, c, o_column, C: tl.constexpr, WIDTH: tl.constexpr, BC: tl.constexpr):
    """BC rows of an open chunk from c on, with the new token at its place and zeros after it."""
    o_chunk = c + tl.arange(0, BC)
    p_held, m_held = open_block(held, i_row, c, o_column, C, WIDTH, BC)
    b_held = tl.load(p_held, mask=(o_chunk < place)[:, None] & m_held, other=0.0)
    return tl.where((o_chunk == place)[:, None], b_new[None, :], b_held)


@triton.jit
def open_block(held, i_row, c, o_column, C: tl.constexpr, WIDTH: tl.constexpr, BC: tl.constexpr):
    """Pointers to BC rows of an open chunk (B, C, WIDTH) from c on, and which are in it."""
    o_chunk = c + tl.arange(0, BC)
    p_row = held + (tl.cast(i_row, tl.int64) * C + o_chunk) * WIDTH
    return p_row[:, None] + o_column[None, :], (o_chunk < C)[:, None] & (o_column < WIDTH)[None, :]


@triton.jit
def keep_token(b_new, held, i_row, place, o_column, C: tl.constexpr, WIDTH: tl.constexpr):
    """Write the new token, or some of its columns, to its place in the open chunk."""
    p_held = held + (tl.cast(i_row, tl.int64) * C + place) * WIDTH + o_column
    tl.store(p_held, b_new.to(held.dtype.element_ty), mask=o_column < WIDTH)


@triton.jit
def tile_of_token(position, SIZES: tl.constexpr):
    """Of a program: its row and tile, the tokens before, the place in their chunk, its channels and columns."""
    n_tiles = tl.cdiv(SIZES.E, SIZES.BE)
    i_row, i_tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    seen = tl.load(position + i_row)
    o_column = (i_tile * SIZES.BE + tl.arange(0, SIZES.BE)).to(tl.int64)
    return i_row, i_tile, seen, tl.cast(seen % SIZES.C, tl.int32), tl.arange(0, SIZES.BS).to(tl.int64), o_column


@triton.jit
def load_token(x, i_row, o_column, WIDTH: tl.constexpr):
    """The only token of a row, or some of its columns."""
    return tl.load(row_pointers(x, i_row, 0, 0) + o_column * x.column, mask=o_column < WIDTH, other=0.0)


@triton.jit
def attend(
    b_quad_q, b_quad_k, b_lin_q, b_v, kv, held_quad_k, held_v, i_row, seen, o_s, o_column, rule, lin_inv_norm,
    SIZES: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """Some columns of a token's product, of the sum and the open chunk; `seen` tokens came before it."""
    place = tl.cast(seen % SIZES.C, tl.int32)
    m_s, m_column = o_s < SIZES.S, o_column < SIZES.E
    p_bias = bias_pointer(rule, i_row)
    p_kv = state_pointers(kv, i_row, o_s, o_column, SIZES.S, SIZES.E)
    b_kv = tl.load(p_kv, mask=m_s[:, None] & m_column[None, :], other=0.0)
    b_out = tl.sum(products(b_lin_q.to(tl.float32)[:, None], b_kv), 0)
    if lin_inv_norm is not None:
        b_out *= lin_inv_norm
    else:
        b_out /= tl.maximum(seen - place, 1).to(tl.float32)
    for c in range(0, place + 1, SIZES.BC):
        o_chunk = c + tl.arange(0, SIZES.BC)
        b_keys = open_rows(b_quad_k, held_quad_k, i_row, place, c, o_s, SIZES.C, SIZES.S, SIZES.BC)
        b_values = open_rows(b_v, held_v, i_row, place, c, o_column, SIZES.C, SIZES.E, SIZES.BC)
        b_s = tl.sum(products(b_keys.to(tl.float32), b_quad_q.to(tl.float32)[None, :]), 1)
        b_s, _slope = scores(b_s, rule.scale, rule, p_bias, place + 0 * o_chunk, o_chunk, place + 1, True, SIZES)
        b_a = probs(b_s, 0.0, SCORE)
        b_out += tl.sum(products(b_a[:, None], b_values.to(tl.float32)), 0)
    return b_out


@guarded
@triton.jit(do_not_specialize=VARYING)
def step_kernel(
    quad_q, quad_k, lin_q, lin_k, v, gate, kv, held_quad_k, held_lin_k, held_v, position, out,
    inv_norm, bias, bias_batch, max_distance, lin_inv_norm,
    SIZES: tl.constexpr,  # C, S, E, BS, BE, BC, GATE
    SCORE: tl.constexpr,
):  # fmt: skip
    """One token: a tile of its output, and its row of the open chunk. Nobody reads that row, but takes the token."""
    i_row, i_tile, seen, place, o_s, o_column = tile_of_token(position, SIZES)
    b_quad_k, b_v = load_token(quad_k, i_row, o_s, SIZES.S), load_token(v, i_row, o_column, SIZES.E)
    b_out = attend(
        load_token(quad_q, i_row, o_s, SIZES.S), b_quad_k, load_token(lin_q, i_row, o_s, SIZES.S), b_v,
        kv, held_quad_k, held_v, i_row, seen, o_s, o_column,
        GatedRule(None, 0, inv_norm, bias, bias_batch, max_distance), lin_inv_norm, SIZES, SCORE,
    )  # fmt: skip
    keep_token(b_v, held_v, i_row, place, o_column, SIZES.C, SIZES.E)
    if i_tile == 0:
        keep_token(b_quad_k, held_quad_k, i_row, place, o_s, SIZES.C, SIZES.S)
        keep_token(load_token(lin_k, i_row, o_s, SIZES.S), held_lin_k, i_row, place, o_s, SIZES.C, SIZES.S)
    if gate is not None:
        b_out *= activate(load_token(gate, i_row, o_column, SIZES.E).to(tl.float32), SIZES.GATE)
    p_out = out + tl.cast(i_row, tl.int64) * SIZES.E + o_column
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=o_column < SIZES.E)


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

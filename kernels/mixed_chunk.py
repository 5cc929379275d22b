"""Launchers of mixed chunk attention's kernels (`mixed_chunk_kernels.py`): forward, backward and one token."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashgau.options import Layout, MixedChunkHeads, MixedChunkOptions, MixedChunkSaved, OpenChunk

from .common import (
    FUSED_ADDITION,
    Choose,
    Config,
    Sequences,
    Sizes,
    blocks_of,
    chosen_by,
    launcher,
    matmul_precision,
    processors,
    sequences_of,
)
from .gated import bias_rule, precisions, prologue, room_for_panel, rows
from .mixed_chunk_kernels import (
    Carried,
    carry_kernel,
    close_kernel,
    dbias_kernel,
    diagonals_kernel,
    gradient_kernel,
    heads_kernel,
    probs_kernel,
    scan_kernel,
    states_kernel,
    step_kernel,
)

# The axes that limit a kernel's block_m, block_n and block_k.
_EXTENTS = {
    "states": "SEC",
    "weights": "CC",
    "fused": "CEC",
    "product": "CEC",
    "gradient": "CCE",
    "heads": "CC",
}
_PANEL_UNIT = 128  # tokens: blocks of a panel must divide it
_PANEL_BYTES = 2**28  # of the panels of A; more only where they are no larger than the values
_FUSED_TILES = 1  # of columns; up to it, recomputing A for each tile is cheaper than storing it
_MOST_SEGMENTS = 32  # of a sequence
_SEGMENT_PRICE = 1.25  # what summing segments ahead makes of the time of a scan


class _ChunkCall(NamedTuple):
    """What all kernels of one call share."""

    tokens: Tensor  # the values, for their type and device
    probs_like: Tensor  # of the type of weights and states
    choose: Choose
    size: dict[str, int]  # C, S and E
    sequences: Sequences
    rule: tuple[Any, ...]  # inv_norm, right, bias, bias_batch, max_distance
    lin_inv_norm: float | None
    closed_tokens: Tensor | None
    initial: Tensor | None
    score: str
    gate_activation: str
    precision: str  # of products of inputs
    factors: str  # of products of weights and states, see `factors`
    slots: int
    n_chunks: int  # slots of a row
    n_segments: int  # slots of a row
    chunks_per_segment: int
    n_parts: int  # programs that share the rows of a chunk
    rows: int  # of the batch that have their own slots: 1 when packed

    @property
    def causal(self) -> bool:
        return self.rule[1] is not None

    @property
    def packed(self) -> bool:
        return self.sequences.cu_seqlens_q is not None

    @property
    def single(self) -> bool:
        """Whether a sequence is one segment."""
        return self.n_segments * self.rows == self.sequences.n_sequences + (2 if self.packed else 0)

    @property
    def scans_only(self) -> bool:
        """Whether no sum is needed before a scan."""
        return self.causal and self.single

    @property
    def width(self) -> int:
        """S as a block."""
        return max(16, triton.next_power_of_2(self.size["S"]))

    @property
    def largest_chunk(self) -> int:
        """C, or less if no sequence is that long: a power of two then, so that few kernels are compiled for it."""
        return min(self.size["C"], triton.next_power_of_2(self.tokens.shape[1]))

    @property
    def panel_width(self) -> int:
        """The largest chunk as whole blocks of any size."""
        unit = min(_PANEL_UNIT, max(16, triton.next_power_of_2(self.largest_chunk)))
        return triton.cdiv(self.largest_chunk, unit) * unit

    def is_fused(self, backward: bool) -> bool:
        """Whether A is made where it is multiplied, rather than read from panels (A^T would take more registers)."""
        if not backward and triton.cdiv(self.size["E"], self.config("fused").block_n) <= _FUSED_TILES:
            return True
        panels = self.slots * self.panel_width**2 * self.probs_like.element_size()
        return panels > max(_PANEL_BYTES, self.tokens.numel() * self.tokens.element_size())

    def config(self, kernel: str) -> Config:
        """How a kernel is launched; no block is larger than its axis."""
        x = self.tokens if kernel == "states" else self.probs_like
        chosen: Config = self.choose(f"mixed_chunk_{kernel}", x, self.width)
        extents = self.size | {"C": self.largest_chunk}
        fitting = {
            name: min(getattr(chosen, name), max(16, triton.next_power_of_2(extents[extent])))
            for name, extent in zip(("block_m", "block_n", "block_k"), _EXTENTS[kernel], strict=False)
        }
        return replace(chosen, **fitting)


@launcher
def mixed_chunk_attention_forward(
    heads: MixedChunkHeads,
    v: Tensor,
    gate: Tensor | None = None,
    layout: Layout = Layout(),
    options: MixedChunkOptions = MixedChunkOptions(),
    save: bool = False,
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output (B, N, E); KV (G, S, E) of closed chunks; and with `save` what the backward reads: the ungated sum of both
    parts if there is a gate, and the states if they are kept."""
    (quad_q, quad_k, lin_q, lin_k), initial_kv = heads, options.initial_kv
    out = v.new_empty(v.shape)
    product = v.new_empty(v.shape) if save and gate is not None else None
    call = _call(quad_q, v, layout, options, chosen_by(config))
    kept = options.kept_states(quad_q, v, layout) if save else None
    states = None if kept is None else call.probs_like.new_empty(kept)
    if v.numel() == 0:
        return out, _untouched(call, initial_kv), product, states
    starts, kv, states = _starts(call, lin_k, v, initial_kv, states, backward=False)
    panel = _panel(call, quad_q, quad_k, backward=False)
    _scan(
        call,
        quad_q,
        quad_k,
        lin_q,
        lin_k,
        v,
        panel,
        starts,
        states if call.causal else None,
        kv if call.causal else None,
        gate,
        product,
        out,
        backward=False,
    )
    return out, kv, product, states


@launcher
def mixed_chunk_attention_backward(
    dout: Tensor,
    dkv: Tensor | None,
    heads: MixedChunkHeads,
    v: Tensor,
    gate: Tensor | None,
    saved: MixedChunkSaved = MixedChunkSaved(),
    layout: Layout = Layout(),
    options: MixedChunkOptions = MixedChunkOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of quad_q, quad_k, lin_q, lin_k, v, gate, rel_bias (B, 2P-1) and initial_kv (None without it)."""
    product, chunk_states = saved
    (quad_q, quad_k, lin_q, lin_k), rel_bias, initial_kv = heads, options.rel_bias, options.initial_kv
    call = _call(quad_q, v, layout, options, chosen_by(config))
    dquad_q, dquad_k, dlin_q, dlin_k, dv = (t.new_empty(t.shape) for t in (quad_q, quad_k, lin_q, lin_k, v))
    dgate = gate.new_empty(gate.shape) if gate is not None else None
    if v.numel() == 0:
        dbias = rel_bias.new_zeros(rel_bias.shape) if rel_bias is not None else None
        dinitial = _untouched(call, dkv) if initial_kv is not None else None
        return dquad_q, dquad_k, dlin_q, dlin_k, dv, dgate, dbias, dinitial
    gated = None
    if gate is None or product is None:
        dx = dout
    elif call.scans_only:
        dx, _ = prologue(call.sequences, dout, gate, product, dgate, call.gate_activation, call.choose)
    else:  # where dX is summed, it is made, too
        dx, gated = dout.new_empty(dout.shape), (dout, gate, product, dgate)
    states = chunk_states
    if states is None:
        states = _states(call, quad_q, quad_k, lin_q, lin_k, v, initial_kv)
    dstates = call.probs_like.new_empty(call.slots, call.size["S"], call.size["E"]) if call.causal else None
    starts, dinitial, dstates = _starts(call, lin_q, dx, dkv, dstates, gated, backward=True)
    _scan(
        call,
        quad_q,
        quad_k,
        lin_k,
        lin_q,
        dx,
        _panel(call, quad_q, quad_k, backward=True),
        starts,
        dstates if call.causal else None,
        dinitial if call.causal and initial_kv is not None else None,
        None,
        None,
        dv,
        backward=True,
    )

    config, of_heads, wide = call.config("gradient"), call.config("heads"), call.panel_width
    total, n_parts, block = None, 1, min(64, wide & -wide)
    if rel_bias is not None:
        blocks = v.shape[0] * (wide // block) ** 2
        n_parts = min(call.n_chunks, triton.cdiv(2 * processors(v.device), blocks))
        total = v.new_empty(v.shape[0], n_parts, wide, wide, dtype=torch.float32)
    dpanel, step = room_for_panel(call.probs_like, wide * wide, call.slots)
    sizes: dict[str, Any] = {"C": options.chunk_size, "S": call.size["S"], "BS": call.width, "WIDTH": wide}
    programs = (wide // config.block_m) * (wide // config.block_n)
    programs += 2 * triton.cdiv(options.chunk_size, config.block_m) * triton.cdiv(call.size["S"], config.block_n)
    for first in range(0, call.slots, step):
        count = min(step, call.slots - first)
        gradient_kernel[(count * programs,)](
            rows(quad_q), rows(quad_k), rows(v), rows(dx), states, dstates, rows(dlin_q), rows(dlin_k), dpanel,
            *call.sequences, *call.rule, call.n_chunks, first,
            Sizes(
                **sizes, E=call.size["E"], BM=config.block_m, BN=config.block_n, BK=config.block_k,
                PRECISION=call.precision, FACTORS=call.factors,
            ),
            SCORE=options.score, **config.launch(),
        )  # fmt: skip
        heads_kernel[(count * triton.cdiv(options.chunk_size, of_heads.block_m),)](
            rows(quad_q), rows(quad_k), rows(dquad_q), rows(dquad_k), dpanel, *call.sequences, *call.rule[:2],
            call.n_chunks, first, Sizes(**sizes, BM=of_heads.block_m, BN=of_heads.block_n, FACTORS=call.factors),
            **of_heads.launch(),
        )  # fmt: skip
        if total is not None:
            batch = (0, 0) if call.packed else (first // call.n_chunks, (first + count - 1) // call.n_chunks)
            dbias_kernel[((batch[1] - batch[0] + 1) * n_parts * (wide // block) ** 2,)](
                dpanel, total, *call.sequences, call.n_chunks, n_parts, first, first + count, batch[0],
                C=options.chunk_size, BLOCK=block, WIDTH=wide, **FUSED_ADDITION,
            )  # fmt: skip
    dbias = _along_diagonals(total, rel_bias) if total is not None and rel_bias is not None else None
    dinitial = dinitial if initial_kv is not None else None
    return dquad_q, dquad_k, dlin_q, dlin_k, dv, dgate, dbias, dinitial


@launcher
def mixed_chunk_step_(
    heads: MixedChunkHeads,
    v: Tensor,
    gate: Tensor | None,
    state: OpenChunk,
    options: MixedChunkOptions = MixedChunkOptions(),
    *,
    config: Config | Choose | None = None,
) -> Tensor:
    """The output (B, 1, E) of one token, by which the state, contiguous tensors, is advanced in place."""
    kv, *held, position = state
    (b, c, s), e = held[0].shape, v.shape[-1]
    out, choose, width = v.new_empty(v.shape), chosen_by(config), max(16, triton.next_power_of_2(s))
    if b == 0:
        return out
    stepping = choose("mixed_chunk_step", v, width)
    block = min(stepping.block_n, max(16, triton.next_power_of_2(e)))
    step_kernel[(b * triton.cdiv(e, block),)](
        *map(rows, (*heads, v, gate)), kv, *held, position, out,
        1 / options.divisor, *bias_rule(options.rel_bias), lin_inv_norm(options),
        Sizes(C=c, S=s, E=e, BS=width, BE=block, BC=stepping.block_k, GATE=options.gate_activation),
        SCORE=options.score, **stepping.launch(),
    )  # fmt: skip
    close(state, v, choose)
    return out


def close(state: OpenChunk, v: Tensor, choose: Choose) -> None:
    """Count the token that was written to a state, and close the chunk if it is full; v is of the tokens' type."""
    kv, *held, position = state
    (b, c, s), e = held[0].shape, held[2].shape[-1]
    width = max(16, triton.next_power_of_2(s))
    config = choose("mixed_chunk_step_close", v, width)
    block = min(config.block_n, max(16, triton.next_power_of_2(e)))
    close_kernel[(b,)](
        kv, *held, position,
        Sizes(C=c, S=s, E=e, BS=width, BE=block, BC=config.block_k, PRECISION=matmul_precision(v.dtype)),
        **config.launch(),
    )  # fmt: skip


def _call(quad_q: Tensor, v: Tensor, layout: Layout, options: MixedChunkOptions, choose: Choose) -> _ChunkCall:
    """The options as the kernels take them, and how sequences are cut into segments."""
    chunk_size, closed_tokens = options.chunk_size, options.closed_tokens
    b, n, e = v.shape
    sequences = sequences_of(b, n, n, *layout)
    separate = b if layout.cu_seqlens is None else 1
    n_chunks = blocks_of(sequences, n, 1, chunk_size)
    precision, factors, like = precisions(v)
    call = _ChunkCall(
        tokens=v,
        probs_like=like,
        choose=choose,
        size={"C": chunk_size, "S": quad_q.shape[-1], "E": e},
        sequences=sequences,
        rule=(1 / options.divisor, 0 if options.causal else None, *bias_rule(options.rel_bias)),
        lin_inv_norm=lin_inv_norm(options),
        closed_tokens=None if closed_tokens is None else closed_tokens.contiguous(),
        initial=options.initial_kv,
        score=options.score,
        gate_activation=options.gate_activation,
        precision=precision,
        factors=factors,
        slots=n_chunks * separate,
        n_chunks=n_chunks,
        n_segments=0,
        chunks_per_segment=0,
        n_parts=1,
        rows=separate,
    )
    if v.numel() == 0:
        return call
    config = call.config("product")
    programs, ready = separate * triton.cdiv(e, config.block_n), processors(v.device)
    segments = _segments(programs, n_chunks, ready)
    chunks_per_segment = triton.cdiv(n_chunks, segments) if segments > 1 else n // chunk_size + 1
    n_segments = blocks_of(sequences, n, 1, chunk_size * chunks_per_segment)
    parts = min(triton.cdiv(call.largest_chunk, config.block_m), ready // (programs * segments))
    return call._replace(n_segments=n_segments, chunks_per_segment=chunks_per_segment, n_parts=max(1, parts))


@lru_cache
def _segments(programs: int, n_chunks: int, ready: int) -> int:
    """Into how many segments each row is cut, if one takes so many programs: that make a scan shortest."""

    def time(segments: int) -> float:
        """In waves of as many programs as run together."""
        waves = triton.cdiv(programs * segments, ready)
        return waves * triton.cdiv(n_chunks, segments) * (_SEGMENT_PRICE if segments > 1 else 1)

    return min(range(1, min(n_chunks, _MOST_SEGMENTS) + 1), key=time)


def lin_inv_norm(options: MixedChunkOptions) -> float | None:
    """What multiplies the linear part; None where it is the number of tokens."""
    return None if options.lin_normalizer == "tokens" else 1 / float(options.lin_normalizer)


def _untouched(call: _ChunkCall, start: Tensor | None) -> Tensor:
    """The state of sequences to which no token comes."""
    kv = call.tokens.new_zeros(call.sequences.n_sequences, call.size["S"], call.size["E"], dtype=torch.float32)
    return kv if start is None else kv.copy_(start)


def _starts(
    call: _ChunkCall,
    lin: Tensor,
    x: Tensor,
    start: Tensor | None,
    states: Tensor | None,
    gated: tuple[Tensor | None, ...] | None = None,
    *,
    backward: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What scans start from, where they put the sum (G, S, E) of `start` and all lin^T x, and the states.

    Not causal, there is one state for each sequence, which is summed here. x is written here, and the last of `gated`,
    if that is given: dO, gate, X and dGate.
    """
    (s, e), count = (call.size["S"], call.size["E"]), call.sequences.n_sequences
    start = None if start is None else start.float().contiguous()
    result = x.new_empty(count, s, e, dtype=torch.float32)
    if call.scans_only:
        return start, result, states
    config = call.config("states")
    totals = x.new_empty(call.n_segments * call.rows, s, e, dtype=torch.float32)
    tiles = triton.cdiv(s, config.block_m) * triton.cdiv(e, config.block_n)
    states_kernel[(totals.shape[0] * tiles,)](
        rows(lin), rows(x), *map(rows, gated or [None] * 4), totals, call.closed_tokens, *call.sequences,
        call.lin_inv_norm, call.n_segments, call.chunks_per_segment,
        Sizes(
            **call.size, BS=config.block_m, BE=config.block_n, BK=config.block_k, GATE=call.gate_activation,
            PRECISION=call.precision,
        ),
        CAUSAL=call.causal, BACKWARD=backward, **config.launch(),
    )  # fmt: skip
    if not call.causal and states is None:
        states = call.probs_like.new_empty(count, s, e)
    carry_kernel[(count * triton.cdiv(s * e, 1024),)](
        totals, start, result, None if call.causal else states, *call.sequences, call.lin_inv_norm, call.n_segments,
        call.size["C"] * call.chunks_per_segment,
        SIZE=s * e, BLOCK=1024, CAUSAL=call.causal, BACKWARD=backward, **FUSED_ADDITION,
    )  # fmt: skip
    return totals if call.causal else states, result, states


def _states(
    call: _ChunkCall, quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, initial: Tensor | None
) -> Tensor | None:
    """The states that chunks read."""
    states = call.probs_like.new_empty(call.slots, call.size["S"], call.size["E"]) if call.causal else None
    starts, _, states = _starts(call, lin_k, v, initial, states, backward=False)
    if call.causal:
        none = None
        _scan(call, quad_q, quad_k, lin_q, lin_k, v, none, starts, states, none, none, none, none, backward=False)
    return states


def _panel(call: _ChunkCall, quad_q: Tensor, quad_k: Tensor, *, backward: bool) -> Tensor | None:
    """A of all chunks; None where it is made as it is multiplied."""
    if call.is_fused(backward):
        return None
    config, wide = call.config("weights"), call.panel_width
    panel = call.probs_like.new_empty(call.slots * wide * wide)
    probs_kernel[(call.slots * (wide // config.block_m) * (wide // config.block_n),)](
        rows(quad_q), rows(quad_k), panel, *call.sequences, *call.rule, call.n_chunks,
        Sizes(
            C=call.size["C"], S=call.size["S"], BS=call.width, BM=config.block_m, BN=config.block_n, WIDTH=wide,
            PRECISION=call.precision,
        ),
        SCORE=call.score, **config.launch(),
    )  # fmt: skip
    return panel


def _scan(
    call: _ChunkCall,
    quad_q: Tensor,
    quad_k: Tensor,
    reader: Tensor,
    summed: Tensor,
    x: Tensor,
    panel: Tensor | None,
    starts: Tensor | None,
    states: Tensor | None,
    result: Tensor | None,
    gate: Tensor | None,
    product: Tensor | None,
    out: Tensor | None,
    *,
    backward: bool,
) -> None:
    """Start `scan_kernel`."""
    config = call.config("fused" if panel is None else "product")
    scan_kernel[(call.n_segments * call.rows * call.n_parts * triton.cdiv(call.size["E"], config.block_n),)](
        rows(quad_q), rows(quad_k), rows(reader), rows(summed), rows(x), panel,
        Carried(starts, states, result, call.closed_tokens), rows(gate), rows(product), rows(out), *call.sequences,
        *call.rule, call.lin_inv_norm, call.n_chunks,
        call.n_segments, call.chunks_per_segment, call.n_parts,
        Sizes(
            **call.size, BS=call.width, BM=config.block_m, BE=config.block_n, BK=config.block_k,
            WIDTH=call.panel_width, GATE=call.gate_activation, PRECISION=call.precision, FACTORS=call.factors,
        ),
        SCORE=call.score, CONTINUED=call.initial is not None, BACKWARD=backward, **config.launch(),
    )  # fmt: skip


def _along_diagonals(total: Tensor, rel_bias: Tensor) -> Tensor:
    """Panels (B, parts, i, j), square, as the gradient of a bias (B, t): the sums of j - i = t - width // 2."""
    dbias = rel_bias.new_empty(rel_bias.shape)
    rows, columns, block = total.shape[1] * total.shape[2], dbias.shape[-1], 32
    diagonals_kernel[(dbias.shape[0] * triton.cdiv(columns, block),)](
        total, dbias, rows, columns, WIDTH=total.shape[-1], BLOCK=block, **FUSED_ADDITION
    )  # fmt: skip
    return dbias

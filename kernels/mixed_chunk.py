"""Launchers of mixed chunk attention's kernels (`mixed_chunk_kernels.py`): forward, backward and one token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from flashgau.options import Layout, MixedChunkHeads, MixedChunkOptions, OpenChunk

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
from .gated import bias_rule, precisions, prologue, room_for_panel, rows, sums_like
from .mixed_chunk_kernels import (
    States,
    carry_kernel,
    close_kernel,
    dbias_kernel,
    gradient_kernel,
    heads_kernel,
    linear_kernel,
    probs_kernel,
    product_kernel,
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
    "linear": "CSE",
    "heads": "CC",
}
_PANEL_UNIT = 128  # tokens: blocks of a panel must divide it
_FUSED_TILES = 1  # of columns; up to it, recomputing A for each tile is cheaper than storing it


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
    segments: tuple[int, int]  # of a row; and how many chunks a segment has
    rows: int  # of the batch that have their own slots: 1 when packed

    @property
    def causal(self) -> bool:
        return self.rule[1] is not None

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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output (B, N, E); KV (G, S, E) of closed chunks; the ungated sum of both parts if `save` and there is a gate."""
    (quad_q, quad_k, lin_q, lin_k), initial_kv = heads, options.initial_kv
    out = v.new_empty(v.shape)
    product = v.new_empty(v.shape) if save and gate is not None else None
    call = _call(quad_q, v, layout, options, chosen_by(config))
    if v.numel() == 0:
        return out, _untouched(call, initial_kv), product
    states, kv = _sum_states(call, lin_k, v, initial_kv, backward=False)
    if triton.cdiv(v.shape[-1], call.config("fused").block_n) <= _FUSED_TILES:
        _multiply(call, quad_q, quad_k, lin_q, v, None, states, gate, product, out, range(call.slots), backward=False)
        return out, kv, product
    config, wide = call.config("weights"), call.panel_width
    panel, step = room_for_panel(call.probs_like, wide * wide, call.slots)
    for first in range(0, call.slots, step):
        count = min(step, call.slots - first)
        probs_kernel[(count * (wide // config.block_m) * (wide // config.block_n),)](
            rows(quad_q), rows(quad_k), panel, *call.sequences, *call.rule, call.n_chunks, first,
            Sizes(
                C=options.chunk_size, S=call.size["S"], BS=call.width, BM=config.block_m, BN=config.block_n, WIDTH=wide,
                PRECISION=call.precision,
            ),
            SCORE=options.score, **config.launch(),
        )  # fmt: skip
        _multiply(
            call,
            quad_q,
            quad_k,
            lin_q,
            v,
            panel,
            states,
            gate,
            product,
            out,
            range(first, first + count),
            backward=False,
        )
    return out, kv, product


@launcher
def mixed_chunk_attention_backward(
    dout: Tensor,
    dkv: Tensor | None,
    heads: MixedChunkHeads,
    v: Tensor,
    gate: Tensor | None,
    product: Tensor | None,
    layout: Layout = Layout(),
    options: MixedChunkOptions = MixedChunkOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of quad_q, quad_k, lin_q, lin_k, v, gate, rel_bias (B, 2P-1) and initial_kv (None without it)."""
    (quad_q, quad_k, lin_q, lin_k), rel_bias, initial_kv = heads, options.rel_bias, options.initial_kv
    call = _call(quad_q, v, layout, options, chosen_by(config))
    dquad_q, dquad_k, dlin_q, dlin_k, dv = (t.new_empty(t.shape) for t in (quad_q, quad_k, lin_q, lin_k, v))
    dgate = gate.new_empty(gate.shape) if gate is not None else None
    if v.numel() == 0:
        dbias = rel_bias.new_zeros(rel_bias.shape) if rel_bias is not None else None
        dinitial = _untouched(call, dkv) if initial_kv is not None else None
        return dquad_q, dquad_k, dlin_q, dlin_k, dv, dgate, dbias, dinitial
    product = product if gate is not None else None
    dx, _ = prologue(call.sequences, dout, gate, product, dgate, options.gate_activation, call.choose)
    states, _ = _sum_states(call, lin_k, v, initial_kv, backward=False)
    dstates, dinitial = _sum_states(call, lin_q, dx, dkv, backward=True)
    _linear(call, dx, states, dlin_q, backward=False)
    _linear(call, v, dstates, dlin_k, backward=True)

    config, of_heads, wide = call.config("gradient"), call.config("heads"), call.panel_width
    total = v.new_zeros(v.shape[0], wide, wide, dtype=torch.float32) if rel_bias is not None else None
    panels, step = room_for_panel(call.probs_like, 2 * wide * wide, call.slots)
    panel, dpanel = panels.view(2, -1)
    sizes: dict[str, Any] = {"C": options.chunk_size, "S": call.size["S"], "BS": call.width, "WIDTH": wide}
    blocks = {"BM": config.block_m, "BN": config.block_n, "BK": config.block_k}
    for first in range(0, call.slots, step):
        count = min(step, call.slots - first)
        gradient_kernel[(count * (wide // config.block_m) * (wide // config.block_n),)](
            rows(quad_q), rows(quad_k), rows(v), rows(dx), panel, dpanel, *call.sequences, *call.rule, call.n_chunks,
            first, Sizes(**sizes, E=call.size["E"], **blocks, PRECISION=call.precision),
            SCORE=options.score, **config.launch(),
        )  # fmt: skip
        _multiply(
            call, quad_q, quad_k, lin_k, dx, panel, dstates, None, None, dv, range(first, first + count), backward=True
        )
        heads_kernel[(count * triton.cdiv(options.chunk_size, of_heads.block_m),)](
            rows(quad_q), rows(quad_k), rows(dquad_q), rows(dquad_k), dpanel, *call.sequences, *call.rule[:2],
            call.n_chunks, first, Sizes(**sizes, BM=of_heads.block_m, BN=of_heads.block_n, FACTORS=call.factors),
            **of_heads.launch(),
        )  # fmt: skip
        if total is not None:
            batch = (
                (0, 0)
                if layout.cu_seqlens is not None
                else (first // call.n_chunks, (first + count - 1) // call.n_chunks)
            )
            dbias_kernel[((batch[1] - batch[0] + 1) * (wide // 16) ** 2,)](
                dpanel, total, *call.sequences, call.n_chunks, first, first + count, batch[0],
                C=options.chunk_size, BLOCK=16, WIDTH=wide, **FUSED_ADDITION,
            )  # fmt: skip
    dbias = _along_diagonals(total, rel_bias.shape[-1]) if total is not None and rel_bias is not None else None
    dinitial = dinitial if initial_kv is not None else None
    return dquad_q, dquad_k, dlin_q, dlin_k, dv, dgate, sums_like(dbias, rel_bias), dinitial


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
    stepping, closing = (choose(name, v, width) for name in ("mixed_chunk_step", "mixed_chunk_step_close"))
    sizes = {"C": c, "S": s, "E": e, "BS": width}
    block = min(stepping.block_n, max(16, triton.next_power_of_2(e)))
    step_kernel[(b * triton.cdiv(e, block),)](
        *map(rows, (*heads, v, gate)), kv, *held, position, out,
        1 / options.divisor, *bias_rule(options.rel_bias), _lin_inv_norm(options),
        Sizes(**sizes, BE=block, BC=stepping.block_k, GATE=options.gate_activation), SCORE=options.score,
        **stepping.launch(),
    )  # fmt: skip
    block = min(closing.block_n, max(16, triton.next_power_of_2(e)))
    close_kernel[(b,)](
        kv, *held, position,
        Sizes(**sizes, BE=block, BC=closing.block_k, PRECISION=matmul_precision(v.dtype)), **closing.launch(),
    )  # fmt: skip
    return out


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
        lin_inv_norm=_lin_inv_norm(options),
        closed_tokens=None if closed_tokens is None else closed_tokens.contiguous(),
        initial=options.initial_kv,
        score=options.score,
        gate_activation=options.gate_activation,
        precision=precision,
        factors=factors,
        slots=n_chunks * separate,
        n_chunks=n_chunks,
        segments=(0, 0),
        rows=separate,
    )
    if v.numel() == 0:
        return call
    # As many segments as let every processor have two tiles; one for each sequence, if that is enough.
    wanted = triton.cdiv(2 * processors(v.device), _tiles(call))
    chunks_per_segment = triton.cdiv(call.slots, wanted)
    if chunks_per_segment >= n_chunks:
        chunks_per_segment = n // chunk_size + 1
    n_segments = blocks_of(sequences, n, 1, chunk_size * chunks_per_segment, rest=False)
    return call._replace(segments=(n_segments, chunks_per_segment))


def _lin_inv_norm(options: MixedChunkOptions) -> float | None:
    return None if options.lin_normalizer == "tokens" else 1 / float(options.lin_normalizer)


def _tiles(call: _ChunkCall) -> int:
    """How many programs sum one state."""
    config = call.config("states")
    return triton.cdiv(call.size["S"], config.block_m) * triton.cdiv(call.size["E"], config.block_n)


def _untouched(call: _ChunkCall, start: Tensor | None) -> Tensor:
    """The state of sequences to which no token comes."""
    kv = call.tokens.new_zeros(call.sequences.n_sequences, call.size["S"], call.size["E"], dtype=torch.float32)
    return kv if start is None else kv.copy_(start)


def _sum_states(
    call: _ChunkCall, x: Tensor, y: Tensor, start: Tensor | None, *, backward: bool
) -> tuple[States, Tensor]:
    """The sums of x^T y that chunks read, and the sum (G, S, E) of `start` and all of them."""
    s, e, count = call.size["S"], call.size["E"], call.sequences.n_sequences
    n_segments, chunks_per_segment = call.segments
    config = call.config("states")
    running = call.probs_like.new_empty(call.slots, s, e) if call.causal else None
    totals = y.new_empty(n_segments * call.rows, s, e, dtype=torch.float32)
    states_kernel[(totals.shape[0] * _tiles(call),)](
        rows(x), rows(y), running, totals, call.closed_tokens, *call.sequences, call.lin_inv_norm, call.n_chunks,
        n_segments, chunks_per_segment,
        Sizes(**call.size, BS=config.block_m, BE=config.block_n, BK=config.block_k, PRECISION=call.precision),
        CAUSAL=call.causal, BACKWARD=backward, **config.launch(),
    )  # fmt: skip
    if start is None and totals.shape[0] == count:  # a sequence's only segment is all of it
        return States(running, None if call.causal else totals), totals
    result = totals.new_empty(count, s, e)
    carry_kernel[(count * triton.cdiv(s * e, 1024),)](
        totals, None if start is None else start.float().contiguous(), result, *call.sequences, n_segments,
        call.size["C"] * chunks_per_segment, SIZE=s * e, BLOCK=1024, BACKWARD=backward, **FUSED_ADDITION,
    )  # fmt: skip
    return States(running, totals if call.causal else result), result


def _multiply(
    call: _ChunkCall,
    quad_q: Tensor,
    quad_k: Tensor,
    lin: Tensor,
    x: Tensor,
    panel: Tensor | None,
    states: States,
    gate: Tensor | None,
    product: Tensor | None,
    out: Tensor,
    slots: range,
    *,
    backward: bool,
) -> None:
    """Start `product_kernel` for some slots."""
    config = call.config("fused" if panel is None else "product")
    across = triton.cdiv(call.size["E"], config.block_n) * triton.cdiv(call.size["C"], config.block_m)
    product_kernel[(len(slots) * across,)](
        rows(quad_q), rows(quad_k), rows(lin), rows(x), panel, states, rows(gate), rows(product), rows(out),
        call.closed_tokens, *call.sequences, *call.rule, call.lin_inv_norm, call.n_chunks, *call.segments, slots.start,
        Sizes(
            **call.size, BS=call.width, BM=config.block_m, BE=config.block_n, BK=config.block_k,
            WIDTH=call.panel_width, GATE=call.gate_activation, PRECISION=call.precision, FACTORS=call.factors,
        ),
        SCORE=call.score, CONTINUED=call.initial is not None, BACKWARD=backward, **config.launch(),
    )  # fmt: skip


def _linear(call: _ChunkCall, x: Tensor, states: States, out: Tensor, *, backward: bool) -> None:
    """Start `linear_kernel` for all slots."""
    config = call.config("linear")
    across = triton.cdiv(call.size["S"], config.block_n) * triton.cdiv(call.size["C"], config.block_m)
    linear_kernel[(call.slots * across,)](
        rows(x), states, rows(out), call.closed_tokens, *call.sequences, call.lin_inv_norm, call.n_chunks,
        *call.segments,
        Sizes(**call.size, BM=config.block_m, BN=config.block_n, BK=config.block_k, FACTORS=call.factors),
        CAUSAL=call.causal, BACKWARD=backward, **config.launch(),
    )  # fmt: skip


def _along_diagonals(total: Tensor, width: int) -> Tensor:
    """Sums (B, width) of total[b, i, j], square, over j - i = t - width // 2; 0 beyond the chunk."""
    size = total.shape[1]
    across = 2 * size - 1
    # Padded by `size` columns and read in rows one shorter, each row is shifted right by one from the row above.
    skewed = F.pad(total.flip(1), (0, size)).flatten(1)[:, : size * across].unflatten(1, (size, across))
    beside = (width - across) // 2  # negative, which crops, where the blocks of a chunk extend past the bias
    return F.pad(skewed.sum(1), (beside, beside))

"""Mixed chunk attention written in others: quadratic gated attention of each chunk, and sums over the chunks before.

So it is where it is differentiated forward or twice. Memory is linear in length: a state (S, E) for each chunk.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgau.eager.common import accumulator
from flashgau.options import GatedOptions, Layout, MixedChunkHeads, MixedChunkOptions

from .gau import attend_ungated
from .plain import gated


def mixed_chunk_attention(
    v: Tensor,
    gate: Tensor | None,
    heads: MixedChunkHeads,
    layout: Layout,
    options: MixedChunkOptions,
    backend: str,
    **_: Any,
) -> list[Tensor]:
    """The output (B, N, E) and KV (G, S, E) of closed chunks, or of all tokens unless causal."""
    grid = _Grid.of(layout, v.shape[0], v.shape[1], options.chunk_size, v.device)
    quad_q, quad_k, lin_q, lin_k, values = (grid.chunks(x) for x in (*heads, v))
    bias = options.rel_bias
    if bias is not None:
        longest, size = bias.shape[-1] // 2 + 1, options.chunk_size
        bias = bias[:, longest - size : longest + size - 1].index_select(0, grid.rows)
    local = GatedOptions(options.score, options.divisor, options.causal, bias)
    out = attend_ungated(quad_q, quad_k, values, local, backend)

    acc = accumulator(v.dtype)
    sums = lin_k.mT.to(acc) @ values.to(acc)
    parts = sums.split(grid.counts)
    initial = options.initial_kv if options.initial_kv is not None else out.new_zeros(len(parts), 1, 1, dtype=acc)
    by_sequence = zip(parts, initial, grid.full, strict=True)
    states = [_states(*x, options.causal) for x in by_sequence]
    before = torch.cat([reads for reads, _ in states] or [sums])
    out = torch.baddbmm(out.to(acc), lin_q.to(acc) * grid.factors(options, acc), before)
    out = grid.tokens(out.to(v.dtype))
    out = out if gate is None else gated(out, gate, options.gate_activation, layout)
    return [out, torch.stack([after for _, after in states]) if states else before]


def _states(parts: Tensor, initial: Tensor, full: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """What each chunk of a sequence reads (count, S, E), and the state behind it (S, E); `full` tells closed chunks."""
    if not causal:
        total = parts.sum(0)
        return total.expand_as(parts), total
    first = initial.expand(parts.shape[1:])
    before = torch.cat([first[None], initial + parts.cumsum(0)[:-1]])[: len(parts)]  # of an empty sequence none
    return before, first + (parts * full[:, None, None]).sum(0)


class _Grid(NamedTuple):
    """How tokens (B, N, .) are cut into chunks (count of all, C, .) of which the last of a sequence may have holes."""

    place: Tensor  # (chunks, C) which token; N B for a hole
    back: Tensor  # (B, N) where a token is among the chunks' rows; as many as there are of these for padding
    rows: Tensor  # (chunks,) the row of the batch
    counts: list[int]  # of chunks, by sequence
    full: tuple[Tensor, ...]  # by sequence: which of its chunks have no hole
    lengths: Tensor  # (G,) tokens of each sequence
    whole: bool  # there are no holes and no padding: chunks are views

    @classmethod
    def of(cls, layout: Layout, batch: int, n: int, size: int, device: torch.device) -> _Grid:
        """Reads the offsets of packed sequences on the host."""
        if layout.cu_seqlens is not None:
            ends: list[int] = layout.cu_seqlens.tolist()
            starts, lengths = layout.cu_seqlens[:-1].long(), layout.cu_seqlens.diff().long()
            counts = [-(-(b - a) // size) for a, b in pairwise(ends)]
        else:
            starts = torch.arange(batch, device=device) * n
            lengths = torch.full((batch,), n, device=device) if layout.lengths is None else layout.lengths.long()
            counts = [-(-n // size)] * batch
        of, numbers = _chunks_of(counts, device)
        within = numbers[:, None] * size + torch.arange(size, device=device)
        real = within < lengths[of, None]
        place = torch.where(real, within + starts[of, None], batch * n)
        back = torch.full((batch * n + 1,), place.numel(), device=device)
        back = back.scatter(0, place.flatten(), torch.arange(place.numel(), device=device))[:-1].view(batch, n)
        rows = of if layout.cu_seqlens is None else torch.zeros_like(of)
        whole = layout.lengths is None and layout.cu_seqlens is None and n > 0 and n % size == 0
        return cls(place, back, rows, counts, real[:, -1].split(counts), lengths, whole)

    def chunks(self, x: Tensor) -> Tensor:
        """x (B, N, .) by chunks (chunks, C, .); 0 where there is no token."""
        if self.whole:
            return x.reshape(*self.place.shape, x.shape[-1])
        rows = F.pad(x.flatten(0, 1), (0, 0, 0, 1))
        return rows.index_select(0, self.place.flatten()).view(*self.place.shape, x.shape[-1])

    def tokens(self, x: Tensor) -> Tensor:
        """The way back, (B, N, .); 0 where no sequence is."""
        if self.whole:
            return x.reshape(*self.back.shape, x.shape[-1])
        rows = F.pad(x.flatten(0, 1), (0, 0, 0, 1))
        return rows.index_select(0, self.back.flatten()).view(*self.back.shape, x.shape[-1])

    def factors(self, options: MixedChunkOptions, dtype: torch.dtype) -> Tensor | float:
        """What multiplies lin_q KV in each chunk, (chunks, 1, 1) or one number."""
        if options.lin_normalizer != "tokens":
            return 1 / float(options.lin_normalizer)
        of, numbers = _chunks_of(self.counts, self.place.device)
        if not options.causal:
            tokens = self.lengths[of]
        elif options.closed_tokens is None:
            tokens = numbers * options.chunk_size
        else:
            tokens = numbers * options.chunk_size + options.closed_tokens[of]
        return tokens.clamp_min(1).to(dtype).reciprocal()[:, None, None]


def _chunks_of(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every chunk its sequence and its number there, (chunks,) each, for so many of each sequence."""
    of = torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device=device))
    numbers = [torch.arange(count, device=device) for count in counts]
    return of, torch.cat(numbers) if numbers else of

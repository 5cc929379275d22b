"""Mixed chunk attention (FLASH, Hua et al. 2022, section 3.2): chunk after chunk, with the sum of lin_k^T v at hand.

A chunk's tensors and the one state KV (S, E) fit a CPU's cache together, and no tensor is longer than the input
itself: time and memory are linear in length. `Chunks` is the mathematics of one chunk, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .common import Rooms, Sequence, accumulator, factor_dtype, sequences, toeplitz_block, toeplitz_sums
from .scores import score as elementwise_score
from .scores import score_slope

_CHUNK_ELEMENTS = 2**20  # of a chunk's values over the batch rows worked on together
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


@dataclass(frozen=True)
class Rule:
    """The options of one call."""

    chunk_size: int
    score: str
    causal: bool
    quad_normalizer: float
    lin_normalizer: float | None  # None: the number of tokens summed


@dataclass(frozen=True)
class Heads:
    """Queries and keys of some tokens, each (b, c, S), in the type that sums are kept in."""

    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor

    @classmethod
    def like(cls, x: Tensor) -> Heads:
        """Four unwritten ones."""
        return cls(*(torch.empty_like(x) for _ in range(4)))

    def all(self) -> list[Tensor]:
        """quad_q, quad_k, lin_q, lin_k."""
        return [self.quad_q, self.quad_k, self.lin_q, self.lin_k]

    def rows(self, r: slice) -> Heads:
        """Those of the tokens r."""
        return Heads(*(x[:, r] for x in self.all()))

    def put(self, r: slice, heads: Heads) -> None:
        """Set those of the tokens r."""
        for place, x in zip(self.all(), heads.all(), strict=True):
            place[:, r] = x


@dataclass(frozen=True)
class Chunks:
    """The chunks of one sequence, or of several rows of a batch of equally long ones, and what is computed in each."""

    rule: Rule
    seq: Sequence
    factor: torch.dtype  # of wide matrix products
    bias_block: Tensor | None  # (b, C, C), the same for every chunk
    closed_tokens: Tensor | None  # (b, 1, 1) tokens before the sequence's start, whose chunks are closed
    rooms: Rooms = field(default_factory=Rooms)

    def slices(self) -> list[slice]:
        """Where the chunks lie."""
        start, stop, size = self.seq.keys.start, self.seq.keys.stop, self.rule.chunk_size
        return [slice(c, min(c + size, stop)) for c in range(start, stop, size)]

    def view(self, x: Tensor, c: slice) -> Tensor:
        """The chunk's rows (b, c, .) of a tensor over the whole batch."""
        return x[self.seq.batch, c]

    def is_closed(self, c: slice) -> bool:
        """Whether the chunk is full, so that later ones read it through the state."""
        return c.stop - c.start == self.rule.chunk_size

    def has_global(self, c: slice) -> bool:
        """Whether there is anything to read from the state."""
        return not self.rule.causal or c.start > self.seq.keys.start or self.closed_tokens is not None

    def scaled(self, lin: Tensor, c: slice) -> Tensor:
        """lin / lin_normalizer."""
        if self.rule.lin_normalizer is not None:
            return lin * (1 / self.rule.lin_normalizer)
        if not self.rule.causal:
            return lin * (1 / (self.seq.keys.stop - self.seq.keys.start))
        before = c.start - self.seq.keys.start
        if self.closed_tokens is None:
            return lin * (1 / before)
        return lin / (self.closed_tokens + before).clamp_min(1).to(lin.dtype)

    def weights(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Scores before the elementwise function and weights after it and the mask, both (b, c, c)."""
        k, alpha = heads.quad_k.mT, 1 / self.rule.quad_normalizer
        if self.bias_block is None:
            s = (heads.quad_q @ k).mul_(alpha)
        else:
            size = k.shape[-1]
            s = torch.baddbmm(self.bias_block[:, :size, :size], heads.quad_q, k, alpha=alpha)
        a = elementwise_score(self.rule.score, s)
        return s, a.tril_() if self.rule.causal else a

    def blocks(self, size: int, by_keys: bool = False) -> list[tuple[slice, slice]]:
        """Blocks of queries and the keys they see, or of keys and the queries that see them, covering a chunk.

        Two blocks leave out a quarter of a causal chunk, in which no query sees any key.
        """
        half, whole = size // 2, slice(0, size)
        if not self.rule.causal or size < 64:
            return [(whole, whole)]
        first, second = slice(0, half), slice(half, size)
        return [(first, whole), (second, second)] if by_keys else [(first, first), (second, whole)]

    def product(self, c: slice, heads: Heads, v: Tensor, kv: Tensor) -> Tensor:
        """local + global: A v + lin_q KV / lin_normalizer; it stays until the next call."""
        a = self.weights(heads)[1].to(self.factor)
        x = self.rooms.of("product", (*a.shape[:2], v.shape[-1]), v)
        for queries, keys in self.blocks(a.shape[-1]):
            torch.bmm(a[:, queries, keys], v[:, keys], out=x[:, queries])
        if self.has_global(c):
            x.baddbmm_(self.scaled(heads.lin_q, c).to(self.factor), kv.to(self.factor))
        return x

    def accumulate(self, state: Tensor, a: Tensor, b: Tensor) -> None:
        """state += a^T b, the sum kept in the state's own type."""
        a = a.to(b.dtype)
        if state.dtype == b.dtype:
            state.baddbmm_(a.mT, b)
        else:
            state += a.mT @ b

    def gradients(
        self, c: slice, dx: Tensor, heads: Heads, v: Tensor, kv: Tensor, dkv: Tensor, ds_sum: Tensor | None
    ) -> tuple[Heads, Tensor]:
        """Gradients of the heads and of v, from that of `product`. For causal chunks taken in reverse order.

        `kv` is the state that the chunk read. `dkv`, the gradient of the state after it, becomes that of the state
        before it; dS is added to `ds_sum`.
        """
        causal = self.rule.causal
        s, a = self.weights(heads)
        size, a = a.shape[-1], a.to(self.factor)
        dv = self.rooms.of("dv", (*a.shape[:2], v.shape[-1]), v)
        da = torch.zeros_like(a)
        for queries, keys in self.blocks(size):
            da[:, queries, keys] = dx[:, queries] @ v[:, keys].mT
        for keys, queries in self.blocks(size, by_keys=True):
            torch.bmm(a[:, queries, keys].mT, dx[:, queries], out=dv[:, keys])
        dlin_q, dlin_k = torch.zeros_like(heads.lin_q), torch.zeros_like(heads.lin_k)
        if not causal or self.is_closed(c):
            state = dkv.to(self.factor)
            dlin_k = v @ state.mT
            dv.baddbmm_(heads.lin_k.to(self.factor), state)
        if self.has_global(c):
            dlin_q = self.scaled(dx @ kv.to(self.factor).mT, c)
            if causal:
                self.accumulate(dkv, self.scaled(heads.lin_q, c), dx)
        ds = da.to(s.dtype).mul_(score_slope(self.rule.score, s))
        if causal:
            ds.tril_()
        if ds_sum is not None:
            ds_sum[:, :size, :size] += ds
        ds.mul_(1 / self.rule.quad_normalizer)
        return Heads(ds @ heads.quad_k, ds.mT @ heads.quad_q, dlin_q, dlin_k), dv


def chunked(
    rule: Rule,
    v: Tensor,
    width: int,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    closed_tokens: Tensor | None = None,
) -> list[Chunks]:
    """The sequences of a batch (B, N, .) of values `width` wide, cut into chunks."""
    batch, n = v.shape[:2]
    together = max(1, _CHUNK_ELEMENTS // (rule.chunk_size * width))
    parts = []
    for whole in sequences(batch, n, n, lengths, cu_seqlens):
        for b in range(whole.batch.start, whole.batch.stop, together):
            rows = slice(b, min(b + together, whole.batch.stop))
            seq = Sequence(whole.index + b - whole.batch.start, rows, whole.queries, whole.keys)
            size = min(rule.chunk_size, seq.sizes[1])
            bias = None
            if rel_bias is not None:
                bias = toeplitz_block(rel_bias[rows], rel_bias.shape[-1] // 2, size, size)
                bias = bias.to(accumulator(v.dtype))
            closed = closed_tokens[seq.states].view(-1, 1, 1) if closed_tokens is not None else None
            parts.append(Chunks(rule, seq, factor_dtype(v), bias, closed))
    return parts


def blank(lengths: Tensor | None, cu_seqlens: Tensor | None) -> Callable[[Tensor], Tensor]:
    """How results begin: as zeros where there is padding, unwritten where every row will be written."""
    begin = torch.empty_like if lengths is None and cu_seqlens is None else torch.zeros_like
    return partial(begin, memory_format=torch.contiguous_format)


def add_bias_gradient(dbias: Tensor, part: Chunks, ds_sum: Tensor) -> None:
    """Sum dS of all chunks along its diagonals into the gradient of the Toeplitz vector."""
    middle, size = dbias.shape[-1] // 2, ds_sum.shape[-1]
    dbias[part.seq.batch, middle - size + 1 : middle + size] += toeplitz_sums(ds_sum)


def mixed_chunk_attention_forward(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    *,
    chunk_size: int,
    score: str,
    causal: bool,
    quad_normalizer: float,
    lin_normalizer: float | None,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_kv: Tensor | None = None,
    closed_tokens: Tensor | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output (B, N, E); the ungated sum of both parts if `save` and there is a gate; KV (G, S, E) of closed chunks.

    `lin_normalizer` None divides by the number of tokens summed. `initial_kv` (G, S, E) and `closed_tokens` (G,)
    continue sequences (causal only) whose chunks so far are closed. KV is what a causal continuation starts from.
    """
    rule = Rule(chunk_size, score, causal, quad_normalizer, lin_normalizer)
    begin = blank(lengths, cu_seqlens)
    out = begin(v)
    product = begin(out) if save and gate is not None else None
    states = _states(v, lin_k.shape[-1], cu_seqlens, initial_kv)
    for part in chunked(rule, v, v.shape[-1], rel_bias, lengths, cu_seqlens, closed_tokens):
        kv = states[part.seq.states]
        if not causal:
            for c in part.slices():
                part.accumulate(kv, part.view(lin_k, c), part.view(v, c).to(part.factor))
        for c in part.slices():
            heads, v_c = _heads(part, c, quad_q, quad_k, lin_q, lin_k), part.view(v, c).to(part.factor)
            x = part.product(c, heads, v_c, kv)
            if causal and part.is_closed(c):
                part.accumulate(kv, heads.lin_k, v_c)
            if product is not None:
                part.view(product, c).copy_(x)
            part.view(out, c).copy_(x if gate is None else x.mul_(part.view(gate, c)))
    return out, product, states


def mixed_chunk_attention_backward(
    dout: Tensor,
    dkv_final: Tensor | None,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    product: Tensor | None,
    *,
    chunk_size: int,
    score: str,
    causal: bool,
    quad_normalizer: float,
    lin_normalizer: float | None,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_kv: Tensor | None = None,
    closed_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of quad_q, quad_k, lin_q, lin_k, v, gate, rel_bias (B, 2P-1) and initial_kv (None without it)."""
    rule = Rule(chunk_size, score, causal, quad_normalizer, lin_normalizer)
    begin = blank(lengths, cu_seqlens)
    dheads, dv = Heads(*(begin(t) for t in (quad_q, quad_k, lin_q, lin_k))), begin(v)
    dgate = begin(gate) if gate is not None else None
    dbias = rel_bias.new_zeros(rel_bias.shape, dtype=accumulator(v.dtype)) if rel_bias is not None else None
    states = _states(v, lin_k.shape[-1], cu_seqlens, initial_kv)
    dstates = _states(v, lin_k.shape[-1], cu_seqlens, dkv_final)
    rooms = Rooms()
    for part in chunked(rule, v, v.shape[-1], rel_bias, lengths, cu_seqlens, closed_tokens):
        kv, dkv = states[part.seq.states], dstates[part.seq.states]
        ds_sum = torch.zeros_like(part.bias_block) if part.bias_block is not None else None

        def ungated(c: slice, part: Chunks = part) -> Tensor:
            dx = part.view(dout, c).to(part.factor)
            return dx if gate is None else torch.mul(dx, part.view(gate, c), out=rooms.like("dx", dx))

        seen = []  # the state that each chunk read
        for c in part.slices():
            if causal:
                seen.append(kv.clone())
            if not causal or part.is_closed(c):
                part.accumulate(kv, part.view(lin_k, c), part.view(v, c).to(part.factor))
            if not causal:
                part.accumulate(dkv, part.scaled(part.view(lin_q, c), c), ungated(c))
        for c in reversed(part.slices()):
            dx, v_c = ungated(c), part.view(v, c).to(part.factor)
            if dgate is not None and product is not None:
                torch.mul(part.view(dout, c), part.view(product, c), out=part.view(dgate, c))
            heads = _heads(part, c, quad_q, quad_k, lin_q, lin_k)
            dheads_c, dv_c = part.gradients(c, dx, heads, v_c, seen.pop() if causal else kv, dkv, ds_sum)
            for target, grad in zip(dheads.all(), dheads_c.all(), strict=True):
                part.view(target, c).copy_(grad)
            part.view(dv, c).copy_(dv_c)
        if dbias is not None and ds_sum is not None:
            add_bias_gradient(dbias, part, ds_sum)
    dbias = dbias.to(rel_bias.dtype) if dbias is not None and rel_bias is not None else None
    dinitial = dstates if initial_kv is not None else None
    return dheads.quad_q, dheads.quad_k, dheads.lin_q, dheads.lin_k, dv, dgate, dbias, dinitial


def _heads(part: Chunks, c: slice, *whole: Tensor) -> Heads:
    return Heads(*(part.view(x, c).to(accumulator(x.dtype)) for x in whole))


def _states(v: Tensor, width: int, cu_seqlens: Tensor | None, start: Tensor | None) -> Tensor:
    """One state (S, E) for every sequence: a copy of `start`, or zeros."""
    if start is not None:
        return start.to(accumulator(v.dtype)).clone(memory_format=torch.contiguous_format)
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_zeros(count, width, v.shape[-1], dtype=accumulator(v.dtype))


def mixed_chunk_step(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    kv: Tensor,
    open_quad_k: Tensor,
    open_lin_k: Tensor,
    open_v: Tensor,
    position: Tensor,
    *,
    score: str,
    quad_normalizer: float,
    lin_normalizer: float | None,
    rel_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One token (B, 1, .): its output, then kv, quad_k, lin_k, v and position of the new state; differentiable."""
    acc = accumulator(v.dtype)
    size = open_quad_k.shape[1]
    place = (position % size)[:, None]
    distance = torch.arange(size, device=v.device) - place
    before = (distance < 0)[..., None]
    open_quad_k, open_lin_k, open_v = (
        _with_token(held, new, place, before) for held, new in ((open_quad_k, quad_k), (open_lin_k, lin_k), (open_v, v))
    )
    s = (quad_q.to(acc) @ open_quad_k.to(acc).mT) / quad_normalizer
    if rel_bias is not None:
        middle = rel_bias.shape[-1] // 2
        s = s + rel_bias.to(acc).gather(-1, middle + distance.clamp(max=0))[:, None]
    weights = torch.where(distance[:, None] <= 0, elementwise_score(score, s), 0)
    closed = (position[:, None, None] - place[..., None]).to(acc)
    divisor = closed.clamp_min(1) if lin_normalizer is None else lin_normalizer
    out = weights @ open_v.to(acc) + (lin_q.to(acc) / divisor) @ kv
    out = (out if gate is None else out * gate).to(v.dtype)
    full = (place + 1 == size)[..., None]
    if torch.compiler.is_compiling() or bool(full.any()):  # the chunk closes: into the sum with it
        kv = torch.where(full, kv + open_lin_k.to(acc).mT @ open_v.to(acc), kv)
        open_quad_k, open_lin_k, open_v = (torch.where(full, 0, x) for x in (open_quad_k, open_lin_k, open_v))
    return out, kv, open_quad_k, open_lin_k, open_v, position + 1


def _with_token(held: Tensor, new: Tensor, place: Tensor, before: Tensor) -> Tensor:
    """The open chunk's rows (B, C, .) `before` each sequence's `place` (B, 1), `new` (B, 1, .) there, zeros behind."""
    dtype = torch.promote_types(held.dtype, new.dtype)
    held, new = held.to(dtype), new.to(dtype)
    if held.requires_grad:
        held = torch.where(before, held, 0)
    else:  # the same on the bits of the numbers: a mask of rows costs a CPU ten times as much
        bits = _BITS[dtype.itemsize]
        held = (held.view(bits) & -before.to(bits)).view(dtype)
    return held.scatter(1, place[..., None].expand_as(new), new)

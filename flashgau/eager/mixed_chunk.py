"""Mixed chunk attention (FLASH, Hua et al. 2022, section 3.2): chunk after chunk, with the sum of lin_k^T v at hand.

A chunk's tensors and the one state KV (S, E) fit a CPU's cache together, and no tensor is longer than the input
itself: time and memory are linear in length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .common import Sequence, accumulator, factor_dtype, sequences, toeplitz_block, toeplitz_sums
from .scores import score as elementwise_score
from .scores import score_slope

_CHUNK_ELEMENTS = 2**20  # of a chunk's values over the batch rows worked on together


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
    silu: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output (B, N, E); the ungated sum of both parts if `save` and there is a gate; KV (G, S, E) of closed chunks.

    `lin_normalizer` None divides by the number of tokens summed. `initial_kv` (G, S, E) and `closed_tokens` (G,)
    continue sequences (causal only) whose chunks so far are closed. KV is what a causal continuation starts from.
    With `silu`, `v` and `gate` are the values and gate before that activation, which is applied as they are read.
    """
    rule = _Rule(chunk_size, score, causal, quad_normalizer, lin_normalizer, silu)
    blank = _blank(lengths, cu_seqlens)
    out = blank(v, memory_format=torch.contiguous_format)
    product = blank(out) if save and gate is not None else None
    parts = _parts(rule, quad_q, quad_k, lin_q, lin_k, v, rel_bias, lengths, cu_seqlens, closed_tokens)
    states = _states(v, lin_k.shape[-1], cu_seqlens, initial_kv)
    for part in parts:
        kv = states[part.seq.states]
        if not causal:
            for c in part.chunks():
                part.accumulate(kv, part.take(part.lin_k, c), part.activated(part.v, c))
        for c in part.chunks():
            v_c = part.activated(part.v, c)
            x = part.begin(product if gate is not None else out, c, part.weights(c)[1].to(part.factor), v_c)
            if part.has_global(c):
                x.baddbmm_(part.scaled_lin_q(c), kv.to(part.factor))
            if causal and part.is_closed(c):
                part.accumulate(kv, part.take(part.lin_k, c), v_c)
            if product is not None:
                part.finish(product, c, x)
            if gate is None:
                part.finish(out, c, x)
            else:
                torch.mul(x, part.activated(gate, c), out=part.view(out, c))
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
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of quad_q, quad_k, lin_q, lin_k, v, gate, rel_bias (B, 2P-1) and initial_kv (None without it)."""
    rule = _Rule(chunk_size, score, causal, quad_normalizer, lin_normalizer, silu)
    acc = accumulator(v.dtype)
    blank = _blank(lengths, cu_seqlens)
    dquad_q, dquad_k, dlin_q, dlin_k, dv = (blank(t) for t in (quad_q, quad_k, lin_q, lin_k, v))
    dgate = blank(gate) if gate is not None else None
    dbias = torch.zeros(rel_bias.shape, dtype=acc, device=v.device) if rel_bias is not None else None
    parts = _parts(rule, quad_q, quad_k, lin_q, lin_k, v, rel_bias, lengths, cu_seqlens, closed_tokens)
    states = _states(v, lin_k.shape[-1], cu_seqlens, initial_kv)
    dstates = _states(v, lin_k.shape[-1], cu_seqlens, dkv_final)
    for part in parts:
        kv, dkv = states[part.seq.states], dstates[part.seq.states]
        ds_sum = torch.zeros_like(part.bias_block) if part.bias_block is not None else None
        if not causal:
            for c in part.chunks():
                part.accumulate(kv, part.take(part.lin_k, c), part.activated(part.v, c))
        # Forwards: what each chunk's queries read from the state.
        for c in part.chunks():
            dx = part.gated(dout, gate, c)
            if part.has_global(c):
                part.finish(dlin_q, c, part.begin(dlin_q, c, dx, kv.to(part.factor).mT).mul_(part.reciprocal(c)))
            else:
                part.view(dlin_q, c).zero_()
            if causal and part.is_closed(c):
                part.accumulate(kv, part.take(part.lin_k, c), part.activated(part.v, c))
            if not causal:
                part.accumulate(dkv, part.scaled_lin_q(c), dx)
        # Backwards: what each chunk's keys and values gave to its own queries and, through the state, to others.
        for c in reversed(part.chunks()):
            dx = part.gated(dout, gate, c)
            if gate is not None and dgate is not None and product is not None:
                torch.mul(part.view(dout, c), part.view(product, c), out=part.view(dgate, c))
                part.through_silu(dgate, gate, c)
            s, a = part.weights(c)
            v_c = part.activated(part.v, c)
            dv_c = part.begin(dv, c, a.to(part.factor).mT, dx)
            if not causal or part.is_closed(c):
                state = dkv.to(part.factor)
                part.put(dlin_k, c, v_c, state.mT)
                dv_c.baddbmm_(part.take(part.lin_k, c), state)
            else:
                part.view(dlin_k, c).zero_()
            part.finish(dv, c, dv_c)
            part.through_silu(dv, v, c)
            if causal and part.has_global(c):
                part.accumulate(dkv, part.scaled_lin_q(c), dx)
            ds = (dx @ v_c.mT).to(acc).mul_(score_slope(score, s))
            if causal:
                ds.tril_()
            if ds_sum is not None:
                size = c.stop - c.start
                ds_sum[:, :size, :size] += ds
            ds.mul_(1 / quad_normalizer)
            part.put(dquad_q, c, ds, part.take(part.quad_k, c, acc))
            part.put(dquad_k, c, ds.mT, part.take(part.quad_q, c, acc))
        if dbias is not None and ds_sum is not None:
            middle, size = dbias.shape[-1] // 2, ds_sum.shape[-1]
            dbias[part.seq.batch, middle - size + 1 : middle + size] += toeplitz_sums(ds_sum)
    dbias = dbias.to(rel_bias.dtype) if dbias is not None and rel_bias is not None else None
    return dquad_q, dquad_k, dlin_q, dlin_k, dv, dgate, dbias, dstates if initial_kv is not None else None


@dataclass(frozen=True)
class _Rule:
    chunk_size: int
    score: str
    causal: bool
    quad_normalizer: float
    lin_normalizer: float | None
    silu: bool


@dataclass(frozen=True)
class _Part:
    """One sequence of n tokens, or several rows of a batch of equally long ones."""

    rule: _Rule
    seq: Sequence
    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor
    v: Tensor
    bias_block: Tensor | None  # (b, C, C), the same for every chunk
    closed_tokens: Tensor | None  # (b, 1, 1)
    rooms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def factor(self) -> torch.dtype:
        return factor_dtype(self.v)

    def chunks(self) -> list[slice]:
        start, stop, size = self.seq.keys.start, self.seq.keys.stop, self.rule.chunk_size
        return [slice(c, min(c + size, stop)) for c in range(start, stop, size)]

    def view(self, x: Tensor, c: slice) -> Tensor:
        """The chunk's rows (b, c, .) of a tensor over the whole batch."""
        return x[self.seq.batch, c]

    def take(self, x: Tensor, c: slice, dtype: torch.dtype | None = None) -> Tensor:
        """The same rows as factors of a matrix product."""
        return self.view(x, c).to(dtype or self.factor)

    def gated(self, dout: Tensor, gate: Tensor | None, c: slice) -> Tensor:
        """The gradient of the ungated product."""
        d = self.take(dout, c)
        return d if gate is None else torch.mul(d, self.activated(gate, c), out=self.room("product", d))

    def activated(self, x: Tensor, c: slice) -> Tensor:
        """The chunk's rows of v or the gate, as factors."""
        rows = self.take(x, c)
        if not self.rule.silu:
            return rows
        return torch.ops.aten.silu.out(rows, out=self.room("v" if x is self.v else "gate", rows))

    def room(self, name: str, like: Tensor) -> Tensor:
        """Memory for an intermediate of one chunk, the same for all: fresh pages cost as much as the arithmetic."""
        room = self.rooms.get(name)
        if room is None or room.shape != like.shape:
            room = self.rooms[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return room

    def through_silu(self, grad: Tensor, x: Tensor, c: slice) -> None:
        """Turn the chunk's gradient of silu(x) into that of x, in place."""
        if self.rule.silu:
            place = self.view(grad, c)
            place.copy_(torch.ops.aten.silu_backward(place, self.view(x, c)))

    def is_closed(self, c: slice) -> bool:
        return c.stop - c.start == self.rule.chunk_size

    def has_global(self, c: slice) -> bool:
        """Whether there is anything to read from the state."""
        return not self.rule.causal or c.start > self.seq.keys.start or self.closed_tokens is not None

    def reciprocal(self, c: slice) -> Tensor | float:
        """1 / lin_normalizer."""
        if self.rule.lin_normalizer is not None:
            return 1 / self.rule.lin_normalizer
        if not self.rule.causal:
            return 1 / (self.seq.keys.stop - self.seq.keys.start)
        before = c.start - self.seq.keys.start
        if self.closed_tokens is None:
            return 1 / before
        return 1 / (self.closed_tokens + before).clamp_min(1).to(accumulator(self.v.dtype))

    def scaled_lin_q(self, c: slice) -> Tensor:
        return (self.view(self.lin_q, c).to(accumulator(self.v.dtype)) * self.reciprocal(c)).to(self.factor)

    def begin(self, target: Tensor | None, c: slice, a: Tensor, b: Tensor) -> Tensor:
        """The product a b, computed in the chunk's place in `target` where the types agree."""
        if target is None or target.dtype != a.dtype:
            return a @ b
        place = self.view(target, c)
        return torch.bmm(a, b, out=place)

    def finish(self, target: Tensor, c: slice, x: Tensor) -> None:
        """Round into its place what `begin` could not compute there."""
        if target.dtype != x.dtype:
            self.view(target, c).copy_(x)

    def put(self, target: Tensor, c: slice, a: Tensor, b: Tensor) -> None:
        """target_c = a b."""
        self.finish(target, c, self.begin(target, c, a, b))

    def accumulate(self, state: Tensor, a: Tensor, b: Tensor) -> None:
        """state += a^T b, the sum kept in the state's own type."""
        if state.dtype == a.dtype:
            state.baddbmm_(a.mT, b)
        else:
            state += a.mT @ b

    def weights(self, c: slice) -> tuple[Tensor, Tensor]:
        """Scores before the elementwise function and weights after it and the mask, both (b, c, c)."""
        acc = accumulator(self.v.dtype)
        q_c, k_c = self.take(self.quad_q, c, acc), self.take(self.quad_k, c, acc).mT
        alpha = 1 / self.rule.quad_normalizer
        if self.bias_block is None:
            s = (q_c @ k_c).mul_(alpha)
        else:
            size = c.stop - c.start
            s = torch.baddbmm(self.bias_block[:, :size, :size], q_c, k_c, alpha=alpha)
        a = elementwise_score(self.rule.score, s)
        return s, a.tril_() if self.rule.causal else a


def _parts(
    rule: _Rule,
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    rel_bias: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    closed_tokens: Tensor | None,
) -> list[_Part]:
    batch, n, width = v.shape
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
            parts.append(_Part(rule, seq, quad_q, quad_k, lin_q, lin_k, v, bias, closed))
    return parts


def _blank(lengths: Tensor | None, cu_seqlens: Tensor | None) -> Callable[..., Tensor]:
    """How results begin: as zeros where there is padding, unwritten where every row will be written."""
    return torch.empty_like if lengths is None and cu_seqlens is None else torch.zeros_like


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
    slots = torch.arange(size, device=v.device)
    here, before = (slots == place)[..., None], (slots < place)[..., None]
    # Rows behind the token are zero by contract, so they pass no gradient on either.
    open_quad_k, open_lin_k, open_v = (
        torch.where(here, new, torch.where(before, held, 0))
        for new, held in ((quad_k, open_quad_k), (lin_k, open_lin_k), (v, open_v))
    )
    s = (quad_q.to(acc) @ open_quad_k.to(acc).mT) / quad_normalizer
    distance = slots - place
    if rel_bias is not None:
        middle = rel_bias.shape[-1] // 2
        s = s + rel_bias.to(acc).gather(-1, middle + distance.clamp(max=0))[:, None]
    weights = torch.where(distance[:, None] <= 0, elementwise_score(score, s), 0)
    closed = (position[:, None, None] - place[..., None]).to(acc)
    divisor = closed.clamp_min(1) if lin_normalizer is None else lin_normalizer
    out = weights @ open_v.to(acc) + (lin_q.to(acc) / divisor) @ kv
    out = (out if gate is None else out * gate).to(v.dtype)
    full = (place + 1 == size)[..., None]
    if bool(full.any()):  # the chunk closes: into the sum with it
        kv = torch.where(full, kv + open_lin_k.to(acc).mT @ open_v.to(acc), kv)
        open_quad_k, open_lin_k, open_v = (torch.where(full, 0, x) for x in (open_quad_k, open_lin_k, open_v))
    return out, kv, open_quad_k, open_lin_k, open_v, position + 1

"""Mixed chunk attention (FLASH, Hua et al. 2022, section 3.2): chunks in order, with the sum of lin_k^T v at hand.

A few chunks are multiplied together, so many that their tensors and states KV (S, E) fit a CPU's cache, and no tensor
is longer than the input itself: time and memory are linear in length. `Chunks` is the mathematics, forward and
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Layout, MixedChunkHeads, MixedChunkOptions, MixedChunkSaved, OpenChunk, takes_fields
from .common import (
    VECTOR_BYTES,
    Sequence,
    Workspace,
    accumulator,
    as_type,
    score_slope,
    sequences,
    toeplitz_block,
    toeplitz_sums,
    values_dtype,
)
from .common import score as elementwise_score
from .glu import activated, gate_gradient
from .sizes import SIZES


@dataclass(frozen=True)
class Heads:
    """Queries and keys of some tokens, each (b, c, S), in the type that sums are kept in."""

    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor

    def all(self) -> list[Tensor]:
        """quad_q, quad_k, lin_q, lin_k."""
        return [self.quad_q, self.quad_k, self.lin_q, self.lin_k]


@dataclass(frozen=True)
class Group:
    """Chunks of equal length that are multiplied together, as one batch of matrices: `count` of each row."""

    tokens: slice
    count: int

    def split(self, x: Tensor) -> Tensor:
        """The group's tokens (b, T, .) as its chunks (b * count, T / count, .): a view of one row, or of full ones."""
        return x.reshape(-1, x.shape[1] // self.count, x.shape[2])


@dataclass(frozen=True)
class Chunks:
    """The chunks of one sequence, or of several rows of a batch of equally long ones, and what is computed of them."""

    options: MixedChunkOptions
    seq: Sequence
    factor: torch.dtype  # of wide matrix products
    together: int  # chunks in a group, at most
    bias_block: Tensor | None  # (b, C, C), the same for every chunk
    closed_tokens: Tensor | None  # (b, 1) tokens before the sequence's start, whose chunks are closed
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def rows(self) -> int:
        """How many rows of the batch there are."""
        return self.seq.batch.stop - self.seq.batch.start

    def groups(self) -> list[Group]:
        """The chunks in order; an open one at the end is a group of its own."""
        start, stop, size = self.seq.keys.start, self.seq.keys.stop, self.options.chunk_size
        last = start + (stop - start) // size * size
        spans = [slice(i, min(i + self.together * size, last)) for i in range(start, last, self.together * size)]
        groups = [Group(span, (span.stop - span.start) // size) for span in spans]
        return groups if last == stop else [*groups, Group(slice(last, stop), 1)]

    def view(self, x: Tensor, group: Group) -> Tensor:
        """The group's tokens (b, T, .) of a tensor over the whole batch."""
        return x[self.seq.batch, group.tokens]

    def split(self, x: Tensor, group: Group) -> Tensor:
        """The group's chunks (b * count, c, .) of a tensor over the whole batch, to be read."""
        return group.split(self.view(x, group))

    def put(self, target: Tensor, group: Group, x: Tensor) -> None:
        """Write the group's chunks (b * count, c, .) to a tensor over the whole batch."""
        rows = self.view(target, group)
        rows.copy_(x.view(rows.shape))

    def is_closed(self, group: Group) -> bool:
        """Whether the chunks are full, so that later ones read them through the state."""
        return group.tokens.stop - group.tokens.start == group.count * self.options.chunk_size

    def scaled(self, lin: Tensor, group: Group) -> Tensor:
        """lin / lin_normalizer, and 0 where there is nothing to read from the state."""
        before = group.tokens.start - self.seq.keys.start
        if self.options.lin_normalizer != "tokens":
            scaled = lin * (1 / float(self.options.lin_normalizer))
        elif not self.options.causal:
            return lin * (1 / (self.seq.keys.stop - self.seq.keys.start))
        else:
            tokens = torch.arange(group.count, device=lin.device).mul_(self.options.chunk_size).add_(before)
            if self.closed_tokens is not None:
                tokens = tokens + self.closed_tokens
            tokens = tokens.expand(self.rows, -1).reshape(-1, 1, 1)
            scaled = lin / tokens.clamp_min(1).to(lin.dtype)
        if self.options.causal and before == 0 and self.closed_tokens is None:
            scaled.view(self.rows, group.count, *lin.shape[1:])[:, 0] = 0
        return scaled

    def probs(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Scores before the elementwise function and weights after it and the mask, both (b * count, c, c)."""
        k, alpha = heads.quad_k.mT, 1 / self.options.divisor
        if self.bias_block is None:
            s = (heads.quad_q @ k).mul_(alpha)
        else:
            count, size = k.shape[0] // self.rows, k.shape[-1]
            bias = self.bias_block[:, :size, :size]
            bias = bias if self.rows == 1 else bias.repeat_interleave(count, 0)
            s = torch.baddbmm(bias, heads.quad_q, k, alpha=alpha)
        a = elementwise_score(self.options.score, s)
        return s, a.tril_() if self.options.causal else a

    def outer(self, lin: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
        """lin^T wide of each chunk (b * count, S, E) in the type that states are kept in; it stays until the next call.

        A product of halves would be rounded to them before it enters the sum over chunks, which may cancel.
        """
        wide = self.workspace.held("wide", wide, dtype)
        buffer = self.workspace.of("outer", (lin.shape[0], lin.shape[2], wide.shape[2]), wide)
        return torch.bmm(lin.to(dtype).mT, wide, out=buffer)

    def accumulate(self, total: Tensor, lin: Tensor, wide: Tensor) -> None:
        """total (b, S, E) += lin^T wide, summed over the chunks of each row."""
        total += self.outer(lin, wide, total.dtype).view(self.rows, -1, *total.shape[1:]).sum(1)

    def running(self, total: Tensor, parts: Tensor, into: Tensor, reverse: bool = False) -> Tensor:
        """What `total` (b, S, E) is when the part of each chunk (b * count, S, E) comes to be added to it, `into` that
        memory; `total` ends with all of them."""
        by_row = (x.view(self.rows, -1, *total.shape[1:]).unbind(1) for x in (parts, into))
        steps = list(zip(*by_row, strict=True))
        steps = steps[::-1] if reverse else steps
        steps[0][1].copy_(total)
        for (part, before), after in zip(steps, [*(later for _, later in steps[1:]), total], strict=True):
            torch.add(before, part, out=after)
        return into

    def states(self, group: Group, kv: Tensor, lin_k: Tensor, v: Tensor, keep: bool = False) -> Tensor:
        """The state (S, E) that each of the group's chunks reads; they stay until the next call, or longer to `keep`.

        If causal, `kv` becomes the state after the group. If not, it has all tokens already.
        """
        if not self.options.causal:
            return kv.repeat_interleave(group.count, 0) if self.rows > 1 else kv.expand(group.count, -1, -1)
        if not self.is_closed(group):
            return kv.clone() if keep else kv
        parts = self.outer(lin_k, v, kv.dtype)
        buffer = torch.empty_like(parts) if keep else self.workspace.like("states", parts)
        return self.running(kv, parts, buffer)

    def _takes_a_product(self, x: Tensor) -> bool:
        """Whether a product may be written to x: where x begins inside a vector, its last bits could be other ones."""
        whole_vectors = x.storage_offset() * x.element_size() % VECTOR_BYTES == 0
        return whole_vectors and x.dtype == self.factor and x.is_contiguous()

    def product(self, group: Group, heads: Heads, v: Tensor, states: Tensor, keep: Tensor | None = None) -> Tensor:
        """local + global: A v + lin_q KV / lin_normalizer, also written to `keep` (b, T, E).

        It stays until the next call, and is that memory itself where it can be.
        """
        a = self.probs(heads)[1].to(self.factor)
        there = keep if keep is not None and self._takes_a_product(keep) else None
        out = self.workspace.of("product", (*a.shape[:2], v.shape[-1]), v) if there is None else group.split(there)
        x = torch.bmm(a, v, out=out)
        x.baddbmm_(self.scaled(heads.lin_q, group).to(self.factor), self.workspace.held("read", states, self.factor))
        if keep is not None and there is None:
            keep.copy_(x.view(keep.shape))
        return x

    def gradients(
        self,
        group: Group,
        dx: Tensor,
        heads: Heads,
        v: Tensor,
        states: Tensor,
        dkv: Tensor,
        ds_sum: Tensor | None,
    ) -> tuple[Heads, Tensor]:
        """Gradients of the heads and of v, from that of `product`. For causal groups taken in reverse order.

        `states` are those that the chunks read. `dkv`, the gradient of the state after the group, becomes that of the
        state before it; dS is added to `ds_sum`.
        """
        causal = self.options.causal
        s, a = self.probs(heads)
        dv = torch.bmm(a.to(self.factor).mT, dx, out=self.workspace.like("dv", v))
        ds = torch.bmm(dx, v.mT).to(s.dtype).mul_(score_slope(self.options.score, s))
        if causal:
            ds.tril_()
            parts = self.outer(self.scaled(heads.lin_q, group), dx, dkv.dtype)
            after = self.running(dkv, parts, self.workspace.like("dstates", parts), reverse=True)
        else:
            after = self.states(group, dkv, heads.lin_k, v)
        if not causal or self.is_closed(group):
            after = self.workspace.held("after", after, self.factor)
            dlin_k = torch.bmm(v, after.mT)
            dv.baddbmm_(heads.lin_k.to(self.factor), after)
        else:
            dlin_k = torch.zeros_like(heads.lin_k)
        dlin_q = self.scaled(torch.bmm(dx, self.workspace.held("read", states, self.factor).mT), group)
        if ds_sum is not None:
            size = ds.shape[-1]
            ds_sum[:, :size, :size] += ds.view(self.rows, group.count, size, size).sum(1)
        ds = ds.mul_(1 / self.options.divisor).to(self.factor)
        dquad_q, dquad_k = ds @ heads.quad_k.to(self.factor), ds.mT @ heads.quad_q.to(self.factor)
        return Heads(dquad_q, dquad_k, dlin_q, dlin_k), dv


def chunks_together(chunk_size: int, narrow: int, wide: int, factor: torch.dtype) -> int:
    """How many chunks with states (narrow, wide) are multiplied together, as factors of that type."""
    largest = max(chunk_size * chunk_size, chunk_size * wide, narrow * wide)
    room = max(1, 4 // factor.itemsize)  # halves take half of it, and the units that multiply them want more rows
    return max(1, room * min(SIZES.chunk_elements // largest, SIZES.chunk_tokens // chunk_size))


def chunked(v: Tensor, together: int, layout: Layout, options: MixedChunkOptions) -> list[Chunks]:
    """The sequences of a batch (B, N, .), cut into chunks; several rows in one if each has few chunks."""
    rel_bias, closed_tokens = options.rel_bias, options.closed_tokens
    batch, n = v.shape[:2]
    parts = []
    for whole in sequences(batch, n, n, layout):
        size = min(options.chunk_size, whole.sizes[1])
        step = max(1, together // max(1, -(-whole.sizes[1] // options.chunk_size)))
        for b in range(whole.batch.start, whole.batch.stop, step):
            rows = slice(b, min(b + step, whole.batch.stop))
            seq = Sequence(whole.index + b - whole.batch.start, rows, whole.queries, whole.keys)
            bias = None
            if rel_bias is not None:
                bias = toeplitz_block(rel_bias[rows], rel_bias.shape[-1] // 2, size, size)
                bias = bias.to(accumulator(v.dtype))
            closed = closed_tokens[seq.states].view(-1, 1) if closed_tokens is not None else None
            parts.append(Chunks(options, seq, values_dtype(v), together, bias, closed))
    return parts


def blank(layout: Layout) -> Callable[[Tensor], Tensor]:
    """How results begin: as zeros where there is padding, unwritten where every row will be written."""
    begin = torch.empty_like if layout.is_dense else torch.zeros_like
    return partial(begin, memory_format=torch.contiguous_format)


def add_bias_gradient(dbias: Tensor, part: Chunks, ds_sum: Tensor) -> None:
    """Sum dS of all chunks along its diagonals into the gradient of the Toeplitz vector."""
    middle, size = dbias.shape[-1] // 2, ds_sum.shape[-1]
    dbias[part.seq.batch, middle - size + 1 : middle + size] += toeplitz_sums(ds_sum)


@takes_fields
def mixed_chunk_attention_forward(
    heads: MixedChunkHeads,
    v: Tensor,
    gate: Tensor | None = None,
    layout: Layout = Layout(),
    options: MixedChunkOptions = MixedChunkOptions(),
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Output (B, N, E); KV (G, S, E) of closed chunks; the ungated sum of both parts if `save` and there is a gate.

    KV is what a causal continuation starts from. No chunk's state is kept for the backward.
    """
    _, _, _, lin_k = heads
    together = chunks_together(options.chunk_size, lin_k.shape[-1], v.shape[-1], values_dtype(v))
    begin = blank(layout)
    out = begin(v)
    product = begin(out) if save and gate is not None else None
    states = _states(v, lin_k.shape[-1], layout, options.initial_kv)
    for part in chunked(v, together, layout, options):
        kv = states[part.seq.states]
        if not options.causal:
            for c in part.groups():
                part.accumulate(kv, part.split(lin_k, c), part.split(v, c).to(part.factor))
        for c in part.groups():
            heads_c, v_c = _heads(part, c, heads), part.split(v, c).to(part.factor)
            keep = part.view(product, c) if product is not None else None
            x = part.product(c, heads_c, v_c, part.states(c, kv, heads_c.lin_k, v_c), keep)
            if gate is None:
                part.put(out, c, x)
            else:
                rows = part.view(out, c)
                torch.mul(x.view(rows.shape), activated(part.view(gate, c), options.gate_activation, x.dtype), out=rows)
    return out, states, product, None


@takes_fields
def mixed_chunk_attention_backward(
    dout: Tensor,
    dkv: Tensor | None,
    heads: MixedChunkHeads,
    v: Tensor,
    gate: Tensor | None,
    saved: MixedChunkSaved = MixedChunkSaved(),
    layout: Layout = Layout(),
    options: MixedChunkOptions = MixedChunkOptions(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of quad_q, quad_k, lin_q, lin_k, v, gate, rel_bias (B, 2P-1) and initial_kv (None without it)."""
    product, _ = saved
    causal, rel_bias, begin = options.causal, options.rel_bias, blank(layout)
    _, _, lin_q, lin_k = heads
    dheads, dv = Heads(*map(begin, heads)), begin(v)
    dgate = begin(gate) if gate is not None else None
    dbias = rel_bias.new_zeros(rel_bias.shape, dtype=accumulator(v.dtype)) if rel_bias is not None else None
    states = _states(v, lin_k.shape[-1], layout, options.initial_kv)
    dfinal = _states(v, lin_k.shape[-1], layout, dkv)
    workspace = Workspace()
    together = chunks_together(options.chunk_size, lin_k.shape[-1], v.shape[-1], values_dtype(v))
    for part in chunked(v, together, layout, options):
        kv, dkv = states[part.seq.states], dfinal[part.seq.states]
        ds_sum = torch.zeros_like(part.bias_block) if part.bias_block is not None else None

        def ungated(c: Group, part: Chunks = part) -> Tensor:
            dx = part.split(dout, c).to(part.factor)
            if gate is None:
                return dx
            a = activated(part.split(gate, c), options.gate_activation, dx.dtype)
            return torch.mul(dx, a, out=workspace.like("dx", dx))

        seen = []  # the states that each group read, if causal
        for c in part.groups():
            lin_k_c, v_c = part.split(lin_k, c), part.split(v, c).to(part.factor)
            if causal:
                seen.append(part.states(c, kv, lin_k_c, v_c, keep=True))
            else:
                part.accumulate(kv, lin_k_c, v_c)
                part.accumulate(dkv, part.scaled(part.split(lin_q, c), c), ungated(c))
        for c in reversed(part.groups()):
            dx, v_c = ungated(c), part.split(v, c).to(part.factor)
            if gate is not None and dgate is not None and product is not None:
                _put_gate_gradient(part, c, dout, product, gate, options.gate_activation, dgate)
            heads_c = _heads(part, c, heads)
            read = seen.pop() if causal else part.states(c, kv, heads_c.lin_k, v_c)
            dheads_c, dv_c = part.gradients(c, dx, heads_c, v_c, read, dkv, ds_sum)
            for target, grad in zip(dheads.all(), dheads_c.all(), strict=True):
                part.put(target, c, grad)
            part.put(dv, c, dv_c)
        if dbias is not None and ds_sum is not None:
            add_bias_gradient(dbias, part, ds_sum)
    dbias = dbias.to(rel_bias.dtype) if dbias is not None and rel_bias is not None else None
    dinitial = dfinal if options.initial_kv is not None else None
    return dheads.quad_q, dheads.quad_k, dheads.lin_q, dheads.lin_k, dv, dgate, dbias, dinitial


def _heads(part: Chunks, c: Group, whole: MixedChunkHeads) -> Heads:
    return Heads(*(part.split(x, c).to(accumulator(x.dtype)) for x in whole))


def _put_gate_gradient(
    part: Chunks, c: Group, dout: Tensor, product: Tensor, gate: Tensor, activation: str, dgate: Tensor
) -> None:
    """Write dGate = X * dO * act'(gate) of a group."""
    d, x, rows = part.view(dout, c), part.view(product, c), part.view(dgate, c)
    if activation == "identity":
        torch.mul(d, x, out=rows)
    else:
        rows.copy_(gate_gradient(d.to(part.factor) * x, part.view(gate, c), activation))


def _states(v: Tensor, width: int, layout: Layout, start: Tensor | None) -> Tensor:
    """One state (S, E) for every sequence: a copy of `start`, or zeros."""
    if start is not None:
        return start.to(accumulator(v.dtype)).clone(memory_format=torch.contiguous_format)
    count = v.shape[0] if layout.cu_seqlens is None else layout.cu_seqlens.shape[0] - 1
    return v.new_zeros(count, width, v.shape[-1], dtype=accumulator(v.dtype))


@takes_fields
def mixed_chunk_step(
    heads: MixedChunkHeads,
    v: Tensor,
    gate: Tensor | None,
    state: OpenChunk,
    options: MixedChunkOptions = MixedChunkOptions(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One token (B, 1, .): its output, then kv, quad_k, lin_k, v and position of the new state; differentiable."""
    _, quad_k, _, lin_k = heads
    kv, open_quad_k, open_lin_k, open_v, position = state
    acc, size = accumulator(v.dtype), open_quad_k.shape[1]
    place = position % size
    open_quad_k, open_lin_k, open_v = (
        _with_token(held, new, place) for held, new in ((open_quad_k, quad_k), (open_lin_k, lin_k), (open_v, v))
    )
    seen = _seen(OpenChunk(kv, open_quad_k, open_lin_k, open_v, position), options.rel_bias)
    out = _attended(heads, gate, kv, seen, options)
    full = (place + 1 == size)[:, None, None]
    if torch.compiler.is_compiling() or bool(full.any()):  # the chunk closes: into the sum with it
        kv = torch.where(full, kv + open_lin_k.to(acc).mT @ open_v.to(acc), kv)
        open_quad_k, open_lin_k, open_v = (torch.where(full, 0, x) for x in (open_quad_k, open_lin_k, open_v))
    return out, kv, open_quad_k, open_lin_k, open_v, position + 1


@takes_fields
def mixed_chunk_step_(
    heads: MixedChunkHeads,
    v: Tensor,
    gate: Tensor | None,
    state: OpenChunk,
    options: MixedChunkOptions = MixedChunkOptions(),
) -> Tensor:
    """The same in place: one row of the open chunk is written, and all of the state only when that is full."""
    return token_(heads, v, gate, Places(state, options.rel_bias), options)


class Place(NamedTuple):
    """Views for the tokens at one place of the open chunk."""

    rows: tuple[Tensor, ...]  # (B, 1, .) of quad_k, lin_k and v: their own
    keys: Tensor  # (B, S, place + 1) quad_k up to them
    values: Tensor  # (B, place + 1, E)
    bias: Tensor | None  # (B, 1, place + 1)


class Places:
    """A state, and views for every place of its open chunk, each made when first needed: C of them at most."""

    state: OpenChunk
    bias: Tensor | None

    def __init__(self, state: OpenChunk, bias: Tensor | None) -> None:
        self.state, self.bias = state, bias
        self._made: dict[int, Place] = {}

    def __getitem__(self, place: int) -> Place:
        made = self._made.get(place)
        if made is None:
            _, quad_k, lin_k, v, _ = self.state
            rows = tuple(x[:, place : place + 1] for x in (quad_k, lin_k, v))
            keys, values, bias = quad_k[:, : place + 1].mT, v[:, : place + 1], self.bias
            if bias is not None:
                middle = bias.shape[-1] // 2
                bias = bias[:, None, middle - place : middle + 1]
            made = self._made[place] = Place(rows, keys, values, bias)
        return made


def token_(
    heads: MixedChunkHeads, v: Tensor, gate: Tensor | None, places: Places, options: MixedChunkOptions
) -> Tensor:
    """`mixed_chunk_step_` of a state with its views. `options.rel_bias` is not read, but that of `places`."""
    kv, *held, position = places.state
    size, compiling = held[0].shape[1], torch.compiler.is_compiling()
    at = [] if compiling else position.tolist()
    if at and at == at[:1] * len(at):  # all rows are at one position: only the tokens so far are read
        place = at[0] % size
        rows, keys, values, bias = places[place]
        for row, new in zip(rows, (heads.quad_k, heads.lin_k, v), strict=True):
            row.copy_(new)
        out = _attended(heads, gate, kv, Seen(keys, values, bias, None, max(1, at[0] - place)), options)
        position += 1
        if place + 1 == size:
            _close(places.state)
        return out
    own = torch.arange(v.shape[0], device=v.device) * size + position % size
    for x, new in zip(held, (heads.quad_k, heads.lin_k, v), strict=True):
        x.view(-1, x.shape[-1]).index_copy_(0, own, new[:, 0].to(x.dtype))
    out = _attended(heads, gate, kv, _seen(places.state, places.bias), options)
    position += 1
    if _CLOSING.traced if compiling else any((p + 1) % size == 0 for p in at):
        _close(places.state, (position % size == 0)[:, None, None])
    return out


class _Closing:
    """Whether a token that is traced closes what it fills, for which a program must do the work at every token."""

    traced = True


_CLOSING = _Closing()


@contextmanager
def closing_later() -> Iterator[None]:
    """Inside, a traced token leaves a chunk open that it fills: `close_` must follow before the next."""
    before, _CLOSING.traced = _CLOSING.traced, False
    try:
        yield
    finally:
        _CLOSING.traced = before


def close_(state: OpenChunk) -> None:
    """Close in place the chunks that are full; those that are closed already stay as they are."""
    size = state.open_v.shape[1]
    full = [p % size == 0 for p in state.position.tolist()]
    if any(full):
        _close(state, None if all(full) else torch.tensor(full, device=state.position.device)[:, None, None])


def _close(state: OpenChunk, full: Tensor | None = None) -> None:
    """Put the open chunk of the rows that are `full` (B, 1, 1), of all without, into the sums, and leave it empty."""
    kv, *held, _ = state
    lin_k, v = (as_type(x, kv.dtype) for x in held[1:])
    if full is None:
        kv.baddbmm_(lin_k.mT, v)
        for x in held:
            x.zero_()
    else:
        kv += lin_k.masked_fill(~full, 0).mT @ v
        for x in held:
            x.masked_fill_(full, 0)


class Seen(NamedTuple):
    """What a token in every row attends to inside its chunk, itself included."""

    keys: Tensor  # (B, S, c)
    values: Tensor  # (B, c, E)
    bias: Tensor | None  # (B, 1, c)
    there: Tensor | None  # (B, 1, c) which of them are; None: all
    closed: Tensor | int  # tokens before the chunk, 1 if there is none: (B, 1, 1), or of all rows


def _seen(state: OpenChunk, bias: Tensor | None) -> Seen:
    """Of tokens whose rows are at positions of their own."""
    size, position = state.open_v.shape[1], state.position
    places = (position % size)[:, None]
    distance = torch.arange(size, device=position.device) - places
    closed = (position[:, None] - places).clamp_min(1).to(state.kv.dtype)[..., None]
    if bias is not None:
        bias = bias.gather(-1, bias.shape[-1] // 2 + distance.clamp(max=0))[:, None]
    return Seen(state.open_quad_k.mT, state.open_v, bias, distance[:, None] <= 0, closed)


def _attended(
    heads: MixedChunkHeads, gate: Tensor | None, kv: Tensor, seen: Seen, options: MixedChunkOptions
) -> Tensor:
    """The output (B, 1, E) of a token that is in the open chunk already."""
    acc, factor = accumulator(heads.quad_q.dtype), 1 / options.divisor
    query, keys, values = (as_type(x, acc) for x in (heads.quad_q, seen.keys, seen.values))
    if seen.bias is None:
        s = torch.bmm(query, keys) * factor
    else:
        s = torch.baddbmm(as_type(seen.bias, acc), query, keys, alpha=factor)
    weights = elementwise_score(options.score, s)
    if seen.there is not None:
        weights = torch.where(seen.there, weights, 0)
    before = seen.closed if options.lin_normalizer == "tokens" else float(options.lin_normalizer)
    out = torch.baddbmm(torch.bmm(weights, values), as_type(heads.lin_q, acc) / before, kv)
    out = out if gate is None else out * activated(gate, options.gate_activation, acc)
    return as_type(out, heads.quad_q.dtype)


def _with_token(held: Tensor, new: Tensor, place: Tensor) -> Tensor:
    """The open chunk's rows (B, C, .) before each sequence's `place` (B,), `new` (B, 1, .) there, zeros behind."""
    before = (torch.arange(held.shape[1], device=held.device) < place[:, None])[..., None]
    held = torch.where(before, held, 0)
    return held.scatter(1, place[:, None, None].expand_as(new), new.to(held.dtype))

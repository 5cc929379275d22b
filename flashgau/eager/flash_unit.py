"""A whole FLASH layer between its norm and its residual sum, a few chunks after the other.

    [u, v, z] = silu(x W + b),  heads = RoPE(gamma z + beta),  y = (u * mixed_chunk(heads, v)) W_o + b_o

Everything a few chunks need fits the cache. So only x W + b and what u multiplies are kept for the backward, and
nothing else as wide as the values is ever written for the whole length: on a CPU most of a layer's time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import Angles, FlashSaved, FlashWeights, Layout, MixedChunkOptions
from .common import Workspace, accumulator, add_product, values_dtype
from .mixed_chunk import Chunks, Group, Heads, add_bias_gradient, blank, chunked, chunks_together
from .projection import turn


@dataclass(frozen=True)
class _Parameters:
    """The layer's parameters as factors of products, and the angles of its positions."""

    w: Tensor  # (2e + S, d)
    b: Tensor | None
    gamma: Tensor  # (4, 1, 1, S) in the order quad_q, quad_k, lin_q, lin_k
    beta: Tensor | None
    w_out: Tensor  # (d, e)
    rotary: Angles

    @property
    def widths(self) -> tuple[int, int, int]:
        e, s = self.w_out.shape[1], self.gamma.shape[-1]
        return e, e, s

    def heads(self, part: Chunks, group: Group, z: Tensor) -> Heads:
        """OffsetScale and rotary embedding of z (b, T, S), cut into chunks."""
        return Heads(*map(group.split, self.made(part, group, z, 0)))

    def made(self, part: Chunks, group: Group, z: Tensor, first: int) -> tuple[Tensor, ...]:
        """The heads (b, T, S) from number `first` on: 2 for lin_q and lin_k alone."""
        gamma = self.gamma[first:]
        heads = z * gamma if self.beta is None else torch.addcmul(self.beta[first:], z, gamma)
        if self.rotary.cos is not None:
            turn(heads, *self.angles(part, group), self.rotary.interleaved)
        return heads.unbind(0)

    def heads_backward(
        self, part: Chunks, group: Group, z: Tensor, dheads: Heads, dgamma: Tensor, dbeta: Tensor, workspace: Workspace
    ) -> Tensor:
        """The gradient of z; those of gamma and beta (4, S) are added to."""
        d = workspace.of("dheads", (4, *z.shape), z)
        for head, dhead in zip(d, dheads.all(), strict=True):
            head.copy_(dhead.view(z.shape))
        if self.rotary.cos is not None:
            cos, sin = self.angles(part, group)
            turn(d, cos, -sin, self.rotary.interleaved)  # a rotation's gradient turns back
        dbeta += d.sum((1, 2))
        dz = torch.mul(d[0], self.gamma[0], out=workspace.like("dz", z))
        for head, gamma in zip(d[1:], self.gamma[1:], strict=True):
            dz.addcmul_(head, gamma)
        dgamma += d.mul_(z).sum((1, 2))
        return dz

    def angles(self, part: Chunks, group: Group) -> tuple[Tensor, Tensor]:
        cos, sin, _ = self.rotary
        assert cos is not None
        assert sin is not None
        rows = part.seq.batch if cos.shape[0] > 1 else slice(0, 1)
        return cos[rows, group.tokens], sin[rows, group.tokens]


def flash_unit_forward(
    x: Tensor,
    weights: FlashWeights,
    residual: Tensor | None = None,
    angles: Angles = Angles(),
    layout: Layout = Layout(),
    options: MixedChunkOptions = MixedChunkOptions(),
    save: bool = False,
) -> list[Tensor | None]:
    """x (B, N, d) -> y (B, N, d), with the residual if there is one.

    And, if `save`, what the backward reads: x W + b (B, N, 2e + S), what u multiplies (B, N, e), and states
    (`state_count`, S, e) with which groups of chunks begin.
    """
    p = _parameters(x, weights, angles)
    y = _without_attention(x, weights.b_out, residual)  # which is all that rows of padding have
    workspace, (e, _, narrow) = Workspace(), p.widths
    together = chunks_together(options.chunk_size, narrow, e, p.w.dtype)
    before, products = (x.new_empty(*x.shape[:2], width) if save else None for width in (p.w.shape[0], e))
    count = state_count(x, options.chunk_size, narrow, e, options.causal, layout.cu_seqlens)
    starts = p.gamma.new_empty(count, narrow, e) if save else None
    parts = chunked(x, together, layout, options)
    for part, begins in _with_starts(parts, starts):
        kv = _state(part, p)
        if not options.causal:
            for group in part.groups():
                _, v, z = _activated(_project(part, group, x, p, workspace), p, workspace)
                (lin_k,) = p.made(part, group, z, 3)
                part.accumulate(kv, group.split(lin_k), group.split(v))
        for group, begin in zip(part.groups(), begins, strict=True):
            if begin is not None:
                begin.copy_(kv)
            u, v, z = _activated(_project(part, group, x, p, workspace, before), p, workspace)
            heads, v = p.heads(part, group, z), group.split(v)
            states = part.states(group, kv, heads.lin_k, v)
            keep = part.view(products, group) if products is not None else None
            product = part.product(group, heads, v, states, keep).view(u.shape)
            _add_product(part.view(y, group), u.mul_(product), p.w_out.T, workspace)
    return [y, before, products, starts]


def flash_unit_backward(
    dy: Tensor,
    x: Tensor,
    weights: FlashWeights,
    saved: FlashSaved,
    angles: Angles = Angles(),
    layout: Layout = Layout(),
    options: MixedChunkOptions = MixedChunkOptions(),
) -> tuple[Tensor, ...]:
    """Gradients of x, w, b, gamma, beta, w_out, b_out and rel_bias (an empty one where there is none)."""
    acc, p, rel_bias = accumulator(x.dtype), _parameters(x, weights, angles), options.rel_bias
    w, gamma, w_out = weights.w, weights.gamma, weights.w_out
    dx = blank(layout)(x)
    dw, dw_out = (torch.zeros(t.shape, dtype=acc, device=x.device) for t in (w, w_out))
    dgamma, dbeta = (torch.zeros(gamma.shape, dtype=acc, device=x.device) for _ in range(2))
    db = dw.new_zeros(w.shape[0])
    dbias = rel_bias.new_zeros(rel_bias.shape, dtype=acc) if rel_bias is not None else x.new_empty(0)
    together = chunks_together(options.chunk_size, gamma.shape[1], w_out.shape[1], p.w.dtype)
    parts = chunked(x, together, layout, options)
    workspace = Workspace()
    for part, begins in _with_starts(parts, saved.starts):
        kv, dkv = _state(part, p), _state(part, p)
        ds_sum = torch.zeros_like(part.bias_block) if part.bias_block is not None else None
        if not options.causal:
            for group in part.groups():
                u, v, z = _activated(part.view(saved.before, group).to(part.factor), p, workspace)
                lin_q, lin_k = map(group.split, p.made(part, group, z, 2))
                part.accumulate(kv, lin_k, group.split(v))
                dproduct = (part.view(dy, group).to(part.factor) @ p.w_out).mul_(u)
                part.accumulate(dkv, part.scaled(lin_q, group), group.split(dproduct))
        for group, begin in reversed(list(zip(part.groups(), begins, strict=True))):
            if begin is not None:
                kv.copy_(begin)
            elif options.causal:
                kv.zero_()
            h, dy_g, product = (part.view(t, group).to(part.factor) for t in (saved.before, dy, saved.products))
            u, v, z = _activated(h, p, workspace)
            heads, v = p.heads(part, group, z), group.split(v)
            states = part.states(group, kv, heads.lin_k, v)
            dout = torch.matmul(dy_g, p.w_out, out=workspace.like("dout", u))
            du = torch.mul(product, dout, out=workspace.like("du", u))
            _add_outer(dw_out, dy_g, torch.mul(product, u, out=workspace.like("out", u)), workspace)
            dheads, dv = part.gradients(group, group.split(dout.mul_(u)), heads, v, states, dkv, ds_sum)
            dz = p.heads_backward(part, group, z, dheads, dgamma, dbeta, workspace)
            dh = workspace.like("d(x W + b)", h)
            for d, h_part, into in zip((du, dv, dz), h.split(p.widths, -1), dh.split(p.widths, -1), strict=True):
                d = d.view(h_part.shape).to(part.factor)
                torch.ops.aten.silu_backward.grad_input(d, h_part, grad_input=into)
            db += dh.sum((0, 1))
            _add_outer(dw, dh, part.view(x, group).to(part.factor), workspace)
            _product(dh, p.w, part.view(dx, group))
        if ds_sum is not None:
            add_bias_gradient(dbias, part, ds_sum)
    back = torch.empty_like(dgamma), torch.empty_like(dbeta)
    back[0][weights.order], back[1][weights.order] = dgamma, dbeta
    db_out = dy.sum((0, 1))
    grads = (dx, dw, db, *back, dw_out, db_out)
    dtypes = (x, w, w, gamma, gamma, w_out, w_out)
    dbias = dbias if rel_bias is None else dbias.to(rel_bias.dtype)
    return *(g.to(like.dtype) for g, like in zip(grads, dtypes, strict=True)), dbias


def _parameters(x: Tensor, weights: FlashWeights, angles: Angles) -> _Parameters:
    factor, acc = values_dtype(x), accumulator(x.dtype)
    w, b, gamma, beta, w_out, _, order = weights

    def rows(t: Tensor) -> Tensor:
        return t.to(acc)[order][:, None, None]

    factors = w.to(factor), None if b is None else b.to(factor)
    return _Parameters(*factors, rows(gamma), None if beta is None else rows(beta), w_out.to(factor), angles)


def state_count(x: Tensor, chunk_size: int, narrow: int, wide: int, causal: bool, cu_seqlens: Tensor | None) -> int:
    """How many states (narrow, wide) are kept for a batch x (B, N, d), room for any lengths.

    Memory that no state is written to is never touched. Two more than are needed: to a size that may be 0 or 1 a traced
    program of any length would be bound.
    """
    if not causal:
        return 0
    (batch, n), together = x.shape[:2], chunks_together(chunk_size, narrow, wide, values_dtype(x))
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return 2 + batch * torch.sym_min(n // chunk_size, n // (together * chunk_size) + sequences)


def _with_starts(parts: list[Chunks], starts: Tensor | None) -> Iterator[tuple[Chunks, list[Tensor | None]]]:
    """Every part with the memory, for each of its groups, of the state (b, S, e) with which it begins.

    There is none for the first, which begins with nothing, nor where all chunks read the same state.
    """
    place = 0
    for part in parts:
        begins: list[Tensor | None] = [None] * len(part.groups())
        if part.options.causal and starts is not None:
            for i in range(1, len(begins)):
                begins[i] = starts[place : place + part.rows]
                place += part.rows
        yield part, begins


def _without_attention(x: Tensor, b_out: Tensor | None, residual: Tensor | None) -> Tensor:
    """The result before anything is added to it: b_o and the residual."""
    if residual is None:
        y = torch.zeros_like(x, memory_format=torch.contiguous_format)
        return y if b_out is None else y.add_(b_out)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y.copy_(residual) if b_out is None else torch.add(residual, b_out, out=y)


def _project(
    part: Chunks, group: Group, x: Tensor, p: _Parameters, workspace: Workspace, before: Tensor | None = None
) -> Tensor:
    """x W + b of a group (b, T, 2e + S), also written to `before` if given."""
    flat = _flat(part.view(x, group).to(part.factor))
    target = part.view(before, group) if before is not None else None
    at_once = target is not None and target.dtype == flat.dtype and target.is_contiguous()
    buffer = (
        workspace.of("x W + b", (flat.shape[0], p.w.shape[0]), flat) if target is None or not at_once else _flat(target)
    )
    h = torch.mm(flat, p.w.T, out=buffer) if p.b is None else torch.addmm(p.b, flat, p.w.T, out=buffer)
    h = h.view(part.rows, -1, h.shape[-1])
    if target is not None and not at_once:
        target.copy_(h)
    return h


def _activated(h: Tensor, p: _Parameters, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and z = silu(h), each contiguous, as products of halves want it; z in the type that sums are kept in."""
    u, v, z = (
        torch.ops.aten.silu.out(part, out=workspace.like(name, part))
        for name, part in zip("uvz", h.split(p.widths, -1), strict=True)
    )
    return u, v, z.to(p.gamma.dtype)


def _state(part: Chunks, p: _Parameters) -> Tensor:
    return p.gamma.new_zeros(part.rows, p.gamma.shape[-1], p.w_out.shape[1])


def _flat(x: Tensor) -> Tensor:
    """(b, T, .) -> (b T, .): a view where that is possible."""
    return x.reshape(-1, x.shape[-1])


def _add_outer(total: Tensor, a: Tensor, b: Tensor, workspace: Workspace) -> None:
    """total += a^T b over the rows of (b, T, .) tensors."""
    add_product(total, _flat(a).T, _flat(b), workspace)


def _add_product(total: Tensor, a: Tensor, b: Tensor, workspace: Workspace) -> None:
    """total += a b for a (b, T, .) and a matrix b."""
    if total.is_contiguous():
        add_product(_flat(total), _flat(a), b, workspace)
    else:
        total += a @ b


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b for a (b, T, .) and a matrix b."""
    if out.dtype == a.dtype and out.is_contiguous():
        torch.mm(_flat(a), b, out=_flat(out))
    else:
        out.copy_(a @ b)

"""A whole FLASH layer between its norm and its residual sum, chunk after chunk.

    [u, v, z] = silu(x W + b),  heads = RoPE(gamma z + beta),  y = (u * mixed_chunk(heads, v)) W_o + b_o

Everything a chunk needs fits the cache, so only x W + b is kept for the backward, and nothing as wide as the values
is ever written for the whole length besides. On a CPU that is most of the time and of the memory of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Rooms, accumulator, add_product, factor_dtype
from .mixed_chunk import Chunks, Heads, Rule, add_bias_gradient, blank, chunked
from .projection import turn

_PANEL = 1024  # tokens projected at a time: enough that the weights' way through the cache does not count

Order = list[int]  # the rows of gamma and beta that make quad_q, quad_k, lin_q and lin_k


@dataclass(frozen=True)
class _Weights:
    """The layer's parameters as factors of products, and the angles of its positions."""

    w: Tensor  # (2e + S, d)
    b: Tensor | None
    gamma: Tensor  # (4, 1, 1, S) in the order quad_q, quad_k, lin_q, lin_k
    beta: Tensor | None
    w_out: Tensor  # (d, e)
    b_out: Tensor | None
    cos: Tensor | None  # (1 or B, N, pairs)
    sin: Tensor | None
    interleaved: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        e, s = self.w_out.shape[1], self.gamma.shape[-1]
        return e, e, s

    def heads(self, part: Chunks, c: slice, z: Tensor) -> Heads:
        """OffsetScale and rotary embedding of z (b, c, S)."""
        return Heads(*self.made(part, c, z, 0))

    def made(self, part: Chunks, c: slice, z: Tensor, first: int) -> tuple[Tensor, ...]:
        """The heads from number `first` on: 2 for lin_q and lin_k alone."""
        gamma = self.gamma[first:]
        heads = z * gamma if self.beta is None else torch.addcmul(self.beta[first:], z, gamma)
        if self.cos is not None and self.sin is not None:
            turn(heads, *self.angles(part, c), self.interleaved)
        return heads.unbind(0)

    def heads_backward(self, part: Chunks, c: slice, z: Tensor, dheads: Heads, dgamma: Tensor, dbeta: Tensor) -> Tensor:
        """The gradient of z; those of gamma and beta (4, S) are added to."""
        d = torch.stack(dheads.all())
        if self.cos is not None and self.sin is not None:
            cos, sin = self.angles(part, c)
            turn(d, cos, -sin, self.interleaved)  # a rotation's gradient turns back
        dbeta += d.sum((1, 2))
        dz = (d * self.gamma).sum(0)
        dgamma += d.mul_(z).sum((1, 2))
        return dz

    def angles(self, part: Chunks, c: slice) -> tuple[Tensor, Tensor]:
        assert self.cos is not None
        assert self.sin is not None
        rows = part.seq.batch if self.cos.shape[0] > 1 else slice(0, 1)
        return self.cos[rows, c], self.sin[rows, c]


def flash_unit_forward(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    order: Order,
    interleaved: bool,
    chunk_size: int,
    score: str,
    causal: bool,
    lin_normalizer: float | None,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x (B, N, d) -> y (B, N, d), with the residual if there is one; and x W + b (B, N, 2e + S) if `save`."""
    p = _weights(x, w, b, gamma, beta, w_out, b_out, cos, sin, order, interleaved)
    y = blank(lengths, cu_seqlens)(x)
    if lengths is not None or cu_seqlens is not None:  # rows of padding have no attention
        y = y if residual is None else y.add_(residual)
        y = y if b_out is None else y.add_(b_out)
    before = x.new_empty(*x.shape[:2], w.shape[0]) if save else None
    rule = Rule(chunk_size, score, causal, float(chunk_size), lin_normalizer)
    rooms = Rooms()
    for part in chunked(rule, x, w_out.shape[1], rel_bias, lengths, cu_seqlens):
        kv = _state(part, p)
        if not causal:
            for panel, chunks in _panels(part):
                _, v, z = _activated(_project(part, panel, x, p, rooms), p, rooms)
                (lin_k,) = p.made(part, panel, z, 3)
                for c in chunks:
                    r = _within(c, panel)
                    part.accumulate(kv, lin_k[:, r], v[:, r])
        for panel, chunks in _panels(part):
            h = _project(part, panel, x, p, rooms)
            if before is not None:
                part.view(before, panel).copy_(h)
            u, v, z = _activated(h, p, rooms)
            heads, out = p.heads(part, panel, z), rooms.like("out", u)
            for c in chunks:
                r = _within(c, panel)
                own, v_c = heads.rows(r), v[:, r]
                torch.mul(part.product(c, own, v_c, kv), u[:, r], out=out[:, r])
                if causal and part.is_closed(c):
                    part.accumulate(kv, own.lin_k, v_c)
            y_p = F.linear(out, p.w_out, p.b_out)
            if residual is not None:
                y_p += part.view(residual, panel)
            part.view(y, panel).copy_(y_p)
    return y, before


def flash_unit_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    before: Tensor,
    *,
    order: Order,
    interleaved: bool,
    chunk_size: int,
    score: str,
    causal: bool,
    lin_normalizer: float | None,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, w, b, gamma, beta, w_out, b_out and rel_bias (an empty one where there is none)."""
    acc = accumulator(x.dtype)
    p = _weights(x, w, b, gamma, beta, w_out, b_out, cos, sin, order, interleaved)
    dx = blank(lengths, cu_seqlens)(x)
    dw, dw_out = (torch.zeros(t.shape, dtype=acc, device=x.device) for t in (w, w_out))
    dgamma, dbeta = (torch.zeros(gamma.shape, dtype=acc, device=x.device) for _ in range(2))
    db = dw.new_zeros(w.shape[0])
    dbias = rel_bias.new_zeros(rel_bias.shape, dtype=acc) if rel_bias is not None else x.new_empty(0)
    rule = Rule(chunk_size, score, causal, float(chunk_size), lin_normalizer)
    rooms = Rooms()
    for part in chunked(rule, x, w_out.shape[1], rel_bias, lengths, cu_seqlens):
        kv, dkv = _state(part, p), _state(part, p)
        ds_sum = torch.zeros_like(part.bias_block) if part.bias_block is not None else None
        seen = []  # the state that each chunk read
        for panel, chunks in _panels(part):
            u, v, z = _activated(part.view(before, panel).to(part.factor), p, rooms, gate=not causal)
            lin_q, lin_k = p.made(part, panel, z, 2)
            for c in chunks:
                r = _within(c, panel)
                if causal:
                    seen.append(kv.clone())
                if not causal or part.is_closed(c):
                    part.accumulate(kv, lin_k[:, r], v[:, r])
                if not causal:
                    dproduct = (part.view(dy, c).to(part.factor) @ p.w_out).mul_(u[:, r])
                    part.accumulate(dkv, part.scaled(lin_q[:, r], c), dproduct)
        for panel, chunks in reversed(_panels(part)):
            h, dy_p = part.view(before, panel).to(part.factor), part.view(dy, panel).to(part.factor)
            u, v, z = _activated(h, p, rooms)
            heads, dheads = p.heads(part, panel, z), Heads.like(z)
            dout = torch.matmul(dy_p, p.w_out, out=rooms.like("dout", u))
            out, dactive = rooms.like("out", u), rooms.like("d[u, v, z]", h)
            du, dv, dz = dactive.split(p.widths, -1)
            for c in reversed(chunks):
                r = _within(c, panel)
                own, v_c, state = heads.rows(r), v[:, r], seen.pop() if causal else kv
                product = part.product(c, own, v_c, state)
                torch.mul(product, u[:, r], out=out[:, r])
                torch.mul(product, dout[:, r], out=du[:, r])
                dproduct = dout[:, r].mul_(u[:, r])
                dheads_c, dv_c = part.gradients(c, dproduct, own, v_c, state, dkv, ds_sum)
                dv[:, r] = dv_c
                dheads.put(r, dheads_c)
            dz.copy_(p.heads_backward(part, panel, z, dheads, dgamma, dbeta))
            _add_outer(dw_out, dy_p, out)
            dh = torch.ops.aten.silu_backward.grad_input(dactive, h, grad_input=dactive)
            db += dh.sum((0, 1))
            _add_outer(dw, dh, part.view(x, panel).to(part.factor))
            part.view(dx, panel).copy_(dh @ p.w)
        if ds_sum is not None:
            add_bias_gradient(dbias, part, ds_sum)
    back = torch.empty_like(dgamma), torch.empty_like(dbeta)
    back[0][order], back[1][order] = dgamma, dbeta
    db_out = dy.sum((0, 1), dtype=acc)
    grads = (dx, dw, db, *back, dw_out, db_out)
    dtypes = (x, w, w, gamma, gamma, w_out, w_out)
    dbias = dbias if rel_bias is None else dbias.to(rel_bias.dtype)
    return *(g.to(like.dtype) for g, like in zip(grads, dtypes, strict=True)), dbias


def _panels(part: Chunks) -> list[tuple[slice, list[slice]]]:
    """Groups of chunks, with the rows they cover together."""
    chunks = part.slices()
    step = max(1, _PANEL // part.rule.chunk_size)
    groups = [chunks[i : i + step] for i in range(0, len(chunks), step)]
    return [(slice(group[0].start, group[-1].stop), group) for group in groups]


def _within(c: slice, panel: slice) -> slice:
    return slice(c.start - panel.start, c.stop - panel.start)


def _weights(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Order,
    interleaved: bool,
) -> _Weights:
    factor, acc = factor_dtype(x), accumulator(x.dtype)

    def rows(t: Tensor | None) -> Tensor | None:
        return t.to(acc)[order][:, None, None] if t is not None else None

    ordered = rows(gamma)
    assert ordered is not None
    return _Weights(
        w.to(factor),
        b.to(factor) if b is not None else None,
        ordered,
        rows(beta),
        w_out.to(factor),
        b_out.to(factor) if b_out is not None else None,
        cos,
        sin,
        interleaved,
    )


def _project(part: Chunks, c: slice, x: Tensor, p: _Weights, rooms: Rooms) -> Tensor:
    """x W + b of a chunk (b, c, 2e + S)."""
    rows = part.view(x, c).to(part.factor)
    flat = rows.reshape(-1, rows.shape[-1])
    room = rooms.of("x W + b", (flat.shape[0], p.w.shape[0]), flat)
    h = torch.mm(flat, p.w.T, out=room) if p.b is None else torch.addmm(p.b, flat, p.w.T, out=room)
    return h.view(*rows.shape[:2], -1)


def _activated(h: Tensor, p: _Weights, rooms: Rooms, gate: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and z = silu(h), z in the type that sums are kept in; without `gate` u is left out, as 0 columns."""
    widths = p.widths if gate else (0, *p.widths[1:])
    h = h[..., -sum(widths) :]
    active = torch.ops.aten.silu.out(h, out=rooms.like("[u, v, z]", h))
    u, v, z = active.split(widths, -1)
    return u, v, z.to(p.gamma.dtype)


def _state(part: Chunks, p: _Weights) -> Tensor:
    rows = part.seq.batch.stop - part.seq.batch.start
    return p.gamma.new_zeros(rows, p.gamma.shape[-1], p.w_out.shape[1])


def _add_outer(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b over the rows of (b, c, .) tensors."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    add_product(total, a.T, b)

"""Softmax attention by blocks of queries and keys, after FlashAttention (Dao et al. 2022, algorithms 1 and 4).

No matrix of all queries by all keys exists in either pass: memory is linear in length. On a CPU the plain case
runs on PyTorch's own fused kernel, which computes the same function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import AttentionOptions, AttentionResults, Gating, Layout, takes_fields
from ..pytorch import cpu_attention, cpu_attention_backward
from .common import (
    Sequence,
    Workspace,
    accumulator,
    factor_dtype,
    power_of_two_below,
    sequences,
    toeplitz_block,
    toeplitz_sums,
    values_dtype,
)
from .glu import activated, gate_gradient, gated, gated_backward, pieces, sigmoid_gated_backward
from .sizes import SIZES


@takes_fields
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
) -> AttentionResults:
    """Output (B, Hq, M, E) and log-sum-exp (B, Hq, M) of every query row."""
    options = options.resolved(q.shape[-1])
    if layout.is_dense and _is_plain(options, q, k, v):
        out, lse = _forward_fused(options, q, k, v)  # out in the layout of q
        if not (q.is_contiguous() and out.is_contiguous()):
            out = _by_tokens(out) if _is_by_tokens(q) else out.contiguous()
        return AttentionResults(out, lse.contiguous())
    out = room_for_output(q, v).zero_()
    lse = q.new_full(q.shape[:3], -math.inf, dtype=accumulator(q.dtype))
    for part in parts_of(options, q, k, v, layout):
        targets = part.rows(out), part.rows(lse)
        if _is_plain(options, part.q, part.k, part.v):
            for target, result in zip(targets, _forward_fused(options, part.q, part.k, part.v), strict=True):
                target.copy_(result)
        else:
            _forward_blocked(part, *targets)
    return AttentionResults(out, lse)


@takes_fields
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: AttentionResults,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, rel_bias (B, Hq, 2P-1) and sinks (Hq,); None where there is no such input."""
    options, rel_bias, sinks = options.resolved(q.shape[-1]), options.rel_bias, options.sinks
    if layout.is_dense and dlse is None and _is_plain(options, q, k, v):
        dq, dk, dv = _backward_fused(options, q, k, v, dout, *results)
        return _by_tokens(dq), _by_tokens(dk), _by_tokens(dv), None, None
    acc = accumulator(q.dtype)
    dq, dk, dv = (room_by_tokens(x, x.shape[-1]).zero_() for x in (q, k, v))
    dbias, dsinks = (None if x is None else torch.zeros(x.shape, dtype=acc, device=q.device) for x in (rel_bias, sinks))
    for part in parts_of(options, q, k, v, layout):
        rows = part.rows(dout), part.rows(results[0]), part.rows(results[1])
        into = _Gradients(part.rows(dq), part.keys(dk), part.keys(dv), part.batch(dbias), dsinks)
        if dlse is None and _is_plain(options, part.q, part.k, part.v):
            for target, grad in zip(into[:3], _backward_fused(options, part.q, part.k, part.v, *rows), strict=True):
                target.copy_(grad)
        else:
            _backward_blocked(part, *rows, None if dlse is None else part.rows(dlse), into)
    return (
        dq,
        dk,
        dv,
        dbias.to(rel_bias.dtype) if dbias is not None and rel_bias is not None else None,
        dsinks.to(sinks.dtype) if dsinks is not None and sinks is not None else None,
    )


def keeps_activated(gate: Tensor, width: int, activation: str) -> bool:
    """Whether the forward keeps act(gate) for the backward: of a small tensor, where the derivative is one of it."""
    return (
        activation == "sigmoid"
        and gate.device.type == "cpu"
        and gate.dtype != torch.float16  # which is computed in fp32
        and gate.shape[-1] == width
        and gate.numel() * gate.itemsize <= SIZES.glu_kept_bytes  # `nbytes` cannot be traced
    )


@takes_fields
def gated_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gating: Gating,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """act(gate) * O, the log-sum-exp of the scores and, if `save`, O, else the first is written over it; and act(gate),
    if it is kept."""
    gate, activation = gating
    resolved = options.resolved(q.shape[-1])
    if layout.is_dense and _is_widened_whole(q) and _is_plain(resolved, q, k, v):
        out, lse = room_for_output(q, v), _room_for_lse(q)
        kept = room_for_output(q, v) if save else None
        for batch, rows, keys in _pieces(q, k):
            *inputs, g = _wide(q[batch, rows], k[batch, keys], v[batch, keys], gate[batch, rows])
            product, lse[batch, rows] = _forward_fused(resolved, *inputs)
            if kept is not None:
                kept[batch, rows] = product
            out[batch, rows] = product.mul_(activated(g, activation, g.dtype))
        return out, lse, kept, None
    product, lse = attention_forward(q, k, v, layout, options)
    out = room_for_output(q, v) if save else product
    value = room_for_output(q, v) if save and keeps_activated(gate, v.shape[-1], activation) else None
    if layout.is_dense:
        _gate(product, gate, activation, out, value)
    else:
        if save:
            out.zero_()
        for seq in sequences(q.shape[0], q.shape[2], k.shape[2], layout):  # not what padding holds
            own = seq.batch, slice(None), seq.queries
            _gate(product[own], gate[own], activation, out[own], None if value is None else value[own])
    return out, lse, product if save else None, value


@takes_fields
def gated_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    product: Tensor,
    activated: Tensor | None,
    gating: Gating,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, gate, rel_bias (B, Hq, 2P-1) and sinks (Hq,); None where there is no such input."""
    gate, activation = gating
    dgate = gate.new_empty(gate.shape)
    if layout.is_dense and dlse is None and _is_widened_whole(q) and _is_plain(options.resolved(q.shape[-1]), q, k, v):
        dq, dk, dv = (room_by_tokens(x, x.shape[-1]) for x in (q, k, v))
        for batch, shared, heads in _pieces(q, k):
            d, q_wide, x, g = _wide(*(t[batch, shared] for t in (dout, q, product, gate)))
            inputs = q_wide, *_wide(k[batch, heads], v[batch, heads]), lse[batch, shared], x
            found = gated_attention_backward(d, None, *inputs, None, Gating(g, activation), layout, options)
            dq[batch, shared], dk[batch, heads], dv[batch, heads], dgate[batch, shared] = found[:4]
        return dq, dk, dv, dgate, None, None
    dx = room_for_output(q, v)
    if not layout.is_dense:  # padding
        dx, dgate = dx.zero_(), dgate.zero_()
    workspace = Workspace()
    if activated is not None and activated.shape != product.shape:
        activated = None  # the dispatcher's empty tensor
    factor = gate if activated is None else activated
    for seq in sequences(q.shape[0], q.shape[2], k.shape[2], layout):
        rows = tuple(_cut(t, seq.batch, seq.queries) for t in (dout, factor, product, dgate, dx))
        if gate.shape[-1] < v.shape[-1]:
            _per_head_backward(activation, *rows)
            continue
        for d, f, x, dg, du in pieces(*_as_stored(*rows), size=SIZES.gate_bytes):
            if activated is None:
                gated_backward(d, f, x, activation, "identity", dg, du, workspace)
            else:
                sigmoid_gated_backward(d, f, x, dg, du)
    dq, dk, dv, dbias, dsinks = attention_backward(dx, dlse, q, k, v, AttentionResults(product, lse), layout, options)
    return dq, dk, dv, dgate, dbias, dsinks


def _gate(product: Tensor, gate: Tensor, activation: str, out: Tensor, value: Tensor | None = None) -> None:
    """Write act(gate) * product to `out`, which may be `product`, and act(gate) to `value`."""
    if gate.shape[-1] < product.shape[-1] or gate.nbytes <= SIZES.glu_bytes:  # for which memory need not be thought of
        wide = torch.float32 if gate.dtype == torch.float16 else gate.dtype  # squares may leave the range of fp16
        torch.mul(product, activated(gate, activation, wide, value), out=out)
        return
    workspace = Workspace()
    tensors = (gate, product, out) if value is None else (gate, product, out, value)
    for g, x, o, *kept in pieces(*_as_stored(*tensors), size=SIZES.gate_bytes):
        gated(g, x, activation, "identity", o, workspace, *kept)


def _per_head_backward(activation: str, d: Tensor, gate: Tensor, product: Tensor, dgate: Tensor, dx: Tensor) -> None:
    """Write the gradients of gate (b, Hq, m, 1) and product, from that of act(gate) * product."""
    acc = accumulator(d.dtype)
    d = d.to(acc)
    dgate.copy_(gate_gradient((d * product).sum(-1, keepdim=True), gate, activation))
    dx.copy_(d * activated(gate, activation, acc))


def _as_stored(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(b, Hq, m, E), or (b, m, Hq, E) if the last one is stored so."""
    return tuple(x.transpose(1, 2) for x in tensors) if _is_by_tokens(tensors[-1]) else tensors


class _Gradients(NamedTuple):
    """Where those of a sequence go. The last two are added to, as others of the batch share them."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None


def _is_plain(options: AttentionOptions, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's fused CPU kernel computes this very function."""
    left, right = options.window
    return (
        q.is_cpu
        and cpu_attention is not None
        and left is None
        and (right is None or (right == 0 and q.shape[2] in (1, k.shape[2])))
        and options.factor > 0  # it scales after masking, and -inf must stay so
        and options.softcap is None
        and options.dropout_p == 0
        and options.rel_bias is None
        and options.sinks is None
        and q.shape[3] == v.shape[3]
        and q.numel() > 0
        and k.numel() > 0
    )


def parts_of(options: AttentionOptions, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> list[Part]:
    """The sequences, none if there are no heads."""
    if q.shape[1] == 0:
        return []
    return [Part(seq, options, q, k, v) for seq in sequences(q.shape[0], q.shape[2], k.shape[2], layout)]


class Part:
    """One sequence's views of the tensors: queries (b, Hq, m, D) against keys (b, Hkv, n, D)."""

    seq: Sequence
    options: AttentionOptions
    sinks: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    m: int
    n: int
    groups: int

    def __init__(self, seq: Sequence, options: AttentionOptions, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.seq, self.options, self.sinks = seq, options, options.sinks
        self.q, self.k, self.v = self.rows(q), self.keys(k), self.keys(v)
        self.bias = self.batch(options.rel_bias)
        self.m, self.n = seq.sizes
        self.groups = q.shape[1] // k.shape[1]

    def rows(self, x: Tensor) -> Tensor:
        """Its queries' part of x (B, Hq, M, ...)."""
        return _cut(x, self.seq.batch, self.seq.queries)

    def keys(self, x: Tensor) -> Tensor:
        """Its keys' part of x (B, Hkv, N, ...)."""
        return _cut(x, self.seq.batch, self.seq.keys)

    def batch(self, x: Tensor | None) -> Tensor | None:
        """Its rows of the batch, of x (B, ...)."""
        return None if x is None else x[self.seq.batch]

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Blocks of queries, each with the blocks of keys that any of its rows sees."""
        heads = max(1, self.q.shape[0] * self.q.shape[1])
        side = power_of_two_below(math.sqrt(SIZES.attention_scores / heads), 32, 512)
        for i0 in range(0, self.m, side):
            i1 = min(i0 + side, self.m)
            lo, hi = self.visible(i0)[0], self.visible(i1 - 1)[1]
            starts = range(lo // side * side, hi, side)
            yield slice(i0, i1), [slice(j, min(j + side, hi)) for j in starts]

    def visible(self, i: int) -> tuple[int, int]:
        """The interval [lo, hi) of keys that query i sees."""
        left, right = self.options.window
        position = i + self.n - self.m
        lo = 0 if left is None else max(0, position - left)
        hi = self.n if right is None else max(0, min(self.n, position + right + 1))
        return lo, hi

    def scores(self, q_blk: Tensor, i: slice, j: slice) -> tuple[Tensor, Tensor | None]:
        """Masked scores (b, Hq, bm, bn) of a block, and where there is a softcap their tanh, before the bias."""
        b, _, bm, _ = q_blk.shape
        k_blk = self.k[:, :, j].to(q_blk.dtype)
        s = (self.fold(q_blk) @ k_blk.mT).view(b, -1, bm, j.stop - j.start).mul_(self.options.factor)
        t = None
        if self.options.softcap is not None:
            t = torch.tanh_(s.div_(self.options.softcap))
            s = t * self.options.softcap
        if self.bias is not None:
            s = s + toeplitz_block(self.bias, self.bias_start(i, j), bm, j.stop - j.start)
        first, last = self.visible(i.start), self.visible(i.stop - 1)
        if last[0] > j.start or first[1] < j.stop:  # some row of the block does not see all its keys
            rows = torch.arange(i.start, i.stop, device=s.device)[:, None] + (self.n - self.m)
            distance = torch.arange(j.start, j.stop, device=s.device) - rows
            left, right = self.options.window
            hidden = torch.zeros_like(distance, dtype=torch.bool)
            if left is not None:
                hidden |= distance < -left
            if right is not None:
                hidden |= distance > right
            s = s.masked_fill_(hidden, -math.inf)
        return s, t

    def bias_start(self, i: slice, j: slice) -> int:
        """Index into the bias vector of the block's first entry: P-1 + (j - p)."""
        assert self.bias is not None
        return self.bias.shape[-1] // 2 + j.start - (i.start + self.n - self.m)

    def fold(self, x: Tensor) -> Tensor:
        """(b, Hq, bm, .) -> (b, Hkv, groups * bm, .): the queries that share keys stand under each other."""
        return x.reshape(x.shape[0], -1, self.groups * x.shape[2], x.shape[3])

    def kept(self, i: slice, j: slice) -> Tensor | None:
        """Dropout's factor for a block: 1/(1-p) where an element is kept, 0 elsewhere."""
        p, seed = self.options.dropout_p, self.options.dropout_seed
        if p == 0 or seed is None:
            return None
        b, heads = self.q.shape[:2]
        device = self.q.device
        first = self.seq.index
        key_groups = torch.arange(j.start // 4, (j.stop + 3) // 4, device=device)
        rows = torch.arange(i.start, i.stop, device=device)[:, None]
        head = torch.arange(heads, device=device)[:, None, None]
        batch = torch.arange(first, first + b, device=device)[:, None, None, None]
        words = torch.stack(philox_4x32_10((key_groups, rows, head, batch), seed.to(device)), dim=-1).flatten(-2)
        offset = j.start % 4
        words = words[..., offset : offset + j.stop - j.start]
        factor = 0.0 if p == 1 else 1 / (1 - p)
        return (words >= int(p * 2**32)).to(accumulator(self.q.dtype)) * factor


def _forward_blocked(part: Part, out: Tensor, lse: Tensor) -> None:
    b, heads, _m, _ = part.q.shape
    acc, factor = lse.dtype, values_dtype(part.v)
    for i, key_blocks in part.blocks():
        q_blk = part.q[:, :, i].to(acc)
        bm = i.stop - i.start
        row_max = q_blk.new_full((b, heads, bm), -math.inf)
        if part.sinks is not None:
            row_max = row_max.maximum(part.sinks.to(acc)[:, None])
        # The sink is one more key with value zero: it enters the sum with its own maximum, e^0.
        row_sum = torch.full_like(row_max, 0.0 if part.sinks is None else 1.0)
        if part.sinks is not None:
            row_sum = torch.where(row_max == -math.inf, 0.0, row_sum)
        weighted = q_blk.new_zeros(b, heads, bm, out.shape[-1])
        for j in key_blocks:
            s, _ = part.scores(q_blk, i, j)
            new = torch.maximum(row_max, s.amax(-1))
            pivot = torch.where(new == -math.inf, 0.0, new)  # a row that has seen nothing yet
            p = s.sub_(pivot[..., None]).exp_()
            alpha = torch.exp(row_max - pivot)
            row_sum = row_sum * alpha + p.sum(-1)
            kept = part.kept(i, j)
            if kept is not None:
                p = p * kept
            v_blk = part.v[:, :, j].to(factor)
            weighted = weighted.mul_(alpha[..., None]) + (part.fold(p).to(factor) @ v_blk).view_as(weighted)
            row_max = new
        out[:, :, i] = (weighted / torch.where(row_sum == 0, 1.0, row_sum)[..., None]).to(out.dtype)
        lse[:, :, i] = row_max + row_sum.log()


def _backward_blocked(
    part: Part, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, into: _Gradients
) -> None:
    acc, factor = lse.dtype, values_dtype(part.v)
    dk_sum, dv_sum = torch.zeros_like(into.k, dtype=acc), torch.zeros_like(into.v, dtype=acc)
    for i, key_blocks in part.blocks():
        q_blk, do_blk, lse_blk = part.q[:, :, i].to(acc), dout[:, :, i].to(acc), lse[:, :, i]
        q_factor, do_factor = part.fold(q_blk).to(factor), part.fold(do_blk).to(factor)
        # A row that sees nothing has LSE -inf; with +inf in its place every probability below is exp(-inf) = 0.
        lse_blk = torch.where(lse_blk == -math.inf, math.inf, lse_blk)

        def terms(
            j: slice, i: slice = i, q_blk: Tensor = q_blk, d: Tensor = do_factor, lse_blk: Tensor = lse_blk
        ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
            """P and dP of a block, dropout's factor and the softcap's slope."""
            s, t = part.scores(q_blk, i, j)
            slope = None if t is None else 1 - t * t
            p = s.sub_(lse_blk[..., None]).exp_()
            dp = (d @ part.v[:, :, j].to(factor).mT).to(acc).view_as(p)
            kept = part.kept(i, j)
            return p, dp if kept is None else dp * kept, kept, slope

        if out.dtype == acc and len(key_blocks) > 1:
            delta = (do_blk * out[:, :, i]).sum(-1)
        else:  # where dP - delta cancels the rounding of O stays: sum P dP itself if O is in half precision, or cheaply
            delta = torch.zeros_like(lse_blk)
            for j in key_blocks:
                p, dp, _, _ = terms(j)
                delta += (p * dp).sum(-1)
        if dlse is not None:
            delta = delta - torch.where(lse_blk == math.inf, 0.0, dlse[:, :, i].to(acc))
        if part.sinks is not None and into.sinks is not None:
            into.sinks.sub_((torch.exp(part.sinks.to(acc)[:, None] - lse_blk) * delta).sum((0, 2)))
        dq_blk = torch.zeros_like(part.fold(q_blk))
        for j in key_blocks:
            p, dp, kept, slope = terms(j)
            dv_sum[:, :, j] += part.fold(p if kept is None else p * kept).to(factor).mT @ do_factor
            ds = dp.sub_(delta[..., None]).mul_(p)
            if into.bias is not None:
                start = part.bias_start(i, j) - (ds.shape[-2] - 1)
                sums = toeplitz_sums(ds)
                into.bias[..., start : start + sums.shape[-1]] += sums
            if slope is not None:
                ds = ds * slope
            ds = part.fold(ds.mul_(part.options.factor)).to(factor)
            dq_blk += ds @ part.k[:, :, j].to(factor)
            dk_sum[:, :, j] += ds.mT @ q_factor
        into.q[:, :, i] = dq_blk.view_as(q_blk).to(into.q.dtype)
    into.k.copy_(dk_sum)
    into.v.copy_(dv_sum)


def _forward_fused(options: AttentionOptions, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    masked = _must_mask(options, q)
    if not _is_widened_whole(q):
        return cpu_attention(*_fused_inputs(q, k, v), 0.0, masked, scale=options.factor)
    out, lse = room_for_output(q, v), _room_for_lse(q)
    for batch, rows, keys in _pieces(q, k):
        wide = _wide(q[batch, rows], k[batch, keys], v[batch, keys])
        results = cpu_attention(*_fused_inputs(*wide), 0.0, masked, scale=options.factor)
        out[batch, rows], lse[batch, rows] = results
    return out, lse


def _is_widened(q: Tensor) -> bool:
    """Whether the processor multiplies fp32 faster than such numbers."""
    return factor_dtype(q) != q.dtype


def _is_widened_whole(q: Tensor) -> bool:
    """Whether the forward, too, goes through PyTorch's kernel as fp32: that takes bf16 at the speed of fp32 on every
    processor, and fp16 at half of it where no instruction multiplies that. Elementwise steps in fp16 are wide as well.
    """
    return q.dtype == torch.float16 and _is_widened(q)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(accumulator(x.dtype)) for x in tensors]


def _backward_fused(
    options: AttentionOptions, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's kernel adds up all three gradients in the dtype of its inputs, block of scores by block of scores. So
    half inputs go through it as fp32, or a few blocks at a time where the processor multiplies halves faster and there
    are enough rows: each of its many small products in halves takes as long as one several times as large."""
    masked = _must_mask(options, q)
    if q.dtype == accumulator(q.dtype):
        return _fused_gradients(options, masked, q, k, v, dout, out, lse)
    wide = _is_widened(q) or max(q.shape[2], k.shape[2]) <= SIZES.attention_short
    dq, dk, dv = (room_by_tokens(x, x.shape[-1]) for x in (q, k, v))
    for batch, shared, heads in _pieces(q, k):
        targets = dq[batch, shared], dk[batch, heads], dv[batch, heads]
        rows, keys = [x[batch, shared] for x in (q, dout, out, lse)], [x[batch, heads] for x in (k, v)]
        if wide:
            q_wide, *others = _wide(*rows)
            grads = _fused_gradients(options, masked, q_wide, *_wide(*keys), *others)
        else:
            grads = _gradients_by_tiles(options, masked, rows, keys)
        for target, grad in zip(targets, grads, strict=True):
            target.copy_(grad)
    return dq, dk, dv


def _pieces(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Batch rows, heads of q and those of k, a few at a time: what is made of them in fp32 then takes little memory.
    Enough for every thread, as the kernel gives each of them whole heads."""
    batch, heads, *_ = k.shape
    groups = q.shape[1] // heads
    size = (q.numel() + k.numel()) // (batch * heads)
    count = max(SIZES.attention_widened // size, -(-2 * torch.get_num_threads() // groups))
    rows, step = max(1, count // heads), min(count, heads)
    for b, h in product(range(0, batch, rows), range(0, heads, step)):
        end = min(h + step, heads)
        yield slice(b, min(b + rows, batch)), slice(h * groups, end * groups), slice(h, end)


def _gradients_by_tiles(
    options: AttentionOptions, masked: bool, rows: list[Tensor], keys: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, dout, out, lse and of k, v: a few of the kernel's blocks at a time, and the sums over those in fp32.

    Each tile is exact without the others, as the log-sum-exp and delta are those of whole rows.
    """
    (q, *others), (k, _) = rows, keys
    of_rows, of_keys = list(_cuts(q.shape[2])), list(_cuts(k.shape[2]))
    if len(of_rows) == len(of_keys) == 1:
        return _fused_gradients(options, masked, q, *keys, *others)
    acc = accumulator(q.dtype)  # for what is a sum of several
    dq = torch.zeros(q.shape, dtype=acc if len(of_keys) > 1 else q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=acc if len(of_rows) > 1 else x.dtype, device=x.device) for x in keys)
    for i, j in product(of_rows, of_keys):
        if masked and j.start > i.start:
            continue
        q_tile, *others = (x[:, :, i] for x in rows)
        grads = _fused_gradients(options, masked and i == j, q_tile, *(x[:, :, j] for x in keys), *others)
        for total, grad in zip((dq[:, :, i], dk[:, :, j], dv[:, :, j]), grads, strict=True):
            total += grad
    return dq, dk, dv


def _cuts(size: int) -> Iterator[slice]:
    """Parts of a tile; the last has three to seven quarters of it, as the kernel takes small blocks of fewer rows."""
    tile = SIZES.attention_tile
    count = 1 + max(0, size - 3 * tile // 4) // tile if size else 0
    for part in range(count):
        yield slice(part * tile, size if part == count - 1 else (part + 1) * tile)


def _fused_gradients(
    options: AttentionOptions, masked: bool, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One call of the kernel; dk and dv of heads that share keys are added up in fp32."""
    operands = _last_contiguous(dout), *_fused_inputs(q, k, v), out, lse
    dq, dk, dv = cpu_attention_backward(*operands, 0.0, masked, scale=options.factor)
    if k.shape[1] != q.shape[1]:
        acc = accumulator(q.dtype)
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2, dtype=acc) for x in (dk, dv))
    return dq, dk, dv


def _must_mask(options: AttentionOptions, q: Tensor) -> bool:
    return options.window[1] == 0 and q.shape[2] > 1  # one query at the end of the keys sees them all


def _cut(x: Tensor, batch: slice, tokens: slice) -> Tensor:
    """x[batch, :, tokens]; x itself where that is all of it, as a view takes longer than to see that none is needed."""
    is_all = batch == slice(0, x.shape[0]) and tokens == slice(0, x.shape[2])
    return x if is_all else x[batch, :, tokens]


def room_for_output(q: Tensor, v: Tensor) -> Tensor:
    """Unwritten memory (B, Hq, M, E), stored as (B, M, Hq, E) if q is: joining the heads afterwards is then a view."""
    width = v.shape[-1]
    return room_by_tokens(q, width) if _is_by_tokens(q) else q.new_empty(*q.shape[:3], width)


def _room_for_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def room_by_tokens(x: Tensor, width: int) -> Tensor:
    """Unwritten memory for as many heads and tokens as x (B, H, N, D), as PyTorch's kernel stores gradients."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], width).transpose(1, 2)


def _is_by_tokens(x: Tensor) -> bool:
    """Whether x (B, H, N, D) is stored as (B, N, H, D)."""
    return x.transpose(1, 2).is_contiguous()


def _by_tokens(x: Tensor) -> Tensor:
    """x, copied unless it is stored as (B, N, H, D)."""
    stored = x.transpose(1, 2)
    return x if stored.is_contiguous() else stored.contiguous().transpose(1, 2)


def _fused_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return q, k, v


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_MASK = 0xFFFFFFFF


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 (Salmon et al. 2011) on 32-bit words held in int64 tensors, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # Products wrap modulo 2^64, which leaves all 64 bits of the product of two 32-bit words right.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3

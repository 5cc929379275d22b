"""What the attentions are differentiated by forward and twice: a tangent of the results, and second derivatives.

NAME_jvp gives J t, the change of the results along tangents t of the inputs; NAME_second the gradient of the number
<g, J t> with respect to the inputs, for gradients g of the results. Both go through the blocks or panels of scores that
the forward goes through: memory is linear in length.

Softmax attention, row by row, with P = softmax(S), D dropout's factor, dP = D (g v^T), tdP = D (g tv^T) and
delta = sum P dP, gamma the gradient of the log-sum-exp:

    mu = sum P tS (its tangent)     tP = P (tS - mu)     tO = (D tP) v + (D P) tv
    <g, tO> + gamma mu = sum P [tS (dP - delta + gamma) + tdP], so that by tS it changes by
        W = P (dP - delta + gamma), and by S by
        P [(tS - mu) (dP - delta + gamma) + tdP - kappa],    kappa = g tO, by v by (D tP)^T g

With S = f(scale q k^T) + bias and tS = f' scale (tq k^T + q tk^T) + tbias the rest is the chain rule. Weights that are
a function A = w(S) of each score alone have tA = w' tS in tP's place, w' dA in W's, and by S w'' tS dA + w' tdA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..options import (
    AttentionAlong,
    AttentionOptions,
    AttentionResults,
    AttentionTangents,
    GatedOptions,
    GatedTangents,
    Layout,
    takes_fields,
)
from .attention import Part, parts_of, room_by_tokens, room_for_output
from .common import (
    Sequence,
    accumulator,
    score_bend,
    score_slope,
    sequences,
    toeplitz_block,
    toeplitz_sums,
    values_dtype,
)
from .gau import Part as Panels
from .gau import keys_seen, times_transposed

# ---------------------------------------------------------------- softmax attention


@takes_fields
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: AttentionResults,
    tangents: AttentionTangents = AttentionTangents(),
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
) -> AttentionAlong:
    """The tangents of the output (B, Hq, M, E) and of the log-sum-exp (B, Hq, M)."""
    options = options.resolved(q.shape[-1])
    tout, tlse = room_for_output(q, v).zero_(), torch.zeros_like(results.lse)
    for part in parts_of(options, q, k, v, layout):
        moving = _Moving(part, tangents)
        for i, key_blocks in part.blocks():
            rows = _Rows(moving, i, results)
            total, level = rows.start()
            rest = torch.zeros_like(level)
            along, plain = (rows.q.new_zeros(*rows.lse.shape, v.shape[-1]) for _ in range(2))
            for j in key_blocks:
                p, ts, _, _ = rows.scores(j)
                # About the mean so far: of sums about zero that are mu O apart only their rounding would be left.
                more = p.sum(-1)
                ahead, before = (p * ts).sum(-1) - level * more, total
                total = total + more
                step = ahead / above_zero(total)
                level = level + step
                along -= plain * step[..., None]
                change = p * ts.sub_(level[..., None])
                rest += change.sum(-1) - step * before
                kept = part.kept(i, j)
                if kept is not None:
                    p, change = p * kept, change * kept
                along += moving.times(change, part.v, j)
                plain += moving.times(p, part.v, j)
                if moving.tv is not None:
                    along += moving.times(p, moving.tv, j)
            # 1, but for the exponentials of PyTorch's kernel, which in half precision are good for 20 bits.
            total = above_zero(total)
            rest /= total
            along = along.sub_(plain.mul_(rest[..., None])).div_(total[..., None])
            part.rows(tout)[:, :, i] = along.to(tout.dtype)
            part.rows(tlse)[:, :, i] = level + rest
    return AttentionAlong(tout, tlse)


@takes_fields
def attention_second(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: AttentionResults,
    along: AttentionAlong,
    tangents: AttentionTangents = AttentionTangents(),
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of <dout, tout> + <dlse, tlse> by q, k, v, rel_bias (B, Hq, 2P-1) and sinks (Hq,)."""
    options, acc = options.resolved(q.shape[-1]), accumulator(q.dtype)
    dq, dk, dv = (room_by_tokens(x, x.shape[-1]).zero_() for x in (q, k, v))
    dbias, dsinks = (
        None if x is None else torch.zeros(x.shape, dtype=acc, device=q.device)
        for x in (options.rel_bias, options.sinks)
    )
    for part in parts_of(options, q, k, v, layout):
        moving = _Moving(part, tangents)
        dk_sum, dv_sum = (torch.zeros_like(part.keys(x), dtype=acc) for x in (dk, dv))
        for i, key_blocks in part.blocks():
            rows = _Rows(moving, i, results)
            g, mu = part.rows(dout)[:, :, i].to(acc), part.rows(along.tlse)[:, :, i].to(acc)
            g_factor = part.fold(g).to(moving.factor)
            gamma = torch.zeros_like(mu) if dlse is None else part.rows(dlse)[:, :, i].to(acc)

            # Where these cancel the rounding of O stays, so they are sums of what they cancel against.
            delta, kappa, total = (torch.zeros_like(mu) for _ in range(3))
            for j in key_blocks:
                p, ts, dp, tdp, _ = rows.terms(j, g_factor, mu)
                total += p.sum(-1)
                delta += (p * dp).sum(-1)
                kappa += (p * (ts * dp + tdp)).sum(-1)
            inverse = rows.normalise(total)
            level, kappa = delta * inverse - gamma, kappa * inverse
            if moving.sinks is not None and dsinks is not None:
                of_sink = -mu if moving.tsinks is None else moving.tsinks[:, None] - mu
                dsinks -= (rows.sink() * (of_sink * level + kappa)).sum((0, 2))
            dq_rows = torch.zeros_like(part.fold(rows.q))
            for j in key_blocks:
                p, ts, dp, tdp, (kept, slope, bend) = rows.terms(j, g_factor, mu)
                tp = p * ts
                dv_sum[:, :, j] += part.fold(tp if kept is None else tp * kept).to(moving.factor).mT @ g_factor
                w = dp.sub_(level[..., None])
                ds = ts.mul_(w).add_(tdp).sub_(kappa[..., None]).mul_(p)
                w = w.mul_(p)
                if dbias is not None:
                    start = part.bias_start(i, j) - (ds.shape[-2] - 1)
                    sums = toeplitz_sums(ds)
                    part.batch(dbias)[..., start : start + sums.shape[-1]] += sums  # type: ignore[index]
                if slope is not None and bend is not None:
                    ds, w = ds * slope + w * bend, w * slope
                ds, w = (part.fold(x.mul_(options.factor)).to(moving.factor) for x in (ds, w))
                dq_rows += ds @ part.k[:, :, j].to(moving.factor)
                dk_sum[:, :, j] += ds.mT @ part.fold(rows.q).to(moving.factor)
                if moving.tk is not None:
                    dq_rows += w @ moving.tk[:, :, j].to(moving.factor)
                if rows.tq is not None:
                    dk_sum[:, :, j] += w.mT @ part.fold(rows.tq).to(moving.factor)
            part.rows(dq)[:, :, i] = dq_rows.view_as(rows.q).to(dq.dtype)
        part.keys(dk).copy_(dk_sum)
        part.keys(dv).copy_(dv_sum)
    return (
        dq,
        dk,
        dv,
        None if dbias is None or options.rel_bias is None else dbias.to(options.rel_bias.dtype),
        None if dsinks is None or options.sinks is None else dsinks.to(options.sinks.dtype),
    )


def above_zero(total: Tensor) -> Tensor:
    """Sums of P to divide by: 1 of rows that see nothing."""
    return torch.where(total == 0, 1.0, total)


class _Moving:
    """One sequence's views of the tangents."""

    def __init__(self, part: Part, tangents: AttentionTangents) -> None:
        tq, tk, tv, tbias, tsinks = tangents
        self.part, self.acc, self.factor = part, accumulator(part.q.dtype), values_dtype(part.v)
        self.tq = None if tq is None else part.rows(tq)
        self.tk, self.tv = (None if x is None else part.keys(x) for x in (tk, tv))
        self.tbias = part.batch(tbias)
        self.sinks, self.tsinks = (None if x is None else x.to(self.acc) for x in (part.sinks, tsinks))

    def times(self, p: Tensor, v: Tensor, j: slice) -> Tensor:
        """p v of a block of keys, for each query head."""
        b, heads, rows, _ = p.shape
        return (self.part.fold(p).to(self.factor) @ v[:, :, j].to(self.factor)).view(b, heads, rows, -1)

    def times_transposed(self, g: Tensor, v: Tensor, j: slice) -> Tensor:
        """g v^T, of folded rows."""
        return (g @ v[:, :, j].to(self.factor).mT).to(self.acc)


class _Rows:
    """A block of queries of a sequence, and their tangents."""

    def __init__(self, moving: _Moving, i: slice, results: AttentionResults) -> None:
        self.moving, self.part, self.i = moving, moving.part, i
        self.q = self.part.q[:, :, i].to(moving.acc)
        self.tq = None if moving.tq is None else moving.tq[:, :, i].to(moving.acc)
        lse = self.part.rows(results.lse)[:, :, i]
        self.lse = torch.where(lse == -math.inf, math.inf, lse)  # of a row that sees nothing: P is 0
        self.inverse: Tensor | None = None

    def start(self) -> tuple[Tensor, Tensor]:
        """What a sink gives to the sum of P (b, Hq, bm), and to the mean of tS."""
        total, level = torch.zeros_like(self.lse), torch.zeros_like(self.lse)
        if self.moving.sinks is not None:
            total += self.sink()
        if self.moving.tsinks is not None:
            level += self.moving.tsinks[:, None]
        return total, level

    def normalise(self, total: Tensor) -> Tensor:
        """From now on divide P by its sum: over keys `total`, and what a sink adds. The rounding of an LSE moves all of
        a row alike, which the differences of second derivatives would not survive. Returns 1 / sum."""
        if self.moving.sinks is not None:
            total = total + self.sink()
        self.inverse = 1 / above_zero(total)
        return self.inverse

    def sink(self) -> Tensor:
        """The probability of the sink (b, Hq, bm)."""
        assert self.moving.sinks is not None
        p = torch.exp(self.moving.sinks[:, None] - self.lse)
        return p if self.inverse is None else p.mul_(self.inverse)

    def terms(
        self, j: slice, g: Tensor, mu: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
        """P, tS - mu, dP, tdP of a block; dropout's factor, the softcap's slope and its slope's change."""
        moving, kept = self.moving, self.part.kept(self.i, j)
        p, ts, slope, bend = self.scores(j)
        dp = moving.times_transposed(g, self.part.v, j).view_as(p)
        tdp = torch.zeros_like(p) if moving.tv is None else moving.times_transposed(g, moving.tv, j).view_as(p)
        if kept is not None:
            dp, tdp = dp * kept, tdp * kept
        return p, ts - mu[..., None], dp, tdp, (kept, slope, bend)

    def scores(self, j: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """P and tS of a block (b, Hq, bm, bn); with a softcap f its slope f', and f'' times the change of q k^T."""
        part, moving = self.part, self.moving
        s, t = part.scores(self.q, self.i, j)
        p = s.sub_(self.lse[..., None]).exp_()
        if self.inverse is not None:
            p *= self.inverse[..., None]
        ts = torch.zeros_like(p)
        if self.tq is not None:
            ts += (part.fold(self.tq) @ part.k[:, :, j].to(self.q.dtype).mT).view_as(p)
        if moving.tk is not None:
            ts += (part.fold(self.q) @ moving.tk[:, :, j].to(self.q.dtype).mT).view_as(p)
        ts *= part.options.factor
        slope = bend = None
        if t is not None and part.options.softcap is not None:  # f = c tanh(x / c): f'' = -2 f' tanh(x / c) / c
            slope = 1 - t * t
            ts = ts * slope
            bend = ts * t * (-2 / part.options.softcap)
        if moving.tbias is not None:
            ts = ts + toeplitz_block(moving.tbias, part.bias_start(self.i, j), *p.shape[-2:])
        return p, ts, slope, bend


# ---------------------------------------------------------------- quadratic gated attention, without a gate


@takes_fields
def gau_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: GatedTangents = GatedTangents(),
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
) -> Tensor:
    """The tangent of the output (B, M, E)."""
    tout = q.new_zeros(*q.shape[:2], v.shape[-1])
    for seq in sequences(q.shape[0], q.shape[1], k.shape[1], layout):
        panels = _MovingPanels(seq, options, q, k, v, tangents)
        for i in panels.part.panels():
            _, a, ta, _, _ = panels.weights(i)
            change = panels.part.times_values(ta)
            if panels.tv is not None:
                change = change + a.to(panels.part.factor) @ keys_seen(panels.tv, a.shape[-1])
            tout[seq.batch, panels.part.absolute(i)] = change.to(tout.dtype)
    return tout


@takes_fields
def gau_attention_second(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: GatedTangents = GatedTangents(),
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of <dout, tout> by q, k, v and rel_bias (B, 2P-1)."""
    acc, rel_bias = accumulator(q.dtype), options.rel_bias
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    dbias = None if rel_bias is None else torch.zeros(rel_bias.shape, dtype=acc, device=q.device)
    for seq in sequences(q.shape[0], q.shape[1], k.shape[1], layout):
        panels = _MovingPanels(seq, options, q, k, v, tangents)
        part = panels.part
        dk_sum, dv_sum = torch.zeros_like(part.k), torch.zeros_like(part.v, dtype=acc)
        for i in part.panels():
            rows = part.absolute(i)
            dx = dout[seq.batch, rows].to(part.factor)
            s, a, ta, ts, scale = panels.weights(i)
            seen = a.shape[-1]
            da = times_transposed(dx, keys_seen(part.v, seen)).to(acc)
            tda = 0 if panels.tv is None else times_transposed(dx, keys_seen(panels.tv, seen)).to(acc)
            keys_seen(dv_sum, seen).add_(ta.to(part.factor).mT @ dx)
            w, ds = panels.gradients(s, a, ts, da, tda)
            if dbias is not None:
                start = part.bias_start(i) - (ds.shape[-2] - 1)
                sums = toeplitz_sums(ds)
                dbias[seq.batch, start : start + sums.shape[-1]] += sums
            w, ds = w * scale, ds * scale
            dq_rows = ds @ keys_seen(part.k, seen)
            keys_seen(dk_sum, seen).add_(ds.mT @ part.q[:, i])
            if panels.tk is not None:
                dq_rows += w @ keys_seen(panels.tk, seen)
            if panels.tq is not None:
                keys_seen(dk_sum, seen).add_(w.mT @ panels.tq[:, i])
            dq[seq.batch, rows] = dq_rows.to(dq.dtype)
        dk[seq.batch, seq.keys] = dk_sum.to(dk.dtype)
        dv[seq.batch, seq.keys] = dv_sum.to(dv.dtype)
    return dq, dk, dv, None if dbias is None or rel_bias is None else dbias.to(rel_bias.dtype)


class _MovingPanels:
    """One sequence, and its tangents in the types that sums and factors have."""

    def __init__(
        self, seq: Sequence, options: GatedOptions, q: Tensor, k: Tensor, v: Tensor, tangents: GatedTangents
    ) -> None:
        self.part = part = Panels(seq, options, q, k, v)
        self.softmax = options.score.startswith("softmax")
        tq, tk, tv, tbias = tangents
        self.tq = None if tq is None else tq[seq.batch, seq.queries].to(part.acc)
        self.tk = None if tk is None else tk[seq.batch, seq.keys].to(part.acc)
        self.tv = None if tv is None else tv[seq.batch, seq.keys].to(part.factor)
        self.tbias = None if tbias is None else tbias[seq.batch].to(part.acc)

    def weights(self, i: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | float]:
        """S, A, tA and tS of a panel (b, rows, keys seen), of softmax tS - mu; and the scale of its q k^T."""
        part = self.part
        s, a, scale = part.probs(i)
        seen = a.shape[-1]
        ts = torch.zeros_like(a)
        if self.tq is not None:
            ts += times_transposed(self.tq[:, i], keys_seen(part.k, seen))
        if self.tk is not None:
            ts += times_transposed(part.q[:, i], keys_seen(self.tk, seen))
        ts *= scale
        if self.tbias is not None:
            ts += toeplitz_block(self.tbias, part.bias_start(i), *a.shape[-2:])
        if self.softmax:
            ts -= (a * ts).sum(-1, keepdim=True)
            return s, a, a * ts, ts, scale
        return s, a, score_slope(part.score, s) * ts, ts, scale

    def gradients(self, s: Tensor, a: Tensor, ts: Tensor, da: Tensor, tda: Tensor | float) -> tuple[Tensor, Tensor]:
        """Those of <dA, tA> + <tdA, A> by tS and by S."""
        if not self.softmax:
            slope = score_slope(self.part.score, s)
            return slope * da, score_bend(self.part.score, s) * ts * da + slope * tda
        da = da - (a * da).sum(-1, keepdim=True)
        product = ts * da + tda
        return a * da, a * (product - (a * product).sum(-1, keepdim=True))

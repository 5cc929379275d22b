"""Quadratic gated attention (Hua et al. 2022) by panels of queries: O = act(gate) * (A v), memory linear in length.

A panel holds the scores of a few queries against all the keys they see, so that softmax scores need no running
maximum and every product with the wide values is one large matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import GatedOptions, Layout, takes_fields
from .common import (
    Sequence,
    Workspace,
    accumulator,
    add_product,
    power_of_two_below,
    score_slope,
    sequences,
    toeplitz_block,
    toeplitz_sums,
    values_dtype,
)
from .common import score as elementwise_score
from .glu import activated, gate_gradient
from .sizes import SIZES


@takes_fields
def gau_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
    save: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output (B, M, E) and, when the backward will want it (`save` and a gate), the ungated product A v."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    product = torch.zeros_like(out) if save and gate is not None else None
    for seq in sequences(q.shape[0], q.shape[1], k.shape[1], layout):
        part = Part(seq, options, q, k, v)
        for i in part.panels():
            _, probs, _ = part.probs(i)
            x = part.times_values(probs)
            rows = part.absolute(i)
            if product is not None:
                product[seq.batch, rows] = x.to(out.dtype)
            if gate is not None:
                x = x * activated(gate[seq.batch, rows], options.gate_activation, x.dtype)
            out[seq.batch, rows] = x
    return out, product


@takes_fields
def gau_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    product: Tensor | None,
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, gate and rel_bias (B, 2P-1); None where there is no such input."""
    acc, rel_bias = accumulator(q.dtype), options.rel_bias
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    dgate = gate.new_zeros(gate.shape) if gate is not None else None
    dbias = torch.zeros(rel_bias.shape, dtype=acc, device=q.device) if rel_bias is not None else None
    workspace = Workspace()
    for seq in sequences(q.shape[0], q.shape[1], k.shape[1], layout):
        part = Part(seq, options, q, k, v)
        dk_sum = torch.zeros_like(part.k, dtype=acc)
        dv_sum = torch.zeros_like(part.v, dtype=acc)
        for i in part.panels():
            rows = part.absolute(i)
            dx = dout[seq.batch, rows].to(part.factor)
            if gate is not None and dgate is not None and product is not None:
                activation, g = options.gate_activation, gate[seq.batch, rows]
                dgate[seq.batch, rows] = gate_gradient(dx * product[seq.batch, rows], g, activation).to(dgate.dtype)
                dx = (dx * activated(g, activation, dx.dtype)).to(part.factor)
            s, a, scale = part.probs(i)
            seen = a.shape[-1]
            add_product(keys_seen(dv_sum, seen), a.to(part.factor).mT, dx, workspace)
            da = times_transposed(dx, keys_seen(part.v, seen)).to(acc)
            ds = part.score_gradient(da, s, a)
            if dbias is not None:
                start = part.bias_start(i) - (ds.shape[-2] - 1)
                sums = toeplitz_sums(ds)
                dbias[seq.batch, start : start + sums.shape[-1]] += sums
            ds = ds.mul_(scale).to(part.factor)
            dq[seq.batch, rows] = (ds @ keys_seen(part.k, seen).to(part.factor)).to(dq.dtype)
            add_product(keys_seen(dk_sum, seen), ds.mT, part.q[:, i].to(part.factor), workspace)
        dk[seq.batch, seq.keys] = dk_sum.to(dk.dtype)
        dv[seq.batch, seq.keys] = dv_sum.to(dv.dtype)
    dbias = dbias.to(rel_bias.dtype) if dbias is not None and rel_bias is not None else None
    return dq, dk, dv, dgate, dbias


class Part:
    """One sequence: m queries (b, m, S) at the end of n keys (b, n, S)."""

    seq: Sequence
    options: GatedOptions
    score: str
    causal: bool
    acc: torch.dtype
    factor: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    m: int
    n: int
    step: int
    last: int

    def __init__(self, seq: Sequence, options: GatedOptions, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.seq, self.options, self.score, self.causal = seq, options, options.score, options.causal
        self.acc, self.factor = accumulator(q.dtype), values_dtype(v)
        self.q, self.k = q[seq.batch, seq.queries].to(self.acc), k[seq.batch, seq.keys].to(self.acc)
        self.v = v[seq.batch, seq.keys].to(self.factor)
        self.bias = options.rel_bias[seq.batch] if options.rel_bias is not None else None
        self.m, self.n = seq.sizes
        self.step = power_of_two_below(SIZES.gau_scores / max(1, self.n * self.q.shape[0]), 16, 256)
        self.last = (self.m - 1) // self.step * self.step  # where the last panel begins

    @cached_property
    def bias_block(self) -> Tensor:
        """The bias (b, rows, .) of any panel's rows at all distances, the last panel's first: a panel's is a part."""
        assert self.bias is not None
        rows = min(self.step, self.m)
        first = self.bias_start(slice(self.last, self.m))
        before = F.pad(self.bias.to(self.acc), (rows - 1, 0))  # read by rows that the last panel may not have
        return toeplitz_block(before, first + rows - 1, rows, self.last + self.n)

    def bias_of(self, i: slice, seen: int) -> Tensor:
        """The bias (b, rows, seen) of a panel."""
        first = self.last - i.start
        return self.bias_block[:, : i.stop - i.start, first : first + seen]

    def panels(self) -> Iterator[slice]:
        """Panels of queries; those in which no query sees any key are left out."""
        for start in range(0, self.m, self.step):
            panel = slice(start, min(start + self.step, self.m))
            if self.seen(panel) > 0:
                yield panel

    def seen(self, i: slice) -> int:
        """The number of keys that the last query of the panel sees, which is the most."""
        return max(0, min(self.n, i.stop + self.n - self.m)) if self.causal else self.n

    def absolute(self, i: slice) -> slice:
        """The panel's rows in the whole tensors."""
        return slice(self.seq.queries.start + i.start, self.seq.queries.start + i.stop)

    def visible(self, i: slice) -> Tensor | int:
        """How many keys each query of the panel sees: (rows, 1), or the one number n."""
        if not self.causal:
            return self.n
        return torch.arange(i.start + 1, i.stop + 1, device=self.q.device)[:, None].add(self.n - self.m).clamp_min_(0)

    def scale(self, i: slice) -> Tensor | float:
        """The factor of q k^T, one for each query where it depends on what the query sees."""
        if self.score == "softmax":
            return self.q.shape[-1] ** -0.5
        if self.score == "softmax_plus":
            count = torch.as_tensor(self.visible(i), dtype=self.acc, device=self.q.device).clamp_min(16)
            return torch.log(count) / math.log(512) * self.q.shape[-1] ** -0.5
        normalizer = self.options.normalizer
        if normalizer == "row":
            count = torch.as_tensor(self.visible(i), dtype=self.acc, device=self.q.device).clamp_min(1)
            return 1 / count
        return 1 / (max(self.n, 1) if normalizer == "keys" else float(normalizer))

    def probs(self, i: slice) -> tuple[Tensor, Tensor, Tensor | float]:
        """Scores and weights A (b, rows, keys seen) of a panel, and the scale of its q k^T."""
        offset = self.n - self.m
        seen, scale = self.seen(i), self.scale(i)
        s = times_transposed(self.q[:, i], keys_seen(self.k, seen)).mul_(scale)
        if self.bias is not None:
            s += self.bias_of(i, seen)
        # Keys before `edge` are seen by every row of the panel.
        edge = max(0, min(seen, i.start + offset + 1)) if self.causal else seen
        if edge < seen:
            position = torch.arange(i.start, i.stop, device=s.device)[:, None] + offset
            s[..., edge:].masked_fill_(torch.arange(edge, seen, device=s.device) > position, -math.inf)
        if not self.score.startswith("softmax"):
            return s, elementwise_score(self.score, s), scale  # -inf has score 0 and slope 0
        a = torch.softmax(s, -1)
        if self.causal and i.start + offset < 0:  # the first rows see nothing
            a[:, : -(i.start + offset)] = 0
        return s, a, scale

    def times_values(self, a: Tensor) -> Tensor:
        """A v (b, rows, E), of the keys that A has."""
        return a.to(self.factor) @ keys_seen(self.v, a.shape[-1])

    def score_gradient(self, da: Tensor, s: Tensor, a: Tensor) -> Tensor:
        """dS from dA: the slope of an elementwise score, or softmax's a * (da - sum a da)."""
        if self.score.startswith("softmax"):
            return da.sub_((da * a).sum(-1, keepdim=True)).mul_(a)
        return da.mul_(score_slope(self.score, s))

    def bias_start(self, i: slice) -> int:
        """Index into the bias vector of the panel's first entry: P-1 + (0 - p)."""
        assert self.bias is not None
        return self.bias.shape[-1] // 2 - (i.start + self.n - self.m)


def keys_seen(x: Tensor, seen: int) -> Tensor:
    """The first rows of keys or values; of a single sequence laid out as a tensor of its own, not to be copied."""
    return x[:, :seen] if x.shape[0] > 1 else x[0, :seen][None]


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a b^T. Of halves PyTorch would copy b^T first, but for a product of two matrices."""
    return a @ b.mT if a.shape[0] > 1 else (a[0] @ b[0].mT)[None]

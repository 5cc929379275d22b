"""Attention where keys and values travel from process to process, and each adds what its queries see of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flashgau.contract.validate import Arguments
from flashgau.eager.common import accumulator
from flashgau.ops.attention import attend
from flashgau.ops.autograd import once
from flashgau.ops.plain import gated
from flashgau.options import AttentionOptions, AttentionResults, Layout

from .agreement import GroupContext, of_rank
from .call import Call
from .exchange import Meeting, Parcel, begin_all_to_all
from .sight import NOTHING, Part, Sight, packed

_AXIS = 2  # of tokens


@dataclass(frozen=True)
class Ring:
    """One call's attention in one process, which after `step` steps has the keys of the process so many ranks before.

    Attributes:
        context: the processes.
        sight: what each sees of the keys of each.
        options: of the whole, with neither bias nor sinks. The seed is common to all.
        layout: of the whole: packed, or nothing.
        backend: as in `attention`.
    """

    context: GroupContext
    sight: Sight
    options: AttentionOptions
    layout: Layout
    backend: str | None

    @property
    def steps(self) -> int:
        """How often keys are passed on before none travels any more."""
        return max(self.sight.hops)

    def source(self, step: int) -> int:
        """Whose keys this process has after these steps, if they come so far."""
        return (self.context.rank - step) % self.context.size

    def part(self, step: int) -> Part:
        """What its queries see of these."""
        source, sight = self.source(step), self.sight
        if sight.hops[source] < step:
            return NOTHING
        return sight.part(sight.queries[self.context.rank], sight.keys[source])

    def within(self, step: int, part: Part, held: list[Tensor]) -> list[Tensor]:
        """A part of what the process has after these steps."""
        start = self.sight.keys[self.source(step)][0]
        return [x.narrow(_AXIS, part.keys[0] - start, part.keys[1] - part.keys[0]) for x in held]

    def keys_on(self, step: int, held: list[Tensor]) -> list[Parcel]:
        """Keys and values go on to the next process, if they are to go further than these steps."""
        (before, after), hops, coming = self._neighbours, self.sight.hops, self.source(step + 1)
        goes = {after} if hops[self.source(step)] > step else set()
        comes = {before: coming} if hops[coming] > step else {}
        return [self._parcel(x, dict.fromkeys(goes, x), comes) for x in held]

    def gradients_on(self, step: int, sums: list[Tensor]) -> list[Parcel]:
        """Their gradients follow them a step later, and go home after the last; `sums` are as of one step before."""
        (before, after), hops = self._neighbours, self.sight.hops
        leaving, coming, rank = self.source(step - 1), self.source(step), self.context.rank
        goes = {leaving if hops[leaving] == step - 1 else after} if hops[leaving] >= step - 1 else set()
        comes = {before: coming} if hops[coming] >= step else {}
        if hops[rank] == step - 1:
            comes[(rank + step - 1) % self.context.size] = rank
        return [self._parcel(x, dict.fromkeys(goes, x), comes) for x in sums]

    @property
    def _neighbours(self) -> tuple[int, int]:
        rank, size = self.context.rank, self.context.size
        return (rank - 1) % size, (rank + 1) % size

    def _parcel(self, like: Tensor, pieces: dict[int, Tensor], sources: dict[int, int]) -> Parcel:
        """What goes to a few processes, and what comes from a few: something like this, of the keys of another."""
        # What does not go or come has no tokens, and is like this in all else: it is a pattern for what follows.
        nothing = like.narrow(_AXIS, 0, 0)
        parcel = Parcel([nothing] * self.context.size, [tuple(nothing.shape)] * self.context.size)
        for rank, piece in pieces.items():
            parcel.pieces[rank] = piece
        for rank, source in sources.items():
            parcel.shapes[rank] = self._shape(like, source)
        return parcel

    def _shape(self, like: Tensor, source: int) -> tuple[int, ...]:
        """Of a tensor like this, with as many tokens as this process has keys."""
        start, stop = self.sight.keys[source]
        return (*like.shape[:_AXIS], stop - start, *like.shape[_AXIS + 1 :])

    def attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None) -> AttentionResults:
        """Output and log-sum-exp of the process's queries. While a part is computed, the next keys are on their way."""
        acc, held = accumulator(q.dtype), [k, v]
        out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=acc)
        lse = q.new_full(q.shape[:3], -math.inf, dtype=acc)
        if sinks is not None:  # one more key with value zero, seen before all others
            lse = lse.copy_(sinks[:, None])
        for step in range(self.steps + 1):
            arrival = begin_all_to_all(self.context, self.keys_on(step, held)) if step < self.steps else None
            part = self.part(step)
            if not part.is_empty:
                found = self._attended_to(part, step, [q, *self.within(step, part, held), bias])
                out, lse = merged(out, lse, *found)
            if arrival is not None:
                held = [parts[self._neighbours[0]] for parts in arrival()]
        return AttentionResults(out.to(q.dtype), lse)

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
        results: AttentionResults,
        above: tuple[Tensor, Tensor | None],
        with_keys: bool,
    ) -> list[Tensor | None]:
        """Gradients of q, k, v and bias, as sums. The keys travel once more, and their gradients behind them.

        Args:
            inputs: q, k, v and bias.
            results: what `attended` gave.
            above: the gradients of both.
            with_keys: whether any process wants those of k and v; else theirs are only those of its own queries.
        """
        q, k, v, bias = inputs
        acc, held = accumulator(q.dtype), [k, v]
        dq = torch.zeros_like(q, dtype=acc)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=acc)
        own: list[Tensor] = []
        sums: list[Tensor] = []
        for step in range(self.steps + (2 if with_keys and self.steps else 1)):
            keys = self.keys_on(step, held) if step < self.steps else []
            going = self.gradients_on(step, sums) if with_keys and step > 1 else []
            arrival = begin_all_to_all(self.context, [*keys, *going]) if keys or going else None
            sums = [x.new_zeros(self._shape(x, self.source(step)), dtype=acc) for x in (k, v)]
            part = self.part(step)
            if not part.is_empty:
                found = self._gradients_of(part, step, [q, *self.within(step, part, held), bias], results, above)
                for total, x in zip([dq, *self.within(step, part, sums)], found[:3], strict=True):
                    total += x
                if dbias is not None:
                    dbias += found[3]
            arrived = arrival() if arrival is not None else []
            if going:
                self._add(step, sums, own, arrived[-2:])
            if keys:
                held = [parts[self._neighbours[0]] for parts in arrived[:2]]
            own = own or sums
        return [dq, *own, dbias]

    def _attended_to(self, part: Part, step: int, tensors: list[Any]) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of queries over a part, of q, the part's k and v, and the bias of the whole."""
        q, k, v, bias = tensors
        rank, common = self.context.rank, cast("int", self.options.dropout_seed)
        options = part.options(self.options._replace(rel_bias=bias), q.shape[_AXIS])
        if options.dropout_p:
            seed: Any = of_rank(common, rank * self.context.size + self.source(step))
            options = options._replace(dropout_seed=seed)
        layout = packed(self.layout, self.sight.queries[rank], part.keys)
        found: Any = attend(Arguments(self.context.op), q, k, v, options, layout, True, self.backend)
        return found

    def _gradients_of(
        self,
        part: Part,
        step: int,
        tensors: list[Any],
        results: AttentionResults,
        above: tuple[Tensor, Tensor | None],
    ) -> list[Tensor]:
        """The gradients of these, of whose (o, lse) the whole is made: O is the sum of exp(lse - LSE) o over the parts.

        They are computed again: kept, they would take as much memory as the whole sequence.
        """
        dout, dlse = above
        given = [None if x is None else x.detach().requires_grad_() for x in tensors]
        with torch.enable_grad():
            out, lse = self._attended_to(part, step, given)
        weight = torch.where(lse > -math.inf, (lse - results.lse).exp(), 0)
        change = (dout * (out.detach().to(lse.dtype) - results.out)).sum(-1) + (0 if dlse is None else dlse)
        wanted = [x for x in given if x is not None]
        return list(
            torch.autograd.grad([out, lse], wanted, [(weight[..., None] * dout).to(out.dtype), weight * change])
        )

    def _add(self, step: int, sums: list[Tensor], own: list[Tensor], arrived: list[list[Tensor]]) -> None:
        """Add gradients that have come: of the keys that are here, and, home, of the process's own."""
        (before, _), hops, rank = self._neighbours, self.sight.hops, self.context.rank
        for total, home, parts in zip(sums, own, arrived, strict=True):
            if hops[self.source(step)] >= step:
                total += parts[before]
            if hops[rank] == step - 1:
                home += parts[(rank + step - 1) % self.context.size]


def merged(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps over two sets of keys as those over both; the first are written over."""
    total = torch.logaddexp(lse, part_lse)
    pivot = torch.where(total == -math.inf, 0, total)  # a row that has seen nothing yet
    kept, added = ((x - pivot).exp()[..., None] for x in (lse, part_lse))
    return out.mul_(kept).addcmul_(part.to(out.dtype), added), total


def by_ring(call: Call, needed: dict[str, bool], sight: Sight, given: AttentionOptions, layout: Layout) -> list[Tensor]:
    """This process's slices of output and log-sum-exp.

    Args:
        call: of attention, with this process's slices.
        needed: for each of the slices, and "shared" for the parameters, whether any process needs its gradient.
        sight: what each process sees of the keys of each.
        given: the options of the whole. The seed is common to all.
        layout: of the whole: packed, or nothing.
    """
    (q, k, v, gate), backend = call.tensors, call.options["backend"]
    assert q is not None
    bias = None if given.rel_bias is None else given.rel_bias.expand(q.shape[0], q.shape[1], -1)
    ring = Ring(call.context, sight, given._replace(rel_bias=None, sinks=None), layout, backend)
    # A process that needs no gradient itself has a part in those of the others.
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled() and any(needed.values()))
    with_keys = needed["k"] or needed["v"]
    out, lse = _Ring.apply(anchor, Meeting(call.context, 1), ring, with_keys, q, k, v, bias, given.sinks)
    if gate is not None:
        gate = gate[..., None] if gate.dim() == out.dim() - 1 else gate
        out = gated(out, gate, call.options["gate_activation"], Layout())
    return [out, lse]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, meeting: Meeting, ring: Ring, with_keys: bool, q: Tensor, k: Tensor, v: Tensor,
        bias: Tensor | None, sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.meeting, ctx.ring, ctx.with_keys = meeting, ring, with_keys
        results = ring.attended(q, k, v, bias, sinks)
        ctx.save_for_backward(q, k, v, bias, sinks, *results)
        ctx.set_materialize_grads(False)
        return results.out, results.lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        ring: Ring = ctx.ring
        *inputs, out, lse = ctx.saved_tensors  # activation checkpointing makes the whole call again here

        def compute(dout: Tensor, dlse: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
            ctx.meeting.wait()
            *others, sinks = inputs
            found = ring.gradients(tuple(others), AttentionResults(out, lse), (dout, dlse), ctx.with_keys)
            found.append(None if sinks is None else _sinks_gradient(sinks, AttentionResults(out, lse), (dout, dlse)))
            return tuple(x if x is None else x.to(like.dtype) for x, like in zip(found, inputs, strict=True))

        dout = torch.zeros_like(out) if dout is None else dout
        return None, None, None, None, *once(ring.context.op, compute, dout, dlse, *inputs)


def _sinks_gradient(sinks: Tensor, results: AttentionResults, above: tuple[Tensor, Tensor | None]) -> Tensor:
    """A sink has a probability in each row, and value 0: dS = P (0 - delta)."""
    (out, lse), (dout, dlse) = results, above
    delta = (dout * out).sum(-1, dtype=lse.dtype) - (0 if dlse is None else dlse)
    p = torch.where(lse == -math.inf, 0, (sinks[:, None] - lse).exp())
    return -(p * delta).sum((0, 2))

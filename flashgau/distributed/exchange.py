"""The one thing that goes between processes: pieces of tensors, all to all, and their gradients the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flashgau.ops.autograd import once

from .agreement import GroupContext

Range = tuple[int, int]  # first, last + 1
_ALIGNMENT = 16  # bytes: a piece in a message begins where a tensor of any dtype may, and copies are fast


@dataclass(frozen=True)
class Turn:
    """How a tensor is cut for the processes along one axis, and what they send is joined along another.

    Attributes:
        cut: the axis that is cut.
        slices: for each process, what it gets of that axis. They may overlap: what two processes get has the sum of
            their gradients.
        join: the axis along which a process puts what it gets from the others together, in their order.
        sizes: for each process, the size along that axis of what comes from it.

    Example:
        Heads for tokens, (B, H, N/R, D) -> (B, H/R, N, D): cut=1, join=2. A tensor whole to all: every slice is all
        of the axis. Ranges of tokens, `fetching`: both are one axis.
    """

    cut: int
    slices: tuple[tuple[int, int], ...]
    join: int
    sizes: tuple[int, ...]

    @classmethod
    def fetching(cls, axis: int, wanted: Sequence[Range], held: Sequence[Range], rank: int) -> Turn:
        """For each process the tokens in a range of the whole that others hold, from these.

        Args:
            axis: of the tokens.
            wanted: for each process, the range that it needs. What it holds itself is not sent.
            held: for each process, the range that it has; they lie one after the other.
            rank: of this process.
        """
        start = held[rank][0]
        gives = [(start, start) if other == rank else common(own, held[rank]) for other, own in enumerate(wanted)]
        gets = [(start, start) if other == rank else common(wanted[rank], own) for other, own in enumerate(held)]
        return cls(axis, tuple((a - start, b - start) for a, b in gives), axis, tuple(b - a for a, b in gets))

    def cut_up(self, context: GroupContext, x: Tensor) -> Parcel:
        """What each process gets of this one's tensor, and what it gets from each."""
        start, stop = self.slices[context.rank]
        shapes = [_resized(x, (self.cut, stop - start), (self.join, size)) for size in self.sizes]
        return Parcel([x.narrow(self.cut, a, b - a) for a, b in self.slices], shapes)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """This process's part of the tensor of all."""
        return torch.cat(parts, self.join)

    def cut_up_gradient(self, grad: Tensor, shape: torch.Size) -> Parcel:
        """The same for the gradient of what `joined` gave; `shape` is that of the process's own tensor."""
        x = grad.new_empty(()).expand(shape)
        shapes = [_resized(x, (self.cut, b - a)) for a, b in self.slices]
        return Parcel(list(grad.split(self.sizes, self.join)), shapes)

    def joined_gradient(self, parts: list[Tensor], shape: torch.Size, kept: Sequence[Range] = ()) -> Tensor:
        """The gradient of this process's own tensor, of those of what it has kept, and then of what it has sent."""
        places = [place for place in zip((*kept, *self.slices), parts, strict=True) if place[0][0] < place[0][1]]
        places.sort(key=lambda place: place[0])  # stable
        ends = [(0, 0), *(place for place, _ in places), (shape[self.cut],) * 2]
        if places and all(last[1] == first[0] for last, first in pairwise(ends)):
            return torch.cat([part for _, part in places], self.cut)
        # In one order, whichever came first, and in fp32 for halves: the same bits in every run.
        dtype = parts[0].dtype
        total = parts[0].new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
        for (a, b), part in places:
            total.narrow(self.cut, a, b - a).add_(part)
        return total.to(dtype)


@dataclass(frozen=True)
class Parcel:
    """What goes between processes for one tensor.

    Attributes:
        pieces: to each process.
        shapes: of what comes from each, in the dtype of the pieces.
    """

    pieces: list[Tensor]
    shapes: list[tuple[int, ...]]


class Meeting:
    """One place of a call's backward, where every process must be before any tensor is sent from there.

    Args:
        context: the processes, which have agreed on the call.
        part: the number of the place in the call, from 1.
    """

    context: GroupContext
    part: int

    def __init__(self, context: GroupContext, part: int) -> None:
        self.context, self.part = context, part
        self._wait: Callable[[], None] | None = None

    def begin(self) -> None:
        """Tell the others that this process is on its way, so that `wait` need not wait long."""
        self._wait = self.context.meet(self.part)

    def wait(self) -> None:
        """Go on when all are here.

        Raises:
            RuntimeError: in all processes, if one of them is elsewhere.
        """
        if self._wait is None:
            self.begin()
        assert self._wait is not None
        wait, self._wait = self._wait, None  # a graph that is kept may be run backwards again
        wait()


def exchange(
    meeting: Meeting, tensors: Sequence[Tensor | None], turns: Sequence[Turn], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Turn tensors over between the processes, in one message to each; differentiable once.

    Every process must call this, with as many tensors (None in all or in none of them), and if any gradient is needed,
    every process must run its backward, which communicates too. All of a call's backward communication is one chain in
    the graph, so that its order is the same everywhere, whatever needs gradients in this process.

    Args:
        meeting: of the processes in the backward. (Forward, they have just agreed on the call.)
        tensors: this process's, of any dtypes.
        turns: of each.
        needed: for each, whether any process needs its gradient.
    """
    given = [place for place, x in enumerate(tensors) if x is not None]
    _, arrival = begin_exchange(
        meeting, [x for x in tensors if x is not None], [turns[p] for p in given], [needed[p] for p in given]
    )
    found: list[Tensor | None] = [None] * len(tensors)
    for place, result in zip(given, arrival(), strict=True):
        found[place] = result
    return found


def begin_exchange(
    meeting: Meeting,
    tensors: Sequence[Tensor],
    turns: Sequence[Turn],
    needed: Sequence[bool],
    kept: Sequence[Range] = (),
) -> tuple[list[tuple[Tensor, ...]], Callable[[], list[Tensor]]]:
    """The same, while this process goes on with what it has kept.

    In the backward too: the gradients of what came are sent as soon as they are there, and are on their way while this
    process computes those of what it has kept. (PyTorch runs a graph backwards, so that whoever uses what came, which
    is later than what has used what was kept, comes first; if it did not, all would be as right, and slower.)

    Args:
        meeting: as in `exchange`, like those that follow.
        tensors: of one device.
        turns: of each.
        needed: of each.
        kept: ranges of each tensor along the axis that is cut, for this process's own use. They may overlap.

    Returns:
        The tensors' parts in each range, and what waits and returns what came. `reaching` must lead to some of it.
    """
    traffic = _Turns(meeting, tuple(needed), tuple(turns), tuple(kept), tuple(x.shape for x in tensors))
    own, arrival = begin(traffic, tensors)
    count = len(tensors)
    return [tuple(own[at : at + count]) for at in range(0, count * len(kept), count)], arrival


class Traffic(Protocol):
    """What leaves this process, and what comes instead; backward, gradients of what came leave, and others come.

    Attributes:
        meeting: of the processes in the backward.
        needs: for each tensor, whether any process needs its gradient.
    """

    meeting: Meeting
    needs: tuple[bool, ...]

    def leave(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Begin to send; what this process uses of its own tensors, one of each or several times one of each."""

    def come(self) -> list[Tensor]:
        """Wait for what others have sent, and make one result for each tensor of it."""

    def leave_again(self, grads: tuple[Tensor, ...]) -> None:
        """Begin to send gradients of the results."""

    def come_again(self, own: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Wait for the others', and make those of the tensors of them and of those of what this process has used."""


def begin(traffic: Traffic, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Send tensors; what this process uses of its own, and what waits and returns what came. Differentiable once."""
    # A process that needs no gradient itself has a part in those of the others.
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled() and any(traffic.needs))
    token, *own = _Departure.apply(anchor, traffic, *tensors)
    return own, lambda: list(_Arrival.apply(token, traffic))


@dataclass
class Messages:
    """What any traffic has.

    Attributes:
        meeting: of the processes in the backward.
        needs: for each tensor, whether any process needs its gradient.
        under_way: what waits for what others have sent.
    """

    meeting: Meeting
    needs: tuple[bool, ...]
    under_way: Callable[[], list[list[Tensor]]] | None = field(default=None, init=False)

    def send(self, parcels: list[Parcel]) -> None:
        """Begin to send each process its pieces."""
        self.under_way = begin_all_to_all(self.meeting.context, parcels)

    def arrived(self) -> list[list[Tensor]]:
        """Wait for it; for each tensor, what came from each process."""
        assert self.under_way is not None
        wait, self.under_way = self.under_way, None  # a graph that is kept may be run backwards again
        return wait()


@dataclass
class _Turns(Messages):
    """The traffic of `begin_exchange`.

    Attributes:
        turns: of each tensor.
        kept: ranges that this process uses itself.
        shapes: of this process's tensors.
    """

    turns: tuple[Turn, ...]
    kept: tuple[Range, ...]
    shapes: tuple[torch.Size, ...]

    def leave(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        both = list(zip(self.turns, tensors, strict=True))
        self.send([turn.cut_up(self.meeting.context, x) for turn, x in both])
        return [x.narrow(turn.cut, a, b - a) for a, b in self.kept for turn, x in both]

    def come(self) -> list[Tensor]:
        return [turn.joined(parts) for turn, parts in zip(self.turns, self.arrived(), strict=True)]

    def leave_again(self, grads: tuple[Tensor, ...]) -> None:
        plan = [(self.turns[place], grads[place], self.shapes[place]) for place in self._wanted]
        parcels = [turn.cut_up_gradient(grad, shape) for turn, grad, shape in plan]
        self.meeting.wait()
        self.send(parcels)

    def come_again(self, own: tuple[Tensor, ...]) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(self.needs)
        for place, parts in zip(self._wanted, self.arrived(), strict=True):
            parts = [*own[place :: len(self.needs)], *parts]
            found[place] = self.turns[place].joined_gradient(parts, self.shapes[place], self.kept)
        return found

    @property
    def _wanted(self) -> list[int]:
        """The tensors whose gradients are sent."""
        return [place for place, need in enumerate(self.needs) if need]


class _Departure(torch.autograd.Function):
    """Forward, tensors leave; backward, their gradients have come, after those of what was kept are computed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, traffic: Traffic, *tensors: Tensor) -> Any:
        ctx.traffic, own = traffic, traffic.leave(tensors)
        ctx.mark_non_differentiable(*(x for x, need in zip(own, cycle(traffic.needs), strict=False) if not need))
        return tensors[0].new_zeros(()), *own  # the first says that what is sent is a function of the tensors

    @staticmethod
    def backward(ctx: Any, token: Tensor, *own: Tensor) -> tuple[Tensor | None, ...]:
        traffic: Traffic = ctx.traffic

        def compute(token: Tensor, *own: Tensor) -> tuple[Tensor | None, ...]:
            return tuple(traffic.come_again(own))

        return None, None, *once(traffic.meeting.context.op, compute, token, *own)


class _Arrival(torch.autograd.Function):
    """Forward, what others have sent has come; backward, its gradients leave."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, traffic: Traffic) -> Any:
        ctx.traffic, results = traffic, tuple(traffic.come())
        ctx.mark_non_differentiable(*(x for x, need in zip(results, traffic.needs, strict=True) if not need))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        traffic: Traffic = ctx.traffic

        def send(*grads: Tensor) -> tuple[Tensor]:
            traffic.leave_again(grads)
            return (grads[0].new_zeros(()),)

        (token,) = once(traffic.meeting.context.op, send, *grads)
        return token, None


def reaching(meeting: Meeting, results: Sequence[Tensor], source: Tensor) -> list[Tensor]:
    """`results`, with `source` among what they come from: their backward then reaches its exchange in any case.

    The processes begin to meet for that exchange here, while each still computes what it will send.
    """
    return list(_Reaching.apply(meeting, source, *results))


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, meeting: Meeting, source: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.meeting = meeting
        ctx.save_for_backward(source.new_empty(0))
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # activation checkpointing makes the whole call again here, and nothing from here on
        ctx.meeting.begin()

        def as_they_are(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(x if x is None else x.view_as(x) for x in grads)

        return None, None, *once(ctx.meeting.context.op, as_they_are, *grads)


def common(one: Range, other: Range) -> Range:
    """What is in both, within `other` even if it is nothing."""
    start = min(max(one[0], other[0]), other[1])
    return start, max(start, min(one[1], other[1]))


def _resized(x: Tensor, *changes: tuple[int, int]) -> tuple[int, ...]:
    shape = list(x.shape)
    for axis, size in changes:
        shape[axis] = size
    return tuple(shape)


def begin_all_to_all(context: GroupContext, parcels: list[Parcel]) -> Callable[[], list[list[Tensor]]]:
    """Send each process its pieces, of all tensors in one message, while this process goes on.

    The only place where tensors are sent. What is returned waits; for each tensor it gives what came from each process.
    """
    device, dtypes = parcels[0].pieces[0].device, [parcel.pieces[0].dtype for parcel in parcels]
    sent, sizes, places = _messages(device, dtypes, [[tuple(x.shape) for x in parcel.pieces] for parcel in parcels])
    for parcel, own in zip(parcels, places, strict=True):
        for piece, place in zip(parcel.pieces, own, strict=True):
            place.copy_(piece)
    received, their_sizes, their_places = _messages(device, dtypes, [parcel.shapes for parcel in parcels])
    with context.waiting():
        work = dist.all_to_all_single(received, sent, their_sizes, sizes, group=context.group, async_op=True)

    def wait() -> list[list[Tensor]]:
        with context.waiting():
            work.wait()
        return their_places

    return wait


def _messages(
    device: torch.device, dtypes: list[torch.dtype], shapes: list[list[tuple[int, ...]]]
) -> tuple[Tensor, list[int], list[list[Tensor]]]:
    """Memory for a message to or from each process: all of it, the bytes of each, and its pieces by tensor and process.

    They are bytes because so any dtype can be sent by any backend.
    """
    sizes = [[prod(shape) * dtype.itemsize for shape in own] for own, dtype in zip(shapes, dtypes, strict=True)]
    rooms = [[size + -size % _ALIGNMENT for size in own] for own in sizes]
    counts = [sum(own) for own in zip(*rooms, strict=True)]
    memory = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    places: list[list[Tensor]] = [[] for _ in dtypes]
    start = 0
    for rank in range(len(counts)):
        for tensor, dtype in enumerate(dtypes):
            piece = memory[start : start + sizes[tensor][rank]].view(dtype)
            places[tensor].append(piece.view(shapes[tensor][rank]))
            start += rooms[tensor][rank]
    return memory, counts, places

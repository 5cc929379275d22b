"""The one thing that goes between processes: pieces of tensors, all to all, and their gradients the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashgau.ops.once import once

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
        """For each process the tokens in a range of the whole, from whoever holds them.

        Args:
            axis: of the tokens.
            wanted: for each process, the range that it gets.
            held: for each process, the range that it has; they lie one after the other.
            rank: of this process.
        """
        start = held[rank][0]
        gives = [_common(own, held[rank]) for own in wanted]
        gets = [_common(wanted[rank], own) for own in held]
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

    def joined_gradient(self, parts: list[Tensor], shape: torch.Size) -> Tensor:
        """The gradient of this process's own tensor."""
        ends = [(0, 0), *self.slices, (shape[self.cut],) * 2]
        if all(last[1] == first[0] for last, first in pairwise(ends)):
            return torch.cat(parts, self.cut)
        # In the order of processes, whichever came first, and in fp32 for halves: the same bits in every run.
        dtype = parts[0].dtype
        total = parts[0].new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
        for part, (a, b) in zip(parts, self.slices, strict=True):
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
    every process must run its backward, which communicates too. All of a call's backward communication is one node of
    the graph, so that its order is the same everywhere, whatever needs gradients in this process.

    Args:
        meeting: of the processes in the backward. (Forward, they have just agreed on the call.)
        tensors: this process's, of any dtypes.
        turns: of each.
        needed: for each, whether any process needs its gradient.
    """
    given = [place for place, x in enumerate(tensors) if x is not None]
    needs = [needed[place] for place in given]
    # A process that needs no gradient itself has a part in those of the others.
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled() and any(needs))
    results = _Exchange.apply(anchor, meeting, [turns[place] for place in given], needs, *(tensors[p] for p in given))
    found: list[Tensor | None] = [None] * len(tensors)
    for place, result in zip(given, results, strict=True):
        found[place] = result
    return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, meeting: Meeting, turns: list[Turn], needs: list[bool], *tensors: Tensor
    ) -> Any:
        ctx.meeting, ctx.turns, ctx.needs, ctx.shapes = meeting, turns, needs, [x.shape for x in tensors]
        context = meeting.context
        received = _all_to_all(context, [turn.cut_up(context, x) for turn, x in zip(turns, tensors, strict=True)])
        results = tuple(turn.joined(parts) for turn, parts in zip(turns, received, strict=True))
        ctx.mark_non_differentiable(*(x for x, need in zip(results, needs, strict=True) if not need))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def send(*grads: Tensor) -> tuple[Tensor | None, ...]:
            plan = list(zip(ctx.turns, grads, ctx.shapes, strict=True))
            wanted = [place for place, need in enumerate(ctx.needs) if need]
            parcels = [plan[place][0].cut_up_gradient(*plan[place][1:]) for place in wanted]
            ctx.meeting.wait()
            found: list[Tensor | None] = [None] * len(grads)
            for place, parts in zip(wanted, _all_to_all(ctx.meeting.context, parcels), strict=True):
                turn, _, shape = plan[place]
                found[place] = turn.joined_gradient(parts, shape)
            return tuple(found)

        return None, None, None, None, *once(ctx.meeting.context.op, send, *grads)


def reaching(meeting: Meeting, result: Tensor, source: Tensor) -> Tensor:
    """`result`, with `source` among what it comes from: its backward then reaches `source`'s exchange in any case.

    The processes begin to meet for that exchange here, while each still computes what it will send.
    """
    return _Reaching.apply(meeting, result, source)


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, meeting: Meeting, result: Tensor, source: Tensor) -> Tensor:
        ctx.meeting = meeting
        ctx.save_for_backward(result.new_empty(0))
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        _ = ctx.saved_tensors  # activation checkpointing makes the whole call again here, and nothing from here on
        ctx.meeting.begin()
        (own,) = once(ctx.meeting.context.op, lambda x: (x.view_as(x),), grad)
        return None, own, None


def _common(one: Range, other: Range) -> Range:
    """What is in both, within `other` even if it is nothing."""
    start = min(max(one[0], other[0]), other[1])
    return start, max(start, min(one[1], other[1]))


def _resized(x: Tensor, *changes: tuple[int, int]) -> tuple[int, ...]:
    shape = list(x.shape)
    for axis, size in changes:
        shape[axis] = size
    return tuple(shape)


def _all_to_all(context: GroupContext, parcels: list[Parcel]) -> list[list[Tensor]]:
    """Send each process its pieces, of all tensors in one message; for each tensor, what came from each process."""
    return begin_all_to_all(context, parcels)()


def begin_all_to_all(context: GroupContext, parcels: list[Parcel]) -> Callable[[], list[list[Tensor]]]:
    """The same, while this process goes on; what is returned waits. The only place where tensors are sent."""
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

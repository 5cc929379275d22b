"""The one thing that goes between processes: pieces of tensors, all to all, and their gradients the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import Team

_EVERYTHING = torch.uint8  # as bytes, any dtype can be sent by any backend


@dataclass(frozen=True)
class Turn:
    """How a tensor is cut for the processes along one axis, and what they send is joined along another.

    Attributes:
        cut: the axis that is cut.
        slices: for each process, what it gets of that axis. They may overlap: what two processes get has the sum of
            their gradients. The same in all processes.
        join: the axis along which a process puts what it gets from the others together, in their order.
        sizes: for each process, the size of its own tensor along that axis.

    Example:
        Heads for tokens, (B, H, N/R, D) -> (B, H/R, N, D): cut=1, join=2. A tensor whole to all: every slice is all
        of the axis.
    """

    cut: int
    slices: tuple[tuple[int, int], ...]
    join: int
    sizes: tuple[int, ...]

    def forward(self, team: Team, x: Tensor) -> Tensor:
        """This process's part of the tensor of all."""
        start, stop = self.slices[team.rank]
        shapes = [_resized(x, (self.cut, stop - start), (self.join, size)) for size in self.sizes]
        pieces = [x.narrow(self.cut, a, b - a) for a, b in self.slices]
        return torch.cat(_all_to_all(team, pieces, shapes), self.join)

    def backward(self, team: Team, grad: Tensor, shape: torch.Size) -> Tensor:
        """From the gradient of `forward`'s result, that of x."""
        x = grad.new_empty(()).expand(shape)
        shapes = [_resized(x, (self.cut, b - a)) for a, b in self.slices]
        parts = _all_to_all(team, list(grad.split(self.sizes, self.join)), shapes)
        if all(last[1] == first[0] for last, first in zip(self.slices, self.slices[1:], strict=False)):
            return torch.cat(parts, self.cut)
        # In the order of processes, whichever came first, and in fp32 for halves: the same bits in every run.
        total = grad.new_zeros(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for part, (a, b) in zip(parts, self.slices, strict=True):
            total.narrow(self.cut, a, b - a).add_(part)
        return total.to(grad.dtype)


def exchange(
    team: Team, tensors: Sequence[Tensor | None], turns: Sequence[Turn], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Turn tensors over between the processes; differentiable once.

    Every process must call this, with as many tensors (None in all or in none of them), and if any gradient is needed,
    every process must run its backward, which communicates too. All of a call's backward communication is one node of
    the graph, so that its order is the same everywhere, whatever needs gradients in this process.

    Args:
        team: the processes.
        tensors: this process's, of any dtypes.
        turns: of each.
        needed: for each, whether any process needs its gradient.
    """
    given = [place for place, x in enumerate(tensors) if x is not None]
    needs = [needed[place] for place in given]
    # A process that needs no gradient itself has a part in those of the others.
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled() and any(needs))
    results = _Exchange.apply(anchor, team, [turns[place] for place in given], needs, *(tensors[p] for p in given))
    found: list[Tensor | None] = [None] * len(tensors)
    for place, result in zip(given, results, strict=True):
        found[place] = result
    return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, team: Team, turns: list[Turn], needs: list[bool], *tensors: Tensor) -> Any:
        ctx.team, ctx.turns, ctx.needs, ctx.shapes = team, turns, needs, [x.shape for x in tensors]
        results = tuple(turn.forward(team, x) for turn, x in zip(turns, tensors, strict=True))
        ctx.mark_non_differentiable(*(x for x, need in zip(results, needs, strict=True) if not need))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def send(*grads: Tensor) -> tuple[Tensor | None, ...]:
            plan = zip(ctx.turns, ctx.needs, ctx.shapes, grads, strict=True)
            return tuple(turn.backward(ctx.team, grad, shape) if need else None for turn, need, shape, grad in plan)

        return None, None, None, None, *once(ctx.team.op, send, *grads)


def once(op: str, compute: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None) -> Any:
    """The gradients that `compute` makes of tensors; differentiating them again raises an error, which says so."""
    return _Once.apply(op, compute, *tensors)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, compute: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.op = op
        return compute(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"{ctx.op}: differentiable once; over several processes there are no second derivatives")


def reaching(op: str, result: Tensor, source: Tensor) -> Tensor:
    """`result`, with `source` among what it comes from: its backward then reaches `source`'s exchange in any case."""
    return _Reaching.apply(op, result, source)


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, result: Tensor, source: Tensor) -> Tensor:
        ctx.op = op
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (own,) = once(ctx.op, lambda x: (x.view_as(x),), grad)
        return None, own, None


def _resized(x: Tensor, *changes: tuple[int, int]) -> tuple[int, ...]:
    shape = list(x.shape)
    for axis, size in changes:
        shape[axis] = size
    return tuple(shape)


def _all_to_all(team: Team, pieces: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Send each process its piece, and return what each has sent, of these shapes."""
    counts, theirs = [x.numel() for x in pieces], [prod(shape) for shape in shapes]
    sent, received = pieces[0].new_empty(sum(counts)), pieces[0].new_empty(sum(theirs))
    for place, piece in zip(sent.split(counts), pieces, strict=True):
        place.view(piece.shape).copy_(piece)
    size = sent.element_size()
    dist.all_to_all_single(
        received.view(_EVERYTHING),
        sent.view(_EVERYTHING),
        [size * count for count in theirs],
        [size * count for count in counts],
        group=team.group,
    )
    return [x.view(shape) for x, shape in zip(received.split(theirs), shapes, strict=True)]

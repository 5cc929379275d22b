"""Sums over the processes before each process, in as many rounds as their number has binary digits.

In round i, of 1, 2, 4, ..., everyone sends the sum that it has so far to the process so many behind it, which then has
twice as many terms (Hillis, Steele 1986, "Data parallel algorithms", Communications of the ACM 29, "partial sums").
Backward, gradients take the same ways in the other direction, the last round first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .exchange import Meeting, Messages, Parcel, begin


@dataclass(frozen=True)
class Chain:
    """Whose terms each process's sum is of: those of some right before it in an order.

    Attributes:
        reach: for each process of how many: one more than the one before it, or 0 or 1 where a sum begins.
        step: 1 if the order is that of ranks, -1 if it is the reverse.
    """

    reach: tuple[int, ...]
    step: int

    @property
    def messages(self) -> int:
        """How many tensors are sent."""
        return sum(reach.bit_length() for reach in self.reach)

    @property
    def rounds(self) -> list[int]:
        """How far behind it each process sends, in the order of rounds."""
        return [1 << place for place in range(max(self.reach).bit_length())]

    def passes_on(self, rank: int) -> bool:
        """Whether what comes to a process is of the sum of the one behind it, too."""
        behind = rank + self.step
        return 0 <= behind < len(self.reach) and self.reach[behind] > 1

    def partner(self, rank: int, distance: int) -> int | None:
        """To whom a process sends in the round of this distance, or, if it is negative, from whom it gets."""
        other = rank + self.step * distance
        if not 0 <= other < len(self.reach):
            return None
        return other if self.reach[other if distance > 0 else rank] >= abs(distance) else None


def begin_scan(
    meeting: Meeting, chains: Sequence[Chain], terms: Sequence[Tensor], needed: bool
) -> Callable[[], list[Tensor]]:
    """For each chain, of this process's term, the sum of those before it: what waits, and returns the sums.

    The first round is on its way meanwhile. Differentiable once; every process must run the backward if any does.

    Args:
        meeting: of the processes in the backward. (Forward, they have just agreed on the call.)
        chains: alike in all processes.
        terms: of one shape and dtype in all processes.
        needed: whether any process needs their gradients.
    """
    _, arrival = begin(_Rounds(meeting, (needed,) * len(chains), tuple(chains)), terms)
    return arrival


@dataclass
class _Rounds(Messages):
    """The traffic of `begin_scan`.

    Attributes:
        chains: of each term.
        sums: of a process and what it has got that is of the sums of those behind it; backward their gradients.
        results: of what it has got; backward their gradients.
    """

    chains: tuple[Chain, ...]
    sums: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)

    def leave(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        self.sums, self.results = list(tensors), [torch.zeros_like(x) for x in tensors]
        if self._rounds:
            self._send(self.sums, self._rounds[0])
        return []

    def come(self) -> list[Tensor]:
        for number, distance in enumerate(self._rounds):
            if number:  # the first one has left
                self._send(self.sums, distance)
            for place, found in self._came(-distance):
                self.results[place] = self.results[place] + found
                if self._passes(place):
                    self.sums[place] = self.sums[place] + found
        results, self.sums, self.results = self.results, [], []
        return results

    def leave_again(self, grads: tuple[Tensor, ...]) -> None:
        self.sums, self.results = [torch.zeros_like(x) for x in grads], list(grads)
        self.meeting.wait()
        if self._rounds:
            self._send(self.results, -self._rounds[-1])

    def come_again(self, own: tuple[Tensor, ...]) -> list[Tensor | None]:
        for number, distance in enumerate(reversed(self._rounds)):
            if number:
                both = enumerate(zip(self.results, self.sums, strict=True))
                self._send([x + y if self._passes(place) else x for place, (x, y) in both], -distance)
            for place, found in self._came(distance):
                self.sums[place] = self.sums[place] + found
        gradients, self.sums, self.results = self.sums, [], []
        return list(gradients)

    @property
    def _rounds(self) -> list[int]:
        return max((chain.rounds for chain in self.chains), key=len)

    def _passes(self, place: int) -> bool:
        return self.chains[place].passes_on(self.meeting.context.rank)

    def _send(self, tensors: list[Tensor], distance: int) -> None:
        """Begin to send to those so far behind this process, or, if it is negative, before it."""
        self.send([self._parcel(*both, distance) for both in zip(self.chains, tensors, strict=True)])

    def _came(self, distance: int) -> list[tuple[int, Tensor]]:
        """What has come from those so far away, and of which term."""
        found = self.arrived()
        sources = [(place, self._partner(chain, distance)) for place, chain in enumerate(self.chains)]
        return [(place, found[place][source]) for place, source in sources if source is not None]

    def _parcel(self, chain: Chain, x: Tensor, distance: int) -> Parcel:
        nothing, count = x.new_empty(0), self.meeting.context.size
        parcel = Parcel([nothing] * count, [(0,)] * count)
        if (to := self._partner(chain, distance)) is not None:
            parcel.pieces[to] = x
        if (source := self._partner(chain, -distance)) is not None:
            parcel.shapes[source] = tuple(x.shape)
        return parcel

    def _partner(self, chain: Chain, distance: int) -> int | None:
        return chain.partner(self.meeting.context.rank, distance)

"""Sums over the processes before each, against sums, for more processes than the other tests have."""

from __future__ import annotations

import threading
from itertools import pairwise, product
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashgau.distributed import exchange
from flashgau.distributed.mixed_chunk import Cuts
from flashgau.distributed.scan import Chain, _Rounds


def in_threads(chains: tuple[Chain, ...], terms: list[list[Tensor]], backwards: bool) -> list[list[Tensor]]:
    """What each process gets, of a term for each chain; with `backwards`, of the gradients of what it gets."""
    size = len(terms)
    posts: dict[tuple[int, int], Queue[list[Tensor]]] = {pair: Queue() for pair in product(range(size), repeat=2)}
    results: list[Any] = [None] * size

    def send(context: Any, parcels: list[Any]) -> Any:
        for to in range(size):
            posts[context.rank, to].put([parcel.pieces[to] for parcel in parcels])

        def wait() -> list[list[Tensor]]:
            came = [posts[source, context.rank].get(timeout=60) for source in range(size)]
            found = [list(parts) for parts in zip(*came, strict=True)]
            shapes = [[tuple(x.shape) for x in parts] for parts in found]
            assert shapes == [parcel.shapes for parcel in parcels]
            return found

        return wait

    def work(rank: int) -> None:
        meeting: Any = SimpleNamespace(context=SimpleNamespace(rank=rank, size=size), wait=lambda: None)
        rounds = _Rounds(meeting, (True,) * len(chains), chains)
        if backwards:
            rounds.leave_again(tuple(terms[rank]))
            results[rank] = rounds.come_again(())
        else:
            rounds.leave(tuple(terms[rank]))
            results[rank] = rounds.come()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "begin_all_to_all", send)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


@given(data=st.data(), size=st.integers(1, 11))
def test_sums_are_of_the_tokens_of_a_sequence_in_other_processes(data: Any, size: int) -> None:
    """Sequences of any lengths, some empty, as are slices; and gradients are those of these sums."""
    total = data.draw(st.integers(0, 14))
    place = st.integers(0, total)
    bounds = (0, *sorted(data.draw(st.lists(place, max_size=4))), total)
    ends = [0, *sorted(data.draw(place) for _ in range(size - 1)), total]
    cuts = Cuts(bounds, tuple(pairwise(ends)), True)
    sequence = [sum(b <= t for b in bounds) for t in range(total)]
    # By chain and process, which tokens the sum must be of, and which the term is of.
    expected, terms = torch.zeros(2, size, total), torch.zeros(2, size, total)
    matters = torch.zeros(2, size, dtype=torch.bool)
    for rank, (start, stop) in enumerate(cuts.slices):
        for chain, (border, others) in enumerate(((start, range(start)), (stop - 1, range(stop, total)))):
            if start < stop:
                matters[chain, rank] = True
                expected[chain, rank, [t for t in others if sequence[t] == sequence[border]]] = 1
                # Of what goes on to those behind: of the last sequence; before: of the first one.
                far = stop - 1 if chain == 0 else start
                terms[chain, rank, [t for t in range(start, stop) if sequence[t] == sequence[far]]] = 1
    chains = (cuts.before, cuts.behind)
    found = in_threads(chains, [[terms[0, rank], terms[1, rank]] for rank in range(size)], False)
    for rank in range(size):
        for chain in range(2):
            if matters[chain, rank]:
                assert torch.equal(found[rank][chain], expected[chain, rank])
    # The sums are a matrix times the terms, and gradients its transpose times theirs.
    eye = torch.eye(size)
    matrix = in_threads(chains, [[eye[rank]] * 2 for rank in range(size)], False)
    transposed = in_threads(chains, [[eye[rank]] * 2 for rank in range(size)], True)
    for chain in range(2):
        one, other = (torch.stack([x[chain] for x in both]) for both in (matrix, transposed))
        assert torch.equal(one, other.T)

"""The window and the sequences of a mask of unknown make, found in what it lets every query see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .description import _Pattern, _Place, _Runs

# The largest number of elements of a block, when a mask is compared to what flashgau would compute.
_BLOCK = 2**22


class _Seen(NamedTuple):
    """What every query sees of its row, (B, M) each: keys first .. end - 1, and whether that is without gaps."""

    first: Tensor
    end: Tensor
    whole: Tensor


def _measured(
    theirs: Callable[[int, int], Tensor], runs: _Runs, packable: bool, place: _Place
) -> tuple[_Pattern, Tensor | None]:
    """The window and the sequences of a mask, found in what it says: `theirs(first query, number)` is (B, number, N).

    What a query sees is an interval, or flashgau cannot compute it. Its ends tell where sequences meet (at tokens that
    do not see each other), and how far the window reaches; both are then held against every interval, so that nothing
    is taken on trust. Queries that are padding count only where positions do not matter.

    Returns:
        The pattern, and (B, M), whether a packed sequence begins there; None without packing.

    Raises:
        ValueError: for a mask that is not of this kind.
    """
    seen = _intervals(theirs, place)
    at = torch.arange(place.queries, device=place.device) + place.shift
    start, stop = (x[:, None].expand(-1, place.queries) for x in (runs.first, runs.end))
    token = (at >= start) & (at < stop)
    borders = torch.zeros_like(token)
    if packable and place.queries > 1:
        back = (seen.first[:, 1:] < at[1:]) & (at[:-1] < seen.end[:, 1:])  # a token sees the one before it
        ahead = (seen.first[:, :-1] < at[1:]) & (at[1:] < seen.end[:, :-1])
        borders = nn.functional.pad(~(back | ahead), (1, 0), value=True)
        start = torch.where(borders, at, 0).cummax(1).values
        behind = nn.functional.pad(borders[:, 1:], (0, 1), value=True)  # the next token begins a sequence
        stop = torch.where(behind, at + 1, place.keys).flip(1).cummin(1).values.flip(1)

    def reach(distance: Tensor) -> Tensor:
        return torch.where(token, distance, 0).flatten().max().clamp(min=0) if token.numel() else at.new_zeros(())

    reaches: dict[str, Any] = {
        "open": None,
        "none": at.new_zeros(()),
        "left": reach(at - seen.first),
        "right": reach(seen.end - 1 - at),
    }
    sides = [
        ("open", "open"),
        ("open", "none"),
        ("left", "none"),
        ("left", "open"),
        ("open", "right"),
        ("left", "right"),
    ]
    fits = []
    for left, right in ((reaches[x], reaches[y]) for x, y in sides):
        first = start if left is None else torch.maximum(start, at - left)
        end = stop if right is None else torch.minimum(stop, at + right + 1)
        fit = seen.whole & (seen.first == first) & (seen.end == end)
        # Where positions do not matter a query need not be a token.
        fits.append((fit if left is None and right is None else fit | ~token).all())
    told = torch.stack([reaches["left"], reaches["right"], borders[:, 1:].any(), *fits]).tolist()  # the one wait
    numbers = {"open": None, "none": 0, "left": told[0], "right": told[1]}
    patterns = [_Pattern(numbers[x], numbers[y]) for x, y in sides]
    packing = borders if told[2] else None
    for pattern, fit in zip(patterns, told[3:], strict=True):
        if fit:
            return pattern, packing
    choices = [(pattern, cut) for cut in ((None,) if packing is None else (packing, None)) for pattern in patterns]
    _refuse(choices, theirs, runs, place)


def _intervals(theirs: Callable[[int, int], Tensor], place: _Place) -> _Seen:
    """The intervals of keys that a mask lets its queries see, in blocks of queries."""
    parts = []
    rows = max(1, _BLOCK // max(1, place.batch * place.keys))
    for i in range(0, place.queries if place.keys else 0, rows):
        visible = theirs(i, min(rows, place.queries - i)).to(torch.uint8)
        number, first = visible.sum(-1), visible.argmax(-1)
        end = torch.where(number > 0, place.keys - visible.flip(-1).argmax(-1), 0)
        parts.append((first, end, number == end - first))
    if not parts:
        none = torch.zeros(place.batch, place.queries, dtype=torch.int64, device=place.device)
        return _Seen(none, none, none == 0)
    return _Seen(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))


def _refuse(
    choices: list[tuple[_Pattern, Tensor | None]], theirs: Callable[[int, int], Tensor], runs: _Runs, place: _Place
) -> NoReturn:
    """Say how the mask differs from the nearest that flashgau has, and where first."""
    key = torch.arange(place.keys, device=place.device)
    first, end = runs.first[:, None, None], runs.end[:, None, None]
    rows = max(1, _BLOCK // max(1, place.batch * place.keys))

    def differences(choice: tuple[_Pattern, Tensor | None], i: int, visible: Tensor) -> Tensor:
        pattern, borders = choice
        at = torch.arange(i, i + visible.shape[1], device=place.device)[:, None] + place.shift
        ours = (key >= first) & (key < end)
        if pattern.left is not None:
            ours = ours & (key >= at - pattern.left)
        if pattern.right is not None:
            ours = ours & (key <= at + pattern.right)
        if borders is not None:
            sequence = borders.cumsum(1)
            ours = ours & (sequence[:, i : i + visible.shape[1], None] == sequence[:, None])
        differs = ours != visible
        return differs & (at >= first) & (at < end) if pattern.self_attention else differs

    wrong = torch.zeros(len(choices), dtype=torch.int64, device=place.device)
    for i in range(0, place.queries, rows):
        visible = theirs(i, min(rows, place.queries - i))
        wrong += torch.stack([differences(choice, i, visible).sum() for choice in choices])
    numbers = wrong.tolist()
    nearest = choices[numbers.index(min(numbers))]
    for i in range(0, place.queries, rows):
        visible = theirs(i, min(rows, place.queries - i))
        found = differences(nearest, i, visible).nonzero()
        if len(found):
            row, query, seen = found[0].tolist()
            sees = "sees" if bool(visible[row, query, seen]) else "does not see"
            break
    raise ValueError(
        f"flashgau: the model's mask is not one of sequences and a window: as {nearest[0]} attention it would differ "
        f"at {min(numbers)} places, first in row {row}, where query {i + query} {sees} key {seen}. Expected "
        "causal, bidirectional, windowed or packed sequences, without blocks of another kind (images, prefixes, "
        "chunks, mask functions of your own); attn_implementation='sdpa' or 'eager' can compute it"
    )

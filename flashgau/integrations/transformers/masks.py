"""The mask function: finds the sequences and the window of which the mask of a model consists."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import pytorch
from .description import _LENGTHS, _describe, _encode, _Pattern, _Place, _Runs, _short
from .intervals import _measured


def _attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """The mask function that `register_attention` registers: called by transformers, once per forward.

    Finds the sequences and the window of which `mask_function` and the padding consist. transformers' own patterns
    are known by comparing functions; all others are evaluated in blocks, and what they let every query see decides,
    whichever function made them.

    Args:
        batch_size: rows of the batch, B.
        q_length: queries per row, M.
        kv_length: keys per row, N, unused slots of a static cache included.
        q_offset: position of the first query, an int or a tensor of one.
        kv_offset: position of the first key.
        mask_function: (b, h, q, k) -> whether query position q of row b sees key position k; causal unless given.
        attention_mask: (B, positions), true or 1 for valid tokens.
        local_size: the window of the model, if this mask has one.
        use_vmap: whether `mask_function` must be evaluated through vmap.
        device: of the result.
        options: what other implementations are told.

    Returns:
        int64 (1, L, 1, 1), to be read by `_attention_forward` only.

    Raises:
        ValueError: for a mask that is not sequences and a window: what it lets which query see is named.
    """
    masking = importlib.import_module("transformers.masking_utils")
    function = masking.causal_mask_function if mask_function is None else mask_function
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.reshape(())  # (1,) in older versions of transformers
    shift = q_offset - kv_offset  # query i stands where key i + shift does
    place = _Place(batch_size, q_length, kv_length, shift, device)
    if torch.compiler.is_exporting():
        return _describe(*_traced(masking, function, local_size, attention_mask, kv_offset, place), None, place)
    if local_size == 0 and _same(function, masking.sliding_window_causal_mask_function(0)):
        # Qwen2-MoE without windows makes such masks, for layers that it does not have. Nothing is seen, all gives 0.
        return _encode(_LENGTHS, _Pattern(None, 0), place, torch.zeros(batch_size, dtype=torch.int64, device=device))
    runs = _runs(attention_mask, q_offset, kv_offset, place)
    pattern, borders = _known(masking, function, local_size), None
    if pattern is None:
        theirs = functools.partial(
            masking.sdpa_mask, batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=function,
            attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        packable = attention_mask is None and isinstance(shift, int) and shift == 0 and q_length == kv_length
        pattern, borders = _measured(
            lambda i, n: theirs(q_length=n, q_offset=q_offset + i)[:, 0], runs, packable, place
        )
    return _describe(pattern, runs, borders, place)


def _known(masking: Any, function: Any, size: int | None) -> _Pattern | None:
    """The pattern of a function that transformers makes itself, with the window that it names; None for others."""
    patterns = {
        _Pattern(None, None): masking.bidirectional_mask_function,
        _Pattern(None, 0): masking.causal_mask_function,
    }
    if isinstance(size, int) and size >= 1:
        patterns[_Pattern(size - 1, 0)] = masking.sliding_window_causal_mask_function(size)
        patterns[_Pattern(size, size)] = masking.sliding_window_bidirectional_mask_function(size)
    return next((pattern for pattern, theirs in patterns.items() if _same(function, theirs)), None)


def _runs(mask: Tensor | None, q_offset: int | Tensor, kv_offset: int, place: _Place) -> _Runs:
    """Where the tokens of each row are; a mask with holes is refused.

    Waits for the device, once, if there is a mask.
    """
    zero = torch.zeros(place.batch, dtype=torch.int64, device=place.device)
    if mask is None or not mask.numel() or not place.keys:
        return _Runs(zero, zero + place.keys, False, True, False)
    runs, holes = _extents(mask, kv_offset, place)
    short = torch.as_tensor(q_offset + place.queries > mask.shape[1], device=mask.device)
    padded = (runs.end - runs.first < place.keys).any()
    told = torch.stack([holes.any(), padded, (runs.first == 0).all(), short]).tolist()  # the one wait
    if told[0]:
        row = int(holes.int().argmax())
        raise ValueError(
            f"flashgau: `attention_mask` is {_short(mask[row].int().tolist())} in row {row}, with a hole; expected one "
            "run of valid tokens in every row, padded on the left, on the right or on both sides"
        )
    return _Runs(runs.first, runs.end, *told[1:])


def _extents(mask: Tensor, kv_offset: int, place: _Place) -> tuple[_Runs, Tensor]:
    """The runs of tokens without what the host would have to wait for, and which rows have holes."""
    valid = mask[:, kv_offset : kv_offset + place.keys].bool()
    valid = nn.functional.pad(valid, (0, place.keys - valid.shape[1]))  # slots of the cache that are not used yet
    first = valid.int().argmax(1)
    end = first + valid.sum(1)
    key = torch.arange(place.keys, device=valid.device)
    holes = (valid != (key >= first[:, None]) & (key < end[:, None])).any(1)
    return _Runs(first, end, True, False, False), holes


def _same(f: Any, g: Any) -> bool:
    """Whether two functions are the same code over the same values."""
    if isinstance(f, types.FunctionType) and isinstance(g, types.FunctionType):
        cells = [[cell.cell_contents for cell in h.__closure__ or ()] for h in (f, g)]
        return f is g or (
            f.__code__ is g.__code__
            and f.__globals__ is g.__globals__
            and f.__defaults__ == g.__defaults__
            and f.__kwdefaults__ == g.__kwdefaults__
            and _same(*map(tuple, cells))
        )
    if isinstance(f, tuple) and isinstance(g, tuple):
        return len(f) == len(g) and all(map(_same, f, g))
    return f is g or (type(f) is int and type(g) is int and f == g)


def _traced(
    masking: Any, function: Any, size: int | None, mask: Tensor | None, kv_offset: int, place: _Place
) -> tuple[_Pattern, _Runs]:
    """The pattern and the tokens of a mask inside torch.export, which has no values.

    What an exported model does is fixed, so what would be looked at becomes an assertion of the exported graph: that
    `position_ids` are those of one sequence (transformers cannot tell either, and makes a mask for packed ones), and
    that padding leaves one run of tokens.

    Raises:
        ValueError: for a mask function that only its values could tell.
    """
    pattern = _known(masking, function, size)
    if pattern is None:
        function, sequence = _unpacked(masking, function)
        pattern = _known(masking, function, size)
        if pattern is not None:
            _assert((sequence == sequence[:, :1]).all(), "`position_ids` pack several sequences into a row")
    if pattern is None:
        raise ValueError(
            "flashgau: torch.export has no values, by which alone this model's mask could be told; expected a causal, "
            "bidirectional or windowed mask as transformers makes it. attn_implementation='sdpa' can be exported"
        )
    zero = torch.zeros(place.batch, dtype=torch.int64, device=place.device)
    if mask is None:
        return pattern, _Runs(zero, zero + place.keys, False, True, False)
    runs, holes = _extents(mask, kv_offset, place)
    _assert(~holes.any(), "`attention_mask` has a hole between valid tokens")
    return pattern, runs


def _unpacked(masking: Any, function: Any) -> tuple[Any, Any]:
    """The mask function within one that also separates sequences packed by `position_ids`, and their numbers."""
    packed, both = masking.packed_sequence_mask_function(None), masking.and_masks(abs)
    parts = _cells(function).get("mask_functions", ()) if _code(function) is both.__code__ else ()
    numbers = [_cells(part)["packed_sequence_mask"] for part in parts if _code(part) is packed.__code__]
    others = [part for part in parts if _code(part) is not packed.__code__]
    if len(numbers) != 1 or len(others) != 1:
        return None, None
    remap = getattr(masking, "remap_positions_for_packed_sequence", None)  # not in older versions
    if remap is not None and _code(others[0]) is remap(None, None).__code__:
        others = [_cells(others[0])["mask_function"]]
    return others[0], numbers[0]


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _cells(function: Any) -> dict[str, Any]:
    """What a function has kept from the one that made it."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _assert(condition: Tensor, what: str) -> None:
    """Let the exported graph stop where this is not so."""
    if pytorch.assert_in_graph is None:
        raise ValueError(f"flashgau: {what}; with this PyTorch no exported graph can check that. 'sdpa' exports")
    pytorch.assert_in_graph(
        condition, f"flashgau: {what}; the model was exported without: expected the kind of input it was exported for"
    )

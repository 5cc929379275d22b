"""`flashgau.attention` and `flashgau.glu` inside the models of Hugging Face transformers (5.5 or later).

transformers asks for attention in two places. Once per forward a *mask function* describes which keys every query
sees; in every layer an *attention function* gets that description with queries, keys and values. What flashgau
computes is "query at position p sees the keys p - left .. p + right of its own sequence", so the mask function's work
is to cut the batch into sequences: a batch is laid end to end as one packed row, in which padding and unused slots of
a cache are sequences of their own, with keys but without queries, or the reverse. No token is gathered or moved.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

import flashgau

from .. import pytorch
from .packing import end_to_end

__all__ = ["patch_glu", "register_attention"]

_OLDEST = (5, 5)

# A mask as it travels through a model: an int64 tensor (1, L, 1, 1), since a mask of four axes is what transformers
# hands on untouched. Its first numbers are _HEADER; the rest is `lengths`, or cu_seqlens of queries and of keys, and
# zeros. It stands on the axis of heads, longer than any model has heads: where a model adds its mask to scores by
# itself, however it slices it before, the shapes do not fit.
_HEADER, _LONGER_THAN_HEADS = 8, 1024
_MAGIC = 0x666C617368676175  # "flashgau" in ASCII: tells our tensors from a mask that a user made
_PLAIN, _LENGTHS, _PACKED = range(3)
_UNBOUNDED = -1
_OFFSETS = (torch.int32, torch.int64)
_FACTS, _AGREES = "_flashgau_facts", "_flashgau_agrees"

# The largest number of elements of a block, when a mask is compared to what flashgau would compute.
_BLOCK = 2**22

# Arguments of a model that travel down to its attention and change nothing there. What is not among them is refused.
_HARMLESS = {
    "cache_position", "deterministic", "labels", "layer_idx", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict", "seq_idx",
    "use_cache",
}  # fmt: skip


class _Facts(NamedTuple):
    """What a mask says that must be known on the host: the layers read it without waiting for the device."""

    kind: int
    left: int
    right: int
    batch: int
    queries: int
    keys: int
    sequences: int


class _Pattern(NamedTuple):
    """Keys [p - left, p + right] of the same sequence; None is unbounded."""

    left: int | None
    right: int | None

    def __str__(self) -> str:
        kind = {0: "causal", None: "bidirectional"}.get(self.right, f"{self.right} keys ahead")
        return kind if self.left is None else f"{kind} with {self.left} keys back"

    @property
    def self_attention(self) -> bool:
        """Whether positions matter: then query i is itself a token of the keys, and may be padding."""
        return self != (None, None)


def register_attention(name: str = "FlashGAU") -> str:
    """Make `attn_implementation=name` run `flashgau.attention` in models of transformers.

    Registers an attention function and a mask function with transformers, for this process. Grouped queries, sliding
    windows, softcap, sinks, attention dropout, left and right padding, dynamic and static caches and sequences
    packed by `position_ids` are computed exactly; whatever else would change the result is refused by name. Output
    rows of padding are 0. `docs/transformers.md` has the details.

    Registering twice is harmless. transformers takes every implementation whose name contains "flash" (in lower
    case) for flash-attn: it looks for that package, and models leave masking to it. Such names are refused, hence
    the capitals.

    Args:
        name: of letters, digits and underscores, and not one that transformers has or treats specially.

    Returns:
        The name.

    Raises:
        ImportError: without transformers 5.5 or later.
        TypeError, ValueError: for a name that is not a string, or is taken or special.

    Example:
        >>> from flashgau.integrations.transformers import register_attention
        >>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register_attention()) # doctest: +SKIP
    """
    if not isinstance(name, str):
        raise TypeError(f"register_attention: `name` is {name!r}; expected a string")
    special = [word for word in ("flash", "sdpa", "flex_attention", "eager", "paged") if word in name]
    if special or not name.isidentifier():
        reason = f"contains {special[0]!r}, to which transformers gives a meaning" if special else "is not one word"
        raise ValueError(
            f"register_attention: `name` is {name!r}, which {reason}; expected letters, digits and underscores, "
            "such as 'FlashGAU'"
        )
    transformers = _transformers()
    attention, mask = transformers.AttentionInterface, transformers.AttentionMaskInterface
    if (name in attention() or name in mask()) and attention().get(name) is not _attention_forward:
        raise ValueError(f"register_attention: `name` is {name!r}, which is registered already; expected another name")
    attention.register(name, _attention_forward)
    reason = "flashgau finds the sequences of a mask in its values; torch.export needs strict=False"
    mask.register(name, torch.compiler.disable(_attention_mask, reason=reason))
    return name


# Masks


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


class _Place(NamedTuple):
    """Sizes of a batch: query i of a row stands where key i + shift does."""

    batch: int
    queries: int
    keys: int
    shift: int | Tensor
    device: torch.device | str

    @property
    def aligned(self) -> bool:
        """Whether the last query stands at the last key, as far as the host knows."""
        return isinstance(self.shift, int) and self.shift + self.queries == self.keys


class _Runs(NamedTuple):
    """The keys of each row that are tokens: first .. end - 1, two tensors (B,); and what the host knows of them."""

    first: Tensor
    end: Tensor
    padded: bool
    on_the_right_only: bool
    too_short: bool


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


def _describe(pattern: _Pattern, runs: _Runs, borders: Tensor | None, place: _Place) -> Tensor:
    """The tensor that says `pattern` within the sequences that padding, cache and packing leave."""
    if borders is not None:
        starts = torch.cat([borders.flatten().nonzero()[:, 0], runs.end.new_full((1,), borders.numel())])
        return _encode(_PACKED, pattern, place, starts, starts)
    if not pattern.self_attention:
        if not runs.padded:
            return _encode(_PLAIN, pattern, place)
        if runs.on_the_right_only and place.queries != place.keys:  # equal lengths would hide queries as well
            return _encode(_LENGTHS, pattern, place, runs.end)
        skipped, number, seen = (
            torch.zeros_like(runs.end),
            torch.full_like(runs.end, place.queries),
            runs.end - runs.first,
        )
        return _encode(_PACKED, pattern, place, *_packed(skipped, number, runs.first, seen, place))

    if runs.too_short:
        raise ValueError(
            "flashgau: `attention_mask` ends before the last query; expected it to cover the new tokens, too"
        )
    if pattern.right != 0 and not place.aligned:
        raise ValueError(
            f"flashgau: {place.queries} queries beside {place.keys} keys in a mask that is {pattern}; expected the "
            "last query to stand at the last key"
        )
    if isinstance(place.shift, int) and place.shift + place.queries > place.keys:
        raise ValueError(
            f"flashgau: query {place.queries - 1} stands at key {place.shift + place.queries - 1} of {place.keys}"
        )
    if place.aligned and not runs.padded:
        return _encode(_PLAIN, pattern, place)
    if place.aligned and place.queries == place.keys and runs.on_the_right_only:
        return _encode(_LENGTHS, pattern, place, runs.end)
    start, stop = runs.first.clamp(min=place.shift), runs.end.clamp(max=place.shift + place.queries)
    number = (stop - start).clamp(min=0)  # queries that are tokens
    some = number > 0
    skipped, seen = torch.where(some, start - place.shift, 0), torch.where(some, stop - runs.first, 0)
    return _encode(_PACKED, pattern, place, *_packed(skipped, number, runs.first, seen, place))


def _packed(skipped: Tensor, number: Tensor, first: Tensor, seen: Tensor, place: _Place) -> tuple[Tensor, Tensor]:
    """cu_seqlens of queries and keys, all rows end to end: in each row `number` queries that see `seen` keys, and
    the others before and after them, apart."""
    none = torch.zeros_like(number)
    return end_to_end(
        (skipped, none),
        (none, first),
        (number, seen),
        (place.queries - skipped - number, none),
        (none, place.keys - first - seen),
    )


class _Mask(Tensor):
    """A mask that says what it is to a model that computes with it: adds it to scores, or asks which keys are 0."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling() and (name := function.__name__.strip("_")) in _ARITHMETIC:
            raise ValueError(
                f"flashgau: this model computes with its attention mask by itself ({name}), which is flashgau's own "
                "description of sequences and no matrix (B, H, M, N); expected a model that hands its mask to the "
                "attention interface of transformers as it is, and adds no bias to it (relative positions, dynamic "
                "masks). attn_implementation='sdpa' or 'eager' can compute it"
            )
        with pytorch.without_subclasses():
            result = function(*args, **(kwargs or {}))
            # A slice or a copy still is a mask; what is read from it is not.
            return result.as_subclass(cls) if isinstance(result, Tensor) and result.ndim == 4 else result

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()


_ARITHMETIC = {
    "add", "bitwise_and", "bitwise_not", "bitwise_or", "div", "eq", "floordiv", "ge", "gt", "invert", "le",
    "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "mul", "ne", "neg", "radd", "rmul", "rsub", "sub",
    "truediv", "where", "and", "or", "rand", "ror",
}  # fmt: skip


def _encode(kind: int, pattern: _Pattern, place: _Place, *data: Tensor) -> Tensor:
    """Facts and data in one tensor, so that whatever moves or keeps the mask moves and keeps them all."""
    left, right = (_UNBOUNDED if side is None else side for side in pattern)
    sequences = data[0].shape[0] if data else 0
    facts = _Facts(kind, left, right, place.batch, place.queries, place.keys, sequences)
    header = torch.tensor([_MAGIC, *facts], dtype=torch.int64).to(place.device)
    numbers = torch.cat([header, *(x.to(torch.int64) for x in data)])
    mask = nn.functional.pad(numbers, (0, max(0, _LONGER_THAN_HEADS - len(numbers))))[None, :, None, None]
    # torch.export knows tensors of its own kind only.
    if pytorch.without_subclasses is not None and not torch.compiler.is_exporting():
        mask = mask.as_subclass(_Mask)
    setattr(mask, _FACTS, tuple(facts))
    return mask


def _facts(mask: Any) -> _Facts:
    """What the host must know of a mask; a copy of it that lost this (on another device) is read, which waits."""
    known = getattr(mask, _FACTS, None)
    if known is None:
        ours = isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.shape == (1, mask.numel(), 1, 1)
        values = mask.flatten()[:_HEADER].tolist() if ours and mask.numel() >= _LONGER_THAN_HEADS else [0]
        if values[0] != _MAGIC:
            what = (
                f"a {mask.dtype} tensor of shape {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else type(mask).__name__
            )
            raise ValueError(
                f"flashgau: `attention_mask` of a layer is {what}; expected what flashgau's own mask function made, "
                "from a mask (B, N) of valid tokens or none. Masks of four axes, and models that make masks without "
                "transformers' masking_utils, need attn_implementation='sdpa' or 'eager'"
            )
        known = tuple(values[1:])
        setattr(mask, _FACTS, known)
    return _Facts(*known)


# Attention


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register_attention` registers: called by the layers of a model.

    What a query sees is in `attention_mask` alone, as in transformers' eager attention. Only without one (vision
    models) does `is_causal`, or else `module.is_causal`, decide.

    Args:
        module: the layer.
        query: (B, Hq, M, D).
        key: (B, Hkv, N, D), Hq a multiple of Hkv.
        value: (B, Hkv, N, E).
        attention_mask: what `_attention_mask` returned, or None.
        dropout: probability that an element of the attention matrix is dropped; layers pass 0 unless they train.
        scaling: factor of the scores, 1/sqrt(D) unless given.
        is_causal: without a mask, whether to hide the keys that follow a query.
        softcap: bound of the scores.
        s_aux: (Hq,) sinks: an extra logit per head in the softmax's denominator.
        sliding_window: the layer's window; it is in the mask already.
        cu_seq_lens_q: (G+1,) sequences packed in one row, as a data collator gives them. They must be the mask's.
        cu_seq_lens_k: the same of the keys.
        options: what else the model was called with; refused unless it is None or changes nothing here.

    Returns:
        (B, M, Hq, E), and None for the attention matrix, which is never formed.

    Raises:
        ValueError: for an option or a mask that would change the result and that flashgau does not have.
    """
    if options.pop("output_attentions", None):
        raise ValueError("flashgau: `output_attentions` is True; expected False, since the matrix is never formed")
    unknown = [name for name, x in options.items() if x is not None and name not in _HARMLESS]
    if unknown:
        raise ValueError(
            f"flashgau: the layer {type(module).__name__} passes {', '.join(map(repr, unknown))} to its attention; "
            "expected nothing that flashgau does not know. attn_implementation='sdpa' or 'eager' may take it"
        )
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    if attention_mask is None:
        facts = _without_mask(module, query, keys, is_causal, sliding_window)
    else:
        facts = _facts(attention_mask)
        if (facts.queries, facts.keys) != (queries, keys) or (facts.batch != batch and facts.kind != _PLAIN):
            raise ValueError(
                f"flashgau: `attention_mask` is for B = {facts.batch}, M = {facts.queries}, N = {facts.keys}; "
                f"expected the layer's B = {batch}, M = {queries}, N = {keys}"
            )
    left, right = (None if side == _UNBOUNDED else side for side in (facts.left, facts.right))
    if s_aux is not None and s_aux.dtype not in (torch.float32, query.dtype):
        s_aux = s_aux.float()
    lengths, q_ends, k_ends = _sequences(facts, attention_mask, query, cu_seq_lens_q, cu_seq_lens_k)
    if q_ends is not None:
        query, key, value = _end_to_end(query), _end_to_end(key), _end_to_end(value)
    out = flashgau.attention(
        query, key, value, causal=right == 0, window=(left, right), scale=scaling, softcap=softcap, sinks=s_aux,
        lengths=lengths, cu_seqlens=q_ends, cu_seqlens_k=k_ends, dropout_p=float(dropout),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    if q_ends is not None:
        return out[0].transpose(0, 1).unflatten(0, (batch, queries)), None
    return out.transpose(1, 2), None


def _end_to_end(x: Tensor) -> Tensor:
    """(B, H, L, D) -> (1, H, B*L, D): a view of a tensor that lies as (B, L, H, D), as a projection leaves it."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _without_mask(module: nn.Module, query: Tensor, keys: int, is_causal: bool | None, window: int | None) -> _Facts:
    """What a layer that was given no mask means: everything, or the keys up to the query."""
    batch, _, queries, _ = query.shape
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise ValueError(
            f"flashgau: the layer {type(module).__name__} gives neither a mask nor `is_causal`; expected one of them"
        )
    if window is not None and window < max(queries, keys):
        raise ValueError(f"flashgau: `sliding_window` is {window} without a mask; expected a mask that has the window")
    if queries == 1 or not causal:
        return _Facts(_PLAIN, _UNBOUNDED, _UNBOUNDED, batch, queries, keys, 0)
    if queries != keys:
        raise ValueError(
            f"flashgau: {queries} queries and {keys} keys with `is_causal` and without a mask; expected equal numbers, "
            "or a mask that says where the queries stand"
        )
    return _Facts(_PLAIN, _UNBOUNDED, 0, batch, queries, keys, 0)


def _sequences(
    facts: _Facts, mask: Tensor | None, query: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`lengths`, `cu_seqlens` and `cu_seqlens_k` for `flashgau.attention`."""
    cu_q, cu_k = (x.long() if x is not None and x.dtype not in _OFFSETS else x for x in (cu_q, cu_k))
    given = cu_q is not None or cu_k is not None
    if given and (cu_q is None or cu_k is None):
        raise ValueError("flashgau: one of `cu_seq_lens_q` and `cu_seq_lens_k` is None; expected both or neither")
    if mask is None or facts.kind == _PLAIN:
        if given and facts.batch != 1:
            raise ValueError(f"flashgau: `cu_seq_lens_q` with a batch of {facts.batch}; expected one packed row")
        return None, cu_q, cu_k
    data = mask.flatten()[_HEADER:].to(query.device)[: 2 * facts.sequences]
    if facts.kind == _LENGTHS:
        if given:
            raise ValueError("flashgau: `cu_seq_lens_q` with padding in `attention_mask`; expected one of them")
        return data[: facts.sequences], None, None
    ours = data[: facts.sequences], data[facts.sequences :]
    if given and getattr(mask, _AGREES, None) is not cu_q:
        for name, theirs, x in zip(("cu_seq_lens_q", "cu_seq_lens_k"), (cu_q, cu_k), ours, strict=True):
            assert theirs is not None
            if not torch.equal(theirs.unique_consecutive().to(x), x.unique_consecutive()):
                raise ValueError(
                    f"flashgau: `{name}` is {_short(theirs.tolist())}, but position_ids and attention_mask say "
                    f"{_short(x.unique_consecutive().tolist())}; expected the same sequences"
                )
        setattr(mask, _AGREES, cu_q)  # the next layers need not wait for the same answer
    return None, *ours


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:8]))}, ..., {values[-1]}]"


# Gated feed-forwards


class _Form(NamedTuple):
    """Names that a gated feed-forward gives to its parts; `up` is None where one projection makes [gate | up]."""

    gate: str
    up: str | None
    down: str
    activation: tuple[str, ...]
    dropout: tuple[str, ...] = ()


_FORMS = (
    _Form("gate_proj", "up_proj", "down_proj", ("act_fn", "activation_fn", "act")),  # Llama and most others
    _Form("gate_up_proj", None, "down_proj", ("activation_fn", "act_fn", "act")),  # Phi-3, GLM
    _Form("wi_0", "wi_1", "wo", ("act",), ("dropout",)),  # T5 v1.1, mT5, UMT5
    _Form("w1", "w3", "w2", ("act_fn", "act")),  # as in the published code of Llama
    _Form("Wi", None, "Wo", ("act",), ("drop",)),  # ModernBERT
    _Form("weights_in", None, "weights_out", ("act",)),  # DINOv2
)
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity")


def patch_glu(model: nn.Module) -> list[str]:
    """Let the gated feed-forwards of a model of transformers run through flashgau, in place.

    A module keeps its class, parameters, state dict, hooks and dtypes; its `forward` alone is replaced: by
    `flashgau.glu_linear` where both projections are plain `torch.nn.Linear` (looked up at every call: no hooks,
    adapters, quantisation or sharding), else by its own projections and `flashgau.glu`. `del module.forward` undoes it.

    What a module computes is not inferred from its class's name. Its class's own forward is run, in fp64, on a copy
    whose projections are small and random, over inputs from 0.01 to 1000, in evaluation and in training, and must
    equal the new one to 1e-10 with one of flashgau's activations; so clipped or scaled variants are left alone.
    Neither the model's weights nor its hooks take part, and weights may be on the meta device.

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202).

    Args:
        model: any module; the feed-forwards are found among its submodules.

    Returns:
        The names of all patched modules, in the order of `model.named_modules()`; the same when called again.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if there is nothing to patch.

    Warns:
        UserWarning: names gated feed-forwards that are left alone because flashgau does not have their activation, or
            because their forward has been replaced by somebody else.

    Example:
        >>> import torch
        >>> from flashgau.integrations.transformers import patch_glu
        >>> class MLP(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_proj, self.up_proj = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
        ...         self.down_proj, self.act_fn = torch.nn.Linear(16, 8), torch.nn.SiLU()
        ...     def forward(self, x):
        ...         return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        >>> patch_glu(torch.nn.Sequential(MLP(), torch.nn.ReLU()))
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_glu: `model` is a {type(model).__name__}; expected a torch.nn.Module")
    patched, foreign, replaced = [], [], []
    for name, module in model.named_modules():
        form = _form_of(module)
        if form is None:
            continue
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func is _gated_forward:
            patched.append(name)
            continue
        activation, gated = _activation_of(module, form)
        if not gated:
            continue
        if forward is not None:
            replaced.append(name)
        elif activation is None:
            foreign.append(f"{name} ({_activation_name(module, form)})")
        else:
            # Not a bound method: a partial of a module-level function can be pickled and deep-copied with its module.
            module.forward = functools.partial(_gated_forward, module, form, activation)
            patched.append(name)
    if foreign:
        _warn(f"left alone, since flashgau does not have their activation: {', '.join(foreign)}")
    if replaced:
        _warn(f"left alone, since their forward has been replaced by other code: {', '.join(replaced)}")
    if not patched:
        forms = "; ".join(", ".join(filter(None, form[:3])) for form in _FORMS)
        raise ValueError(
            f"patch_glu: nothing to patch in {type(model).__name__}; expected submodules that compute "
            f"down(activation(gate(x)) * up(x)) with projections named {forms}, and an activation among "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return patched


def _warn(message: str) -> None:
    warnings.warn(f"patch_glu: {message}", UserWarning, stacklevel=3)


def _form_of(module: nn.Module) -> _Form | None:
    """The form whose parts are exactly the module's children."""
    children = {name for name, _ in module.named_children()}
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return None
    for form in _FORMS:
        parts = {part for part in form[:3] if isinstance(part, str)}
        if parts <= children and children - parts <= {*form.activation, *form.dropout}:
            return form
    return None


def _activation_name(module: nn.Module, form: _Form) -> str:
    return type(_named(module, form.activation)).__name__


def _named(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The first of the attributes that the module has, or None."""
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def _activation_of(module: nn.Module, form: _Form) -> tuple[str | None, bool]:
    """The activation with which the new forward equals the old one, and whether the module is such a gated unit at
    all, if only with an activation that flashgau does not have."""
    try:
        with torch.device("cpu"):  # also where the caller makes everything on another
            small = _small(module, form)
            for activation in _ACTIVATIONS:
                if _agree(small, form, activation):
                    return activation, True
            for name in form.activation:  # would it agree if its activation were another?
                if callable(getattr(small, name, None)):
                    if isinstance(getattr(small, name), nn.Module):
                        delattr(small, name)
                    object.__setattr__(small, name, nn.functional.silu)
                    return None, _agree(small, form, "silu")
    except Exception:  # whatever a forward of unknown kind raises on such a copy, it is not the one looked for
        return None, False
    return None, False


def _small(module: nn.Module, form: _Form) -> nn.Module:
    """A module of the same class and settings on the CPU, with random projections 6 -> 10 -> 6 in fp64."""
    small = module.__class__.__new__(module.__class__)
    nn.Module.__init__(small)
    internal = set(small.__dict__)
    small.__dict__.update({k: v for k, v in module.__dict__.items() if k not in internal and k != "forward"})
    width = 10 if form.up else 20
    sizes = {form.gate: (6, width), form.up or form.gate: (6, width), form.down: (10, 6)}
    generator = torch.Generator().manual_seed(0)
    for name, child in module.named_children():
        if name not in sizes:
            small.add_module(name, copy.deepcopy(child))
            continue
        bias = getattr(child, "bias", None) is not None
        linear = nn.Linear(*sizes[name], bias=bias, device="meta", dtype=torch.float64).to_empty(device="cpu")
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator)
        small.add_module(name, linear)
    return small


def _agree(small: nn.Module, form: _Form, activation: str) -> bool:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 6, dtype=torch.float64, generator=generator) * torch.logspace(-2, 3, 12)[:, None].double()
    for training in (False, True):
        small.train(training)
        results = []
        for forward in (type(small).forward, lambda m, x: _gated_forward(m, form, activation, x)):
            with torch.no_grad(), torch.random.fork_rng(devices=[]), flashgau.use_backend("eager"):
                torch.manual_seed(2)  # the same dropout
                results.append(forward(small, x))
        theirs, ours = results
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return False
        scale = theirs.abs().amax(-1, keepdim=True)
        if not bool(((theirs - ours).abs() <= 1e-10 * scale).all()):
            return False
    return True


def _gated_forward(module: nn.Module, form: _Form, activation: str, *args: Any, **options: Any) -> Any:
    """down(dropout(activation(gate(x)) * up(x))), in the module's own parts."""
    named = _named(module, form.activation)
    if len(args) != 1 or options or (isinstance(named, nn.Module) and _watched(named)):
        return type(module).forward(module, *args, **options)
    hidden_states = args[0]
    gate, down = getattr(module, form.gate), getattr(module, form.down)
    up = getattr(module, form.up) if form.up else None
    if up is None:
        hidden = flashgau.glu(gate(hidden_states), activation=activation)
    elif _plain(gate) and _plain(up):
        hidden = flashgau.glu_linear(hidden_states, gate.weight, up.weight, gate.bias, up.bias, activation=activation)
    else:
        hidden = flashgau.glu(gate(hidden_states), up(hidden_states), activation=activation)
    dropout = _named(module, form.dropout)
    if dropout is not None:
        hidden = dropout(hidden)
    weight = getattr(down, "weight", None)
    if form.gate == "wi_0" and isinstance(weight, Tensor) and weight.dtype not in (hidden.dtype, torch.int8):
        hidden = hidden.to(weight.dtype)  # T5 keeps `wo` in fp32 beside half precision
    return down(hidden)


def _watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    return pytorch.has_hooks(module) or "forward" in module.__dict__


def _plain(linear: nn.Module) -> bool:
    """Whether the module is torch.nn.Linear and nothing else, so that its weight may be used without calling it."""
    if type(linear) is not nn.Linear or _watched(linear):
        return False
    weights = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    return all(type(w) in (nn.Parameter, Tensor) and w.dtype.is_floating_point for w in weights)


def _transformers() -> Any:
    """The package of that name, which is not this module, in a version that has what is needed."""
    expected = f"expected transformers {'.'.join(map(str, _OLDEST))} or later"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"register_attention: transformers cannot be imported ({error}); {expected}") from error
    version = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    if version is None or tuple(map(int, version.groups())) < _OLDEST:
        raise ImportError(f"register_attention: this is transformers {transformers.__version__}; {expected}")
    return transformers

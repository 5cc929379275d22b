"""What code around flash-attn imports beside its attention: padding taken out and put back, and rotary pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.contract.validate import FLOATING, Arguments, readable
from flashgau.nn.rotary import packed_positions, rotate


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor: `input[indices]`, with its gradient.

    Args:
        input: (rows, ...), any dtype.
        indices: (n,) integers from 0 to rows - 1.

    Returns:
        (n, ...), the dtype of `input`.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name. Values on a GPU are not read.

    Source: the interface of flash-attn's `bert_padding`.

    Example:
        >>> import torch
        >>> index_first_axis(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0])).tolist()
        [[3.0], [1.0]]
    """
    args = Arguments("index_first_axis")
    _tensor(args, "input", input, "rows ...")
    indices = _indices(args, "indices", indices, "n", input)
    within(args, "indices", indices, 0, input.shape[0] - 1, f"rows of `input`, 0 to {input.shape[0] - 1}")
    return input[indices.long()]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Take the tokens of a padded batch, end to end, for the functions with `cu_seqlens`.

    The host waits for the number of tokens.

    Args:
        hidden_states: (B, N, ...), any dtype.
        attention_mask: (B, N), bool or integers: 1 for tokens, 0 for padding, in any order.
        unused_mask: (B, N), 1 for places that keep room in the result and are not counted in the last value.

    Returns:
        The tokens (total, ...); their places (total,) int64 in the batch laid end to end, as `pad_input` takes them;
        cu_seqlens (B+1,) int32; the longest row, an int; and how many tokens of `attention_mask` each row has, (B,)
        int32.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind or shape, by name.

    Source: the interface of flash-attn's `bert_padding`.

    Example:
        >>> import torch
        >>> tokens, places, cu_seqlens, longest, used = unpad_input(
        ...     torch.arange(6.0).view(2, 3, 1), torch.tensor([[1, 1, 0], [0, 0, 1]])
        ... )
        >>> tokens.flatten().tolist(), places.tolist(), cu_seqlens.tolist(), longest, used.tolist()
        ([0.0, 1.0, 5.0], [0, 1, 5], [0, 2, 3], 2, [2, 1])
    """
    args = Arguments("unpad_input")
    _tensor(args, "hidden_states", hidden_states, "B N ...")
    used = kept = _mask(args, "attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        kept = used | _mask(args, "unused_mask", unused_mask, hidden_states)
    places = kept.flatten().nonzero()[:, 0]
    lengths = kept.sum(1)  # of bools: int64 whatever the masks were
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1)[places], places, cu_seqlens, longest, used.sum(1).int()


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put tokens back to their places in a padded batch; all else is 0.

    Args:
        hidden_states: (total, ...), any dtype.
        indices: (total,) integers, the places that `unpad_input` gave, each once.
        batch: B.
        seqlen: N.

    Returns:
        (B, N, ...), the dtype of `hidden_states`.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name. Values on a GPU are not read.

    Source: the interface of flash-attn's `bert_padding`.

    Example:
        >>> import torch
        >>> pad_input(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 3]), 2, 2).flatten().tolist()
        [1.0, 0.0, 0.0, 2.0]
    """
    args = Arguments("pad_input")
    _tensor(args, "hidden_states", hidden_states, "total ...")
    args.integer("batch", batch, 0, "a whole number >= 0")
    args.integer("seqlen", seqlen, 0, "a whole number >= 0")
    indices = _indices(args, "indices", indices, "total", hidden_states)
    slots = batch * seqlen
    within(args, "indices", indices, 0, slots - 1, f"places in the batch, 0 to {slots - 1}")
    empty = hidden_states.new_zeros(slots, *hidden_states.shape[1:])
    return empty.index_put((indices.long(),), hidden_states).unflatten(0, (batch, seqlen))


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Turn pairs of the first R channels of each head by their token's position (RoPE), in fp32.

    Args:
        x: (B, N, H, D), or with `cu_seqlens` (total, H, D); fp16, bf16, fp32 or fp64.
        cos: (positions, R/2), R <= D: cosines of the angles; fp32 or the dtype of x.
        sin: the same for the sines.
        interleaved: channels 2i and 2i + 1 turn together, else i and i + R/2.
        inplace: write the result into x and return x.
        seqlen_offsets: the position of a sequence's first token, an int or (sequences,) integers.
        cu_seqlens: (G+1,) integers, the ends of the sequences after a leading 0.
        max_seqlen: the longest sequence; accepted, nothing depends on it.

    Returns:
        The shape and dtype of x. Gradients flow to x, cos and sin.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before x is touched. Values
            on a GPU are not read.

    Source: the interface of flash-attn's `layers.rotary`; Su et al. 2021 (arXiv 2104.09864).

    Example:
        >>> import torch
        >>> angle = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.1])
        >>> x = torch.randn(2, 5, 3, 8)
        >>> y = apply_rotary_emb(x, angle.cos(), angle.sin(), seqlen_offsets=4)
        >>> bool(torch.equal(y[..., 4:], x[..., 4:]))
        True
    """
    args = Arguments("apply_rotary_emb")
    args.tensor("x", x, "B N H D" if cu_seqlens is None else "N H D")
    rotary_tables(args, ("cos", "sin"), cos, sin)
    args.flag("interleaved", interleaved)
    args.flag("inplace", inplace)
    if cu_seqlens is None:
        rows, longest = "B", args.sizes["N"]
    else:
        cu_seqlens = args.indices("cu_seqlens", cu_seqlens, "G+1")
        rows, longest = "G", args.offsets("cu_seqlens", cu_seqlens, args.sizes["N"], "N")
        args.sizes["G"] = args.sizes["G+1"] - 1
    if isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = args.indices("seqlen_offsets", seqlen_offsets, rows)
        last = cos.shape[0]
        within(args, "seqlen_offsets", seqlen_offsets, 0, last, f"positions of first tokens, from 0 to {last}")
        first = int(seqlen_offsets.max()) if readable(seqlen_offsets) and seqlen_offsets.numel() else 0
        start = seqlen_offsets.long()
    else:
        args.integer("seqlen_offsets", seqlen_offsets, 0, "an int >= 0 or integers, one a sequence")
        first, start = seqlen_offsets, torch.full((args.sizes[rows],), seqlen_offsets, device=x.device)
    if longest and first + longest > cos.shape[0]:
        args.fail("cos", f"has shape {tuple(cos.shape)}", f"at least {first + longest} positions")
    if cu_seqlens is None:
        positions = start[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        sequence = torch.searchsorted(cu_seqlens, torch.arange(x.shape[0], device=x.device), right=True) - 1
        inside = sequence < len(start)  # not behind the last end, which nothing forbids where values are not read
        own = start[sequence.clamp(0, len(start) - 1)] if len(start) else sequence
        positions = torch.where(inside, packed_positions(x.shape[0], cu_seqlens) + own, 0)
    turned = turn(x, cos, sin, positions, interleaved)
    return x.copy_(turned) if inplace else turned


def rotary_tables(args: Arguments, names: tuple[str, str], cos: Any, sin: Any) -> None:
    """Check tables of angles beside an argument with heads D wide."""
    for name, table in zip(names, (cos, sin), strict=True):
        args.per_head(name, table, "positions pairs")
    if 2 * cos.shape[1] > args.sizes["D"]:
        got = f"has shape {tuple(cos.shape)}"
        args.fail(names[0], got, f"at most D / 2 = {args.sizes['D'] // 2} pairs of channels")


def turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate x (..., H, D) by the tables' rows at `positions` (...), in fp32 (fp64 for fp64 tables)."""
    kind = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = (table[positions].unsqueeze(-2).to(kind) for table in (cos, sin))
    return rotate(x, cos, sin, interleaved=interleaved)


def within(args: Arguments, name: str, x: Tensor, low: Any, high: Any, expected: str) -> None:
    """Check the values, where reading them costs nothing."""
    if readable(x) and bool(((x.long() < low) | (x.long() > high)).any()):  # a bound may not fit a narrow type
        args.fail(name, f"is {x.tolist()}", expected)


def _tensor(args: Arguments, name: str, x: Any, axes: str) -> None:
    """A tensor of any dtype with at least these axes."""
    letters = axes.split()[:-1]
    expected = f"a torch.Tensor of shape ({', '.join(letters)}, ...)"
    if not isinstance(x, Tensor):
        args.fail(name, f"is a {type(x).__name__}", expected, TypeError)
    if x.ndim < len(letters):
        args.fail(name, f"has shape {tuple(x.shape)}", expected)
    args.sizes.update(zip(letters, x.shape, strict=False))


def _indices(args: Arguments, name: str, x: Any, axes: str, beside: Tensor) -> Tensor:
    x = args.indices(name, x, axes)
    if x.device != beside.device:
        args.fail(name, f"is on {x.device}", f"{beside.device}")
    return x


def _mask(args: Arguments, name: str, x: Any, beside: Tensor) -> Tensor:
    """A mask (B, N) as bool."""
    expected = f"a torch.Tensor of shape (B, N) = ({args.sizes['B']}, {args.sizes['N']}), bool or integers"
    if not isinstance(x, Tensor):
        args.fail(name, f"is a {type(x).__name__}", expected, TypeError)
    if x.dtype in FLOATING or x.is_complex():
        args.fail(name, f"has dtype {x.dtype}", "bool or integers", TypeError)
    if tuple(x.shape) != (args.sizes["B"], args.sizes["N"]):
        args.fail(name, f"has shape {tuple(x.shape)}", expected)
    if x.device != beside.device:
        args.fail(name, f"is on {x.device}", f"{beside.device}")
    return x != 0

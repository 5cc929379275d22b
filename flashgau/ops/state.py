"""The recurrent state of causal mixed chunk attention, and how a sequence is continued from one."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashgau.contract.validate import FLOATING, Arguments, widened

FIELDS = ("kv", "quad_k", "lin_k", "v", "position")  # of a state


@dataclass(frozen=True)
class MixedChunkState:
    """What a causal sequence leaves behind: constant in size, however long the sequence was.

    `mixed_chunk_attention` and `mixed_chunk_step` take one of any floating type on their own device, and compute with
    `state.to(dtype=...)` of their operands' type: so an fp32 state kept in fp16 costs what rounding it costs.

    Attributes:
        kv: (B, S, E) sum of lin_k^T v over closed chunks, fp32 (fp64 for fp64 input).
        quad_k: (B, C, S) keys of the open chunk; rows from `open_tokens` on are zero.
        lin_k: (B, C, S) its keys of the linear part.
        v: (B, C, E) its values.
        position: (B,) int64, tokens seen so far.

    Example:
        >>> import torch, flashgau
        >>> state = flashgau.MixedChunkState.empty(2, width=8, value_width=16, chunk_size=4)
        >>> x, v = torch.randn(2, 10, 8), torch.randn(2, 10, 16)
        >>> out, state = flashgau.mixed_chunk_attention(
        ...     x, x, x, x, v, chunk_size=4, causal=True, initial_state=state, return_state=True)
        >>> state.position.tolist(), state.open_tokens.tolist()
        ([10, 10], [2, 2])
    """

    kv: Tensor
    quad_k: Tensor
    lin_k: Tensor
    v: Tensor
    position: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        width: int,
        value_width: int,
        chunk_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MixedChunkState:
        """The state before the first token: S = `width`, E = `value_width`, C = `chunk_size`."""
        return cls(
            kv=torch.zeros(batch, width, value_width, dtype=_sums(dtype), device=device),
            quad_k=torch.zeros(batch, chunk_size, width, dtype=dtype, device=device),
            lin_k=torch.zeros(batch, chunk_size, width, dtype=dtype, device=device),
            v=torch.zeros(batch, chunk_size, value_width, dtype=dtype, device=device),
            position=torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @property
    def chunk_size(self) -> int:
        """C."""
        return self.quad_k.shape[1]

    @property
    def open_tokens(self) -> Tensor:
        """(B,) tokens in the open chunk, from 0 to C - 1."""
        return self.position % self.chunk_size

    @property
    def rows(self) -> int:
        """B."""
        return self.position.shape[0]

    def select(self, index: Tensor) -> MixedChunkState:
        """The rows `index` (a 1-D integer or boolean tensor) in that order, repeats allowed: for beam search."""
        index = widened(index)  # PyTorch takes uint8 for a mask
        return MixedChunkState(*(t[index] for t in self.tensors()))

    def truncate(self, tokens: Tensor | int) -> MixedChunkState:
        """The state before the last `tokens` (B,) tokens, or as many for every row: to take guesses back.

        Only tokens of the open chunk can be taken back: a closed one is in `kv` as a sum. (A state is never changed,
        so whoever must go further back keeps the earlier one.)

        Raises:
            TypeError, ValueError: for counts that are no integers, negative or more than `open_tokens`. Values on a
                GPU are read for this.

        Example:
            >>> import torch, flashgau
            >>> x, v = torch.randn(1, 7, 8), torch.randn(1, 7, 16)
            >>> options = {"chunk_size": 4, "causal": True, "return_state": True}
            >>> _, state = flashgau.mixed_chunk_attention(x, x, x, x, v, **options)
            >>> state.truncate(2).position, state.truncate(2).open_tokens
            (tensor([5]), tensor([1]))
        """
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            tokens = torch.full_like(self.position, tokens)
        tokens = widened(tokens)
        whole = (torch.int32, torch.int64)
        if not isinstance(tokens, Tensor) or tokens.dtype not in whole or tokens.shape != self.position.shape:
            got = f"shape {tuple(tokens.shape)}, {tokens.dtype}" if isinstance(tokens, Tensor) else repr(tokens)
            raise TypeError(f"truncate: `tokens` is {got}; expected an int or {tuple(self.position.shape)} integers")
        if bool(((tokens < 0) | (tokens > self.open_tokens)).any()):
            raise ValueError(
                f"truncate: `tokens` is {tokens.tolist()}; "
                f"expected at most what the open chunks hold, {self.open_tokens.tolist()}"
            )
        quad_k, lin_k, v = self._first(self.open_tokens - tokens)
        return MixedChunkState(self.kv, quad_k, lin_k, v, self.position - tokens)

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> MixedChunkState:
        """The state on another device or for operands of another type, or itself where nothing changes.

        `dtype` is that of quad_k, lin_k and v; kv is then fp32, or fp64 for fp64. As with tensors, it may come first.
        Gradients flow.

        Raises:
            TypeError: for a dtype that is not fp16, bf16, fp32 or fp64.

        Example:
            >>> import torch, flashgau
            >>> state = flashgau.MixedChunkState.empty(1, 8, 16, chunk_size=4).to(torch.bfloat16)
            >>> state.v.dtype, state.kv.dtype, state.position.dtype
            (torch.bfloat16, torch.float32, torch.int64)
        """
        device, dtype = destination("MixedChunkState.to", device, dtype)
        sums = None if dtype is None else _sums(dtype)
        before, types = self.tensors(), (sums, dtype, dtype, dtype, None)
        after = [moved(t, device, kind) for t, kind in zip(before, types, strict=True)]
        return self if all(map(operator.is_, after, before)) else MixedChunkState(*after)

    def opened(self) -> MixedChunkState:
        """A contiguous copy with zeros behind the open tokens, whatever stands there."""
        quad_k, lin_k, v = (x.contiguous() for x in self._first(self.open_tokens))
        return MixedChunkState(
            self.kv.clone(memory_format=torch.contiguous_format), quad_k, lin_k, v, self.position.clone()
        )

    def _first(self, tokens: Tensor) -> list[Tensor]:
        """The buffers of the open chunk, quad_k, lin_k and v, with zeros behind the first `tokens` (B,)."""
        there = torch.arange(self.chunk_size, device=tokens.device)[:, None] < tokens[:, None, None]
        return [torch.where(there, x, 0) for x in (self.quad_k, self.lin_k, self.v)]

    def copy_(self, other: MixedChunkState) -> MixedChunkState:
        """Take the values of another state of as many rows, in place."""
        for held, new in zip(self.tensors(), other.tensors(), strict=True):
            held.copy_(new)
        return self

    def reorder(self, index: Tensor) -> MixedChunkState:
        """Let each row continue from row index[b] (B,) instead, in place: for beam search."""
        return self.copy_(self.select(index))

    def clone(self) -> MixedChunkState:
        """A state of its own with the same values, contiguous: to continue twice from one prefix, in place."""
        return MixedChunkState(*(t.clone(memory_format=torch.contiguous_format) for t in self.tensors()))

    def detach(self) -> MixedChunkState:
        """The same values, cut off from the graph: for truncated backpropagation through time."""
        return MixedChunkState(*(t.detach() for t in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """kv, quad_k, lin_k, v, position."""
        return self.kv, self.quad_k, self.lin_k, self.v, self.position


def check_in_place(
    args: Arguments, name: str, given: MixedChunkState, state: MixedChunkState, differentiated: bool
) -> None:
    """Refuse a state, `given`, that cannot be written; `state` is it in the types of the call."""
    if differentiated:
        args.fail("inplace", "is True where gradients are needed", "False, or a call under torch.no_grad()")
    for field, x, converted in zip(FIELDS, given.tensors(), state.tensors(), strict=True):
        if x is not converted:
            args.fail(f"{name}.{field}", f"has dtype {x.dtype} and inplace=True", f"{converted.dtype}, as the call has")
        if not x.is_contiguous():
            args.fail(f"{name}.{field}", f"has strides {x.stride()} and inplace=True", "a contiguous tensor")


def _sums(dtype: torch.dtype) -> torch.dtype:
    """The type of kv beside keys and values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def destination(caller: str, device: Any, dtype: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """The arguments of a state's `to`, of which a dtype may come first."""
    if isinstance(device, torch.dtype) and dtype is None:
        device, dtype = None, device
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"{caller}: `dtype` is {dtype!r}; expected float16, bfloat16, float32 or float64")
    return None if device is None else torch.device(device), dtype


def moved(x: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """x there and in that type; None keeps what it has."""
    if (dtype is None or x.dtype == dtype) and (device is None or x.device == device):
        return x  # as x.to would, in a tenth of its time
    return x.to(device=x.device if device is None else device, dtype=x.dtype if dtype is None else dtype)


@dataclass(frozen=True)
class Continuation:
    """Sequences with the open chunk of a state put in front, so that their chunk grid starts at a closed chunk.

    Everything is index arithmetic on the tensors' device: nothing is read on the host, and gradients flow.
    """

    lengths: Tensor | None  # of the extended sequences
    cu_seqlens: Tensor | None
    _front: Tensor  # of the extended rows, flattened, for every row of the open chunks; past the last for unused ones
    _back: Tensor  # of the extended rows, flattened, for every token
    _extended: tuple[int, int]
    _tokens: tuple[int, int]

    @classmethod
    def of(
        cls, state: MixedChunkState, batch: int, n: int, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> Continuation:
        """Extend `batch` rows of n tokens, padded or packed, by the open chunks of `state`."""
        size, opened = state.chunk_size, state.open_tokens
        count, device = opened.shape[0], opened.device
        held = torch.arange(size, device=device)
        if cu_seqlens is None:
            first = torch.arange(count, device=device) * (size + n)
            back = (first + opened)[:, None] + torch.arange(n, device=device)
            front = torch.where(held < opened[:, None], first[:, None] + held, batch * (size + n))
            lengths = opened + (n if lengths is None else lengths)
            return cls(lengths, None, front.flatten(), back.flatten(), (batch, size + n), (batch, n))
        starts = cu_seqlens.to(torch.int64)
        shift = torch.cat([opened.new_zeros(1), opened.cumsum(0)])
        new_starts = starts + shift
        front = torch.where(held < opened[:, None], new_starts[:-1, None] + held, count * size + n)
        front = front.clamp(0, count * size + n)  # of offsets that nobody looked at
        t = torch.arange(n, device=device)
        begun = torch.searchsorted(starts, t, right=True).clamp(max=count)  # sequences: none in rows before the first
        back = t + shift[begun]
        return cls(None, new_starts.to(cu_seqlens.dtype), front.flatten(), back, (1, count * size + n), (1, n))

    def extend(self, held: Tensor | None, x: Tensor) -> Tensor:
        """Rows of the open chunks `held` (G, C, .) (zeros if None: queries), then those of x (B, N, .), read once.

        The rows behind both are padding, and hold anything.
        """
        (batch, n), width = self._extended, x.shape[-1]
        before = x.new_zeros(len(self._front), width) if held is None else held.reshape(-1, width).to(x.dtype)
        rows = x.new_empty(batch * n + 1, width)  # one more, for the rows of `before` that are not used
        rows.index_copy_(0, self._front, before).index_copy_(0, self._back, x.reshape(-1, width))
        return rows[:-1].view(batch, n, width)

    def restrict(self, x: Tensor) -> Tensor:
        """The tokens' own rows of an extended result."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self._back).view(*self._tokens, x.shape[-1])


def open_chunk(x: Tensor, closed: Tensor, total: Tensor, size: int, cu_seqlens: Tensor | None) -> Tensor:
    """The rows (G, size, .) after the last closed chunk, zeros behind them.

    `closed` and `total` (G,) count each sequence's tokens within x (B, N, .): those in closed chunks, and all.
    """
    offset = torch.arange(size, device=x.device)
    inside = offset < (total - closed)[:, None]
    if x.shape[0] * x.shape[1] == 0:
        return x.new_zeros(len(total), size, x.shape[-1])
    if cu_seqlens is None:
        batch, start = torch.arange(len(total), device=x.device)[:, None], closed
    else:
        batch, start = torch.zeros_like(closed)[:, None], closed + cu_seqlens[:-1]
    tokens = torch.where(inside, start[:, None] + offset, 0)
    return torch.where(inside[..., None], x[batch, tokens], 0)

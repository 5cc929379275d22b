"""`context_parallel_mixed_chunk`: only the sums of lin_k^T v go between processes, whatever the length."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashgau.contract.validate import autocast
from flashgau.ops.linear_part import add_linear_part, linear_factor, linear_sums
from flashgau.ops.mixed_chunk import mixed_chunk_attention
from flashgau.ops.state import MixedChunkState

from .agreement import GroupContext, digest, not_compiled, ranges, stand_in
from .call import Call
from .exchange import Meeting, Range, reaching
from .scan import Chain, begin_scan

_OP = "context_parallel_mixed_chunk"


@not_compiled
def context_parallel_mixed_chunk(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    gate_activation: str = "identity",
    chunk_size: int = 256,
    score: str = "relu2",
    causal: bool = False,
    quad_normalizer: float | None = None,
    lin_normalizer: str | float = "tokens",
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`flashgau.mixed_chunk_attention` over sequences whose tokens are spread over the processes of a group.

    Each process holds a slice of the tokens, in the order of ranks, which ends with a sequence or with one of its
    chunks. The quadratic part never leaves a chunk. For the linear part each process sums lin_k^T v (B, S, E) over its
    tokens, and gets the sum of the slices before it (causal: the state from which `flashgau.mixed_chunk_attention`
    continues), and else of those behind it too, in log2 of the number of processes rounds. So what is sent does not
    depend on the length, and work is shared as the tokens are.

    Every process of the group must call this, and run the backward if any of them does, and all in the same order:
    processes that do different things all raise an error, but one that does nothing leaves the others waiting for the
    group's timeout. The host waits for what the others say of their arguments in a call, and of where they are in a
    backward.

    Packed sequences (`cu_seqlens`) may be cut anywhere between their chunks, which begin anew in each: the sums are
    then those of a process's first and of its last sequence, as only these have tokens in other processes.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time" (arXiv 2202.10447), section 3.2, for the operation.

    Args:
        quad_q: this process's queries of the local part (B, n, S), fp16, bf16, fp32 or fp64; N is the sum of n.
        quad_k: (B, n, S) its keys.
        lin_q: (B, n, S) queries of the global part.
        lin_k: (B, n, S) its keys.
        v: (B, n, E) values of both.
        gate: (B, n, E) or None for no gate.
        group: the processes, as a group or a `DeviceMesh` of one dimension (`mesh["context"]`); the default group
            unless given. gloo sends CPU tensors, nccl CUDA tensors.
        gate_activation: as in `flashgau.mixed_chunk_attention`, like all that follow; the same in every process.
        chunk_size: C.
        score: "relu2" or "laplace".
        causal: only tokens before, and the token itself, are seen.
        quad_normalizer: divisor of the local scores, C unless given.
        lin_normalizer: divisor of the global part: "tokens" or a number.
        rel_bias: (..., 2P-1), broadcastable to (B, 2P-1), whole in every process, P >= C. Its gradient in a process is
            that of the process's chunks: the sum over the processes is the gradient.
        lengths: (B,) valid tokens of each whole row.
        cu_seqlens: (G+1,) offsets in the whole row, which the host reads. Here B may be more than 1: of rows that are
            packed alike, as the heads of a layer are, and have one bias.
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        This process's slice (B, n, E) of the result, in the dtype of v. Gradients of its tensors are those of the
        whole, too.

    Raises:
        RuntimeError: torch.distributed is not initialised, a backend that was asked for cannot run the call, or a
            process has ended, or does not come within the group's timeout. From the backward, in all processes: they
            run those of different calls, or one is in a call.
        TypeError, ValueError: for wrong arguments by name, for a slice that ends within a chunk, and for arguments
            that differ between processes. What is wrong in one process raises an error in all, before any tensor is
            sent; values of rel_bias are not compared.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from flashgau.distributed import context_parallel_mixed_chunk
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: without arguments
        >>> heads, (v, gate) = torch.randn(4, 1, 1000, 32), torch.randn(2, 1, 1000, 128)  # this process's tokens
        >>> context_parallel_mixed_chunk(*heads, v, gate, causal=True).shape
        torch.Size([1, 1000, 128])
        >>> dist.destroy_process_group()
    """
    context = GroupContext.of(_OP, group)
    quad_q, quad_k, lin_q, lin_k, v, gate = autocast(quad_q, quad_k, lin_q, lin_k, v, gate)
    heads = {"quad_q": quad_q, "quad_k": quad_k, "lin_q": lin_q, "lin_k": lin_k}
    call = Call(
        context,
        _of_rows,
        slices={**{name: (x, "B N S") for name, x in heads.items()}, "v": (v, "B N E"), "gate": (gate, "B N E")},
        options={
            "gate_activation": gate_activation, "chunk_size": chunk_size, "score": score, "causal": causal,
            "quad_normalizer": quad_normalizer, "lin_normalizer": lin_normalizer, "backend": backend,
        },
        parameters={"rel_bias": rel_bias},
        sequences={"lengths": lengths, "cu_seqlens": cu_seqlens},
    )  # fmt: skip

    call, agreed = call.agree(lambda: call.note(call.check(), {"gate": digest(gate is None)}, {}))
    args, slices = call.whole(agreed), ranges(agreed["N"])
    if cu_seqlens is None:
        args.sequences(lengths, None)
    else:
        args.offsets("cu_seqlens", cu_seqlens, args.sizes["N"], "N")
    # A row of no sequences has one without tokens.
    bounds = [0, slices[-1][1]] if cu_seqlens is None or len(cu_seqlens) == 1 else cu_seqlens.tolist()
    cuts = Cuts(tuple(bounds), slices, cu_seqlens is not None)
    if (rank := cuts.within_a_chunk(chunk_size)) is not None:
        start, stop = slices[rank]
        expected = f"a multiple of chunk_size = {chunk_size} where tokens follow in later processes"
        if cuts.packed:
            expected = f"a slice that ends with a sequence, or a multiple of chunk_size = {chunk_size} tokens into one"
        args.fail("quad_q", f"has {stop - start} tokens in {context.process(rank)}", expected)

    start, stop = slices[context.rank]
    own = None if lengths is None else (lengths.to(torch.int64) - start).clamp(0, stop - start)
    needs = call.needed(agreed)
    needed = needs["lin_k"] or needs["v"]
    ends = [linear_sums(lin_k[:, rows], v[:, rows], own) for rows in cuts.ends(context.rank)]
    # What goes on behind this process is of its last sequence, and before it of its first one.
    chains, terms = ([cuts.before], [ends[-1]]) if causal else ([cuts.before, cuts.behind], [ends[-1], ends[0]])
    meeting = Meeting(call.context, 1)
    arrival = begin_scan(meeting, chains, terms, needed)
    out, came = (_causal if causal else _bidirectional)(call, _Whole(cuts, context.rank, lengths, own, ends), arrival)
    return reaching(meeting, [out], came)[0] if needed else out


@wraps(mixed_chunk_attention)  # errors speak of that
def _of_rows(*tensors: Tensor | None, cu_seqlens: Any = None, **options: Any) -> Tensor:
    """`mixed_chunk_attention` of several rows that are packed alike: as one row, one behind the other."""
    given = tensors[4]
    assert given is not None
    rows, count, _ = given.shape
    if rows != 1 and isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens):
        first = torch.arange(rows, device=cu_seqlens.device)[:, None] * count + cu_seqlens[:-1]
        cu_seqlens = torch.cat((first.flatten(), first.new_full((1,), rows * count)))
        tensors = tuple(None if x is None else x.reshape(1, rows * count, x.shape[-1]) for x in tensors)
    operation: Callable[..., Any] = mixed_chunk_attention
    out: Tensor = operation(*tensors, cu_seqlens=cu_seqlens, **options)
    return out.reshape(given.shape)


class _Whole(NamedTuple):
    """What a process knows of the whole.

    Attributes:
        cuts: where sequences and slices begin and end.
        rank: of the process.
        lengths: valid tokens of each whole row, or None.
        own: the same of this process's slice.
        ends: sums (B, S, E) over its tokens of its first sequence and, if that is another, of its last one.
    """

    cuts: Cuts
    rank: int
    lengths: Tensor | None
    own: Tensor | None
    ends: list[Tensor]


def _causal(call: Call, whole: _Whole, arrival: Callable[[], list[Tensor]]) -> tuple[Tensor, Tensor]:
    """The first sequence from the state that the processes before leave of it, once that has come; before, all others.

    Returns:
        The result, and the sums that have come.
    """
    cuts, rank = whole.cuts, whole.rank
    (first, last), (start, stop), head = cuts.sequences(rank), cuts.slices[rank], cuts.ends(rank)[0].stop
    own, rest = _split(call, [head, stop - start - head])
    others = [_packed(call, whole, rest, (first + 1, last + 1), head)] if last > first else []
    (before,) = arrival()
    lin_k, v = own[3:5]
    assert lin_k is not None
    assert v is not None
    size = call.options["chunk_size"]
    state = MixedChunkState.empty(len(v), lin_k.shape[-1], v.shape[-1], size, dtype=v.dtype, device=v.device)
    position = torch.full_like(state.position, start - cuts.bounds[first])
    state = replace(state, kv=before, position=position)
    options = {**call.options, **call.parameters, "lengths": whole.own, "initial_state": state}
    out: Tensor = call.operation(*own, **options)
    return torch.cat([out, *others], 1) if others else out, before


def _bidirectional(call: Call, whole: _Whole, arrival: Callable[[], list[Tensor]]) -> tuple[Tensor, Tensor]:
    """The local part of the first and of the last sequence, to which the sums add theirs; others as ever, before.

    Returns:
        The result, and the sums that have come.
    """
    cuts, rank = whole.cuts, whole.rank
    (first, last), (start, stop), rows = cuts.sequences(rank), cuts.slices[rank], cuts.ends(rank)
    head, tail = rows[0].stop, rows[1].start if last > first else stop - start
    parts = _split(call, [head, tail - head, stop - start - tail])
    options = {**call.options, **call.parameters}
    ends = {0: first, 2: last} if last > first else {0: first}
    found: dict[int, Tensor] = {}
    for place in ends:
        quad_q, quad_k, lin_q, _, v, _ = parts[place]
        assert lin_q is not None
        nothing = stand_in(lin_q, *lin_q.shape)
        found[place] = call.operation(quad_q, quad_k, nothing, nothing, v, **options, lengths=whole.own)
    if last > first + 1:
        found[1] = _packed(call, whole, parts[1], (first + 1, last), head)
    before, behind = arrival()
    totals = [before + whole.ends[0], whole.ends[-1] + behind] if last > first else [before + whole.ends[0] + behind]
    for (place, sequence), kv in zip(ends.items(), totals, strict=True):
        _, _, lin_q, _, _, gate = parts[place]
        assert lin_q is not None
        tokens = cuts.bounds[sequence + 1] - cuts.bounds[sequence]
        factor = linear_factor(options["lin_normalizer"], tokens, whole.lengths, kv)
        activation = options["gate_activation"]
        found[place] = add_linear_part(found[place], lin_q, kv, gate, factor, whole.own, activation)
    return torch.cat([found[place] for place in sorted(found)], 1) if len(found) > 1 else found[0], before


def _split(call: Call, sizes: list[int]) -> list[tuple[Tensor | None, ...]]:
    """The call's tensors, parts of so many tokens of each."""
    none = (None,) * len(sizes)
    return list(zip(*(none if x is None else x.split(sizes, 1) for x in call.tensors), strict=True))


def _packed(call: Call, whole: _Whole, part: tuple[Tensor | None, ...], sequences: Range, skipped: int) -> Tensor:
    """The operation of sequences that begin in this process, behind its first so many tokens."""
    ends = whole.cuts.offsets(whole.rank, sequences, skipped)
    assert part[0] is not None
    offsets = torch.tensor(ends, dtype=torch.int32, device=part[0].device)
    out: Tensor = call.operation(*part, **call.options, **call.parameters, cu_seqlens=offsets)
    return out


@dataclass(frozen=True)
class Cuts:
    """Where the sequences of a row and the slices of the processes begin and end.

    Attributes:
        bounds: of the sequences: their ends after a leading 0.
        slices: of the processes.
        packed: whether there may be several sequences.
    """

    bounds: tuple[int, ...]
    slices: tuple[Range, ...]
    packed: bool

    def within_a_chunk(self, chunk_size: int) -> int | None:
        """The first process whose slice ends within a chunk, with tokens of its sequence behind; None if none does."""
        for rank, (_, stop) in enumerate(self.slices):
            sequence = bisect_left(self.bounds, stop) - 1
            ends = sequence < 0 or stop == self.bounds[sequence + 1]
            if not ends and (stop - self.bounds[sequence]) % chunk_size:
                return rank
        return None

    def sequences(self, rank: int) -> Range:
        """The first and the last sequence of which a process has tokens; where it has none, any one."""
        start, stop = self.slices[rank]
        if start == stop:
            return 0, 0
        return bisect_right(self.bounds, start) - 1, bisect_left(self.bounds, stop) - 1

    def ends(self, rank: int) -> list[slice]:
        """A process's tokens of its first sequence, and of its last one if that is another."""
        (start, stop), (first, last) = self.slices[rank], self.sequences(rank)
        head = slice(0, min(stop, self.bounds[first + 1]) - start if start < stop else 0)
        return [head, slice(self.bounds[last] - start, stop - start)] if last > first else [head]

    @property
    def before(self) -> Chain:
        """For each process, over how many before it its first sequence reaches: those whose sums it adds up."""
        return Chain(self._reach([start for start, _ in self.slices]), 1)

    @property
    def behind(self) -> Chain:
        """The same of those behind it, and of its last sequence."""
        return Chain(self._reach([stop for _, stop in self.slices][::-1])[::-1], -1)

    def _reach(self, borders: list[int]) -> tuple[int, ...]:
        """For each process in an order, how many before it the sequence reaches that its border lies in."""
        reach: list[int] = []
        for place, border in enumerate(borders):
            # One may end at the border, or within the process before this one, or else reaches as far as from there.
            between = sorted((border, borders[place - 1])) if place else [border, border]
            inside = bisect_left(self.bounds, between[1]) > bisect_right(self.bounds, between[0])
            reach.append(0 if border in self.bounds else 1 if inside else reach[-1] + 1)
        return tuple(reach)

    def offsets(self, rank: int, sequences: Range, skipped: int) -> list[int]:
        """Of these sequences in a process's tokens without the first few."""
        (start, stop), (first, last) = self.slices[rank], sequences
        return [min(max(end, start + skipped), stop) - start - skipped for end in self.bounds[first : last + 1]]

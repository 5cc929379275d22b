"""`context_parallel_mixed_chunk`: only the sums of lin_k^T v go between processes, whatever the length."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashgau.contract.validate import autocast
from flashgau.ops.linear_part import add_linear_part, linear_factor, linear_sums
from flashgau.ops.mixed_chunk import mixed_chunk_attention
from flashgau.ops.state import MixedChunkState

from .agreement import GroupContext, digest, not_compiled, ranges, stand_in
from .call import Call
from .exchange import Meeting, Range, Turn, begin_exchange, reaching

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
    chunks. The quadratic part never leaves a chunk. For the linear part each process sums lin_k^T v over its tokens,
    all get the sums (B, S, E) of all, and add up those of the slices before (causal: their sum is the state from
    which `flashgau.mixed_chunk_attention` continues) or of all. So what is sent does not depend on the length, and
    work is shared as the tokens are.

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
        cu_seqlens: (G+1,) offsets in the whole row. The host reads them.
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
        mixed_chunk_attention,
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
    args.sequences(lengths, cu_seqlens)
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
    # Everyone gets the sums of all, along a first axis that is not cut.
    sums = torch.stack([linear_sums(lin_k[:, rows], v[:, rows], own) for rows in cuts.shared(context.rank)])
    turn = Turn(1, ((0, v.shape[0]),) * context.size, 0, (len(sums),) * context.size)
    meeting = Meeting(call.context, 1)
    _, arrival = begin_exchange(meeting, (sums,), [turn], [needed])
    whole = _Whole(cuts, context.rank, lengths, own)
    if causal:
        (everyone,) = arrival()
        out = _causal(call, whole, everyone)
    else:
        parts = _local_parts(call, whole)  # while the sums are on their way
        (everyone,) = arrival()
        out = _bidirectional(call, whole, parts, everyone)
    return reaching(meeting, [out], everyone)[0] if needed else out


class _Whole(NamedTuple):
    """What a process knows of the whole.

    Attributes:
        cuts: where sequences and slices begin and end.
        rank: of the process.
        lengths: valid tokens of each whole row, or None.
        own: the same of this process's slice.
    """

    cuts: Cuts
    rank: int
    lengths: Tensor | None
    own: Tensor | None

    def total(self, sums: Tensor, sequence: int, ranks: range) -> Tensor:
        """Of those of all processes (R or 2R, B, S, E), the sums over a sequence's tokens in some, in their order."""
        owners = [owner for rank in ranks for owner in self.cuts.owners(rank)]
        first = ranks.start * len(sums) // len(self.cuts.slices)
        return sums[[first + place for place, owner in enumerate(owners) if owner == sequence]].sum(0)


def _causal(call: Call, whole: _Whole, sums: Tensor) -> Tensor:
    """The operation as ever, from the state that the processes before leave of the first sequence."""
    quad_q, quad_k, lin_q, lin_k, v, gate = call.tensors
    assert lin_k is not None
    assert v is not None
    cuts, rank = whole.cuts, whole.rank
    (first, last), (start, _) = cuts.sequences(rank), cuts.slices[rank]
    kv, rows = whole.total(sums, first, range(rank)), v.shape[0]
    if cuts.packed:
        rows = last - first + 1
        kv = F.pad(kv, (0, 0, 0, 0, 0, rows - 1))  # the others begin here
    size = call.options["chunk_size"]
    state = MixedChunkState.empty(rows, lin_k.shape[-1], v.shape[-1], size, dtype=v.dtype, device=v.device)
    position = state.position.clone()
    position[: 1 if cuts.packed else rows] = start - cuts.bounds[first]
    state = replace(state, kv=kv, position=position)
    offsets = cuts.offsets(rank, (first, last + 1), v.device)
    options = {**call.options, **call.parameters, "lengths": whole.own, "cu_seqlens": offsets}
    out: Tensor = call.operation(quad_q, quad_k, lin_q, lin_k, v, gate, initial_state=state, **options)
    return out


def _local_parts(call: Call, whole: _Whole) -> list[Tensor]:
    """Of the first and of the last sequence the local part alone; of those between them all, as ever."""
    cuts, rank = whole.cuts, whole.rank
    options = {**call.options, **call.parameters}
    (first, last), shared, parts = cuts.sequences(rank), cuts.shared(rank), []
    for rows in shared[: last - first + 1]:
        quad_q, quad_k, lin_q, _, v, _ = (None if x is None else x[:, rows] for x in call.tensors)
        assert lin_q is not None
        nothing = stand_in(lin_q, *lin_q.shape)
        parts.append(call.operation(quad_q, quad_k, nothing, nothing, v, **options, lengths=whole.own))
    if last > first + 1:
        rows = slice(shared[0].stop, shared[1].start)
        within = [None if x is None else x[:, rows] for x in call.tensors]
        offsets = cuts.offsets(rank, (first + 1, last), parts[0].device, rows.start)
        parts.insert(1, call.operation(*within, **options, cu_seqlens=offsets))
    return parts


def _bidirectional(call: Call, whole: _Whole, parts: list[Tensor], sums: Tensor) -> Tensor:
    """To the local parts of the first and of the last sequence, what the sums of all add."""
    cuts, rank = whole.cuts, whole.rank
    first, last = cuts.sequences(rank)
    shared = cuts.shared(rank)
    for place, sequence, rows in zip((0, -1), dict.fromkeys((first, last)), shared, strict=False):
        _, _, lin_q, _, _, gate = (None if x is None else x[:, rows] for x in call.tensors)
        assert lin_q is not None
        kv = whole.total(sums, sequence, range(len(cuts.slices)))
        tokens = cuts.bounds[sequence + 1] - cuts.bounds[sequence]
        factor = linear_factor(call.options["lin_normalizer"], tokens, whole.lengths, kv)
        activation = call.options["gate_activation"]
        parts[place] = add_linear_part(parts[place], lin_q, kv, gate, factor, whole.own, activation)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


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

    def shared(self, rank: int) -> list[slice]:
        """A process's tokens of its first sequence, and if the row is packed of its last one, if that is another."""
        (start, stop), (first, last) = self.slices[rank], self.sequences(rank)
        count = stop - start
        if not self.packed:
            return [slice(0, count)]
        head = min(count, max(0, self.bounds[first + 1] - start)) if count else 0
        return [slice(0, head), slice(max(0, self.bounds[last] - start) if last > first else count, count)]

    def owners(self, rank: int) -> list[int]:
        """The sequence of each of them; -1 for no tokens."""
        (start, stop), (first, last) = self.slices[rank], self.sequences(rank)
        owners = [first if start < stop else -1, last if last > first else -1]
        return owners if self.packed else owners[:1]

    def offsets(self, rank: int, sequences: Range, device: torch.device, skipped: int = 0) -> Tensor | None:
        """Of these sequences in a process's tokens without the first few; None if the row is not packed."""
        if not self.packed:
            return None
        (start, stop), (first, last) = self.slices[rank], sequences
        ends = [min(max(end, start + skipped), stop) - start - skipped for end in self.bounds[first : last + 1]]
        return torch.tensor(ends, dtype=torch.int32, device=device)

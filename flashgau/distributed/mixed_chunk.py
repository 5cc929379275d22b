"""`context_parallel_mixed_chunk`: only the sums of lin_k^T v go between processes, whatever the length."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashgau.contract.validate import autocast
from flashgau.ops.linear_part import add_linear_part, linear_factor, linear_sums
from flashgau.ops.mixed_chunk import mixed_chunk_attention
from flashgau.ops.state import MixedChunkState

from .agreement import GroupContext, digest, not_compiled, stand_in
from .call import Call
from .exchange import Meeting, Turn, exchange, reaching

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
    backend: str | None = None,
) -> Tensor:
    """`flashgau.mixed_chunk_attention` over sequences whose tokens are spread over the processes of a group.

    Each process holds a slice of the tokens, in the order of ranks: whole chunks but in the last slice that has
    tokens. The quadratic part never leaves a chunk. For the linear part each process sums lin_k^T v over its tokens,
    all get the sums (B, S, E) of all, and add up those of the slices before (causal: their sum is the state from
    which `flashgau.mixed_chunk_attention` continues) or of all. So what is sent does not depend on the length, and
    work is shared as the tokens are.

    Every process of the group must call this, and run the backward if any of them does, and all in the same order:
    processes that do different things all raise an error, but one that does nothing leaves the others waiting for the
    group's timeout. The host waits for what the others say of their arguments in a call, and of where they are in a
    backward.

    Packed sequences (`cu_seqlens`) are not offered: give different sequences to different processes instead.

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
        sequences={"lengths": lengths},
    )  # fmt: skip

    call, agreed = call.agree(lambda: call.note(call.check(), {"gate": digest(gate is None)}, {}))
    tokens = agreed["N"]
    args = call.whole(agreed)
    args.sequences(lengths, None)
    for rank, count in enumerate(tokens):
        if count % chunk_size and any(tokens[rank + 1 :]):
            expected = f"a multiple of chunk_size = {chunk_size} where tokens follow in later processes"
            args.fail("quad_q", f"has {count} tokens in {context.process(rank)}", expected)

    before = sum(tokens[: context.rank])
    own = None if lengths is None else (lengths.to(torch.int64) - before).clamp(0, tokens[context.rank])
    needs = call.needed(agreed)
    needed = needs["lin_k"] or needs["v"]
    # Everyone gets the sums of all, along a first axis that is not cut.
    turn = Turn(1, ((0, v.shape[0]),) * context.size, 0, (1,) * context.size)
    meeting = Meeting(call.context, 1)
    (everyone,) = exchange(meeting, (linear_sums(lin_k, v, own)[None],), [turn], [needed])
    assert everyone is not None
    operate = partial(call.operation, **call.options, rel_bias=rel_bias, lengths=own)
    if causal:
        state = MixedChunkState.empty(
            v.shape[0], lin_k.shape[-1], v.shape[-1], chunk_size, dtype=v.dtype, device=v.device
        )
        state = replace(state, kv=everyone[: context.rank].sum(0), position=state.position + before)
        out = operate(quad_q, quad_k, lin_q, lin_k, v, gate, initial_state=state)
    else:
        nothing = stand_in(lin_q, *lin_q.shape)
        local, kv = operate(quad_q, quad_k, nothing, nothing, v), everyone.sum(0)
        factor = linear_factor(lin_normalizer, sum(tokens), lengths, kv)
        out = add_linear_part(local, lin_q, kv, gate, factor, own, gate_activation)
    return reaching(meeting, out, everyone) if needed else out

"""`context_parallel_gau`: narrow queries and keys to everyone, columns of the wide values and gate to each."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashgau.contract.validate import autocast
from flashgau.ops.gau import gau_attention

from .agreement import GroupContext, Note, digest, not_compiled, ranges, shares
from .call import Call
from .exchange import Turn
from .ways import column_unit

_OP = "context_parallel_gau"


@not_compiled
def context_parallel_gau(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    gate_activation: str = "identity",
    score: str = "relu2",
    normalizer: str | float = "keys",
    causal: bool = False,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`flashgau.gau_attention` over sequences whose tokens are spread over the processes of a group.

    Each process holds a slice of the tokens, in the order of ranks; slices may differ in length, and be empty. Every
    process gets all queries and keys, which are narrow, and all tokens of some columns of the values and the gate,
    which are wide; it computes these columns of the result, and sends each slice of them back. So every score and
    option means the whole sequence, exactly as in `flashgau.gau_attention`, and causal work is shared evenly.

    The price: each of R processes computes all scores, N^2 (S + E/R) multiplications where a fair share were
    N^2 (S + E) / R (half of both if causal). With S = 128, E = 2048 and R = 8 that is 1.4 times as much.

    Every process of the group must call this, and run the backward if any of them does, and all in the same order:
    processes that do different things all raise an error, but one that does nothing leaves the others waiting for the
    group's timeout. The host waits for what the others say of their arguments in a call, and of where they are in a
    backward.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time" (arXiv 2202.10447), section 3.1, for the operation.

    Args:
        q: this process's queries (B, m, S), fp16, bf16, fp32 or fp64; M is the sum of m over the processes.
        k: its keys (B, n, S); N is the sum of n. Queries and keys may be cut differently.
        v: its values (B, n, E), with E at least the number of processes.
        gate: (B, m, E) or None for no gate.
        group: the processes, as a group or a `DeviceMesh` of one dimension (`mesh["context"]`); the default group
            unless given. gloo sends CPU tensors, nccl CUDA tensors.
        gate_activation: as in `flashgau.gau_attention`, like all that follow; the same in every process.
        score: "relu2", "laplace", "softmax" or "softmax_plus".
        normalizer: n of the scores "relu2" and "laplace": "keys", "row" or a number.
        causal: hide keys after the query's position.
        rel_bias: (..., 2P-1), broadcastable to (B, 2P-1), whole in every process, P >= the longest sequence. Its
            gradient in a process is that of the process's columns: the sum over the processes is the gradient.
        lengths: (B,) valid tokens of each whole row.
        cu_seqlens: (G+1,) offsets in the whole row.
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        This process's slice (B, m, E) of the result, in the dtype of q. Gradients of q, k, v and gate are those of the
        whole, too; those of q and k in half precision are sums of R rounded parts.

    Raises:
        RuntimeError: torch.distributed is not initialised, a backend that was asked for cannot run the call, or a
            process has ended, or does not come within the group's timeout. From the backward, in all processes: they
            run those of different calls, or one is in a call.
        TypeError, ValueError: for wrong arguments by name, for more processes than columns, and for arguments that
            differ between processes. What is wrong in one process raises an error in all, before any tensor is sent;
            values of rel_bias are not compared.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from flashgau.distributed import context_parallel_gau
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: without arguments
        >>> q, k = torch.randn(2, 1, 50, 16)  # this process's tokens
        >>> v, gate = torch.randn(2, 1, 50, 96)
        >>> context_parallel_gau(q, k, v, gate, causal=True, normalizer="row").shape
        torch.Size([1, 50, 96])
        >>> dist.destroy_process_group()
    """
    context = GroupContext.of(_OP, group)
    q, k, v, gate = autocast(q, k, v, gate)
    call = Call(
        context,
        gau_attention,
        slices={"q": (q, "B M S"), "k": (k, "B N S"), "v": (v, "B N E"), "gate": (gate, "B M E")},
        options={
            "gate_activation": gate_activation, "score": score, "normalizer": normalizer, "causal": causal,
            "backend": backend,
        },
        parameters={"rel_bias": rel_bias},
        sequences={"lengths": lengths, "cu_seqlens": cu_seqlens},
    )  # fmt: skip

    def check() -> Note:
        args = call.check()
        columns = args.sizes["E"]
        if columns < context.size:
            args.fail("v", f"has E = {columns} columns", f"at least one for each of the {context.size} processes")
        return call.note(args, {"gate": digest(gate is None)}, {})

    call, agreed = call.agree(check)
    args = call.whole(agreed)
    longest = args.sequences(lengths, cu_seqlens)
    args.relative_bias(rel_bias, "B", longest)

    total = v.shape[-1]
    counts = shares(total, context.size, column_unit(total, context.size))
    everything, columns = ((0, q.shape[-1]),) * context.size, ranges(counts)
    queries, keys = tuple(agreed["M"]), tuple(agreed["N"])
    turns = [
        Turn(2, slices, 1, tokens)
        for slices, tokens in ((everything, queries), (everything, keys), (columns, keys), (columns, queries))
    ]
    back = Turn(1, ranges(queries), 2, tuple(counts))
    operate = partial(call.operation, **call.options, **call.parameters, **call.sequences)
    (out,) = call.exchanged(agreed, turns, back, operate)
    return out

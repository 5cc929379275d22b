"""`context_parallel_attention`: heads for tokens, attention as ever, and back (Ulysses)."""

from __future__ import annotations

import hashlib
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashgau.contract.validate import autocast
from flashgau.ops.attention import attention

from .agreement import GroupContext, Note, digest, not_compiled, ranges, shares
from .call import Call
from .exchange import Turn

_OP = "context_parallel_attention"


@not_compiled
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    rel_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flashgau.attention` over sequences whose tokens are spread over the processes of a group.

    Each process holds a slice of the tokens, in the order of ranks; slices may differ in length, and be empty. All to
    all, every process gets all tokens of some heads, attends there, and sends each slice of the result back. So every
    option means the whole sequence, exactly as in `flashgau.attention`, and causal work is shared evenly.

    Query heads are divided among the processes in order. With fewer key heads than processes, several processes get
    the same key head, for some of its query heads each.

    Every process of the group must call this, and run the backward if any of them does, and all in the same order:
    processes that do different things all raise an error, but one that does nothing leaves the others waiting for the
    group's timeout. The host waits for what the others say of their arguments in a call, and of where they are in a
    backward.

    Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509), section 3.

    Args:
        q: this process's queries (B, Hq, m, D), fp16, bf16, fp32 or fp64; M is the sum of m over the processes.
        k: its keys (B, Hkv, n, D); N is the sum of n. Queries and keys may be cut differently.
        v: its values (B, Hkv, n, E).
        group: the processes, as a group or a `DeviceMesh` of one dimension (`mesh["context"]`); the default group
            unless given. gloo sends CPU tensors, nccl CUDA tensors.
        causal: as in `flashgau.attention`, like all that follow; the same in every process.
        scale: factor of q k^T, 1/sqrt(D) unless given.
        window: (left, right): only keys in [p - left, p + right] are seen.
        softcap: bound of the scores before bias and mask.
        rel_bias: (..., 2P-1), broadcastable to (B, Hq, 2P-1), whole in every process, P >= the longest sequence. Its
            gradient in a process is that of the process's heads: the sum over the processes is the gradient.
        sinks: (Hq,), whole in every process; its gradient likewise.
        lengths: (B,) valid tokens of each whole row.
        cu_seqlens: (G+1,) offsets in the whole row.
        cu_seqlens_k: the same for the keys.
        dropout_p: probability that an element of P is dropped.
        dropout_seed: the same in every process, or None: then the first process draws it, from PyTorch's default
            generator (as all do, so that their generators stay together). Which elements are kept depends on it and on
            the number of processes: each one numbers its heads from 0, so each but the first hashes the seed with its
            rank.
        gate: this process's gate (B, Hq, m, E), or (B, Hq, m, 1) for a number per head, or None in all processes. It
            travels as the queries do.
        gate_activation: as in `flashgau.attention`.
        return_lse: also return the log-sum-exp of this process's rows, (B, Hq, m) fp32, differentiable.
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        This process's slice (B, Hq, m, E) of the result, in the dtype of q, or a pair with the log-sum-exp. Gradients
        of q, k, v and gate are those of the whole, too.

    Raises:
        RuntimeError: torch.distributed is not initialised, a backend that was asked for cannot run the call, or a
            process has ended, or does not come within the group's timeout. From the backward, in all processes: they
            run those of different calls, or one is in a call.
        TypeError, ValueError: for wrong arguments by name, for more processes than query heads, and for arguments
            that differ between processes. What is wrong in one process raises an error in all, before any tensor is
            sent; values of rel_bias and sinks are not compared.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from flashgau.distributed import context_parallel_attention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: without arguments
        >>> q, k, v = torch.randn(3, 2, 8, 100, 64)  # this process's tokens
        >>> context_parallel_attention(q, k, v, causal=True).shape
        torch.Size([2, 8, 100, 64])
        >>> dist.destroy_process_group()
    """
    context = GroupContext.of(_OP, group)
    q, k, v, gate = autocast(q, k, v, gate)
    per_head = isinstance(gate, Tensor) and gate.dim() == 4 and gate.shape[-1] == 1
    gating = (gate[..., 0], "B Hq M") if per_head else (gate, "B Hq M E")
    call = Call(
        context,
        _attention,
        slices={"q": (q, "B Hq M D"), "k": (k, "B Hkv N D"), "v": (v, "B Hkv N E"), "gate": gating},
        options={
            "causal": causal, "scale": scale, "window": window, "softcap": softcap, "dropout_p": dropout_p,
            "gate_activation": gate_activation, "return_lse": return_lse, "backend": backend,
        },
        parameters={"rel_bias": rel_bias, "sinks": sinks},
        sequences={"lengths": lengths, "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k},
    )  # fmt: skip

    def check() -> Note:
        args = call.check(dropout_seed=0 if dropout_seed is None else dropout_seed)
        heads = args.sizes["Hq"]
        if heads < context.size:
            args.fail("q", f"has Hq = {heads} heads", f"at least one for each of the {context.size} processes")
        seed, drawn = _seeds(dropout_p, dropout_seed, q.device)
        kind = digest("none" if gate is None else "per head" if per_head else "whole")
        return call.note(args, {"gate": kind, "dropout_seed": seed}, {"drawn": drawn})

    call, agreed = call.agree(check)
    args = call.whole(agreed)
    longest = args.sequences(lengths, cu_seqlens, cu_seqlens_k)
    args.relative_bias(rel_bias, "B Hq", longest)

    q_heads, k_heads = _heads(q.shape[1], k.shape[1], context.size)
    start, stop = q_heads[context.rank]
    if rel_bias is not None and rel_bias.dim() > 1 and rel_bias.shape[-2] > 1:
        rel_bias = rel_bias[..., start:stop, :]
    sinks = None if sinks is None else sinks[start:stop]
    seed = (agreed["drawn"] if dropout_seed is None else agreed["dropout_seed"])[0]
    queries, keys = agreed["M"], tuple(agreed["N"])
    of_queries, of_keys = Turn(1, q_heads, 2, tuple(queries)), Turn(1, k_heads, 2, keys)
    turns = [of_queries, of_keys, of_keys, of_queries]
    back = Turn(2, ranges(queries), 1, tuple(b - a for a, b in q_heads))
    operate = partial(
        call.operation,
        **call.options, **call.sequences, rel_bias=rel_bias, sinks=sinks, dropout_seed=_of_rank(seed, context.rank),
    )  # fmt: skip
    out, *lse = call.exchanged(agreed, turns, back, operate)
    return (out, lse[0]) if lse else out


@wraps(attention)  # errors speak of that
def _attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`attention`, with a number per head as (B, Hq, M)."""
    return attention(q, k, v, gate=gate[..., None] if gate is not None and gate.dim() == 3 else gate, **options)


def _heads(
    heads: int, kv_heads: int, processes: int
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """The query heads and the key heads of each process, as (first, last + 1); no process is without a query head."""
    group = heads // kv_heads
    if kv_heads >= processes:
        k_heads = ranges(shares(kv_heads, processes))
        return tuple((group * a, group * b) for a, b in k_heads), k_heads
    together = shares(processes, kv_heads)  # so many processes for each key head: at most `group`
    counts = [share for some in together for share in shares(group, some)]
    owners = [head for head, some in enumerate(together) for _ in range(some)]
    return ranges(counts), tuple((head, head + 1) for head in owners)


def _seeds(p: float, seed: int | Tensor | None, device: torch.device) -> tuple[int | Tensor, int | Tensor]:
    """What stands for the given seed, and one drawn in its place; both without meaning where nothing is dropped."""
    if p == 0:
        return 0, 0
    if seed is None:
        return digest(None), torch.randint(2**62, (1,), dtype=torch.int64, device=device)[0]
    return seed.reshape(()) if isinstance(seed, Tensor) else int(seed), 0


def _of_rank(seed: int, rank: int) -> int:
    """A seed for each process: the first has the common one, as if it were alone."""
    # Hashed rather than added to: the seeds of a run are often numbers that follow each other.
    if rank == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=8).digest(), "little", signed=True)

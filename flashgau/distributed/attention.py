"""`context_parallel_attention`: what its processes agree on, and which of the ways its tensors go."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashgau.contract.validate import Arguments, autocast, widened
from flashgau.ops.attention import attention
from flashgau.options import AttentionOptions, Layout, Window

from .agreement import GroupContext, Note, digest, not_compiled, ranges
from .call import Call
from .heads import by_heads
from .ring import by_ring
from .sight import Sight
from .ways import WAYS, Traits, Widths, bytes_sent, possible
from .window import by_window

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
    by: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`flashgau.attention` over sequences whose tokens are spread over the processes of a group.

    Each process holds a slice of the tokens, in the order of ranks; slices may differ in length, and be empty. Every
    option means the whole sequence, exactly as in `flashgau.attention`. There are three ways to bring queries and keys
    together:

    - "heads": all to all, every process gets all tokens of some heads, attends there, and sends each slice of the
      result back. Any option, and causal work is shared evenly; no more processes than query heads. With fewer key
      heads than processes, several processes get the same key head, for some of its query heads each.
    - "window": every process gets the keys and values that its queries see: of its neighbours, with a window. Queries
      that need none of them are done meanwhile.
    - "ring": keys and values travel from process to process, and each merges what its queries see of them.

    Every process of the group must call this, and run the backward if any of them does, and all in the same order:
    processes that do different things all raise an error, but one that does nothing leaves the others waiting for the
    group's timeout. The host waits for what the others say of their arguments in a call, and of where they are in a
    backward.

    Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509), section 3, by heads; Liu, Zaharia, Abbeel 2023,
    "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv 2310.01889), by ring.

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
            gradient in a process is that of the process's heads or queries: the sum over the processes is the gradient.
        sinks: (Hq,), whole in every process; its gradient likewise.
        lengths: (B,) valid tokens of each whole row.
        cu_seqlens: (G+1,) offsets in the whole row.
        cu_seqlens_k: the same for the keys.
        dropout_p: probability that an element of P is dropped.
        dropout_seed: the same in every process, or None: then the first process draws it, from PyTorch's default
            generator (as all do, so that their generators stay together). Which elements are kept depends on it, on
            the slices and on `by`: each process numbers what it computes from 0, so each but the first hashes the seed
            with its rank.
        gate: this process's gate (B, Hq, m, E), or (B, Hq, m, 1) for a number per head, or None in all processes. By
            heads it travels as the queries do.
        gate_activation: as in `flashgau.attention`.
        return_lse: also return the log-sum-exp of this process's rows, (B, Hq, m) fp32, differentiable.
        backend: "triton", "eager", "reference" or None for the best that can run.
        by: "heads", "window", "ring", or "auto": of those that the call can go, and that need no more memory than a
            slice and a window, the one that sends the fewest bytes.

    Returns:
        This process's slice (B, Hq, m, E) of the result, in the dtype of q, or a pair with the log-sum-exp. Gradients
        of q, k, v and gate are those of the whole, too.

    Raises:
        RuntimeError: torch.distributed is not initialised, a backend that was asked for cannot run the call, or a
            process has ended, or does not come within the group's timeout. From the backward, in all processes: they
            run those of different calls, or one is in a call.
        TypeError, ValueError: for wrong arguments by name, for a way that the call cannot go, and for arguments that
            differ between processes. What is wrong in one process raises an error in all, before any tensor is
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
        args.choice("by", by, ("auto", *WAYS))
        seed, drawn = _seeds(dropout_p, dropout_seed, q.device)
        kind = digest("none" if gate is None else "per head" if per_head else "whole")
        return call.note(args, {"gate": kind, "dropout_seed": seed, "by": digest(by)}, {"drawn": drawn})

    call, agreed = call.agree(check)
    args = call.whole(agreed)
    longest = args.sequences(lengths, cu_seqlens, cu_seqlens_k)
    args.relative_bias(rel_bias, "B Hq", longest)

    seed: Any = (agreed["drawn"] if dropout_seed is None else agreed["dropout_seed"])[0]
    options = AttentionOptions(scale, False, _band(causal, window), softcap, rel_bias, sinks, dropout_p, seed)
    sight = Sight(ranges(agreed["M"]), ranges(agreed["N"]), options.window)
    way = _way(args, by, call, sight, any([*call.needed(agreed).values(), *agreed["shared"]]))
    if way == "heads":
        results = by_heads(call, agreed, sight, options)
    else:
        needed = call.needed(agreed) | {"shared": any(agreed["shared"])}
        layout = Layout(None, cu_seqlens, cu_seqlens_k)
        real, call = _without_padding(call, sight)
        results = (by_window if way == "window" else by_ring)(call, needed, sight, options, layout)
        if real is not None:
            results = [torch.where(real[..., None], results[0], 0), torch.where(real, results[1], -math.inf)]
    return (results[0], results[1]) if return_lse else results[0]


def _band(causal: bool, window: tuple[int | None, int | None] | None) -> Window:
    """How far to the left and to the right of its position a query sees."""
    left, right = (None, None) if window is None else window
    return None if left is None else int(left), 0 if causal else None if right is None else int(right)


def _way(args: Arguments, by: str, call: Call, sight: Sight, differentiated: bool) -> str:
    """The way that is asked for, or of the possible ones that which sends least."""
    q, k, v, gate = call.tensors
    assert q is not None
    assert k is not None
    assert v is not None
    (batch, heads, _, width), kv_heads, value_width = q.shape, k.shape[1], v.shape[3]
    gate_width = 0 if gate is None else value_width if gate.dim() == q.dim() else 1
    widths = Widths(batch, heads, kv_heads, width, value_width, q.itemsize, gate_width, call.options["return_lse"])
    traits = Traits(
        lengths=call.sequences["lengths"] is not None,
        packed=call.sequences["cu_seqlens"] is not None,
        packed_twice=call.sequences["cu_seqlens_k"] is not None,
        biased=call.parameters["rel_bias"] is not None,
    )
    refused, choices = possible(widths, sight, traits)
    if by in refused or (not choices and by == "auto"):
        why = refused.get(by) or "; ".join(f"{way!r} is not possible: {reason}" for way, reason in refused.items())
        others = " or ".join(repr(way) for way in WAYS if way not in refused)
        args.fail("by", f"is {by!r}, and {why}", others or "a call that one of 'heads', 'window' and 'ring' can make")
    if by != "auto":
        return by
    sent = {way: bytes_sent(way, widths, sight) for way in choices}
    return min(choices, key=lambda way: sent[way].forward + differentiated * sent[way].backward)


def _without_padding(call: Call, sight: Sight) -> tuple[Tensor | None, Call]:
    """Which of its queries are real (B, 1, m), None if all are, and the call with zeros in place of padding."""
    lengths, rank = call.sequences["lengths"], call.context.rank
    if lengths is None:
        return None, call
    real = {}
    for axis, (start, stop) in (("M", sight.queries[rank]), ("N", sight.keys[rank])):
        places = torch.arange(start, stop, device=lengths.device)
        real[axis] = (places < widened(lengths)[:, None])[:, None]
    slices = {}
    for name, (x, axes) in call.slices.items():
        mask = real["M" if "M" in axes.split() else "N"]
        mask = mask[..., None] if x is not None and x.dim() == 4 else mask
        slices[name] = (None if x is None else torch.where(mask, x, 0)), axes
    return real["M"], replace(call, slices=slices)


@wraps(attention)  # errors speak of that
def _attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`attention`, with a number per head as (B, Hq, M)."""
    return attention(q, k, v, gate=gate[..., None] if gate is not None and gate.dim() == 3 else gate, **options)


def _seeds(p: float, seed: int | Tensor | None, device: torch.device) -> tuple[int | Tensor, int | Tensor]:
    """What stands for the given seed, and one drawn in its place; both without meaning where nothing is dropped."""
    if p == 0:
        return 0, 0
    if seed is None:
        return digest(None), torch.randint(2**62, (1,), dtype=torch.int64, device=device)[0]
    return seed.reshape(()) if isinstance(seed, Tensor) else int(seed), 0

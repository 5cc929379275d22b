"""`context_parallel_mixed_chunk`: only the sums of lin_k^T v go between processes, whatever the length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashgau.ops.mixed_chunk import mixed_chunk_attention
from flashgau.ops.state import MixedChunkState
from flashgau.ops.validate import Arguments, autocast

from .agreement import (
    GroupContext,
    Note,
    checking,
    checksum,
    digest,
    no_tokens,
    not_compiled,
    stand_in,
    wanted,
    wanting,
)
from .exchange import Meeting, Turn, exchange, once, reaching

_OP = "context_parallel_mixed_chunk"
_BLOCK_ELEMENTS = 2**22  # of values that are worked on together, in the type of sums


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
        chunk_size: C; as in `flashgau.mixed_chunk_attention`, like all that follow; the same in every process.
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
    tensors = {"quad_q": quad_q, "quad_k": quad_k, "lin_q": lin_q, "lin_k": lin_k, "v": v, "gate": gate}
    options: dict[str, Any] = {
        "chunk_size": chunk_size, "score": score, "causal": causal, "quad_normalizer": quad_normalizer,
        "lin_normalizer": lin_normalizer, "backend": backend,
    }  # fmt: skip

    def check() -> Note:
        args = Arguments(_OP)
        for name, x in tensors.items():
            if x is not None or name != "gate":
                args.tensor(name, x, "B N E" if name in ("v", "gate") else "B N S")
        context.check_device("quad_q", quad_q)
        with checking(_OP, "mixed_chunk_attention"):  # sequences without tokens: all checks of the options, and no work
            none = [x[:, :0] if x is not None else None for x in tensors.values()]
            mixed_chunk_attention(*none, rel_bias=rel_bias, lengths=no_tokens(lengths), **options)  # type: ignore[arg-type]
        return Note(
            sizes={name: args.sizes[name] for name in ("B", "S", "E")},
            options={
                **{name: digest(value) for name, value in options.items()},
                "quad_q.dtype": digest(quad_q.dtype), "quad_q.device": digest(quad_q.device.type),
                "gate": digest(gate is None), "rel_bias": digest(rel_bias), "lengths": checksum(lengths),
                "torch.is_grad_enabled()": torch.is_grad_enabled(),
            },
            own={"N": args.sizes["N"], "needs": wanting((lin_k, v))},
        )  # fmt: skip

    context, agreed = context.agree(check)
    tokens = agreed["N"]
    args = Arguments(_OP)  # the whole: alike in all processes, so that they raise alike
    args.tensor("quad_q", stand_in(quad_q, quad_q.shape[0], sum(tokens), quad_q.shape[-1]), "B N S")
    args.sequences(lengths, None)
    for rank, count in enumerate(tokens):
        if count % chunk_size and any(tokens[rank + 1 :]):
            expected = f"a multiple of chunk_size = {chunk_size} where tokens follow in later processes"
            args.fail("quad_q", f"has {count} tokens in {context.process(rank)}", expected)

    before = list(accumulate(tokens, initial=0))[context.rank]
    own = None if lengths is None else (lengths.to(torch.int64) - before).clamp(0, tokens[context.rank])
    needed = any(wanted(agreed["needs"], 2))
    sums = _Sums.apply(lin_k, v, own)
    # Everyone gets the sums of all, along a first axis that is not cut.
    turn = Turn(1, ((0, v.shape[0]),) * context.size, 0, (1,) * context.size)
    meeting = Meeting(context, 1)
    (everyone,) = exchange(meeting, (sums[None],), [turn], [needed])
    assert everyone is not None
    options |= {"rel_bias": rel_bias, "lengths": own}
    if causal:
        state = MixedChunkState.empty(
            v.shape[0], lin_k.shape[-1], v.shape[-1], chunk_size, dtype=v.dtype, device=v.device
        )
        state = replace(state, kv=everyone[: context.rank].sum(0), position=state.position + before)
        out = mixed_chunk_attention(quad_q, quad_k, lin_q, lin_k, v, gate, initial_state=state, **options)
        assert isinstance(out, Tensor)
    else:
        nothing = stand_in(lin_q, *lin_q.shape)
        local = mixed_chunk_attention(quad_q, quad_k, nothing, nothing, v, **options)
        if lin_normalizer == "tokens":
            divisor = (sum(tokens) if lengths is None else lengths.to(sums.dtype).view(-1, 1, 1)) + sums.new_zeros(())
            factor = divisor.clamp_min(1).reciprocal()
        else:
            factor = sums.new_tensor(1 / float(lin_normalizer))
        out = _Joined.apply(local, lin_q, everyone.sum(0), gate, factor, own)
    return reaching(meeting, out, everyone) if needed else out


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(x: Tensor) -> Iterator[slice]:
    """The tokens of x (B, n, E), as many at a time as fit `_BLOCK_ELEMENTS`."""
    batch, n, width = x.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * width))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _rows(x: Tensor, block: slice, valid: Tensor | None) -> Tensor:
    """The tokens of a block in the type of sums, zeros in place of what is not valid, which may be anything."""
    rows = x[:, block].to(_sums_dtype(x))
    if valid is None:
        return rows
    places = torch.arange(block.start, block.stop, device=x.device)
    return torch.where((places < valid[:, None])[..., None], rows, 0)


def _products(x: Tensor) -> torch.autocast:
    """Autocast off: sums of products stay in the type of sums."""
    return torch.autocast(x.device.type, enabled=False)


class _Sums(torch.autograd.Function):
    """lin_k^T v (B, S, E) over the valid tokens, in fp32 (fp64 for fp64), without a copy of v in that type.

    dlin_k = v dKV^T; dv = lin_k dKV.
    """

    @staticmethod
    def forward(ctx: Any, lin_k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(lin_k, v, valid)
        kv = v.new_zeros(v.shape[0], lin_k.shape[-1], v.shape[-1], dtype=_sums_dtype(v))
        with _products(v):
            for block in _blocks(v):
                kv.baddbmm_(_rows(lin_k, block, valid).mT, _rows(v, block, valid))
        return kv

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> tuple[Tensor | None, ...]:
        lin_k, v, valid = ctx.saved_tensors

        def compute(dkv: Tensor, lin_k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            dlin_k, dv = torch.empty_like(lin_k), torch.empty_like(v)
            with _products(v):
                for block in _blocks(v):
                    # Rows that are not valid are zeros on both sides, and so are their gradients.
                    dlin_k[:, block] = _rows(v, block, valid) @ dkv.mT
                    dv[:, block] = _rows(lin_k, block, valid) @ dkv
            return dlin_k, dv

        return *once(_OP, compute, dkv, lin_k, v), None


class _Joined(torch.autograd.Function):
    """gate * (local + factor lin_q KV), a block of tokens at a time: nothing as long as v is kept in fp32.

    With dX = gate * dO: dlocal = dX; dgate = dO * (local + factor lin_q KV); dlin_q = factor dX KV^T;
    dKV = lin_q^T dX factor.
    """

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, lin_q: Tensor, kv: Tensor, gate: Tensor | None, factor: Tensor, valid: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(local, lin_q, kv, gate, factor, valid)
        out = torch.empty_like(local)
        with _products(local):
            for block in _blocks(local):
                x = _rows(local, block, valid) + (_rows(lin_q, block, valid) @ kv) * factor
                out[:, block] = x if gate is None else x * _rows(gate, block, valid)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        local, lin_q, kv, gate, factor, valid = ctx.saved_tensors

        def compute(
            dout: Tensor, local: Tensor, lin_q: Tensor, kv: Tensor, gate: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            dlocal, dlin_q, dkv = torch.empty_like(local), torch.empty_like(lin_q), torch.zeros_like(kv)
            dgate = torch.empty_like(gate) if gate is not None else None
            with _products(local):
                for block in _blocks(local):
                    dx, q = _rows(dout, block, valid), _rows(lin_q, block, valid)
                    if gate is not None and dgate is not None:
                        dgate[:, block] = dx * (_rows(local, block, valid) + (q @ kv) * factor)
                        dx = dx * _rows(gate, block, valid)
                    dlocal[:, block] = dx
                    dlin_q[:, block] = (dx @ kv.mT) * factor
                    dkv.baddbmm_(q.mT, dx * factor)
            return dlocal, dlin_q, dkv, dgate

        return *once(_OP, compute, dout, local, lin_q, kv, gate), None, None

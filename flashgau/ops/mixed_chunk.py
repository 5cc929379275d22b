"""`flashgau.mixed_chunk_attention`: FLASH's local quadratic and global linear attention, and its recurrent form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.contract import operands
from flashgau.contract.validate import FLOATING, Arguments, autocast, readable, widened
from flashgau.options import Layout, MixedChunkHeads, MixedChunkOptions, MixedChunkSaved, OpenChunk

from . import autograd, chunks, dispatch
from .folding import Rows
from .operation import Operation
from .state import FIELDS, Continuation, MixedChunkState, check_in_place, open_chunk


def mixed_chunk_attention(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    gate_activation: str = "identity",
    chunk_size: int = 256,
    score: str = "relu2",
    causal: bool = False,
    quad_normalizer: float | None = None,
    lin_normalizer: str | float = "tokens",
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: MixedChunkState | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MixedChunkState]:
    """Mixed chunk attention of FLASH: exact within chunks, linear across them. Time and memory linear in length.

    The sequence is cut into chunks of C; for chunk g with rows Q_g, K_g, V_g:
    local_g = score(quad_Q_g quad_K_g^T / quad_normalizer + rel_bias) V_g, within the chunk (causal: lower
    triangle); global_g = lin_Q_g (sum over h of lin_K_h^T V_h) / lin_normalizer, over h < g if causal, else over
    all chunks, its own included; O_g = act(gate_g) * (local_g + global_g). Sums are kept in fp32 (fp64 for fp64).

    Source: Hua et al. 2022, "Transformer Quality in Linear Time" (arXiv 2202.10447), section 3.2 and code 6.

    Args:
        quad_q: (B, N, S) queries of the local part, fp16, bf16, fp32 or fp64.
        quad_k: (B, N, S) its keys.
        lin_q: (B, N, S) queries of the global part.
        lin_k: (B, N, S) its keys.
        v: (B, N, E) values of both.
        gate: (B, N, E) or None for no gate.
        gate_activation: act, an activation of `glu`: "identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh" or
            "silu". In FLASH u = silu(x W_u) is the gate: x W_u with "silu" here is the same, and u is never stored.
        chunk_size: C, tokens of a chunk. Every sequence is cut from its own start.
        score: "relu2" (squared relu) or "laplace"; see `gau_attention`.
        causal: only tokens before, and the token itself, are seen.
        quad_normalizer: divisor of the local scores, C unless given.
        lin_normalizer: divisor of the global part: "tokens", the number of tokens summed (the first causal chunk
            has no global part), or a number.
        rel_bias: relative bias within a chunk, (..., 2P-1) broadcastable to (B, 2P-1) with P >= C: key j adds
            rel_bias[P-1 + (j - i)]. fp32 is welcome beside half inputs.
        lengths: (B,) integers, valid tokens of each right-padded row. Padding may hold anything; its output rows
            and gradients are 0.
        cu_seqlens: (G+1,) int32, G sequences packed end to end in one row (B = 1).
        initial_state: continue causal sequences (one state row each) from here, at any token of a chunk. A state of
            another floating type is converted to this call's (`MixedChunkState.to`); another device is refused.
        return_state: also return the state after each sequence's last valid token (causal only).
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        (B, N, E) in the dtype of v, or a pair with the `MixedChunkState`.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before any work.
        RuntimeError: for a backend that was asked for and cannot run the call.

    Example:
        >>> import torch, flashgau
        >>> quad_q, quad_k, lin_q, lin_k = torch.randn(4, 1, 1000, 32)
        >>> v, gate = torch.randn(2, 1, 1000, 128)
        >>> flashgau.mixed_chunk_attention(quad_q, quad_k, lin_q, lin_k, v, gate, causal=True).shape
        torch.Size([1, 1000, 128])
    """
    op = "mixed_chunk_attention"
    quad_q, quad_k, lin_q, lin_k, v, gate = autocast(quad_q, quad_k, lin_q, lin_k, v, gate)
    args = Arguments(op)
    operands.mixed_chunk(args, "N", quad_q, quad_k, lin_q, lin_k, v, gate)
    args.flag("causal", causal)
    args.flag("return_state", return_state)
    quad = operands.mixed_chunk_options(args, chunk_size, score, lin_normalizer, quad_normalizer)
    operands.gate_activation(args, gate_activation)
    args.sequences(lengths, cu_seqlens)
    lengths = widened(lengths)
    args.relative_bias(rel_bias, "B", chunk_size, "the chunk size")
    if not causal and (initial_state is not None or return_state):
        name = "return_state" if return_state else "initial_state"
        args.fail(name, "was given with causal=False", "causal=True: only causal sequences have a state")
    count = args.sizes["B"] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        initial_state = _state(args, "initial_state", initial_state, count, chunk_size, quad_q.dtype)

    name = dispatch.resolve(op, backend, quad_q.device, quad_q.dtype, width=args.sizes["S"])
    if name == "reference":
        result = autograd.run(
            op, name, op, quad_q, quad_k, lin_q, lin_k, v, gate, gate_activation=gate_activation,
            chunk_size=chunk_size, score=score, causal=causal, quad_normalizer=quad, lin_normalizer=lin_normalizer,
            rel_bias=rel_bias, lengths=lengths, cu_seqlens=cu_seqlens, initial_state=initial_state,
            return_state=return_state,
        )  # fmt: skip
        return (result[0], _own_state(result[1])) if return_state else result

    kv = closed = continuation = None
    if initial_state is not None:
        kv, closed = initial_state.kv, initial_state.position - initial_state.open_tokens
        continuation = Continuation.of(initial_state, args.sizes["B"], args.sizes["N"], lengths, cu_seqlens)
        quad_q, lin_q = continuation.extend(None, quad_q), continuation.extend(None, lin_q)
        gate = continuation.extend(None, gate) if gate is not None else None
        quad_k = continuation.extend(initial_state.quad_k, quad_k)
        lin_k = continuation.extend(initial_state.lin_k, lin_k)
        v = continuation.extend(initial_state.v, v)
        lengths, cu_seqlens = continuation.lengths, continuation.cu_seqlens
    bias = autograd.bias_rows(rel_bias, quad_q.shape[0])
    save = autograd.needs_grad(quad_q, quad_k, lin_q, lin_k, v, gate, rel_bias, kv)
    options = MixedChunkOptions(int(chunk_size), score, causal, quad, lin_normalizer, bias, kv, closed, gate_activation)
    out, kv, *_ = _mixed_chunk_attention(
        v, gate, heads=MixedChunkHeads(quad_q, quad_k, lin_q, lin_k), layout=Layout(lengths, cu_seqlens),
        options=options, save=save, backend=name,
    )  # fmt: skip
    out = out if continuation is None else continuation.restrict(out)
    if not return_state:
        return out
    if cu_seqlens is not None:
        total = cu_seqlens.diff().to(torch.int64)
    elif lengths is not None:
        total = lengths.to(torch.int64, copy=True)  # the state may be written
    else:
        total = torch.full((count,), v.shape[1], dtype=torch.int64, device=v.device)
    done = total - total % chunk_size
    opened_quad, opened_lin, opened_v = (open_chunk(x, done, total, chunk_size, cu_seqlens) for x in (quad_k, lin_k, v))
    position = total if closed is None else closed + total
    return out, MixedChunkState(kv, opened_quad, opened_lin, opened_v, position)


def mixed_chunk_step(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    state: MixedChunkState,
    gate_activation: str = "identity",
    score: str = "relu2",
    quad_normalizer: float | None = None,
    lin_normalizer: str | float = "tokens",
    rel_bias: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, MixedChunkState]:
    """One more token of causal mixed chunk attention, in time and memory independent of how many came before.

    Equal to the last row of `mixed_chunk_attention` over the whole sequence. The given state is left as it was, which
    costs a copy of it: S E + C (2 S + E) numbers a row. In place a row of 2 S + E is written, and the rest once in C
    tokens.

    Source: Hua et al. 2022 (arXiv 2202.10447), section 3.2: the recurrent reading of the causal global part.

    Args:
        quad_q: (B, 1, S), fp16, bf16, fp32 or fp64; so are quad_k, lin_q and lin_k.
        quad_k: (B, 1, S).
        lin_q: (B, 1, S).
        lin_k: (B, 1, S).
        v: (B, 1, E).
        gate: (B, 1, E) or None.
        gate_activation: as in `mixed_chunk_attention`, like the options below.
        state: what came before; its buffers set the chunk size. `MixedChunkState.empty` starts a sequence. A state
            of another floating type is converted to this call's, as `mixed_chunk_attention` does.
        score: "relu2" or "laplace".
        quad_normalizer: divisor of the local scores, C unless given.
        lin_normalizer: "tokens" or a number.
        rel_bias: relative bias, (..., 2P-1) with P >= C.
        inplace: write the tensors of `state`, which is then the new state, too: to continue twice from one,
            `clone()` it first. For decoding: nothing is differentiated. The state must be contiguous, of this call's
            type already (`MixedChunkState.to`), and finite behind its open tokens, as every state is that comes from
            here.
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        (B, 1, E) and the new state.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before any work.
        RuntimeError: for a backend that was asked for and cannot run the call.

    Example:
        >>> import torch, flashgau
        >>> state = flashgau.MixedChunkState.empty(1, width=8, value_width=16, chunk_size=4)
        >>> for _ in range(5):
        ...     x, v = torch.randn(1, 1, 8), torch.randn(1, 1, 16)
        ...     out, state = flashgau.mixed_chunk_step(x, x, x, x, v, state=state)
        >>> state.position
        tensor([5])
    """
    op = "mixed_chunk_step"
    quad_q, quad_k, lin_q, lin_k, v, gate = autocast(quad_q, quad_k, lin_q, lin_k, v, gate)
    args = Arguments(op)
    operands.mixed_chunk(args, "1", quad_q, quad_k, lin_q, lin_k, v, gate)
    operands.one_token(args, quad_q)
    args.flag("inplace", inplace)
    given, state = state, _state(args, "state", state, args.sizes["B"], None, quad_q.dtype)
    size = state.chunk_size
    quad = operands.mixed_chunk_options(args, size, score, lin_normalizer, quad_normalizer)
    operands.gate_activation(args, gate_activation)
    args.relative_bias(rel_bias, "B", size, "the chunk size")
    differentiated = autograd.needs_grad(quad_q, quad_k, lin_q, lin_k, v, gate, *state.tensors(), rel_bias)
    if inplace:
        check_in_place(args, "state", given, state, differentiated)

    name = dispatch.resolve(op, backend, quad_q.device, quad_q.dtype, width=args.sizes["S"])
    if name == "reference":
        out, after = autograd.run(
            op, name, op, quad_q, quad_k, lin_q, lin_k, v, gate, state=state, gate_activation=gate_activation,
            score=score, quad_normalizer=quad, lin_normalizer=lin_normalizer, rel_bias=rel_bias,
        )  # fmt: skip
        after = _own_state(after)
        if not inplace:
            return out, after
        return out, state.copy_(after)
    if name == "triton" and differentiated:  # its kernel for one token has no derivative
        return mixed_chunk_attention(
            quad_q, quad_k, lin_q, lin_k, v, gate, gate_activation=gate_activation, chunk_size=size, score=score,
            causal=True, quad_normalizer=quad, lin_normalizer=lin_normalizer, rel_bias=rel_bias, initial_state=state,
            return_state=True, backend=name,
        )  # type: ignore[return-value] # fmt: skip
    bias = autograd.bias_rows(rel_bias, quad_q.shape[0])
    heads = MixedChunkHeads(quad_q, quad_k, lin_q, lin_k)
    options = MixedChunkOptions(size, score, True, quad, lin_normalizer, bias, gate_activation=gate_activation)
    if differentiated:  # by PyTorch
        out, *after = autograd.run(
            op, name, op, heads=heads, v=v, gate=gate, state=OpenChunk(*state.tensors()), options=options
        )
        return out, MixedChunkState(*after)
    state = state if inplace else state.opened()
    taken: dict[str, Any] = {"heads": heads, "state": OpenChunk(*state.tensors()), "options": options}
    if name == "triton":
        return _mixed_chunk_step(v, gate, **taken, backend=name), state
    return autograd.run(op, name, "mixed_chunk_step_", v=v, gate=gate, **taken), state


def _state(
    args: Arguments, name: str, state: Any, count: int, chunk_size: int | None, dtype: torch.dtype
) -> MixedChunkState:
    """Check a state, and return it in the types that a call in `dtype` computes and leaves its own in."""
    if not isinstance(state, MixedChunkState):
        args.fail(name, f"is a {type(state).__name__}", "a flashgau.MixedChunkState", TypeError)
    for field, x in zip(FIELDS, state.tensors(), strict=True):
        args.held(f"{name}.{field}", x)
    size = state.quad_k.shape[1] if state.quad_k.dim() == 3 else None
    if size is None or size != (chunk_size or size):
        got = f"has an open chunk of shape {tuple(state.quad_k.shape)}"
        args.fail(f"{name}.quad_k", got, f"(G, C, S) with C = {chunk_size or 'chunk_size'}")
    width, values = args.sizes["S"], args.sizes["E"]
    wanted = {
        "kv": (count, width, values),
        "quad_k": (count, size, width),
        "lin_k": (count, size, width),
        "v": (count, size, values),
        "position": (count,),
    }
    for field, shape in wanted.items():
        given = tuple(getattr(state, field).shape)
        if given != shape:
            args.fail(f"{name}.{field}", f"has shape {given}", f"{shape}: one row for each sequence")
    if state.position.dtype != torch.int64:
        args.fail(f"{name}.position", f"has dtype {state.position.dtype}", "int64", TypeError)
    for field, x in zip(FIELDS[:4], state.tensors(), strict=False):
        if x.dtype not in FLOATING:
            args.fail(f"{name}.{field}", f"has dtype {x.dtype}", "float16, bfloat16, float32 or float64", TypeError)
    if readable(state.position) and bool((state.position < 0).any()):
        args.fail(f"{name}.position", f"holds {int(state.position.min())}", "counts of tokens >= 0")
    return state.to(dtype=dtype)


def _own_state(state: Any) -> MixedChunkState:
    """The reference's state as this package's."""
    return MixedChunkState(state.kv, state.quad_k, state.lin_k, state.v, state.position)


def _results(
    lin_k: Tensor, v: Tensor, gate: Tensor | None, cu_seqlens: Tensor | None, save: bool, chunk_size: int,
    causal: bool, backend: str, **_: Any,
) -> list[Tensor | None]:  # fmt: skip
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = torch.float64 if v.dtype == torch.float64 else torch.float32
    kv = v.new_empty(count, lin_k.shape[-1], v.shape[-1], dtype=sums)
    product = v.new_empty(v.shape) if save and gate is not None else None
    options, layout = MixedChunkOptions(chunk_size, causal=causal), Layout(cu_seqlens=cu_seqlens)
    kept = options.kept_states(lin_k, v, layout) if save and backend == "triton" else None
    factors = torch.float32 if v.dtype == torch.float16 else v.dtype
    return [v.new_empty(v.shape), kv, product, None if kept is None else v.new_empty(kept, dtype=factors)]


_mixed_chunk_attention = Operation(
    "mixed_chunk_attention",
    inputs="quad_q quad_k lin_q lin_k v gate? rel_bias? initial_kv?",
    data="lengths? cu_seqlens? closed_tokens?",
    results="out kv?",
    saved="product chunk_states",
    tuples={
        "heads": MixedChunkHeads,
        "saved": MixedChunkSaved,
        "layout": Layout,
        "options": MixedChunkOptions,
    },
    shapes=_results,
    op="mixed_chunk_attention",
    rows=Rows(single="cu_seqlens"),
    others=chunks.mixed_chunk_attention,
)
_mixed_chunk_step = Operation(
    "mixed_chunk_step",
    inputs="quad_q quad_k lin_q lin_k v gate? kv! open_quad_k! open_lin_k! open_v! position! rel_bias?",
    results="out",
    tuples={"heads": MixedChunkHeads, "state": OpenChunk, "options": MixedChunkOptions},
    shapes=lambda v, **_: v.new_empty(v.shape),
    op="mixed_chunk_step",
    function="mixed_chunk_step_",
)

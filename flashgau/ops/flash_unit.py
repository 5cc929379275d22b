"""A whole FLASH layer between norm and residual sum as one operator. For `flashgau.nn`; not public."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgau.contract.validate import Arguments, autocast, widened
from flashgau.eager import flash_unit as flash_unit_eager
from flashgau.eager.flash_unit_steps import FlashUnitSteps
from flashgau.options import (
    Angles,
    FlashSaved,
    FlashWeights,
    Layout,
    MixedChunkHeads,
    MixedChunkOptions,
    OpenChunk,
    ProjectionWeights,
    TokenHeads,
)

from . import autograd, chunks, dispatch, plain
from .operation import Operation
from .projection import projection, reads_raw_gate, written_projection
from .state import MixedChunkState, check_in_place


def runs_whole(x: Tensor) -> bool:
    """Whether a FLASH layer on x should run as one operator: where its attention would run on the eager backend."""
    return dispatch.resolve("mixed_chunk_attention", None, x.device, x.dtype) == "eager"


def takes_tokens(x: Tensor, key_dim: int) -> bool:
    """Whether Triton's kernel runs a token x (B, 1, d) of a FLASH layer."""
    return reads_raw_gate("mixed_chunk_step", x, key_dim)


def flash_unit(
    x: Tensor,
    weights: FlashWeights,
    *,
    residual: Tensor | None,
    angles: Angles,
    layout: Layout,
    options: MixedChunkOptions,
) -> Tensor:
    """y = (u * mixed_chunk(heads, v)) W_o + b_o (+ residual), [u, v, z] = silu(x W + b), heads = RoPE(gamma z + beta).

    x (B, N, d); angles (1 or B, N, pairs). Source: Hua et al. 2022 (arXiv 2202.10447), section 3.2.
    """
    x, w, b, w_out, b_out = autocast(x, weights.w, weights.b, weights.w_out, weights.b_out)
    weights = weights._replace(w=w, b=b, w_out=w_out, b_out=b_out)
    args = Arguments("FLASH")
    args.tensor("x", x, "B N d")
    args.sequences(*layout)
    args.relative_bias(options.rel_bias, "B", options.chunk_size, "the chunk size")
    inside = residual if residual is not None and residual.dtype == x.dtype else None
    save = autograd.needs_grad(x, *weights[:-1], options.rel_bias)
    bias = autograd.bias_rows(options.rel_bias, x.shape[0])
    y, *_ = _flash_unit(
        x, inside, weights=weights, angles=angles, layout=layout._replace(lengths=widened(layout.lengths)),
        options=options._replace(rel_bias=bias), save=save, backend="eager",
    )  # fmt: skip
    return y if residual is None or inside is not None else y + residual


def flash_unit_step(
    x: Tensor,
    weights: FlashWeights,
    *,
    residual: Tensor | None,
    angles: Angles,
    state: MixedChunkState,
    options: MixedChunkOptions,
    held: FlashUnitSteps | None = None,
    turned: Tensor | None = None,
) -> tuple[Tensor, FlashUnitSteps | None]:
    """The same of one token (B, 1, d) of each row, without gradients; `state`, of x's type, is advanced in place.

    It also gives what it has made for the tokens of this state: to be given back as `held` with the next one. `turned`
    is weights.w transposed, contiguous, if the caller has it.
    """
    x, w, b, w_out, b_out, turned = autocast(x, weights.w, weights.b, weights.w_out, weights.b_out, turned)
    weights = weights._replace(w=w, b=b, w_out=w_out, b_out=b_out)
    inside = residual if residual is not None and residual.dtype == x.dtype else None
    buffers, steps = OpenChunk(*state.tensors()), held
    differentiated = autograd.needs_grad(x, *weights[:-1], *buffers, options.rel_bias)
    traced = torch.compiler.is_compiling()
    if steps is None or traced or differentiated or not steps.fit(x, weights, buffers):
        check_in_place(Arguments("FLASH"), "state.memory", state, state.to(dtype=x.dtype), differentiated)
        # Not tensors of inference mode, which could not be written outside it.
        with nullcontext() if traced else torch.inference_mode(False), torch.no_grad():
            steps = FlashUnitSteps(x, weights, angles, buffers, options)
    y: Tensor = autograd.without_autocast(steps, x, inside, angles, options.rel_bias, turned)
    y = y if residual is None or inside is not None else y + residual
    return y, None if traced else steps


def flash_unit_token(
    x: Tensor,
    weights: FlashWeights,
    *,
    residual: Tensor | None,
    frequencies: Tensor | None,
    interleaved: bool,
    state: MixedChunkState,
    options: MixedChunkOptions,
) -> Tensor:
    """The same on Triton's kernels, which find the angles from the state's position: `frequencies` (pairs,) fp32 are
    those per token."""
    wide = projection(x, weights.w, weights.b)
    tensors = (wide, weights.gamma, weights.beta, *state.tensors(), options.rel_bias)
    check_in_place(Arguments("FLASH"), "state.memory", state, state.to(dtype=wide.dtype), autograd.needs_grad(*tensors))
    options = options._replace(rel_bias=autograd.bias_rows(options.rel_bias, wide.shape[0]))
    heads = TokenHeads(weights.gamma, weights.beta, frequencies, interleaved, weights.order)
    out = _flash_unit_token(wide, heads=heads, state=OpenChunk(*state.tensors()), options=options, backend="triton")
    return projection(out, weights.w_out, weights.b_out, residual)


def _results(
    x: Tensor, w: Tensor, gamma: Tensor, w_out: Tensor, cu_seqlens: Tensor | None, chunk_size: int, causal: bool,
    save: bool, **_: Any,
) -> list[Tensor | None]:  # fmt: skip
    y = x.new_empty(x.shape)
    if not save:
        return [y, None, None, None]
    narrow, wide = gamma.shape[1], w_out.shape[1]
    count = flash_unit_eager.state_count(x, chunk_size, narrow, wide, causal, cu_seqlens)
    starts = x.new_empty(count, narrow, wide, dtype=torch.promote_types(x.dtype, torch.float32))
    return [y, x.new_empty(*x.shape[:2], w.shape[0]), x.new_empty(*x.shape[:2], wide), starts]


def _by_others(
    x: Tensor,
    residual: Tensor | None,
    weights: FlashWeights,
    angles: Angles,
    layout: Layout,
    options: MixedChunkOptions,
    backend: str,
) -> list[Tensor]:
    to_heads = ProjectionWeights(weights.w, weights.b, weights.gamma, weights.beta)
    u, v, heads = written_projection(x, to_heads, angles)
    options = options._replace(gate_activation="identity")
    ordered = MixedChunkHeads(*(heads[i] for i in weights.order))
    product = chunks.mixed_chunk_attention(v, u, ordered, layout, options, backend)[0]
    return [plain.added(F.linear(product, weights.w_out, weights.b_out), residual)]


_flash_unit = Operation(
    "flash_unit",
    inputs="x w b? gamma beta? w_out b_out? residual+ rel_bias?",
    data="cos? sin? lengths? cu_seqlens?",
    results="y",
    saved="before products starts",
    tuples={
        "weights": FlashWeights,
        "angles": Angles,
        "saved": FlashSaved,
        "layout": Layout,
        "options": MixedChunkOptions,
    },
    shapes=_results,
    op="flash_unit",
    error="FLASH",
    others=_by_others,
)
_flash_unit_token = Operation(
    "flash_unit_token",
    inputs="wide gamma beta? kv! open_quad_k! open_lin_k! open_v! position! rel_bias?",
    data="frequencies?",
    results="out",
    tuples={"heads": TokenHeads, "state": OpenChunk, "options": MixedChunkOptions},
    shapes=lambda wide, open_v, **_: wide.new_empty(*wide.shape[:2], open_v.shape[2]),
    op="flash_unit",
    function="flash_unit_token_",
)

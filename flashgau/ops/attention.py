"""`flashgau.attention`: exact softmax attention without the matrix of scores (FlashAttention)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.contract import operands
from flashgau.contract.validate import Arguments, autocast, widened
from flashgau.eager.attention import keeps_activated
from flashgau.options import (
    AttentionAlong,
    AttentionOptions,
    AttentionResults,
    AttentionTangents,
    Gating,
    Layout,
    Pages,
    Window,
)

from . import autograd, dispatch, plain
from .folding import Rows
from .operation import Operation


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
    """Exact softmax attention in memory linear in length: softmax(scale q k^T + bias + mask) v.

    In this order: S = scale q k^T; S = softcap tanh(S / softcap); S += rel_bias; mask; P = softmax(S);
    O = dropout(P) v; with a gate O = act(gate) * O. Query i of M stands at position p = i + N - M among the N keys
    (bottom-right alignment). A row that sees no key gives 0 and zero gradients, and its log-sum-exp is -inf. Sums are
    kept in fp32 (fp64 for fp64 input). Gradients flow to q, k, v, rel_bias, sinks and gate, and are bitwise the same in
    every run.

    Source: Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), algorithms 1 and 4; Dao 2023 (arXiv 2307.08691). The
    gate: Qiu et al. 2025, "Gated Attention for Large Language Models" (arXiv 2505.06708), after the GAU of Hua et al.

    Args:
        q: queries (B, Hq, M, D), fp16, bf16, fp32 or fp64.
        k: keys (B, Hkv, N, D). Hq is a multiple of Hkv: each key head serves Hq / Hkv query heads.
        v: values (B, Hkv, N, E).
        causal: hide keys at positions above p.
        scale: factor of q k^T, 1/sqrt(D) unless given.
        window: (left, right): only keys in [p - left, p + right] are seen; None on a side leaves it unbounded.
        softcap: bound of the scores before bias and mask.
        rel_bias: relative bias as a vector (..., 2P-1), broadcastable to (B, Hq, 2P-1): key j adds
            rel_bias[P-1 + (j - p)]. P must cover the longest sequence. fp32 is welcome beside half inputs.
        sinks: (Hq,) an extra logit of each head in the softmax's denominator only. fp32 beside half is welcome.
        lengths: (B,) integers, valid keys of each right-padded row, and valid queries too if M == N. What padding
            holds does not matter, NaN included; its output rows and gradients are 0.
        cu_seqlens: (G+1,) int32, G sequences packed end to end in one row (B = 1): their ends after a leading 0.
        cu_seqlens_k: the same for the keys, if they are packed differently.
        dropout_p: probability in [0, 1] that an element of P is dropped; kept ones are scaled by 1/(1-p).
        dropout_seed: int or one-element int64 tensor: element (b, h, i, j) is kept or not by Philox-4x32-10 of
            seed and place, alike on all backends. Drawn from PyTorch's default generator unless given.
        gate: (B, Hq, M, E), or (B, Hq, M, 1) for one number per head, in the dtype of q and any strides. Where
            gradients are wanted, O is kept beside the result.
        gate_activation: act: "identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh" or "silu", as in `glu`.
        return_lse: also return the log-sum-exp of every row, (B, Hq, M) fp32, differentiable.
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        (B, Hq, M, E) in the dtype of q, or a pair with the log-sum-exp.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before any work.
        RuntimeError: for a backend that was asked for and cannot run the call.

    Example:
        >>> import torch, flashgau
        >>> q = torch.randn(2, 8, 100, 64)
        >>> k, v = torch.randn(2, 2, 100, 64), torch.randn(2, 2, 100, 64)
        >>> flashgau.attention(q, k, v, causal=True, lengths=torch.tensor([100, 37])).shape
        torch.Size([2, 8, 100, 64])
    """
    options = AttentionOptions(scale, causal, window, softcap, rel_bias, sinks, dropout_p, dropout_seed)  # type: ignore[arg-type]
    layout = Layout(lengths, cu_seqlens, cu_seqlens_k)
    return attend(Arguments("attention"), q, k, v, options, layout, return_lse, backend, gate, gate_activation)


def attend(
    args: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    layout: Layout,
    return_lse: bool,
    backend: str | None,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` for a function with a name and names of arguments of its own, which `args` has.

    The options are as `attention` takes them: not checked, the window None or a pair, the seed perhaps a number.
    """
    q, k, v, gate = autocast(q, k, v, gate)
    operands.attention(args, q, k, v)
    operands.attention_gate(args, gate, gate_activation)
    args.flag("return_lse", return_lse)
    window = operands.attention_options(args, options, layout)
    if layout.lengths is not None:
        layout = layout._replace(lengths=widened(layout.lengths))
    seed = _seed(args, options.dropout_p, options.dropout_seed, q.device)

    width = max(args.sizes["D"], args.sizes["E"])
    name = dispatch.resolve("attention", backend, q.device, q.dtype, width, args.op)
    if name == "reference":
        given = options._replace(dropout_seed=seed)._asdict() | layout._asdict()
        given |= {"gate": gate, "gate_activation": gate_activation, "return_lse": return_lse}
        return autograd.run("attention", name, "attention", q, k, v, **given)
    options = _plain(options, window, q)._replace(dropout_p=float(options.dropout_p), dropout_seed=seed)
    if gate is None:
        out, lse = _attention(q, k, v, options=options, layout=layout, backend=name)
    else:
        save = autograd.needs_grad(q, k, v, gate, options.rel_bias, options.sinks)
        gating = Gating(gate, gate_activation)
        out, lse, *_ = _gated_attention(q, k, v, gating=gating, options=options, layout=layout, save=save, backend=name)
    return (out, lse) if return_lse else out


def attend_in_pages(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, pages: Pages, options: AttentionOptions, layout: Layout
) -> tuple[Tensor, Tensor]:
    """`attend` to keys and values that Triton's kernels read in their pages: the output and the log-sum-exp.

    Without dropout, casts and gradients. What the launcher `attention_forward` says of `pages` and `layout` holds.
    """
    longest = operands.attention_in_pages(args, q, k, v, pages, layout)
    window = operands.attention_options(args, options, layout, longest)
    layout, pages = Layout(*map(widened, layout)), Pages(*map(widened, pages))
    options = _plain(options, window, q)
    out, lse = _attention_in_pages(q, k, v, options=options, layout=layout, pages=pages, backend="triton")
    return out, lse


def _plain(options: AttentionOptions, window: Window, q: Tensor) -> AttentionOptions:
    """As floors take them, but for dropout."""
    bias = options.rel_bias
    return options._replace(
        scale=None if options.scale is None else float(options.scale),
        window=window,
        rel_bias=bias.expand(q.shape[0], q.shape[1], -1) if bias is not None else None,
    )


def _seed(args: Arguments, p: float, seed: Any, device: torch.device) -> Tensor | None:
    if p == 0:
        return None
    if seed is None:
        return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        operands.seed(args, seed)
        return seed.reshape(1).to(device)
    args.integer("dropout_seed", seed, -(2**63), "an int or a one-element int64 tensor")
    if seed >= 2**63:
        args.fail("dropout_seed", f"is {seed}", "an int of 64 bits")
    return torch.full((1,), int(seed), dtype=torch.int64, device=device)  # written there: a copy would wait


def _results(q: Tensor, v: Tensor, **_: Any) -> list[Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, heads, m, _width = q.shape
    if q.transpose(1, 2).is_contiguous():  # as the heads of one projection are: joining them afterwards is a view
        out = q.new_empty(b, m, heads, v.shape[-1]).transpose(1, 2)
    else:
        out = q.new_empty(b, heads, m, v.shape[-1])
    return [out, q.new_empty(q.shape[:3], dtype=lse_dtype)]


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, rel_bias: Tensor | None, sinks: Tensor | None, **_: Any
) -> list[Tensor | None]:
    # Stored as (B, N, H, D).
    like = [t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v)]
    return [*like, *(None if t is None else t.new_empty(t.shape) for t in (rel_bias, sinks))]


def _gated_results(
    v: Tensor, gate: Tensor, gate_activation: str, save: bool, backend: str, **named: Any
) -> list[Tensor | None]:
    keeps = save and backend == "eager" and keeps_activated(gate, v.shape[-1], gate_activation)
    kept = [_results(v=v, **named)[0] if is_kept else None for is_kept in (save, keeps)]
    return [*_results(v=v, **named), *kept]


def _with_gate(gradients: list[Tensor | None], gate: Tensor) -> list[Tensor | None]:
    return [*gradients[:3], gate.new_empty(gate.shape), *gradients[3:]]


_ROWS = Rows(shared="sinks", single="cu_seqlens cu_seqlens_k dropout_seed")  # dropout depends on a row's number
_attention = Operation(
    "attention",
    inputs="q k v rel_bias? sinks?",
    data="lengths? cu_seqlens? cu_seqlens_k? dropout_seed?",
    results="out lse?",
    reads="out lse",
    tuples={
        "results": AttentionResults,
        "tangents": AttentionTangents,
        "along": AttentionAlong,
        "layout": Layout,
        "options": AttentionOptions,
    },
    shapes=_results,
    gradients=_gradients,
    op="attention",
    rows=_ROWS,
)


def _gated_by_others(
    q: Tensor, k: Tensor, v: Tensor, gating: Gating, layout: Layout, options: AttentionOptions, backend: str
) -> list[Tensor]:
    x, lse = _attention(q, k, v, options=options, layout=layout, backend=backend)
    return [plain.gated(x, *gating, plain.of_queries(layout, q.shape[2], k.shape[2])), lse]


_gated_attention = Operation(
    "gated_attention",
    inputs="q k v gate rel_bias? sinks?",
    data="lengths? cu_seqlens? cu_seqlens_k? dropout_seed?",
    results="out lse?",
    saved="product activated",
    reads="lse",
    tuples={"gating": Gating, "layout": Layout, "options": AttentionOptions},
    shapes=_gated_results,
    gradients=lambda gate, **named: _with_gate(_gradients(**named), gate),
    op="attention",
    rows=_ROWS,
    others=_gated_by_others,
)
_attention_in_pages = Operation(
    "attention_in_pages",
    inputs="q k v",
    data="block_table leftpad? lengths? cu_seqlens? cu_seqlens_k? rel_bias? sinks?",
    results="out lse?",
    tuples={"pages": Pages, "layout": Layout, "options": AttentionOptions},
    shapes=_results,
    op="attention",
    function="attention_forward",
    differentiable=False,
)

"""Launchers of quadratic gated attention's kernels (`gau_kernels.py`): forward and backward.

`gau_with` runs them, differentiably, with scores of your own (`own_scores.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashgau.contract.operands import GATED_SCORES
from flashgau.options import GatedOptions, Layout

from .common import (
    FUSED_ADDITION,
    Choose,
    Config,
    Sequences,
    Sizes,
    blocks_of,
    chosen_by,
    launcher,
    sequences_of,
)
from .gated import bias_rule, precisions, prologue, room_for_panel, rows, sums_like
from .gau_kernels import (
    dbias_kernel,
    dkv_kernel,
    dq_kernel,
    gradient_kernel,
    lse_kernel,
    probs_kernel,
    product_kernel,
)
from .own_scores import BUILT_IN, OwnScores, check_operands, check_own, check_sequences, once

_FUSED_WIDTH = 512  # of the values; up to it, recomputing scores for each tile is cheaper than storing them


class _GatedCall(NamedTuple):
    """What all kernels of one call share."""

    sequences: Sequences
    rule: tuple[Any, ...]  # scale, right, bias, bias_batch, max_distance, aux
    score: str  # of `probs`
    scaling: str  # of `scales`
    rows: int  # of the batch that have blocks of their own: 1 when packed
    width: int  # S as a block
    max_seqlens: tuple[int, int]  # queries and keys of the longest sequence
    precision: str  # of products of inputs
    factors: str  # of products of weights, see `factors`
    probs_like: Tensor  # a tensor of their type


@launcher
def gau_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
    save: bool = False,
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output (B, M, E) and, when the backward will want it (`save` and a gate), the ungated product A v."""
    return _forward(q, k, v, gate, layout, options, BUILT_IN, save, config)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    layout: Layout,
    options: GatedOptions,
    own: OwnScores,
    save: bool,
    config: Config | Choose | None,
) -> tuple[Tensor, Tensor | None]:
    """With functions of a user."""
    b, m, s = q.shape
    n, e = k.shape[1], v.shape[2]
    out = q.new_empty(b, m, e)
    product = q.new_empty(b, m, e) if save and gate is not None else None
    if out.numel() == 0 or n == 0:
        return out.zero_(), product if product is None else product.zero_()
    call = _call(q, k, layout, options, own)
    choose = chosen_by(config)
    lse = _lse(call, q, k, own, choose)
    panels = e > _FUSED_WIDTH or m <= 16
    config = choose("gau_product" if panels else "gau_fused", call.probs_like, call.width, rows=m)
    n_blocks = blocks_of(call.sequences, m, 1, config.block_m)
    total = n_blocks * call.rows
    n_tiles = triton.cdiv(e, config.block_n)
    scoring = {"SCORE": call.score, "SCALING": call.scaling}
    sizes = {"S": s, "BS": call.width, "BM": config.block_m, "BN": config.block_k}
    sizes |= own.sizes(backward=False)

    def multiply(first: int, count: int, panel: Tensor | None, panel_width: int) -> None:
        product_kernel[(count * n_tiles,)](
            rows(q), rows(k), rows(v), rows(gate), lse, panel, rows(product), rows(out), *call.sequences,
            *call.rule, n_blocks, first, panel_width,
            Sizes(
                **sizes, E=e, BE=config.block_n, GATE=options.gate_activation, PRECISION=call.precision,
                FACTORS=call.factors,
            ),
            **scoring, **config.launch(),
        )  # fmt: skip

    if not panels:
        multiply(0, total, None, 0)
        return out, product
    n_across = triton.cdiv(call.max_seqlens[1], config.block_k)
    panel_width = n_across * config.block_k
    making = choose("gau_weights", call.probs_like, call.width, rows=m)
    panel, step = room_for_panel(call.probs_like, config.block_m * panel_width, total)
    for first in range(0, total, step):
        count = min(step, total - first)
        probs_kernel[(count * n_across,)](
            rows(q), rows(k), lse, panel, *call.sequences, *call.rule, n_blocks, first, n_across, panel_width,
            Sizes(**sizes, PRECISION=call.precision), **scoring, **making.launch(),
        )  # fmt: skip
        multiply(first, count, panel, panel_width)
    return out, product


@launcher
def gau_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    product: Tensor | None,
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, gate and rel_bias (B, 2P-1); None where there is no such input."""
    return _backward((dout, product), q, k, v, gate, layout, options, BUILT_IN, config)


def _backward(
    dout_and_product: tuple[Tensor, Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    layout: Layout,
    options: GatedOptions,
    own: OwnScores,
    config: Config | Choose | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """With functions of a user."""
    dout, product = dout_and_product
    b, m, s = q.shape
    n, e, rel_bias = k.shape[1], v.shape[2], options.rel_bias
    product = None if gate is None else product  # which is empty then
    dq = q.new_zeros(b, m, s, dtype=torch.float32)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dgate = gate.new_empty(gate.shape) if gate is not None else None
    dbias = q.new_zeros(rel_bias.shape, dtype=torch.float32) if rel_bias is not None else None
    if m * e == 0 or n == 0 or b == 0:
        dgate = dgate if dgate is None else dgate.zero_()
        return dq.to(q.dtype), dk.zero_(), dv.zero_(), dgate, sums_like(dbias, rel_bias)
    call = _call(q, k, layout, options, own)
    choose = chosen_by(config)
    lse = _lse(call, q, k, own, choose)
    if call.score == "softmax" and product is None:
        product, _ = _forward(q, k, v, None, layout, options, own, False, choose)
    dx, delta = prologue(
        call.sequences, dout, gate, product, dgate, options.gate_activation, choose, softmax=call.score == "softmax"
    )

    config, values, queries = (
        choose(name, call.probs_like, call.width) for name in ("gau_gradient", "gau_dv", "gau_dq")
    )
    bm, bn = config.block_m, config.block_n
    n_blocks, n_row_blocks = blocks_of(call.sequences, n, 1, bn), blocks_of(call.sequences, m, 1, bm, rest=False)
    total, n_across = n_blocks * call.rows, triton.cdiv(call.max_seqlens[0], bm)
    panel_width = n_across * bm
    parted = own.score_mod is not None and dbias is not None
    room, step = room_for_panel(call.probs_like, (3 if parted else 2) * bn * panel_width, total)
    panel, dpanel, *other = room.view(3 if parted else 2, -1)
    dbias_panel = other[0] if parted else None
    scaling, rule = {"SCALING": call.scaling}, call.rule
    blocks, slopes = {"BM": bm, "BN": bn}, own.sizes(backward=True)
    for first in range(0, total, step):
        count = min(step, total - first)
        gradient_kernel[(count * n_across,)](
            rows(q), rows(k), rows(v), rows(dx), lse, delta, panel, dpanel, dbias_panel, *call.sequences, *rule,
            n_blocks, first, n_across, panel_width,
            Sizes(S=s, E=e, BS=call.width, BE=config.block_k, **blocks, PRECISION=call.precision, **slopes),
            SCORE=call.score, **scaling, **config.launch(),
        )  # fmt: skip
        dkv_kernel[(count * triton.cdiv(e, values.block_n),)](
            panel, rows(dx), rows(dv), *call.sequences, *rule[:2], n_blocks, first, panel_width,
            Sizes(E=e, BE=values.block_n, **blocks, FACTORS=call.factors), SCALING=None, **values.launch(),
        )  # fmt: skip
        dkv_kernel[(count * triton.cdiv(s, min(call.width, 64)),)](
            dpanel, rows(q), rows(dk), *call.sequences, *rule[:2], n_blocks, first, panel_width,
            Sizes(E=s, BE=min(call.width, 64), **blocks, FACTORS=call.factors), **scaling, **queries.launch(),
        )  # fmt: skip
        dq_kernel[(n_row_blocks * call.rows,)](
            dpanel, rows(k), rows(dq), *call.sequences, *rule[:2], n_row_blocks, n_blocks, first, first + count,
            panel_width, Sizes(S=s, BS=call.width, **blocks, FACTORS=call.factors), **scaling, **queries.launch(),
        )  # fmt: skip
        if dbias is not None:
            across = triton.cdiv(dbias.shape[-1], 64)
            dbias_kernel[(b * across,)](
                dbias_panel if parted else dpanel, dbias, *call.sequences, rule[1], rule[4], n_blocks, across, first,
                first + count, panel_width,
                BD=64, BN=bn, **FUSED_ADDITION,
            )  # fmt: skip
    return dq.to(q.dtype), dk, dv, dgate, sums_like(dbias, rel_bias)


def gau_with(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    score_mod: Any = None,
    score_slope: Any = None,
    weight_mod: Any = None,
    weight_slope: Any = None,
    aux: Tensor | None = None,
    score: str | None = None,
    normalizer: str | float = "keys",
    causal: bool = False,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: Config | Choose | None = None,
) -> Tensor:
    """Gated attention with scores of your own, by the kernels of `flashgau.gau_attention`, forward and backward.

        S = score_mod(q k^T / n) + rel_bias       A = weight_mod(S), or the built-in `score` of S
        O = gate * (A v)                          dS = dA * weight_slope(S) * score_slope

    Functions are those of `flashgau.kernels.attention.attention_with`, with 0 for the head.

    Args:
        q: (B, M, S), fp16, bf16 or fp32, S <= 256.
        k: (B, N, S).
        v: (B, N, E), of any width.
        gate: (B, M, E), or None.
        score_mod: of the scaled scores; None leaves them.
        score_slope: its derivative; gradients need it.
        weight_mod: an elementwise weight in the place of a built-in one.
        weight_slope: its derivative; gradients need it.
        aux: what the first two read, a contiguous fp32 tensor, of which they get the pointer. It has no gradient.
        score: "relu2" (unless given), "laplace", "softmax" or "softmax_plus"; None with `weight_mod`.
        normalizer: n, "keys", "row" or a number; a softmax has its own factor.
        causal: a query sees no key after its position.
        rel_bias: (2P-1,) or (B, 2P-1); P covers the longest sequence.
        lengths: (B,) valid tokens of right-padded rows.
        cu_seqlens: (G+1,) offsets of packed sequences.
        config: of the launches, as launchers take it.

    Returns:
        (B, M, E), differentiable once in q, k, v, gate and rel_bias.

    Raises:
        TypeError: if a function is not jitted, or a tensor has another kind.
        ValueError: if functions, slopes, `score` and `aux` do not belong together, or shapes do not.
        RuntimeError: where Triton cannot run.

    Example:
        >>> import torch, triton, triton.language as tl
        >>> @triton.jit
        ... def sigmoid(b_s):
        ...     return tl.sigmoid(b_s)
        >>> @triton.jit
        ... def slope(b_s):
        ...     return tl.sigmoid(b_s) * (1 - tl.sigmoid(b_s))
        >>> q, k, v = torch.randn(1, 33, 16), torch.randn(1, 33, 16), torch.randn(1, 33, 64)
        >>> gau_with(q, k, v, weight_mod=sigmoid, weight_slope=slope, causal=True).shape  # doctest: +SKIP
        torch.Size([1, 33, 64])
    """
    op, own = "gau_with", OwnScores(score_mod, score_slope, weight_mod, weight_slope, aux)
    _check_call(op, own, (q, k, v, gate), score, normalizer, rel_bias, cu_seqlens is not None)
    check_sequences(op, q.shape[0], q.shape[1], k.shape[1], lengths, cu_seqlens, None)
    differentiated = any(x is not None and x.requires_grad for x in (q, k, v, gate, rel_bias))
    check_own(op, own, differentiated=differentiated and torch.is_grad_enabled(), device=q.device)
    if rel_bias is not None:
        rel_bias = rel_bias.expand(q.shape[0], rel_bias.shape[-1])
    options = GatedOptions(score or "relu2", normalizer, causal)
    out: Tensor = _OwnGated.apply(q, k, v, gate, rel_bias, Layout(lengths, cu_seqlens), options, own, config)
    return out


def _check_call(
    op: str,
    own: OwnScores,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    score: str | None,
    normalizer: str | float,
    rel_bias: Tensor | None,
    packed: bool,
) -> None:
    """Refuse what the kernels would read wrongly."""
    q, k, v, gate = tensors
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, Tensor) and x.dim() != 3:
            raise ValueError(f"{op}: `{name}` has shape {tuple(x.shape)}; expected three axes, (B, N, S) or (B, N, E)")
    one_head = [x.unsqueeze(1) if isinstance(x, Tensor) else x for x in (q, k, v)]
    check_operands(op, one_head[0], one_head[1], one_head[2], widest_value=2**20)
    (b, m, _), n, e = q.shape, k.shape[1], v.shape[2]
    for name, y in (("gate", gate), ("rel_bias", rel_bias)):
        if y is not None and not (
            isinstance(y, Tensor) and y.device == q.device and y.dtype in (q.dtype, torch.float32)
        ):
            got = f"has dtype {y.dtype} on {y.device}" if isinstance(y, Tensor) else f"is a {type(y).__name__}"
            raise TypeError(f"{op}: `{name}` {got}; expected a tensor of {q.dtype} on {q.device}")
    if gate is not None and (gate.shape != (b, m, e) or gate.dtype != q.dtype):
        got = f"`gate` has shape {tuple(gate.shape)} and dtype {gate.dtype}"
        raise ValueError(f"{op}: {got}; expected {(b, m, e)} and {q.dtype}")
    if score is not None and own.weight_mod is not None:
        raise ValueError(f"{op}: `score` is {score!r} with `weight_mod`, which takes its place; expected one of them")
    if score is not None and score not in GATED_SCORES:
        raise ValueError(f"{op}: `score` is {score!r}; expected one of {', '.join(GATED_SCORES)}")
    number = isinstance(normalizer, (int, float)) and not isinstance(normalizer, bool) and normalizer > 0
    if normalizer not in ("keys", "row") and not number:
        raise ValueError(f"{op}: `normalizer` is {normalizer!r}; expected 'keys', 'row' or a positive number")
    if str(score).startswith("softmax") and normalizer != "keys":
        raise ValueError(f"{op}: `normalizer` is {normalizer!r} with a softmax, which has its own; expected none")
    if rel_bias is not None:
        longest = 1 if packed else max(m, n, 1)
        fits = rel_bias.dim() in (1, 2) and rel_bias.shape[:-1] in ((), (1,), (b,)) and rel_bias.shape[-1] % 2
        if not fits or rel_bias.shape[-1] < 2 * longest - 1:
            got = f"`rel_bias` has shape {tuple(rel_bias.shape)}"
            raise ValueError(f"{op}: {got}; expected (2P-1,) or (B, 2P-1) with P >= {longest}")


class _OwnGated(torch.autograd.Function):
    """Autograd's view of the launchers with a user's functions."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        rel_bias: Tensor | None,
        layout: Layout,
        options: GatedOptions,
        own: OwnScores,
        config: Config | Choose | None,
    ) -> Tensor:
        with torch.cuda.device_of(q):
            options_with = options._replace(rel_bias=rel_bias)
            out, product = _forward(q, k, v, gate, layout, options_with, own, gate is not None, config)
        ctx.save_for_backward(q, k, v, gate, rel_bias, product)
        ctx.rest = layout, options, own, config
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate, rel_bias, product = ctx.saved_tensors
        layout, options, own, config = ctx.rest
        options = options._replace(rel_bias=rel_bias)
        with torch.no_grad(), torch.cuda.device_of(q):
            grads: tuple[Any, ...] = _backward((dout, product), q, k, v, gate, layout, options, own, config)
        return *once("gau_with", grads, dout, q, k, v, gate, rel_bias), None, None, None, None


def _call(q: Tensor, k: Tensor, layout: Layout, options: GatedOptions, own: OwnScores) -> _GatedCall:
    """The options as the kernels take them."""
    score, normalizer, causal, rel_bias, _ = options
    cu_seqlens = layout.cu_seqlens
    softmax = score.startswith("softmax")
    if softmax:
        scaling, scale = "log" if score == "softmax_plus" else "number", q.shape[-1] ** -0.5
    else:
        scaling, scale = ("number", 1 / float(normalizer)) if not isinstance(normalizer, str) else (normalizer, 1.0)
    max_seqlens = q.shape[1], k.shape[1]
    if cu_seqlens is not None:  # the only value read on the host: panels as wide as the packed batch would be many
        most = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
        max_seqlens = (min(max(most, 1), k.shape[1]),) * 2
    precision, factors, probs_like = precisions(q)
    return _GatedCall(
        sequences=sequences_of(q.shape[0], q.shape[1], k.shape[1], *layout),
        rule=(scale, 0 if causal else None, *bias_rule(rel_bias), own.aux),
        score="softmax" if softmax else score,
        scaling=scaling,
        rows=q.shape[0] if cu_seqlens is None else 1,
        width=max(16, triton.next_power_of_2(q.shape[-1])),
        max_seqlens=max_seqlens,
        precision=precision,
        factors=factors,
        probs_like=probs_like,
    )


def _lse(call: _GatedCall, q: Tensor, k: Tensor, own: OwnScores, choose: Choose) -> Tensor | None:
    """The LSE (B, M) of a softmax's rows; None for another score."""
    if call.score != "softmax":
        return None
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    config: Config = choose("gau_lse", q, call.width)
    n_blocks = blocks_of(call.sequences, q.shape[1], 1, config.block_m, rest=False)
    blocks = {"BS": call.width, "BM": config.block_m, "BN": config.block_n}
    sizes = Sizes(S=q.shape[-1], **blocks, PRECISION=call.precision, **own.sizes(backward=False))
    lse_kernel[(n_blocks * call.rows,)](
        rows(q), rows(k), lse, *call.sequences, *call.rule, n_blocks, sizes, SCALING=call.scaling, **config.launch(),
    )  # fmt: skip
    return lse

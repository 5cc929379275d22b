"""Launchers of quadratic gated attention's kernels (`gau_kernels.py`): forward and backward.

`gau_with` runs them, differentiably, with scores of your own (`own_scores.py`).
"""

from __future__ import annotations

import math
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
    heads,
    launcher,
    parts_of,
    processors,
    sequences_of,
)
from .gated import bias_rule, precisions, prologue, room_for_panel, rows, sums_like
from .gau_kernels import (
    dbias_kernel,
    dkv_kernel,
    dq_kernel,
    gradient_kernel,
    lse_kernel,
    merge_kernel,
    probs_kernel,
    product_kernel,
)
from .own_scores import BUILT_IN, OwnScores, check_operands, check_own, check_sequences, once

_FUSED_WIDTH = 512  # of the values; up to it, recomputing scores for each tile is cheaper than storing them
_PART = 8  # blocks of keys: what handing over a part of a sum is worth
_SHORT = 1024  # tokens that packed sequences have in the mean; below, that is cheaper than launches for each panel


class GatedCall(NamedTuple):
    """What all kernels of one call share."""

    sequences: Sequences
    rule: tuple[Any, ...]  # scale, right, bias, bias_batch, max_distance, aux
    score: str  # of `probs`
    scaling: str  # of `scales`
    rows: int  # of the batch that have blocks of their own: 1 when packed
    width: int  # S as a block
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
    call = call_of(q, k, layout, options, own)
    choose = chosen_by(config)
    lse = row_lse(call, q, k, own, choose)
    short = call.sequences.cu_seqlens_q is not None and n < _SHORT * call.sequences.n_sequences
    panels = (e > _FUSED_WIDTH and not short) or m <= 16
    if panels:
        config = choose("gau_product", call.probs_like, call.width, rows=m)
    else:  # what is made of a score takes registers beside the product
        extras = call.score != "relu2" or options.rel_bias is not None or own.given
        config = choose("gau_fused", call.probs_like, call.width, rows=m, options=extras)
    n_blocks = blocks_of(call.sequences, m, 1, config.block_m)
    total = n_blocks * call.rows
    n_tiles = triton.cdiv(e, config.block_n)
    n_parts = parts_of(total * n_tiles, processors(q.device), triton.cdiv(n, _PART * config.block_k))
    parts, targets = None, (rows(gate), rows(product), rows(out))
    if n_parts is not None:
        parts = heads(q.new_empty(n_parts, b, m, e, dtype=torch.float32).transpose(0, 1))
    scoring = {"SCORE": call.score, "SCALING": call.scaling}
    sizes = {"S": s, "BS": call.width, "BM": config.block_m, "BN": config.block_k}
    sizes |= own.sizes(backward=False)
    tile = {"E": e, "BE": config.block_n, "GATE": options.gate_activation}

    def multiply(first: int, count: int, panel: Tensor | None, panel_width: int) -> None:
        gate_in, product_in, out_in = targets if parts is None else (None, None, parts)
        product_kernel[(count * n_tiles, n_parts or 1)](
            rows(q), rows(k), rows(v), gate_in, lse, panel, product_in, out_in, *call.sequences, *call.rule,
            n_blocks, first, panel_width, n_parts,
            Sizes(**sizes, **tile, PRECISION=call.precision, FACTORS=call.factors),
            **scoring, **config.launch(),
        )  # fmt: skip

    if panels:
        making = choose("gau_weights", call.probs_like, call.width, rows=m)
        bn = max(making.block_n, config.block_k)  # a block that is read is written whole
        blocks_across = triton.cdiv(n, bn)
        panel_width = blocks_across * bn
        panel, step = room_for_panel(call.probs_like, config.block_m * panel_width, total, n_tiles)
        for after in range(total, 0, -step):  # what is left comes last, and has the fewest keys in a causal call
            first = max(0, after - step)
            count = after - first
            n_across = _across(blocks_across, count, q.device, 4)
            probs_kernel[(count * n_across,)](
                rows(q), rows(k), lse, panel, *call.sequences, *call.rule, n_blocks, first, n_across, panel_width,
                Sizes(**sizes | {"BN": bn}, PRECISION=call.precision), **scoring, **making.launch(),
            )  # fmt: skip
            multiply(first, count, panel, panel_width)
    else:
        multiply(0, total, None, 0)
    if parts is not None:
        n_blocks = blocks_of(call.sequences, m, 1, 1)
        merge_kernel[(n_blocks * call.rows * n_tiles,)](
            parts, *targets, *call.sequences, n_blocks, n_parts, Sizes(**tile, PARTS=16), **FUSED_ADDITION,
        )  # fmt: skip
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
    dq = q.new_empty(b, m, s)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dgate = gate.new_empty(gate.shape) if gate is not None else None
    dbias = q.new_zeros(rel_bias.shape, dtype=torch.float32) if rel_bias is not None else None
    if m * e == 0 or n == 0 or b == 0:
        dgate = dgate if dgate is None else dgate.zero_()
        return dq.zero_(), dk.zero_(), dv.zero_(), dgate, sums_like(dbias, rel_bias)
    call = call_of(q, k, layout, options, own)
    choose = chosen_by(config)
    lse = row_lse(call, q, k, own, choose)
    if call.score == "softmax" and product is None:
        product, _ = _forward(q, k, v, None, layout, options, own, False, choose)
    dx, delta = prologue(
        call.sequences, dout, gate, product, dgate, options.gate_activation, choose, softmax=call.score == "softmax"
    )

    config, values, queries = (
        choose(name, call.probs_like, call.width) for name in ("gau_gradient", "gau_dv", "gau_dq")
    )
    bm, bn = config.block_m, config.block_n
    bq, bs = min(queries.block_m, bm), min(call.width, max(16, values.block_n // 2))
    n_blocks, n_row_blocks = blocks_of(call.sequences, n, 1, bn), blocks_of(call.sequences, m, 1, bq)
    total, blocks_across = n_blocks * call.rows, triton.cdiv(m, bm)
    panel_width, tiles = blocks_across * bm, triton.cdiv(e, values.block_n) + triton.cdiv(s, bs)
    # dS as the bias's gradient needs it: without a function's slope, nor a scale that could not be taken out again.
    parted = dbias is not None and (own.score_mod is not None or not 1e-20 < call.rule[0] < 1e20)
    room, step = room_for_panel(call.probs_like, (3 if parted else 2) * bn * panel_width, total, tiles)
    panel, dpanel, *other = room.view(3 if parted else 2, -1)
    dbias_panel = other[0] if parted else None
    sums = q.new_empty(b, m, s, dtype=torch.float32) if step < total else None
    rule, slopes = call.rule, own.sizes(backward=True)
    for first in range(0, total, step):
        count = min(step, total - first)
        n_across = _across(blocks_across, count, q.device, 16)
        gradient_kernel[(count * n_across,)](
            rows(q), rows(k), rows(v), rows(dx), lse, delta, panel, dpanel, dbias_panel, *call.sequences, *rule,
            n_blocks, first, n_across, panel_width,
            Sizes(S=s, E=e, BS=call.width, BE=config.block_k, BM=bm, BN=bn, PRECISION=call.precision, **slopes),
            SCORE=call.score, SCALING=call.scaling, **config.launch(),
        )  # fmt: skip
        dkv_kernel[(count * tiles,)](
            panel, dpanel, rows(dx), rows(q), rows(dv), rows(dk), *call.sequences, rule[1], n_blocks, first, count,
            panel_width,
            Sizes(
                S=s, E=e, BS=bs, BE=values.block_n, BN=bn, BK=min(values.block_k, bm), FACTORS=call.factors
            ),
            **values.launch(),
        )  # fmt: skip
        dq_kernel[(n_row_blocks * call.rows,)](
            dpanel, rows(k), rows(sums), rows(dq), *call.sequences, rule[1], n_row_blocks, first, first + count,
            panel_width, Sizes(S=s, BS=call.width, BM=bq, BN=bn, FACTORS=call.factors), **queries.launch(),
        )  # fmt: skip
        if dbias is not None:
            across = triton.cdiv(dbias.shape[-1], 64)
            dbias_kernel[(b * across,)](
                dbias_panel if parted else dpanel, dbias, *call.sequences, *rule[:2], rule[4], n_blocks, across, first,
                first + count, panel_width,
                BD=64, BN=bn, SCALING=None if parted else call.scaling, **FUSED_ADDITION,
            )  # fmt: skip
    return dq, dk, dv, dgate, sums_like(dbias, rel_bias)


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
    number = isinstance(normalizer, (int, float)) and not isinstance(normalizer, bool) and 0 < normalizer < math.inf
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


def call_of(q: Tensor, k: Tensor, layout: Layout, options: GatedOptions, own: OwnScores) -> GatedCall:
    """The options as the kernels take them."""
    score, normalizer, causal, rel_bias, _ = options
    softmax = score.startswith("softmax")
    if softmax:
        scaling, scale = "log" if score == "softmax_plus" else "number", q.shape[-1] ** -0.5
    else:
        scaling, scale = ("number", 1 / float(normalizer)) if not isinstance(normalizer, str) else (normalizer, 1.0)
    precision, factors, probs_like = precisions(q)
    return GatedCall(
        sequences=sequences_of(q.shape[0], q.shape[1], k.shape[1], *layout),
        rule=(scale, 0 if causal else None, *bias_rule(rel_bias), own.aux),
        score="softmax" if softmax else score,
        scaling=scaling,
        rows=q.shape[0] if layout.cu_seqlens is None else 1,
        width=max(16, triton.next_power_of_2(q.shape[-1])),
        precision=precision,
        factors=factors,
        probs_like=probs_like,
    )


def _across(blocks: int, slots: int, device: torch.device, each: int) -> int:
    """How many programs share the blocks of a slot of a panel: `each` for every processor, in all slots together.

    A slot is as wide as the longest sequence may be, which nobody has looked for among packed ones: with a program for
    every block, those with nothing to do would be most.
    """
    return min(blocks, triton.cdiv(each * processors(device), slots))


def row_lse(call: GatedCall, q: Tensor, k: Tensor, own: OwnScores, choose: Choose) -> Tensor | None:
    """The LSE (B, M) of a softmax's rows; None for another score."""
    if call.score != "softmax":
        return None
    config: Config = choose("gau_lse", q, call.width)
    n_blocks = blocks_of(call.sequences, q.shape[1], 1, config.block_m, rest=False)
    n_parts = parts_of(n_blocks * call.rows, processors(q.device), triton.cdiv(k.shape[1], _PART * config.block_n))
    lse = q.new_empty(n_parts or 1, *q.shape[:2], dtype=torch.float32)
    blocks = {"BS": call.width, "BM": config.block_m, "BN": config.block_n}
    sizes = Sizes(S=q.shape[-1], **blocks, PRECISION=call.precision, **own.sizes(backward=False))
    lse_kernel[(n_blocks * call.rows, n_parts or 1)](
        rows(q), rows(k), lse, *call.sequences, *call.rule, n_blocks, lse[0].numel(), n_parts, sizes,
        SCALING=call.scaling, **config.launch(),
    )  # fmt: skip
    return lse[0] if n_parts is None else lse.logsumexp(0)

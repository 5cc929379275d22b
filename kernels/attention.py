"""Launchers of softmax attention's kernels (`attention_kernels.py`): forward and backward.

`attention_with` runs them, differentiably, with scores of your own (`own_scores.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from flashgau.options import AttentionOptions, AttentionResults, Gating, Layout, Pages, Window

from .attention_kernels import (
    AttentionRule,
    Beside,
    PagedKeys,
    dbias_kernel,
    delta_kernel,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
    merge_kernel,
)
from .common import (
    FUSED_ADDITION,
    Choose,
    Config,
    Sizes,
    blocks_of,
    chosen_by,
    heads,
    launcher,
    matmul_precision,
    parts_of,
    processors,
    sequences_of,
)
from .descriptors import describable, launched
from .own_scores import BUILT_IN, OwnScores, check_operands, check_options, check_own, once

_MERGED = 8192  # numbers of O, of all parts of a row, that one program reads at once


@launcher
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
    pages: Pages = Pages(),
    *,
    config: Config | Choose | None = None,
) -> AttentionResults:
    """Output (B, Hq, M, E) and log-sum-exp (B, Hq, M) of every query row.

    With `pages`, k is (pages, Hkv, tokens of a page, D) and v alike, in any strides. Row b of the table has the pages
    of row b of q, or of the b-th sequence of packed queries; the keys follow each other in them, behind `leftpad[b]`
    tokens. `lengths` counts the keys alone, also if there are as many queries; of packed ones the differences of
    `cu_seqlens_k` count them. There is no backward of it.
    """
    out, lse, _ = _forward(q, k, v, layout, options, BUILT_IN, config, pages)
    return AttentionResults(out, lse)


@launcher
def gated_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gating: Gating,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
    save: bool = False,
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """act(gate) * O, the log-sum-exp of the scores and, if `save`, O; act(gate) is never kept."""
    return *_forward(q, k, v, layout, options, BUILT_IN, config, gating=gating, save=save), None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    options: AttentionOptions,
    own: OwnScores,
    config: Config | Choose | None,
    pages: Pages = Pages(),
    gating: Gating | None = None,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """With functions of a user. An elementwise weight has no log-sum-exp: an empty tensor stands for it."""
    b, n_heads, m, d = q.shape
    n_kv_heads, n, e = k.shape[1], k.shape[2], v.shape[-1]
    paged, size, total = None, dict[str, Any](), n
    if pages.block_table is not None:
        table, leftpad = pages.block_table.contiguous(), pages.leftpad
        paged = PagedKeys(table, leftpad if leftpad is None else leftpad.contiguous(), k.shape[0])
        size = {"PAGE": max(n, 1)}
        n *= table.shape[1] if k.shape[0] else 0  # the most keys that a sequence may have
        total = n if layout.cu_seqlens is None else n * table.shape[0]
    out = empty_output(q, e)
    softmax = own.weight_mod is None
    lse = q.new_empty(q.shape[:3] if softmax else 0, dtype=torch.float32)
    product = torch.empty_like(out) if save and gating is not None else None
    if out.numel() == 0:
        return out, lse, product
    groups = n_heads // n_kv_heads
    sequences = sequences_of(b, m, total, *layout)
    rule = rule_of(q, n, options, own)
    widths = _widths(d, e)
    width, extras, biased = max(widths["BD"], widths["BE"]), _extras(rule, own), rule.bias is not None
    config = chosen_by(config)("attention_forward", q, width, rows=m * groups, options=extras or biased)
    if paged is not None:  # loads of the table, on which those of keys depend, take half of the stages
        config = replace(config, num_stages=2 * config.num_stages - 1, asynchronous=False)
    n_blocks = blocks_of(sequences, m, groups, config.block_m)
    per_block = n_kv_heads * (b if layout.cu_seqlens is None else 1)
    working = blocks_of(sequences, m, groups, config.block_m, rest=False) * per_block
    n_parts = parts_of(working, processors(q.device), triton.cdiv(n, config.block_n))
    parts, sums = heads(out), lse if softmax else None
    if n_parts is not None:
        every = q.new_empty(n_parts, b, n_heads, m, e, dtype=torch.float32)
        parts = heads(every.flatten(0, 1))
        sums = q.new_empty(2, n_parts, b, n_heads, m, dtype=torch.float32) if softmax else None
    sizes: dict[str, Any] = {"GROUPS": groups, "D": d, "E": e, **widths, "PRECISION": matmul_precision(q.dtype)}
    copies = _copies(config, k, v)
    if config.asynchronous:
        sizes["ASYNCHRONOUS"] = True
    gate, extent = None, dict[str, Any]()
    if gating is not None:
        gate, extent = heads(gating.gate.expand(out.shape)), {"GATE": gating.gate_activation}
    inside = n_parts is None and gate is not None
    kept = heads(product) if inside and product is not None else None
    beside = Beside(paged, gate if inside else None, kept) if inside or paged is not None else None
    if size.get("PAGE", config.block_n) * max(k.stride(2), v.stride(2)) < 2**31:
        sizes["NEAR"] = True
    launched(
        forward_kernel[(n_blocks * per_block, n_parts or 1)],
        heads(q), heads(k), heads(v), parts, sums, *sequences, *rule, n_blocks, n_kv_heads, n_parts,
        Sizes(
            **sizes, **size, **copies, **(extent if inside else {}), BM=config.block_m, BN=config.block_n,
            **own.sizes(backward=False),
        ),
        beside,
        described=bool(copies), **config.launch(),
    )  # fmt: skip
    if n_parts is not None and not softmax:  # there is nothing to weigh the parts by: they add up
        out.copy_(every.sum(0))
    elif n_parts is not None:
        whole, apart = (x if x is None or x.is_contiguous() else q.new_empty(b, n_heads, m, e) for x in (out, product))
        merge_kernel[(lse.numel(),)](
            every, sums, whole, lse, gate, apart, lse.numel(), n_parts, n_heads, m,
            E=e, BE=widths["BE"], PARTS=_MERGED // widths["BE"], PLAIN=_plain(rule, own), GATE=extent.get("GATE"),
            **FUSED_ADDITION,
        )  # fmt: skip
        for x, made in ((out, whole), (product, apart)):
            if x is not None and made is not None and made is not x:
                x.copy_(made)
    return out, lse, product


@launcher
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: AttentionResults,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, rel_bias (B, Hq, 2P-1) and sinks (Hq,); None where there is no such input."""
    return _backward((dout, dlse), q, k, v, results, layout, options, BUILT_IN, config)[:5]


@launcher
def gated_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    product: Tensor,
    activated: Tensor | None,
    gating: Gating,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, gate, rel_bias (B, Hq, 2P-1) and sinks (Hq,); None where there is no such input."""
    del activated  # the kernels read the gate
    results = AttentionResults(product, lse)
    dq, dk, dv, dbias, dsinks, dgate = _backward(
        (dout, dlse), q, k, v, results, layout, options, BUILT_IN, config, gating
    )
    assert dgate is not None
    return dq, dk, dv, dgate, dbias, dsinks


def _backward(
    dresults: tuple[Tensor, Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: AttentionResults,
    layout: Layout,
    options: AttentionOptions,
    own: OwnScores,
    config: Config | Choose | None,
    gating: Gating | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """With functions of a user; the last is the gradient of a gate."""
    dout, dlse = dresults
    (out, lse), rel_bias, sinks = results, options.rel_bias, options.sinks
    b, n_heads, m, d = q.shape
    n_kv_heads, n, e = k.shape[1], k.shape[2], v.shape[-1]
    groups = max(1, n_heads // max(1, n_kv_heads))
    rows = b if layout.cu_seqlens is None else 1
    dq, dk, dv = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
    dbias = (
        torch.zeros_like(rel_bias, dtype=torch.float32, memory_format=torch.contiguous_format)
        if rel_bias is not None
        else None
    )
    sequences = sequences_of(b, m, n, *layout)
    rule = rule_of(q, n, options, own)
    widths, lse = _widths(d, e), lse.contiguous()
    width, extras, biased = max(widths["BD"], widths["BE"]), _extras(rule, own), rule.bias is not None
    choose, softmax = chosen_by(config), own.weight_mod is None
    sizes = {"GROUPS": groups, "D": d, "E": e, **widths, "PRECISION": matmul_precision(q.dtype)}
    sizes |= own.sizes(backward=True)

    pivot, delta = torch.empty_like(lse), torch.empty_like(lse)  # LSE as the kernels subtract it
    statistics = (pivot, delta) if softmax else (None, None)
    dgate = None if gating is None else gating.gate.new_empty(gating.gate.shape)
    if dq.numel() and softmax:
        block = 64 if gating is None else max(16, 4096 // widths["BE"])
        n_blocks = blocks_of(sequences, m, 1, block)
        dx = dout if gating is None else empty_output(q, e)
        gate = None if gating is None else gating.gate.expand(dout.shape)
        delta_kernel[(n_blocks * n_heads * rows,)](
            heads(dout), heads(out), lse, dlse if dlse is None else dlse.contiguous(), pivot, delta, *sequences,
            n_blocks, n_heads, *(None if x is None else heads(x) for x in (gate, None if gate is None else dx, dgate)),
            E=e, BE=widths["BE"], BM=block, PLAIN=_plain(rule, own),
            GATE=None if gating is None else gating.gate_activation,
            PER_HEAD=dgate is not None and dgate.shape[-1] < e, **FUSED_ADDITION,
        )  # fmt: skip
        dout = dx
    sink_deltas = None if sinks is None else torch.zeros_like(lse)
    if dq.numel():
        config = choose("attention_dq", q, width, options=extras or biased)
        n_blocks = blocks_of(sequences, m, groups, config.block_m)
        copies = _copies(config, k, v)
        launched(
            dq_kernel[(n_blocks * n_kv_heads * rows,)],
            heads(q), heads(k), heads(v), heads(dout), *statistics, heads(dq), *sequences,
            *rule._replace(sinks=sink_deltas), n_blocks, n_kv_heads,
            Sizes(**sizes, **copies, BM=config.block_m, BN=config.block_n),
            described=bool(copies), **config.launch(),
        )  # fmt: skip
    if dk.numel():
        config = choose("attention_dkv", q, width, options=extras or biased)
        n_blocks = blocks_of(sequences, n, 1, config.block_n)
        # Two accumulators of wide heads do not fit into registers: dK and dV are then launches of their own.
        apart = q.element_size() == 2 and width > 128
        ahead = {"ASYNCHRONOUS": True} if apart and config.asynchronous else {}
        for which in ({"ONLY": "dk"}, {"ONLY": "dv"}) if apart else ({},):
            dkv_kernel[(n_blocks * n_kv_heads * rows,)](
                heads(q), heads(k), heads(v), heads(dout), *statistics, heads(dk), heads(dv), *sequences, *rule,
                n_blocks, n_kv_heads,
                Sizes(**sizes, **which, **ahead, BM=config.block_m, BN=config.block_n),
                **config.launch(),
            )  # fmt: skip
    if rel_bias is not None and dbias is not None and dbias.numel():
        config = choose("attention_dbias", q, width, options=extras)
        n_blocks = triton.cdiv(rel_bias.shape[-1], config.block_n)
        dbias_kernel[(n_blocks * n_heads * rows,)](
            heads(q), heads(k), heads(v), heads(dout), *statistics, dbias, *sequences, *rule, n_blocks, n_heads,
            Sizes(**sizes, BM=config.block_m, BN=config.block_n),
            **config.launch(),
        )  # fmt: skip
    if rel_bias is not None and dbias is not None:
        dbias = dbias.to(rel_bias.dtype)
    dsinks = None
    if sinks is not None and sink_deltas is not None:
        alive = lse != -math.inf
        share = torch.exp(sinks.float()[:, None] - torch.where(alive, lse, math.inf))
        if dlse is not None:
            sink_deltas = sink_deltas - torch.where(alive, dlse, 0)
        dsinks = -(share * sink_deltas).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks, dgate


def attention_with(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: Any = None,
    score_slope: Any = None,
    weight_mod: Any = None,
    weight_slope: Any = None,
    aux: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rel_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    config: Config | Choose | None = None,
) -> Tensor:
    """Attention with scores of your own, by the kernels of `flashgau.attention`, forward and backward.

        S = score_mod(cap(scale * q k^T)) + rel_bias        A = softmax(S + mask), or weight_mod(S) where seen, else 0
        O = A v                                             dS = dA * weight_slope(S) instead of softmax's derivative

    Functions are under `triton.jit` and take blocks: fp32 scores `b_s`, beside which the rest broadcasts.
    `score_mod(b_s, o_query, o_key, i_head, aux)` gets the positions of queries among the keys (i + N - M, each sequence
    from 0) and of keys, and query heads. Positions never lie behind the last key, so that `tl.load(aux + o_key)` is
    safe; with more queries than keys those of queries may be negative. `score_slope` takes the same and gives the
    derivative by `b_s`; `weight_slope(b_s)` that of `weight_mod(b_s)`. A score of -inf hides a key. How the keys of few
    rows are split and put together follows from whether there is a `weight_mod`; nothing is to be chosen.

    Args:
        q: (B, Hq, M, D), fp16, bf16 or fp32, D <= 256.
        k: (B, Hkv, N, D), Hq a multiple of Hkv.
        v: (B, Hkv, N, E), E <= 256.
        score_mod: of the scaled and capped scores; None leaves them.
        score_slope: its derivative; gradients need it.
        weight_mod: an elementwise weight in the place of softmax, without a normaliser; None for softmax.
        weight_slope: its derivative; gradients need it.
        aux: what the first two read, a contiguous fp32 tensor, of which they get the pointer. It has no gradient.
        causal: a query sees no key after its position.
        window: (left, right) of its position; None is unbounded.
        lengths: (B,) valid tokens of right-padded rows.
        cu_seqlens: (G+1,) offsets of packed sequences, of queries and, unless these have their own, keys.
        cu_seqlens_k: (G+1,) offsets of the keys.
        scale: 1 / sqrt(D) unless given.
        softcap: c of c tanh(s / c).
        rel_bias: (Hq, 2P-1) or (B, Hq, 2P-1); P covers the longest sequence.
        sinks: (Hq,), of softmax only.
        config: of the launches, as launchers take it.

    Returns:
        (B, Hq, M, E), differentiable once in q, k, v, rel_bias and sinks.

    Raises:
        TypeError: if a function is not jitted, or a tensor has another kind.
        ValueError: if functions, slopes and `aux` do not belong together, shapes do not, or sinks come with a weight.
        RuntimeError: where Triton cannot run.

    Example:
        >>> import torch, triton, triton.language as tl
        >>> @triton.jit
        ... def sigmoid(b_s):
        ...     return tl.sigmoid(b_s)
        >>> @triton.jit
        ... def slope(b_s):
        ...     return tl.sigmoid(b_s) * (1 - tl.sigmoid(b_s))
        >>> q, k, v = torch.randn(3, 1, 2, 33, 16)
        >>> attention_with(q, k, v, weight_mod=sigmoid, weight_slope=slope, causal=True).shape  # doctest: +SKIP
        torch.Size([1, 2, 33, 16])
    """
    op, own = "attention_with", OwnScores(score_mod, score_slope, weight_mod, weight_slope, aux)
    check_operands(op, q, k, v)
    check_options(op, own, q, k, lengths, cu_seqlens, cu_seqlens_k, rel_bias, sinks)
    differentiated = any(x is not None and x.requires_grad for x in (q, k, v, rel_bias, sinks))
    check_own(op, own, differentiated=differentiated and torch.is_grad_enabled(), device=q.device)
    if rel_bias is not None:
        rel_bias = rel_bias.expand(q.shape[0], q.shape[1], rel_bias.shape[-1])
    layout = Layout(lengths, cu_seqlens, cu_seqlens_k)
    options = AttentionOptions(scale, causal, window or (None, None), softcap)
    out: Tensor = _OwnAttention.apply(q, k, v, rel_bias, sinks, layout, options, own, config)
    return out


class _OwnAttention(torch.autograd.Function):
    """Autograd's view of the launchers with a user's functions."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rel_bias: Tensor | None,
        sinks: Tensor | None,
        layout: Layout,
        options: AttentionOptions,
        own: OwnScores,
        config: Config | Choose | None,
    ) -> Tensor:
        options = options._replace(rel_bias=rel_bias, sinks=sinks)
        with torch.cuda.device_of(q):
            out, lse, _ = _forward(q, k, v, layout, options, own, config)
        ctx.save_for_backward(q, k, v, rel_bias, sinks, out, lse)
        ctx.rest = layout, options._replace(rel_bias=None, sinks=None), own, config
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rel_bias, sinks, out, lse = ctx.saved_tensors
        layout, options, own, config = ctx.rest
        options = options._replace(rel_bias=rel_bias, sinks=sinks)
        results = AttentionResults(out, lse)
        with torch.no_grad(), torch.cuda.device_of(q):
            grads: tuple[Any, ...] = _backward((dout, None), q, k, v, results, layout, options, own, config)[:5]
        return *once("attention_with", grads, dout, q, k, v, rel_bias, sinks), None, None, None, None


def rule_of(q: Tensor, n: int, options: AttentionOptions, own: OwnScores) -> AttentionRule:
    """The options as the kernels take them."""
    options, p = options.resolved(q.shape[-1]), options.dropout_p
    left, right = (None if side is None else min(side, q.shape[2] + n) for side in options.window)
    rel_bias, sinks, softcap = options.rel_bias, options.sinks, options.softcap
    if rel_bias is not None and rel_bias.stride(-1) != 1:
        rel_bias = rel_bias.contiguous()
    bias_batch, bias_head = (0, 0) if rel_bias is None else rel_bias.stride()[:2]
    return AttentionRule(
        scale=options.factor,
        left=left,
        right=right,
        softcap=softcap if softcap is None else float(softcap),
        bias=rel_bias,
        bias_batch=bias_batch,
        bias_head=bias_head,
        max_distance=0 if rel_bias is None else rel_bias.shape[-1] // 2,
        sinks=sinks if sinks is None else sinks.contiguous(),
        seed=options.dropout_seed if p > 0 else None,
        threshold=min(int(p * 2**32), 2**32 - 1) - 2**31,
        dropout_scale=1 / (1 - p) if p < 1 else 0.0,
        aux=own.aux,
    )


def _extras(rule: AttentionRule, own: OwnScores) -> bool:
    """Whether softcap, dropout or a user's function is applied between the products, which takes registers."""
    return rule.softcap is not None or rule.seed is not None or own.given


def _copies(config: Config, k: Tensor, v: Tensor) -> dict[str, bool]:
    """The size DESCRIBED, if keys and values are copied through descriptors."""
    return {"DESCRIBED": True} if config.asynchronous and describable(k) and describable(v) else {}


def _plain(rule: AttentionRule, own: OwnScores) -> bool:
    """Whether scores are products and a scale alone, as `is_plain` says to the kernels."""
    return rule.softcap is None and rule.bias is None and not own.given


def _widths(d: int, e: int) -> dict[str, int]:
    """Block sizes of the head dimensions: powers of two, at least the 16 of a matrix instruction."""
    return {"BD": max(16, triton.next_power_of_2(d)), "BE": max(16, triton.next_power_of_2(e))}


def empty_output(q: Tensor, e: int) -> Tensor:
    """An uninitialised (B, Hq, M, E), stored as (B, M, Hq, E) if q is, so that concatenating the heads is a view."""
    b, n_heads, m, _ = q.shape
    if q.transpose(1, 2).is_contiguous():
        return q.new_empty(b, m, n_heads, e).transpose(1, 2)
    return q.new_empty(b, n_heads, m, e)

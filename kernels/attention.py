"""Launchers of softmax attention's kernels (`attention_kernels.py`): forward and backward."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from flashgau.options import AttentionOptions, AttentionResults, Layout

from .attention_kernels import (
    AttentionRule,
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
    processors,
    sequences_of,
)


@launcher
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
    *,
    config: Config | Choose | None = None,
) -> AttentionResults:
    """Output (B, Hq, M, E) and log-sum-exp (B, Hq, M) of every query row."""
    b, n_heads, m, d = q.shape
    n_kv_heads, n, e = k.shape[1], k.shape[2], v.shape[-1]
    out = _empty_output(q, e)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return AttentionResults(out, lse)
    groups = n_heads // n_kv_heads
    sequences = sequences_of(b, m, n, *layout)
    rule = _rule(q, n, options)
    widths = _widths(d, e)
    width, extras, biased = max(widths["BD"], widths["BE"]), _extras(rule), rule.bias is not None
    config = chosen_by(config)("attention_forward", q, width, rows=m * groups, options=extras or biased)
    n_blocks = blocks_of(sequences, m, groups, config.block_m)
    per_block = n_kv_heads * (b if layout.cu_seqlens is None else 1)
    working = blocks_of(sequences, m, groups, config.block_m, rest=False) * per_block
    n_parts = _parts(working, processors(q.device), triton.cdiv(n, 2 * config.block_n))
    parts, sums = heads(out), lse
    if n_parts is not None:
        parts = heads(q.new_empty(n_parts, b, n_heads, m, e, dtype=torch.float32)[0])
        sums = q.new_empty(2, n_parts, b, n_heads, m, dtype=torch.float32)
    precision = matmul_precision(q.dtype)
    forward_kernel[(n_blocks * per_block, n_parts or 1)](
        heads(q), heads(k), heads(v), parts, sums, *sequences, *rule, n_blocks, n_kv_heads, n_parts,
        Sizes(GROUPS=groups, D=d, E=e, **widths, BM=config.block_m, BN=config.block_n, PRECISION=precision),
        **config.launch(),
    )  # fmt: skip
    if n_parts is not None:
        whole = out if out.is_contiguous() else q.new_empty(b, n_heads, m, e)
        merge_kernel[(triton.cdiv(lse.numel(), 16),)](
            parts.pointer, sums, whole, lse, lse.numel(), n_parts, E=e, BE=widths["BE"], BM=16, **FUSED_ADDITION
        )
        if whole is not out:
            out.copy_(whole)
    return AttentionResults(out, lse)


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
    rule = _rule(q, n, options)
    widths, lse = _widths(d, e), lse.contiguous()
    width, extras, biased = max(widths["BD"], widths["BE"]), _extras(rule), rule.bias is not None
    precision, choose = matmul_precision(q.dtype), chosen_by(config)

    delta = lse.new_empty(lse.shape)
    if lse.numel():
        n_blocks = blocks_of(sequences, m, 1, 64)
        delta_kernel[(n_blocks * n_heads * rows,)](
            heads(dout), heads(out), lse, dlse if dlse is None else dlse.contiguous(), delta, *sequences,
            n_blocks, n_heads,
            E=e, BE=widths["BE"], BM=64, **FUSED_ADDITION,
        )  # fmt: skip
        config = choose("attention_dq", q, width, options=extras or biased)
        n_blocks = blocks_of(sequences, m, groups, config.block_m)
        dq_kernel[(n_blocks * n_kv_heads * rows,)](
            heads(q), heads(k), heads(v), heads(dout), lse, delta, heads(dq), *sequences, *rule, n_blocks, n_kv_heads,
            Sizes(GROUPS=groups, D=d, E=e, **widths, BM=config.block_m, BN=config.block_n, PRECISION=precision),
            **config.launch(),
        )  # fmt: skip
    if dk.numel():
        config = choose("attention_dkv", q, width, options=extras or biased)
        n_blocks = blocks_of(sequences, n, 1, config.block_n)
        dkv_kernel[(n_blocks * n_kv_heads * rows,)](
            heads(q), heads(k), heads(v), heads(dout), lse, delta, heads(dk), heads(dv), *sequences, *rule, n_blocks,
            n_kv_heads,
            Sizes(GROUPS=groups, D=d, E=e, **widths, BM=config.block_m, BN=config.block_n, PRECISION=precision),
            **config.launch(),
        )  # fmt: skip
    if rel_bias is not None and dbias is not None and dbias.numel():
        config = choose("attention_dbias", q, width, options=extras)
        n_blocks = triton.cdiv(rel_bias.shape[-1], config.block_n)
        dbias_kernel[(n_blocks * n_heads * rows,)](
            heads(q), heads(k), heads(v), heads(dout), lse, delta, dbias, *sequences, *rule, n_blocks, n_heads,
            Sizes(GROUPS=groups, D=d, E=e, **widths, BM=config.block_m, BN=config.block_n, PRECISION=precision),
            **config.launch(),
        )  # fmt: skip
    if rel_bias is not None and dbias is not None:
        dbias = dbias.to(rel_bias.dtype)
    dsinks = None
    if sinks is not None:
        share = torch.exp(sinks.float()[:, None] - torch.where(lse == -math.inf, math.inf, lse))
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def _rule(q: Tensor, n: int, options: AttentionOptions) -> AttentionRule:
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
    )


def _extras(rule: AttentionRule) -> bool:
    """Whether softcap or dropout is applied between the products, which takes registers."""
    return rule.softcap is not None or rule.seed is not None


def _widths(d: int, e: int) -> dict[str, int]:
    """Block sizes of the head dimensions: powers of two, at least the 16 of a matrix instruction."""
    return {"BD": max(16, triton.next_power_of_2(d)), "BE": max(16, triton.next_power_of_2(e))}


def _parts(programs: int, processors: int, most: int) -> int | None:
    """The number of programs that share the keys of a row, if there are too few rows to occupy the device."""
    parts = min(processors // max(programs, 1), most)
    return parts if parts > 1 else None


def _empty_output(q: Tensor, e: int) -> Tensor:
    """An uninitialised (B, Hq, M, E), stored as (B, M, Hq, E) if q is, so that concatenating the heads is a view."""
    b, n_heads, m, _ = q.shape
    if q.transpose(1, 2).is_contiguous():
        return q.new_empty(b, m, n_heads, e).transpose(1, 2)
    return q.new_empty(b, n_heads, m, e)

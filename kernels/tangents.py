"""Launchers of the kernels of tangents and second derivatives (`tangent_kernels.py`) of softmax and gated attention.

A tangent that is None is a zero with strides of 0, which takes no memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashgau.options import (
    AttentionAlong,
    AttentionOptions,
    AttentionResults,
    AttentionTangents,
    GatedOptions,
    GatedTangents,
    Layout,
)

from .attention import empty_output, rule_of
from .attention_kernels import AttentionRule
from .common import (
    Choose,
    Config,
    Heads,
    Sequences,
    Sizes,
    blocks_of,
    chosen_by,
    heads,
    launcher,
    sequences_of,
)
from .gated import precisions, rows, sums_like
from .gau import call_of, row_lse
from .own_scores import BUILT_IN
from .tangent_kernels import (
    Statistics,
    Tensors,
    second_dbias_kernel,
    second_dk_kernel,
    second_dq_kernel,
    second_dv_kernel,
    statistics_kernel,
    tangent_kernel,
)


class _Call(NamedTuple):
    """What all kernels of one call share."""

    q: Tensor
    tensors: Tensors
    lse: Tensor | None  # (B, Hq, M) of a softmax, contiguous
    sequences: Sequences
    rule: AttentionRule
    sizes: dict[str, Any]
    n_heads: int
    n_kv_heads: int
    rows: int  # of the batch that have blocks of their own: 1 when packed

    @property
    def width(self) -> int:
        """Of queries, as a block."""
        return int(self.sizes["BD"])

    def tile(self, config: Config) -> int:
        """Columns of values that a program reads at a time."""
        return min(config.block_k, _block(self.sizes["E"]))

    def blocks(self, config: Config) -> Sizes:
        """What a kernel is compiled for."""
        return Sizes(**self.sizes, BE=self.tile(config), BM=config.block_m, BN=config.block_n)


# ---- softmax attention


@launcher
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: AttentionResults,
    tangents: AttentionTangents,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
    *,
    config: Config | Choose | None = None,
) -> AttentionAlong:
    """Tangents of the output (B, Hq, M, E) and of the log-sum-exp (B, Hq, M) of every query row, the latter in fp32."""
    call = _attention(q, k, v, results, tangents, layout, options)
    tout, tlse = empty_output(q, v.shape[-1]), torch.empty_like(results[1], memory_format=torch.contiguous_format)
    _tangent(call, heads(tout), tlse, chosen_by(config))
    return AttentionAlong(tout, tlse)


@launcher
def attention_second(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: AttentionResults,
    tangents: AttentionTangents,
    along: AttentionAlong,
    layout: Layout = Layout(),
    options: AttentionOptions = AttentionOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of <dout, tout> + <dlse, tlse> by q, k, v, rel_bias (B, Hq, 2P-1) and sinks (Hq,); None where there is
    no such input.

    Of `results` only the log-sum-exp is read, and nothing of `along`: rows are summed again, in fp32.
    """
    rel_bias, sinks, tsinks = options.rel_bias, options.sinks, tangents[4]
    call, choose = _attention(q, k, v, results, tangents, layout, options, dout), chosen_by(config)
    dq, dk, dv = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
    numbers = _statistics(call, dlse, choose)
    dbias = _second(call, numbers, (heads(dq), heads(dk), heads(dv)), rel_bias, choose)
    dsinks = None
    if sinks is not None and call.lse is not None and numbers is not None:
        inverse, mu, delta, kappa = numbers
        share = torch.exp(sinks.float()[:, None] - torch.where(call.lse == -math.inf, math.inf, call.lse))
        ahead = mu if tsinks is None else mu - tsinks.float()[:, None]
        dsinks = (share * inverse * (ahead * delta - kappa)).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, sums_like(dbias, rel_bias), dsinks


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: AttentionResults,
    tangents: AttentionTangents,
    layout: Layout,
    options: AttentionOptions,
    g: Tensor | None = None,
) -> _Call:
    """Softmax attention as the kernels take it."""
    (n_heads, d), (n_kv_heads, n) = (q.shape[1], q.shape[3]), k.shape[1:3]
    tq, tk, tv, trel_bias, tsinks = tangents
    bias, tbias = _biases(options.rel_bias, trel_bias)
    tensors = Tensors(
        heads(q), heads(k), heads(v), heads(_filled(tq, q)), heads(_filled(tk, k)), heads(_filled(tv, v)),
        None if g is None else heads(g), tbias, None if tsinks is None else tsinks.contiguous(),
    )  # fmt: skip
    options = options._replace(rel_bias=bias)
    precision, factors, _ = precisions(q)
    return _Call(
        q=q,
        tensors=tensors,
        lse=results[1].contiguous(),
        sequences=sequences_of(q.shape[0], q.shape[2], n, *layout),
        rule=rule_of(q, n, options, BUILT_IN),
        sizes={
            "GROUPS": max(1, n_heads // max(1, n_kv_heads)), "D": d, "E": v.shape[3], "BD": _block(d),
            "PRECISION": precision, "FACTORS": factors, "SCORE": "softmax", "SCALING": "number",
        },
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        rows=q.shape[0] if layout.cu_seqlens is None else 1,
    )  # fmt: skip


# ---- gated attention


@launcher
def gau_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: GatedTangents,
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
    *,
    config: Config | Choose | None = None,
) -> Tensor:
    """The tangent (B, M, E) of the product A v that a gate multiplies."""
    tout, choose = q.new_empty(*q.shape[:2], v.shape[2]), chosen_by(config)
    _tangent(_gated(q, k, v, tangents, layout, options, choose), heads(tout.unsqueeze(1)), None, choose)
    return tout


@launcher
def gau_attention_second(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: GatedTangents,
    layout: Layout = Layout(),
    options: GatedOptions = GatedOptions(),
    *,
    config: Config | Choose | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of <dout, tangent of A v> by q, k, v and rel_bias (B, 2P-1); None where there is no such input."""
    choose = chosen_by(config)
    call = _gated(q, k, v, tangents, layout, options, choose, dout)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    numbers = _statistics(call, None, choose)
    targets = heads(dq.unsqueeze(1)), heads(dk.unsqueeze(1)), heads(dv.unsqueeze(1))
    dbias = _second(call, numbers, targets, options.rel_bias, choose)
    return dq, dk, dv, sums_like(dbias, options.rel_bias)


def _gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: GatedTangents,
    layout: Layout,
    options: GatedOptions,
    choose: Choose,
    g: Tensor | None = None,
) -> _Call:
    """Gated attention as attention with one head. Of a softmax the log-sum-exp is computed."""
    tq, tk, tv, trel_bias = tangents
    rel_bias, tbias = _biases(options.rel_bias, trel_bias)
    tensors = Tensors(
        rows(q), rows(k), rows(v), rows(_filled(tq, q)), rows(_filled(tk, k)), rows(_filled(tv, v)), rows(g), tbias
    )
    options = options._replace(rel_bias=rel_bias)
    gated = call_of(q, k, layout, options, BUILT_IN)
    scale, right, bias, bias_batch, max_distance, _ = gated.rule
    rule = AttentionRule(scale, None, right, None, bias, bias_batch, 0, max_distance)
    sizes = {
        "GROUPS": 1, "D": q.shape[2], "E": v.shape[2], "BD": gated.width, "PRECISION": gated.precision,
        "FACTORS": gated.factors, "SCORE": gated.score, "SCALING": gated.scaling,
    }  # fmt: skip
    lse = row_lse(gated, q, k, BUILT_IN, choose) if q.numel() else None
    return _Call(q, tensors, lse, gated.sequences, rule, sizes, 1, 1, gated.rows)


# ---- both


def _filled(tangent: Tensor | None, x: Tensor) -> Tensor:
    """A tangent in the dtype of what it is of."""
    return x.new_zeros(()).expand(x.shape) if tangent is None else tangent.to(x.dtype)


def _biases(rel_bias: Tensor | None, tangent: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A bias and its tangent, which are read by the same strides."""
    if rel_bias is None or tangent is None:
        return rel_bias, None
    return rel_bias.contiguous(), tangent.expand(rel_bias.shape).contiguous()


def _block(width: int) -> int:
    """A width as a block: a power of two, at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(width))


def _programs(call: _Call, per_row: int, block: int) -> tuple[int, int]:
    """Blocks of the rows of a key head, or of keys, and the programs that write them."""
    axis = call.sequences.max_seqlen_q if per_row else call.sequences.max_seqlen_k
    n_blocks = blocks_of(call.sequences, axis, max(1, per_row), block)
    return n_blocks, n_blocks * call.n_kv_heads * call.rows


def _tangent(call: _Call, out: Heads, tlse: Tensor | None, choose: Choose) -> None:
    if out.pointer.numel() == 0:
        return
    config: Config = choose("tangent", call.q, call.width)
    n_blocks, programs = _programs(call, call.sizes["GROUPS"], config.block_m)
    tangent_kernel[(programs, triton.cdiv(call.sizes["E"], call.tile(config)))](
        call.tensors, call.lse, out, tlse, *call.sequences, *call.rule, n_blocks, call.n_kv_heads,
        call.blocks(config), **config.launch(),
    )  # fmt: skip


def _statistics(call: _Call, dlse: Tensor | None, choose: Choose) -> tuple[Tensor, ...] | None:
    """1 / sum of P, mu, delta and kappa of the rows of a softmax."""
    if call.lse is None:
        return None
    numbers = tuple(torch.empty_like(call.lse) for _ in range(4))
    if call.lse.numel():
        config: Config = choose("second_statistics", call.q, call.width)
        n_blocks, programs = _programs(call, call.sizes["GROUPS"], config.block_m)
        statistics_kernel[(programs,)](
            call.tensors, call.lse, dlse if dlse is None else dlse.contiguous(), *numbers, *call.sequences,
            *call.rule, n_blocks, call.n_kv_heads, call.blocks(config), **config.launch(),
        )  # fmt: skip
    return numbers


def _second(
    call: _Call,
    numbers: tuple[Tensor, ...] | None,
    targets: tuple[Heads, Heads, Heads],
    rel_bias: Tensor | None,
    choose: Choose,
) -> Tensor | None:
    """Write the gradients of q, k and v; returns that of the bias in fp32."""
    dq, dk, dv = targets
    statistics = Statistics(call.lse, *(numbers or ()))
    if dq.pointer.numel():
        config: Config = choose("second_dq", call.q, call.width)
        n_blocks, programs = _programs(call, call.sizes["GROUPS"], config.block_m)
        second_dq_kernel[(programs,)](
            call.tensors, statistics, dq, *call.sequences, *call.rule, n_blocks, call.n_kv_heads,
            call.blocks(config), **config.launch(),
        )  # fmt: skip
    if dk.pointer.numel():
        config = choose("second_dk", call.q, call.width)
        n_blocks, programs = _programs(call, 0, config.block_n)
        second_dk_kernel[(programs,)](
            call.tensors, statistics, dk, *call.sequences, *call.rule, n_blocks, call.n_kv_heads,
            call.blocks(config), **config.launch(),
        )  # fmt: skip
    if dv.pointer.numel():
        config = choose("second_dv", call.q, call.width)
        n_blocks, programs = _programs(call, 0, config.block_n)
        second_dv_kernel[(programs, triton.cdiv(call.sizes["E"], call.tile(config)))](
            call.tensors, statistics, dv, *call.sequences, *call.rule, n_blocks, call.n_kv_heads,
            call.blocks(config), **config.launch(),
        )  # fmt: skip
    if rel_bias is None:
        return None
    dbias = rel_bias.new_zeros(rel_bias.shape, dtype=torch.float32)
    if dbias.numel():
        config = choose("second_dbias", call.q, call.width)
        n_blocks = triton.cdiv(dbias.shape[-1], config.block_n)
        second_dbias_kernel[(n_blocks * call.n_heads * call.rows,)](
            call.tensors, statistics, dbias, *call.sequences, *call.rule, n_blocks, call.n_heads,
            call.blocks(config), **config.launch(),
        )  # fmt: skip
    return dbias

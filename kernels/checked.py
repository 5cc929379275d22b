"""What a launcher refuses with `check=True`, before it starts a kernel: as the public functions do, and in their words.

The kernels read memory by the shapes of a few of their tensors, so a wrong shape among the others reads what is not
theirs. Beside what the public functions check, tensors are of fp16, bf16 or fp32, at most as wide as the kernels take,
and a relative bias is expanded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashgau.contract import operands
from flashgau.contract.validate import Arguments
from flashgau.options import (
    Angles,
    AttentionOptions,
    AttentionTangents,
    GatedOptions,
    GatedTangents,
    Gating,
    GluOptions,
    GluWeights,
    Layout,
    MixedChunkHeads,
    MixedChunkOptions,
    MixedChunkSaved,
    NormOptions,
    OpenChunk,
    Pages,
    ProjectionWeights,
    TokenHeads,
)

from . import SUPPORTED


def check(launcher: str, given: dict[str, Any]) -> None:
    """Refuse what a launcher cannot take.

    Args:
        launcher: its name, with which messages begin.
        given: its arguments by name, the defaults among them.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    if launcher not in CHECKS:
        raise TypeError(f"{launcher}: `check` is True; expected False: this launcher has no check")
    given = {name: x for name, x in given.items() if name not in ("config", "save", "fused")}
    CHECKS[launcher](Arguments(launcher), **given)


def _fits(args: Arguments, op: str, tensors: dict[str, Tensor]) -> None:
    """What the kernels take of what the contract allows, by a call's tensors with heads."""
    widest = SUPPORTED[op]
    for name, x in tensors.items():
        if x.dtype == torch.float64:
            args.fail(name, f"has dtype {x.dtype}", "float16, bfloat16 or float32, which kernels take", TypeError)
        if widest is not None and x.shape[-1] > widest:
            args.fail(name, f"has width {x.shape[-1]}", f"a width of up to {widest}, which kernels take")


def _like(args: Arguments, name: str, x: Tensor, shape: tuple[int, ...], whose: str) -> None:
    args.tensor(name, x, "...")
    if tuple(x.shape) != tuple(shape):
        args.fail(name, f"has shape {tuple(x.shape)}", f"{tuple(shape)} as {whose}")


# ---- attention


def _attention(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: AttentionOptions, pages: Pages = Pages()
) -> None:
    longest = None
    if pages.block_table is None:
        operands.attention(args, q, k, v)
    else:
        longest = operands.attention_in_pages(args, q, k, v, pages, layout)
    _fits(args, "attention", {"q": q, "v": v})
    operands.attention_options(args, options, layout, longest)
    if options.rel_bias is not None:
        args.shaped("rel_bias", options.rel_bias, "B Hq 2P-1")
    if options.dropout_p:
        if not isinstance(options.dropout_seed, Tensor):
            got = f"is {options.dropout_seed!r}"
            args.fail("dropout_seed", got, "a one-element int64 tensor beside `dropout_p`", TypeError)
        operands.seed(args, options.dropout_seed)


def _gated_attention(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, gating: Gating, layout: Layout, options: AttentionOptions
) -> None:
    _attention(args, q, k, v, layout, options)
    operands.attention_gate(args, *gating)


def _gated_attention_backward(
    args: Arguments, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, product: Tensor,
    activated: Tensor | None, gating: Gating, **rest: Any,
) -> None:  # fmt: skip
    """`activated` is not read."""
    _attention_backward(args, dout, dlse, q, k, v, (product, lse), **rest)
    operands.attention_gate(args, *gating)


def _attention_backward(
    args: Arguments, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, results: Any, **rest: Any
) -> None:
    _attention(args, q, k, v, **rest)
    out, lse = results
    args.tensor("out", out, "B Hq M E")
    args.per_head("lse", lse, "B Hq M")
    args.tensor("dout", dout, "B Hq M E")
    if dlse is not None:
        args.per_head("dlse", dlse, "B Hq M")


def _tangents(args: Arguments, tangents: Any, axes: dict[str, str], beside: dict[str, tuple[Any, str]]) -> None:
    """Tangents of operands, by their axes, and of options, which may be in fp32 beside halves."""
    given = tangents._asdict()
    for name, spelled in axes.items():
        if given[f"t{name}"] is not None:
            args.tensor(f"t{name}", given[f"t{name}"], spelled)
    for name, (option, spelled) in beside.items():
        if given[f"t{name}"] is not None:
            if option is None:
                args.fail(f"t{name}", f"was given without `{name}`", "both")
            args.per_head(f"t{name}", given[f"t{name}"], spelled)


def _attention_jvp(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, results: Any, tangents: Any, layout: Layout,
    options: AttentionOptions,
) -> None:  # fmt: skip
    _attention(args, q, k, v, layout, options)
    out, lse = results
    args.tensor("out", out, "B Hq M E")
    args.per_head("lse", lse, "B Hq M")
    axes = {"q": "B Hq M D", "k": "B Hkv N D", "v": "B Hkv N E"}
    beside = {"rel_bias": (options.rel_bias, "B Hq 2P-1"), "sinks": (options.sinks, "Hq")}
    _tangents(args, AttentionTangents(*tangents), axes, beside)


def _attention_second(args: Arguments, dout: Tensor, dlse: Tensor | None, along: Any, **rest: Any) -> None:
    _attention_jvp(args, **rest)
    tout, tlse = along
    for name, x in (("dout", dout), ("tout", tout)):
        args.tensor(name, x, "B Hq M E")
    for name, y in (("dlse", dlse), ("tlse", tlse)):
        if y is not None:
            args.per_head(name, y, "B Hq M")


# ---- gated linear units


def _glu(args: Arguments, gate: Tensor, up: Tensor | None, options: GluOptions) -> None:
    operands.glu(args, gate, up)
    _fits(args, "glu", {"gate": gate})
    operands.activations(args, *options)


def _glu_backward(
    args: Arguments, dout: Tensor, gate: Tensor, up: Tensor | None, activated: None, options: GluOptions
) -> None:
    _glu(args, gate, up, options)
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    _like(args, "dout", dout, shape, "the result")


def _glu_linear(args: Arguments, x: Tensor, weights: GluWeights, options: GluOptions) -> None:
    operands.glu_linear(args, x, *GluWeights(*weights))
    _fits(args, "glu", {"x": x})
    operands.activations(args, *options)


def _glu_linear_backward(
    args: Arguments, dout: Tensor, x: Tensor, weights: GluWeights, g: Tensor | None, u: Tensor | None,
    options: GluOptions,
) -> None:  # fmt: skip
    _glu_linear(args, x, weights, options)
    shape = (*x.shape[:-1], weights[0].shape[0])
    _like(args, "dout", dout, shape, "the result")
    if (g is None) != (u is None):
        args.fail("g" if u is None else "u", "was given alone", "both pre-activations, or neither")
    for name, saved in (("g", g), ("u", u)):
        if saved is not None:
            _like(args, name, saved, shape, "the result")


# ---- gated attention


def _gau(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, layout: Layout, options: GatedOptions
) -> None:
    operands.gau_attention(args, q, k, v, gate)
    _fits(args, "gau", {"q": q})
    operands.gau_options(args, options.score, options.normalizer)
    operands.gate_activation(args, options.gate_activation)
    args.flag("causal", options.causal)
    args.relative_bias(options.rel_bias, "B", args.sequences(*layout[:2]))
    if options.rel_bias is not None:
        args.shaped("rel_bias", options.rel_bias, "B 2P-1")


def _gau_backward(
    args: Arguments, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, product: Tensor | None,
    **rest: Any,
) -> None:  # fmt: skip
    _gau(args, q, k, v, gate, **rest)
    args.tensor("dout", dout, "B M E")
    if product is not None:
        args.tensor("product", product, "B M E")


def _gau_jvp(
    args: Arguments, q: Tensor, k: Tensor, v: Tensor, tangents: Any, layout: Layout, options: GatedOptions
) -> None:
    _gau(args, q, k, v, None, layout, options)
    axes = {"q": "B M S", "k": "B N S", "v": "B N E"}
    _tangents(args, GatedTangents(*tangents), axes, {"rel_bias": (options.rel_bias, "B 2P-1")})


def _gau_second(args: Arguments, dout: Tensor, **rest: Any) -> None:
    _gau_jvp(args, **rest)
    args.tensor("dout", dout, "B M E")


# ---- mixed chunk attention


def _mixed_chunk(
    args: Arguments, heads: MixedChunkHeads, v: Tensor, gate: Tensor | None, layout: Layout, options: MixedChunkOptions
) -> None:
    operands.mixed_chunk(args, "N", *heads, v, gate)
    _fits(args, "mixed_chunk", {"quad_q": heads[0]})
    args.flag("causal", options.causal)
    operands.mixed_chunk_options(
        args, options.chunk_size, options.score, options.lin_normalizer, options.quad_normalizer
    )
    operands.gate_activation(args, options.gate_activation)
    args.sequences(*layout[:2])
    _chunk_bias(args, options)
    if (options.initial_kv is None) != (options.closed_tokens is None):
        args.fail("initial_kv", "and `closed_tokens` were not given together", "both or neither")
    if options.initial_kv is not None and options.closed_tokens is not None:
        if not options.causal:
            args.fail("initial_kv", "was given with causal=False", "causal=True: only causal sequences have a state")
        args.sizes["G"] = _count(args, layout)
        args.held("closed_tokens", options.closed_tokens)
        args.shaped("closed_tokens", options.closed_tokens, "G")
        args.per_head("initial_kv", options.initial_kv, "G S E")


def _mixed_chunk_backward(
    args: Arguments, dout: Tensor, dkv: Tensor | None, heads: MixedChunkHeads, v: Tensor, gate: Tensor | None,
    saved: MixedChunkSaved, layout: Layout, options: MixedChunkOptions,
) -> None:  # fmt: skip
    _mixed_chunk(args, heads, v, gate, layout, options)
    product, chunk_states = saved
    args.tensor("dout", dout, "B N E")
    if product is not None:
        args.tensor("product", product, "B N E")
    if dkv is not None:
        args.sizes["G"] = _count(args, layout)
        args.per_head("dkv", dkv, "G S E")
    kept = options.kept_states(heads[0], v, layout)
    if chunk_states is not None and tuple(chunk_states.shape) != kept:
        args.fail("chunk_states", f"has shape {tuple(chunk_states.shape)}", f"{kept}, as the forward kept them")


def _mixed_chunk_step(
    args: Arguments, heads: MixedChunkHeads, v: Tensor, gate: Tensor | None, state: OpenChunk,
    options: MixedChunkOptions,
) -> None:  # fmt: skip
    operands.mixed_chunk(args, "1", *heads, v, gate)
    operands.one_token(args, heads[0])
    _fits(args, "mixed_chunk", {"quad_q": heads[0]})
    operands.mixed_chunk_options(
        args, options.chunk_size, options.score, options.lin_normalizer, options.quad_normalizer
    )
    operands.gate_activation(args, options.gate_activation)
    _chunk_bias(args, options)
    _open_chunk(args, OpenChunk(*state), options)


def _open_chunk(args: Arguments, state: OpenChunk, options: MixedChunkOptions) -> None:
    args.sizes["C"] = options.chunk_size
    args.per_head("kv", state.kv, "B S E")
    for name, axes in (("open_quad_k", "B C S"), ("open_lin_k", "B C S"), ("open_v", "B C E")):
        args.tensor(name, getattr(state, name), axes)
    for name, x in state._asdict().items():
        if not x.is_contiguous():
            args.fail(name, f"has strides {x.stride()}", "a contiguous tensor: it is written")
    args.held("position", state.position)
    args.shaped("position", state.position, "B")


def _chunk_bias(args: Arguments, options: MixedChunkOptions) -> None:
    args.relative_bias(options.rel_bias, "B", options.chunk_size, "the chunk size")
    if options.rel_bias is not None:
        args.shaped("rel_bias", options.rel_bias, "B 2P-1")


def _count(args: Arguments, layout: Layout) -> int:
    """How many sequences there are."""
    return int(args.sizes["B"] if layout.cu_seqlens is None else layout.cu_seqlens.shape[0] - 1)


# ---- layers


def _angles(args: Arguments, angles: Angles) -> None:
    """Of heads (B, N, S), whose sizes are known."""
    cos, sin, interleaved = angles
    args.flag("interleaved", interleaved)
    if (cos is None) != (sin is None):
        args.fail("sin" if sin is None else "cos", "is None", "both `cos` and `sin`, or neither")
    b, n, s = (args.sizes[letter] for letter in "BNS")
    for name, x in (("cos", cos), ("sin", sin)):
        if x is None:
            continue
        args.per_head(name, x, "Ba N pairs")
        if x.shape[0] not in (1, b) or 2 * x.shape[2] > s:
            args.fail(name, f"has shape {tuple(x.shape)}", f"(1 or {b}, {n}, pairs), of which S = {s} holds two each")


def _offset_scale(args: Arguments, gamma: Tensor, beta: Tensor | None) -> None:
    args.per_head("gamma", gamma, "H S")
    if beta is not None:
        args.per_head("beta", beta, "H S")


def _heads(args: Arguments, z: Tensor, gamma: Tensor, beta: Tensor | None, angles: Angles) -> None:
    args.tensor("z", z, "B N S")
    _fits(args, "projection", {"z": z})
    _offset_scale(args, gamma, beta)
    _angles(args, Angles(*angles))


def _for_each_head(args: Arguments, name: str, given: Any) -> None:
    """Gradients of the heads."""
    if len(given) != args.sizes["H"]:
        args.fail(name, f"has {len(given)} tensors", f"H = {args.sizes['H']} of them, one for each row of `gamma`")
    for i, d in enumerate(given):
        args.tensor(f"{name}[{i}]", d, "B N S")


def _heads_backward(args: Arguments, douts: Any, z: Tensor, gamma: Tensor, angles: Angles, dz: Tensor) -> None:
    _heads(args, z, gamma, None, angles)
    _for_each_head(args, "douts", douts)
    args.tensor("dz", dz, "B N S")


def _gated_projection(args: Arguments, x: Tensor, weights: ProjectionWeights, angles: Angles) -> None:
    weight, bias, gamma, beta, raw_gate = weights
    args.tensor("x", x, "B N d")
    _fits(args, "projection", {"x": x})
    args.tensor("weight", weight, "W d")
    if bias is not None:
        args.tensor("bias", bias, "W")
    _offset_scale(args, gamma, beta)
    args.flag("raw_gate", raw_gate)
    rows, narrow = args.sizes["W"], args.sizes["S"]
    if rows < narrow or (rows - narrow) % 2:
        args.fail("weight", f"has {rows} rows", f"2 e + S of them, with S = {narrow} as in `gamma`")
    _angles(args, Angles(*angles))


def _gated_projection_backward(
    args: Arguments, du: Tensor, dv: Tensor, dheads: Any, x: Tensor, weights: ProjectionWeights, saved: Any,
    angles: Angles,
) -> None:  # fmt: skip
    weights = ProjectionWeights(*weights)
    _gated_projection(args, x, weights, angles)
    args.sizes["e"] = e = (args.sizes["W"] - args.sizes["S"]) // 2
    for name, d in (("du", du), ("dv", dv)):
        args.tensor(name, d, "B N e")
    _for_each_head(args, "dheads", dheads)
    (wide,) = saved
    _like(args, "saved", wide, (*x.shape[:-1], args.sizes["W"] - e * weights.raw_gate), "the forward kept it")


def _norm(args: Arguments, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> None:
    args.tensor("x", x, "... d")
    _fits(args, "norms", {"x": x})
    d = args.sizes["d"]
    for name, w, sizes in (("weight", weight, (1, d)), ("bias", bias, (d,))):
        if w is not None:
            args.held(name, w)
            if w.dim() != 1 or w.shape[0] not in sizes:
                args.fail(name, f"has shape {tuple(w.shape)}", " or ".join(f"({n},)" for n in sizes))
    kind, eps, clamp = options
    args.choice("kind", kind, ("layernorm", "rms"))
    args.number("eps", eps, "a number of at least 0", 0)
    args.flag("clamp", clamp)


def _norm_backward(args: Arguments, dy: Tensor, x: Tensor, **rest: Any) -> None:
    _norm(args, x, **rest)
    _like(args, "dy", dy, x.shape, "`x` has")


def _rank_form(args: Arguments, a: Tensor, b: Tensor, turns: Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        args.tensor(name, x, "S")
        _fits(args, "rank_form", {name: x})
    if args.sizes["S"] % 2:
        args.fail("a", f"has shape {tuple(a.shape)}", "an even number of channels, two of a pair")
    args.held("turns", turns)
    args.shaped("turns", turns, "n S")
    if turns.dtype != torch.float32 or not turns.is_contiguous():
        got = f"has dtype {turns.dtype} and strides {turns.stride()}"
        args.fail("turns", got, "contiguous float32", TypeError)


def _rank_form_backward(args: Arguments, dbias: Tensor, **rest: Any) -> None:
    _rank_form(args, **rest)
    args.tensor("dbias", dbias, "n")


def _flash_unit_token(
    args: Arguments, wide: Tensor, heads: TokenHeads, state: OpenChunk, options: MixedChunkOptions
) -> None:
    gamma, beta, frequencies, interleaved, order = heads
    state = OpenChunk(*state)
    args.tensor("wide", wide, "B N W")
    if args.sizes["N"] != 1:
        args.fail("wide", f"has shape {tuple(wide.shape)}", "one token, N = 1")
    _offset_scale(args, gamma, beta)
    if sorted(order) != list(range(4)) or args.sizes["H"] != 4:
        args.fail("order", f"is {order!r} of {args.sizes['H']} rows", "each of the four rows of `gamma` once")
    operands.mixed_chunk_options(
        args, options.chunk_size, options.score, options.lin_normalizer, options.quad_normalizer
    )
    _chunk_bias(args, options)
    _open_chunk(args, state, options)
    _fits(args, "mixed_chunk", {"open_quad_k": state.open_quad_k})
    narrow, e = args.sizes["S"], args.sizes["E"]
    if args.sizes["W"] != 2 * e + narrow:
        args.fail("wide", f"has shape {tuple(wide.shape)}", f"2 E + S = {2 * e + narrow} columns, as `state` has")
    args.flag("interleaved", interleaved)
    if frequencies is not None:
        args.per_head("frequencies", frequencies, "pairs")
        if 2 * args.sizes["pairs"] > narrow:
            args.fail("frequencies", f"has shape {tuple(frequencies.shape)}", f"at most S / 2 = {narrow // 2} pairs")


CHECKS: dict[str, Callable[..., None]] = {
    "attention_forward": _attention,
    "attention_backward": _attention_backward,
    "attention_jvp": _attention_jvp,
    "attention_second": _attention_second,
    "gated_attention_forward": _gated_attention,
    "gated_attention_backward": _gated_attention_backward,
    "glu_forward": _glu,
    "glu_backward": _glu_backward,
    "glu_linear_forward": _glu_linear,
    "glu_linear_backward": _glu_linear_backward,
    "gau_attention_forward": _gau,
    "gau_attention_backward": _gau_backward,
    "gau_attention_jvp": _gau_jvp,
    "gau_attention_second": _gau_second,
    "mixed_chunk_attention_forward": _mixed_chunk,
    "mixed_chunk_attention_backward": _mixed_chunk_backward,
    "mixed_chunk_step_": _mixed_chunk_step,
    "heads_forward": _heads,
    "heads_backward": _heads_backward,
    "gated_projection_forward": _gated_projection,
    "gated_projection_backward": _gated_projection_backward,
    "rank_form_forward": _rank_form,
    "rank_form_backward": _rank_form_backward,
    "norm_forward": _norm,
    "norm_backward": _norm_backward,
    "flash_unit_token_": _flash_unit_token,
}

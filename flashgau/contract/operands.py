"""Each operation's tensors and options: what they must be, in the words of its public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashgau.options import AttentionOptions, Layout, Pages, Window

from .validate import Arguments, readable

ACTIVATIONS = ("identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh", "silu")
GATED_SCORES = ("relu2", "laplace", "softmax", "softmax_plus")
MIXED_CHUNK_SCORES = ("relu2", "laplace")


# ---- attention


def attention(args: Arguments, q: Any, k: Any, v: Any) -> None:
    """Queries, keys and values."""
    args.tensor("q", q, "B Hq M D")
    args.tensor("k", k, "B Hkv N D")
    args.tensor("v", v, "B Hkv N E")
    _widths_and_groups(args)


def attention_gate(args: Arguments, gate: Any, activation: Any) -> None:
    """The gate of softmax attention, or None, and its activation."""
    gate_activation(args, activation)
    if gate is None:
        return
    args.tensor("gate", gate, "...")
    sizes = args.sizes
    wanted = (sizes["B"], sizes["Hq"], sizes["M"], sizes["E"])
    if tuple(gate.shape) not in (wanted, (*wanted[:3], 1)):
        args.fail("gate", f"has shape {tuple(gate.shape)}", f"{wanted}, or {(*wanted[:3], 1)} for a number per head")


def attention_in_pages(args: Arguments, q: Any, k: Any, v: Any, pages: Pages, layout: Layout) -> int:
    """Queries, keys and values in pages, and how they are cut into sequences; a length that no sequence exceeds."""
    args.tensor("q", q, "B Hq M D")
    args.tensor("k", k, "pages Hkv page D")
    args.tensor("v", v, "pages Hkv page E")
    _widths_and_groups(args)
    rows = "B"
    if layout.cu_seqlens is not None:
        rows, totals = "G", {"cu_seqlens": args.sizes["M"]}
        if args.sizes["B"] != 1:
            args.fail("q", f"has B = {args.sizes['B']}", "B = 1 with `cu_seqlens`")
        if layout.cu_seqlens_k is None:
            args.fail("cu_seqlens_k", "is missing", "offsets whose differences count the keys in each row of pages")
        for name, cu in (("cu_seqlens", layout.cu_seqlens), ("cu_seqlens_k", layout.cu_seqlens_k)):
            cu = args.indices(name, cu, "G+1")
            last = int(cu[-1]) if name not in totals and readable(cu) and len(cu) else 0
            args.offsets(name, cu, totals.get(name, last), "M" if name in totals else "N")
        args.sizes["G"] = args.sizes["G+1"] - 1
    table, n_pages = args.indices("block_table", pages.block_table, f"{rows} width"), args.sizes["pages"]
    if readable(table) and table.numel() and not 0 <= int(table.min()) <= int(table.max()) < n_pages:
        args.fail("block_table", f"is {table.tolist()}", f"numbers of pages, 0 to {n_pages - 1}")
    if pages.leftpad is not None:
        args.indices("leftpad", pages.leftpad, rows)
    args.sizes["N"] = args.sizes["width"] * args.sizes["page"]
    if layout.lengths is not None:
        args.counts("lengths", layout.lengths)
    return max(args.sizes["N"], args.sizes["M"] if rows == "B" else 0)


def _widths_and_groups(args: Arguments) -> None:
    args.at_least_one("D", "E")
    if not args.heads_in_groups():
        heads, expected = args.sizes["Hq"], f"a multiple of Hkv = {args.sizes['Hkv']}, the heads of `k`"
        args.fail("q", f"has Hq = {heads} heads", expected)


def attention_options(args: Arguments, options: AttentionOptions, layout: Layout, longest: int | None = None) -> Window:
    """Options but the seed, and unless the longest sequence is known the layout; the window as a pair."""
    args.flag("causal", options.causal)
    if options.scale is not None:
        args.number("scale", options.scale, "a finite number or None")
    if options.softcap is not None:
        args.number("softcap", options.softcap, "a positive number or None", low=0, open_low=True)
    window = _window(args, options.window)
    args.relative_bias(options.rel_bias, "B Hq", args.sequences(*layout) if longest is None else longest)
    if options.sinks is not None:
        args.per_head("sinks", options.sinks, "Hq")
    args.number("dropout_p", options.dropout_p, "a probability in [0, 1]", 0, 1)
    return window


def _window(args: Arguments, window: Any) -> Window:
    """How far to the left and to the right of the query's position keys are visible."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        args.fail("window", f"is {window!r}", "a pair (left, right) of whole numbers or None", TypeError)
    for side, value in zip(("left", "right"), window, strict=True):
        if value is not None:
            args.integer(f"window[{side}]", value, 0, "a whole number >= 0 or None")
    left, right = (None if side is None else min(int(side), 2**31) for side in window)
    return left, right


def seed(args: Arguments, x: Tensor) -> None:
    """A dropout seed that is a tensor."""
    if x.dtype != torch.int64 or x.numel() != 1:
        got = f"is a tensor of {x.numel()} elements of {x.dtype}"
        args.fail("dropout_seed", got, "an int or a one-element int64 tensor", TypeError)


# ---- gated linear units


def glu(args: Arguments, gate: Any, up: Any) -> None:
    """Both sides, or one tensor that holds them."""
    if up is not None:
        args.tensor("gate", gate, "...")
        args.tensor("up", up, "...")
        if up.shape != gate.shape:
            args.fail("up", f"has shape {tuple(up.shape)}", f"{tuple(gate.shape)} as `gate` has")
        return
    args.tensor("gate", gate, "... 2F")
    if gate.shape[-1] % 2:
        got = f"has shape {tuple(gate.shape)}"
        args.fail("gate", got, "an even last axis [gate | up] when `up` is not given")


def glu_linear(args: Arguments, x: Any, w_gate: Any, w_up: Any, b_gate: Any, b_up: Any) -> None:
    """Input, weights and biases."""
    args.tensor("x", x, "... d")
    args.tensor("w_gate", w_gate, "F d")
    args.tensor("w_up", w_up, "F d")
    if b_gate is not None:
        args.tensor("b_gate", b_gate, "F")
    if b_up is not None:
        args.tensor("b_up", b_up, "F")


def activations(args: Arguments, activation: Any, up_activation: Any) -> None:
    """Of both sides."""
    args.choice("activation", activation, ACTIVATIONS)
    args.choice("up_activation", up_activation, ACTIVATIONS)


# ---- gated attention


def gate_activation(args: Arguments, activation: Any) -> None:
    """Of a gate; where there is none, it has no effect."""
    args.choice("gate_activation", activation, ACTIVATIONS)


def gau_attention(args: Arguments, q: Any, k: Any, v: Any, gate: Any) -> None:
    """Queries, keys, values and gate."""
    args.tensor("q", q, "B M S")
    args.tensor("k", k, "B N S")
    args.tensor("v", v, "B N E")
    if gate is not None:
        args.tensor("gate", gate, "B M E")
    args.at_least_one("S", "E")


def gau_options(args: Arguments, score: Any, normalizer: Any) -> None:
    """Score and normaliser."""
    args.choice("score", score, GATED_SCORES)
    expected = "'keys', 'row' or a positive number"
    if isinstance(normalizer, str):
        if normalizer not in ("keys", "row"):
            args.fail("normalizer", f"is {normalizer!r}", expected)
    else:
        args.number("normalizer", normalizer, expected, low=0, open_low=True)
    if score.startswith("softmax") and normalizer != "keys":
        args.fail("normalizer", f"is {normalizer!r} with score={score!r}", "no normalizer: a softmax has its own")


# ---- mixed chunk attention


def mixed_chunk(args: Arguments, length: str, *tensors: Any) -> None:
    """quad_q, quad_k, lin_q, lin_k, v and gate, of N tokens or of 1."""
    for name, x in zip(("quad_q", "quad_k", "lin_q", "lin_k"), tensors[:4], strict=True):
        args.tensor(name, x, f"B {length} S")
    args.tensor("v", tensors[4], f"B {length} E")
    if tensors[5] is not None:
        args.tensor("gate", tensors[5], f"B {length} E")
    args.at_least_one("S", "E")


def one_token(args: Arguments, quad_q: Tensor) -> None:
    """The axis of tokens, which `mixed_chunk` names 1."""
    if quad_q.shape[1] != 1:
        args.fail("quad_q", f"has shape {tuple(quad_q.shape)}", "(B, 1, S): one token")


def mixed_chunk_options(
    args: Arguments, chunk_size: Any, score: Any, lin_normalizer: Any = "tokens", quad_normalizer: Any = None
) -> float:
    """Chunk size, score and normalisers; returns that of the local scores."""
    args.integer("chunk_size", chunk_size, 1, "a whole number >= 1")
    args.choice("score", score, MIXED_CHUNK_SCORES)
    if quad_normalizer is not None:
        args.number("quad_normalizer", quad_normalizer, "a positive number or None", low=0, open_low=True)
    if lin_normalizer != "tokens":
        expected = "'tokens' or a positive number"
        if isinstance(lin_normalizer, str):
            args.fail("lin_normalizer", f"is {lin_normalizer!r}", expected)
        args.number("lin_normalizer", lin_normalizer, expected, low=0, open_low=True)
    return float(chunk_size if quad_normalizer is None else quad_normalizer)

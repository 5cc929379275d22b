"""Good calls of the public operations, and changes that spoil them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from strategies import randn

import flashgau

T = torch.tensor
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "attention": lambda: {"q": randn(0, 2, 4, 6, 8), "k": randn(1, 2, 2, 6, 8), "v": randn(2, 2, 2, 6, 5)},
    "glu": lambda: {"gate": randn(0, 3, 4), "up": randn(1, 3, 4)},
    "glu_linear": lambda: {"x": randn(0, 3, 4), "w_gate": randn(1, 6, 4), "w_up": randn(2, 6, 4)},
    "gau_attention": lambda: {
        "q": randn(0, 2, 6, 8), "k": randn(1, 2, 6, 8), "v": randn(2, 2, 6, 5), "gate": randn(3, 2, 6, 5),
    },
    "mixed_chunk_attention": lambda: {
        **{name: randn(i, 2, 6, 3) for i, name in enumerate(("quad_q", "quad_k", "lin_q", "lin_k"))},
        "v": randn(4, 2, 6, 5), "gate": randn(5, 2, 6, 5), "chunk_size": 4,
    },
    "mixed_chunk_step": lambda: {
        **{name: randn(i, 2, 1, 3) for i, name in enumerate(("quad_q", "quad_k", "lin_q", "lin_k"))},
        "v": randn(4, 2, 1, 5), "gate": randn(5, 2, 1, 5), "state": flashgau.MixedChunkState.empty(2, 3, 5, 4),
    },
}  # fmt: skip


def one_row(**changes: Any) -> dict[str, Any]:
    """Attention operands with B = 1, as packing wants them."""
    return {"q": randn(0, 1, 4, 6, 8), "k": randn(1, 1, 2, 6, 8), "v": randn(2, 1, 2, 6, 5), **changes}


def state(**changes: Any) -> flashgau.MixedChunkState:
    return replace(flashgau.MixedChunkState.empty(2, 3, 5, 4), **changes)


@dataclass(frozen=True)
class Bad:
    """A change that spoils a good call, what it must raise, the argument it must name and what it must expect."""

    op: str
    changes: dict[str, Any]
    error: type[Exception]
    argument: str
    expected: str

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.expected[:30]}"


def bad(op: str, error: type[Exception], argument: str, expected: str, **changes: Any) -> Bad:
    return Bad(op, changes, error, argument, expected)


V, E = ValueError, TypeError
nan = float("nan")
LONG = {"rel_bias": torch.zeros(11)}

BAD = [
    # operands of attention
    bad("attention", V, "q", r"(B, Hq, M, D)", q=randn(0, 4, 6, 8)),
    bad("attention", V, "k", r"B = 2", k=randn(1, 3, 2, 6, 8)),
    bad("attention", V, "k", r"D = 8", k=randn(1, 2, 2, 6, 7)),
    bad("attention", V, "k", r"(B, Hkv, N, D)", k=randn(1, 2, 6, 8)),
    bad("attention", V, "v", r"Hkv = 2", v=randn(2, 2, 4, 6, 5)),
    bad("attention", V, "v", r"N = 6", v=randn(2, 2, 2, 7, 5)),
    bad("attention", V, "q", r"a multiple of Hkv = 3", k=randn(1, 2, 3, 6, 8), v=randn(2, 2, 3, 6, 5)),
    bad("attention", V, "q", r"a multiple of Hkv = 0", k=randn(1, 2, 0, 6, 8), v=randn(2, 2, 0, 6, 5)),
    bad("attention", V, "v", r"E >= 1", v=randn(2, 2, 2, 6, 0)),
    bad("attention", V, "q", r"D >= 1", q=randn(0, 2, 4, 6, 0), k=randn(1, 2, 2, 6, 0)),
    bad("attention", E, "q", r"a torch.Tensor of shape (B, Hq, M, D)", q=[[1.0]]),
    bad("attention", E, "k", r"a torch.Tensor", k=None),
    bad("attention", E, "v", r"a torch.Tensor", v=randn(2, 2, 2, 6, 5).numpy()),
    bad("attention", E, "q", r"float16, bfloat16, float32 or float64", q=torch.ones(2, 4, 6, 8, dtype=torch.int64)),
    bad("attention", E, "q", r"float16, bfloat16, float32 or float64", q=torch.ones(2, 4, 6, 8, dtype=torch.bool)),
    bad("attention", E, "q", r"float16, bfloat16, float32 or float64", q=torch.ones(2, 4, 6, 8, dtype=torch.cfloat)),
    bad("attention", E, "k", r"torch.float32 as `q` has", k=randn(1, 2, 2, 6, 8).double()),
    bad("attention", E, "v", r"torch.float32 as `q` has", v=randn(2, 2, 2, 6, 5).half()),
    bad("attention", E, "q", r"a dense tensor", q=torch.eye(3).to_sparse()),
    bad("attention", V, "k", r"cpu as `q` is", k=randn(1, 2, 2, 6, 8).to("meta")),
    # its scalars and flags
    bad("attention", E, "causal", r"True or False", causal="yes"),
    bad("attention", E, "causal", r"True or False", causal=1),
    bad("attention", E, "return_lse", r"True or False", return_lse="True"),
    bad("attention", E, "scale", r"a finite number or None", scale="1"),
    bad("attention", E, "scale", r"a finite number or None", scale=T(1.0)),
    bad("attention", V, "scale", r"a finite number or None", scale=nan),
    bad("attention", V, "softcap", r"a positive number or None", softcap=-1.0),
    bad("attention", V, "softcap", r"a positive number or None", softcap=0),
    bad("attention", E, "softcap", r"a positive number or None", softcap=True),
    bad("attention", E, "window", r"a pair (left, right)", window=5),
    bad("attention", E, "window", r"a pair (left, right)", window=(1, 2, 3)),
    bad("attention", V, "window[left]", r"a whole number >= 0 or None", window=(-1, None)),
    bad("attention", E, "window[right]", r"a whole number >= 0 or None", window=(None, 1.5)),
    bad("attention", V, "dropout_p", r"a probability in [0, 1]", dropout_p=1.5),
    bad("attention", V, "dropout_p", r"a probability in [0, 1]", dropout_p=-0.1),
    bad("attention", E, "dropout_p", r"a probability in [0, 1]", dropout_p=None),
    bad("attention", E, "dropout_seed", r"an int or a one-element int64 tensor", dropout_p=0.1, dropout_seed=1.0),
    bad("attention", E, "dropout_seed", r"a one-element int64 tensor", dropout_p=0.1, dropout_seed=T([1, 2])),
    bad("attention", E, "dropout_seed", r"a one-element int64 tensor", dropout_p=0.1, dropout_seed=T([1.0])),
    bad("attention", V, "dropout_seed", r"64 bits", dropout_p=0.1, dropout_seed=2**63),
    bad("attention", V, "gate", r"(2, 4, 6, 5), or (2, 4, 6, 1)", gate=randn(3, 2, 4, 6, 8)),
    bad("attention", V, "gate", r"(2, 4, 6, 5), or (2, 4, 6, 1)", gate=randn(3, 2, 2, 6, 5)),
    bad("attention", E, "gate", r"torch.float32 as `q` has", gate=randn(3, 2, 4, 6, 5).half()),
    bad("attention", E, "gate", r"a torch.Tensor", gate=1.0),
    bad("attention", V, "gate_activation", r"'identity', 'sigmoid'", gate_activation="softmax"),
    bad("attention", V, "backend", r"'triton', 'eager', 'reference'", backend="cuda"),
    # its bias and sinks
    bad("attention", V, "rel_bias", r"an odd length 2P-1", rel_bias=torch.zeros(12)),
    bad("attention", V, "rel_bias", r"P >= 6, the longest sequence", rel_bias=torch.zeros(9)),
    bad("attention", V, "rel_bias", r"broadcastable to (B, Hq, 2P-1)", rel_bias=torch.zeros(3, 11)),
    bad("attention", V, "rel_bias", r"broadcastable to (B, Hq, 2P-1)", rel_bias=torch.zeros(3, 4, 11)),
    bad("attention", V, "rel_bias", r"broadcastable to (B, Hq, 2P-1)", rel_bias=torch.zeros(1, 2, 4, 11)),
    bad("attention", V, "rel_bias", r"broadcastable to (B, Hq, 2P-1)", rel_bias=T(0.0)),
    bad("attention", E, "rel_bias", r"or float32", rel_bias=torch.zeros(11).double()),
    bad("attention", E, "rel_bias", r"or float32", rel_bias=torch.zeros(11).long()),
    bad("attention", E, "rel_bias", r"a torch.Tensor", rel_bias=[0.0] * 11),
    bad("attention", V, "rel_bias", r"cpu as `q` is", rel_bias=torch.zeros(11, device="meta")),
    bad("attention", V, "sinks", r"Hq = 4", sinks=torch.zeros(2)),
    bad("attention", V, "sinks", r"(Hq,)", sinks=torch.zeros(1, 4)),
    bad("attention", E, "sinks", r"or float32", sinks=torch.zeros(4).half()),
    bad("attention", E, "sinks", r"a torch.Tensor", sinks=0.0),
    # padding and packing
    bad("attention", V, "lengths", r"values from 0 to N = 6", lengths=T([6, 7])),
    bad("attention", V, "lengths", r"values from 0 to N = 6", lengths=T([-1, 3])),
    bad("attention", V, "lengths", r"B = 2", lengths=T([6, 6, 6])),
    bad("attention", V, "lengths", r"(B,)", lengths=T([[6], [6]])),
    bad("attention", E, "lengths", r"an integer dtype", lengths=T([6.0, 6.0])),
    bad("attention", E, "lengths", r"an integer dtype", lengths=T([True, True])),
    bad("attention", E, "lengths", r"an integer torch.Tensor", lengths=[6, 6]),
    bad("attention", V, "lengths", r"cpu as `q` is", lengths=T([6, 6], device="meta")),
    bad("attention", V, "cu_seqlens", r"offsets from 0 to M = 6", **one_row(cu_seqlens=T([1, 6]))),
    bad("attention", V, "cu_seqlens", r"offsets from 0 to M = 6", **one_row(cu_seqlens=T([0, 5]))),
    bad("attention", V, "cu_seqlens", r"non-decreasing", **one_row(cu_seqlens=T([0, 4, 2, 6]))),
    bad("attention", V, "cu_seqlens", r"(G+1,)", **one_row(cu_seqlens=T([[0, 6]]))),
    bad("attention", V, "cu_seqlens", r"(G+1,)", **one_row(cu_seqlens=torch.zeros(0, dtype=torch.int32))),
    bad("attention", E, "cu_seqlens", r"an integer dtype", **one_row(cu_seqlens=T([0.0, 6.0]))),
    bad("attention", E, "cu_seqlens", r"an integer dtype", **one_row(cu_seqlens=T([0, 6], dtype=torch.int16))),
    bad("attention", E, "cu_seqlens", r"an integer torch.Tensor", **one_row(cu_seqlens=[0, 6])),
    bad("attention", V, "cu_seqlens", r"cpu as `q` is", **one_row(cu_seqlens=T([0, 6], device="meta"))),
    bad("attention", V, "q", r"B = 1 with `cu_seqlens`", cu_seqlens=T([0, 6])),
    bad("attention", V, "cu_seqlens", r"at most one", **one_row(cu_seqlens=T([0, 6]), lengths=T([6]))),
    bad("attention", V, "cu_seqlens_k", r"both or neither", **one_row(cu_seqlens_k=T([0, 6]))),
    bad("attention", V, "cu_seqlens_k", r"both or neither", **one_row(cu_seqlens_k=T([0, 6]), lengths=T([6]))),
    bad("attention", V, "cu_seqlens_k", r"to N = 6", **one_row(cu_seqlens=T([0, 6]), cu_seqlens_k=T([0, 5]))),
    bad("attention", V, "cu_seqlens_k", r"(2,)", **one_row(cu_seqlens=T([0, 6]), cu_seqlens_k=T([0, 3, 6]))),
    bad(
        "attention", V, "cu_seqlens", r"M = N or `cu_seqlens_k`",
        **one_row(q=randn(0, 1, 4, 5, 8), cu_seqlens=T([0, 5])),
    ),
    bad("attention", V, "rel_bias", r"P >= 4", **one_row(cu_seqlens=T([0, 2, 6]), rel_bias=torch.zeros(5))),
    # glu
    bad("glu", V, "up", r"(3, 4) as `gate` has", up=randn(1, 3, 5)),
    bad("glu", V, "up", r"(3, 4) as `gate` has", up=randn(1, 4)),
    bad("glu", V, "gate", r"an even last axis", gate=randn(0, 3, 5), up=None),
    bad("glu", V, "gate", r"2F", gate=T(1.0), up=None),
    bad("glu", E, "up", r"torch.float32 as `gate` has", up=randn(1, 3, 4).half()),
    bad("glu", E, "gate", r"a torch.Tensor", gate=3.0),
    bad("glu", E, "gate", r"float16, bfloat16, float32 or float64", gate=torch.ones(3, 4, dtype=torch.int32)),
    bad("glu", V, "activation", r"one of 'identity', 'sigmoid'", activation="swish"),
    bad("glu", V, "activation", r"one of 'identity', 'sigmoid'", activation=None),
    bad("glu", V, "activation", r"one of 'identity', 'sigmoid'", activation=["silu"]),
    bad("glu", V, "up_activation", r"one of 'identity', 'sigmoid'", up_activation="GELU"),
    bad("glu", V, "backend", r"'triton', 'eager', 'reference'", backend=""),
    bad("glu", V, "up", r"cpu as `gate` is", up=randn(1, 3, 4).to("meta")),
    bad("glu_linear", V, "x", r"(..., d)", x=T(1.0)),
    bad("glu_linear", V, "w_gate", r"d = 4", w_gate=randn(1, 6, 5)),
    bad("glu_linear", V, "w_gate", r"(F, d)", w_gate=randn(1, 6)),
    bad("glu_linear", V, "w_up", r"F = 6", w_up=randn(2, 7, 4)),
    bad("glu_linear", V, "b_gate", r"F = 6", b_gate=randn(3, 4)),
    bad("glu_linear", V, "b_up", r"(F,)", b_up=randn(3, 1, 6)),
    bad("glu_linear", E, "w_up", r"torch.float32 as `x` has", w_up=randn(2, 6, 4).bfloat16()),
    bad("glu_linear", E, "b_up", r"a torch.Tensor", b_up=0.0),
    bad("glu_linear", V, "activation", r"one of", activation="tanh"),
    bad("glu_linear", E, "recompute", r"True or False", recompute=1),
    # gau
    bad("gau_attention", V, "q", r"(B, M, S)", q=randn(0, 2, 1, 6, 8)),
    bad("gau_attention", V, "k", r"S = 8", k=randn(1, 2, 6, 7)),
    bad("gau_attention", V, "v", r"N = 6", v=randn(2, 2, 5, 5)),
    bad("gau_attention", V, "gate", r"E = 5", gate=randn(3, 2, 6, 4)),
    bad("gau_attention", V, "gate", r"M = 6", gate=randn(3, 2, 5, 5)),
    bad("gau_attention", E, "gate", r"torch.float32", gate=randn(3, 2, 6, 5).half()),
    bad("gau_attention", V, "gate_activation", r"one of 'identity', 'sigmoid', 'relu'", gate_activation="swish"),
    bad("gau_attention", V, "score", r"one of 'relu2', 'laplace', 'softmax', 'softmax_plus'", score="relu"),
    bad("gau_attention", V, "normalizer", r"'keys', 'row' or a positive number", normalizer="rows"),
    bad("gau_attention", V, "normalizer", r"'keys', 'row' or a positive number", normalizer=0),
    bad("gau_attention", V, "normalizer", r"'keys', 'row' or a positive number", normalizer=-2.0),
    bad("gau_attention", E, "normalizer", r"'keys', 'row' or a positive number", normalizer=None),
    bad("gau_attention", E, "normalizer", r"'keys', 'row' or a positive number", normalizer=True),
    bad("gau_attention", V, "normalizer", r"a softmax has its own", score="softmax", normalizer="row"),
    bad("gau_attention", V, "normalizer", r"a softmax has its own", score="softmax_plus", normalizer=6.0),
    bad("gau_attention", E, "causal", r"True or False", causal=None),
    bad("gau_attention", V, "rel_bias", r"broadcastable to (B, 2P-1)", rel_bias=torch.zeros(3, 11)),
    bad("gau_attention", V, "rel_bias", r"an odd length", rel_bias=torch.zeros(10)),
    bad("gau_attention", V, "rel_bias", r"P >= 6", rel_bias=torch.zeros(7)),
    bad("gau_attention", V, "lengths", r"values from 0 to N = 6", lengths=T([0, 9])),
    bad("gau_attention", V, "cu_seqlens", r"at most one", lengths=T([6, 6]), cu_seqlens=T([0, 6])),
    bad("gau_attention", V, "q", r"B = 1 with `cu_seqlens`", cu_seqlens=T([0, 6])),
    bad("gau_attention", V, "backend", r"'triton', 'eager', 'reference'", backend="Eager"),
    # mixed chunk
    bad("mixed_chunk_attention", V, "quad_q", r"(B, N, S)", quad_q=randn(0, 6, 3)),
    bad("mixed_chunk_attention", V, "quad_k", r"N = 6", quad_k=randn(0, 2, 5, 3)),
    bad("mixed_chunk_attention", V, "lin_q", r"S = 3", lin_q=randn(0, 2, 6, 4)),
    bad("mixed_chunk_attention", V, "lin_k", r"B = 2", lin_k=randn(0, 1, 6, 3)),
    bad("mixed_chunk_attention", V, "v", r"N = 6", v=randn(0, 2, 7, 5)),
    bad("mixed_chunk_attention", V, "gate", r"E = 5", gate=randn(0, 2, 6, 6)),
    bad("mixed_chunk_attention", E, "v", r"torch.float32 as `quad_q` has", v=randn(0, 2, 6, 5).double()),
    bad("mixed_chunk_attention", V, "gate_activation", r"one of 'identity', 'sigmoid'", gate_activation=None),
    bad("mixed_chunk_attention", V, "chunk_size", r"a whole number >= 1", chunk_size=0),
    bad("mixed_chunk_attention", E, "chunk_size", r"a whole number >= 1", chunk_size=4.0),
    bad("mixed_chunk_attention", E, "chunk_size", r"a whole number >= 1", chunk_size=True),
    bad("mixed_chunk_attention", V, "score", r"one of 'relu2', 'laplace'", score="softmax"),
    bad("mixed_chunk_attention", E, "causal", r"True or False", causal="no"),
    bad("mixed_chunk_attention", E, "return_state", r"True or False", causal=True, return_state=1),
    bad("mixed_chunk_attention", V, "quad_normalizer", r"a positive number or None", quad_normalizer=0),
    bad("mixed_chunk_attention", E, "quad_normalizer", r"a positive number or None", quad_normalizer="C"),
    bad("mixed_chunk_attention", V, "lin_normalizer", r"'tokens' or a positive number", lin_normalizer="keys"),
    bad("mixed_chunk_attention", V, "lin_normalizer", r"'tokens' or a positive number", lin_normalizer=-1),
    bad("mixed_chunk_attention", E, "lin_normalizer", r"'tokens' or a positive number", lin_normalizer=None),
    bad("mixed_chunk_attention", V, "rel_bias", r"P >= 4, the chunk size", rel_bias=torch.zeros(5)),
    bad("mixed_chunk_attention", V, "rel_bias", r"broadcastable to (B, 2P-1)", rel_bias=torch.zeros(3, 7)),
    bad("mixed_chunk_attention", V, "lengths", r"values from 0 to N = 6", lengths=T([0, 7])),
    bad("mixed_chunk_attention", V, "quad_q", r"B = 1 with `cu_seqlens`", cu_seqlens=T([0, 6])),
    bad("mixed_chunk_attention", V, "return_state", r"causal=True", return_state=True),
    bad("mixed_chunk_attention", V, "initial_state", r"causal=True", initial_state=state()),
    bad("mixed_chunk_attention", E, "initial_state", r"a flashgau.MixedChunkState", causal=True, initial_state={}),
    bad(
        "mixed_chunk_attention", V, "initial_state.quad_k", r"C = 3",
        causal=True, chunk_size=3, initial_state=state(),
    ),
    bad(
        "mixed_chunk_attention", V, "initial_state.kv", r"(2, 3, 5)",
        causal=True, initial_state=state(kv=torch.zeros(2, 3, 4)),
    ),
    bad(
        "mixed_chunk_attention", V, "initial_state.kv", r"one row for each sequence",
        causal=True, initial_state=flashgau.MixedChunkState.empty(3, 3, 5, 4),
    ),
    bad(
        "mixed_chunk_attention", V, "initial_state.position", r"counts of tokens >= 0",
        causal=True, initial_state=state(position=T([-1, 0])),
    ),
    bad(
        "mixed_chunk_attention", E, "initial_state.position", r"int64",
        causal=True, initial_state=state(position=T([0, 0], dtype=torch.int32)),
    ),
    # its step
    bad("mixed_chunk_step", V, "quad_q", r"one token", **{
        name: randn(0, 2, 2, 5 if name in ("v", "gate") else 3)
        for name in ("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate")
    }),
    bad("mixed_chunk_step", V, "lin_k", r"B = 2", lin_k=randn(0, 3, 1, 3)),
    bad("mixed_chunk_step", E, "state", r"a flashgau.MixedChunkState", state=None),
    bad("mixed_chunk_step", V, "state.v", r"(2, 4, 5)", state=state(v=torch.zeros(2, 4, 6))),
    bad("mixed_chunk_step", V, "state.lin_k", r"(2, 4, 3)", state=state(lin_k=torch.zeros(2, 3, 3))),
    bad("mixed_chunk_step", V, "state.quad_k", r"(G, C, S)", state=state(quad_k=torch.zeros(2, 4))),
    bad("mixed_chunk_step", V, "gate_activation", r"one of 'identity', 'sigmoid'", gate_activation="tanh"),
    bad("mixed_chunk_step", V, "score", r"one of 'relu2', 'laplace'", score="softmax_plus"),
    bad("mixed_chunk_step", V, "rel_bias", r"P >= 4, the chunk size", rel_bias=torch.zeros(3)),
    bad("mixed_chunk_step", V, "lin_normalizer", r"'tokens' or a positive number", lin_normalizer=0),
    bad("mixed_chunk_step", V, "backend", r"'triton', 'eager', 'reference'", backend=1),
]  # fmt: skip

"""For each entry of the tables, calls that start the kernel it configures: what is compiled, and what is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashgau import tables
from flashgau.kernels import attention, gau, glu, mixed_chunk, norms, projection, tangents
from flashgau.kernels.glu import elementwise
from flashgau.options import (
    Angles,
    AttentionAlong,
    AttentionOptions,
    AttentionResults,
    AttentionTangents,
    GatedOptions,
    GatedTangents,
    Layout,
    MixedChunkOptions,
    NormOptions,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class CallShape:
    """The shape of a call.

    Attributes:
        length: tokens of a sequence; None for as many as compiling takes.
        batch: sequences; of what has rows only, their tokens are its rows.
        heads: of attention's queries.
        kv_heads: of its keys and values; None for as many.
        width: of a head, exactly; None for that of the entry.
    """

    length: int | None = None
    batch: int = 1
    heads: int = 8
    kv_heads: int | None = None
    width: int | None = None

    @property
    def groups(self) -> int:
        """Query heads of a key head."""
        return self.heads // (self.kv_heads or self.heads)


@dataclass(frozen=True)
class Operands:
    """Makes the tensors of a call.

    Attributes:
        dtype: of all that does not say otherwise.
        device: where they are, or None for tensors without values, which compiling takes.
        shape: of the call.
    """

    dtype: torch.dtype
    device: torch.device | None = None
    shape: CallShape = CallShape()

    def tokens(self, compiling: int = 16384) -> int:
        """How many tokens a sequence has, unless the shape says it."""
        return compiling if self.shape.length is None else self.shape.length

    def rows(self) -> int:
        """How many tokens all sequences have."""
        return self.tokens() * self.shape.batch

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor, of normal values on a device that holds any. (An integer may be a seed or a position: 100.)"""
        x = torch.empty(*shape, dtype=dtype or self.dtype, device=self.device or "meta")
        if self.device is None:
            return x
        return x.normal_() if x.is_floating_point() else x.fill_(100)


@dataclass(frozen=True)
class Kept(Operands):
    """Operands that are made once: after `rewind` they come again, in their order, so that a timed call makes none."""

    made: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The next tensor."""
        if self.left:
            return self.left.pop(0)
        self.made.append(super().__call__(*shape, dtype=dtype))
        return self.made[-1]

    def rewind(self) -> None:
        """Begin with the first tensor again."""
        self.left[:] = self.made


@dataclass(frozen=True)
class LaunchEntry:
    """A kernel, and the calls of its launcher that are compiled or timed.

    Attributes:
        kernel: the jitted function's name.
        call: of the launcher: (kind, width, operands).
        kinds: what is compiled in each dtype. fp16 and bf16 differ in the names of instructions only.
        widths: of the heads; 0 alone for a kernel without.
        matrix: the start of the matrix instruction it must have in half precision, by table; None if it multiplies no
            matrices, and "" for any. Kinds named "all options" may have any, and may spill.
        vectors: whether its loads and stores must be of 16 bytes.
        large: the dtypes in which it must have that very instruction; in the other, any.
        skewed: whether its exponentials should stand under a product of another block, where products are asynchronous.
    """

    kernel: str
    call: Callable[[str, int, Operands], None]
    kinds: Mapping[str, tuple[str, ...]]
    widths: tuple[int, ...] = (0,)
    matrix: dict[str, str] | None = None
    vectors: bool = False
    large: tuple[str, ...] = ("fp16", "bf16")
    skewed: bool = False


# Blocks of 64 rows and more are multiplied by whole groups of warps; where rows are few by any instruction there is.
_LARGE = {"sm_90": "HGMMA", "sm_100": "UTC"}
_ANY: dict[str, str] = {}


def _attention(backward: bool, queries: int | None, biased: bool, kind: str, width: int, make: Operands) -> None:
    fp32, n = torch.float32, make.tokens()
    m = n if queries is None else queries
    b, h, kv_heads = make.shape.batch, make.shape.heads, make.shape.kv_heads or make.shape.heads
    options: dict[str, Any] = {"scale": width**-0.5, "window": (None, None if kind == "full" else 0)}
    if kind == "all options":
        options |= {"window": (64, 64), "softcap": 5.0, "dropout_p": 0.1, "sinks": make(h, dtype=fp32)}
        options |= {"dropout_seed": make(1, dtype=torch.int64), "lengths": make(b, dtype=torch.int32)}
    if biased or kind == "all options":
        options["rel_bias"] = make(b, h, 2 * n - 1, dtype=fp32)
    q, k = make(b, h, m, width), make(b, kv_heads, n, width)
    if backward:
        attention.attention_backward(q, None, q, k, k, (q, make(b, h, m, dtype=fp32)), **options)
    else:
        attention.attention_forward(q, k, k, **options)


def _glu(backward: bool, kind: str, width: int, make: Operands) -> None:
    variant, layout = kind.split()
    activation = {"swiglu": "silu", "geglu": "gelu"}[variant]
    options: dict[str, Any] = {"activation": activation, "up_activation": "identity"}
    gate = make(make.rows(), 2 * 4096 if layout == "packed" else 4096)
    up, dout = (None if layout == "packed" else gate), make(make.rows(), 4096)
    if backward:
        glu.glu_backward(dout, gate, up, **options)
    else:
        glu.glu_forward(gate, up, **options)


def _glu_linear(rows: int | None, kind: str, width: int, make: Operands) -> None:
    rows = make.rows() if rows is None else rows
    x, w, out = (make(*shape) for shape in ((rows, 1024), (4096, 1024), (rows, 4096)))
    bias = make(4096)
    options: dict[str, Any] = {"activation": "gelu", "fused": True}
    if kind == "backward":
        glu.glu_linear_backward(out, x, (w, w, bias, bias), **options)
    else:
        glu.glu_linear_forward(x, (w, w, bias, bias), save=kind == "training", **options)


def _gau(backward: bool, queries: int | None, e: int, kind: str, width: int, make: Operands) -> None:
    score, mask, *rest = kind.split()
    n = make.tokens(2048)
    m = n if queries is None else queries
    q, k, v, out = (make(make.shape.batch, *shape) for shape in ((m, width), (n, width), (n, e), (m, e)))
    bias = make(1, 2 * n - 1, dtype=torch.float32) if rest else None
    options: dict[str, Any] = {"score": score, "normalizer": "keys", "causal": mask == "causal", "rel_bias": bias}
    if backward:
        gau.gau_attention_backward(out, q, k, v, out, out, **options)
    else:
        gau.gau_attention_forward(q, k, v, out, **options, save=True)


def _mixed_chunk(backward: bool, e: int, kind: str, width: int, make: Operands) -> None:
    score, mask, *rest = kind.split()
    n, causal, fp32 = make.tokens(), mask != "full", torch.float32
    heads, v = make(4, make.shape.batch, n, width), make(make.shape.batch, n, e)
    options: dict[str, Any] = {"chunk_size": 256, "score": score, "causal": causal}
    if rest:
        options["rel_bias"] = make(1, 511, dtype=fp32)
    if mask == "continued":
        options |= {"initial_kv": make(1, width, e, dtype=fp32), "closed_tokens": make(1, dtype=torch.int64)}
    if backward:
        kept = MixedChunkOptions(256, causal=causal).kept_states(heads[0], v, Layout())
        if kept is not None and mask != "continued":  # whose call sums them again, as wider heads' do
            options["chunk_states"] = make(*kept, dtype=fp32 if v.dtype == torch.float16 else v.dtype)
        mixed_chunk.mixed_chunk_attention_backward(v, None, heads, v, v, product=v, **options)
    else:
        mixed_chunk.mixed_chunk_attention_forward(heads, v, v, **options, save=True)


def _mixed_chunk_both(kind: str, width: int, make: Operands, e: int = 2048) -> None:
    for backward in (False, True):
        _mixed_chunk(backward, e, kind, width, make)


def _mixed_chunk_step(kind: str, width: int, make: Operands) -> None:
    heads, v = make(4, 8, 1, width), make(8, 1, 2048)
    held, kv = make(8, 256, width), make(8, width, 2048, dtype=torch.float32)
    mixed_chunk.mixed_chunk_step_(
        heads, v, v, (kv, held, held, make(8, 256, 2048), make(8, dtype=torch.int64)),
        rel_bias=make(8, 511, dtype=torch.float32),
    )  # fmt: skip


def _projection(kind: str, width: int, make: Operands) -> None:
    n = make.rows()
    halves = [part[:, 2048:4096] for part in [make(n, 4224)] * 2]
    elementwise(projection.silu_backward_kernel, "projection", (make(n, 2048), *halves), tables.in_force())


def _heads(kind: str, width: int, make: Operands) -> None:
    n = make.tokens(2048)
    z, gamma = make(8, n, 128), make(4, 128, dtype=torch.float32)
    cos = make(1, n, 64, dtype=torch.float32)
    projection.heads_backward([z] * 4, z, gamma, Angles(cos, cos), z)


def _norm(backward: bool, kind: str, width: int, make: Operands) -> None:
    x, options = make(make.rows(), 1024), NormOptions("layernorm" if kind == "layernorm" else "rms")
    weight = make(1 if kind == "scalenorm" else 1024)
    bias = make(1024) if kind == "layernorm" else None
    if backward:
        norms.norm_backward(x, x, weight, bias, options)
    else:
        norms.norm_forward(x, weight, bias, options)


def _derivatives(biased: bool, kind: str, width: int, make: Operands) -> None:
    """Of softmax attention or, of a kind that begins with a score, of gated attention with wide values."""
    fp32, n, b, h = torch.float32, make.tokens(2048), make.shape.batch, make.shape.heads
    if kind == "relu2 causal":
        q, v = make(b, n, width), make(b, n, 1024)
        gated = GatedOptions("relu2", "keys", True)
        tangents.gau_attention_jvp(q, q, v, GatedTangents(q, q, v), options=gated)
        tangents.gau_attention_second(v, q, q, v, GatedTangents(q, q, v), options=gated)
        return
    q, k = make(b, h, n, width), make(b, make.shape.kv_heads or h, n, width)
    options, layout, bias, sinks = AttentionOptions(causal=True), Layout(), None, None
    if kind == "all options":
        sinks, layout = make(h, dtype=fp32), Layout(make(b, dtype=torch.int32))
        options = AttentionOptions(
            None, False, (64, 64), 5.0, sinks=sinks, dropout_p=0.1, dropout_seed=make(1, dtype=torch.int64)
        )
    if biased or kind == "all options":
        bias = make(b, h, 2 * n - 1, dtype=fp32)
        options = options._replace(rel_bias=bias)
    lse, moving = make(b, h, n, dtype=fp32), AttentionTangents(q, k, k, bias, sinks)
    results, along = AttentionResults(q, lse), AttentionAlong(q, lse)
    tangents.attention_jvp(q, k, k, results, moving, layout, options)
    tangents.attention_second(q, lse, q, k, k, results, moving, along, layout, options)


_ATTENTION: dict[str, Any] = {
    "kinds": {"fp16": ("full", "causal"), "bf16": ("full", "causal", "all options"), "fp32": ("causal", "all options")},
    "widths": (64, 128, 256),
}
_GLU: dict[str, Any] = {
    "kinds": {"fp16": ("geglu packed",), "bf16": ("swiglu separate", "geglu packed"), "fp32": ("geglu packed",)},
    "vectors": True,
}
_PRODUCT: dict[str, Any] = {
    "kinds": {"fp16": ("training",), "bf16": ("inference", "training"), "fp32": ("training",)},
}
_BACKWARD: dict[str, tuple[str, ...]] = {dtype: ("backward",) for dtype in DTYPES}
_GAU: dict[str, Any] = {
    "kinds": {"fp16": ("relu2 causal",), "bf16": ("relu2 causal", "laplace full bias"), "fp32": ("relu2 causal",)},
    "widths": (64, 128, 256),
    "large": ("bf16",),  # weights beside fp16 are fp32
}
_MIXED: dict[str, Any] = {
    "kinds": {
        "fp16": ("relu2 causal",),
        "bf16": ("relu2 causal", "relu2 continued", "laplace full bias"),
        "fp32": ("relu2 causal",),
    },
    "large": ("bf16",),  # weights and states beside fp16 are fp32
}
_SOFTMAX_DERIVATIVES: dict[str, Any] = {
    "kinds": {"fp16": ("causal",), "bf16": ("causal", "all options"), "fp32": ("causal", "all options")},
    "widths": (64, 128, 256), "matrix": _ANY,
}  # fmt: skip
_DERIVATIVES: dict[str, Any] = _SOFTMAX_DERIVATIVES | {
    "kinds": _SOFTMAX_DERIVATIVES["kinds"] | {"bf16": ("causal", "all options", "relu2 causal")}
}
_NORMS: dict[str, tuple[str, ...]] = {
    "fp16": ("layernorm",),
    "bf16": ("layernorm", "scalenorm"),
    "fp32": ("layernorm",),
}
_STEP: dict[str, tuple[str, ...]] = {dtype: ("step",) for dtype in DTYPES}
_SOFTMAX = {"fp16": ("softmax causal",), "bf16": ("softmax causal",), "fp32": ("softmax causal",)}

ENTRIES: dict[str, LaunchEntry] = {
    "attention_forward": LaunchEntry(
        "forward_kernel", partial(_attention, False, None, False), matrix=_LARGE, skewed=True, **_ATTENTION
    ),
    "attention_forward_few_rows": LaunchEntry(
        "forward_kernel", partial(_attention, False, 1, False), matrix=_ANY, **_ATTENTION
    ),
    "attention_dq": LaunchEntry("dq_kernel", partial(_attention, True, None, False), matrix=_LARGE, **_ATTENTION),
    "attention_dkv": LaunchEntry(
        "dkv_kernel", partial(_attention, True, None, False), matrix=_LARGE, skewed=True, **_ATTENTION
    ),
    "attention_dbias": LaunchEntry("dbias_kernel", partial(_attention, True, None, True), matrix=_ANY, **_ATTENTION),
    "glu_forward": LaunchEntry("glu_kernel", partial(_glu, False), **_GLU),
    "glu_backward": LaunchEntry("glu_backward_kernel", partial(_glu, True), **_GLU),
    "glu_linear": LaunchEntry("linear_kernel", partial(_glu_linear, None), matrix=_LARGE, **_PRODUCT),
    "glu_linear_few_rows": LaunchEntry("linear_kernel", partial(_glu_linear, 1), matrix=_ANY, **_PRODUCT),
    "glu_linear_backward": LaunchEntry(
        "linear_backward_kernel", partial(_glu_linear, None), _BACKWARD, matrix=_LARGE
    ),
    "glu_linear_backward_few_rows": LaunchEntry(
        "linear_backward_kernel", partial(_glu_linear, 1), _BACKWARD, matrix=_ANY
    ),
    "projection": LaunchEntry("silu_backward_kernel", _projection, _BACKWARD, vectors=True),
    "heads": LaunchEntry("heads_backward_kernel", _heads, _BACKWARD),
    "norm_forward": LaunchEntry("norm_kernel", partial(_norm, False), _NORMS, vectors=True),
    "norm_backward": LaunchEntry("norm_backward_kernel", partial(_norm, True), _NORMS, vectors=True),
    "gau_lse": LaunchEntry("lse_kernel", partial(_gau, False, None, 1024), _SOFTMAX, (64, 128, 256), matrix=_LARGE),
    "gau_weights": LaunchEntry("probs_kernel", partial(_gau, False, None, 1024), matrix=_LARGE, **_GAU),
    "gau_weights_few_rows": LaunchEntry("probs_kernel", partial(_gau, False, 1, 1024), matrix=_ANY, **_GAU),
    "gau_product": LaunchEntry("product_kernel", partial(_gau, False, None, 1024), matrix=_LARGE, **_GAU),
    "gau_product_few_rows": LaunchEntry("product_kernel", partial(_gau, False, 1, 1024), matrix=_ANY, **_GAU),
    "gau_fused": LaunchEntry("product_kernel", partial(_gau, False, None, 512), matrix=_LARGE, **_GAU),
    "gau_prologue": LaunchEntry(
        "prologue_kernel", lambda kind, _, *rest: _gau(True, None, 1024, kind, 64, *rest), _SOFTMAX
    ),
    "gau_gradient": LaunchEntry("gradient_kernel", partial(_gau, True, None, 1024), matrix=_LARGE, **_GAU),
    "gau_dv": LaunchEntry("dkv_kernel", partial(_gau, True, None, 1024), matrix=_ANY, **_GAU),
    "gau_dq": LaunchEntry("dq_kernel", partial(_gau, True, None, 1024), matrix=_ANY, **_GAU),
    "mixed_chunk_states": LaunchEntry(  # of few columns, whose sequences are cut into segments on any device
        "states_kernel", partial(_mixed_chunk_both, e=512), widths=(128,), matrix=_LARGE, **_MIXED
    ),
    "mixed_chunk_weights": LaunchEntry("probs_kernel", _mixed_chunk_both, widths=(64, 256), matrix=_LARGE, **_MIXED),
    "mixed_chunk_fused": LaunchEntry(
        "scan_kernel", partial(_mixed_chunk, False, 64), widths=(64, 128, 256), matrix=_LARGE, **_MIXED
    ),
    "mixed_chunk_product": LaunchEntry(
        "scan_kernel", _mixed_chunk_both, widths=(64, 128, 256), matrix=_LARGE, **_MIXED
    ),
    "mixed_chunk_gradient": LaunchEntry(
        "gradient_kernel", _mixed_chunk_both, widths=(64, 128, 256), matrix=_LARGE, **_MIXED
    ),
    "mixed_chunk_heads": LaunchEntry("heads_kernel", _mixed_chunk_both, widths=(64, 128, 256), matrix=_ANY, **_MIXED),
    "mixed_chunk_step": LaunchEntry("step_kernel", _mixed_chunk_step, _STEP, (64, 128, 256)),
    "mixed_chunk_step_close": LaunchEntry("close_kernel", _mixed_chunk_step, _STEP, (64, 128, 256), matrix=_ANY),
    "tangent": LaunchEntry("tangent_kernel", partial(_derivatives, False), **_DERIVATIVES),
    "second_statistics": LaunchEntry("statistics_kernel", partial(_derivatives, False), **_SOFTMAX_DERIVATIVES),
    "second_dq": LaunchEntry("second_dq_kernel", partial(_derivatives, False), **_DERIVATIVES),
    "second_dk": LaunchEntry("second_dk_kernel", partial(_derivatives, False), **_DERIVATIVES),
    "second_dv": LaunchEntry("second_dv_kernel", partial(_derivatives, False), **_DERIVATIVES),
    "second_dbias": LaunchEntry("second_dbias_kernel", partial(_derivatives, True), **_SOFTMAX_DERIVATIVES),
}  # fmt: skip

# The calls of launchers behind them, by operation: (backward, ..., kind, width, operands).
CALLS: dict[str, Callable[..., None]] = {
    "attention": _attention,
    "glu": _glu,
    "glu_linear": _glu_linear,
    "gau_attention": _gau,
    "mixed_chunk_attention": _mixed_chunk,
}

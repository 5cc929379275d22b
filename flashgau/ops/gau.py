"""`flashgau.gau_attention`: quadratic gated attention with one narrow head and wide values (GAU)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashgau.contract import operands
from flashgau.contract.validate import Arguments, autocast, widened
from flashgau.options import GatedOptions, GatedTangents, Layout

from . import autograd, dispatch, plain
from .folding import Rows
from .operation import Operation


def gau_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    gate_activation: str = "identity",
    score: str = "relu2",
    normalizer: str | float = "keys",
    causal: bool = False,
    rel_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Quadratic gated attention: O = act(gate) * (A v) with a single narrow head, memory linear in length.

    A is the score of x = q k^T / n + rel_bias, masked afterwards (a hidden pair weighs 0):
    relu2: max(x, 0)^2; laplace: (1 + erf((x - mu) / (sigma sqrt 2))) / 2 with mu = sqrt(1/2), sigma =
    sqrt(1/(4 pi)); softmax: softmax over visible keys of q k^T / sqrt S + rel_bias; softmax_plus: the same with
    q k^T scaled by log_512(l) / sqrt S, l = max(16, number of visible keys). Query i of M stands at position
    i + N - M among the N keys (bottom-right alignment), so a few new queries can look at cached keys.

    Sources: Hua et al. 2022, "Transformer Quality in Linear Time" (arXiv 2202.10447), equations 3 and 4 (relu2);
    Ma et al. 2022, MEGA (arXiv 2209.10655), equation 11 (laplace); Su Jianlin's notes on GAU (softmax_plus).

    Args:
        q: queries (B, M, S), fp16, bf16, fp32 or fp64.
        k: keys (B, N, S).
        v: values (B, N, E), usually wide: E of hundreds or thousands.
        gate: (B, M, E) or None for no gate.
        gate_activation: act, an activation of `glu`: "identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh" or
            "silu". In a GAU u = silu(x W_u) is the gate: x W_u with "silu" here is the same, and u is never stored.
        score: "relu2", "laplace", "softmax" or "softmax_plus".
        normalizer: n for relu2 and laplace. "keys": the number of valid keys of the sequence, as in the paper's
            code (a causal prefix then depends on the whole length). "row": the number of keys visible to the query
            (a causal prefix does not). A number: itself, the choice for lengths that vary. Softmax scores have none.
        causal: hide keys after the query's position.
        rel_bias: relative bias (..., 2P-1) broadcastable to (B, 2P-1); key j adds rel_bias[P-1 + (j - p)] for the
            query at position p. P must cover the longest sequence. fp32 is welcome beside half inputs.
        lengths: (B,) integers, valid keys of each right-padded row, and valid queries too if M == N. Padding may
            hold anything; its output rows and gradients are 0.
        cu_seqlens: (G+1,) int32, G sequences packed end to end in one row (B = 1, M = N).
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        (B, M, E) in the dtype of q.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before any work.
        RuntimeError: for a backend that was asked for and cannot run the call.

    Example:
        >>> import torch, flashgau
        >>> q, k = torch.randn(2, 50, 16), torch.randn(2, 50, 16)
        >>> v, gate = torch.randn(2, 50, 96), torch.randn(2, 50, 96)
        >>> flashgau.gau_attention(q, k, v, gate, causal=True, normalizer="row").shape
        torch.Size([2, 50, 96])
    """
    q, k, v, gate = autocast(q, k, v, gate)
    args = Arguments("gau_attention")
    operands.gau_attention(args, q, k, v, gate)
    operands.gau_options(args, score, normalizer)
    operands.gate_activation(args, gate_activation)
    args.flag("causal", causal)
    longest, lengths = args.sequences(lengths, cu_seqlens), widened(lengths)
    args.relative_bias(rel_bias, "B", longest)

    name = dispatch.resolve("gau_attention", backend, q.device, q.dtype, q.shape[-1])
    if name == "reference":
        return autograd.run(
            "gau_attention", name, "gau_attention", q, k, v, gate, gate_activation=gate_activation, score=score,
            normalizer=normalizer, causal=causal, rel_bias=rel_bias, lengths=lengths, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    bias = autograd.bias_rows(rel_bias, q.shape[0])
    save = autograd.needs_grad(q, k, v, gate, rel_bias)
    layout = Layout(lengths, cu_seqlens)
    options = GatedOptions(score, normalizer, causal, bias, gate_activation)
    return _gau_attention(q, k, v, gate, options=options, layout=layout, save=save, backend=name)[0]


def _results(q: Tensor, v: Tensor, gate: Tensor | None, save: bool, **_: Any) -> list[Tensor | None]:
    shape = (*q.shape[:2], v.shape[-1])
    return [q.new_empty(shape), q.new_empty(shape) if save and gate is not None else None]


def attend_ungated(
    q: Tensor, k: Tensor, v: Tensor, options: GatedOptions, backend: str, layout: Layout = Layout()
) -> Tensor:
    """A v (B, M, E), of options as floors take them. For operations that are written in it."""
    product: Tensor = _gau_attention(q, k, v, None, layout=layout, options=options, backend=backend)[0]
    return product


def _by_others(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layout: Layout, options: GatedOptions, backend: str
) -> list[Tensor]:
    product = attend_ungated(q, k, v, options, backend, layout)
    layout = plain.of_queries(layout, q.shape[1], k.shape[1])
    return [plain.gated(product, gate, options.gate_activation, layout)]


_gau_attention = Operation(
    "gau_attention",
    inputs="q k v gate? rel_bias?",
    data="lengths? cu_seqlens?",
    results="out",
    saved="product",
    tuples={"tangents": GatedTangents, "layout": Layout, "options": GatedOptions},
    shapes=_results,
    op="gau_attention",
    rows=Rows(single="cu_seqlens"),
    others=_by_others,
)

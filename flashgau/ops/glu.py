"""`flashgau.glu` and `flashgau.glu_linear`: gated linear units (Shazeer 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgau.contract import operands
from flashgau.contract.validate import Arguments, autocast
from flashgau.eager.sizes import SIZES
from flashgau.options import GluOptions, GluWeights

from . import autograd, dispatch, plain
from .folding import Rows
from .operation import Operation


def glu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: str = "silu",
    up_activation: str = "identity",
    backend: str | None = None,
) -> Tensor:
    """Gated linear unit: act(gate) * up_act(up), elementwise.

    Every elementary step is fp32 inside (fp64 for fp64); a backend may round to the dtype after each, as PyTorch
    does, or only once. The backward recomputes the activations from the inputs and overwrites nothing. (On a CPU the
    forward keeps act(gate) of tensors up to 32 MiB, where recomputing it would take longer than reading it.)

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202), table 1: glu is sigmoid, bilinear
    identity, reglu relu, geglu gelu, swiglu silu, always with the identity on the up side. Hua et al. 2022 (arXiv
    2202.10447) use silu on both.

    Args:
        gate: any shape, fp16, bf16, fp32 or fp64. Without `up` its last axis holds [gate | up], read in place.
        up: the same shape and dtype as `gate`, or None.
        activation: of the gate side: identity, sigmoid, relu, relu2 (squared relu), gelu (exact erf), gelu_tanh
            or silu.
        up_activation: of the up side, the same choices.
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        The shape of `gate`; half its last axis without `up`.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before any work.
        RuntimeError: for a backend that was asked for and cannot run the call.

    Example:
        >>> import torch, flashgau
        >>> flashgau.glu(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 3.0]), activation="relu")
        tensor([3., 0.])
    """
    args = Arguments("glu")
    operands.glu(args, gate, up)
    operands.activations(args, activation, up_activation)
    name = dispatch.resolve("glu", backend, gate.device, gate.dtype)
    if name == "reference":
        return autograd.run("glu", name, "glu", gate, up, activation=activation, up_activation=up_activation)
    save = _keeps(gate, up, activation, up_activation, name)
    return _glu(gate, up, options=GluOptions(activation, up_activation), save=save, backend=name)[0]


def glu_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "silu",
    up_activation: str = "identity",
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A gated linear unit with its two projections: glu(x Wg^T + bg, x Wu^T + bu).

    Training keeps both pre-activations for the backward, or with `recompute` computes them again there: two tensors
    of the result's size less between forward and backward, for a third more arithmetic. Inference keeps nothing.

    Source: Shazeer 2020 (arXiv 2002.05202), equations 4 to 6.

    Args:
        x: (..., d), fp16, bf16, fp32 or fp64.
        w_gate: (F, d), as in torch.nn.Linear.
        w_up: (F, d).
        b_gate: (F,) or None.
        b_up: (F,) or None.
        activation: of the gate side; see `glu`.
        up_activation: of the up side.
        recompute: keep no pre-activations for the backward.
        backend: "triton", "eager", "reference" or None for the best that can run.

    Returns:
        (..., F) in the dtype of x.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or value, by name, before any work.
        RuntimeError: for a backend that was asked for and cannot run the call.

    Example:
        >>> import torch, flashgau
        >>> x, wg, wu = torch.randn(5, 8), torch.randn(16, 8), torch.randn(16, 8)
        >>> flashgau.glu_linear(x, wg, wu, activation="gelu").shape
        torch.Size([5, 16])
    """
    x, w_gate, w_up, b_gate, b_up = autocast(x, w_gate, w_up, b_gate, b_up)
    args = Arguments("glu_linear")
    operands.glu_linear(args, x, w_gate, w_up, b_gate, b_up)
    operands.activations(args, activation, up_activation)
    args.flag("recompute", recompute)
    name = dispatch.resolve("glu_linear", backend, x.device, x.dtype)
    if name == "reference":
        return autograd.run(
            "glu_linear", name, "glu_linear", x, w_gate, w_up, b_gate, b_up,
            activation=activation, up_activation=up_activation,
        )  # fmt: skip
    save = not recompute and autograd.needs_grad(x, w_gate, w_up, b_gate, b_up)
    options = GluOptions(activation, up_activation)
    weights = GluWeights(w_gate, w_up, b_gate, b_up)
    return _glu_linear(x, weights=weights, options=options, save=save, backend=name)[0]


def _keeps(gate: Tensor, up: Tensor | None, activation: str, up_activation: str, backend: str) -> bool:
    """Whether the forward keeps act(gate) for the backward: on a CPU, of a small tensor."""
    return (
        backend == "eager"
        and autograd.needs_grad(gate, up)
        and gate.device.type == "cpu"
        and gate.dtype != torch.float16  # which is computed in fp32
        and activation != "identity"
        and up_activation == "identity"
        and gate.numel() * gate.itemsize // (2 if up is None else 1)
        <= SIZES.glu_kept_bytes  # `nbytes` cannot be traced
    )


def _results(gate: Tensor, up: Tensor | None, save: bool, **_: Any) -> list[Tensor | None]:
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    return [gate.new_empty(shape), gate.new_empty(shape) if save else None]


def _linear_results(x: Tensor, w_gate: Tensor, save: bool, **_: Any) -> list[Tensor | None]:
    shape = (*x.shape[:-1], w_gate.shape[0])
    return [x.new_empty(shape), *(x.new_empty(shape) if save else None for _ in range(2))]


def _linear_by_others(x: Tensor, weights: GluWeights, options: GluOptions, backend: str) -> list[Tensor]:
    def of_rows(x: Tensor) -> Tensor:
        g, u = F.linear(x, weights.w_gate, weights.b_gate), F.linear(x, weights.w_up, weights.b_up)
        return plain.glu(g, u, *options)

    return [plain.by_rows(of_rows, x, weights.w_gate.shape[0])]


_glu = Operation(
    "glu",
    inputs="gate up?",
    results="out",
    saved="activated",
    tuples={"options": GluOptions},
    shapes=_results,
    op="glu",
    rows=Rows(any_axes=True),
    others=lambda gate, up, options, backend: [plain.glu(gate, up, *options)],
)
_glu_linear = Operation(
    "glu_linear",
    inputs="x w_gate w_up b_gate? b_up?",
    results="out",
    saved="g u",
    tuples={"weights": GluWeights, "options": GluOptions},
    shapes=_linear_results,
    op="glu_linear",
    rows=Rows(shared="w_gate w_up b_gate b_up", any_axes=True),
    others=_linear_by_others,
)

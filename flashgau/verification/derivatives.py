"""Holding the kernels of tangents and second derivatives to the reference that PyTorch differentiates twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashgau import reference
from flashgau.kernels import tangents as launchers
from flashgau.kernels.attention import attention_forward
from flashgau.ops.compare import Report, Row, held_beside_moves, nudged
from flashgau.options import AttentionOptions, AttentionTangents, Layout

_formula: Any = reference.attention.__wrapped__  # in the dtype of its arguments


def differentiated(
    formula: Callable[..., Any],
    operands: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor]:
    """Tangents of a formula's results, and gradients of their weighted sum, by PyTorch in one dtype.

    Args:
        formula: of the operands by name; its result is O, or O and an LSE.
        operands: what it is differentiated by.
        tangents: of operands, by their names; one that is not there is zero.
        weights: of the tangents of the results.
        dtype: in which all is computed.
        change: of operands and tangents, in that dtype.

    Returns:
        "tout", "tlse" if there is an LSE, and "d" with the name of each operand. An LSE of -inf has no derivatives.
    """

    def whole(x: Tensor) -> Tensor:
        return change(x.detach().to(dtype)).clone(memory_format=torch.contiguous_format)

    leaves = {name: whole(x).requires_grad_() for name, x in operands.items()}
    moving = {name: whole(tangents[name]) if name in tangents else torch.zeros_like(x) for name, x in leaves.items()}

    def results(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = formula(**dict(zip(leaves, inputs, strict=True)))
        return found if isinstance(found, tuple) else (found,)

    values, moved, *_ = torch.func.jvp(results, tuple(leaves.values()), tuple(moving.values()))
    moved = [torch.where(torch.isfinite(x), t, 0) for x, t in zip(values, moved, strict=True)]
    total = sum((x * w.to(x.dtype)).sum() for x, w in zip(moved, weights, strict=True))
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if isinstance(total, Tensor) and total.requires_grad:  # it does not in an empty batch
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = dict(zip(("tout", "tlse"), (x.detach() for x in moved), strict=False))
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(x) if grad is None else grad
    return found


def held_derivatives(
    ours: dict[str, Tensor], naive: Callable[..., dict[str, Tensor]], exact: dict[str, Tensor], dtype: torch.dtype
) -> list[Row]:
    """What kernels give for `differentiated`, held to the reference's by the rule of `flashgau.compare`.

    Args:
        ours: by name.
        naive: what the reference gives in a dtype, called with it and, in fp64, with a change of the arguments.
        exact: what it gives in fp64.
        dtype: of the arguments.
    """

    def other(place: int) -> dict[str, Tensor]:
        return naive(torch.float64, nudged(place, dtype)) if place else naive(dtype)

    return held_beside_moves(ours, exact, other, dtype)


def hold_derivatives(*tensors: Tensor) -> Report:
    """Hold the kernels to the reference in fp64, beside plain PyTorch in the dtype of the tensors, for causal attention
    with a bias: q, k, v and rel_bias (B, Hq, 2P-1), their tangents, and weights of the tangents of O and of its LSE."""
    names = ("q", "k", "v", "rel_bias")
    operands, tangents = (dict(zip(names, part, strict=True)) for part in (tensors[:4], tensors[4:8]))
    (q, k, v, rel_bias), weights = tensors[:4], tensors[8:]
    options = AttentionOptions(causal=True, rel_bias=rel_bias)
    results = attention_forward(q, k, v, Layout(), options)
    moving = AttentionTangents(*tensors[4:8])
    moved = launchers.attention_jvp(q, k, v, results, moving, Layout(), options)
    grads = launchers.attention_second(*weights, q, k, v, results, moving, moved, Layout(), options)
    ours = moved._asdict() | {f"d{name}": x for name, x in zip(names, grads[:4], strict=True)}
    naive = partial(differentiated, partial(_formula, causal=True, return_lse=True), operands, tangents, weights)
    rows = held_derivatives(ours, naive, naive(torch.float64), q.dtype)
    return Report("derivatives", "triton", q.dtype, rows)

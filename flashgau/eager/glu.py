"""Gated linear units (Shazeer 2020), computed in cache-sized pieces and in fp32 whatever the dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulator, factor_dtype

_PIECE = 2**17  # elements worked on at a time on a CPU: half a megabyte in fp32, so intermediates stay in cache
_PANEL = 512  # rows of x multiplied at a time in glu_linear

Derivative = Callable[[Tensor, Tensor], Tensor]

# Each activation as (function, derivative); the derivative takes the incoming gradient and the activation's input.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Derivative]] = {
    "identity": (lambda x: x, lambda d, x: d),
    "sigmoid": (torch.sigmoid, lambda d, x: torch.ops.aten.sigmoid_backward(d, torch.sigmoid(x))),
    "relu": (F.relu, lambda d, x: torch.ops.aten.threshold_backward(d, x, 0)),
    "relu2": (lambda x: F.relu(x).square_(), lambda d, x: F.relu(x).mul_(d).mul_(2)),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda d, x: torch.ops.aten.gelu_backward(d, x, approximate="tanh"),
    ),
    "silu": (F.silu, torch.ops.aten.silu_backward),
}


def glu_forward(gate: Tensor, up: Tensor | None, *, activation: str, up_activation: str) -> Tensor:
    """act(gate) * up_act(up); without `up` the last axis of `gate` holds [gate | up]."""
    gate, up = _halves(gate, up)
    out = gate.new_empty(gate.shape)
    for g, u, o in _pieces(gate, up, out):
        _gated(g, u, activation, up_activation, o)
    return out


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor | None, *, activation: str, up_activation: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `gate` and `up`; of the packed tensor and None when they came packed."""
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(up, memory_format=torch.contiguous_format) if up is not None else None
    for d, g, u, dg, du in _pieces(dout, *_halves(gate, up), *_halves(dgate, dup)):
        _gated_backward(d, g, u, activation, up_activation, dg, du)
    return dgate, dup


def glu_linear_forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    *,
    activation: str,
    up_activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """glu(x Wg^T + bg, x Wu^T + bu), and both pre-activations when the backward will want them (`save`)."""
    rows = _rows(x)
    out = x.new_empty(rows.shape[0], w_gate.shape[0])
    g_all = torch.empty_like(out) if save else None
    u_all = torch.empty_like(out) if save else None
    factor = factor_dtype(x)
    wg, wu = w_gate.to(factor).T, w_up.to(factor).T
    for r in _panels(rows.shape[0], x.device):
        panel = rows[r].to(factor)
        g, u = _affine(panel, wg, b_gate), _affine(panel, wu, b_up)
        if g_all is not None and u_all is not None:
            g_all[r], u_all[r] = g, u
        _gated(g, u, activation, up_activation, out[r])
    shape = (*x.shape[:-1], w_gate.shape[0])
    return (
        out.view(shape),
        g_all.view(shape) if g_all is not None else None,
        u_all.view(shape) if u_all is not None else None,
    )


def glu_linear_backward(
    dout: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    activation: str,
    up_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_gate, w_up, b_gate and b_up from the saved pre-activations g and u."""
    factor, acc = factor_dtype(x), accumulator(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dwg, dwu = (torch.zeros_like(w, dtype=acc, memory_format=torch.contiguous_format) for w in (w_gate, w_up))
    dbg, dbu = (x.new_zeros(w_gate.shape[0], dtype=acc) for _ in range(2))
    wg, wu = w_gate.to(factor), w_up.to(factor)
    flat = [_rows(t) for t in (dout, x, g, u)]
    dx_rows = _rows(dx)
    for r in _panels(flat[0].shape[0], x.device):
        d_r, x_r, g_r, u_r = (t[r] for t in flat)
        dg, du = torch.empty_like(g_r, dtype=acc), torch.empty_like(u_r, dtype=acc)
        _gated_backward(d_r, g_r, u_r, activation, up_activation, dg, du)
        dbg += dg.sum(0)
        dbu += du.sum(0)
        dg, du, x_r = dg.to(factor), du.to(factor), x_r.to(factor)
        dwg += dg.T @ x_r
        dwu += du.T @ x_r
        dx_rows[r] = torch.addmm(dg @ wg, du, wu)
    dt = w_gate.dtype
    return dx, dwg.to(dt), dwu.to(dt), dbg.to(dt), dbu.to(dt)


def _gated(g: Tensor, u: Tensor, activation: str, up_activation: str, out: Tensor) -> None:
    acc = accumulator(out.dtype)
    torch.mul(_apply(activation, g.to(acc)), _apply(up_activation, u.to(acc)), out=out)


def _gated_backward(
    d: Tensor, g: Tensor, u: Tensor, activation: str, up_activation: str, dg: Tensor, du: Tensor
) -> None:
    acc = accumulator(d.dtype)
    d, g, u = d.to(acc), g.to(acc), u.to(acc)
    dg.copy_(ACTIVATIONS[activation][1](d * _apply(up_activation, u), g))
    du.copy_(ACTIVATIONS[up_activation][1](d * _apply(activation, g), u))


def _apply(activation: str, x: Tensor) -> Tensor:
    return ACTIVATIONS[activation][0](x)


def _affine(x: Tensor, w_t: Tensor, bias: Tensor | None) -> Tensor:
    return x @ w_t if bias is None else torch.addmm(bias.to(x.dtype), x, w_t)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    half = gate.shape[-1] // 2
    return gate[..., :half], gate[..., half:]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 for the first would be ambiguous at width 0


def _panels(rows: int, device: torch.device) -> Iterator[slice]:
    step = _PANEL if device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into matching pieces of whole rows; on a GPU one piece is all."""
    first = tensors[0]
    if first.numel() == 0:
        return
    if first.device.type != "cpu" or first.numel() <= 2 * _PIECE:
        yield tensors
        return
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        yield from zip(*(t.split(_PIECE) for t in flat), strict=True)
        return
    # Rows of the last axis; a view where strides allow it, which those of packed halves do.
    width = first.shape[-1]
    views = [_as_rows(t, width) for t in tensors]
    if all(v is not None for v in views):
        yield from zip(*(v.split(max(1, _PIECE // width)) for v in views if v is not None), strict=True)
    else:
        for parts in zip(*(t.unbind(0) for t in tensors), strict=True):
            yield from _pieces(*parts)


def _as_rows(t: Tensor, width: int) -> Tensor | None:
    try:
        return t.view(-1, width)
    except RuntimeError:
        return None

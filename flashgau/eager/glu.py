"""Gated linear units (Shazeer 2020): at once where each step can write over the last, else in cache-sized pieces.

Every elementary step is fp32 inside. In bf16 its result is rounded, as PyTorch's own elementwise operations do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Optional

import torch
from torch import Tensor

from .. import pytorch
from ..options import GluOptions, GluWeights, takes_fields
from .common import Workspace, accumulator, add_product, factor_dtype, panels
from .sizes import SIZES

Forward = Callable[[Tensor, Optional[Tensor]], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor], Tensor]
_aten = torch.ops.aten


def _sigmoid_backward(d: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return _aten.sigmoid_backward.grad_input(d, torch.sigmoid(x), grad_input=out)


def _gelu(approximate: str) -> tuple[Forward, Backward]:
    def forward(x: Tensor, out: Tensor | None) -> Tensor:
        if out is not None and x.is_contiguous() and not out.is_contiguous():
            return out.copy_(pytorch.gelu(x, approximate=approximate))  # PyTorch would not write it (2.13, oneDNN)
        return pytorch.gelu(x, approximate=approximate, out=out)

    return (
        forward,
        lambda d, x, out: _aten.gelu_backward.grad_input(d, x, approximate=approximate, grad_input=out),
    )


# Each activation as (function of x, derivative at x times the gradient d). Both may write into `out` (which may be d)
# and return the result, wherever it is; the function makes a tensor for it if `out` is None.
ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    "identity": (lambda x, out: x, lambda d, x, out: d),
    "sigmoid": (lambda x, out: torch.sigmoid(x, out=out), _sigmoid_backward),
    "relu": (
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda d, x, out: _aten.threshold_backward.grad_input(d, x, 0, grad_input=out),
    ),
    "relu2": (
        lambda x, out: torch.clamp_min(x, 0, out=out).square_(),
        lambda d, x, out: _aten.threshold_backward.grad_input(torch.mul(d, x, out=out), x, 0, grad_input=out).mul_(2),
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "silu": (
        lambda x, out: pytorch.silu(x, out=out),
        lambda d, x, out: _aten.silu_backward.grad_input(d, x, grad_input=out),
    ),
}


def activated(gate: Tensor, activation: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """act(gate), computed in that type, and into `out`; under the identity the gate itself."""
    return gate if activation == "identity" else ACTIVATIONS[activation][0](gate.to(dtype), out)


def gate_gradient(d: Tensor, gate: Tensor, activation: str) -> Tensor:
    """The gradient of a gate from that of act(gate), which it is written over."""
    return ACTIVATIONS[activation][1](d, gate.to(d.dtype), d)


@takes_fields
def glu_forward(
    gate: Tensor, up: Tensor | None = None, options: GluOptions = GluOptions(), save: bool = False
) -> tuple[Tensor, Tensor | None]:
    """act(gate) * up_act(up), and act(gate) if asked to `save` it, which is for the identity on the up side.

    Without `up` the last axis of `gate` holds [gate | up].
    """
    activation, up_activation = options
    contiguous = gate.is_contiguous() and (up is None or up.is_contiguous())
    gate, up = _halves(gate, up)
    buffer = None if contiguous else gate.new_empty(gate.shape)
    if _at_once(gate, activation, up_activation):
        if up_activation != "identity":
            gate, up, activation = up, gate, up_activation  # the sides are alike
        activated = ACTIVATIONS[activation][0](gate, buffer)
        if save:
            return torch.mul(activated, up), activated
        return torch.mul(activated, up, out=buffer if activated is gate else activated), None
    out = gate.new_empty(gate.shape) if buffer is None else buffer
    workspace = Workspace()
    for g, u, o in pieces(gate, up, out):
        gated(g, u, activation, up_activation, o, workspace)
    return out, None


@takes_fields
def glu_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor | None = None,
    activated: Tensor | None = None,
    options: GluOptions = GluOptions(),
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `gate` and `up`; of the packed tensor and None when they came packed."""
    activation, up_activation = options
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(up, memory_format=torch.contiguous_format) if up is not None else None
    gate, up = _halves(gate, up)
    dg, du = _halves(dgate, dup)
    sigmoid = "sigmoid" in (activation, up_activation)  # whose derivative takes memory
    if _at_once(gate, activation, up_activation) and not (sigmoid and activated is None):
        if up_activation != "identity":
            gate, up, dg, du, activation = up, gate, du, dg, up_activation
        value, derivative = ACTIVATIONS[activation]
        torch.mul(dout, value(gate, du) if activated is None else activated, out=du)
        derivative(torch.mul(dout, up, out=dg), gate, dg)
        return dgate, dup
    workspace = Workspace()
    for d, g, u, dg_piece, du_piece in pieces(dout, gate, up, dg, du):
        gated_backward(d, g, u, activation, up_activation, dg_piece, du_piece, workspace)
    return dgate, dup


@takes_fields
def glu_linear_forward(
    x: Tensor, weights: GluWeights, options: GluOptions = GluOptions(), save: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """glu(x Wg^T + bg, x Wu^T + bu), and both pre-activations when the backward will want them (`save`)."""
    w_gate, w_up, b_gate, b_up = weights
    rows = _rows(x)
    out = x.new_empty(*x.shape[:-1], w_gate.shape[0])
    g, u = (torch.empty_like(out), torch.empty_like(out)) if save else (None, None)
    out_rows = _rows(out)
    factor = factor_dtype(x)
    wg, wu = w_gate.to(factor).T, w_up.to(factor).T
    workspace = Workspace()
    for r in panels(rows):
        panel = rows[r].to(factor)
        g_r, u_r = _affine(panel, wg, b_gate), _affine(panel, wu, b_up)
        if g is not None and u is not None:
            _rows(g)[r], _rows(u)[r] = g_r, u_r
        gated(g_r, u_r, *options, out_rows[r], workspace)
    return out, g, u


@takes_fields
def glu_linear_backward(
    dout: Tensor,
    x: Tensor,
    weights: GluWeights,
    g: Tensor | None = None,
    u: Tensor | None = None,
    options: GluOptions = GluOptions(),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_gate, w_up, b_gate and b_up, from g and u or, with None, by making those again."""
    w_gate, w_up, b_gate, b_up = weights
    factor, acc = factor_dtype(x), accumulator(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dwg, dwu = (torch.zeros_like(w, dtype=acc, memory_format=torch.contiguous_format) for w in (w_gate, w_up))
    dbg, dbu = (x.new_zeros(w_gate.shape[0], dtype=acc) for _ in range(2))
    wg, wu = w_gate.to(factor), w_up.to(factor)
    d, rows, dx_rows = _rows(dout), _rows(x), _rows(dx)
    saved = (_rows(g), _rows(u)) if g is not None and u is not None else None
    workspace = Workspace()
    for r in panels(d):
        x_r = rows[r].to(factor)
        if saved is None:
            g_r, u_r = _affine(x_r, wg.T, b_gate), _affine(x_r, wu.T, b_up)
        else:
            g_r, u_r = saved[0][r], saved[1][r]
        d_r, g_r, u_r = (t.to(factor) for t in (d[r], g_r, u_r))
        dg, du = workspace.like("dg", g_r), workspace.like("du", u_r)
        gated_backward(d_r, g_r, u_r, *options, dg, du, workspace)
        dbg += dg.sum(0)
        dbu += du.sum(0)
        add_product(dwg, dg.T, x_r, workspace)
        add_product(dwu, du.T, x_r, workspace)
        dx_r = dx_rows[r] if dx.dtype == factor else workspace.like("dx", x_r)
        torch.mm(dg, wg, out=dx_r).addmm_(du, wu)
        if dx.dtype != factor:
            dx_rows[r] = dx_r
    dt = w_gate.dtype
    return dx, dwg.to(dt), dwu.to(dt), dbg.to(dt), dbu.to(dt)


def _at_once(gate: Tensor, activation: str, up_activation: str) -> bool:
    """Whether no step needs memory besides the results': nothing is widened, and at most one side has an activation."""
    return gate.dtype != torch.float16 and "identity" in (activation, up_activation)


def gated(
    g: Tensor,
    u: Tensor,
    activation: str,
    up_activation: str,
    out: Tensor,
    workspace: Workspace,
    value: Tensor | None = None,
) -> None:
    """Write act(g) * up_act(u) to `out`, which may be u, and act(g) to `value`, if it is given and no fp16."""
    apart = out.data_ptr() != u.data_ptr()
    g, u = _in_range(g, "g", workspace), _in_range(u, "u", workspace)
    if value is None:
        value = out if apart and out.dtype == g.dtype else workspace.like("act(g)", g)
    a = ACTIVATIONS[activation][0](g, value)
    if up_activation != "identity":
        u = ACTIVATIONS[up_activation][0](u, workspace.like("act(u)", u))
    torch.mul(a, u, out=out)


def gated_backward(
    d: Tensor, g: Tensor, u: Tensor, activation: str, up_activation: str, dg: Tensor, du: Tensor, workspace: Workspace
) -> None:
    """Write the gradients of g and u, from that of act(g) * up_act(u), to `dg` and `du`."""
    d, g, u = _in_range(d, "d", workspace), _in_range(g, "g", workspace), _in_range(u, "u", workspace)
    if (activation, up_activation) == ("sigmoid", "identity"):  # whose derivative is one of its value
        value = torch.sigmoid(g, out=workspace.like("value", g))
        target = dg if dg.dtype == d.dtype else workspace.like("grad", d)
        sigmoid_gated_backward(d, value, u, target, du)
        if target is not dg:
            dg.copy_(target)
        return
    sides = (g, activation, dg, u, up_activation), (u, up_activation, du, g, activation)
    for x, act, grad, other, other_act in sides:
        # Each step writes over the one before, in the gradient's own memory where the types agree.
        target = grad if grad.dtype == d.dtype else workspace.like("grad", d)
        value = ACTIVATIONS[other_act][0](other, target)
        incoming = torch.mul(d, value, out=target)
        result = ACTIVATIONS[act][1](incoming, x, target)
        if result is not grad:
            grad.copy_(result)


def sigmoid_gated_backward(d: Tensor, value: Tensor, u: Tensor, dg: Tensor, du: Tensor) -> None:
    """Write the gradients of g and u, from that of value * u, value being sigmoid(g), to `dg` and `du`."""
    torch.mul(d, value, out=du)
    _aten.sigmoid_backward.grad_input(torch.mul(d, u, out=dg), value, grad_input=dg)


def _in_range(x: Tensor, name: str, workspace: Workspace) -> Tensor:
    """fp16 as fp32: a square or a product of two values leaves its range. bf16 has the range of fp32."""
    return workspace.held(name, x, torch.float32) if x.dtype == torch.float16 else x


def _affine(x: Tensor, w_t: Tensor, bias: Tensor | None) -> Tensor:
    return x @ w_t if bias is None else torch.addmm(bias.to(x.dtype), x, w_t)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    half = gate.shape[-1] // 2
    return gate[..., :half], gate[..., half:]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 for the first would be ambiguous at width 0


def pieces(*tensors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into matching pieces of whole rows, of `size` bytes each (`SIZES.glu_bytes`); on a GPU
    one piece is all."""
    first, size = tensors[0], SIZES.glu_bytes if size is None else size
    if first.numel() == 0:
        return
    if first.device.type != "cpu" or first.nbytes <= 4 * size:
        yield tensors
        return
    step = size // first.itemsize
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        yield from zip(*(t.split(step) for t in flat), strict=True)
        return
    # Rows of the last axis; a view where strides allow it, which those of packed halves do.
    width = first.shape[-1]
    views = [_as_rows(t, width) for t in tensors]
    if all(v is not None for v in views):
        yield from zip(*(v.split(max(1, step // width)) for v in views if v is not None), strict=True)
    elif first[0].nbytes <= size:
        yield from zip(*(t.split(size // first[0].nbytes) for t in tensors), strict=True)
    else:
        for parts in zip(*(t.unbind(0) for t in tensors), strict=True):
            yield from pieces(*parts, size=size)


def _as_rows(t: Tensor, width: int) -> Tensor | None:
    try:
        return t.view(-1, width)
    except RuntimeError:
        return None

"""The linear part of mixed chunk attention as two steps: the sums of lin_k^T v, and what they add to each token.

Between the two the sums may be those of other tokens too, which is how `flashgau.distributed` spreads a sequence over
processes; not public. Both work on a block of tokens at a time: nothing as long as v is kept in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashgau.eager.common import accumulator
from flashgau.eager.glu import activated, gate_gradient

from .autograd import once

_OP = "context_parallel_mixed_chunk"  # whose second derivatives are refused
_BLOCK_ELEMENTS = 2**22  # of values that are worked on together, in the type of sums


def linear_sums(lin_k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """lin_k^T v (B, S, E) over the first `valid` (B,) tokens of each row, in fp32 (fp64 for fp64)."""
    kv: Tensor = _Sums.apply(lin_k, v, valid)
    return kv


def add_linear_part(
    local: Tensor,
    lin_q: Tensor,
    kv: Tensor,
    gate: Tensor | None,
    factor: Tensor,
    valid: Tensor | None,
    activation: str,
) -> Tensor:
    """act(gate) * (local + factor lin_q KV), in the type of `local` (B, n, E).

    `factor` is broadcastable to it, in KV's type.
    """
    out: Tensor = _Joined.apply(local, lin_q, kv, gate, factor, valid, activation)
    return out


def linear_factor(lin_normalizer: str | float, tokens: int, lengths: Tensor | None, kv: Tensor) -> Tensor:
    """What multiplies lin_q KV where each row's sums are those of all its `tokens`, or `lengths`; in the type of KV."""
    if lin_normalizer != "tokens":
        return kv.new_tensor(1 / float(lin_normalizer))
    divisor = (tokens if lengths is None else lengths.to(kv.dtype).view(-1, 1, 1)) + kv.new_zeros(())
    return divisor.clamp_min(1).reciprocal()


class _Sums(torch.autograd.Function):
    """dlin_k = v dKV^T; dv = lin_k dKV."""

    @staticmethod
    def forward(ctx: Any, lin_k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(lin_k, v, valid)
        kv = v.new_zeros(v.shape[0], lin_k.shape[-1], v.shape[-1], dtype=accumulator(v.dtype))
        with _products(v):
            for block in _blocks(v):
                kv.baddbmm_(_rows(lin_k, block, valid).mT, _rows(v, block, valid))
        return kv

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> tuple[Tensor | None, ...]:
        lin_k, v, valid = ctx.saved_tensors

        def compute(dkv: Tensor, lin_k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            dlin_k, dv = torch.empty_like(lin_k), torch.empty_like(v)
            with _products(v):
                for block in _blocks(v):
                    # Rows that are not valid are zeros on both sides, and so are their gradients.
                    dlin_k[:, block] = _rows(v, block, valid) @ dkv.mT
                    dv[:, block] = _rows(lin_k, block, valid) @ dkv
            return dlin_k, dv

        return *once(_OP, compute, dkv, lin_k, v), None


class _Joined(torch.autograd.Function):
    """With dX = act(gate) * dO: dlocal = dX; dgate = dO * (local + factor lin_q KV) * act'(gate);
    dlin_q = factor dX KV^T; dKV = lin_q^T dX factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        lin_q: Tensor,
        kv: Tensor,
        gate: Tensor | None,
        factor: Tensor,
        valid: Tensor | None,
        activation: str,
    ) -> Tensor:
        ctx.save_for_backward(local, lin_q, kv, gate, factor, valid)
        ctx.activation = activation
        out = torch.empty_like(local)
        with _products(local):
            for block in _blocks(local):
                x = _rows(local, block, valid) + (_rows(lin_q, block, valid) @ kv) * factor
                out[:, block] = x if gate is None else x * activated(_rows(gate, block, valid), activation, x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        local, lin_q, kv, gate, factor, valid = ctx.saved_tensors
        activation: str = ctx.activation

        def compute(
            dout: Tensor, local: Tensor, lin_q: Tensor, kv: Tensor, gate: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            dlocal, dlin_q, dkv = torch.empty_like(local), torch.empty_like(lin_q), torch.zeros_like(kv)
            dgate = torch.empty_like(gate) if gate is not None else None
            with _products(local):
                for block in _blocks(local):
                    dx, q = _rows(dout, block, valid), _rows(lin_q, block, valid)
                    if gate is not None and dgate is not None:
                        g, x = _rows(gate, block, valid), _rows(local, block, valid) + (q @ kv) * factor
                        dgate[:, block] = gate_gradient(dx * x, g, activation)
                        dx = dx * activated(g, activation, dx.dtype)
                    dlocal[:, block] = dx
                    dlin_q[:, block] = (dx @ kv.mT) * factor
                    dkv.baddbmm_(q.mT, dx * factor)
            return dlocal, dlin_q, dkv, dgate

        return *once(_OP, compute, dout, local, lin_q, kv, gate), None, None, None


def _blocks(x: Tensor) -> Iterator[slice]:
    """The tokens of x (B, n, E), as many at a time as fit `_BLOCK_ELEMENTS`."""
    batch, n, width = x.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * width))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _rows(x: Tensor, block: slice, valid: Tensor | None) -> Tensor:
    """The tokens of a block in the type of sums, zeros in place of what is not valid, which may be anything."""
    rows = x[:, block].to(accumulator(x.dtype))
    if valid is None:
        return rows
    places = torch.arange(block.start, block.stop, device=x.device)
    return torch.where((places < valid[:, None])[..., None], rows, 0)


def _products(x: Tensor) -> torch.autocast:
    """Autocast off: sums of products stay in the type of sums."""
    return torch.autocast(x.device.type, enabled=False)

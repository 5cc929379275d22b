"""A FLASH layer token by token, in as few operations as can be, over memory and views that are made once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..options import Angles, FlashWeights, MixedChunkHeads, MixedChunkOptions, OpenChunk
from .common import accumulator, as_type
from .mixed_chunk import Places, token_


class FlashUnitSteps:
    """The tokens x (B, 1, d) of a layer, one after another, each of which advances a state in place; no gradients.

    Weights are read where they lie: what is written to them between two tokens is seen.

    Args:
        x: a token, for its shape and type.
        weights: of the layer.
        angles: of that token.
        state: what every token reads and writes.
        options: of attention. Its bias (..., 2P-1) may change from token to token, or be another one.
    """

    weights: FlashWeights
    options: MixedChunkOptions
    places: Places
    hidden: Tensor
    rows: Tensor
    u: Tensor
    v: Tensor
    z: Tensor
    heads: Tensor
    taken: Tensor
    parts: MixedChunkHeads
    turning: Tensor
    first: Tensor
    second: Tensor
    sines: Tensor
    by_sine: tuple[Tensor, ...]
    addresses: list[int]
    bias_address: list[int]

    def __init__(
        self, x: Tensor, weights: FlashWeights, angles: Angles, state: OpenChunk, options: MixedChunkOptions
    ) -> None:
        self.weights, self.options = weights, options
        self.places = self._places(state, options.rel_bias)
        wide, narrow = weights.w_out.shape[1], weights.gamma.shape[1]
        self.hidden = x.new_empty(*x.shape[:2], weights.w.shape[0])
        self.rows = self.hidden[:, 0]
        self.u, self.v, self.z = self.hidden.split((wide, wide, narrow), -1)
        self.heads = x.new_empty(x.shape[0], 4, narrow, dtype=accumulator(x.dtype))
        self.taken = self.heads if x.dtype == self.heads.dtype else x.new_empty(self.heads.shape)
        parts = self.taken.split(1, dim=1)
        self.parts = MixedChunkHeads(*(parts[i] for i in weights.order))
        pairs = 0 if angles.cos is None else angles.cos.shape[-1]
        turning = self.heads[..., : 2 * pairs]  # as (B, 4, first and second of the pairs, pairs)
        self.turning = turning.unflatten(-1, (pairs, 2)).mT if angles.interleaved else turning.unflatten(-1, (2, pairs))
        self.first, self.second = self.turning.unbind(2)
        self.sines = torch.empty_like(self.turning, memory_format=torch.contiguous_format)
        self.by_sine = self.sines.unbind(2)
        self.addresses = _addresses(*weights[:-1])
        self.bias_address = _addresses(options.rel_bias)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a state has none: it writes other memory."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def fit(self, x: Tensor, weights: FlashWeights, state: OpenChunk) -> bool:
        """Whether x is a next token of that state through those weights."""
        return (
            x.shape[:2] == self.hidden.shape[:2]
            and x.dtype == self.hidden.dtype
            and all(map(operator.is_, state, self.places.state))
            and self.addresses == _addresses(*weights[:-1])
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None, angles: Angles, bias: Tensor | None, turned: Tensor | None = None
    ) -> Tensor:
        """The layer's output (B, 1, d), with the residual if there is one, for the token at these angles.

        `turned` is W^T (d, 2e + S), contiguous: some processors read it twice as fast as W for a single row.
        """
        w, b, gamma, beta, w_out, b_out, _ = self.weights
        hidden, heads, acc = self.hidden, self.heads, self.heads.dtype
        turned = w.T if turned is None else turned
        if b is None:
            torch.mm(x[:, 0], turned, out=self.rows)
        else:
            torch.addmm(b, x[:, 0], turned, out=self.rows)
        torch.ops.aten.silu_(hidden)
        if beta is None:
            torch.mul(as_type(self.z, acc), as_type(gamma, acc), out=heads)
        else:
            torch.addcmul(as_type(beta, acc), as_type(self.z, acc), as_type(gamma, acc), out=heads)
        if angles.cos is not None and angles.sin is not None:
            self._turn(angles.cos, angles.sin)
        if self.taken is not heads:
            self.taken.copy_(heads)
        same = self.bias_address == _addresses(bias)
        places = self.places if same else self._places(self.places.state, bias)
        out = token_(self.parts, self.v, self.u, places, self.options)
        if residual is None:
            y = x.new_zeros(x.shape) if b_out is None else b_out.expand(x.shape).clone()
        else:
            y = residual.clone() if b_out is None else residual + b_out
        y[:, 0].addmm_(out[:, 0], w_out.T)
        return y

    @staticmethod
    def _places(state: OpenChunk, bias: Tensor | None) -> Places:
        rows = state.position.shape[0]
        return Places(state, None if bias is None else bias.reshape(-1, bias.shape[-1]).expand(rows, -1))

    def _turn(self, cos: Tensor, sin: Tensor) -> None:
        """RoPE of the heads, in place: angles (1 or B, 1, pairs)."""
        if cos.dim() == 3 and cos.shape[0] > 1:
            cos, sin = cos[:, None], sin[:, None]
        torch.mul(self.turning, sin, out=self.sines)
        self.turning.mul_(cos)
        first, second = self.by_sine
        self.first.sub_(second)
        self.second.add_(first)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]

"""Transformer++ in plain PyTorch, on its SDPA: what gated units are compared with, two of them with one layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]  # cosines and sines (N, D/2)


class Layer(nn.Module):
    """Causal attention with RoPE, then a SwiGLU feed-forward, each before a residual sum and after a norm; no biases.

    It takes the place of two gated units of width `dim`, with gates `wide` and queries `narrow` wide (Hua et al.
    2022, arXiv 2202.10447, section 2.2), and has as many parameters as they have, to a multiple of 64 channels.
    """

    def __init__(self, dim: int, wide: int, narrow: int, head_dim: int, **factory: Any) -> None:
        super().__init__()
        two_units = 2 * dim * (3 * wide + narrow)
        hidden = 64 * round((two_units - 4 * dim * dim) / (3 * dim) / 64)
        self.heads, self.head_dim = dim // head_dim, head_dim
        self.attention_norm, self.feedforward_norm = (nn.RMSNorm(dim, **factory) for _ in range(2))
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.to_out = nn.Linear(dim, dim, bias=False, **factory)
        self.to_hidden = nn.Linear(dim, 2 * hidden, bias=False, **factory)
        self.from_hidden = nn.Linear(hidden, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, d) -> (B, N, d)."""
        q, k, v = self._project(x, angles(torch.arange(x.shape[1], device=x.device), self.head_dim))
        return self._finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def step(self, x: Tensor, cache: Tensor, position: int, at: Angles) -> Tensor:
        """The token x (B, 1, d) at `position`, of angles `at`; `cache` (2, B, H, N, D) is written there."""
        q, cache[0, :, :, position, None], cache[1, :, :, position, None] = self._project(x, at)
        keys, values = cache[:, :, :, : position + 1]
        return self._finish(x, F.scaled_dot_product_attention(q, keys, values))

    def _project(self, x: Tensor, at: Angles) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = heads.transpose(1, 3).unbind(2)  # (B, H, N, D)
        return rotate(q, at), rotate(k, at), v

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.to_hidden(self.feedforward_norm(x)).chunk(2, dim=-1)
        return x + self.from_hidden(F.silu(gate) * up)


def angles(positions: Tensor, dim: int) -> Angles:
    """Of each pair of channels, the first half with the second, at positions (N,), in fp32."""
    pairs = torch.arange(dim // 2, device=positions.device)
    turned = positions[:, None] * 10000.0 ** (-pairs / pairs.shape[0])
    return turned.cos(), turned.sin()


def rotate(x: Tensor, at: Angles) -> Tensor:
    """RoPE of x (B, H, N, D)."""
    cos, sin = at
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

"""The projections of GAU and FLASH layers, fused with what follows them. For `flashgau.nn`; not public."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgau.contract.validate import autocast
from flashgau.options import Angles, ProjectionWeights

from . import autograd, dispatch, plain
from .operation import Operation


def gated_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    angles: Angles,
    *,
    raw_gate: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """u, v and the heads of [u, v, z] = silu(x W^T + b), head h being gamma_h z + beta_h turned by rotary angles.

    With `raw_gate` u is before its silu: for an attention that applies it where it reads its gate.

    x (B, N, d), weight (2e + S, d) and bias as in torch.nn.Linear; gamma, beta (H, S); angles (1 or B, N, pairs) in
    fp32 turn the first 2 * pairs channels. Returns u and v (B, N, e), and H tensors (B, N, S). Source: Hua et al. 2022
    (arXiv 2202.10447), code 1 and equation 4.
    """
    x, weight, bias = autocast(x, weight, bias)
    name = dispatch.resolve_inner("projection", x.device, x.dtype)
    count = gamma.shape[0]
    if name != "reference":
        save = autograd.needs_grad(x, weight, bias, gamma, beta)
        weights = ProjectionWeights(weight, bias, gamma, beta, raw_gate)
        u, v, *rest = _gated_projection(x, weights=weights, angles=angles, save=save, backend=name)
        return u, v, rest[:count]
    u, v, heads = written_projection(x, ProjectionWeights(weight, bias, gamma, beta, raw_gate), angles)
    return u, v, heads


def written_projection(
    x: Tensor, weights: ProjectionWeights, angles: Angles, backend: str = "reference"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`gated_projection` in PyTorch's own operations."""
    return gated_heads(F.linear(x, weights.weight, weights.bias), *weights[2:], angles)


def gated_heads(
    hidden: Tensor, gamma: Tensor, beta: Tensor | None, raw_gate: bool, angles: Angles
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `gated_projection` makes of x W^T + b, of which somebody else has made the product: an adapter, say."""
    narrow = gamma.shape[1]
    wide = (hidden.shape[-1] - narrow) // 2
    u, v, z = hidden.split((wide, wide, narrow), -1)
    u, v, z = u if raw_gate else F.silu(u), F.silu(v), F.silu(z)
    heads = z[:, None] * gamma[:, None].to(z.dtype)
    heads = heads if beta is None else heads + beta[:, None].to(z.dtype)
    cos, sin, interleaved = angles
    if cos is not None and sin is not None:
        pairs = cos.shape[-1]
        cos, sin = cos[:, None].to(z.dtype), sin[:, None].to(z.dtype)
        turning, rest = heads[..., : 2 * pairs], heads[..., 2 * pairs :]
        a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
        pair = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        heads = torch.cat([turned, rest], -1)
    return u, v, list(heads.unbind(1))


def projection(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x W^T + b (+ residual): x (..., d), weight (width, d) and bias as in torch.nn.Linear, residual (..., width)."""
    x, weight, bias = autocast(x, weight, bias)
    name = dispatch.resolve_inner("projection", x.device, x.dtype)
    inside = residual if residual is not None and residual.dtype == x.dtype and name != "reference" else None
    y = F.linear(x, weight, bias) if name == "reference" else _projection(x, weight, bias, inside, backend=name)[0]
    return y if residual is None or inside is not None else y + residual


def reads_raw_gate(op: str, x: Tensor, key_dim: int) -> bool:
    """Whether a gate before its silu serves a layer on x best: where Triton's kernels read it, which apply silu.

    There silu(u) is never stored: in half precision 4 bytes a token and column less in the forward and 6 in the
    backward. On the eager backend silu is applied while u is in the cache, once, and the backward reads what was saved.
    """
    name = dispatch.resolve_inner("projection", x.device, x.dtype)
    return name == "triton" and dispatch.resolve(op, None, x.device, x.dtype, key_dim) == "triton"


def _gated_results(
    x: Tensor, weight: Tensor, gamma: Tensor, raw_gate: bool, save: bool, backend: str, **_: Any
) -> list[Tensor]:
    count, narrow = gamma.shape
    wide = (weight.shape[0] - narrow) // 2
    kept = [] if not save else [wide, narrow] if raw_gate else [wide, wide, narrow]
    kept = [sum(kept)] if save and backend == "triton" else kept
    return [x.new_empty(*x.shape[:-1], width) for width in (wide, wide, *[narrow] * count, *kept)]


_gated_projection = Operation(
    "gated_projection",
    inputs="x weight bias? gamma beta?",
    data="cos? sin?",
    results="u v heads:gamma",
    saved="saved*",
    tuples={"weights": ProjectionWeights, "angles": Angles},
    shapes=_gated_results,
    op="projection",
    error="gated_projection",
    others=written_projection,
)
_projection = Operation(
    "projection",
    inputs="x weight bias? residual+",
    results="y",
    shapes=lambda x, weight, **_: [x.new_empty(*x.shape[:-1], weight.shape[0])],
    op="projection",
    others=lambda x, weight, bias, residual, backend: [plain.added(F.linear(x, weight, bias), residual)],
)

"""Normalisations of rows, naively."""

import torch
from torch import Tensor

from .common import upcast


@upcast
def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layernorm",
    eps: float = 1e-5,
    clamp: bool = False,
) -> Tensor:
    """Normalise rows, the definition: weight * (x - mean) / deviation + bias over the last axis.

    Args:
        x: (..., d).
        weight: (d,), or (1,) for one factor of all channels; 1 unless given.
        bias: (d,); 0 unless given.
        kind: "layernorm", mean and sqrt(variance + eps) of the row; or "rms", no mean and sqrt(mean(x^2) + eps).
        eps: what keeps the quotient finite.
        clamp: the deviation is max(sqrt(mean(x^2)), eps) instead; of "rms" only.

    Returns:
        A tensor of the shape of x.

    Source: Ba et al. 2016 (arXiv 1607.06450); Zhang and Sennrich 2019 (arXiv 1910.07467); ScaleNorm Nguyen and Salazar
    2019 (arXiv 1910.05895).

    Example:
        >>> norm(torch.tensor([3.0, -3.0]), kind="rms", eps=0.0).tolist()
        [1.0, -1.0]
    """
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    mean_square = centred.square().mean(-1, keepdim=True)
    if clamp:
        # The tiny term only keeps the gradient of the root finite at a row of zeros.
        deviation = (mean_square + torch.finfo(x.dtype).tiny).sqrt().clamp(min=eps)
    else:
        deviation = (mean_square + eps).sqrt()
    y = centred / deviation
    y = y if weight is None else y * weight
    return y if bias is None else y + bias

"""How weights start: N(0, 0.02) for every matrix and 0 for every bias, as in the GAU paper (arXiv 2202.10447)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STD = 0.02


def linear(inputs: int, outputs: int, bias: bool, **factory: Any) -> nn.Linear:
    """An `nn.Linear` that starts as N(0, 0.02) with zero bias; `factory` holds device and dtype."""
    layer = nn.Linear(inputs, outputs, bias=bias, **factory)
    nn.init.normal_(layer.weight, std=STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def is_plain(*layers: nn.Module) -> bool:
    """Whether these are x W^T + b and no more, so that W may be read instead of calling them.

    Something else may have taken their place: an adapter (LoRA), a quantised layer.
    """
    return all(type(layer) is nn.Linear for layer in layers)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding`, whose gradient is summed in fp32: on a CPU PyTorch adds halves up in their own type."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (..., dim)."""
        weight = self.weight
        if weight.device.type == "cpu" and weight.element_size() == 2 and torch.is_grad_enabled():
            return nn.functional.embedding(input, weight.float()).to(weight.dtype)
        return super().forward(input)


def embedding(count: int, dim: int, **factory: Any) -> nn.Embedding:
    """An `nn.Embedding` that starts as N(0, 0.02); `factory` holds device and dtype."""
    table = Embedding(count, dim, **factory)
    nn.init.normal_(table.weight, std=STD)
    return table

"""Feed-forward layers, plain and gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import glu, glu_linear
from .initialise import is_plain, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}

# [GLU] table 1: the name of the layer, and what its gate is passed through.
VARIANTS = {"glu": "sigmoid", "bilinear": "identity", "reglu": "relu", "geglu": "gelu", "swiglu": "silu"}


class FeedForward(nn.Module):
    """act(x W1) W2, position by position.

    Args:
        dim: d, width of input and output.
        hidden: F, width between; None for 4 d.
        activation: identity, sigmoid, relu, relu2, gelu (exact), gelu_tanh or silu.
        bias: whether the two maps have biases.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> tuple(FeedForward(16)(torch.randn(2, 5, 16)).shape)
        (2, 5, 16)
    """

    to_hidden: nn.Linear
    to_out: nn.Linear

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        activation: str = "gelu",
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"FeedForward: `activation` is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        hidden = 4 * dim if hidden is None else hidden
        self.activation = activation
        self.to_hidden = linear(dim, hidden, bias, device=device, dtype=dtype)
        self.to_out = linear(hidden, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        return self.to_out(ACTIVATIONS[self.activation](self.to_hidden(x)))

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"activation={self.activation}"


class GatedFeedForward(nn.Module):
    """(act(x Wg) * x Wu) W2: a feed-forward layer with a gated linear unit in place of its activation.

    Source: [GLU] Shazeer 2020 (arXiv 2002.05202). The default width, two thirds of 4 d, gives it the parameters
    of a plain feed-forward layer.

    Args:
        dim: d, width of input and output.
        hidden: F, width between; None for 8 d / 3, rounded up to a multiple of 8.
        variant: glu (sigmoid), bilinear (identity), reglu (relu), geglu (exact gelu) or swiglu (silu).
        bias: whether the three maps have biases.
        recompute: keep no pre-activations for the backward, see `flashgau.glu_linear`.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> import torch
        >>> layer = GatedFeedForward(96, variant="geglu")
        >>> tuple(layer(torch.randn(2, 5, 96)).shape), layer.gate.out_features
        ((2, 5, 96), 256)
    """

    variant: str
    recompute: bool
    gate: nn.Linear
    up: nn.Linear
    to_out: nn.Linear

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        variant: str = "swiglu",
        *,
        bias: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"GatedFeedForward: `variant` is {variant!r}; expected one of {', '.join(VARIANTS)}")
        hidden = -(-8 * dim // 3 // 8) * 8 if hidden is None else hidden
        self.variant, self.recompute = variant, recompute
        self.gate = linear(dim, hidden, bias, device=device, dtype=dtype)
        self.up = linear(dim, hidden, bias, device=device, dtype=dtype)
        self.to_out = linear(hidden, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        activation = VARIANTS[self.variant]
        if not is_plain(self.gate, self.up):
            return self.to_out(glu(self.gate(x), self.up(x), activation=activation))
        weights = self.gate.weight, self.up.weight, self.gate.bias, self.up.bias
        hidden = glu_linear(x, *weights, activation=activation, recompute=self.recompute)
        return self.to_out(hidden)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"variant={self.variant}"

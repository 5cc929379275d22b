"""Gated linear units, naively."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import upcast

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@upcast
def glu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: str = "silu",
    up_activation: str = "identity",
    backend: str | None = None,
) -> Tensor:
    """Gated linear unit, the definition: act(gate) * up_act(up).

    Args:
        gate: any shape; without `up`, its last axis holds [gate | up].
        up: the shape of `gate`.
        activation: of the gate: identity, sigmoid, relu, relu2, gelu, gelu_tanh or silu.
        up_activation: of the other side, from the same names.
        backend: accepted for the common signature, and ignored.

    Returns:
        A tensor of the shape of `up`.

    Source: Shazeer 2020 (arXiv 2002.05202), equations 4 and 5.

    Example:
        >>> glu(torch.tensor([-1.0, 2.0]), torch.tensor([5.0, 3.0]), activation="relu").tolist()
        [0.0, 6.0]
    """
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * ACTIVATIONS[up_activation](up)


@upcast
def glu_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "silu",
    up_activation: str = "identity",
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Projection into a gated linear unit, the definition: act(x Wg^T + bg) * up_act(x Wu^T + bu).

    Args:
        x: (..., d).
        w_gate: (F, d), laid out as in `torch.nn.Linear`.
        w_up: (F, d).
        b_gate: (F,) or None.
        b_up: (F,) or None.
        activation: of the gate; see `glu`.
        up_activation: of the other side.
        recompute: accepted for the common signature, and ignored: autograd keeps what it needs.
        backend: accepted for the common signature, and ignored.

    Returns:
        (..., F).

    Source: Shazeer 2020 (arXiv 2002.05202), equations 4 and 5.

    Example:
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> glu_linear(x, w, w, activation="identity").tolist()
        [[1.0, 4.0]]
    """
    return ACTIVATIONS[activation](F.linear(x, w_gate, b_gate)) * ACTIVATIONS[up_activation](F.linear(x, w_up, b_up))

"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: (B, V).
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: draw among the k most likely only.
        top_p: draw among the fewest tokens that together have this probability.
        generator: where the random numbers come from; None for torch's default.

    Returns:
        Tensor: (B,) int64.

    Example:
        >>> import torch
        >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0).tolist()
        [1]
    """
    if temperature < 0:
        raise ValueError(f"sample: `temperature` is {temperature}; expected 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample: `top_k` is {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: `top_p` is {top_p}; expected more than 0 and at most 1")
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        # A token goes if those before it have the probability already; the first always stays.
        drop = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)

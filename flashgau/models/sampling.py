"""From logits to the next token."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

# Between them a temperature is a number of fp32, so that neither 0 / 0 nor inf / inf comes of a division by it. Logits
# that differ at all differ by far more than the first, unless they are all smaller than 1e-30.
_COLDEST, _HOTTEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: (B, V). A token of -inf is never drawn.
        temperature: logits are divided by it; 0 takes the most likely token, as ever smaller ones come to do.
        top_k: draw among the k most likely only. Of equally likely ones as many are left out as are too many.
        top_p: draw among the fewest tokens that together have at least this probability, after `top_k`.
        generator: where the random numbers come from; None for torch's default.

    Returns:
        Tensor: (B,) int64.

    Raises:
        ValueError: an argument is out of its range, or, where looking costs nothing (on a CPU), logits are NaN or
            infinite, or all of a row are -inf.

    Example:
        >>> import torch
        >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0).tolist()
        [1]
        >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=1e-40).tolist()
        [1]
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: `temperature` is {temperature}; expected a finite number, 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample: `top_k` is {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: `top_p` is {top_p}; expected more than 0 and at most 1")
    logits = logits.float()
    most = logits.amax(-1, keepdim=True)
    if most.device.type == "cpu" and not most.isfinite().all():
        raise ValueError("sample: `logits` are NaN or infinite; expected a finite largest one in every row")
    if temperature == 0:
        return logits.argmax(-1)
    # The largest becomes 0, which it stays, and the others go to -inf at the worst.
    logits = (logits - most) / min(max(temperature, _COLDEST), _HOTTEST)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # A token goes if those before it have the probability already. The first has none before it, and stays.
        drop = ordered.cumsum(-1) >= top_p
        drop = torch.cat((torch.zeros_like(drop[:, :1]), drop[:, :-1]), dim=-1)
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def seeded(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A generator on `device` that begins at `seed`; None, which stands for torch's default one, without a seed.

    Raises:
        ValueError: it is not from 0 to 2^64 - 1.

    Example:
        >>> seeded(2**64 - 1, torch.device("cpu")).initial_seed() == 2**64 - 1
        True
    """
    if seed is None:
        return None
    if not 0 <= operator.index(seed) < 2**64:
        raise ValueError(f"generate: `seed` is {seed}; expected an integer from 0 to 2^64 - 1")
    return torch.Generator(device).manual_seed(operator.index(seed))

"""A batch of rows as one packed row, in which what is not to be seen is a sequence of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def end_to_end(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`cu_seqlens` of queries and of keys, when every row is cut into these parts and the rows follow each other.

    Padding and unused slots of a cache are parts with keys and without queries, or the reverse: nobody sees them, no
    token is gathered, and bottom-right alignment holds for the tokens alone.

    Args:
        parts: for each part in order, how many queries and how many keys it has in every row, (B,) integers each.

    Returns:
        Two tensors (B * parts + 1,) int64.

    Example:
        >>> none, held = torch.tensor([0, 0]), torch.tensor([3, 1])
        >>> end_to_end((none + 1, held), (none, 4 - held))  # one query a row, caches of four slots
        (tensor([0, 1, 1, 2, 2]), tensor([0, 3, 4, 5, 8]))
    """
    queries, keys = (torch.stack(counts, 1).flatten() for counts in zip(*parts, strict=True))
    q, k = torch.nn.functional.pad(torch.stack([queries, keys]).cumsum(1), (1, 0))
    return q, k

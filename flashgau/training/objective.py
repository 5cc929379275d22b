"""What a model is trained to predict: the next byte (clm), or bytes that were masked out (mlm)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..models import CausalLM, MaskedLM, mask_tokens
from ..models.language import IGNORE
from .data import MASKS, VOCABULARY, Bytes, random_words, windows

MASK = VOCABULARY
"""The token that stands for a masked byte: one more than there are bytes."""


def vocabulary(objective: str) -> int:
    """How many tokens a model of this objective knows: the bytes, and for "mlm" the mask."""
    return VOCABULARY + 1 if objective == "mlm" else VOCABULARY


def model_class(objective: str) -> type[CausalLM] | type[MaskedLM]:
    """What models with this objective are."""
    return MaskedLM if objective == "mlm" else CausalLM


def mask_seeds(seed: int, step: int, count: int) -> npt.NDArray[np.uint64]:
    """For each of the `count` windows of a step, the seed of its masks: a pure function of seed, step and window."""
    return random_words(MASKS, seed, step, count)


def fixed_mask_seeds(count: int) -> npt.NDArray[np.uint64]:
    """Seeds of the masks of validation windows: always the same, so that losses can be compared."""
    return mask_seeds(0, 2**64 - 1, count)  # a step that no run reaches


def examples(
    objective: str, text: Bytes, starts: npt.NDArray[np.int64], length: int, seeds: npt.NDArray[np.uint64]
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the windows at `starts`, each (len(starts), length) int64.

    Args:
        objective: "clm": the target of a byte is the byte after it. "mlm": 15% of the bytes are targets, and of
            these 80% are masked, 10% another byte, 10% as they were; all other targets are -100.
        text: where the windows are.
        starts: their first positions.
        length: bytes of a window; one more is looked at for "clm".
        seeds: one per window; what its masks are made from.

    Example:
        >>> text, starts = np.arange(40, dtype=np.uint8), np.array([0, 20])
        >>> inputs, targets = examples("clm", text, starts, 4, fixed_mask_seeds(2))
        >>> inputs.tolist(), targets[1].tolist()
        ([[0, 1, 2, 3], [20, 21, 22, 23]], [21, 22, 23, 24])
        >>> inputs, targets = examples("mlm", text, starts, 20, fixed_mask_seeds(2))
        >>> [bool((inputs[i] == MASK).any()) for i in (0, 1)], set(targets[targets >= 0].tolist()) <= set(range(40))
        ([True, True], True)
    """
    if objective == "clm":
        return windows(text, starts, length)
    rows = torch.from_numpy(np.stack([text[start : start + length] for start in starts.tolist()]).astype(np.int64))
    # Each window has a generator of its own, so its masks are the same whichever process makes them.
    pairs = [
        mask_tokens(row[None], MASK, VOCABULARY, generator=torch.Generator().manual_seed(int(seed)))
        for row, seed in zip(rows, seeds.tolist(), strict=True)
    ]
    inputs, targets = zip(*pairs, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def count_targets(targets: Tensor) -> int:
    """How many of the targets count."""
    return int((targets != IGNORE).sum())

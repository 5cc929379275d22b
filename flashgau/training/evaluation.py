"""How well a model predicts a text, in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.language import IGNORE
from ..nn import Spread
from .data import Bytes
from .objective import count_targets, examples, fixed_mask_seeds
from .share import Share


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        loss: mean of -log p over the targets, in nats.
        bits_per_byte: the same, divided by ln 2.
        targets: how many bytes were predicted.
        bytes: how many the text has.
        context: the length of a window.
    """

    loss: float
    bits_per_byte: float
    targets: int
    bytes: int
    context: int


def loss_sum(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    device: torch.device,
    bf16: bool,
    spread: Spread | None = None,
) -> Tensor:
    """Sum of -log p(target) in nats over the targets that are not -100; a scalar in fp32 (fp64 for fp64 logits).

    Args:
        model: (B, N) tokens -> (B, N, V) logits.
        inputs: (B, N) tokens.
        targets: (B, N) tokens or -100.
        device: where the model is.
        bf16: compute under bfloat16 autocast.
        spread: how the windows are spread over processes, of which these are slices.
    """
    inputs, targets = inputs.to(device), targets.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(inputs) if spread is None else model(inputs, spread=spread)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def batch_losses(
    model: nn.Module,
    objective: str,
    text: Bytes,
    starts: npt.NDArray[np.int64],
    length: int,
    *,
    batch: int,
    device: torch.device,
    bf16: bool,
    share: Share,
) -> Iterator[tuple[float, int]]:
    """For one batch of windows after another: the sum of the losses of this process's share, and their number.

    Args:
        model: in evaluation mode.
        objective: "clm" or "mlm"; the masks depend on nothing but a window's place in `starts`.
        text: where the windows are.
        starts: their first positions.
        length: of a window.
        batch: windows of one forward pass, over all processes.
        device: where the model is.
        bf16: compute under bfloat16 autocast.
        share: this process's.
    """
    seeds = fixed_mask_seeds(len(starts))
    for first in range(0, len(starts), batch):
        rows = slice(first, first + batch)
        inputs, targets = examples(objective, text, starts[rows], length, seeds[rows])
        if len(inputs) > share.rank:
            inputs, targets = inputs[share.rank :: share.count], targets[share.rank :: share.count]
        else:
            # Nothing is left for this process, but a sharded model computes in all of them or in none.
            inputs, targets = inputs[:1], torch.full_like(targets[:1], IGNORE)
        inputs, targets = share.of(inputs), share.of(targets)
        yield loss_sum(model, inputs, targets, device, bf16, share.spread).item(), count_targets(targets)


def evaluate(
    model: nn.Module,
    text: Bytes,
    *,
    context: int,
    objective: str = "clm",
    batch: int = 8,
    bf16: bool = False,
    told: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Bits per byte of the whole of a text, cut into windows that are predicted each on its own.

    "clm": every byte but the first is predicted once, from at most `context` bytes before it, those of its window.
    "mlm": in every window of `context` bytes 15% are predicted from the others; always the same ones.

    Args:
        model: (B, N) int64 tokens -> (B, N, V) logits; its mode and device are left as they are found.
        text: (N,) uint8, N at least 2, as `load_text` gives it.
        context: bytes of a window.
        objective: "clm" or "mlm".
        batch: windows of one forward pass.
        bf16: compute under bfloat16 autocast.
        told: called after each forward pass with the number of bytes that are done.

    Raises:
        ValueError: an argument cannot be used, or a short text has no byte that the masks hide.

    Example:
        >>> text = np.frombuffer(b"aaaaaaaaab", dtype=np.uint8)
        >>> uniform = nn.Embedding.from_pretrained(torch.zeros(256, 256))  # all bytes are equally likely
        >>> result = evaluate(uniform, text, context=4)
        >>> result.targets, round(result.bits_per_byte, 6)
        (9, 8.0)
    """
    if objective not in ("clm", "mlm"):
        raise ValueError(f"evaluate: `objective` is {objective!r}; expected 'clm' or 'mlm'")
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"evaluate: `{name}` is {value}; expected at least 1")
    if text.ndim != 1 or text.dtype != np.uint8 or text.size < 2:
        raise ValueError(
            f"evaluate: `text` has shape {text.shape} and dtype {text.dtype}; expected (N,) uint8, N at least 2"
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    predictable = text.size - 1 if objective == "clm" else text.size
    context = min(context, predictable)
    starts = np.arange(0, predictable - context + 1, context, dtype=np.int64)
    rest = predictable - len(starts) * context  # bytes of a last, shorter window
    pieces = [(starts, context)] + ([(np.array([predictable - rest]), rest)] if rest else [])
    total, count, done, end, training = 0.0, 0, 0, 0, model.training
    model.eval()
    try:
        for places, length in pieces:
            end += len(places) * length
            for loss, targets in batch_losses(
                model, objective, text, places, length, batch=batch, device=device, bf16=bf16, share=Share()
            ):
                total, count, done = total + loss, count + targets, min(done + batch * length, end)
                told(done)
    finally:
        model.train(training)
    if not count:
        raise ValueError(f"evaluate: `text` has {text.size} bytes, none of which is masked; expected a longer one")
    return Evaluation(total / count, total / count / math.log(2), count, int(text.size), context)

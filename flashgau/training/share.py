"""What a process computes of a batch: some of its windows, and of a window that several processes share, a slice."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn

from ..nn import Spread
from .config import TrainConfig
from .processes import Processes


@dataclass(frozen=True)
class Share:
    """One of `count` parts of the windows; and how these are spread over the processes that have the same part.

    Attributes:
        rank: the number of the part, from 0.
        count: how many parts there are.
        spread: None where a process has whole windows.

    Example:
        >>> import torch
        >>> Share().of(torch.zeros(2, 5)).shape
        torch.Size([2, 5])
    """

    rank: int = 0
    count: int = 1
    spread: Spread | None = None

    def of(self, windows: Tensor) -> Tensor:
        """This process's bytes of windows (B, N) that are its part."""
        return windows if self.spread is None else windows[:, self.spread.own]


@contextlib.contextmanager
def shared(config: TrainConfig, model: nn.Module, processes: Processes, timeout: float) -> Iterator[Share]:
    """This process's share: processes that follow each other have the same windows, `config.context_parallel` of them.

    Args:
        config: gives their number and the length of windows.
        model: what the slices are for.
        processes: all of them.
        timeout: seconds that one of them waits for the others of a window.

    Raises:
        ValueError: windows cannot be cut for so many, or the model takes no slices.
    """
    together = config.context_parallel
    if together == 1:
        yield Share(processes.rank, processes.count)
        return
    import torch.distributed as dist

    from ..distributed import cut_tokens, spread_tokens

    def cut() -> list[slice]:
        if "spread" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"train: `model` is a {type(model).__name__}, whose forward takes no `spread`; expected one that does, "
                f"with context_parallel = {together}"
            )
        try:
            return cut_tokens(config.length, together, model)
        except ValueError as error:
            raise ValueError(f"context_parallel: {together} processes cannot share a window: {error}") from error

    own = processes.everywhere(cut)[processes.rank % together]
    # Also what sends from a CPU, whatever the default group has: there they agree, and the model is at first.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
    group, _ = dist.new_subgroups(together, timeout=timedelta(seconds=timeout), backend=backend)
    try:
        spread = spread_tokens(own.stop - own.start, group)
        processes.everywhere(lambda: _rehearse(model, spread))
        yield Share(processes.rank // together, processes.count // together, spread)
    finally:
        dist.destroy_process_group(group)


def _rehearse(model: nn.Module, spread: Spread) -> None:
    """Compute windows of which there are none: what operations cannot share shows before anything is written."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        model(torch.zeros(0, spread.counts[spread.rank], dtype=torch.int64, device=device), spread=spread)

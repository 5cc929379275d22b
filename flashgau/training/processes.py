"""What the processes of one run say to each other: all take every decision together, and only the first speaks.

A run in one process uses the same calls, which then cost nothing.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class Elsewhere(Exception):
    """The cause of an error that another process met, and reports."""


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together, as seen from one of them.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.
        group: what they exchange decisions through (gloo, whatever the gradients use); None for a single process.

    Example:
        >>> alone = Processes()
        >>> alone.first, alone.at_first(lambda: "done"), alone.largest(0.5)
        (True, 'done', 0.5)
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def everywhere(self, action: Callable[[], Result]) -> Result:
        """Do `action` in every process; if it fails in any, raise the error of the first that failed in all of them.

        An error met in another process has an `Elsewhere` as its cause.
        """
        if self.count == 1:
            return action()
        result, error = _attempt(action)
        errors: list[Exception | None] = [None] * self.count
        dist.all_gather_object(errors, error, group=self.group)
        failed = next((rank for rank, found in enumerate(errors) if found is not None), None)
        self._raise(errors[failed] if failed is not None else None, failed)
        return result  # type: ignore[return-value]

    def at_first(self, action: Callable[[], Result]) -> Result:
        """Do `action` in the first process alone; all get its result, or raise its error."""
        if self.count == 1:
            return action()
        box = [_attempt(action) if self.first else (None, None)]
        dist.broadcast_object_list(box, src=0, group=self.group)
        result, error = box[0]
        self._raise(error, 0)
        return result  # type: ignore[return-value]

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.group)
        return box.item()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of the processes' values (of the same shape, on the same kind of device); bitwise equal in all."""
        if self.count == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group if total.device.type == "cpu" else None)
        return total / self.count

    def same(self, what: str, value: str) -> None:
        """Make sure that `value` is the same in all processes.

        Raises:
            ValueError: it is not.
        """
        ours = self.at_first(lambda: value)

        def compare() -> None:
            if value != ours:
                raise ValueError(f"{what}: process {self.rank} has {value}; expected {ours}, as process 0 has")

        self.everywhere(compare)

    def _raise(self, error: Exception | None, rank: int | None) -> None:
        """Raise the error, if any, that process `rank` met."""
        if error is not None:
            raise error from (None if rank == self.rank else Elsewhere(f"in process {rank}"))


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """The result of `action`, or the error, as something that can be sent to another process."""
    try:
        return action(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that this one was started with: those of `torchrun`, or of a process group that exists already.

    Without either it is alone. A group that is made here is left at the end.

    Example:
        >>> with launched() as processes:
        ...     processes.count
        1
    """
    if not dist.is_available() or not (dist.is_initialized() or dist.is_torchelastic_launched()):
        yield Processes()
        return
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    group = None
    try:
        group = dist.new_group(backend="gloo")
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(None if made else group)

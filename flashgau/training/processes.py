"""What the processes of one run say to each other: all take every decision together, and only the first speaks.

A run in one process uses the same calls, which then cost nothing. A process that does not answer ends the run of all.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

Result = TypeVar("Result")

TIMEOUT = 600.0  # seconds
_ROLL_CALL = 30.0  # seconds: who waits for one process finds out almost when the others do


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
def launched(timeout: float = TIMEOUT) -> Iterator[Processes]:
    """The processes that this one was started with: those of `torchrun`, or of a process group that exists already.

    Without either it is alone. A group that is made here is left at the end.

    Args:
        timeout: seconds, from 1 to 1e6, that a process waits for another. (A group that exists has its own besides.)

    Raises:
        ValueError: there is no such timeout.
        TimeoutError: (an OSError) processes that `torchrun` has started do not answer; it names them. In all that do,
            but with an `Elsewhere` as its cause in all but one of them, which is to report it.

    Example:
        >>> with launched() as processes:
        ...     processes.count
        1
    """
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 1 <= timeout <= 1e6:
        raise ValueError(f"timeout: {timeout!r} is no time to wait; expected a number of seconds from 1 to 1e6")
    limit = timedelta(seconds=timeout)
    if not dist.is_available() or not (dist.is_initialized() or dist.is_torchelastic_launched()):
        yield Processes()
    elif dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=limit)
        try:
            yield Processes(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)
    else:
        store, rank, count = next(rendezvous("env://", timeout=limit))
        with contextlib.ExitStack() as leaving, _RollCall(store, rank, count, timeout):
            # On GPUs the host runs ahead, up to what it waits for through gloo. There it shall learn who is missing,
            # before nccl's own clock ends the process without a word.
            gpus = torch.cuda.is_available()
            backend, longer = ("cpu:gloo,cuda:nccl", 2 * limit) if gpus else ("gloo", limit)
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=longer)
            leaving.callback(dist.destroy_process_group)
            yield Processes(rank, count, dist.new_group(backend="gloo", timeout=limit))


class _RollCall:
    """Around what processes do together: when they lose one of them, those that are left find out which.

    A collective that fails says little, and nothing of who was missing. But each process that leaves says so in a
    store, which `torchrun` keeps: what did not leave, stands still or was killed.
    """

    def __init__(self, store: dist.Store, rank: int, count: int, timeout: float) -> None:
        self.store = dist.PrefixStore("flashgau", store)
        self.rank, self.count, self.timeout = rank, count, timeout

    def __enter__(self) -> None:
        self.store.delete_key(str(self.rank))  # of an earlier run of the same processes

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        lost = error is not None and _lost_contact(error)
        with contextlib.suppress(RuntimeError):  # the store may have ended with its process
            self.store.set(str(self.rank), "done" if error is None else "lost" if lost else "failed")
        if not lost:
            return
        present = self._present()
        absent = [str(rank) for rank in range(self.count) if rank not in present]
        if absent:
            several = len(absent) > 1
            names = f"process{'es' if several else ''} {', '.join(absent)}"
            message = (
                f"{names} {'do' if several else 'does'} not answer, and {'stand' if several else 'stands'} still "
                f"or {'have' if several else 'has'} ended; the others waited up to {self.timeout:g} seconds"
            )
        elif "failed" in present.values():
            failed = next(rank for rank, word in present.items() if word == "failed")
            raise TimeoutError(f"process {failed} failed") from Elsewhere(f"in process {failed}")
        else:
            message = f"the processes lost each other; one may be slower than {self.timeout:g} seconds: {error}"
        raise TimeoutError(message) from (error if self.rank == min(present) else Elsewhere("in another process"))

    def _present(self) -> dict[int, str]:
        """What each process said, of those that say something before long."""
        end = time.monotonic() + min(self.timeout, _ROLL_CALL)
        while True:
            late = time.monotonic() >= end
            present = [rank for rank in range(self.count) if self.store.check([str(rank)])]
            if late or len(present) == self.count:
                return {rank: self.store.get(str(rank)).decode() for rank in present}
            time.sleep(0.05)


def _lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because of another process."""
    # For gloo these are plain RuntimeErrors, told apart by their text alone.
    gloo = isinstance(error, RuntimeError) and any(part in str(error).lower() for part in ("gloo", "pair closure"))
    return gloo or isinstance(error, dist.DistError)

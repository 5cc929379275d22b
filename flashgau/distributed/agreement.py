"""What the processes of a group tell each other before they exchange tensors: what they are about to do.

A collective that one process enters and another does not waits until it times out, and one that they enter for
different reasons gives wrong numbers. So no tensor is sent before all have seen, in one small all-gather, that all do
the same: a call with sizes and options that fit, or a part of the backward of one and the same call. It is of one size
whatever is said, so that a process in a call and another in a backward meet there too. What is wrong in one process
raises an error in all of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_FIELDS = 40  # of every note, whatever it says: processes that do different things must not wait
_NAME = 4  # fields, of 8 bytes each, for the name of the operation
_HEADER = _NAME + 3  # and then: part of the backward, number of the call, whether an argument was refused
_ODD = (-0x61C8864680B583EB, -0x4B47D0C5A1A6F2B3, 0x2545F4914F6CDD1D)  # odd numbers of 64 bits, to mix with

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Note:
    """What one process has to say about its call. Numbers may be tensors of one integer, which are not read here.

    Attributes:
        sizes: must be the same in all processes, and are shown if they are not.
        options: digests, must be the same in all processes.
        own: may differ.
    """

    sizes: dict[str, int]
    options: dict[str, int | Tensor]
    own: dict[str, int | Tensor]

    def fields(self) -> dict[str, int | Tensor]:
        """All of them in one order."""
        return {**self.sizes, **self.options, **self.own}


_numbers = itertools.count(1)  # of this process's calls


@dataclass(frozen=True)
class GroupContext:
    """The processes that share one call.

    Attributes:
        op: the name of the operation, for errors.
        group: of torch.distributed.
        rank: the number of this process in the group.
        size: the number of processes.
        call: the number of the call, as the group's first process counts; 0 before `agree`.
    """

    op: str
    group: dist.ProcessGroup
    rank: int
    size: int
    call: int = 0

    @classmethod
    def of(cls, op: str, group: Any) -> GroupContext:
        """The processes of `group`, or of the default group.

        Raises:
            RuntimeError: there is no default group.
            TypeError, ValueError: for what is no group, or one that this process is not in.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{op}: torch.distributed is not initialised: call torch.distributed.init_process_group() first, "
                f"in processes that torchrun has started"
            )
        found: Any = dist.group.WORLD if group is None else group
        if isinstance(found, DeviceMesh):
            if found.ndim != 1:
                names = found.mesh_dim_names
                got = f"{found.ndim} dimensions" + (f" ({', '.join(names)})" if names else "")
                one = f'one of them, such as mesh["{names[-1]}"]' if names else "one of them"
                raise ValueError(f"{op}: `group` is a DeviceMesh of {got}; expected {one}")
            found = found.get_group() if found.get_coordinate() is not None else dist.GroupMember.NON_GROUP_MEMBER
        if found is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{op}: `group` does not hold process {dist.get_rank()}; expected a group that does")
        if not isinstance(found, dist.ProcessGroup):
            expected = "a torch.distributed.ProcessGroup or None, or a DeviceMesh of one dimension"
            raise TypeError(f"{op}: `group` is a {type(group).__name__}; expected {expected}")
        return cls(op, found, dist.get_rank(found), dist.get_world_size(found))

    def process(self, rank: int) -> str:
        """How errors name a process of the group: by its number among all processes."""
        return f"process {dist.get_global_rank(self.group, rank)}"

    def check_device(self, name: str, x: Tensor) -> None:
        """The group must be able to send what is on the device of `x`.

        Raises:
            ValueError: it is not.
        """
        backends = self._backends()
        kind, backend = x.device.type, backends.get(x.device.type)
        if backend is None or (backend == "gloo" and kind != "cpu"):  # gloo names CUDA, and lacks what is needed there
            able = " or ".join(name for name, found in backends.items() if found != "gloo" or name == "cpu")
            raise ValueError(
                f"{self.op}: `{name}` is on {x.device}; expected a tensor on {able}, "
                f"which is what the group's backend ({', '.join(sorted(set(backends.values())))}) sends"
            )

    def agree(self, check: Callable[[], Note]) -> tuple[GroupContext, dict[str, list[int]]]:
        """Check the arguments in every process; give the call its number, and the fields of all notes, by process.

        Every process of the group must call this. It waits for the others (and for the device, if the group sends
        from there).

        Raises:
            Exception: what `check` raised in this process.
            ValueError: an argument was refused in another process, or differs between them.
            RuntimeError: another process is in a backward.
        """
        number, error = next(_numbers), None
        note = Note({}, {}, {})
        try:
            note = check()
        except Exception as caught:
            error = caught
        fields = note.fields()
        rows = self._announce([0, number, int(error is not None)], list(fields.values()))()

        if error is not None:
            raise error
        self._check_together(rows)
        for rank, row in enumerate(rows):
            if row[_HEADER - 1]:
                raise ValueError(
                    f"{self.op}: {self.process(rank)} refused its arguments, and reports what is wrong with them"
                )
        found = {name: [row[place] for row in rows] for place, name in enumerate(fields, _HEADER)}
        for name in [*note.sizes, *note.options]:
            first = found[name][0]
            other = next((rank for rank, value in enumerate(found[name]) if value != first), None)
            if other is None:
                continue
            if name in note.sizes:
                has = f"has {name} = {found[name][other]}; expected {name} = {first}, as {self.process(0)} has"
                raise ValueError(f"{self.op}: {self.process(other)} {has}")
            raise ValueError(
                f"{self.op}: `{name}` of {self.process(other)} is not that of {self.process(0)}; "
                f"expected the same in all"
            )
        return replace(self, call=rows[0][_HEADER - 2]), found

    def meet(self, part: int) -> Callable[[], None]:
        """Begin to make sure that all processes are at this part (from 1) of this call's backward.

        Returns:
            What waits for them, and raises a RuntimeError, in all of them, if they are not.
        """
        wait = self._announce([part, self.call, 0], [])
        return lambda: self._check_together(wait())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for the others: the transport's errors say who waits for whom.

        Raises:
            RuntimeError: the group's timeout has passed, or a process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            members = ", ".join(str(dist.get_global_rank(self.group, rank)) for rank in range(self.size))
            raise RuntimeError(
                f"{self.op}: {self.process(self.rank)} lost the others of processes {members}, "
                f"of which one has ended, or did not come within the group's timeout: {error}"
            ) from error

    def _announce(self, header: list[int], fields: list[int | Tensor]) -> Callable[[], list[list[int]]]:
        """Begin to tell all what this process does; what is returned waits, and gives what each of them does."""
        numbers = [*_as_words(self.op), *header, *(0 if isinstance(x, Tensor) else x for x in fields)]
        own = torch.zeros(_FIELDS, dtype=torch.int64, device=self._note_device())
        own[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        for place, x in enumerate(fields, _HEADER):
            if isinstance(x, Tensor):
                own[place] = x
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        with self.waiting():
            work = dist.all_gather(gathered, own, group=self.group, async_op=True)

        def wait() -> list[list[int]]:
            with self.waiting():
                work.wait()
                rows: list[list[int]] = torch.stack(gathered).tolist()
                return rows

        return wait

    def _check_together(self, rows: list[list[int]]) -> None:
        """Raise an error, the same in all processes, unless all do the same."""
        # Before they have agreed on a call, each process has a number of its own for it.
        places = [row[: _NAME + 2] if row[_NAME] else row[: _NAME + 1] for row in rows]
        other = next((rank for rank, place in enumerate(places) if place != places[0]), None)
        if other is None:
            return
        first, second = (f"{self.process(rank)} is in {_spelled(places[rank])}" for rank in (0, other))
        error = RuntimeError if any(row[_NAME] for row in rows) else ValueError
        raise error(f"{self.op}: {first}, {second}; expected the same calls and backwards in the same order in all")

    def _backends(self) -> dict[str, str]:
        """The group's backend for each type of device."""
        pairs = dist.get_backend_config(self.group).split(",")
        return {kind: backend for kind, backend in (pair.split(":", 1) for pair in pairs)}

    def _note_device(self) -> torch.device:
        """Where notes are written: on the CPU if the group can send from there, so that no device is waited for."""
        kinds = self._backends()
        if "cpu" in kinds:
            return torch.device("cpu")
        kind = next(iter(kinds))
        return torch.device(kind, torch.get_device_module(kind).current_device())


def _as_words(name: str) -> list[int]:
    """A name of at most 8 * _NAME bytes, as integers."""
    data = name.encode().ljust(8 * _NAME, b"\0")
    return [int.from_bytes(data[at : at + 8], "little", signed=True) for at in range(0, len(data), 8)]


def _spelled(place: list[int]) -> str:
    """Where a process is, from the beginning of its note."""
    name = b"".join(word.to_bytes(8, "little", signed=True) for word in place[:_NAME]).rstrip(b"\0").decode()
    part, *number = place[_NAME:]
    return f"part {part} of the backward of call {number[0]}, of {name}" if part else f"a call of {name}"


def digest(value: Any) -> int:
    """64 bits that stand for an option: equal for equal options. Of a tensor, shape and dtype count."""
    return int.from_bytes(hashlib.blake2b(repr(_plain(value)).encode(), digest_size=8).digest(), "little", signed=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    return value


def checksum(x: Tensor | None) -> int | Tensor:
    """64 bits that stand for the integers in x, computed where they are."""
    if x is None:
        return digest(None)
    mixed = x.to(torch.int64) + _ODD[0] * torch.arange(1, len(x) + 1, device=x.device)
    for odd in _ODD[1:]:
        mixed = (mixed ^ (mixed >> 31)) * odd
    return mixed.sum()


def wanting(tensors: Iterable[Tensor | None]) -> int:
    """A bit for each tensor that this process needs the gradient of."""
    needs = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
    return sum(need << place for place, need in enumerate(needs))


def wanted(masks: list[int], count: int) -> tuple[bool, ...]:
    """For each of `count` tensors whether any process needs its gradient."""
    union = functools.reduce(int.__or__, masks, 0)
    return tuple(bool(union >> place & 1) for place in range(count))


def ranges(counts: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Where parts of these sizes begin and end when they lie one after the other."""
    return tuple(pairwise(accumulate(counts, initial=0)))


def shares(total: int, parts: int, unit: int = 1) -> list[int]:
    """`total` as a sum of `parts` numbers that differ by one `unit` at most; `total` is a multiple of it."""
    each, more = divmod(total // unit, parts)
    return [unit * (each + (part < more)) for part in range(parts)]


def of_rank(seed: int, rank: int) -> int:
    """A seed of dropout for each process: the first has the common one, as if it were alone."""
    # Hashed rather than added to: the seeds of a run are often numbers that follow each other.
    if rank == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {rank}".encode(), digest_size=8).digest(), "little", signed=True)


@contextlib.contextmanager
def checking(op: str, inner: str) -> Iterator[None]:
    """Around a call of the operation `inner` for its checks alone, whose errors name `op`, which the user called."""
    try:
        with torch.no_grad():
            yield
    except (RuntimeError, TypeError, ValueError) as error:
        if not str(error).startswith(f"{inner}: "):
            raise
        raise type(error)(op + str(error).removeprefix(inner)) from None


def no_tokens(x: Any) -> Any:
    """Lengths or offsets like x, of sequences without tokens."""
    return torch.zeros_like(x) if isinstance(x, Tensor) else x


def stand_in(x: Tensor, *shape: int) -> Tensor:
    """A tensor of any shape, of one element in memory: for checks that look at no value."""
    return x.detach().new_zeros(()).expand(shape)


def not_compiled(function: Function) -> Function:
    """Keep torch.compile out of `function`: the host decides there, from what other processes say."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Decorating with torch.compiler.disable would import the whole of torch.compile, seconds of it, for everyone.
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    return call  # type: ignore[return-value]

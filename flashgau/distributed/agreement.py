"""What the processes of a group tell each other before a call: sizes, options, and whether an argument is wrong.

A collective that one process enters and another does not waits until it times out. So nothing is sent before all have
seen, in one small all-gather, that all go on; what is wrong in one process raises an error in all of them.
"""

from __future__ import annotations

import functools
import hashlib
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_FIELDS = 32  # of every note, whichever the operation: processes that call different ones must not wait
_HEADER = 2
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


@dataclass(frozen=True)
class Team:
    """The processes that share one call.

    Attributes:
        op: the name of the operation, for errors.
        group: of torch.distributed.
        rank: the number of this process in the group.
        size: the number of processes.
    """

    op: str
    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, op: str, group: Any) -> Team:
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
        if found is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{op}: `group` does not hold process {dist.get_rank()}; expected a group that does")
        if not isinstance(found, dist.ProcessGroup):
            expected = "a torch.distributed.ProcessGroup or None"
            raise TypeError(f"{op}: `group` is a {type(group).__name__}; expected {expected}")
        return cls(op, found, dist.get_rank(found), dist.get_world_size(found))

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

    def agree(self, check: Callable[[], Note]) -> dict[str, list[int]]:
        """Check the arguments in every process, and return the fields of all their notes, by process.

        Every process of the group must call this. It waits for the others (and for the device, if the group sends
        from there).

        Raises:
            Exception: what `check` raised in this process.
            ValueError: an argument was refused in another process, or differs between them.
        """
        error: Exception | None = None
        fields: dict[str, int | Tensor] = {}
        try:
            note = check()
            fields = note.fields()
        except Exception as caught:
            error = caught
        names = list(fields)
        header = [digest(self.op), int(error is not None)]
        own = torch.zeros(_FIELDS, dtype=torch.int64, device=self._note_device())
        plain = [0 if isinstance(x, Tensor) else x for x in fields.values()]
        own[: _HEADER + len(plain)] = torch.tensor(header + plain, dtype=torch.int64)
        for place, x in enumerate(fields.values(), _HEADER):
            if isinstance(x, Tensor):
                own[place] = x
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self.group)
        notes: list[list[int]] = torch.stack(gathered).tolist()

        if error is not None:
            raise error
        for rank, (op, failed, *_) in enumerate(notes):
            if op != header[0]:
                raise ValueError(f"{self.op}: process {rank} called another operation; expected the same in all")
            if failed:
                raise ValueError(
                    f"{self.op}: process {rank} refused its arguments, and reports what is wrong with them"
                )
        found = {name: [row[place] for row in notes] for place, name in enumerate(names, _HEADER)}
        for name in [*note.sizes, *note.options]:
            first = found[name][0]
            other = next((rank for rank, value in enumerate(found[name]) if value != first), None)
            if other is None:
                continue
            if name in note.sizes:
                has = f"has {name} = {found[name][other]}; expected {name} = {first}, as process 0 has"
                raise ValueError(f"{self.op}: process {other} {has}")
            raise ValueError(
                f"{self.op}: `{name}` of process {other} is not that of process 0; expected the same in all"
            )
        return found

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

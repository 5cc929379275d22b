"""What is alike in every context-parallel function: what it checks, what its processes agree on, and the way there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashgau.contract.validate import Arguments

from .agreement import GroupContext, Note, checking, checksum, digest, no_tokens, stand_in, wanted, wanting
from .exchange import Meeting, Turn, exchange

_TOKENS = ("M", "N")  # axes that may differ between the processes


@dataclass(frozen=True)
class Call:
    """The arguments of one call in this process.

    Attributes:
        context: the processes.
        operation: what is computed, of one process's arguments: a public function of `flashgau.ops`.
        slices: this process's part of each tensor and the names of its axes, in the order of `operation`'s arguments.
            Only `gate` may be None.
        options: the same in every process.
        parameters: tensors that are whole in every process.
        sequences: lengths and offsets of whole rows.
    """

    context: GroupContext
    operation: Callable[..., Any]
    slices: dict[str, tuple[Tensor | None, str]]
    options: dict[str, Any]
    parameters: dict[str, Tensor | None]
    sequences: dict[str, Tensor | None]

    def check(self, **more: Any) -> Arguments:
        """Refuse what is wrong in this process; `more` are arguments of the operation beside what the call has."""
        args = Arguments(self.context.op)
        given = {name: (x, axes) for name, (x, axes) in self.slices.items() if x is not None or name != "gate"}
        for name, (x, axes) in given.items():
            args.tensor(name, x, axes)
        name, (x, _) = next(iter(given.items()))
        assert x is not None
        self.context.check_device(name, x)
        with checking(self.context.op, self.operation.__name__):
            # Sequences without tokens: all checks of the options, and no work.
            none = [None if x is None else x.narrow(_tokens(axes), 0, 0) for x, axes in self.slices.values()]
            empty = {name: no_tokens(x) for name, x in self.sequences.items()}
            self.operation(*none, **self.parameters, **empty, **self.options, **more)
        return args

    def note(self, args: Arguments, alike: dict[str, int | Tensor], own: dict[str, int | Tensor]) -> Note:
        """What the others must know of the call: `alike` must be the same in all processes, `own` may differ."""
        first, (x, _) = next(iter(self.slices.items()))
        assert x is not None
        return Note(
            sizes={name: size for name, size in args.sizes.items() if name not in _TOKENS},
            options={
                **{name: digest(value) for name, value in self.options.items()},
                f"{first}.dtype": digest(x.dtype),
                f"{first}.device": digest(x.device.type),
                **{name: digest(value) for name, value in self.parameters.items()},
                **{name: checksum(value) for name, value in self.sequences.items()},
                **alike,
                "torch.is_grad_enabled()": torch.is_grad_enabled(),
            },
            own={
                **{name: size for name, size in args.sizes.items() if name in _TOKENS},
                "needs": wanting(self.tensors),
                "shared": wanting(self.parameters.values()),
                **own,
            },
        )

    def agree(self, check: Callable[[], Note]) -> tuple[Call, dict[str, list[int]]]:
        """The call with its number, and what each process has said of it: see `GroupContext.agree`."""
        context, agreed = self.context.agree(check)
        return replace(self, context=context), agreed

    def whole(self, agreed: dict[str, list[int]]) -> Arguments:
        """The sizes of the whole, which processes check alike, so that they raise alike."""
        args = Arguments(self.context.op)
        for name, (x, axes) in self.slices.items():
            if x is not None:
                sizes = [
                    sum(agreed[axis]) if axis in _TOKENS else size
                    for axis, size in zip(axes.split(), x.shape, strict=True)
                ]
                args.tensor(name, stand_in(x, *sizes), axes)
        return args

    @property
    def tensors(self) -> list[Tensor | None]:
        """This process's slices."""
        return [x for x, _ in self.slices.values()]

    def needed(self, agreed: dict[str, list[int]]) -> dict[str, bool]:
        """Whether any process needs the gradient of each tensor."""
        return dict(zip(self.slices, wanted(agreed["needs"], len(self.slices)), strict=True))

    def exchanged(
        self,
        agreed: dict[str, list[int]],
        turns: Sequence[Turn],
        back: Turn,
        operate: Callable[..., Any],
    ) -> list[Tensor]:
        """This process's slices of the results of `operate`, which gets what `turns` give it of all processes' tensors.

        Args:
            agreed: what the processes have said of the call.
            turns: of each tensor.
            back: of every result.
            operate: the operation without the slices.
        """
        needed = list(self.needed(agreed).values())
        given = exchange(Meeting(self.context, 2), self.tensors, turns, needed)
        result = operate(*given)
        results = result if isinstance(result, tuple) else (result,)
        need = any(needed) or any(agreed["shared"])
        own = exchange(Meeting(self.context, 1), results, [back] * len(results), [need] * len(results))
        return [x for x in own if x is not None]


def _tokens(axes: str) -> int:
    """Which of the axes is that of the tokens."""
    return next(place for place, axis in enumerate(axes.split()) if axis in _TOKENS)

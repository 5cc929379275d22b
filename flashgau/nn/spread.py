"""A sequence of which this process holds a slice, and other processes the rest: what layers must know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Spread:
    """How a sequence is spread over processes, each of which holds a slice of its tokens, in the order of processes.

    `flashgau.distributed.spread_tokens` makes one. Layers and models take it as `spread=`: their input is then this
    process's slice, while `lengths` and `cu_seqlens` speak of the whole.

    Attributes:
        counts: tokens of each process.
        rank: the number of this process among them.
        attention: `flashgau.attention` over all of them.
        gau_attention: `flashgau.gau_attention` over all of them.
        mixed_chunk_attention: `flashgau.mixed_chunk_attention` over all of them.
        before: (B, n, w) -> (B, 1, w), of the token before this process's first; zeros where there is none.
        refuse: raises an error that this process has met alone, when the others have learned of it.

    Example:
        >>> import torch.distributed as dist
        >>> from flashgau.distributed import spread_tokens
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: without arguments
        >>> spread = spread_tokens(9)
        >>> spread.own, spread.total
        (slice(0, 9, None), 9)
        >>> dist.destroy_process_group()
    """

    counts: tuple[int, ...]
    rank: int
    attention: Callable[..., Any]
    gau_attention: Callable[..., Any]
    mixed_chunk_attention: Callable[..., Any]
    before: Callable[[Tensor], Tensor]
    refuse: Callable[[Exception], NoReturn]

    @property
    def start(self) -> int:
        """Where in the whole this process's first token stands."""
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        """This process's tokens, of the whole."""
        return slice(self.start, self.start + self.counts[self.rank])

    @property
    def total(self) -> int:
        """Tokens of the whole."""
        return sum(self.counts)


def check_spread(caller: str, spread: Spread, x: Tensor, **alone: Any) -> None:
    """Refuse an input of other tokens than this process's, and arguments that have no meaning with a slice.

    Args:
        caller: the layer.
        spread: what it was given.
        x: its input, `x` (B, n, d) or `tokens` (B, n).
        alone: arguments by name, which must be None or False.
    """
    if not isinstance(spread, Spread):
        got = f"a {type(spread).__name__}"
        raise TypeError(f"{caller}: `spread` is {got}; expected what `flashgau.distributed.spread_tokens` gives")
    count = spread.counts[spread.rank]

    def check() -> None:
        if x.ndim < 2 or x.shape[1] != count:
            name = "x" if x.is_floating_point() else "tokens"
            raise ValueError(
                f"{caller}: `{name}` has shape {tuple(x.shape)}; expected {count} tokens, which `spread` has for "
                f"process {spread.rank} of {len(spread.counts)}"
            )
        for name, value in alone.items():
            if value is not None and value is not False:
                raise ValueError(f"{caller}: `{name}` and `spread` together; expected one of them")

    checked(spread, check)


def checked(spread: Spread | None, check: Callable[[], Result]) -> Result:
    """What `check` gives; an error of it is told to the other processes first, which would wait for this one."""
    if spread is None:
        return check()
    try:
        return check()
    except Exception as error:
        spread.refuse(error)


def first_position(spread: Spread | None) -> int:
    """Where the first token stands of those that a layer is given."""
    return 0 if spread is None else spread.start

"""`spread_tokens`: what makes layers and models compute their part of a sequence that is spread over processes."""

from __future__ import annotations

from functools import partial
from math import lcm
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashgau.nn import Spread

from .agreement import GroupContext, Note, digest, not_compiled, ranges, shares, wanted, wanting
from .attention import context_parallel_attention
from .exchange import Meeting, Turn, exchange
from .gau import context_parallel_gau
from .mixed_chunk import context_parallel_mixed_chunk

_OP = "spread_tokens"


def spread_tokens(tokens: int, group: dist.ProcessGroup | DeviceMesh | None = None) -> Spread:
    """How a sequence is spread over the processes of a group, for the `spread=` of flashgau's layers and models.

    Every process of the group must call this, once for all layers and steps with the same slices: they tell each other
    how many tokens each has. With it a layer gives this process's slice of what it gives for the whole: positions and
    relative biases are those of the whole, the operation is that of `flashgau.distributed`, and a token shift takes the
    token before the slice from the process that has it. Gradients of the input are those of the whole; those of
    parameters are this process's share, and their sum over the processes is the gradient.

    What a slice may be, and what every process must do, the operations say: with `FLASH` and `MultiHeadMixedChunk` for
    one, slices are whole chunks but for the last one. `cut_tokens` makes such.

    Args:
        tokens: how many this process has, 0 or more.
        group: the processes, as a group or a `DeviceMesh` of one dimension; the default group unless given.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a process does not come within the group's timeout.
        TypeError, ValueError: `tokens` is no such number, in any of the processes; there is no such group.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from flashgau.distributed import spread_tokens
        >>> from flashgau.models import CausalLM
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: without arguments
        >>> model, own = CausalLM("flash-tiny"), torch.randint(256, (2, 100))  # this process's tokens
        >>> model(own, spread=spread_tokens(100)).shape
        torch.Size([2, 100, 256])
        >>> dist.destroy_process_group()
    """
    context = GroupContext.of(_OP, group)

    def check() -> Note:
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise TypeError(f"{_OP}: `tokens` is a {type(tokens).__name__}; expected an int, this process's tokens")
        if tokens < 0:
            raise ValueError(f"{_OP}: `tokens` is {tokens}; expected 0 or more")
        return Note({}, {}, {"tokens": tokens})

    _, agreed = context.agree(check)
    counts = tuple(agreed["tokens"])
    return Spread(
        counts=counts,
        rank=context.rank,
        attention=partial(context_parallel_attention, group=context.group),
        gau_attention=partial(context_parallel_gau, group=context.group),
        mixed_chunk_attention=partial(context_parallel_mixed_chunk, group=context.group),
        before=partial(_before, context.group, counts),
        refuse=partial(_refuse, context.group),
    )


def cut_tokens(length: int, parts: int, module: nn.Module | None = None) -> list[slice]:
    """Slices of a sequence for so many processes: as equal as whole chunks of the module's layers allow.

    Args:
        length: tokens of the whole.
        parts: how many slices.
        module: what they are for; None where nothing has chunks.

    Raises:
        ValueError: there are fewer chunks (without any: tokens) than slices.

    Example:
        >>> from flashgau.distributed import cut_tokens
        >>> from flashgau.nn import FLASH
        >>> cut_tokens(1000, 2, FLASH(8, key_dim=4, chunk_size=256))
        [slice(0, 512, None), slice(512, 1000, None)]
    """
    sizes = [size for m in (module.modules() if module else ()) if isinstance(size := getattr(m, "chunk_size", 1), int)]
    chunk = lcm(*sizes)
    chunks = -(-length // chunk)
    if not 1 <= parts <= chunks:
        raise ValueError(
            f"cut_tokens: `parts` is {parts}; expected 1 to {chunks}, as a `length` of {length} tokens has {chunks} "
            f"chunks of {chunk}"
        )
    return [slice(a, min(b, length)) for a, b in ranges(shares(chunk * chunks, parts, chunk))]


@not_compiled
def _before(group: dist.ProcessGroup, counts: tuple[int, ...], x: Tensor) -> Tensor:
    """The token before this process's first: of its slice (B, n, w) -> (B, 1, w)."""
    context = GroupContext.of("token_shift", group)

    def check() -> Note:
        context.check_device("x", x)
        options: dict[str, int | Tensor] = {
            "dtype": digest(x.dtype),
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
        }
        return Note({"B": x.shape[0], "d": x.shape[-1]}, options, {"needs": wanting([x])})

    context, agreed = context.agree(check)
    held = ranges(counts)
    turn = Turn.fetching(1, [(max(start - 1, 0), start) for start, _ in held], held, context.rank)
    (row,) = exchange(Meeting(context, 1), [x], [turn], wanted(agreed["needs"], 1))
    assert row is not None
    return F.pad(row, (0, 0, 1 - row.shape[1], 0))


def _refuse(group: dist.ProcessGroup, error: Exception) -> NoReturn:
    """Raise the error here, and one that names this process in the others, which are at their next operation."""

    def check() -> Note:
        raise error

    GroupContext.of("a layer", group).agree(check)
    raise error

"""Options that choose kernels, and shapes of their calls: the same of `flashgau compile` and `flashgau tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flashgau.cli.console import USAGE, fail
from flashgau.cli.doctor import OPERATIONS

if TYPE_CHECKING:
    from flashgau.tuning.shipped import CallShape

Op = Annotated[str | None, typer.Option(metavar="NAMES", help=f"Only these operations: {', '.join(OPERATIONS)}.")]
Shapes = Annotated[
    str | None, typer.Option(metavar="WIDTHS", help="Only these classes of the head dimension, such as 64,128.")
]
Kernel = Annotated[str | None, typer.Option(metavar="NAMES", help="Only these kernels, as `tune --show` calls them.")]
Batch = Annotated[int, typer.Option(metavar="B", min=1, max=2**16, help="Sequences of a call.")]
Heads = Annotated[int, typer.Option(metavar="H", min=1, max=1024, help="Query heads of a call of attention.")]
KvHeads = Annotated[
    int | None, typer.Option(metavar="H", min=1, max=1024, help="Its key heads; as many, unless given.")
]


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def operations(command: str, op: str | None) -> frozenset[str] | None:
    """The operations of `--op`, and what comes with them; None for all."""
    from flashgau.verification.configurations import with_beside

    if op is None:
        return None
    names = set(words(op))
    if unknown := sorted(names - set(OPERATIONS)):
        fail(command, f"no operation is called {unknown[0]!r}; there are {', '.join(OPERATIONS)}", USAGE)
    return with_beside(names)


def kernels(command: str, kernel: str | None, known: frozenset[str]) -> frozenset[str] | None:
    """The kernels of `--kernel`; None for all."""
    if kernel is None:
        return None
    names = set(words(kernel))
    if unknown := sorted(names - known):
        fail(command, f"no kernel is called {unknown[0]!r}; there are {', '.join(sorted(known))}", USAGE)
    return frozenset(names)


def dtypes(command: str, dtype: str | None) -> tuple[str, ...] | None:
    """The dtypes of `--dtype`; None for all."""
    from flashgau.tuning.shipped import DTYPES

    if dtype is None:
        return None
    names = tuple(words(dtype))
    if not names or not set(names) <= set(DTYPES):
        fail(command, f"--dtype is {dtype!r}; expected some of bf16, fp16 and fp32, separated by commas", USAGE)
    return names


def widths(command: str, shapes: str | None) -> tuple[int, ...] | None:
    """The classes of `--shapes`; None for all."""
    if shapes is None:
        return None
    found = words(shapes)
    if not found or not set(found) <= {"64", "128", "256"}:
        fail(command, f"--shapes is {shapes!r}; expected some of 64, 128 and 256, separated by commas", USAGE)
    return tuple(int(word) for word in found)


def call_shape(
    command: str, length: int | None, batch: int, heads: int, kv_heads: int | None, width: int | None
) -> CallShape:
    """The shape of `--length`, `--batch`, `--heads`, `--kv-heads` and `--width`."""
    from flashgau.tuning.shipped import CallShape

    if heads % (kv_heads or heads):
        fail(command, f"--kv-heads is {kv_heads} of --heads {heads}; expected a divisor", USAGE)
    return CallShape(length, batch, heads, None if kv_heads == heads else kv_heads, width)

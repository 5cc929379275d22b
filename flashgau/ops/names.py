"""The names in the declaration of an operation, separated by spaces, and values grouped by them.

`x` is a tensor, `x?` one that may be None, `x+` one that may be None and is added to the first result, whose gradient
it gets, `x!` one that is written, `xs:y` a list with a tensor for each row of the input y, and `xs*` a list of any
length, at the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple


class Name(NamedTuple):
    """One name of a declaration, with its mark, and the input that tells a list's length."""

    name: str
    mark: str
    of: str

    @property
    def is_list(self) -> bool:
        """Whether it stands for several tensors."""
        return self.mark in (":", "*")

    @property
    def schema(self) -> str:
        """The argument in PyTorch's language of schemas."""
        if self.mark == "!":
            return f"Tensor({self.name}!) {self.name}"
        return f"Tensor{'[]' if self.is_list else '?' if self.mark else ''} {self.name}"


def names(declared: str, prefix: str = "", mark: str = "") -> list[Name]:
    """The names of a declaration; those without a mark get the given one."""
    parts = [re.findall(r"^(\w+)([?+*:!]?)(\w*)$", word)[0] for word in declared.split()]
    return [Name(prefix + name, own or mark, of) for name, own, of in parts]


def grouped(declared: list[Name], values: Iterable[Any], sizes: dict[str, int]) -> dict[str, Any]:
    """Values by name: as many as stated for a list, or all that are left."""
    rest = iter(values)
    if not sizes and declared[-1].mark != "*":
        return dict(zip((x.name for x in declared), rest, strict=False))
    return {x.name: list(islice(rest, sizes.get(x.name))) if x.is_list else next(rest) for x in declared}


def flat(values: Iterable[Any]) -> list[Any]:
    """The values, and those in lists among them, in one list."""
    values = list(values)
    if not any(isinstance(value, (list, tuple)) for value in values):
        return values
    return [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]

"""What torch.vmap maps, as more rows of one call: the mapped axis joins the axis that rows have anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Which tensors of an operation have an axis of rows first, and nothing in a row depends on another: all but these.

    Attributes:
        shared: inputs that all rows share. Their gradients are sums over rows.
        single: tensors that stand in the way if they are given: what they say holds for one call's rows.
        any_axes: rows have any number of axes, not one.
    """

    shared: str = ""
    single: str = ""
    any_axes: bool = False

    def of_backward(self) -> Rows:
        """Those of the backward, which gives the gradients of all inputs."""
        return Rows("", f"{self.shared} {self.single}", self.any_axes)


class Folding:
    """How one operator takes all entries of a mapped axis in a single call.

    Args:
        arguments: names in the order of the operator.
        rows: which of them have rows.
    """

    def __init__(self, arguments: Sequence[str], rows: Rows) -> None:
        shared, single = rows.shared.split(), rows.single.split()
        self._kinds = ["single" if x in single else "shared" if x in shared else "rows" for x in arguments]
        self._any_axes = rows.any_axes

    def folded(self, size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> list[Any] | None:
        """The arguments of the one call, or None where entries must be called one by one."""
        found = []
        for x, axis, kind in zip(args, in_dims, self._kinds, strict=True):
            if isinstance(x, Tensor):
                if kind == "single" or (kind == "shared" and axis is not None):
                    return None
                if kind == "rows":
                    x = x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
                    if x.shape == (size, 0):
                        x = x.new_empty(0)  # which stands for None
                    elif not self._any_axes:
                        if x.dim() < 2 or x.shape[1] == 0:
                            return None
                        x = x.flatten(0, 1)
            elif isinstance(x, (list, tuple)) and any(isinstance(part, Tensor) for part in x):
                return None
            found.append(x)
        return found

    def unfolded(self, size: int, results: Sequence[Tensor]) -> list[Tensor]:
        """The results with the mapped axis first; an empty tensor in place of None stays one for each entry."""
        rows = []
        for x in results:
            if x.shape == (0,):
                rows.append(x.new_empty(size, 0))
            else:
                rows.append(x if self._any_axes else x.unflatten(0, (size, -1)))
        return rows

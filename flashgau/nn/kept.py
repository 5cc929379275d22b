"""What layers make once and keep, in no saved module: tables over positions, which they share, and W^T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .. import pytorch

_LEAST = 2**8  # positions, of a first table


class _Tables:
    """Tables of more and more positions: a longer one takes the place of a shorter.

    That one stays in memory, because a CUDA graph may read it: together they are shorter than the last.
    """

    def __init__(self) -> None:
        self.longest = -1
        self.made: list[tuple[Tensor, ...]] = []
        # The rows that were asked for last, which every layer asks for when decoding: their bounds, how many positions
        # the tables have, and they.
        self.last: tuple[int, int, int, tuple[Tensor, ...]] = 0, 0, -1, ()


# For all layers that ask for the same; with the last of them they are freed.
_shared: WeakValueDictionary[Any, _Tables] = WeakValueDictionary()


class Kept:
    """What a layer holds of shared tables. A copy of it, or what is pickled, holds nothing."""

    def __init__(self) -> None:
        self._held: dict[Any, _Tables] = {}

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()

    def get(
        self, key: Any, x: Tensor, count: int, most: int, make: Callable[[int], tuple[Tensor, ...]]
    ) -> tuple[int, tuple[Tensor, ...]] | None:
        """The tables that `make` made for at least `count` positions, and for how many. To be read only.

        None where the caller must make its own: for more than `most` positions, while a program is traced or a
        transform of torch.func is at work, whose tensors do not outlive it, and while a CUDA graph is captured, whose
        memory is filled when it runs.

        Args:
            key: what the tables depend on, but the number of positions.
            x: a tensor of the call.
            count: of positions.
            most: of positions that are kept.
            make: positions -> tables on the device of x.
        """
        if torch.compiler.is_compiling() or count > most:
            return None
        if type(x) not in (Tensor, nn.Parameter) or pytorch.transforms_active():
            return None
        tables = self._held.get(key)
        if tables is None:
            tables = self._held[key] = _shared.setdefault(key, _Tables())
        if tables.longest < count:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            longer = max(_LEAST, 1 << (count - 1).bit_length())
            with torch.inference_mode(False), torch.no_grad():
                tables.made.append(make(longer))
            if x.is_cuda:
                torch.cuda.current_stream(x.device).synchronize()  # other streams will read them
            tables.longest = longer
        return tables.longest, tables.made[-1]

    def rows(
        self, key: Any, x: Tensor, start: int, stop: int, most: int, make: Callable[[int], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...] | None:
        """Rows `start` to `stop` of those tables."""
        found = self.get(key, x, stop, most, make)
        if found is None:
            return None
        longest, whole = found
        *known, rows = self._held[key].last
        if known != [start, stop, longest]:
            rows = tuple(table[start:stop] for table in whole)
            self._held[key].last = start, stop, longest, rows
        return rows


class Turned:
    """A matrix's transpose, contiguous, kept until the matrix is replaced or written. A copy of it holds nothing.

    A write through `.data` counts as none: PyTorch does not tell. Who writes so calls `forget`.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Free it."""
        self._of: tuple[int, int] | None = None
        self._held: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> Turned:
        return Turned()

    def __reduce__(self) -> Any:
        return Turned, ()

    def get(self, w: Tensor) -> Tensor | None:
        """The transpose of a matrix on a CPU; None while a program is traced, and where writes are not counted."""
        if torch.compiler.is_compiling() or type(w) not in (Tensor, nn.Parameter) or w.device.type != "cpu":
            return None
        written = pytorch.writes_of(w)
        if written is None:
            return None
        if self._of != (w.data_ptr(), written) or self._held is None:
            with torch.inference_mode(False), torch.no_grad():
                self._held = w.detach().T.contiguous()
            self._of = w.data_ptr(), written
        return self._held

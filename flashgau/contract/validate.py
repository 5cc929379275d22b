"""Checks of arguments before any work: every message names the argument, what came and what was expected."""

from __future__ import annotations

import itertools
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from .. import pytorch

_DENSE = torch.strided
_PLAIN = (Tensor, torch.nn.Parameter)
# What counts as a number: also one that is only known when a traced program runs.
_WHOLE, _REAL = (numbers.Integral, torch.SymInt), (numbers.Real, torch.SymInt, torch.SymFloat)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OFFSETS = (torch.int32, torch.int64)
_NARROW = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64)
_INTEGERS = (*_OFFSETS, *_NARROW)


class Arguments:
    """The arguments of one call. Sizes are named by letters and bound by the first tensor that shows them.

    >>> args = Arguments("attention")
    >>> args.tensor("q", torch.zeros(2, 4, 9, 8), "B Hq M D")
    >>> args.tensor("k", torch.zeros(2, 2, 9, 6), "B Hkv N D")
    Traceback (most recent call last):
    ...
    ValueError: attention: `k` has shape (2, 2, 9, 6); expected (B, Hkv, N, D) with B = 2 and D = 8 as in `q`
    """

    def __init__(self, op: str, names: Mapping[str, str] | None = None) -> None:
        self.op = op
        self.names = names  # what the caller calls an argument that has another name here
        self.sizes: dict[str, int] = {}
        self._origin: dict[str, str] = {}
        self._first: tuple[str, Tensor] | None = None

    def fail(self, argument: str, got: str, expected: str, error: type[Exception] = ValueError) -> NoReturn:
        """Raise the one kind of message there is."""
        message = f"`{argument}` {got}; expected {expected}"
        if names := self.names:
            message = re.sub(r"`(\w+)", lambda found: f"`{names.get(found[1], found[1])}", message)
        raise error(f"{self.op}: {message}")

    def tensor(self, name: str, x: Any, axes: str) -> None:
        """A floating tensor whose axes have these names; `...` first stands for any number of leading axes.

        The first tensor of the call sets the device and dtype of the others.
        """
        if type(x) not in _PLAIN:
            self._refuse_kind(name, x, f"a torch.Tensor of shape {_spelled(axes)}")
        dtype = x.dtype
        if dtype not in FLOATING:
            self.fail(name, f"has dtype {dtype}", "float16, bfloat16, float32 or float64", TypeError)
        if x.layout != _DENSE:
            self.fail(name, f"has layout {x.layout}", "a dense tensor", TypeError)
        if self._first is None:
            self._first = name, x
        else:
            self._same_device(name, x)
            first_name, first = self._first
            if dtype != first.dtype:
                self.fail(name, f"has dtype {dtype}", f"{first.dtype} as `{first_name}` has", TypeError)
        if axes != "...":  # which any shape is
            self._shape(name, x, axes)

    def at_least_one(self, *letters: str) -> None:
        """Widths may not be zero."""
        for letter in letters:
            if self.sizes[letter] < 1:
                self.fail(self._origin[letter], f"has {letter} = 0", f"{letter} >= 1")

    def heads_in_groups(self) -> bool:
        """Whether Hq is a multiple of Hkv, so that each key head serves as many query heads as the others."""
        heads, kv_heads = self.sizes["Hq"], self.sizes["Hkv"]
        return heads % kv_heads == 0 if kv_heads else heads == 0

    def flag(self, name: str, value: Any) -> None:
        """True or False, not merely something true."""
        if not isinstance(value, bool):
            self.fail(name, f"is {value!r}", "True or False", TypeError)

    def flags(self, **values: Any) -> None:
        """Several of them."""
        for name, value in values.items():
            self.flag(name, value)

    def function(self, name: str, value: Any, like: str) -> None:
        """Something that can be called as another function is, or None."""
        if value is not None and not callable(value):
            self.fail(name, f"is a {type(value).__name__}", f"a function that is called as {like}, or None", TypeError)

    def choice(self, name: str, value: Any, options: tuple[str, ...]) -> None:
        """One of a few words."""
        if value not in options:
            self.fail(name, f"is {value!r}", "one of " + ", ".join(map(repr, options)))

    def number(
        self,
        name: str,
        value: Any,
        expected: str,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        open_low: bool = False,
    ) -> None:
        """A finite real number within [low, high], or (low, high] for `open_low`."""
        if type(value) is not float and (isinstance(value, bool) or not isinstance(value, _REAL)):
            self.fail(name, f"is {value!r}", expected, TypeError)
        x = float(value)
        # Not math.isfinite: it cannot be traced with a symbolic number, as torch.compile(dynamic=True) has.
        if not -math.inf < x < math.inf or x < low or x > high or (open_low and x == low):
            self.fail(name, f"is {value!r}", expected)

    def integer(self, name: str, value: Any, low: int, expected: str) -> None:
        """A whole number of at least `low`."""
        if isinstance(value, bool) or not isinstance(value, _WHOLE):
            self.fail(name, f"is {value!r}", expected, TypeError)
        if value < low:
            self.fail(name, f"is {value!r}", expected)

    def sequences(self, lengths: Any, cu_seqlens: Any, cu_seqlens_k: Any = None) -> int:
        """Check padding and packing, and return the length of the longest sequence (queries or keys).

        Values are read only where that costs nothing: on the CPU and outside a traced graph. Elsewhere the answer
        is the size of the axis for padding, and 0 (unknown) for packing.
        """
        queries = self.sizes.get("M", self.sizes["N"])
        longest = max(queries, self.sizes["N"])
        if lengths is not None and cu_seqlens is not None:
            self.fail("cu_seqlens", "was given together with `lengths`", "at most one of padding and packing")
        if cu_seqlens_k is not None and cu_seqlens is None:
            self.fail("cu_seqlens_k", "was given without `cu_seqlens`", "both or neither")
        if lengths is not None:
            values = self.counts("lengths", lengths)
            if values is not None:
                longest = max([*values, 0 if queries == self.sizes["N"] else queries])
        if cu_seqlens is not None:
            if self.sizes["B"] != 1:
                self.fail(self._origin["B"], f"has B = {self.sizes['B']}", "B = 1 with `cu_seqlens`")
            if cu_seqlens_k is None and queries != self.sizes["N"]:
                self.fail(
                    "cu_seqlens",
                    f"was given with M = {queries} and N = {self.sizes['N']}",
                    "M = N or `cu_seqlens_k`",
                )
            longest = max(
                self.offsets("cu_seqlens", cu_seqlens, queries, "M" if "M" in self.sizes else "N"),
                self.offsets("cu_seqlens_k", cu_seqlens_k, self.sizes["N"], "N") if cu_seqlens_k is not None else 0,
            )
            if cu_seqlens_k is not None and cu_seqlens_k.shape != cu_seqlens.shape:
                got = f"has shape {tuple(cu_seqlens_k.shape)}"
                self.fail("cu_seqlens_k", got, f"{tuple(cu_seqlens.shape)} as `cu_seqlens` has")
        return longest

    def offsets(self, name: str, cu: Any, total: int, letter: str) -> int:
        """Ends of packed sequences after a leading 0; the length of the longest, 0 where values are not read."""
        self._integers(name, cu, _OFFSETS)
        if cu.dim() != 1 or cu.shape[0] < 1:
            self.fail(name, f"has shape {tuple(cu.shape)}", "(G+1,), the G sequences' ends after a leading 0")
        if not readable(cu):
            return 0
        values = _values(cu)
        if values[0] != 0 or values[-1] != total or any(a > b for a, b in itertools.pairwise(values)):
            self.fail(name, f"is {_short(values)}", f"non-decreasing offsets from 0 to {letter} = {total}")
        return max((b - a for a, b in itertools.pairwise(values)), default=0)

    def counts(self, name: str, x: Any, low: int = 0) -> list[int] | None:
        """(B,) integers of any type from `low` to N, of whatever has B and N; their values where those are readable."""
        self._integers(name, x, _INTEGERS)
        self._shape(name, x, "B")
        if not readable(x):
            return None
        values = _values(x)
        for value in values:
            if not low <= value <= self.sizes["N"]:
                self.fail(name, f"holds {value}", f"values from {low} to N = {self.sizes['N']}")
        return values

    def relative_bias(self, bias: Any, leading: str, longest: int, what: str = "the longest sequence") -> None:
        """A Toeplitz vector (..., 2P-1), broadcastable to the leading axes, with P >= `longest`."""
        if bias is None:
            return
        expected = f"(..., 2P-1) broadcastable to {_spelled(leading + ' 2P-1')}"
        self._floating_beside("rel_bias", bias, expected)
        lead = [self.sizes[letter] for letter in leading.split()]
        shape = tuple(bias.shape)
        fits = (
            1 <= len(shape) <= len(lead) + 1
            and all(
                size == 1 or size == want  # not `in`: symbolic sizes are in no tuple
                for size, want in zip(shape[:-1], lead[len(lead) + 1 - len(shape) :], strict=True)
            )
        )
        if not fits:
            named = " and ".join(f"{letter} = {self.sizes[letter]}" for letter in leading.split())
            self.fail("rel_bias", f"has shape {shape}", f"{expected} with {named}")
        if shape[-1] % 2 == 0:
            self.fail("rel_bias", f"has last axis {shape[-1]}", "an odd length 2P-1")
        if (shape[-1] + 1) // 2 < longest:
            self.fail(
                "rel_bias",
                f"covers P = {(shape[-1] + 1) // 2} (last axis {shape[-1]})",
                f"P >= {longest}, {what}, so a last axis of at least {2 * longest - 1}",
            )

    def per_head(self, name: str, x: Any, axes: str) -> None:
        """A floating tensor that may be fp32 beside half inputs."""
        self._floating_beside(name, x, _spelled(axes))
        self._shape(name, x, axes)

    def shaped(self, name: str, x: Tensor, axes: str) -> None:
        """A tensor of any kind whose axes have these names."""
        self._shape(name, x, axes)

    def indices(self, name: str, x: Any, axes: str) -> Tensor:
        """A tensor of integers whose axes have these names; narrow ones are widened, so that sums do not wrap."""
        self._integers(name, x, _INTEGERS)
        self._shape(name, x, axes)
        return widened(x)

    def held(self, name: str, x: Any) -> None:
        """A tensor of a state: on the device of the call's."""
        if type(x) not in _PLAIN:
            self._refuse_kind(name, x, "a torch.Tensor")
        self._same_device(name, x)

    def _refuse_kind(self, name: str, x: Any, expected: str) -> None:
        """Refuse what is no tensor, and a DTensor, whose numbers are in several processes."""
        if not isinstance(x, Tensor):
            self.fail(name, f"is a {type(x).__name__}", expected, TypeError)
        if hasattr(x, "to_local"):  # rather than ask for the class, which takes a second to import
            expected = "a plain tensor: x.to_local(), this process's part, or x.full_tensor(), the whole"
            self.fail(name, f"is a {type(x).__name__}", expected, TypeError)

    def _floating_beside(self, name: str, x: Any, expected: str) -> None:
        assert self._first is not None
        if type(x) not in _PLAIN:
            self._refuse_kind(name, x, f"a torch.Tensor of shape {expected}")
        dtype = self._first[1].dtype
        if x.dtype != dtype and x.dtype != torch.float32:
            self.fail(name, f"has dtype {x.dtype}", f"{dtype} as `{self._first[0]}` has, or float32", TypeError)
        self._same_device(name, x)

    def _integers(self, name: str, x: Any, dtypes: tuple[torch.dtype, ...]) -> None:
        if type(x) not in _PLAIN:
            self._refuse_kind(name, x, "an integer torch.Tensor")
        if x.dtype not in dtypes:
            expected = "an integer dtype" + (", int32 or int64" if dtypes is _OFFSETS else " such as int32")
            self.fail(name, f"has dtype {x.dtype}", expected, TypeError)
        self._same_device(name, x)

    def _same_device(self, name: str, x: Tensor) -> None:
        if self._first is not None and x.device != self._first[1].device:
            self.fail(name, f"is on {x.device}", f"{self._first[1].device} as `{self._first[0]}` is")

    def _shape(self, name: str, x: Tensor, axes: str) -> None:
        letters, shape, wrong = axes.split(), x.shape, False
        if letters[0] == "...":
            letters = letters[1:]
            shape = shape[max(0, len(shape) - len(letters)) :]
        if len(shape) != len(letters):
            wrong = True
        else:
            for letter, size in zip(letters, shape, strict=True):  # plain loops: most of what checking a call takes
                if letter not in self.sizes:
                    self.sizes[letter], self._origin[letter] = size, name
                elif self.sizes[letter] != size:
                    wrong = True
        if wrong:
            known = [letter for letter in letters if self._origin.get(letter, name) != name]
            origins = dict.fromkeys(self._origin[letter] for letter in known)
            given = " and ".join(f"{letter} = {self.sizes[letter]}" for letter in known)
            source = " and ".join(f"`{o}`" for o in origins)
            note = f" with {given} as in {source}" if known else ""
            self.fail(name, f"has shape {tuple(x.shape)}", _spelled(axes) + note)


Value = TypeVar("Value")


def widened(x: Value) -> Value:
    """Integers too narrow to compute with, as int64: 0 - 1 is 255 in uint8, and uint16 has no arithmetic at all."""
    narrow = isinstance(x, Tensor) and x.dtype in _NARROW
    return x.to(torch.int64) if narrow else x  # type: ignore[attr-defined]


def readable(x: Tensor) -> bool:
    """Whether the values can be looked at for free: on the CPU, and real rather than traced, mapped or fake."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) not in _PLAIN:
        return False
    return not pytorch.is_mapped(x)


def _values(x: Tensor) -> list[int]:
    try:
        return x.tolist()
    except RuntimeError:  # PyTorch 2.9 inside a transform of torch.func
        return [int(value) for value in x]


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as PyTorch's own attention does under autocast: floating tensors but fp64 to autocast's dtype."""
    if not pytorch.any_autocast():  # one question, where those below are four
        return tensors
    kind = next((t.device.type for t in tensors if isinstance(t, Tensor)), None)
    if kind is None or not torch.is_autocast_enabled(kind):
        return tensors
    target = torch.get_autocast_dtype(kind)
    return tuple(t.to(target) if isinstance(t, Tensor) and t.dtype in FLOATING[:3] else t for t in tensors)


def _spelled(axes: str) -> str:
    letters = axes.split()
    return f"({letters[0]},)" if len(letters) == 1 else f"({', '.join(letters)})"


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"

"""Operands of instructions as expressions on numpy arrays, and the functions that blocks of them become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import numbers
from .faults import UnknownInstruction
from .memory import SHARED_BASE
from .text import BITS, Instruction, Kernel

TYPES = {*BITS, "f16x2", "bf16x2", "tf32", "f32x2"}
WIDTH = {**BITS, "f16x2": 32, "bf16x2": 32, "tf32": 32, "f32x2": 64}
_SPECIAL = {"%tid.x": "m.tid[0]", "%tid.y": "m.tid[1]", "%tid.z": "m.tid[2]", "%ctaid.x": "m.ctaid[0]",
            "%ctaid.y": "m.ctaid[1]", "%ctaid.z": "m.ctaid[2]", "%ntid.x": "m.ntid[0]", "%ntid.y": "m.ntid[1]",
            "%ntid.z": "m.ntid[2]", "%nctaid.x": "m.nctaid[0]", "%nctaid.y": "m.nctaid[1]",
            "%nctaid.z": "m.nctaid[2]", "%laneid": "m.laneid", "%warpid": "m.warpid"}  # fmt: skip

NAMESPACE: dict[str, Any] = {
    "where": np.where, "np": np, "n": numbers, "u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64,
    "i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64, "f4": np.float32, "f8": np.float64,
}  # fmt: skip


def dtype_of(kind: str) -> str:
    """numpy's type of values of a PTX type."""
    size = WIDTH[kind] // 8
    if kind in ("f32", "f64"):
        return f"f{size}"
    return f"i{size}" if kind[0] == "s" else f"u{size}"


class Operands:
    """A kernel, its constants, and the lines of the function that is being written.

    Attributes:
        constants: what the functions refer to as `K`.
        numbers: of registers in `R`.
    """

    numbers: dict[str, int]
    parameters: dict[str, Any]
    block_of: dict[int, int]
    masked: bool
    accumulators: set[int]
    number: int
    x: Instruction
    active: str | None

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.numbers = {name: i for i, name in enumerate(kernel.registers)}
        self.constants: list[Any] = []
        self._known: dict[Any, int] = {}
        self.parameters = {p.name: p for p in kernel.parameters}
        self.block_of = {start: i for i, start in enumerate(kernel.starts)}
        self.lines: list[str] = []
        self.masked = False
        # Registers of products that run on while others do: what uses one is asked whether it was waited for.
        products = [x for x in kernel.instructions if x.name.startswith("wgmma.mma_async")]
        self.accumulators = {self.numbers[r] for x in products for r in tuple(x.operands[0])}  # type: ignore[arg-type]
        self.used: set[int] = set()

    # ---- functions of blocks ----

    def function(self, block: int, masked: bool) -> Callable[..., Any]:
        """`f(R, m, k)` of a basic block: changes registers, and says which block is next."""
        self.lines, self.masked = [], masked
        for number in self.kernel.span(block):
            self._instruction(number, self.kernel.instructions[number], block)
        if not self.lines or not self.lines[-1].startswith("return"):
            self.lines.append(f"return {block + 1}")
        source = "def f(R, m, k):\n" + "".join(f"    {line}\n" for line in self.lines)
        place: dict[str, Any] = {}
        code = compile(source, f"<{self.kernel.name}, block {block}{', masked' if masked else ''}>", "exec")
        exec(code, {**NAMESPACE, "K": self.constants}, place)
        function: Callable[..., Any] = place["f"]
        return function

    def _instruction(self, number: int, x: Instruction, block: int) -> None:
        head, parts = x.parts[0], x.parts
        self.number, self.x = number, x
        self.active = self._active(x)
        if head in ("bra", "ret", "exit"):
            target = -1 if head != "bra" else self.block_of.get(self.kernel.labels[str(x.operands[0])], -1)
            if x.predicate is None:
                self.lines.append(f"return {target}")
            else:
                self.lines.append(f"return ({self._predicate(x)}, {target}, {block + 1})")
            return
        method = getattr(self, f"_{head}", None)
        if method is None:
            raise self._unknown()
        self.used, first = set(), len(self.lines)
        method(parts, *x.operands)
        if self.used and not x.name.startswith("wgmma.mma_async"):
            line = f"if m.pending: m.check_pending({number}, {sorted(self.used)}, {self._threads})"
            self.lines.insert(first, line)

    def _unknown(self) -> UnknownInstruction:
        return UnknownInstruction(
            f"ptx: {self.kernel.name} has {self.x.text!r} at line {self.x.place.line} ({self.x.place.source}), which "
            f"is not executed"
        )

    def _predicate(self, x: Instruction) -> str:
        assert x.predicate is not None
        return f"{'~' if x.negated else ''}R[{self.numbers[x.predicate]}]"

    def _active(self, x: Instruction) -> str | None:
        """The threads that take part; None for all."""
        if x.predicate is None:
            return "k" if self.masked else None
        return f"(k & {self._predicate(x)})" if self.masked else self._predicate(x)

    @property
    def _threads(self) -> str:
        return self.active or "m.every"

    # ---- operands ----

    def _constant(self, value: Any) -> str:
        key = (type(value), value.tobytes() if isinstance(value, np.generic) else value)
        if key not in self._known:
            self._known[key] = len(self.constants)
            self.constants.append(value)
        return f"K[{self._known[key]}]"

    def _immediate(self, text: str, kind: str) -> str:
        if kind == "pred":
            return self._constant(np.bool_(int(text, 0) != 0))
        dtype = np.dtype(getattr(np, {"u": "uint", "i": "int", "f": "float"}[dtype_of(kind)[0]] + str(WIDTH[kind])))
        if text[:2] in ("0f", "0F"):
            bits = np.uint32(int(text[2:], 16))
            return self._constant(bits.view(np.float32) if kind == "f32" else dtype.type(bits))
        if text[:2] in ("0d", "0D"):
            wide = np.uint64(int(text[2:], 16))
            return self._constant(wide.view(np.float64) if kind == "f64" else dtype.type(wide))
        if text in self.kernel.shared:
            return self._constant(dtype.type(SHARED_BASE + self.kernel.shared[text][0]))
        try:
            value = int(text.rstrip("U"), 0)
        except ValueError:
            raise self._unknown() from None
        size = dtype.itemsize * 8
        bits = value % (1 << size)
        if dtype.kind == "f":
            return self._constant(dtype.type(value))
        return self._constant(np.array(bits, f"u{size // 8}").view(dtype)[()])

    def _number(self, register: str) -> int:
        number = self.numbers[register]
        if number in self.accumulators:
            self.used.add(number)
        return number

    def _is_register(self, operand: Any) -> bool:
        return isinstance(operand, str) and (operand in self.numbers or operand in _SPECIAL)

    def _value(self, operand: Any, kind: str) -> str:
        """An expression of the operand's value: halves as their bits, everything else as numpy's type of it."""
        if not isinstance(operand, str):
            raise self._unknown()
        if operand in _SPECIAL:
            text, bits = _SPECIAL[operand], 32
        elif operand in self.numbers:
            text, bits = f"R[{self._number(operand)}]", BITS[self.kernel.registers[operand]]
        else:
            return self._immediate(operand, kind)
        if kind == "pred" or bits == 1:
            return text
        width = WIDTH[kind]
        if bits != width:
            text = f"{text}.astype(u{width // 8})"
        return text if dtype_of(kind)[0] == "u" else f"{text}.view({dtype_of(kind)})"

    def _store(self, target: Any, text: str, kind: str, *, spread: bool = False) -> None:
        """R[target] = text, an expression of the type's values, for the threads that are active."""
        if target == "_":
            return
        if target not in self.numbers:
            raise self._unknown()
        register, bits = self._number(target), BITS[self.kernel.registers[target]]
        if spread:
            text = f"m.spread({text})"
        if kind != "pred":
            width = WIDTH[kind]
            if bits > width and kind[0] == "s":
                text = f"({text}).astype(i{bits // 8}).view(u{bits // 8})"
            elif dtype_of(kind)[0] != "u":
                text = f"({text}).view(u{width // 8})"
            if bits != width and kind[0] != "s":
                text = f"({text}).astype(u{bits // 8})"
        self.lines.append(
            f"R[{register}] = {text}"
            if self.active is None
            else f"R[{register}] = where({self.active}, {text}, R[{register}])"
        )

    def _spreads(self, *operands: Any) -> bool:
        return not any(self._is_register(x) for x in operands)

    def _computed(self, form: str, kind: str, target: Any, *operands: Any, result: str | None = None) -> None:
        """target = form of the operands' values."""
        values = [self._value(x, kind) for x in operands]
        self._store(target, form.format(*values), result or kind, spread=self._spreads(*operands))

"""Reads PTX as Triton's compiler writes it: one kernel, its parameters, registers, and instructions by basic block."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32,
        "u32": 32, "s32": 32, "f32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64, "b128": 128}  # fmt: skip


class Place(NamedTuple):
    """Where an instruction comes from: the line of the PTX, and Triton's `.loc` ("gau.py:330:44 @[ ... ]")."""

    line: int
    source: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base is a register, a symbol or a parameter."""

    base: str
    offset: int = 0


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@predicate name operands`. Operands are names, addresses, or the names within braces."""

    name: str
    operands: tuple[str | Address | tuple[str, ...], ...]
    place: Place
    predicate: str | None = None
    negated: bool = False
    text: str = ""

    @property
    def parts(self) -> list[str]:
        """What stands between the dots of the name."""
        return self.name.split(".")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Parameter:
    """One of a kernel's: its place in the parameter space, in bytes, and its type."""

    name: str
    offset: int
    size: int
    kind: str


@dataclass
class Kernel:
    """A kernel as text: instructions in order, and at which of them a basic block begins.

    Attributes:
        name: of the entry.
        target: such as "sm_90a".
        threads: of a block, along x.
        parameters: in order.
        registers: type of each by name ("%r7": "b32").
        shared: (offset, size) of every array in shared memory by name; the extern one has size 0 and comes last.
        instructions: of all blocks.
        starts: indices of instructions with which blocks begin.
        labels: the index that a label stands for.
    """

    name: str
    target: str
    threads: int = 0
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def span(self, block: int) -> range:
        """Indices of a basic block's instructions."""
        last = block + 1 == len(self.starts)
        return range(self.starts[block], len(self.instructions) if last else self.starts[block + 1])


_OPCODE = re.compile(r"(?:@(?P<negated>!?)(?P<predicate>%?[\w$]+)\s+)?(?P<name>[a-z][\w.:]*)\s*(?P<rest>.*)", re.DOTALL)
# What ends a basic block: the scheduler acts after it.
_ENDS = ("bra", "ret", "exit", "bar.sync", "barrier.sync", "bar.cta.sync", "barrier.cta.sync")


def parse(ptx: str) -> Kernel:
    """The kernel of a PTX module with one entry.

    Raises:
        ValueError: if there is no entry, or a statement cannot be read.
    """
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\(", ptx)
    if entry is None:
        raise ValueError("ptx: the text has no `.visible .entry`; expected what Triton compiles for an NVIDIA GPU")
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    kernel = Kernel(entry[1], target[1] if target else "")
    head, start = ptx[: entry.start()], ptx.index(")", entry.end())
    _parameters(kernel, ptx[entry.end() : start])
    if threads := re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx[start:]):
        kernel.threads = int(threads[1])
    _Body(kernel).read(ptx, ptx.index("{", start))
    offset = 0
    for align, kind, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]", head):
        offset = -(-offset // int(align)) * int(align)
        length = int(size or 0) * BITS[kind] // 8
        kernel.shared[name] = (offset, length)
        offset += length
    return kernel


def _parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for part in text.split(","):
        if not part.strip():
            continue
        words = part.split()
        align = int(words[words.index(".align") + 1]) if ".align" in words and ".ptr" not in words else 0
        name = words[1].lstrip(".") if words[1] != ".align" else words[3].lstrip(".")
        kind = BITS[name] // 8
        array = re.fullmatch(r"([\w$]+)(?:\[(\d+)\])?", words[-1])
        assert array is not None
        size = kind * int(array[2] or 1)
        offset = -(-offset // max(align, kind)) * max(align, kind)
        kernel.parameters.append(Parameter(array[1], offset, size, name))
        offset += size


class _Body:
    """Reads what stands within an entry's braces. Names that inline assembly declares within braces of its own are
    made unique by the number of the pair."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[tuple[int, set[str]]] = []
        self.opened = 0
        self.place = Place(0, "")

    def read(self, ptx: str, start: int) -> None:
        line = ptx.count("\n", 0, start) + 1
        boundaries = {0}
        pending = ""
        for text in ptx[start:].splitlines():
            self.place = Place(line, self.place.source)
            line += 1
            code, _, comment = text.partition("//")
            code = code.strip()
            if code.startswith(".loc"):
                self.place = Place(line, comment.strip() or code)
                continue
            pending = f"{pending} {code}".strip() if pending else code
            while pending:
                done, pending = self._statement(pending, boundaries)
                if not done:
                    break
            if self.opened and not self.scopes:
                break
        count = len(self.kernel.instructions)
        self.kernel.starts = sorted(b for b in boundaries if b < count)

    def _statement(self, text: str, boundaries: set[int]) -> tuple[bool, str]:
        """Take one statement off the text: whether there was a whole one, and what is left."""
        text = text.lstrip()
        if not text:
            return False, ""
        if text[0] == "{":
            self.scopes.append((self.opened, set()))
            self.opened += 1
            return True, text[1:]
        if text[0] == "}":
            self.scopes.pop()
            return bool(self.scopes), text[1:]
        if label := re.match(r"([\w$]+)\s*:(?!:)", text):
            name = self._unique(label[1], declare=len(self.scopes) > 1)
            self.kernel.labels[name] = len(self.kernel.instructions)
            boundaries.add(len(self.kernel.instructions))
            return True, text[label.end() :]
        if ";" not in text:
            return False, text
        statement, _, rest = text.partition(";")
        statement = " ".join(statement.split())
        if statement.startswith(".reg"):
            self._registers(statement)
        elif statement and not statement.startswith("."):
            self._instruction(statement, boundaries)
        return True, rest

    def _unique(self, name: str, *, declare: bool = False) -> str:
        if declare:
            self.scopes[-1][1].add(name)
        for number, names in reversed(self.scopes):
            if number and name in names:
                return f"{name}@{number}"
        return name

    def _registers(self, statement: str) -> None:
        _, kind, names = statement.split(maxsplit=2)
        for name in names.split(","):
            ranged = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", name)
            each = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name.strip()]
            for register in each:
                unique = self._unique(register, declare=len(self.scopes) > 1)
                self.kernel.registers[unique] = kind.lstrip(".")

    def _instruction(self, statement: str, boundaries: set[int]) -> None:
        match = _OPCODE.fullmatch(statement)
        if match is None:
            raise ValueError(f"ptx: line {self.place.line} is {statement!r}; expected an instruction")
        predicate = match["predicate"]
        self.kernel.instructions.append(
            Instruction(
                match["name"],
                tuple(self._operand(x) for x in _split(match["rest"])),
                self.place,
                None if predicate is None else self._unique(predicate),
                bool(match["negated"]),
                statement,
            )
        )
        if match["name"].startswith(_ENDS):
            boundaries.add(len(self.kernel.instructions))

    def _operand(self, text: str) -> str | Address | tuple[str, ...]:
        if text[0] == "{":
            return tuple(self._unique(x.strip()) for x in text[1:-1].split(","))
        if text[0] == "[":
            inner = text[1:-1].strip()
            if match := re.fullmatch(r"([%\w$.]+)\s*(?:\+\s*(-?\w+))?", inner):
                return Address(self._unique(match[1]), int(match[2] or "0", 0))
            return Address(inner)
        return self._unique(text)


def _split(text: str) -> list[str]:
    """The operands of an instruction: commas within braces and brackets do not part them, `|` does."""
    found, depth, current = [], 0, ""
    for letter in text:
        depth += letter in "{["
        depth -= letter in "}]"
        if letter in ",|" and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += letter
    return [x for x in [*found, current.strip()] if x]

"""What a launch touches, and how often each of its programs runs each part of its code, at any size.

Of the compiled code only what branches and global addresses depend on is executed (a slice, Weiser 1981): no product
and no sum, and no value is loaded, so that tensors need none and may lie on PyTorch's device "meta". Integers that
branches or addresses depend on must lie on the CPU. Floating-point values that branches depend on are drawn from the
normal distribution, and so is what comes of products, or from other threads through shared memory.

Bytes are those of distinct sectors: what the memory behind the caches must move at least, if they catch every repeat
within the launch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bulk import BYTES, ELEMENT_BYTES
from .faults import UnknownInstruction
from .launch import parameter_space, prepared, stored_bytes
from .machine import Machine
from .memory import BASE
from .numbers import Array, Freedom
from .operands import WIDTH
from .program import Program
from .text import BITS, Address, Instruction
from .translate import Translator

SECTOR = 32  # bytes that travel together between the memory and its cache
LANES = 32_768  # threads that run at once
BUDGET = 10_000_000  # basic blocks that they may execute
_DONE = -1
_NO_RESULT = ("st", "red", "bra", "ret", "exit", "bar", "barrier", "fence", "membar", "cp", "wgmma", "tensormap",
              "stmatrix", "prefetch", "nanosleep", "discard")  # fmt: skip
Values = dict[str, list[tuple[str, Any]]]  # by the names of parameters, as `launch.passed` gives them


@dataclass(frozen=True)
class Touched:
    """Bytes of one argument: read before the launch wrote them, written, those of all its storage; and how many all
    threads asked for or wrote together, repeats included."""

    read: int
    written: int
    size: int
    asked: int


def paths(ptx: str, grid: tuple[int, int, int], values: Values) -> tuple[Program, Array]:
    """How often every program of a launch runs each basic block: (blocks of the code, programs), by its first thread,
    or where branches depend on drawn values by its first warp.

    Args:
        ptx: the kernel.
        grid: programs along x, y and z.
        values: of its parameters.

    Raises:
        UnknownInstruction: where a branch depends on what is not known, such as integers that were never given, or
            there is no end.
    """
    program = prepared(ptx)
    runner = _Runner(ptx, _Space(values), grid, addresses=False)
    blocks, at_once = np.arange(grid[0] * grid[1] * grid[2]), max(1, LANES // runner.threads)
    parts = [runner.run(blocks[first : first + at_once]) for first in range(0, len(blocks), at_once)]
    return program, np.concatenate(parts, 1)


def footprint(ptx: str, grid: tuple[int, int, int], values: Values) -> dict[str, Touched]:
    """Which bytes of its arguments a launch reads and writes, as whole sectors, by the names of its parameters.

    Each argument counts for itself, even if two are the same tensor. It takes what `paths` takes.
    """
    program, space = prepared(ptx), _Space(values)
    blocks, at_once = np.arange(grid[0] * grid[1] * grid[2]), max(1, LANES // program.kernel.threads)
    runner = _Runner(ptx, space, grid, addresses=True)
    for first in range(0, len(blocks), at_once):
        runner.run(blocks[first : first + at_once])
        space.settle()
    return space.touched()


class _Space:
    """Where the storages of arguments lie, each by itself, and which of their sectors were touched."""

    def __init__(self, values: Values) -> None:
        self.places: list[tuple[str, Tensor, int, int]] = []  # name, argument, first byte and bytes of its storage
        self.flat: list[tuple[str, Any]] = []  # arguments with addresses for tensors
        end = 256
        for name, several in values.items():
            for kind, x in several:
                if isinstance(x, Tensor):
                    size = x.untyped_storage().nbytes()
                    self.places.append((name, x, end, size))
                    x, end = BASE + end + int(x.storage_offset()) * x.element_size(), end + -(-size // 256) * 256 + 256
                self.flat.append((kind, x))
        self.read, self.written = np.zeros(end // SECTOR, bool), np.zeros(end // SECTOR, bool)
        self.asked = [0] * len(self.places)  # bytes
        self.changed, self.full = set[int](), set[int]()  # arguments: written to, and read as a whole
        self.starts = np.array([start for _, _, start, _ in self.places])

    def settle(self) -> None:
        """Note which arguments were read as a whole: no more of them can be."""
        for which, (_, _, start, size) in enumerate(self.places):
            if which not in self.full and self.read[start // SECTOR : -(-(start + size) // SECTOR)].all():
                self.full.add(which)

    def touched(self) -> dict[str, Touched]:
        found: dict[str, Touched] = {}
        for (name, _, start, size), asked in zip(self.places, self.asked, strict=True):
            sectors = slice(start // SECTOR, -(-(start + size) // SECTOR))
            read, written = (SECTOR * int(np.count_nonzero(x[sectors])) for x in (self.read, self.written))
            before = found.get(name, Touched(0, 0, 0, 0))
            parts = before.read + read, before.written + written, before.size + size, before.asked + asked
            found[name] = Touched(*parts)
        return found


# ---- the slice


def _names(operand: Any) -> set[str]:
    """What may be registers in an operand."""
    if isinstance(operand, tuple):
        return set(operand)
    text = operand.base if isinstance(operand, Address) else str(operand)
    return set(re.findall(r"[%\w$@]+", text))


def _results(x: Instruction) -> tuple[Any, ...]:
    """The operands that an instruction writes."""
    head, parts = x.parts[0], x.parts
    if x.name.startswith("wgmma.mma_async"):
        return x.operands[:1]
    if head in _NO_RESULT or (head == "mbarrier" and parts[1] not in ("try_wait", "test_wait")):
        return ()
    if head == "setp":
        return x.operands[: len(x.operands) - 2 - any(p in ("and", "or", "xor") for p in parts[2:-1])]
    if head == "elect" or (head == "shfl" and len(x.operands) == 6):
        return x.operands[:2]
    return x.operands[:1]


def _is_drawn(x: Instruction) -> bool:
    """Whether its results are not known here: products, and what comes from other threads through shared memory."""
    return x.parts[0] in ("ldmatrix", "mma", "wgmma") or (x.parts[0] == "ld" and x.name.startswith("ld.shared"))


def _is_global(x: Instruction) -> bool:
    """Whether it goes to global memory, or makes a tensor map."""
    head, parts = x.parts[0], x.parts
    if head == "cp":
        return not {"commit_group", "wait_group", "wait_all"} & set(parts)
    return head == "tensormap" or (head in ("ld", "st", "atom", "red") and any(p.startswith("global") for p in parts))


def _places(x: Instruction) -> tuple[Any, ...]:
    """The operands of such an instruction that say where it goes."""
    head, parts = x.parts[0], x.parts
    if head == "tensormap":
        return x.operands[:1] if parts[1] == "cp_fenceproxy" else x.operands[1:]
    if head == "cp" and "bulk" in parts:
        return (x.operands[1],) if any(p.startswith("mbarrier") for p in parts) else (x.operands[0],)
    if head == "cp":
        return (x.operands[1], *x.operands[3:])
    return (x.operands[1],) if head in ("ld", "atom") else (x.operands[0],)


class _Slice(Translator):
    """The functions of basic blocks with what matters of them.

    Attributes:
        kept: numbers of the instructions that are executed.
        needed: registers whose values matter.
        loads: whether some of these are loaded from global memory.
    """

    def __init__(self, program: Program, *, addresses: bool) -> None:
        super().__init__(program.kernel)
        self.kept: set[int] = set()
        self.needed: set[str] = set()
        self.loads = False
        self._functions: dict[tuple[int, bool], Any] = {}
        instructions, writers = program.kernel.instructions, defaultdict(list)
        for number, x in enumerate(instructions):
            for name in set().union(*map(_names, _results(x))):
                writers[name].append(number)
        left: list[str] = []

        def keep(number: int, operands: Iterable[Any]) -> None:
            self.kept.add(number)
            x = instructions[number]
            wanted = set().union(*map(_names, operands)) | ({x.predicate} if x.predicate else set())
            left.extend(wanted & self.numbers.keys() - self.needed)

        for number, x in enumerate(instructions):
            if x.parts[0] in ("bra", "ret", "exit"):
                keep(number, ())
            elif addresses and _is_global(x):
                keep(number, _places(x))
        while left:
            register = left.pop()
            if register in self.needed:
                continue
            self.needed.add(register)
            for number in writers[register]:
                x = instructions[number]
                keep(number, () if x.parts[0] == "mbarrier" or _is_drawn(x) else x.operands[len(_results(x)) :])
                self.loads |= _is_global(x)

    def function(self, block: int, masked: bool) -> Any:
        key = block, masked
        if key not in self._functions:
            self._functions[key] = super().function(block, masked)
        return self._functions[key]

    def _instruction(self, number: int, x: Instruction, block: int) -> None:
        if number not in self.kept:
            return
        if not _is_drawn(x):
            super()._instruction(number, x, block)
            return
        self.number, self.x, self.active = number, x, self._active(x)
        for name in sorted(set().union(*map(_names, _results(x))) & self.needed):
            if BITS[self.kernel.registers[name]] != 32:
                raise UnknownInstruction(f"ptx: {self.kernel.name}: a branch or an address depends on {x.text!r}")
            self._store(name, "m.drawn()", "b32")

    def _ld(self, parts: list[str], target: Any, address: Any, *rest: Any) -> None:
        space, kind, count = self._access(parts)
        if space == "global" and not _names(target) & self.needed:
            where = self._address(address, space)
            self.lines.append(f"m.reads({where}, {WIDTH[kind] // 8 * count}, {self._threads})")
        else:
            super()._ld(parts, target, address, *rest)

    def _st(self, parts: list[str], address: Any, source: Any, *rest: Any) -> None:
        space, kind, count = self._access(parts)
        self.lines.append(f"m.writes({self._address(address, space)}, {WIDTH[kind] // 8 * count}, {self._threads})")

    def _atom(self, parts: list[str], *operands: Any) -> None:
        where = self._address(operands[0 if parts[0] == "red" else 1], "global")
        size = WIDTH[parts[-1]] // 8
        self.lines.append(f"m.reads({where}, {size}, {self._threads})")
        self.lines.append(f"m.writes({where}, {size}, {self._threads})")

    _red = _atom

    def _cp(self, parts: list[str], *operands: Any) -> None:
        if "bulk" in parts:
            self._bulk(parts, *operands)
            return
        taken = f" & (m.spread({self._value(operands[3], 'u32')}) > 0)" if len(operands) > 3 else ""
        size = int(str(operands[2]), 0)
        self.lines.append(f"m.reads({self._address(operands[1], 'global')}, {size}, {self._threads}{taken})")

    def _bulk(self, parts: list[str], *operands: Any) -> None:
        reading = any(p.startswith("mbarrier") for p in parts)
        mapped, corner = self._mapped(operands[1 if reading else 0])
        self.lines.append(f"m.box({mapped}, {corner}, {reading}, {self._threads})")

    def _tensormap(self, parts: list[str], *operands: Any) -> None:
        if parts[1] == "cp_fenceproxy":
            self.lines.append(f"m.publish({self._address(operands[0], 'global')}, {self._threads})")
            return
        place = int(str(operands[1]), 0) if len(operands) == 3 else 0
        value = self._value(operands[-1], parts[-1])
        self.lines.append(f"m.replace({parts[3]!r}, {place}, m.spread({value}))")

    def _mbarrier(self, parts: list[str], *operands: Any) -> None:
        self._store(operands[0], "m.always", "pred")  # what is awaited has come


# ---- the threads


class _Runner:
    """Programs of one launch, all at the same time, their whole threads if `addresses` matter, else one of each."""

    def __init__(self, ptx: str, space: _Space, grid: tuple[int, int, int], *, addresses: bool) -> None:
        self.program, self.space, self.grid, self.addresses = prepared(ptx), space, grid, addresses
        self.slice = _sliced(ptx, addresses)
        self.parameters = parameter_space(self.program, space.flat, int)
        self.freedom, self.pending = Freedom(None, None), dict[Any, Any]()
        self.generator = np.random.default_rng(0)
        self.threads = self.program.kernel.threads if addresses else 32 if self.slice.loads else 1
        self.fields: dict[tuple[str, int], Array] = {}  # of the tensor map that is being made
        self.maps: list[tuple[Array, dict[tuple[str, int], Array]]] = []

    def run(self, blocks: Array) -> Array:
        """How often these programs run each basic block, unless it is for the addresses."""
        kernel = self.program.kernel
        threads = self.threads
        self.lanes = len(blocks) * threads
        self.every = self.always = np.ones(self.lanes, bool)
        block = np.repeat(blocks.astype(np.int64), threads)
        x, y, _ = self.grid
        self.block = block
        self.ctaid = tuple(p.astype(np.uint32) for p in (block % x, block // x % y, block // (x * y)))
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.laneid, self.warpid = thread % 32, thread // 32
        nothing = np.zeros(self.lanes, np.uint32)
        self.tid = (thread, nothing, nothing)
        self.ntid = (np.full(self.lanes, kernel.threads, np.uint32), nothing + 1, nothing + 1)
        self.nctaid = tuple(np.full(self.lanes, n, np.uint32) for n in self.grid)
        self.fields, self.maps = {}, []
        registers = [
            np.zeros(self.lanes, dtype) if name in self.slice.needed else None
            for name, dtype in zip(kernel.registers, self.program.dtypes, strict=True)
        ]
        counts = np.zeros((len(kernel.starts), len(blocks)), np.int64)
        counter, rank, budget = np.zeros(self.lanes, np.int64), self.program.rank, BUDGET
        with np.errstate(all="ignore"):
            while (running := counter != _DONE).any():
                steps = counter[running]
                step = int(steps[rank[steps].argmin()])
                active = running & (counter == step)
                while True:  # as long as all stay together
                    whole = bool(active.all())
                    budget -= 1
                    if budget < 0:
                        raise UnknownInstruction(f"ptx: {kernel.name}: branches alone find no end")
                    if not self.addresses:
                        counts[step] += active.reshape(-1, threads).any(1)
                    then = self.slice.function(step, not whole)(registers, self, active)
                    if isinstance(then, tuple):
                        taken, target, otherwise = then
                        if not whole or (taken.any() and not taken.all()):
                            counter[active] = np.where(taken[active], target, otherwise)
                            break
                        then = target if taken.all() else otherwise
                    counter[active] = then
                    if not whole or then == _DONE:
                        break
                    step = then
        return counts

    # ---- what the functions of blocks ask for

    spread, parameter, warps, flat = Machine.spread, Machine.parameter, Machine.warps, Machine.flat

    def whole(self, number: int, active: Array) -> None:
        """All threads of a warp take part; `executing` looks for those that do not."""

    def shuffle(self, how: str, value: Array, by: Any, bounds: Any) -> tuple[Array, Array]:
        """shfl.sync. One thread stands for its warp."""
        if self.threads == 1:
            return value, self.always
        return Machine.shuffle(self, how, value, by, bounds)  # type: ignore[arg-type]

    def vote(self, how: str, condition: Array) -> Array:
        """vote.sync."""
        return condition if self.threads == 1 else Machine.vote(self, how, condition)  # type: ignore[arg-type]

    def load_global(self, number: int, address: Array, size: int, count: int, active: Array) -> list[Array]:
        """Values that branches or addresses depend on."""
        self.reads(address, size * count, active)
        found = np.zeros((self.lanes, count), f"u{size}")
        for _, x, start, length in self.space.places:
            offset = address.astype(np.uint64).view(np.int64) - BASE - start
            here = active & (offset >= 0) & (offset < length)
            if here.any():
                found[here] = self._values(x, offset[here], size * count).view(f"u{size}")
        return list(found.T)

    def drawn(self) -> Array:
        """A value of fp32 for each thread."""
        return self.generator.standard_normal(self.lanes, np.float32).view(np.uint32)

    def _values(self, x: Tensor, offset: Array, size: int) -> Array:
        """`size` bytes of an argument for each thread, (threads, size)."""
        if x.device.type != "meta":
            return stored_bytes(x.untyped_storage()).numpy()[offset[:, None] + np.arange(size)]
        if not x.is_floating_point():
            raise UnknownInstruction("ptx: a branch or an address depends on integers of a tensor without values")
        drawn = self.generator.standard_normal((len(offset), size // x.element_size()))
        return torch.from_numpy(drawn).to(x.dtype).view(torch.uint8).numpy()

    def reads(self, address: Array, size: int, active: Array) -> None:
        """A load of global memory of `size` bytes by each thread, within one sector."""
        if active.any():
            which = self._argument(int(address[active.argmax()]) - BASE)
            if which in self.space.full:
                self.space.asked[which] += int(np.count_nonzero(active)) * size
            else:
                self._note(which, self._sectors(address, active), size, reading=True)

    def writes(self, address: Array, size: int, active: Array) -> None:
        """A store, likewise."""
        if active.any():
            which = self._argument(int(address[active.argmax()]) - BASE)
            self._note(which, self._sectors(address, active), size, reading=False)

    def _argument(self, offset: int) -> int:
        """Which one an instruction goes to: the same with all threads."""
        return int(np.searchsorted(self.space.starts, offset, "right")) - 1

    def _sectors(self, address: Array, active: Array) -> Array:
        taken = address if active is self.every else address[active]
        return (taken.view(np.int64) - BASE) // SECTOR

    def _note(self, which: int, sectors: Array, size: int, *, reading: bool) -> None:
        space = self.space
        space.asked[which] += len(sectors) * size
        if not reading:
            space.written[sectors] = True
            space.changed.add(which)
        elif which in space.changed:
            space.read[sectors] |= ~space.written[sectors]
        else:
            space.read[sectors] = True

    # ---- tensor maps

    def replace(self, name: str, place: int, value: Array) -> None:
        """tensormap.replace of a field."""
        self.fields[name, place] = value

    def publish(self, target: Array, active: Array) -> None:
        """tensormap.cp_fenceproxy: a warp writes the map, which is known by its address from now on."""
        self.maps.append((target, dict(self.fields)))
        for part in range(0, BYTES, SECTOR):
            self.writes(target + np.uint64(part), SECTOR, active & (self.laneid == 0))

    def box(self, where: Array, corner: list[Array], reading: bool, active: Array) -> None:
        """A bulk copy of a box of a tensor."""
        lanes = np.flatnonzero(active)
        if not len(lanes):
            return
        fields = next((f for at, f in reversed(self.maps) if (at[lanes] == where[lanes]).all()), None)
        if fields is None:
            raise UnknownInstruction(f"ptx: {self.program.kernel.name} copies by tensor maps that it did not make")

        def field(name: str, place: int = 0) -> Array:
            return fields[name, place][lanes].astype(np.int64)

        rank, size = int(field("rank")[0]) + 1, ELEMENT_BYTES[int(field("elemtype")[0])]
        box = [int(field("box_dim", i)[0]) for i in range(rank)]
        steps = np.indices(box[:0:-1]).reshape(rank - 1, -1)[::-1]  # of all axes but the first, which is contiguous
        start = [c[lanes].astype(np.uint32).view(np.int32).astype(np.int64) for c in corner]
        inside, reach = np.ones((len(lanes), steps.shape[1]), bool), np.zeros((len(lanes), steps.shape[1]), np.int64)
        for axis in range(1, rank):
            place = start[axis][:, None] + steps[axis - 1]
            inside &= (place >= 0) & (place < field("global_dim", axis)[:, None])
            reach += place * field("global_stride", axis - 1)[:, None]
        low = np.maximum(start[0], 0)
        high = np.minimum(start[0] + box[0], field("global_dim", 0))
        base = field("global_address") - BASE
        first, last = (base + low * size)[:, None] + reach, (base + high * size - 1)[:, None] + reach
        inside &= (high > low)[:, None]
        sectors = (first[inside] // SECTOR)[:, None] + np.arange(box[0] * size // SECTOR + 2)
        which = self._argument(int(base[0]))
        self._note(which, sectors[sectors <= (last[inside] // SECTOR)[:, None]], SECTOR, reading=reading)


@lru_cache(maxsize=32)
def _sliced(ptx: str, addresses: bool) -> _Slice:
    return _Slice(prepared(ptx), addresses=addresses)

"""Executes a kernel: all threads of some blocks at once, warps in a seeded random order if asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import matrix
from .bulk import Bulk
from .faults import Fault, UnknownInstruction
from .memory import SHARED_BASE, Global, Shared
from .numbers import Array, Freedom
from .program import Program

LANES = 4096  # threads that run at once
_NONE, _DONE = -1, -1
_UFUNCS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
           "xor": np.bitwise_xor}  # fmt: skip


@dataclass
class Counts:
    """What a launch did. Instructions are counted once for each warp that executes them.

    Attributes:
        instructions: by class.
        read_bytes: from global memory, by the threads: what caches or coalescing save is not subtracted.
        written_bytes: to it.
        matrix_flops: of matrix instructions, two for each product.
        blocks: how many there were.
        distinct_read_bytes: of global memory, each byte once in a launch, unless the launch wrote it before: what must
            come from behind the caches at least.
        distinct_written_bytes: likewise, what must go there.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    read_bytes: int = 0
    written_bytes: int = 0
    matrix_flops: int = 0
    blocks: int = 0
    distinct_read_bytes: int = 0
    distinct_written_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.instructions + other.instructions,
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.matrix_flops + other.matrix_flops,
            self.blocks + other.blocks,
            self.distinct_read_bytes + other.distinct_read_bytes,
            self.distinct_written_bytes + other.distinct_written_bytes,
        )


class Machine:
    """Some blocks of a launch. `execute` makes one after the other.

    Threads stand one behind the other, those of the first block first. A thread's program counter is the number of a
    basic block; those of a warp that are behind go first, so that a warp that parted meets again.

    Args:
        program: the kernel.
        memory: global.
        parameters: bytes of the parameter space.
        blocks: linear numbers of the blocks that run.
        grid: how many blocks there are along x, y and z.
        shared_bytes: of a block, beside what the kernel declares.
        freedom: what hardware chooses.
        generator: of the order of warps; None runs all that stand at the same place together.
        budget: basic blocks that may be executed.
    """

    program: Program
    memory: Global
    freedom: Freedom
    generator: np.random.Generator | None
    budget: int
    parameters: Array
    threads: int
    lanes: int
    every: Array
    block: Array
    thread: Array
    laneid: Array
    warpid: Array
    tid: tuple[Array, ...]
    ctaid: tuple[Array, ...]
    ntid: tuple[Array, ...]
    nctaid: tuple[Array, ...]
    shared: Shared
    waiting: Array
    expected: Array
    executed: Array
    products: Array
    fenced: Array
    yielded: Array
    bulk: Bulk

    def __init__(
        self,
        program: Program,
        memory: Global,
        parameters: Array,
        blocks: Array,
        grid: tuple[int, int, int],
        shared_bytes: int,
        freedom: Freedom,
        generator: np.random.Generator | None,
        budget: int,
    ) -> None:
        kernel, threads = program.kernel, program.kernel.threads
        self.program, self.kernel, self.memory, self.freedom = program, kernel, memory, freedom
        self.generator, self.budget, self.parameters, self.threads = generator, budget, parameters, threads
        self.lanes = len(blocks) * threads
        self.every = np.ones(self.lanes, bool)
        self.block = np.repeat(blocks.astype(np.int32), threads)
        x, y, _ = grid
        place = (self.block % x, self.block // x % y, self.block // (x * y))
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.thread, self.laneid, self.warpid = thread, thread % 32, thread // 32
        self.tid = (thread, self._all(0), self._all(0))
        self.ctaid = tuple(p.astype(np.uint32) for p in place)
        self.ntid = (self._all(threads), self._all(1), self._all(1))
        self.nctaid = tuple(self._all(n) for n in grid)
        declared = sum(size for _, size in kernel.shared.values())
        self.shared = Shared(declared + shared_bytes, len(blocks), threads, program.shared_granule)
        self.waiting = np.full(self.lanes, _NONE, np.int64)
        self.expected = np.zeros(self.lanes, np.int64)
        self.executed = np.zeros(len(kernel.starts), np.int64)
        self.pending: dict[tuple[int, int], int] = {}  # (register, warpgroup) of products not waited for -> group
        self.products = np.zeros(self.lanes // 128 + 1, np.int64)  # groups that a warpgroup committed
        self.fenced = np.zeros(self.lanes, np.int32)  # when each thread last passed a proxy fence
        self.yielded = np.zeros(self.lanes, bool)  # who waits for an mbarrier, and lets others go first
        self.bulk = Bulk(self)

    def _all(self, value: int) -> Array:
        return np.broadcast_to(np.uint32(value), (self.lanes,))

    # ---- the schedule ----

    def run(self) -> None:
        """Until every thread has ended.

        Raises:
            Fault: for what the kernel does wrong.
            UnknownInstruction: for an instruction that is not executed here.
        """
        registers = [np.zeros(self.lanes, dtype) for dtype in self.program.dtypes]
        counter = np.zeros(self.lanes, np.int64)
        with np.errstate(all="ignore"):
            while True:
                runnable = (counter != _DONE) & (self.waiting == _NONE)
                if not runnable.any():
                    if (counter != _DONE).any():
                        self._stuck(counter)
                    return
                step, active = self._next(counter, runnable)
                while True:  # as long as these stay together
                    whole = active is None
                    k = self.every if active is None else active
                    self.executed[step] += self.lanes // 32 if whole else np.count_nonzero(k.reshape(-1, 32).any(1))
                    self.budget -= 1
                    if self.budget < 0:
                        self.report(self.kernel.starts[step], "endless", "it is still running", k, None)
                    then = self.program.function(step, masked=not whole)(registers, self, k)
                    if isinstance(then, tuple):
                        taken, target, otherwise = then
                        if whole and taken.all():
                            then = target
                        elif whole and not taken.any():
                            then = otherwise
                        else:
                            counter[k] = np.where(taken[k], target, otherwise)
                            break
                    counter[k] = then
                    if not whole or then == _DONE or (self.waiting != _NONE).any():
                        break
                    step = then

    def _next(self, counter: Array, runnable: Array) -> tuple[int, Array | None]:
        """Where to go on, and with which threads; None for all."""
        if (runnable & self.yielded).any():
            others = runnable & ~self.yielded
            if others.any():
                runnable = others
            self.yielded[:] = False
        if self.generator is None:
            step = self._first(counter[runnable])
            active = runnable & (counter == step)
        else:
            together = self.program.together  # a warp, or the warpgroup that multiplies
            first = int(self.generator.choice(np.flatnonzero(runnable))) // together * together
            mine = np.zeros(self.lanes, bool)
            mine[first : first + together] = True
            step = self._first(counter[runnable & mine])
            active = runnable & mine & (counter == step)
        return step, None if active.all() else active

    def _first(self, steps: Array) -> int:
        """The one that goes first."""
        return int(steps[self.program.rank[steps].argmin()])

    def _stuck(self, counter: Array) -> None:
        """Nobody can go on: some wait for a barrier that the others do not reach."""
        waits = self.waiting != _NONE
        first = int(np.flatnonzero(waits)[0])
        mine = self.block == self.block[first]
        there = int((waits & mine).sum())
        self.report(
            self.kernel.span(int(counter[first]) - 1)[-1],  # the one before the block in which it will go on
            "barrier",
            f"{there} threads wait for it; {int((mine & ~waits).sum())} of the block ended or wait elsewhere",
            waits & mine,
            None,
        )

    def report(self, number: int, kind: str, text: str, guilty: Array, address: Array | None) -> None:
        """Raise what the first guilty thread did at instruction `number`."""
        first = int(np.flatnonzero(guilty)[0])
        x = self.kernel.instructions[number]
        raise Fault(
            kind,
            text,
            kernel=self.kernel.name,
            place=x.place,
            instruction=x.text,
            block=tuple(int(p[first]) for p in self.ctaid),  # type: ignore[arg-type]
            thread=int(self.thread[first]),
            address=None if address is None else int(address[first]),
        )

    def _reporter(self, number: int) -> Any:
        return lambda kind, text, guilty, address: self.report(number, kind, text, guilty, address)

    # ---- values ----

    def spread(self, value: Any) -> Array:
        """One value for every thread."""
        return np.broadcast_to(value, (self.lanes,)) if np.ndim(value) == 0 else value

    def parameter(self, offset: int, dtype: Any) -> Any:
        """A value in the parameter space."""
        return self.parameters[offset : offset + np.dtype(dtype).itemsize].view(dtype)[0]

    def warps(self, value: Any) -> Array:
        """By warps: (warps, 32)."""
        return np.ascontiguousarray(self.spread(value)).reshape(-1, 32)

    def flat(self, value: Array) -> Array:
        """The reverse."""
        return value.reshape(-1)

    # ---- memory ----

    def load_global(self, number: int, address: Array, size: int, count: int, active: Array) -> list[Array]:
        """ld.global: `count` values of `size` bytes for each thread."""
        return self.memory.load(address, size, count, active, self.block, self._reporter(number))

    def store_global(self, number: int, address: Array, values: list[Array], size: int, active: Array) -> None:
        """st.global."""
        self.memory.store(address, values, size, active, self.block, self._reporter(number))

    def atomic(self, number: int, how: str, address: Array, values: list[Array], active: Array) -> Array:
        """Read, change and write, one thread after the other; blocks may share what they change so."""
        memory, size = self.memory, np.dtype(values[0].dtype).itemsize
        offset = memory.offsets(address, size, 1, active, self._reporter(number))
        view = memory.views[size].view(values[0].dtype)
        before = np.zeros(self.lanes, values[0].dtype)
        for lane in np.flatnonzero(active):
            place = offset[lane] // size
            before[lane] = view[place]
            if how == "cas":
                view[place] = values[1][lane] if view[place] == values[0][lane] else view[place]
            else:
                view[place] = values[0][lane] if how == "exch" else _UFUNCS[how](view[place], values[0][lane])
        cells = offset[active] // memory.granule
        for cell in [cells + i for i in range(max(1, size // memory.granule))]:
            memory.fetched[cell] |= ~memory.stored[cell]
            memory.stored[cell] = True
        memory.read_bytes += int(active.sum()) * size
        memory.written_bytes += int(active.sum()) * size
        return before

    def load_shared(self, number: int, address: Array, size: int, count: int, active: Array) -> list[Array]:
        """ld.shared."""
        return self.shared.load(address, size, count, active, self._reporter(number))

    def store_shared(self, number: int, address: Array, values: list[Array], size: int, active: Array) -> None:
        """st.shared."""
        self.shared.store(address, values, size, active, self._reporter(number))

    def copy(self, number: int, target: Array, source: Array, size: int, taken: Array | None, active: Array) -> None:
        """cp.async: `taken` bytes of `size` come from global memory, the rest is zero."""
        reads = active if taken is None else active & (taken > 0)
        if taken is not None and (active & (taken != 0) & (taken != size)).any():
            raise UnknownInstruction(f"ptx: {self.kernel.instructions[number].text}: a part of a copy")
        width = min(size, 8)
        data = self.memory.load(source, width, size // width, reads, self.block, self._reporter(number))
        self.shared.copy(target, data, width, active, self._reporter(number))

    def proxy_fence(self, active: Array) -> None:
        """fence.proxy.async: what these threads wrote to shared memory, products may read."""
        self.shared.now += 1
        self.fenced[active] = self.shared.now

    # ---- barriers ----

    def barrier(self, number: int, active: Array, which: Array, count: Array | None) -> None:
        """bar.sync: wait until as many threads of the block are there as it wants."""
        self.whole(number, active)
        self.waiting[active] = which[active]
        self.expected[active] = self.threads if count is None else count[active]
        waiting = self.waiting.reshape(-1, self.threads)
        for block in np.unique(np.flatnonzero(active) // self.threads):
            lanes = slice(block * self.threads, (block + 1) * self.threads)
            first = int(np.flatnonzero(active[lanes])[0])
            there = waiting[block] == waiting[block, first]
            if there.sum() >= self.expected[lanes][first]:
                released = np.flatnonzero(there) + block * self.threads
                self.waiting[released] = _NONE
                self.shared.barrier(released)

    def warp_barrier(self, number: int, active: Array) -> None:
        """bar.warp.sync."""
        self.whole(number, active)
        self.shared.warp_barrier(np.flatnonzero(active))

    def whole(self, number: int, active: Array) -> None:
        """All threads of a warp take part in what follows, or none."""
        some = active.reshape(-1, 32)
        parted = some.any(1) & ~some.all(1)
        if parted.any():
            missing = ~active & np.repeat(parted, 32)
            self.report(number, "diverged", "this thread does not take part in what the whole warp does", missing, None)

    # ---- threads of a warp ----

    def shuffle(self, how: str, value: Array, by: Any, bounds: Any) -> tuple[Array, Array]:
        """shfl.sync: the value of another thread, and whether there is one."""
        lane, by, bounds = (x.astype(np.int64) for x in (self.laneid, self.spread(by), self.spread(bounds)))
        clamp, segment = bounds & 31, (bounds >> 8) & 31
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        if how == "up":
            source = lane - by
            valid = source >= last
        else:
            moved = {"down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment & 31)}
            source = moved[how]
            valid = source <= last
        source = np.where(valid, source, lane)
        return value[np.arange(self.lanes) - lane + source], valid

    def vote(self, how: str, condition: Array) -> Array:
        """vote.sync of a whole warp."""
        rows = condition.reshape(-1, 32)
        if how == "ballot":
            bits = (rows.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
            return np.repeat(bits, 32)
        found = {"any": rows.any(1), "all": rows.all(1), "uni": rows.all(1) | ~rows.any(1)}[how]
        return np.repeat(found, 32)

    def reduce(self, how: str, value: Array) -> Array:
        """redux.sync of a whole warp."""
        rows = self.warps(value)
        return np.repeat(_UFUNCS[how].reduce(rows, axis=1, dtype=rows.dtype), 32)

    # ---- matrices ----

    def load_matrices(self, number: int, address: Array, count: int, trans: bool, active: Array) -> list[Array]:
        """ldmatrix of `count` 8 x 8 matrices: thread 8 i + r has the address of row r of matrix i."""
        self.whole(number, active)
        asks = active & (self.laneid < 8 * count)
        words = self.shared.load(address, 8, 2, asks, self._reporter(number))
        rows = np.stack([np.ascontiguousarray(w) for w in words], 1).view(np.uint16).reshape(-1, 4, 8, 8)
        return [matrix.from_rows(rows[:, i], trans) for i in range(count)]

    def store_matrices(self, number: int, address: Array, registers: list[Array], trans: bool, active: Array) -> None:
        """stmatrix, likewise."""
        self.whole(number, active)
        asks = active & (self.laneid < 8 * len(registers))
        rows = np.zeros((self.lanes // 32, 4, 8, 8), np.uint16)
        for i, register in enumerate(registers):
            rows[:, i] = matrix.to_rows(register, trans)
        words = rows.reshape(self.lanes, 8).view(np.uint64)
        self.shared.store(address, [words[:, 0], words[:, 1]], 8, asks, self._reporter(number))

    def mma(self, a: list[Array], b: list[Array], c: list[Array], kind: str) -> list[Array]:
        """mma.sync of every warp."""
        return matrix.mma(a, b, c, kind, self.freedom.descending)

    # ---- products of warpgroups ----

    def wgmma(
        self, number: int, targets: list[int], c: list[Array], a: Any, b: Array, add: Array, form: Any, active: Array
    ) -> list[Array]:
        """wgmma.mma_async: computed at once; its registers and what it reads are marked until its wait."""
        columns, kind, trans_a, trans_b = form
        groups = self.lanes // 128
        some = active.reshape(groups, 128)
        if (some.any(1) & ~some.all(1)).any():
            missing = ~active & np.repeat(some.any(1) & ~some.all(1), 128)
            self.report(number, "diverged", "this thread does not take part in what its warpgroup does", missing, None)
        running = np.flatnonzero(some[:, 0])
        right = self._tile(number, b, columns, trans_b, kind, running).transpose(0, 2, 1)
        if isinstance(a, list):
            left = matrix.group_rows([x.reshape(groups, 4, 32)[running] for x in a], kind)
        else:
            left = self._tile(number, a, 64, trans_a, kind, running)
        places = matrix.group_places(columns)
        before = np.zeros((len(running), 64, columns), np.float32)
        keep = add.reshape(groups, 128)[running, 0]
        for (r, k), x in zip(places, c, strict=True):
            before[:, r, k] = np.where(keep[:, None, None], x.view(np.float32).reshape(groups, 4, 32)[running], 0)
        total = matrix.product(left, right, before, self.freedom.descending)
        found = []
        for (r, k), x in zip(places, c, strict=True):
            result = x.reshape(groups, 4, 32).copy()
            result[running] = np.ascontiguousarray(total[:, r, k]).view(np.uint32)
            found.append(result)
        self.pending |= {(r, int(g)): int(self.products[g]) for r in targets for g in running}
        return found

    def _tile(self, number: int, descriptor: Array, length: int, trans: int, kind: str, running: Array) -> Array:
        """(groups, length, 16) of what descriptors describe; a read of shared memory that lasts until the wait."""
        found = []
        shared = self.shared
        for group in running:
            lane = 128 * int(group)
            offsets = matrix.described(int(descriptor[lane]), length, bool(trans), kind)
            cells, blame = self.shared_cells(number, lane, offsets, "a product reads outside the block's")
            # The readers are all four warps: what any of them wrote needs no barrier of others, but a proxy fence.
            shared.check_read(cells, np.full(len(cells), lane), blame, note=False)
            self.check_fenced(cells, lane, blame)
            shared.use(int(group), cells, int(self.products[group]))
            found.append(matrix.elements(shared.views, offsets + shared.first[lane], kind))
        return np.stack(found)

    def shared_cells(self, number: int, lane: int, offsets: Array, outside: str) -> tuple[Array, Any]:
        """Cells at these offsets in the shared memory of a thread's block, and a reporter of what is wrong there."""
        shared = self.shared
        if offsets.min() < 0 or offsets.max() >= shared.size:
            self.report(number, "shared outside", outside, self.only(lane), None)
        cells = np.unique((offsets + shared.first[lane]) // shared.granule)

        def blame(kind: str, text: str, guilty: Array) -> None:
            place = int(cells[np.flatnonzero(guilty)[0]]) * shared.granule % shared.pitch + SHARED_BASE
            self.report(number, kind, text, self.only(lane), np.full(self.lanes, place))

        return cells, blame

    def check_fenced(self, cells: Array, lane: int, blame: Any) -> None:
        """What threads wrote must have passed a proxy fence, of theirs or of the reader's, before a product or a bulk
        copy reads it."""
        writers, written = self.shared.writer[cells], self.shared.written_at[cells]
        passed = (self.fenced[np.maximum(writers, 0)] > written) | (self.fenced[lane] > written)
        fresh = (writers >= 0) & ~passed
        if fresh.any():
            blame("race", "written without fence.proxy.async before a product or a bulk copy reads it", fresh)

    def only(self, lane: int) -> Array:
        """One thread."""
        found = np.zeros(self.lanes, bool)
        found[lane] = True
        return found

    def _groups(self, active: Array) -> Array:
        return np.flatnonzero(active[: self.lanes // 128 * 128].reshape(-1, 128)[:, 0])

    def commit_products(self, active: Array) -> None:
        """wgmma.commit_group."""
        self.products[self._groups(active)] += 1

    def wait_products(self, active: Array, newest: int) -> None:
        """wgmma.wait_group: all groups but the `newest` are done."""
        for group in self._groups(active):
            limit = int(self.products[group]) - newest
            self.shared.release(int(group), limit)
            done = [key for key, number in self.pending.items() if key[1] == group and number < limit]
            for key in done:
                del self.pending[key]

    def check_pending(self, number: int, registers: list[int], active: Array) -> None:
        """Registers that a product writes must not be used before its wait."""
        waiting = [group for register, group in self.pending if register in registers]
        for group in waiting:
            mine = active & (np.arange(self.lanes) // 128 == group)
            if mine.any():
                self.report(number, "early read", "a product that writes this register was not waited for", mine, None)

    def counts(self) -> Counts:
        """Of the threads that ran here, without bytes."""
        found = Counts(blocks=self.lanes // self.threads)
        for step, times in enumerate(self.executed):
            for name, count in self.program.classes[step].items():
                found.instructions[name] += count * int(times)
            found.matrix_flops += self.program.flops[step] * int(times)
        return found

"""Global and shared memory of a launch, with a shadow that knows who read and wrote what, and when.

A shadow has one cell for each granule, the narrowest access of the kernel. Time is counted by barriers: two accesses of
different threads, one of them a write, must have a barrier of the block between them, or one of the warp if both are
in it. Threads that write the value that is there already do not race: layouts that hold a value more than once do so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .numbers import Array

GUARD = 4096  # bytes about every allocation of global memory
BASE = 0x7F00_0000_0000  # of global addresses
SHARED_BASE = 1024  # of shared addresses: swizzled matrices begin at its multiples
_NOBODY, _MANY = -1, -2
_LONG_AGO = -1  # a time before any barrier

Report = Callable[..., None]  # (kind, text, lanes that are at fault, their addresses)


class Global:
    """Copies of everything that a launch was given, in one piece of memory with guards between.

    Args:
        sizes: in bytes, of the allocations.
        granule: bytes of the narrowest access.
    """

    bytes: Array
    allowed: Array
    writer: Array
    reader: Array
    fetched: Array
    stored: Array
    read_bytes: int
    written_bytes: int

    def __init__(self, sizes: list[int], granule: int) -> None:
        self.starts: list[int] = []
        end = GUARD
        for size in sizes:
            self.starts.append(end)
            end = -(-(end + size) // 256) * 256 + GUARD
        self.bytes = np.zeros(end, np.uint8)
        self.views: dict[int, Array] = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.granule = granule
        self.allowed = np.zeros(end, bool)
        self.writer = np.full(end // granule, _NOBODY, np.int32)
        self.reader = np.full(end // granule, _NOBODY, np.int32)
        self.fetched, self.stored = np.zeros(end // granule, bool), np.zeros(end // granule, bool)
        self.read_bytes = self.written_bytes = 0

    def allow(self, start: int, stop: int) -> None:
        """Let accesses reach the bytes of one tensor."""
        self.allowed[start:stop] = True

    def offsets(self, address: Array, size: int, count: int, active: Array, report: Report) -> Array:
        """Where accesses of `count` times `size` bytes go; what is wrong about them is reported."""
        offset = (address - np.uint64(BASE)).view(np.int64)
        total = size * count
        inside = (offset >= 0) & (offset <= len(self.bytes) - total)
        offset = np.where(active & inside, offset, 0)
        crooked = (offset & (total - 1)) != 0
        if (crooked & active).any():
            report("misaligned", f"{total} bytes at no multiple of {total}", active & crooked, address)
        good = inside & self.allowed[offset] & self.allowed[offset + (total - 1)]
        if not (good | ~active).all():
            report("outside", f"{total} bytes outside every tensor", active & ~good, address)
        return offset

    @property
    def distinct_read_bytes(self) -> int:
        """Read at least once before the launch itself wrote there."""
        return int(np.count_nonzero(self.fetched)) * self.granule

    @property
    def distinct_written_bytes(self) -> int:
        """Written at least once."""
        return int(np.count_nonzero(self.stored)) * self.granule

    def _cells(self, offset: Array, total: int, active: Array) -> list[Array]:
        first = offset[active] // self.granule
        return [first + i for i in range(max(1, total // self.granule))]

    def load(self, address: Array, size: int, count: int, active: Array, block: Array, report: Report) -> list[Array]:
        """`count` values of `size` bytes at each address."""
        offset = self.offsets(address, size, count, active, report)
        who = block[active]
        for cell in self._cells(offset, size * count, active):
            writer = self.writer[cell]
            other = (writer != _NOBODY) & (writer != who)
            if other.any():
                _report(report, "two blocks", "another block wrote this in the same launch", active, other, address)
            self.fetched[cell] |= ~self.stored[cell]
            reader = self.reader[cell]
            self.reader[cell] = np.where((reader == _NOBODY) | (reader == who), who, _MANY)
            _mark_many(self.reader, cell, who)
        self.read_bytes += int(active.sum()) * size * count
        view, index = self.views[size], offset // size
        return [np.where(active, view[index + i], view.dtype.type(0)) for i in range(count)]

    def store(
        self, address: Array, values: list[Array], size: int, active: Array, block: Array, report: Report
    ) -> None:
        """Write `values`, one after the other, at each address."""
        count = len(values)
        offset = self.offsets(address, size, count, active, report)
        who = block[active]
        for cell in self._cells(offset, size * count, active):
            writer, reader = self.writer[cell], self.reader[cell]
            other = (writer != _NOBODY) & (writer != who)
            if other.any():
                _report(report, "two writers", "another block wrote this in the same launch", active, other, address)
            other = (reader != _NOBODY) & (reader != who)
            if other.any():
                _report(report, "two blocks", "another block read this in the same launch", active, other, address)
            self.writer[cell] = who
            self.stored[cell] = True
            if not np.array_equal(self.writer[cell], who):
                other = self.writer[cell] != who
                _report(report, "two writers", "two blocks write this at once", active, other, address)
        self.written_bytes += int(active.sum()) * size * count
        view, index = self.views[size], offset[active] // size
        for i, value in enumerate(values):
            view[index + i] = value[active]


def _report(report: Report, kind: str, text: str, active: Array, among_active: Array, address: Array) -> None:
    guilty = np.zeros_like(active)
    guilty[np.flatnonzero(active)[among_active]] = True
    report(kind, text, guilty, address)


def _mark_many(shadow: Array, cell: Array, who: Array) -> None:
    """Where several wrote their names into a cell at once, one is left: such a cell belongs to many."""
    found = shadow[cell]
    lost = (found != who) & (found != _MANY)
    if lost.any():
        shadow[cell[lost]] = _MANY


@dataclass
class Copy:
    """Bytes on their way into shared memory: they arrive at the wait of the group that they were committed to."""

    lanes: Array
    offsets: Array
    data: list[Array]
    size: int
    groups: Array
    waits: bool = False  # for a barrier that counts its bytes, whose waiters see it without another one


@dataclass
class Use:
    """Cells of shared memory that a product reads until the wait of its group."""

    warpgroup: int
    cells: Array
    group: int


class Shared:
    """Shared memory of several blocks, one behind the other.

    Args:
        size: of one block, in bytes.
        blocks: how many there are.
        threads: of a block.
        granule: bytes of the narrowest access.
    """

    size: int
    threads: int
    granule: int
    pitch: int
    bytes: Array
    lane: Array
    first: Array
    clock: Array
    warp_clock: Array
    write_time: Array
    read_time: Array
    write_warp_time: Array
    read_warp_time: Array
    writer: Array
    reader: Array
    written_at: Array
    now: int
    arriving: Array
    used: Array
    under_way: int
    committed: Array

    def __init__(self, size: int, blocks: int, threads: int, granule: int) -> None:
        self.size, self.threads, self.granule = size, threads, granule
        self.pitch = -(-max(size, 16) // 1024) * 1024
        self.bytes = np.zeros(self.pitch * blocks, np.uint8)
        self.views: dict[int, Array] = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        cells = self.pitch * blocks // granule
        self.lane = np.arange(blocks * threads)
        self.first = (self.lane // threads) * self.pitch
        self.clock = np.ones(blocks * threads, np.int32)  # barriers of the block
        self.warp_clock = np.ones(blocks * threads, np.int32)  # and of the warp
        self.write_time, self.read_time = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.write_warp_time, self.read_warp_time = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.writer, self.reader = np.full(cells, _NOBODY, np.int32), np.full(cells, _NOBODY, np.int32)
        self.written_at = np.zeros(cells, np.int32)
        self.now = 0  # counts stores and proxy fences
        self.arriving = np.zeros(cells, np.int32)  # copies under way
        self.used = np.zeros(cells, np.int32)  # products that read it
        self.copies: list[Copy] = []
        self.under_way = 0
        self.committed = np.zeros(blocks * threads, np.int32)
        self.uses: list[Use] = []

    def offsets(self, address: Array, size: int, count: int, active: Array, report: Report) -> Array:
        """Where accesses go, in the memory of all blocks; what is wrong about them is reported."""
        total = size * count
        place = address.astype(np.int64) - SHARED_BASE
        inside = (place >= 0) & (place <= self.size - total)
        if not (inside | ~active).all():
            report("shared outside", f"{total} bytes outside the {self.size} of the block", active & ~inside, address)
        crooked = (place & (total - 1)) != 0
        if (crooked & active).any():
            report("misaligned", f"{total} bytes at no multiple of {total}", active & crooked, address)
        return np.where(active, place + self.first, 0)

    def _other(self, who: Array, lane: Array, warp_time: Array) -> Array:
        """Whether an access of this time was another thread's, with no barrier of the warp since."""
        same_warp = (who >= 0) & (who // 32 == lane // 32)
        return (who != lane) & ~(same_warp & (warp_time != self.warp_clock[lane]))

    def check_read(
        self, cell: Array, lane: Array, blame: Callable[[str, str, Array], None], *, note: bool = True
    ) -> None:
        """Threads `lane` read `cell`."""
        if self.under_way and self.arriving[cell].any():
            blame("early read", "a copy to it was not waited for", self.arriving[cell] > 0)
        written = self.write_time[cell]
        if not written.all():
            blame("unwritten", "nothing was written there before", written == 0)
        now = self.clock[lane]
        recent = written == now
        if recent.any():
            raced = recent & self._other(self.writer[cell], lane, self.write_warp_time[cell])
            if raced.any():
                blame("race", "another thread wrote it since the last barrier", raced)
        if note:
            before = self.reader[cell]
            mixed = (self.read_time[cell] == now) & (before != lane) & (before != _NOBODY)
            self.reader[cell] = np.where(mixed, _MANY, lane)
            _mark_many(self.reader, cell, lane)
            self.read_time[cell], self.read_warp_time[cell] = now, self.warp_clock[lane]

    def check_write(self, cell: Array, lane: Array, changed: Array, blame: Callable[[str, str, Array], None]) -> None:
        """Threads `lane` write `cell`, and what is there changes where `changed`."""
        if self.under_way and self.arriving[cell].any():
            blame("early write", "a copy to it was not waited for", self.arriving[cell] > 0)
        if self.uses and self.used[cell].any():
            blame("early write", "a product that reads it was not waited for", self.used[cell] > 0)
        now = self.clock[lane]
        for time, who, warp_time, what in (
            (self.read_time, self.reader, self.read_warp_time, "read"),
            (self.write_time, self.writer, self.write_warp_time, "wrote"),
        ):
            recent = (time[cell] == now) & changed
            if recent.any():
                raced = recent & self._other(who[cell], lane, warp_time[cell])
                if raced.any():
                    blame("race", f"another thread {what} it since the last barrier", raced)

    def _blame(self, active: Array, address: Array, report: Report) -> Callable[[str, str, Array], None]:
        return lambda kind, text, guilty: _report(report, kind, text, active, guilty, address)

    def load(self, address: Array, size: int, count: int, active: Array, report: Report) -> list[Array]:
        """`count` values of `size` bytes at each address."""
        offset = self.offsets(address, size, count, active, report)
        blame, lane = self._blame(active, address, report), self.lane[active]
        first = offset[active] // self.granule
        for i in range(size * count // self.granule):
            self.check_read(first + i, lane, blame)
        view, index = self.views[size], offset // size
        return [view[index + i] for i in range(count)]

    def store(self, address: Array, values: list[Array], size: int, active: Array, report: Report) -> None:
        """Write `values`, one after the other, at each address."""
        self.now += 1
        offset = self.offsets(address, size, len(values), active, report)
        blame, lane = self._blame(active, address, report), self.lane[active]
        view, index, first = self.views[size], offset[active] // size, offset[active] // self.granule
        cells = size // self.granule
        for i, value in enumerate(values):
            new = value[active]
            changed = view[index + i] != new
            for j in range(cells):
                self.check_write(first + i * cells + j, lane, changed, blame)
            view[index + i] = new
            if not np.array_equal(view[index + i], new):
                blame("race", "two threads write different values at once", view[index + i] != new)
            for j in range(cells):
                self._written(first + i * cells + j, lane)

    def _written(self, cell: Array, lane: Array) -> None:
        self.write_time[cell], self.write_warp_time[cell] = self.clock[lane], self.warp_clock[lane]
        self.writer[cell], self.written_at[cell] = lane, self.now

    # ---- asynchronous copies ----

    def copy(self, address: Array, data: list[Array], size: int, active: Array, report: Report) -> None:
        """cp.async: `data`, pieces of `size` bytes, will be there once its group was waited for."""
        offset = self.offsets(address, size, len(data), active, report)[active]
        blame, lane = self._blame(active, address, report), self.lane[active]
        first = offset // self.granule
        cells = [first + i for i in range(size * len(data) // self.granule)]
        for cell in cells:
            self.check_write(cell, lane, np.ones(len(cell), bool), blame)
        copy = Copy(lane, offset, [x[active] for x in data], size, self.committed[lane])
        self.depart(copy)
        self.copies.append(copy)

    def _cells_of(self, copy: Copy, done: Array) -> list[Array]:
        """Of each narrowest access of a copy's parts. An element narrower than that shares a cell."""
        first = copy.offsets[done] // self.granule
        return [first + i for i in range(max(1, copy.size * len(copy.data) // self.granule))]

    def depart(self, copy: Copy) -> None:
        """A copy is under way."""
        for cell in self._cells_of(copy, np.ones(len(copy.offsets), bool)):
            np.add.at(self.arriving, cell, 1)
        self.under_way += 1

    def commit(self, active: Array) -> None:
        """cp.async.commit_group."""
        self.committed[active] += 1

    def wait(self, active: Array, newest: int, *, uncommitted: bool = False) -> None:
        """cp.async.wait_group: all groups but the `newest` arrive (or also what was not committed: wait_all)."""
        left = []
        for copy in self.copies:
            limit = self.committed[copy.lanes] - newest + (1 if uncommitted else 0)
            done = active[copy.lanes] & (copy.groups < limit)
            if not done.any():
                left.append(copy)
                continue
            self.arrive(copy, done)
            if not done.all():
                rest = ~done
                data = [x[rest] for x in copy.data]
                left.append(Copy(copy.lanes[rest], copy.offsets[rest], data, copy.size, copy.groups[rest]))
        self.copies = left

    def arrive(self, copy: Copy, done: Array) -> None:
        """These parts of a copy are there."""
        view, lanes = self.views[copy.size], copy.lanes[done]
        index = copy.offsets[done] // copy.size
        for i, piece in enumerate(copy.data):
            view[index + i] = piece[done]
        for cell in self._cells_of(copy, done):
            np.add.at(self.arriving, cell, -1)
            self._written(cell, lanes)
            if copy.waits:
                self.write_time[cell], self.writer[cell] = _LONG_AGO, _NOBODY
        self.under_way -= bool(done.all())

    # ---- products that read shared memory ----

    def use(self, warpgroup: int, cells: Array, group: int) -> None:
        """A product reads these cells until its group was waited for."""
        self.used[cells] += 1
        self.uses.append(Use(warpgroup, cells, group))

    def release(self, warpgroup: int, limit: int) -> None:
        """Its groups before `limit` were waited for."""
        for use in [x for x in self.uses if x.warpgroup == warpgroup and x.group < limit]:
            self.used[use.cells] -= 1
            self.uses.remove(use)

    def barrier(self, lanes: Array) -> None:
        """A barrier of these threads, all those of a block or some."""
        self.clock[lanes] = self.clock[lanes].max() + 1

    def warp_barrier(self, lanes: Array) -> None:
        """bar.warp.sync of these threads."""
        self.warp_clock[lanes] += 1

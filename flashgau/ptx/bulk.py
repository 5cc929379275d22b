"""Hopper's bulk copies by tensor maps, and the barriers in shared memory that count their bytes.

A tensor map is opaque in PTX: here its 128 bytes hold the fields one after the other. A copy into shared memory arrives
as late as it may: when somebody waits for its barrier. One out of shared memory reads at once, and what it reads must
stay until its group was waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import UnknownInstruction
from .memory import SHARED_BASE, Copy
from .numbers import Array

if TYPE_CHECKING:
    from .machine import Machine

BYTES = 128
# Place and bytes of each field; those with several entries have one behind the other.
_FIELDS = {"global_address": (0, 8), "rank": (8, 4), "elemtype": (12, 4), "box_dim": (16, 4), "global_dim": (36, 4),
           "global_stride": (56, 8), "element_stride": (88, 4), "interleave_layout": (108, 4), "swizzle_mode": (112, 4),
           "fill_mode": (116, 4)}  # fmt: skip
ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}  # of types, by number
_WIDTHS = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes that are swizzled together, by mode


@dataclass
class Barrier:
    """An mbarrier: how many must still arrive in this phase, and which bytes are on their way."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    copies: list[tuple[Copy, int]] = field(default_factory=list)

    def settle(self) -> None:
        """Begin the next phase, if everybody and everything has arrived."""
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Bulk:
    """Of the blocks that a machine runs."""

    groups: np.ndarray[Any, Any]

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.barriers: dict[int, Barrier] = {}
        self.groups = np.zeros(machine.lanes, np.int64)

    def _lanes(self, active: Array) -> list[int]:
        return [int(lane) for lane in np.flatnonzero(active)]

    def _blame(self, number: int, lane: int) -> Any:
        """A reporter of places in memory for what one thread started."""
        machine = self.machine
        return lambda kind, text, guilty, address: machine.report(
            number, kind, text, machine.only(lane), np.full(machine.lanes, address[np.flatnonzero(guilty)[0]])
        )

    # ---- barriers ----

    def _at(self, number: int, address: Array, lane: int) -> Barrier:
        place = int(address[lane]) - SHARED_BASE + int(self.machine.shared.first[lane])
        if place not in self.barriers:
            text = "there is no mbarrier: nobody began one here, or it has ended"
            self.machine.report(number, "unwritten", text, self.machine.only(lane), address)
        return self.barriers[place]

    def init(self, number: int, address: Array, count: Array, active: Array) -> None:
        """mbarrier.init."""
        for lane in self._lanes(active):
            place = int(address[lane]) - SHARED_BASE + int(self.machine.shared.first[lane])
            self.barriers[place] = Barrier(int(count[lane]), int(count[lane]))

    def end(self, number: int, address: Array, active: Array) -> None:
        """mbarrier.inval."""
        for lane in self._lanes(active):
            if self._at(number, address, lane).copies:
                text = "a copy that it counts is still under way"
                self.machine.report(number, "early write", text, self.machine.only(lane), address)
            del self.barriers[int(address[lane]) - SHARED_BASE + int(self.machine.shared.first[lane])]

    def arrive(self, number: int, address: Array, expected: Array | None, active: Array) -> None:
        """mbarrier.arrive, and with `expected` bytes arrive.expect_tx."""
        for lane in self._lanes(active):
            barrier = self._at(number, address, lane)
            barrier.bytes += 0 if expected is None else int(expected[lane])
            barrier.pending -= 1
            barrier.settle()

    def waited(self, number: int, address: Array, parity: Array, active: Array) -> Array:
        """mbarrier.try_wait.parity: whether the phase of this parity is over. Copies that are counted arrive now."""
        found = np.zeros(self.machine.lanes, bool)
        for lane in self._lanes(active):
            barrier = self._at(number, address, lane)
            for copy, size in barrier.copies:
                self.machine.shared.arrive(copy, np.ones(len(copy.offsets), bool))
                barrier.bytes -= size
            barrier.copies.clear()
            barrier.settle()
            found[lane] = barrier.phase & 1 != int(parity[lane]) & 1
        self.machine.yielded |= active & ~found
        return found

    # ---- tensor maps ----

    def replace(self, number: int, name: str, address: Array, place: int, value: Array, active: Array) -> None:
        """tensormap.replace: one entry of a field of the map in shared memory."""
        start, size = _FIELDS[name]
        where = address.astype(np.uint32) + np.uint32(start + size * place)
        self.machine.store_shared(number, where, [self.machine.spread(value).astype(f"u{size}")], size, active)

    def publish(self, number: int, target: Array, source: Array, active: Array) -> None:
        """tensormap.cp_fenceproxy: each warp copies its map from shared to global memory."""
        machine = self.machine
        machine.whole(number, active)
        first = active & (machine.laneid == 0)
        for i in range(0, BYTES, 8):
            data = machine.load_shared(number, source.astype(np.uint32) + np.uint32(i), 8, 1, first)
            machine.store_global(number, target + np.uint64(i), data, 8, first)

    def _map(self, number: int, lane: int, address: int) -> dict[str, Array]:
        """A map's fields, read from global memory."""
        machine = self.machine
        where = np.uint64(address) + np.arange(0, BYTES, 8, dtype=np.uint64)
        every, block = np.ones(len(where), bool), np.full(len(where), machine.block[lane])
        (words,) = machine.memory.load(where, 8, 1, every, block, self._blame(number, lane))
        raw = np.ascontiguousarray(words).view(np.uint8)
        counts = {"box_dim": 5, "global_dim": 5, "global_stride": 4, "element_stride": 5}
        return {
            name: raw[start : start + size * counts.get(name, 1)].view(f"u{size}")
            for name, (start, size) in _FIELDS.items()
        }

    def _box(self, number: int, lane: int, address: int, corner: list[int]) -> tuple[int, Array, Array, Array]:
        """Of a copy's elements: bytes of one, whether they lie in the tensor, global addresses, offsets in the tile."""
        fields = self._map(number, lane, address)
        rank, size = int(fields["rank"][0]) + 1, ELEMENT_BYTES.get(int(fields["elemtype"][0]), 0)
        plain = int(fields["interleave_layout"][0]) == 0 and int(fields["fill_mode"][0]) == 0
        if not size or not plain or rank != len(corner) or (fields["element_stride"][:rank] != 1).any():
            raise UnknownInstruction(f"ptx: {self.machine.kernel.instructions[number].text}: a tensor map of this form")
        box, dims = (fields[name][:rank].astype(np.int64) for name in ("box_dim", "global_dim"))
        strides = [size, *(int(s) for s in fields["global_stride"][: rank - 1])]
        steps = np.indices([int(n) for n in box[::-1]]).reshape(rank, -1)[::-1]  # the first axis runs fastest
        places = [start + step for start, step in zip(corner, steps, strict=True)]
        inside = np.all([(p >= 0) & (p < n) for p, n in zip(places, dims, strict=True)], axis=0)
        reach = sum(p * s for p, s in zip(places, strides, strict=True))
        where = np.uint64(fields["global_address"][0]) + np.where(inside, reach, 0).astype(np.uint64)
        offsets = np.arange(len(inside)) * size
        return size, inside, where, self._swizzled(offsets, int(fields["swizzle_mode"][0]))

    @staticmethod
    def _swizzled(offsets: Array, mode: int) -> Array:
        """Of a tile that begins at a multiple of 1024 bytes."""
        width = _WIDTHS[mode]
        return offsets ^ (((offsets >> 7) & (width // 16 - 1)) << 4) if width else offsets

    def load(self, number: int, target: Array, maps: Array, corner: list[Array], barrier: Array, active: Array) -> None:
        """cp.async.bulk.tensor into shared memory, counted by a barrier. What lies outside of the tensor is zero."""
        machine, shared = self.machine, self.machine.shared
        for lane in self._lanes(active):
            at = self._at(number, barrier, lane)
            start = [int(np.int32(c[lane])) for c in corner]
            size, inside, where, offsets = self._box(number, lane, int(maps[lane]), start)
            block = np.full(len(where), machine.block[lane])
            (data,) = machine.memory.load(where, size, 1, inside, block, self._blame(number, lane))
            offsets = offsets + int(target[lane]) - SHARED_BASE
            cells, blame = machine.shared_cells(number, lane, offsets, "a bulk copy outside of the block's")
            shared.check_write(cells, np.full(len(cells), lane), np.ones(len(cells), bool), blame)
            lanes = np.full(len(offsets), lane)
            copy = Copy(lanes, offsets + shared.first[lane], [data], size, np.zeros(len(offsets)), waits=True)
            shared.depart(copy)
            at.copies.append((copy, size * len(offsets)))

    def store(self, number: int, maps: Array, corner: list[Array], source: Array, active: Array) -> None:
        """cp.async.bulk.tensor out of shared memory: what lies outside of the tensor is dropped."""
        machine, shared = self.machine, self.machine.shared
        for lane in self._lanes(active):
            start = [int(np.int32(c[lane])) for c in corner]
            size, inside, where, offsets = self._box(number, lane, int(maps[lane]), start)
            offsets = offsets + int(source[lane]) - SHARED_BASE
            cells, blame = machine.shared_cells(number, lane, offsets, "a bulk copy outside of the block's")
            shared.check_read(cells, np.full(len(cells), lane), blame, note=False)
            machine.check_fenced(cells, lane, blame)
            data = shared.views[size][(offsets + shared.first[lane]) // size]
            block = np.full(len(where), machine.block[lane])
            machine.memory.store(where, [data], size, inside, block, self._blame(number, lane))
            shared.use(-1 - lane, cells, int(self.groups[lane]))

    def commit(self, active: Array) -> None:
        """cp.async.bulk.commit_group."""
        self.groups[active] += 1

    def wait(self, active: Array, newest: int) -> None:
        """cp.async.bulk.wait_group of these threads' copies out of shared memory."""
        for lane in {-1 - use.warpgroup for use in self.machine.shared.uses if use.warpgroup < 0}:
            if active[lane]:
                self.machine.shared.release(-1 - lane, int(self.groups[lane]) - newest)

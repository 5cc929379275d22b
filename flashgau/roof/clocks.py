"""The modelled time of one launch: what its programs do on the multiprocessors, or what memory moves, and its start.

Each program's branches were executed (`flashgau.ptx.footprint.paths`), so how often it runs each part of the code is
known. Hot loops take the clocks of `flashgau.sass.model`. Of everything else each instruction of the PTX is issued once
by every warp, products take the matrix units' clocks, and a basic block that loads from global memory awaits it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flashgau import sass
from flashgau.ptx.program import Program
from flashgau.sass.loops import natural_loops
from flashgau.sass.model import LATENCY, MACHINES

from .schedule import makespan

Array = np.ndarray[Any, Any]


class Memory(NamedTuple):
    """Behind the multiprocessors, by data sheets: bytes per second of HBM, and bytes of the last cache before it."""

    rate: float
    cache: int


MEMORIES = {
    "sm_80": Memory(2.04e12, 40 * 2**20),  # A100 80 GB SXM
    "sm_86": Memory(0.696e12, 6 * 2**20),  # A40
    "sm_89": Memory(0.864e12, 96 * 2**20),  # L40S
    "sm_90": Memory(4.8e12, 50 * 2**20),  # H200; its multiprocessors are those of an H100 SXM
    "sm_100": Memory(8.0e12, 126 * 2**20),  # B200
}
# What of the data sheet is reached under load: an H200 was measured at 790 of 989 TFLOP/s and at 4.3 of 4.8 TB/s.
SUSTAINED, STREAM = 0.8, 0.9
PORT = 64  # bytes per clock that a multiprocessor takes from the cache behind it
VENDOR = 0.7  # of the peak, by a product of the vendor's library inside of a call
START = 2e-6  # seconds from the end of a launch until the next one's programs run


def peak(target: str) -> float:
    """FLOP per second of half-precision products, by the data sheet."""
    machine = MACHINES[target]
    return 2e9 * machine.macs * machine.sms * machine.ghz


def memory_seconds(target: str, bytes_moved: float) -> float:
    """Of a stream of bytes to and from HBM."""
    return bytes_moved / (STREAM * MEMORIES[target].rate)


def floor_seconds(target: str, flop: float, bytes_moved: float) -> float:
    """What the products, or the bytes, take at least."""
    return max(flop / (SUSTAINED * peak(target)), memory_seconds(target, bytes_moved))


@dataclass(frozen=True)
class Code:
    """A compiled kernel as the model wants it.

    Attributes:
        warps: of a program.
        resident: programs that share a multiprocessor.
        loops: the hot ones of its machine code.
        registers: of a thread.
        shared_bytes: of a program.
    """

    warps: int
    resident: int
    loops: tuple[sass.HotLoop, ...]
    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class Work:
    """What the programs of a launch do.

    Attributes:
        flop: of matrix instructions, all programs together.
        alone: clocks of each program with a multiprocessor to itself; and `busy`, of its busiest pipe.
        hot: of these clocks the share that the hot loops have.
        source: how hot loops were found.
    """

    flop: int
    alone: Array
    busy: Array
    hot: float
    source: str


def work(target: str, program: Program, counts: Array, code: Code) -> Work:
    """From how often each program runs each basic block of the PTX."""
    machine = MACHINES[target]
    flops = np.array(program.flops) * code.warps  # of a program, each time it runs a block
    instructions = np.array([c.total() - c["move"] - c["param load"] for c in program.classes])
    loads = np.array([c["global load"] > 0 for c in program.classes])
    alone, busy = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    hot = np.zeros(len(flops), bool)
    pairs, source = _paired(program, flops, code)
    for blocks, loop, times in pairs:
        first = max(blocks, key=lambda block: flops[block])
        alone += counts[first] / times * loop.clocks["alone"]
        busy += counts[first] / times * loop.clocks["busy"]
        hot[list(blocks)] = True
    in_loops = float(alone.sum())
    issue = (instructions * ~hot) @ counts * code.warps / 4
    tensor = (flops * ~hot) @ counts / (2 * machine.macs)
    alone += issue + tensor + (loads & ~hot) @ counts * LATENCY
    busy += np.maximum(issue, tensor)
    return Work(int((flops @ counts).sum()), alone, busy, in_loops / max(float(alone.sum()), 1e-9), source)


def _paired(program: Program, flops: Array, code: Code) -> tuple[list[tuple[frozenset[int], sass.HotLoop, float]], str]:
    """The innermost loops of the PTX with products, each beside that of the machine code which does as many, and how
    many iterations of the first are one of the second."""
    loops = natural_loops(program.following)
    products = {header: body for header, body in loops.items() if flops[list(body)].any()}
    inner = [products[h] for h in sorted(products) if not any(other < products[h] for other in products.values())]
    machine = [loop for loop in code.loops if loop.clocks]
    if not inner:
        return [], "instructions of the PTX"
    if not machine:
        return [], "instructions of the PTX, loops at the peak"
    sizes = [sum(flops[block] for block in body) / 2 for body in inner]  # multiply-adds
    found = []
    for number, (body, macs) in enumerate(zip(inner, sizes, strict=True)):
        equal = [loop for loop in machine if _whole(_macs(loop, code.warps) / macs)]
        if len(inner) == len(machine) and _whole(_macs(machine[number], code.warps) / macs):
            loop = machine[number]
        elif equal:
            loop = min(equal, key=lambda one: _macs(one, code.warps))
        else:
            loop = min(machine, key=lambda one: abs(_macs(one, code.warps) - macs))
        found.append((body, loop, _macs(loop, code.warps) / macs))
    return found, "hot loops"


def _macs(loop: sass.HotLoop, warps: int) -> int:
    """Multiply-adds of a program in an iteration of the machine code."""
    total = 0
    for shape, count in loop.matrix.items():
        m, n, k = (int(size) for size in shape.split("x"))
        total += m * n * k * count * (warps // 4 if m >= 64 else warps)
    return total


def _whole(ratio: float) -> bool:
    return ratio >= 0.999 and abs(ratio - round(ratio)) < 1e-3


def seconds(target: str, done: Work, code: Code, asked: float, moved: float) -> tuple[float, float]:
    """Of a launch without its start: on the multiprocessors, and for its bytes; the longer of them is its time.

    Args:
        target: such as "sm_90".
        done: what its programs do.
        code: of its kernel.
        asked: bytes that all programs together ask the caches for, or write; as if each did as many.
        moved: bytes to and from HBM.
    """
    machine = MACHINES[target]
    port = asked / PORT / max(1, len(done.busy))
    alone, busy = (np.maximum(x, port).tolist() for x in (done.alone, done.busy))
    clocks = makespan(alone, busy, machine.sms, code.resident)
    return clocks / (1e9 * machine.ghz * SUSTAINED), memory_seconds(target, moved)

"""Clocks of a hot loop by pipe on one multiprocessor (SM), and what the GPU would reach if nothing else cost time.

The pipes of an SM: the matrix units; shared memory; and, for each of its four schedulers, the issue of one instruction
of a warp per clock, FP32, integer and comparison (ALU), and special functions (exp). A loop's instructions are split
into those under an asynchronous product and those outside: outside + max(matrix, shared memory, under), and the latency
of global memory where an iteration awaits the loads it began. Programs that share an SM fill each other's gaps.

A model's number is never a measured one: docs/tuning.md has its calibration.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from .text import Instruction
from .tiles import TileLoop

LATENCY = 470  # clocks until a load of global memory is there (L2 on an H100)


class Machine(NamedTuple):
    """What one GPU does in a clock: data sheets, and for Hopper the published microbenchmarks.

    Attributes:
        sms: multiprocessors.
        ghz: their clock under load.
        macs: dense half-precision multiply-adds per clock and SM, of asynchronous products where it has them.
        warp_macs: the same of HMMA, which a warp issues and awaits.
        fp32: clocks for which an instruction of a warp holds its scheduler's FP32 pipe; others likewise.
        shared: bytes of shared memory per clock and SM.
        shared_bytes: of shared memory on an SM.
        warps: that an SM holds.
    """

    sms: int
    ghz: float
    macs: int
    warp_macs: int
    fp32: int
    alu: int = 2
    imad: int = 2
    exp: int = 8
    shared: int = 128
    shared_bytes: int = 233_472
    registers: int = 65_536
    warps: int = 64


# sm_90 is calibrated against published measurements; the others are data sheets alone.
MACHINES = {
    "sm_80": Machine(108, 1.41, 1024, 1024, fp32=2, shared_bytes=167_936),  # A100
    "sm_86": Machine(84, 1.74, 512, 512, fp32=1, shared_bytes=102_400, warps=48),  # A40
    "sm_89": Machine(142, 2.52, 512, 512, fp32=1, shared_bytes=102_400, warps=48),  # L40S
    "sm_90": Machine(132, 1.83, 2048, 1024, fp32=1),  # H100 SXM
    "sm_100": Machine(148, 1.85, 4096, 1024, fp32=1),  # B200
}
_RESERVED = 1024  # bytes of shared memory that the system takes for each program

_ALU = (
    "FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "SEL", "LOP3", "IADD3", "IADD", "LEA", "ISETP", "F2FP", "SHF", "PRMT",
    "IMNMX", "VIADD", "VIMNMX", "VIMNMX3", "VIADDMNMX", "PLOP3", "MOV", "HADD2", "IABS",
)  # fmt: skip
_FP32 = {"FFMA": 1, "FMUL": 1, "FADD": 1, "FFMA2": 2, "FMUL2": 2, "FADD2": 2}  # results per thread


class Program(NamedTuple):
    """What one program of a kernel takes."""

    warps: int
    registers: int  # of a thread
    shared_bytes: int


class Clocks(NamedTuple):
    """Of one iteration of a loop in one program.

    Attributes:
        tensor: of the matrix units.
        shared: of shared memory: reads of products, writes of loads, and the program's own.
        issue: of the schedulers, and `fp32`, `alu`, `exp` of their pipes.
        under: of the busiest of these four while a product is in flight.
        outside: of the busiest otherwise.
        latency: of loads that are awaited in the iteration that began them.
        total: of an iteration, where as many programs as fit share the SM.
        alone: of an iteration with the SM to itself.
        busy: of the busiest of all pipes.
    """

    tensor: float
    shared: float
    issue: float
    fp32: float
    alu: float
    exp: float
    under: float
    outside: float
    latency: float
    total: float
    alone: float
    busy: float

    @property
    def soft(self) -> float:
        """Of everything but products: the busiest of the schedulers' pipes."""
        return max(self.issue, self.fp32, self.alu, self.exp)


class Estimate(NamedTuple):
    """What the model says of a loop.

    Attributes:
        clocks: by pipe.
        programs: how many share an SM.
        bound: what holds the loop: "tensor", "shared memory", "issue", "fp32", "integer", "exp" or "latency".
        serial: TFLOP/s of the whole GPU if nothing overlapped, and `overlap` if everything did.
        rate: modelled TFLOP/s of useful work as the code is.
    """

    clocks: Clocks
    programs: int
    bound: str
    serial: float
    overlap: float
    rate: float


class Flight(NamedTuple):
    """A loop's instructions by whether an asynchronous product is in flight when they are issued."""

    under: list[Instruction]
    outside: list[Instruction]

    @property
    def exps(self) -> int:
        """How many exponentials stand under a product."""
        return sum(map(is_exp, self.under))


def is_exp(i: Instruction) -> bool:
    """Whether an instruction is an exponential."""
    return i.opcode.startswith(("MUFU.EX2", "v_exp"))


def flight(body: list[Instruction]) -> Flight:
    """Follow the products of a loop from their issue to the wait; what is in flight at its end is so at its start.

    A wait that leaves n > 0 groups in flight keeps the flight.
    """
    flying, found = False, Flight([], [])
    for turn in range(2):
        for i in body:
            if i.name.startswith(("HGMMA", "QGMMA")) or (i.is_matrix and i.name.startswith("UTC")):
                flying = True
            elif i.opcode.startswith("WARPGROUP.DEPBAR"):
                flying = flying and int(i.operands.split(",")[-1], 16) > 0
            elif i.opcode.startswith("SYNCS.PHASECHK"):  # of Blackwell's products; Hopper's loads have them, too
                flying = flying and any(j.name.startswith("HGMMA") for j in body)
            if turn:
                (found.under if flying else found.outside).append(i)
    return found


def prefetch(body: list[Instruction], tiles: TileLoop | None) -> float | None:
    """Iterations of loads in flight when the loop awaits one; None where it loads nothing.

    Of cp.async what the wait leaves over the groups of an iteration, of bulk copies what the code before the loop
    issued; loads into registers are awaited at once. (Not on AMD's GPUs, where all loads are prefetched into them.)
    """
    if any(i.opcode.startswith("v_") for i in body):
        return None
    found = []
    groups = sum(i.name == "LDGDEPBAR" for i in body)
    waits = [int(i.operands.split(",")[-1], 16) for i in body if i.opcode.startswith("DEPBAR") and "SB0" in i.operands]
    if groups and waits:
        found.append(min(waits) * (tiles.times if tiles else 1) / groups)
    if tiles is not None and tiles.bulk_ahead is not None:
        found.append(tiles.bulk_ahead)
    if found:
        return min(found)
    return 0.0 if any(i.class_ == "global load" for i in body) else None


_HMMA = re.compile(r"HMMA\.(16)(8)(\d+)|[IDQ]MMA\.(\d+)(8)(\d+)")
_HGMMA = re.compile(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)")
_MFMA = re.compile(r"v_s?mfma\w*?_(\d+)x(\d+)x(\d+)")


def shapes(body: list[Instruction], tiles: TileLoop | None) -> Counter[tuple[int, int, int]]:
    """The matrix instructions of a loop by their shape. Blackwell's do not name it: it is that of the products."""
    found: Counter[tuple[int, int, int]] = Counter()
    for i in body:
        if m := _HGMMA.match(i.opcode) or _MFMA.match(i.opcode) or _HMMA.match(i.opcode):
            m_, n, k = (int(size) for size in m.groups() if size)
            found[m_, n, k] += 1
    if any(i.is_matrix and i.name.startswith("UTC") for i in body) and tiles is not None:
        for product in tiles.products:
            m_ = min(product.m, 128)
            found[m_, product.n, 16] += product.macs // (m_ * product.n * 16)
    return found


def machine_macs(body: list[Instruction], warps: int) -> int | None:
    """Multiply-adds that the machine code of one program does in an iteration; None where it does not say."""
    total = 0
    for i in body:
        if i.is_matrix:
            if not (m := _HGMMA.match(i.opcode) or _MFMA.match(i.opcode) or _HMMA.match(i.opcode)):
                return None
            m_, n, k = (int(size) for size in m.groups() if size)
            total += m_ * n * k * (warps // 4 if _HGMMA.match(i.opcode) else warps)
    return total


def estimate(target: str, body: list[Instruction], program: Program, tiles: TileLoop | None) -> Estimate | None:
    """The model of a loop; None for a machine it does not know.

    Args:
        target: such as "sm_90".
        body: the loop's instructions, of one warp.
        program: what one program takes.
        tiles: the loop as the compiler was asked for it, whose products are the useful work.
    """
    machine = MACHINES.get(target)
    if machine is None:
        return None
    share = program.warps / 4  # warps of one scheduler
    tensor, shared = _products(machine, body, program.warps, tiles)
    shared += _shared_bytes(body, program.warps, tiles) / machine.shared
    pipes = _pipes(machine, body, share)
    flown = flight(body)
    latency = LATENCY if prefetch(body, tiles) == 0 else 0
    under, outside = (max(_pipes(machine, part, share)) for part in flown)
    if flown.under:
        parts = [_busiest(machine, flown.under, share, tensor, shared), _busiest(machine, flown.outside, share)]
    elif share >= 2:  # warps fill each other's gaps
        parts = [_busiest(machine, body, share, tensor, shared)]
    else:
        parts = [("tensor", tensor), _busiest(machine, body, share)]
        if shared > sum(clocks for _, clocks in parts):
            parts = [("shared memory", shared)]
    parts.append(("latency", latency))
    alone = sum(clocks for _, clocks in parts)
    bound = max(parts, key=lambda part: part[1])[0]
    programs = programs_on(machine, program)
    name, filled = _busiest(machine, body, share, tensor, shared)
    total = alone
    if programs > 1:
        total = max(filled, alone / programs)
        bound = name if filled >= total else bound
    clocks = Clocks(tensor, shared, *pipes, under, outside, latency, total, alone, filled)
    macs = tiles.macs if tiles is not None else machine_macs(body, program.warps) or 0

    def rate(t: float) -> float:
        return 2 * macs / t * machine.sms * machine.ghz / 1e3

    return Estimate(clocks, programs, bound, rate(tensor + clocks.soft), rate(filled), rate(total))


def programs_on(machine: Machine, program: Program) -> int:
    """How many programs share an SM."""
    by_registers = machine.registers // (-(-program.registers // 8) * 8 * 32 * program.warps)
    by_shared = machine.shared_bytes // (program.shared_bytes + _RESERVED)
    return max(1, min(by_registers, by_shared, machine.warps // program.warps))


def _products(machine: Machine, body: list[Instruction], warps: int, tiles: TileLoop | None) -> tuple[float, float]:
    """Clocks of the matrix units, and of shared memory for their operands, of one program's iteration."""
    tensor = shared = 0.0
    for i in body:
        if m := _HGMMA.match(i.opcode):
            n = int(m[2])
            from_shared = "gdesc" in i.operands.split(",")[1]  # the first factor: 64 rows of 32 bytes
            reads = n / 4 + (16 if from_shared else 0)
            shared += reads * warps / 4
            tensor += max(n / 2, reads) * warps / 4
        elif m := _HMMA.match(i.opcode):
            sizes = [int(size) for size in m.groups() if size]
            slow = 2 if ".TF32" in i.opcode else 1
            tensor += slow * sizes[0] * sizes[1] * sizes[2] * warps / machine.warp_macs
    if any(i.is_matrix and i.name.startswith("UTC") for i in body) and tiles is not None:
        for product in tiles.products:
            steps = product.macs / (min(product.m, 128) * product.n * 16)
            reads = product.n / 4 + (0 if product.held else min(product.m, 128) / 4)
            shared += steps * reads
            tensor += steps * max(product.n / 2 * 4096 / machine.macs, reads)
    return tensor, shared


def _shared_bytes(body: list[Instruction], warps: int, tiles: TileLoop | None) -> float:
    """What the instructions of one program move to and from shared memory besides, per iteration."""
    total = 0.0 if tiles is None else float(tiles.bulk_bytes)
    for i in body:
        if i.name in ("LDSM", "STSM"):
            total += 128 * warps * (int(i.opcode[-1]) if i.opcode[-2:] in (".2", ".4") else 1)
        elif i.name == "LDS" and tiles is not None and not tiles.reads_blocks:
            total += 128 * warps  # values of rows, which threads share
        elif i.name in ("LDGSTS", "LDS", "STS", "ATOMS"):
            total += 32 * warps * i.bytes
    return total


def _pipes(machine: Machine, body: list[Instruction], share: float) -> tuple[float, float, float, float]:
    """Clocks of a scheduler: issue, fp32, alu, exp."""
    names = Counter(i.name for i in body)
    fp32 = sum(results * names[name] for name, results in _FP32.items()) * machine.fp32 + machine.imad * names["IMAD"]
    alu = machine.alu * sum(count for name, count in names.items() if name in _ALU)
    return len(body) * share, fp32 * share, alu * share, machine.exp * names["MUFU"] * share


def _busiest(
    machine: Machine, body: list[Instruction], share: float, tensor: float = 0, shared: float = 0
) -> tuple[str, float]:
    """The pipe that a part of a loop keeps busy longest, and its clocks."""
    issue, fp32, alu, exp = _pipes(machine, body, share)
    clocks = {"tensor": tensor, "shared memory": shared, "issue": issue, "fp32": fp32, "integer": alu, "exp": exp}
    return max(clocks.items(), key=lambda item: item[1])

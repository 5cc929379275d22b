"""One hot loop of a kernel in numbers, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from . import model
from .loops import hot_loops
from .text import CLASSES, Instruction, parse
from .tiles import TileLoop, tile_loops

NARROWEST, REDUNDANCY, AHEAD, UNDER = 32, 1.01, 1.0, 0.9  # what a loop of products is held to


@dataclass(frozen=True)
class HotLoop:
    """What one hot loop holds, per iteration: instructions are those of one warp, products those of one program.

    Attributes:
        instructions: how many.
        classes: how many of each class (`text.CLASSES`).
        matrix: matrix instructions by shape, such as {"64x128x16": 4}.
        narrowest: the least N of those that a group of warps or more shares; None without such.
        useful: multiply-adds that the kernel asked for.
        redundancy: those of the machine code over these; None where the machine code does not say.
        prefetch: iterations of loads in flight while one is awaited; None where nothing is loaded.
        spills: instructions that move registers to memory and back.
        selects: FSEL, FSETP and SEL.
        mask_free: whether no loop of the same products in this kernel has fewer selects.
        narrow: loads of half-precision blocks by less than 16 bytes.
        exps: exponentials, and `exps_under`, those issued while a product is in flight.
        clocks: the model's, by pipe; empty where it does not know the GPU.
        programs: how many share a multiprocessor.
        rate: modelled TFLOP/s; `serial` if nothing overlapped, `overlap` if everything did.
        bound: what holds it.
    """

    instructions: int
    classes: dict[str, int] = field(hash=False)
    matrix: dict[str, int] = field(hash=False)
    narrowest: int | None
    useful: int | None
    redundancy: float | None
    prefetch: float | None
    spills: int
    selects: int
    mask_free: bool
    narrow: int
    exps: int
    exps_under: int
    clocks: dict[str, float] = field(hash=False)
    programs: int | None = None
    rate: float | None = None
    serial: float | None = None
    overlap: float | None = None
    bound: str = "not modelled"

    def misses(self, skewed: bool = False) -> list[str]:
        """What a loop of products is held to and this one misses; `skewed`: whether its exponentials are under one."""
        under = self.exps_under / self.exps if self.exps else 1.0
        found = {
            f"{self.spills} spills": self.spills > 0,
            f"redundancy {self.redundancy or 0:.2f}": (self.redundancy or 0) > REDUNDANCY,
            f"N {self.narrowest}": self.narrowest is not None and self.narrowest < NARROWEST,
            f"prefetch {self.prefetch or 0:.2g}": self.prefetch is not None and self.prefetch < AHEAD,
            f"{self.selects} selects without a mask": self.mask_free and self.selects > 0,
            f"{self.narrow} narrow loads": self.narrow > 0,
            f"exp {100 * under:.0f}% under products": skewed and self.mask_free and under < UNDER,
        }
        return [what for what, missed in found.items() if missed]


def inspect(target: str, disassembly: str, ttgir: str, program: model.Program) -> tuple[HotLoop, ...]:
    """The hot loops of a compiled kernel, in the order of the machine code.

    Args:
        target: such as "sm_90".
        disassembly: cuobjdump's, or AMD's assembly.
        ttgir: the kernel in Triton's GPU dialect.
        program: what one program takes.
    """
    code, tiles = parse(disassembly), tile_loops(ttgir)
    bodies = hot_loops(code)
    if not bodies and len(tiles) == 1:
        bodies = _unrolled_wholly(code, tiles[0], program.warps)
    matched = zip(bodies, _matched(bodies, tiles, program.warps), strict=True)
    asked = [(body, _as_unrolled(body, tiles)) for body, tiles in matched]
    found = [(one, _hot_loop(target, body, one, program)) for body, one in asked]
    fewest: dict[Any, int] = {}
    for one, loop in found:
        products = _products(one, loop)
        fewest[products] = min(loop.selects, fewest.get(products, loop.selects))
    return tuple(replace(loop, mask_free=loop.selects == fewest[_products(one, loop)]) for one, loop in found)


def _unrolled_wholly(code: list[Instruction], tiles: TileLoop, warps: int) -> list[list[Instruction]]:
    """Of a loop whose iterations all stand one behind the other in the machine code, one from the middle."""
    at = [i for i, instruction in enumerate(code) if instruction.is_matrix]
    times, rest = divmod(model.machine_macs(code, warps) or 0, tiles.macs)
    if times < 2 or rest or len(at) % times:
        return []
    each = len(at) // times
    first = times // 2 * each
    return [code[at[first] : at[first + each] if first + each < len(at) else at[-1] + 1]]


def _products(tiles: TileLoop | None, loop: HotLoop) -> Any:
    """A loop's products, wherever their factors stand: with a mask the same product may have them elsewhere."""
    return tuple(sorted(loop.matrix.items())) if tiles is None else tuple(sorted(p[:3] for p in tiles.products))


def _matched(bodies: list[list[Instruction]], asked: list[TileLoop], warps: int) -> list[TileLoop | None]:
    """The loop that the compiler was asked for behind each of the machine code's: in order, where it made no more or
    fewer of them, else the largest whose work it does."""
    if len(bodies) == len(asked):
        return list(asked)
    found: list[TileLoop | None] = []
    for body in bodies:
        macs = model.machine_macs(body, warps)
        fitting = [tiles for tiles in asked if macs is None or tiles.macs <= macs]
        found.append(max(fitting or asked, key=lambda tiles: tiles.macs, default=None))
    return found


def _as_unrolled(body: list[Instruction], tiles: TileLoop | None) -> TileLoop | None:
    """As many iterations as the machine code does in one: by the groups of cp.async that it commits."""
    groups = sum(i.name == "LDGDEPBAR" for i in body)
    return tiles.unrolled(groups // tiles.groups) if tiles and tiles.groups and groups > tiles.groups else tiles


def _hot_loop(target: str, body: list[Instruction], tiles: TileLoop | None, program: model.Program) -> HotLoop:
    classes = Counter(i.class_ for i in body)
    shapes = model.shapes(body, tiles)
    shared = [n for _, n, _ in shapes] if any(i.name.startswith(("HGMMA", "QGMMA", "UTC")) for i in body) else []
    macs = None if target.startswith("gfx") else model.machine_macs(body, program.warps)  # AMD's are unrolled
    under = model.flight(body).exps
    found = model.estimate(target, body, program, tiles)
    modelled: dict[str, Any] = {}
    if found is not None:
        clocks = {name: round(value, 1) for name, value in found.clocks._asdict().items()}
        rates = {name: round(getattr(found, name), 1) for name in ("rate", "serial", "overlap")}
        modelled = {"clocks": clocks, "programs": found.programs, "bound": found.bound, **rates}
    return HotLoop(
        instructions=len(body),
        classes={name: classes[name] for name in CLASSES if classes[name]},
        matrix={"x".join(map(str, shape)): count for shape, count in sorted(shapes.items())},
        narrowest=min(shared, default=None),
        useful=tiles.macs if tiles else None,
        redundancy=round(macs / tiles.macs, 3) if macs is not None and tiles else None,
        prefetch=model.prefetch(body, tiles),
        spills=classes["spill"],
        selects=classes["select"],
        mask_free=False,
        narrow=_narrow_loads(body, tiles, program.warps),
        exps=sum(map(model.is_exp, body)),
        exps_under=under,
        **{"clocks": {}, **modelled},
    )


def _narrow_loads(body: list[Instruction], tiles: TileLoop | None, warps: int) -> int:
    """Loads by less than 16 bytes that bring half-precision blocks: those whose bytes the wide ones do not account for.

    A load of a statistic per row is narrow by nature, and not counted.
    """
    loads = [i.bytes for i in body if i.name in ("LDG", "LDGSTS")]
    wide = sum(32 * warps * size for size in loads if size >= 16)
    if tiles is None or wide >= tiles.block_bytes:
        return 0
    return max(0, sum(size < 16 for size in loads) - tiles.row_loads)

"""What the compiler was asked for: the products and loads of a kernel's loops in Triton's GPU dialect (TTGIR).

The shapes of its products are the useful work of a loop, whatever the machine code makes of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

_TYPE = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)(\w+), (#[\w.]+)")
_PRODUCT = re.compile(r"= (?:tt\.dot|ttng\.warp_group_dot) |ttng\.tc_gen5_mma ")
_BLOCK_LOAD = re.compile(
    r"= (?:tt\.load|ttg\.async_copy_global_to_local|amdg?\.buffer_load) .*: tensor<((?:\d+x)+)!tt\.ptr<(\w+)"
)
# (What goes to a factor's registers from a product's stays where it is.)
_BLOCK_READ = re.compile(r"= ttg\.(?:local_load|convert_layout) .* -> tensor<\d\d+x\d\d+x\w+, #(?!ttg\.dot_op)")
_COPY = re.compile(
    r"ttng\.async_tma_(?:copy_global_to_local|gather) .*?\] (%[\w#]+),.*-> !ttg\.memdesc<((?:\d+x)+)(\w+)"
)
_VIEW = re.compile(r"^\s*(%[\w#]+) = ttg\.memdesc_(?:index|subview|subslice|reinterpret|trans) (%[\w#]+)")


class Product(NamedTuple):
    """One product of blocks: [m, k] by [k, n]; `held`, whether the first stands in tensor memory or in registers."""

    m: int
    n: int
    k: int
    held: bool = False

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.m * self.n * self.k


@dataclass(frozen=True)
class TileLoop:
    """An innermost loop with products.

    Attributes:
        products: those of the matrix units, in order.
        groups: of cp.async that it commits, per iteration.
        block_bytes: what its loads of half-precision blocks bring through registers or cp.async, per iteration.
        row_loads: its loads of one value per row or column, such as a softmax's statistics.
        bulk_bytes: what its bulk copies (TMA) write to shared memory, per iteration.
        bulk_ahead: iterations of bulk copies in flight while one is awaited; None without any.
        reads_blocks: whether threads read blocks from shared memory, or exchange them through it.
        times: how many iterations are counted as one.
    """

    products: tuple[Product, ...]
    groups: int = 0
    block_bytes: int = 0
    row_loads: int = 0
    bulk_bytes: int = 0
    bulk_ahead: float | None = None
    reads_blocks: bool = False
    times: int = 1

    @property
    def macs(self) -> int:
        """Useful multiply-adds of one program, per iteration."""
        return sum(product.macs for product in self.products)

    def unrolled(self, times: int) -> TileLoop:
        """So many iterations in one."""
        counts = {name: times * getattr(self, name) for name in ("groups", "block_bytes", "row_loads", "bulk_bytes")}
        return replace(self, products=times * self.products, times=times, **counts)


def tile_loops(ttgir: str) -> list[TileLoop]:
    """The innermost loops with products, in the order of the code."""
    lines = ttgir.splitlines()
    views = {m[1]: m[2] for line in lines if (m := _VIEW.match(line))}
    spans = _loops(lines)
    with_products = [span for span in spans if any(_product(line) for line in lines[slice(*span)])]
    inner = [
        (first, end)
        for first, end in with_products
        if not any(first <= a and b <= end and (a, b) != (first, end) for a, b in with_products)
    ]
    return [_tile_loop(lines, first, end, views) for first, end in inner]


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """The first line of each loop, and the one after its last."""
    found, open_, depth = [], [], 0
    for at, line in enumerate(lines):
        if "scf.for" in line or "scf.while" in line:
            open_.append((at, depth))
        depth += line.count("{") - line.count("}")
        while open_ and depth <= open_[-1][1] and at > open_[-1][0]:
            found.append((open_.pop()[0], at + 1))
    return sorted(found)


def _product(line: str) -> Product | None:
    """The product of a line, if it has one of the matrix units: others have a layout of plain threads."""
    if not _PRODUCT.search(line):
        return None
    types = _TYPE.findall(line.split(" : ", 1)[1])
    if len(types) < 3:  # what is not a product of two blocks
        return None
    (a, _, layout), _, (result, _, where) = types[0], types[1], types[2]
    if where.startswith("#blocked"):
        return None
    sizes = _sizes(result)
    tensor_memory = layout.startswith("#tmem") or "dot_op" in layout or layout == "#ttg.dot_op"
    return Product(math.prod(sizes[:-1]), sizes[-1], _sizes(a)[-1], tensor_memory)


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split("x") if size]


def _bits(dtype: str) -> int:
    return int(re.sub(r"\D*(\d+).*", r"\1", dtype))


def _tile_loop(lines: list[str], first: int, end: int, views: dict[str, str]) -> TileLoop:
    products, block_bytes, row_loads, bulk_bytes = [], 0, 0, 0
    for line in lines[first:end]:
        if product := _product(line):
            products.append(product)
        if load := _BLOCK_LOAD.search(line):
            sizes = _sizes(load[1])
            if sum(size > 1 for size in sizes) < 2:
                row_loads += 1
            elif load[2] in ("f16", "bf16"):
                block_bytes += 2 * math.prod(sizes)
        if copy := _COPY.search(line):
            bulk_bytes += math.prod(_sizes(copy[2])) * _bits(copy[3]) // 8
    ahead = _bulk_ahead(lines, first, end, views)
    groups = sum("ttg.async_commit_group" in line for line in lines[first:end])
    reads = any(_BLOCK_READ.search(line) for line in lines[first:end])
    return TileLoop(tuple(products), groups, block_bytes, row_loads, bulk_bytes, ahead, reads)


def _bulk_ahead(lines: list[str], first: int, end: int, views: dict[str, str]) -> float | None:
    """Of each buffer: how many copies the code before the loop issues, over those of an iteration, one of which is
    awaited; the least of all."""

    def copies(part: list[str]) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in part:
            if copy := _COPY.search(line):
                buffer = copy[1]
                while buffer in views:
                    buffer = views[buffer]
                found[buffer] += 1
        return found

    inside, before = copies(lines[first:end]), copies(lines[:first])
    return min((max(0.0, before[buffer] / count - 1) for buffer, count in inside.items()), default=None)

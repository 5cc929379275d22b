"""A kernel made ready to run: its registers' types, its basic blocks as functions, and what they count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from .text import BITS, Kernel, parse
from .translate import Translator


class Program:
    """Attributes:
    kernel: as text.
    dtypes: of the registers.
    global_granule: bytes of the narrowest access to global memory.
    shared_granule: of that to shared memory.
    classes: of each basic block, how many instructions of each class it has.
    flops: of each basic block's matrix instructions, for one warp.
    """

    def __init__(self, ptx: str) -> None:
        self.kernel: Kernel = parse(ptx)
        self.dtypes = [
            np.dtype(bool) if kind == "pred" else np.dtype(f"u{max(BITS[kind], 8) // 8}")
            for kind in self.kernel.registers.values()
        ]
        self._translator = Translator(self.kernel)
        self._functions: dict[tuple[int, bool], Callable[..., Any]] = {}
        self.global_granule = self._granule("global")
        self.shared_granule = self._granule("shared")
        starts = [*self.kernel.starts, len(self.kernel.instructions)]
        spans = [self.kernel.instructions[a:b] for a, b in pairwise(starts)]
        self.classes = [Counter(class_of(x.name) for x in span) for span in spans]
        self.flops = [sum(_flops(x.name) for x in span) for span in spans]

    def function(self, block: int, masked: bool) -> Callable[..., Any]:
        """`f(R, m, k)` of a basic block."""
        key = block, masked
        if key not in self._functions:
            self._functions[key] = self._translator.function(block, masked)
        return self._functions[key]

    def _granule(self, space: str) -> int:
        """Bytes of the narrowest access, at most 4: the cells of a shadow."""
        narrowest = 4
        for x in self.kernel.instructions:
            parts = x.parts
            if not any(p.split("::")[0] == space for p in parts):
                continue
            if parts[0] in ("ld", "st", "atom", "red"):
                narrowest = min(narrowest, BITS.get(parts[-1], 32) // 8)
            elif parts[0] in ("ldmatrix", "stmatrix"):
                narrowest = min(narrowest, 4)
        return narrowest


def class_of(name: str) -> str:
    """What an instruction is counted as.

    Example:
        >>> class_of("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"), class_of("ld.global.v4.b32")
        ('matrix', 'global load')
    """
    parts = name.split(".")
    head, space = (
        parts[0],
        next((p.split("::")[0] for p in parts if p.split("::")[0] in ("global", "shared", "param")), ""),
    )
    if head in ("mma", "wgmma") and len(parts) > 4:
        return "matrix"
    if head == "cp" or (head in ("ld", "ldmatrix") and space):
        return "copy to shared" if head == "cp" else f"{space} load"
    if head in ("st", "stmatrix"):
        return f"{space} store"
    if head in ("atom", "red"):
        return "atomic"
    if head in ("bar", "barrier", "fence", "membar", "wgmma"):
        return "synchronisation"
    if head in ("bra", "ret", "exit"):
        return "control"
    if head in ("shfl", "vote", "redux", "elect"):
        return "warp"
    if head in ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"):
        return "special function"
    if head == "mov":
        return "move"
    if head in ("cvt", "cvta"):
        return "conversion"
    if head in ("setp", "selp"):
        return "select and compare"
    return "float" if parts[-1].startswith(("f", "bf")) else "integer"


def _flops(name: str) -> int:
    """Of one warp: two for each product of a matrix instruction; a warpgroup's are shared by four."""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", name)
    if shape is None or not name.startswith(("mma", "wgmma")):
        return 0
    m, n, k = (int(x) for x in shape.groups())
    return 2 * m * n * k // (4 if name.startswith("wgmma") else 1)

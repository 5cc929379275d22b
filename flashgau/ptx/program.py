"""A kernel made ready to run: its registers' types, its basic blocks as functions, and what they count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
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
    following: of each basic block, those that may come after it.
    together: threads that always run together: a warp, or a warpgroup where such multiply.
    rank: of each basic block: threads of a warp that parted meet again if the lower rank goes first.
    """

    dtypes: list[Any]
    global_granule: int
    shared_granule: int
    classes: list[Counter[str]]
    following: list[list[int]]
    rank: np.ndarray[Any, Any]
    flops: list[int]

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
        spans = [[self.kernel.instructions[i] for i in self.kernel.span(b)] for b in range(len(self.kernel.starts))]
        self.classes = [Counter(class_of(x.name) for x in span) for span in spans]
        self.together = 128 if any(x.name.startswith("wgmma") for x in self.kernel.instructions) else 32
        self.following = [self._next(block) for block in range(len(spans))]
        self.rank = _ranks(self.following)
        self.flops = [sum(_flops(x.name) for x in span) for span in spans]

    def function(self, block: int, masked: bool) -> Callable[..., Any]:
        """`f(R, m, k)` of a basic block."""
        key = block, masked
        if key not in self._functions:
            self._functions[key] = self._translator.function(block, masked)
        return self._functions[key]

    def _next(self, block: int) -> list[int]:
        """The blocks that may come after one."""
        kernel, starts = self.kernel, self.kernel.starts
        last = kernel.instructions[kernel.span(block)[-1]]
        found = [] if last.parts[0] in ("bra", "ret", "exit") and last.predicate is None else [block + 1]
        if last.parts[0] == "bra":
            found.append(starts.index(kernel.labels[str(last.operands[0])]))
        return [x for x in found if x < len(starts)]

    def _granule(self, space: str) -> int:
        """Bytes of the narrowest access, at most 4: the cells of a shadow."""
        narrowest = 4
        for x in self.kernel.instructions:
            parts = x.parts
            if not any(p.split("::")[0] == space for p in parts):
                continue
            if parts[0] in ("ld", "st", "atom", "red"):
                narrowest = min(narrowest, BITS.get(parts[-1], 32) // 8)
            elif parts[0] == "cp" and "tensor" in parts:
                narrowest = min(narrowest, 2)
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


def _ranks(following: list[list[int]]) -> np.ndarray[Any, Any]:
    """Numbers of the blocks of a control-flow graph in a weak topological order (Bourdoncle 1993): both sides of a
    branch come before what follows both, and a whole loop before what comes after it."""
    order: list[int] = []

    def visit(nodes: set[int], entries: list[int]) -> None:
        for head, *rest in _components(nodes, entries, following):
            order.append(head)
            if rest:
                visit(set(rest), following[head])

    visit(set(range(len(following))), [0])
    left = [n for n in range(len(following)) if n not in set(order)]
    ranks = np.empty(len(following), np.int64)
    ranks[[*order, *left]] = np.arange(len(following))
    return ranks


def _components(nodes: set[int], entries: list[int], following: list[list[int]]) -> list[list[int]]:
    """Strongly connected components of the nodes that can be reached from `entries`, in topological order, each with
    the node that is reached first at its head (Tarjan 1972)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    path: list[int] = []
    found: list[list[int]] = []
    for entry in (e for e in entries if e in nodes):
        open_nodes = [] if entry in number else [(entry, iter(following[entry]))]
        while open_nodes:
            node, others = open_nodes[-1]
            if node not in number:
                number[node] = low[node] = len(number)
                path.append(node)
            deeper = None
            for other in others:
                if other in nodes and other not in number:
                    deeper = other
                    break
                if other in nodes and low[other] >= 0:  # on the path
                    low[node] = min(low[node], number[other])
            if deeper is not None:
                open_nodes.append((deeper, iter(following[deeper])))
                continue
            open_nodes.pop()
            if open_nodes:
                before = open_nodes[-1][0]
                low[before] = min(low[before], low[node])
            if low[node] == number[node]:
                first = path.index(node)
                found.append(path[first:])
                low |= dict.fromkeys(path[first:], -1)
                del path[first:]
    return found[::-1]

"""The loops of machine code: natural loops, found by dominators.

Backward branches alone mislead: code that only polls a barrier lies out of line, behind the loop that it belongs to.
"""

from __future__ import annotations

import re

from .text import Instruction

_JUMPS = re.compile(r"BRA|BRX|JMP|JMX|EXIT|RET|s_cbranch|s_branch|s_endpgm|s_setpc")
_POLLING = ("SYNCS", "BRA", "NOP", "YIELD", "NANOSLEEP")


def hot_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that hold matrix instructions, in the order of the code.

    Blocks that only poll a barrier, and jump, are left out: how often they run depends on what is awaited.
    """
    blocks = _blocks(code)
    loops = {
        header: body
        for header, body in natural_loops(_successors(blocks, code)).items()
        if any(i.is_matrix for block in body for i in code[slice(*blocks[block])])
    }
    found = []
    for header in sorted(loops):
        if not any(other < loops[header] for other in loops.values()):
            parts = [code[slice(*blocks[block])] for block in sorted(loops[header])]
            found.append([i for part in parts if not all(i.name in _POLLING for i in part) for i in part])
    return found


def _target(i: Instruction, places: dict[int, int]) -> int | None:
    """The index of the instruction to which one jumps, if that is known."""
    numbers = re.findall(r"0x([0-9a-f]+)", i.operands)
    return places.get(int(numbers[-1], 16)) if numbers and not i.name.startswith(("EXIT", "RET")) else None


def _falls_through(i: Instruction) -> bool:
    """Whether a jump may not be taken."""
    predicated = i.predicate not in (None, "PT") or bool(re.match(r"!?U?P\d", i.operands))
    return predicated or i.opcode.startswith("s_cbranch")


def _blocks(code: list[Instruction]) -> list[tuple[int, int]]:
    """Basic blocks, as the first index of each and the one after its last."""
    places = {i.address: at for at, i in enumerate(code)}
    starts = {0}
    for at, i in enumerate(code):
        if _JUMPS.match(i.opcode):
            starts.add(at + 1)
            if (target := _target(i, places)) is not None:
                starts.add(target)
    bounds = sorted(starts - {len(code)})
    return list(zip(bounds, [*bounds[1:], len(code)], strict=True))


def _successors(blocks: list[tuple[int, int]], code: list[Instruction]) -> list[list[int]]:
    places = {i.address: at for at, i in enumerate(code)}
    number = {start: block for block, (start, _) in enumerate(blocks)}
    found = []
    for block, (_, end) in enumerate(blocks):
        last, after = code[end - 1], [block + 1] if block + 1 < len(blocks) else []
        if not _JUMPS.match(last.opcode):
            found.append(after)
            continue
        target = _target(last, places)
        taken = [] if target is None else [number[target]]
        found.append(taken + (after if _falls_through(last) else []))
    return found


def natural_loops(successors: list[list[int]]) -> dict[int, frozenset[int]]:
    """The blocks of each loop, by its header: those from which the header is reached again without leaving it.

    Args:
        successors: of each basic block, those that may come after it; the first is where the code begins.
    """
    before: list[list[int]] = [[] for _ in successors]
    for block, after in enumerate(successors):
        for target in after:
            before[target].append(block)
    dominators = _dominators(successors, before)
    loops: dict[int, set[int]] = {}
    for block, above in dominators.items():
        for header in successors[block]:
            if above >> header & 1:
                body, left = loops.setdefault(header, {header}), [block]
                while left:
                    if (one := left.pop()) not in body:
                        body.add(one)
                        left += [b for b in before[one] if b in dominators]
    return {header: frozenset(body) for header, body in loops.items()}


def _dominators(successors: list[list[int]], before: list[list[int]]) -> dict[int, int]:
    """For each block that is reached, those through which every way to it leads, as the bits of a number."""
    reached, left = {0}, [0]
    while left:
        for target in successors[left.pop()]:
            if target not in reached:
                reached.add(target)
                left.append(target)
    found = dict.fromkeys(sorted(reached), (1 << len(successors)) - 1)
    found[0] = 1
    changed = True
    while changed:
        changed = False
        for block in found:
            if block:
                above = -1
                for b in before[block]:
                    if b in found:
                        above &= found[b]
                above |= 1 << block
                changed |= above != found[block]
                found[block] = above
    return found

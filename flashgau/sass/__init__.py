"""Compiled loops in numbers: what the hot loops of a kernel's machine code hold, and what a GPU would make of it.

`text` reads a disassembly, `loops` finds the loops that hold products, `tiles` reads what the compiler was asked for,
`model` counts clocks by pipe, `report` puts them together: a `HotLoop` each, and what is wrong with it. Nothing here
needs a GPU or Triton, and a model's number is never a measured one.
"""

from .model import Program
from .report import HotLoop, inspect

__all__ = ["HotLoop", "Program", "inspect"]

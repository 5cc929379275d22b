"""Compiled Triton kernels, executed without a GPU: the PTX that the compiler gives for one, on numpy.

    from flashgau.ptx import executing

    with executing("sm_90"):
        my_kernel[grid](x, out, n, BLOCK=128)   # tensors on the CPU

The compiled code of NVIDIA's Ampere to Hopper runs, matrix instructions and asynchronous copies included, and what
hardware would leave undefined is raised with its source line. docs/proof.md says what that proves and what not.
"""

from .faults import KINDS, Fault, UnknownInstruction
from .launch import Execution, Launch, executing, run
from .machine import Counts
from .program import Program

__all__ = ["KINDS", "Counts", "Execution", "Fault", "Launch", "Program", "UnknownInstruction", "executing", "run"]

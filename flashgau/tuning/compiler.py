"""What is taken from inside Triton, beyond its language and its launches: nowhere else.

No private name is needed. Kernels are compiled by `warmup` and read by `asm` and `metadata`, as in Triton's tutorials,
for a GPUTarget, which `triton.compile` takes. Two things may be missing, and there is another way behind each: a
driver, where there is no GPU, and cuobjdump's path among Triton's knobs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["GPUTarget", "Needs", "cuobjdump", "instead_of_launching", "is_compiled", "needs"]


class _Absent:
    """Stands for a GPU that is not there, as far as compiling asks."""

    def __init__(self, name: str, target: GPUTarget) -> None:
        self.name, self.target = name, target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: Any) -> int:
        return 0


def is_compiled(kernel: Any) -> bool:
    """Whether Triton compiles a kernel, rather than interpret it."""
    return isinstance(kernel, triton.JITFunction)


@contextmanager
def instead_of_launching(
    name: str, target: GPUTarget, seen: Callable[[str, Callable[[], Any]], None]
) -> Iterator[None]:
    """Inside the block no kernel runs.

    Each launch calls `seen` with the kernel's name and a function that compiles it for the target as the launch would
    have, and returns what Triton calls a compiled kernel. `name` stands for the device.
    """

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **keywords: seen(kernel.__name__, partial(kernel.warmup, *args, grid=grid, **keywords))

    try:
        before = driver.active
    except Exception:  # no GPU, or none that can be used: None lets Triton look for one again
        before = None
    launched = triton.JITFunction.__getitem__
    driver.set_active(_Absent(name, target))
    triton.JITFunction.__getitem__ = launch  # Triton's hooks see a launch, but cannot stop one that is compiled
    try:
        yield
    finally:
        triton.JITFunction.__getitem__ = launched
        driver.set_active(before)


@dataclass(frozen=True)
class Needs:
    """What a compiled kernel takes: spills are instructions that move registers to memory and back."""

    assembly: str
    registers: int
    spills: int
    shared_bytes: int
    warps: int
    ttgir: str  # Triton's GPU dialect, from which the machine code was made


def needs(kernel: Any) -> Needs:
    """Read it from what Triton compiled, for an NVIDIA or an AMD GPU."""
    parts = _nvidia(kernel.asm["cubin"]) if "cubin" in kernel.asm else _amd(kernel.asm["amdgcn"])
    metadata = kernel.metadata
    return Needs(*parts, shared_bytes=metadata.shared, warps=metadata.num_warps, ttgir=kernel.asm["ttgir"])


def _nvidia(cubin: bytes) -> tuple[str, int, int]:
    program = cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        both = [program, "-res-usage", "-sass", file.name]
        sass = subprocess.run(both, capture_output=True, text=True, check=True).stdout
    registers = max(map(int, re.findall(r"\bREG:(\d+)", sass)), default=0)
    return sass, registers, len(re.findall(r"\b(?:STL|LDL)\b", sass))


def _amd(assembly: str) -> tuple[str, int, int]:
    # A scalar register that is "spilled" goes to a lane of a vector register, not to memory: those are not counted.
    registers, spills = (
        max(map(int, re.findall(rf"\.{key}:\s+(\d+)", assembly)), default=0)
        for key in ("vgpr_count", "vgpr_spill_count")
    )
    return assembly, registers, spills


def cuobjdump() -> str:
    """NVIDIA's program that takes compiled kernels apart.

    Raises:
        RuntimeError: if it is nowhere.
    """
    try:
        return str(triton.knobs.nvidia.cuobjdump.path)  # which the variable TRITON_CUOBJDUMP_PATH may name
    except (AttributeError, RuntimeError):
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("compile: cuobjdump is neither in Triton nor on the PATH; expected that of CUDA's toolkit")
    return found

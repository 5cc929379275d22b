"""Who makes the products of a gated linear unit: one kernel, or the vendor's library with the unit after it.

Both are modelled, in seconds. What `flashgau tune` measured on the GPU in question goes before.

    fused    = launch + waves (start + K c + BM BN u),   waves = ceil(ceil(M / BM) ceil(N / BN) / processors)
    library  = 3 launch + 4 M N K / (share x peak) + 3 M N itemsize / memory

A processor makes one tile of BM x BN of both sides at a time, so what is before and after its loop is not hidden: the
first loads, and u clocks for each element of the unit. c, the clocks for each step along K, are the longer of the
products', at the same share of the peak, and of the loads from the cache. Neither form is faster than memory moves what
it must. The library is taken to fill every processor whatever the sizes, so that the rule errs on its side.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from .config import Config


class Gpu(NamedTuple):
    """What bounds products on a GPU.

    Attributes:
        processors: their number.
        hertz: of their clock.
        macs: half-precision multiply-adds per clock and processor.
        memory: bytes per second, of the data sheet.
        cache: bytes per clock and processor that come from the L2 cache.
        issue: instructions of 32 threads per clock and processor.
    """

    processors: int
    hertz: float
    macs: int
    memory: float
    cache: float
    issue: float = 4.0


# Data sheets, but for caches. A100: 5120 bytes per clock (its white paper). H100: 7.9 TB/s, which a public Triton
# product in fp8 is measured to reach (github.com/triton-lang/triton/pull/5461: 1347 TFLOP/s in tiles of 128 x 256, of
# 171 FLOP per byte). A40 and B200 are taken to have as much per processor.
GPUS = {
    "sm_80": Gpu(108, 1.41e9, 1024, 2.04e12, cache=47.4, issue=2.0),  # A100 80 GB, whose FP32 takes two clocks
    "sm_86": Gpu(84, 1.74e9, 512, 0.70e12, cache=32.7),  # A40
    "sm_90": Gpu(132, 1.83e9, 2048, 3.35e12, cache=32.7),  # H100 SXM
    "sm_100": Gpu(148, 1.85e9, 4096, 8.0e12, cache=32.7),  # B200
}
GPUS["interpreter"] = GPUS["sm_90"]  # as if it were one
MEMORY = {"NVIDIA H200": 4.8e12}  # where a GPU's is not that of its architecture's
SHARE = 0.8  # of the peak that large products reach, whoever makes them: 790 of 989 TFLOP/s measured on an H200
MEMORY_SHARE = 0.9  # of the data sheet's that a copy reaches: 4.3 of 4.8 TB/s measured there
LAUNCH = 1.5e-6  # seconds from one kernel of a stream to the next: an assumption
START = 2000.0  # clocks from a program's start to its first product: 500 instructions and two loads of 470 clocks
# Instructions per element after the loop, counted in the compiled code for sm_90: what converts and writes three
# tensors, and each activation.
WRITING = 8.0
ACTIVATIONS = {
    "identity": 0.0, "relu": 2.0, "relu2": 3.0, "sigmoid": 8.0, "silu": 9.0, "gelu_tanh": 14.0, "gelu": 21.0,
}  # fmt: skip


def fused(gpu: Gpu, tile: Config, m: int, k: int, n: int, activations: Sequence[str], itemsize: int = 2) -> float:
    """Modelled seconds of the kernel that makes both sides (M, N) over K in tiles of a configuration.

    Example:
        >>> round(1e6 * fused(GPUS["sm_90"], Config(128, 128), 16384, 1024, 4096, ("silu", "identity")))
        495
    """
    bm, bn = tile.block_m, tile.block_n
    waves = ceil(ceil(m / bm) * ceil(n / bn) / gpu.processors)
    step = max(2 * bm * bn / gpu.macs / SHARE, (bm + 2 * bn) * itemsize / gpu.cache)
    unit = WRITING + sum(ACTIVATIONS[name] for name in activations)
    clocks = waves * (START + k * step + bm * bn * unit / (32 * gpu.issue))
    return LAUNCH + max(clocks / gpu.hertz, _copied(gpu, m * k + 2 * n * k + m * n, itemsize))


def library(gpu: Gpu, m: int, k: int, n: int, itemsize: int = 2) -> float:
    """Modelled seconds of the vendor's two products, and of the unit that reads both and writes a third tensor.

    Example:
        >>> round(1e6 * library(GPUS["sm_90"], 16384, 1024, 4096))
        485
    """
    products = 2 * m * n * k / (SHARE * gpu.macs * gpu.hertz * gpu.processors)
    moved = _copied(gpu, 2 * (m * k + n * k + m * n), itemsize)
    return 3 * LAUNCH + max(products, moved) + _copied(gpu, 3 * m * n, itemsize)


def _copied(gpu: Gpu, elements: int, itemsize: int) -> float:
    return elements * itemsize / (MEMORY_SHARE * gpu.memory)

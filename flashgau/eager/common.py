"""What the blocked operations share: sequences of a batch, arithmetic types, Toeplitz blocks, elementwise scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Layout
from .sizes import SIZES

VECTOR_BYTES = 64  # of the widest vectors of processors; PyTorch's allocations begin at a multiple


@dataclass(frozen=True)
class Sequence:
    """Where one sequence (or, without lengths or packing, the whole batch of equal ones) lies in the tensors."""

    index: int  # number of the sequence, for dropout's counter and recurrent states
    batch: slice
    queries: slice
    keys: slice

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def states(self) -> slice:
        """The rows of a recurrent state that belong to it."""
        return slice(self.index, self.index + self.batch.stop - self.batch.start)


def sequences(batch: int, queries: int, keys: int, layout: Layout = Layout()) -> Iterator[Sequence]:
    """Cut a padded or packed batch into its sequences, each of which is then dense.

    Reads the layout's values on the host: one synchronisation when they are on a GPU.
    """
    if layout.cu_seqlens is not None:
        starts = layout.cu_seqlens.tolist()
        key_starts = starts if layout.cu_seqlens_k is None else layout.cu_seqlens_k.tolist()
        for g in range(len(starts) - 1):
            yield Sequence(g, slice(0, 1), slice(*starts[g : g + 2]), slice(*key_starts[g : g + 2]))
    elif layout.lengths is not None:
        for b, length in enumerate(layout.lengths.tolist()):
            rows = length if queries == keys else queries
            yield Sequence(b, slice(b, b + 1), slice(0, rows), slice(0, length))
    elif batch:
        yield Sequence(0, slice(0, batch), slice(0, queries), slice(0, keys))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that type; x itself, in a fraction of the time that `to` takes to find out, if it is."""
    return x if x.dtype == dtype else x.to(dtype)


HALVES = frozenset((torch.float16, torch.bfloat16))
_INSTRUCTIONS = {torch.bfloat16: {"avx512_bf16", "amx_tile"}, torch.float16: {"avx512_fp16", "amx_fp16"}}


def instructions() -> set[str]:
    """Names of the instruction sets of an x86 processor, as PyTorch or Linux tells them; none where neither does."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # PyTorch 2.11 and later
    if ask is not None:
        return {name for name, has in ask().items() if has is True}
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


@cache
def native_halves(device_type: str) -> frozenset[torch.dtype]:
    """The half-precision dtypes that a kind of device multiplies faster than fp32: all of them, but for a CPU.

    Two cores of an AMD EPYC with avx512_bf16 multiply 425 GFLOP/s in bf16 and 182 in fp32. Without such instructions
    PyTorch multiplies bf16 slower than fp32 (150 against 260 on two cores of an Intel Xeon).
    """
    if device_type != "cpu":
        return HALVES
    has = instructions()
    return frozenset(half for half, names in _INSTRUCTIONS.items() if names & has)


def factor_dtype(x: Tensor) -> torch.dtype:
    """The type in which wide products of x with weights take their factors: its own where hardware is fast at it."""
    return torch.float32 if x.dtype in HALVES - native_halves(x.device.type) else x.dtype


def values_dtype(v: Tensor) -> torch.dtype:
    """The same for products of attention weights, which are too small for fp16: (q k / n)^2 vanishes there."""
    return torch.float32 if v.dtype == torch.float16 else factor_dtype(v)


def panels(rows: Tensor) -> Iterator[slice]:
    """The rows of a matrix some thousand at a time on a CPU, so that what is made of them takes no memory; else all."""
    step = (
        SIZES.panel_rows * max(1, 4 // factor_dtype(rows).itemsize)
        if rows.device.type == "cpu"
        else max(1, rows.shape[0])
    )
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


class Workspace:
    """Memory for intermediates of a loop, the same in every turn: fresh pages can cost more than the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def of(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of that shape in the buffer of that name; what the buffer held is lost."""
        dtype = dtype or like.dtype
        count = math.prod(shape)
        buffer = self._memory.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = self._memory[name, dtype] = torch.empty(count, dtype=dtype, device=like.device)
        return buffer[:count].view(shape)

    def like(self, name: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The same, shaped as x."""
        return self.of(name, x.shape, x, dtype)

    def held(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in that type: itself, or a copy in the buffer of that name."""
        return x if x.dtype == dtype else self.like(name, x, dtype).copy_(x)


def add_product(total: Tensor, a: Tensor, b: Tensor, workspace: Workspace) -> None:
    """total += a b, matrices or batches of them, the sum kept in the total's own type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b) if total.dim() == 2 else total.baddbmm_(a, b)
    else:
        product = torch.matmul(a, b, out=workspace.of("a product", total.shape, a))
        total += workspace.held("a product", product, total.dtype)


def toeplitz_block(vector: Tensor, first: int, rows: int, columns: int) -> Tensor:
    """The block T[a, c] = vector[first + c - a] of a Toeplitz matrix, for every leading index.

    `vector` is (..., L); the result is (..., rows, columns).
    """
    window = vector[..., first - rows + 1 : first + columns]
    upwards = torch.arange(rows - 1, -1, -1, device=vector.device)
    return window.unfold(-1, columns, 1).index_select(-2, upwards)  # `flip` would leave the columns far apart


def toeplitz_sums(block: Tensor) -> Tensor:
    """Sum a block (..., rows, columns) along its diagonals: entry t of the result collects c - a = t - (rows - 1)."""
    rows, columns = block.shape[-2:]
    if rows == 0:
        return block.new_zeros(*block.shape[:-2], max(0, columns - 1))
    # Reading rows of width columns + rows as if they were one shorter shifts row r to the right by r.
    skewed = F.pad(block.flip(-2), (0, rows)).flatten(-2)[..., : rows * (columns + rows - 1)]
    return skewed.unflatten(-1, (rows, columns + rows - 1)).sum(-2)


def power_of_two_below(x: float, low: int, high: int) -> int:
    """The largest power of two <= x, kept within [low, high], both powers of two."""
    return max(low, min(high, 1 << max(0, int(x).bit_length() - 1)))


# Elementwise scores of the gated attention unit, and their derivatives.
_MU = math.sqrt(0.5)
_SIGMA = math.sqrt(0.25 / math.pi)


def score(kind: str, x: Tensor) -> Tensor:
    """relu2: max(x, 0)^2 (Hua et al. 2022); laplace: (1 + erf((x - mu) / (sigma sqrt 2))) / 2 (Ma et al. 2022)."""
    if kind == "relu2":
        return x.clamp_min(0).square_()  # relu would keep its result for autograd, and squaring in place spoil it
    z = (x - _MU).mul_(1 / (_SIGMA * math.sqrt(2)))
    if z.dtype == torch.float64:  # 1 + erf would cancel for small scores, which only fp64 is asked to keep
        return torch.special.erfc(z.neg_()).mul_(0.5)
    return torch.special.erf(z).add_(1).mul_(0.5)


def score_slope(kind: str, x: Tensor) -> Tensor:
    """The derivative of `score` at x: 2 max(x, 0), or the normal density of mean mu and deviation sigma."""
    if kind == "relu2":
        return torch.relu(x).mul_(2)
    # 1 / (2 sigma^2) = 2 pi, and the density's factor 1 / (sigma sqrt(2 pi)) = sqrt 2.
    return (x - _MU).square_().mul_(-2 * math.pi).exp_().mul_(math.sqrt(2))


def score_bend(kind: str, x: Tensor) -> Tensor:
    """The derivative of `score_slope` at x; 0 where x is -inf."""
    if kind == "relu2":
        return (x > 0).to(x.dtype).mul_(2)
    return score_slope(kind, x).mul_((x - _MU).clamp_min(-1e4)).mul_(-4 * math.pi)

"""What the kernels share: views of strided tensors, sequences of a batch, intervals of visible keys, scores.

Names in every kernel: `i_` which block or program, `o_` offsets within an axis, `m_` masks, `p_` pointers, `b_` blocks
of values. Tensors come as `Heads`, a pointer with its strides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashgau import tables
from flashgau.options import takes_fields
from flashgau.tables.config import FUSED_ADDITION as FUSED_ADDITION  # for every launch of a kernel
from flashgau.tables.config import Choose, Config

from . import NO_INTERPRETED_BF16, checked, executed, interpreting
from .interpreted import mend

_FULL = 0.85  # of the processors' time in use: keys are not split to gain the rest
_WAVES = 8  # of parts; more would gain less than their merging costs
_CLOSE = 1.05  # fewer parts are taken for as little more time
_TAKES_BF16 = not interpreting() or mend()  # on a CPU
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32

# Arguments that vary from call to call and must not cause a compilation (do_not_specialize). Triton applies this to
# plain arguments only, not to fields of a tuple, so kernels take them one by one and build their tuples themselves.
VARYING = ("n_sequences", "max_seqlen_q", "max_seqlen_k", "left", "right", "bias_batch", "bias_head", "max_distance",
           "threshold", "n_blocks", "n_heads", "n_kv_heads", "n_parts", "n_rows", "first_block", "last_block",
           "n_slots", "n_across", "n_tokens", "angle_batch", "n_chunks", "n_segments", "chunks_per_segment",
           "span", "first_row")  # fmt: skip


# Sizes that may be absent, which is None in a kernel.
OPTIONAL = ("SCORE_MOD", "SCORE_SLOPE", "WEIGHT_MOD", "WEIGHT_SLOPE", "PAGE", "NEAR", "ASYNCHRONOUS", "DESCRIBED",
            "ONLY", "GATE")  # fmt: skip


def chosen_by(config: Config | Choose | None) -> Choose:
    """Who configures the kernels of a launcher that is given this: one for all, a function, or the device's table.

    Inside `flashgau.tables.configured`, None stands for what that was given.
    """
    if config is None:
        return tables.in_force()
    if callable(config):  # also a configuration that wants to know who asks for it
        return config
    return lambda kernel, x, width, **traits: config


class Sizes:
    """What a kernel is compiled for, as one constexpr argument: widths, blocks and precisions of products, by name.

    D and E are the widths of queries and values, S that of gated queries and keys, C the tokens of a chunk, GROUPS the
    query heads of a key head, GATE a gate's activation. BD is D as a block, and so on: a power of two. BM, BN and BK
    are the blocks of a configuration.

    These may be absent, and are None then. A user's own scores bring jitted functions (`own_scores.py`): SCORE_MOD,
    SCORE_SLOPE, WEIGHT_MOD and WEIGHT_SLOPE. PAGE is how many tokens a page of keys and values has. NEAR: it, or a
    block, lies within 2^31 elements. ASYNCHRONOUS: products are begun ahead, as `Config.asynchronous` says. DESCRIBED:
    keys and values are copied through descriptors. ONLY is "dk" or "dv" where a launch makes one of the two. GATE names
    the activation of a gate.

    In a kernel `SIZES.BM` is a `tl.constexpr`, of which the shape of a block can be made. A field of a constexpr
    NamedTuple would be a plain number there, of which it cannot before Triton 3.8.

    Example:
        >>> Sizes(D=64, BM=128, PRECISION="ieee").BM
        constexpr[128]
    """

    def __init__(self, **sizes: Any) -> None:
        self._sizes = sizes

    def __getattr__(self, name: str) -> Any:
        sizes = vars(self).get("_sizes", {})
        if name not in sizes and name in OPTIONAL:
            return None
        if name not in sizes:
            raise AttributeError(f"the kernel needs a size {name}; it was launched with {', '.join(sizes)}")
        return tl.constexpr(sizes[name])

    # Triton finds compiled kernels by these: in memory by hash and equality, on disk by the text.
    def __hash__(self) -> int:
        return hash(frozenset(self._sizes.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sizes) and self._sizes == other._sizes

    def __repr__(self) -> str:
        return f"Sizes({', '.join(f'{name}={_as_text(size)}' for name, size in self._sizes.items())})"


def _as_text(size: Any) -> str:
    """A size; of a jitted function also the hash of its source, so that a changed one is compiled anew."""
    return f"{size.__name__}:{getattr(size, 'cache_key', '')}" if callable(size) else repr(size)


class Heads(NamedTuple):
    """A tensor (batch, head, token, column) as a kernel takes it; a stride may be anything, 0 included."""

    pointer: Any
    batch: int
    head: int
    token: int
    column: int


class Sequences(NamedTuple):
    """How tokens are cut into sequences: padding (`lengths`), packing (`cu_seqlens_q`, `cu_seqlens_k`), or neither.

    On a GPU their values are not checked on the host: there may be rows before the first and after the last packed
    sequence. These are two additional sequences, with the indices n_sequences (rows after the last) and n_sequences + 1
    (rows before the first). They have no tokens, only padding, to which every kernel writes zeros.
    """

    lengths: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    n_sequences: int
    max_seqlen_q: int  # lengths of the axes of queries and keys; of packed ones, of all sequences together
    max_seqlen_k: int


def heads(x: Tensor) -> Heads:
    """A tensor (B, H, N, D) with its strides."""
    return Heads(x, *x.stride())


def sequences_of(
    batch: int,
    m: int,
    n: int,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Sequences:
    """Describe padding or packing to a kernel, without reading a value on the host."""
    if cu_seqlens is None:
        return Sequences(None if lengths is None else lengths.contiguous(), None, None, batch, m, n)
    cu_seqlens = cu_seqlens.contiguous()
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    return Sequences(None, cu_seqlens, cu_seqlens_k, cu_seqlens.shape[0] - 1, m, n)


def blocks_of(sequences: Sequences, axis: int, per_token: int, block: int, *, rest: bool = True) -> int:
    """How many blocks of rows cover an axis of one sequence, or of all packed ones (an upper bound, from sizes alone).

    `rest`: include the rows that are in none of the packed ones, which kernels that write results need.
    """
    if sequences.cu_seqlens_q is None:
        return triton.cdiv(axis * per_token, block)
    return axis * per_token // block + sequences.n_sequences + (2 if rest else 0)


def launcher(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that starts kernels: it takes the fields of its tuples by name too, and runs with the GPU of its first
    tensor (or list of them) as the current one, for Triton to launch on. On a CPU it refuses that tensor in bf16 where
    the interpreter could not be put right; with `check=True` first what the public function refuses, in its words."""
    call = takes_fields(function)
    signature = inspect.signature(function)

    @wraps(function)
    def refuse(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        checked.check(function.__name__, dict(bound.arguments))

    refuse_first = takes_fields(refuse)

    @wraps(function)
    def launched(*args: Any, check: bool = False, **kwargs: Any) -> Any:
        if check:
            refuse_first(*args, **kwargs)
        first = args[0] if args else next(x for x in kwargs.values() if x is not None)
        if not isinstance(first, Tensor):
            first = first[0]
        if first.dtype == torch.bfloat16 and first.device.type == "cpu" and not _TAKES_BF16:
            raise RuntimeError(f"{function.__name__}: {NO_INTERPRETED_BF16}")
        with torch.cuda.device_of(first):
            return call(*args, **kwargs)

    return launched


def processors(device: torch.device) -> int:
    """The number of streaming multiprocessors; without a GPU 16, or those of the one that launches are recorded for."""
    return executed.processors or _processors(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@lru_cache(maxsize=4096)
def parts_of(programs: int, processors: int, blocks: int) -> int | None:
    """The number of programs that share the keys of a row, if there are too few rows to occupy the device.

    Programs run in waves of as many as there are processors, and a wave takes as long as one part of `blocks` blocks
    of keys, rounded up to whole blocks, of which a part has two at least. What a part is charged besides, its queries,
    fp32 results and their merging, is one block.
    """

    def time(parts: int) -> int:
        return -(-programs * parts // processors) * (-(-blocks // parts) + (parts > 1))

    if programs * blocks >= _FULL * processors * time(1):
        return None
    most = max(1, min(blocks // 2, _WAVES * processors // programs))
    times = [time(parts) for parts in range(1, most + 1)]
    near = _CLOSE * min(times)
    parts = 1 + next(i for i, t in enumerate(times) if t <= near)
    return parts if parts > 1 else None


def matmul_precision(dtype: torch.dtype) -> str:
    """fp32 products are IEEE's unless the user turned tf32 on through PyTorch's own switch, old or new."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    matmul: Any = torch.backends.cuda.matmul
    try:
        tf32 = matmul.allow_tf32
    except RuntimeError:  # the new switch was set, and PyTorch refuses to read the old one
        tf32 = "tf32" in (matmul.fp32_precision, getattr(torch.backends, "fp32_precision", None))
    return "tf32" if tf32 else "ieee"


@triton.jit
def offset(ends, i_seq, tokens):
    """The first row of a packed sequence, clamped to the axis."""
    return tl.minimum(tl.maximum(tl.load(ends + i_seq), 0), tokens).to(tl.int32)


@triton.jit
def extent(ends, i_seq, n_sequences, tokens):
    """First row and number of rows of a packed sequence, of the rows after the last or before the first."""
    first = tl.where(i_seq > n_sequences, 0, offset(ends, tl.minimum(i_seq, n_sequences), tokens))
    stop = offset(ends, tl.where(i_seq < n_sequences, i_seq + 1, 0), tokens)
    return first, tl.where(i_seq == n_sequences, tokens, stop) - first


@triton.jit
def bounds(sequences, i_seq):
    """Batch row of a sequence; its first query, number of queries, and number of rows written for them including
    padding; the same of its keys."""
    row = i_seq
    first_m = 0
    first_n = 0
    m = sequences.max_seqlen_q
    n = sequences.max_seqlen_k
    stored_m = sequences.max_seqlen_q
    stored_n = sequences.max_seqlen_k
    if sequences.cu_seqlens_q is not None:
        row = 0
        first_m, stored_m = extent(sequences.cu_seqlens_q, i_seq, sequences.n_sequences, sequences.max_seqlen_q)
        first_n, stored_n = extent(sequences.cu_seqlens_k, i_seq, sequences.n_sequences, sequences.max_seqlen_k)
        m = tl.where(i_seq < sequences.n_sequences, stored_m, 0)
        n = tl.where(i_seq < sequences.n_sequences, stored_n, 0)
    elif sequences.lengths is not None:
        # Clamped, because on a GPU the values have not been checked.
        n = tl.minimum(tl.maximum(tl.load(sequences.lengths + i_seq).to(tl.int32), 0), sequences.max_seqlen_k)
        m = tl.where(sequences.max_seqlen_q == sequences.max_seqlen_k, n, sequences.max_seqlen_q)
    return row, first_m, m, stored_m, first_n, n, stored_n


@triton.jit
def place(i_program, n_blocks, n_heads, sequences, ends, tokens, PER_TOKEN: tl.constexpr, block):
    """(block within its sequence, head, sequence) of a program; programs of one head follow each other.

    In a packed batch, sequence g owns the blocks from (ends[g] - ends[0]) * PER_TOKEN // block + g on: at least as many
    as it needs, so the last of them may be past its end and then has nothing to do. The blocks of the rows after
    the last sequence, up to `tokens`, follow, and then those of the rows before the first one.
    """
    i_block = i_program % n_blocks
    i_head = i_program // n_blocks % n_heads
    i_seq = i_program // n_blocks // n_heads
    if sequences.cu_seqlens_q is not None:
        origin = offset(ends, 0, tokens)
        low = i_seq
        high = i_seq + sequences.n_sequences
        while low < high:
            middle = (low + high + 1) // 2
            first = (offset(ends, middle, tokens) - origin) * PER_TOKEN // block + middle
            low = tl.where(first <= i_block, middle, low)
            high = tl.where(first <= i_block, high, middle - 1)
        first = (offset(ends, low, tokens) - origin) * PER_TOKEN // block + low
        before = (tokens - origin) * PER_TOKEN // block + sequences.n_sequences + 1
        i_seq = tl.where(before <= i_block, sequences.n_sequences + 1, low)
        i_block -= tl.where(before <= i_block, before, first)
    return i_block, i_head, i_seq


@triton.jit
def first_slot(sequences, i_seq, n_blocks, block):
    """The index of a sequence's first block among all blocks of keys: the inverse of `place`."""
    first = i_seq * n_blocks
    if sequences.cu_seqlens_q is not None:
        begin = offset(sequences.cu_seqlens_k, tl.minimum(i_seq, sequences.n_sequences), sequences.max_seqlen_k)
        first = (begin - offset(sequences.cu_seqlens_k, 0, sequences.max_seqlen_k)) // block + i_seq
    return first


@triton.jit
def row_pointers(x, row, head, token):
    """Pointers to the first column of rows; offsets are 64-bit, for tensors past 2^31 elements."""
    return (
        x.pointer
        + tl.cast(row, tl.int64) * x.batch
        + tl.cast(head, tl.int64) * x.head
        + tl.cast(token, tl.int64) * x.token
    )


@triton.jit
def load_rows(x, p_rows, m_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of x as a block [rows, BLOCK]; zeros in out-of-range rows and columns. WHOLE: all rows are in range."""
    o_column = tl.arange(0, BLOCK)
    p_x = p_rows[:, None] + tl.cast(o_column, tl.int64)[None, :] * x.column
    if WHOLE and WIDTH == BLOCK:
        block = tl.load(p_x)
    elif WHOLE:
        block = tl.load(p_x, mask=o_column[None, :] < WIDTH, other=0.0)
    elif WIDTH == BLOCK:
        block = tl.load(p_x, mask=m_rows[:, None], other=0.0)
    else:
        block = tl.load(p_x, mask=m_rows[:, None] & (o_column[None, :] < WIDTH), other=0.0)
    return block


@triton.jit
def store_rows(x, p_rows, m_rows, block, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write a block [rows, BLOCK] to rows of x."""
    o_column = tl.arange(0, BLOCK)
    p_x = p_rows[:, None] + tl.cast(o_column, tl.int64)[None, :] * x.column
    mask = m_rows[:, None] if WIDTH == BLOCK else m_rows[:, None] & (o_column[None, :] < WIDTH)
    tl.store(p_x, block.to(x.pointer.dtype.element_ty), mask=mask)


@triton.jit
def keys_seen(visible, first, last, n, BLOCK: tl.constexpr):
    """Blocks of keys that queries at positions first..last see (none if last < first), as `in_blocks` returns them.

    `visible` has `left` and `right`: a query at position p sees the keys p - left .. p + right; None is unbounded.
    """
    start = 0
    full_start = 0
    full_stop = n
    stop = n
    if visible.left is not None:
        start = first - visible.left
        full_start = last - visible.left
    if visible.right is not None:
        full_stop = tl.minimum(first + visible.right + 1, n)
        stop = tl.minimum(last + visible.right + 1, n)
    stop = tl.where(last < first, 0, stop)
    return in_blocks(start, full_start, full_stop, stop, BLOCK)


@triton.jit
def rows_seeing(visible, first, last, m, n, BLOCK: tl.constexpr):
    """The inverse: blocks of queries that see keys first..last, as `in_blocks` returns them."""
    start = 0
    full_start = 0
    full_stop = m
    stop = m
    if visible.right is not None:
        start = first - visible.right - (n - m)
        full_start = last - visible.right - (n - m)
    if visible.left is not None:
        full_stop = tl.minimum(first + visible.left - (n - m) + 1, m)
        stop = tl.minimum(last + visible.left - (n - m) + 1, m)
    stop = tl.where(last < first, 0, stop)
    return in_blocks(start, full_start, full_stop, stop, BLOCK)


@triton.jit
def in_blocks(start, full_start, full_stop, stop, BLOCK: tl.constexpr):
    """The interval start..stop, visible to some, and full_start..full_stop, visible to all, as three ranges of blocks.

    Returns (a, b, c, d): masked blocks from a to b, blocks that need no mask from b to c, masked ones from c to d.
    """
    stop = tl.maximum(stop, 0)
    start = tl.minimum(tl.maximum(start, 0), stop) // BLOCK * BLOCK
    full_start = tl.maximum((full_start + BLOCK - 1) // BLOCK * BLOCK, start)
    full_stop = tl.maximum(full_stop // BLOCK * BLOCK, full_start)
    return start, tl.minimum(full_start, stop), tl.minimum(full_stop, stop), stop


@triton.jit
def is_visible(visible, o_position, o_key, n):
    """Mask of the keys that a query at this position sees; both broadcast. A side takes one comparison per element."""
    if visible.right is not None:
        m_seen = o_key <= tl.minimum(o_position + visible.right, n - 1)
    else:
        m_seen = o_key < n
    if visible.left is not None:
        m_seen &= o_key >= o_position - visible.left
    return m_seen


@triton.jit
def products(b_a, b_b):
    """a * b of fp32, rounded, to be summed over threads. Fused into the first of these sums, each thread's own product
    would stay unrounded and its neighbour's not, and threads that hold the same sum would have other last bits."""
    return b_a * b_b + 0.0


@triton.jit
def tanh(x):
    """tanh to an ulp or two; the polynomial of Cephes (Moshier) near 0, where 1 - 2/(e^2x + 1) would cancel."""
    size = tl.abs(x)
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def toeplitz(p_bias, o_distance, max_distance, m_wanted):
    """bias[max_distance + distance]; 0 where masked or out of range."""
    m_there = m_wanted & (o_distance >= -max_distance) & (o_distance <= max_distance)
    return tl.load(p_bias + o_distance, mask=m_there, other=0.0).to(tl.float32)

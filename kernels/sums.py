"""The last step of gradients that every program of a kernel has a share of: sums of the shares, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FUSED_ADDITION, VARYING
from .guarded import guarded

_BLOCK = 4096  # numbers that a program holds


@guarded
@triton.jit(do_not_specialize=VARYING)
def sum_kernel(shares, out, n_rows, n_columns, BR: tl.constexpr, BC: tl.constexpr):
    """The sums of some columns of `shares` (rows, columns)."""
    o_column = tl.program_id(0) * BC + tl.arange(0, BC)
    m_column = o_column < n_columns
    b_sum = tl.zeros([BC], tl.float32)
    for first in range(0, n_rows, BR):
        o_row = first + tl.arange(0, BR)
        p_share = shares + tl.cast(o_row, tl.int64)[:, None] * n_columns + o_column[None, :]
        b_sum += tl.sum(tl.load(p_share, mask=(o_row < n_rows)[:, None] & m_column[None, :], other=0.0), 0)
    tl.store(out + o_column, b_sum.to(out.dtype.element_ty), mask=m_column)


def summed(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """shares (programs, ...), contiguous and in fp32, summed over the programs."""
    out = shares.new_empty(shares.shape[1:], dtype=dtype)
    n_columns = out.numel()
    columns = min(8, triton.next_power_of_2(n_columns))  # 32 bytes, which memory gives at a time
    rows = min(_BLOCK // columns, triton.next_power_of_2(shares.shape[0]))
    sum_kernel[(triton.cdiv(n_columns, columns),)](
        shares, out, shares.shape[0], n_columns, BR=rows, BC=columns, **FUSED_ADDITION
    )
    return out

"""The rank form of a relative bias (Hua et al. 2022, appendix): <RoPE(a)_p, RoPE(b)_j> as a function of t = j - p.

    c + i s = (a1 + i a2) (b1 - i b2)          of the pairs of channels, halves of a and b
    forward    bias_t = sum over pairs of c cos(t theta) + s sin(t theta)
    backward   dc = sum over t of dbias_t cos(t theta), ds likewise: shares of the programs, in fp32, and then, in one
               more program, their sums in order and da1 = dc b1 - ds b2, da2 = dc b2 + ds b1, db1 = dc a1 + ds a2,
               db2 = dc a2 - ds a1

All of it is a few vectors, and a table of the cosines and sines that is read once each way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import FUSED_ADDITION, VARYING, Choose, Config, launcher, processors, products
from .guarded import guarded

_BLOCK = 4096  # numbers of the table that a program holds


@triton.jit
def load_halves(x, o_pair, m_pair, HALF: tl.constexpr):
    """Both halves of a vector, in fp32."""
    b_first = tl.load(x + o_pair, mask=m_pair, other=0.0).to(tl.float32)
    return b_first, tl.load(x + HALF + o_pair, mask=m_pair, other=0.0).to(tl.float32)


@triton.jit
def load_pairs(x, o_row, m_row, o_pair, m_pair, HALF: tl.constexpr):
    """Both halves of some rows of a table, or of shares, in fp32."""
    p_x = x + tl.cast(o_row, tl.int64)[:, None] * (2 * HALF) + o_pair[None, :]
    mask = m_row[:, None] & m_pair[None, :]
    return tl.load(p_x, mask=mask, other=0.0), tl.load(p_x + HALF, mask=mask, other=0.0)


@guarded
@triton.jit(do_not_specialize=VARYING)
def rank_form_kernel(a, b, turns, out, n_rows, HALF: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr):
    """The bias of a block of distances."""
    o_row, o_pair = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BP)
    m_row, m_pair = o_row < n_rows, o_pair < HALF
    b_a1, b_a2 = load_halves(a, o_pair, m_pair, HALF)
    b_b1, b_b2 = load_halves(b, o_pair, m_pair, HALF)
    b_c, b_s = b_a1 * b_b1 + b_a2 * b_b2, b_a2 * b_b1 - b_a1 * b_b2
    b_cos, b_sin = load_pairs(turns, o_row, m_row, o_pair, m_pair, HALF)
    b_bias = tl.sum(products(b_c[None, :], b_cos) + products(b_s[None, :], b_sin), 1)
    tl.store(out + o_row, b_bias.to(out.dtype.element_ty), mask=m_row)


@guarded
@triton.jit(do_not_specialize=VARYING)
def rank_form_backward_kernel(
    dbias, turns, shares, n_rows, span, HALF: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """The share of dc and ds that `span` distances have, side by side in a row of `shares`."""
    o_pair = tl.arange(0, BP)
    m_pair = o_pair < HALF
    b_dc, b_ds = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    first = tl.program_id(0) * span
    for i in range(0, span, BT):
        o_row = first + i + tl.arange(0, BT)
        m_row = o_row < tl.minimum(first + span, n_rows)
        b_d = tl.load(dbias + o_row, mask=m_row, other=0.0).to(tl.float32)[:, None]
        b_cos, b_sin = load_pairs(turns, o_row, m_row, o_pair, m_pair, HALF)
        b_dc += tl.sum(products(b_d, b_cos), 0)
        b_ds += tl.sum(products(b_d, b_sin), 0)
    p_share = shares + tl.program_id(0).to(tl.int64) * (2 * HALF) + o_pair
    tl.store(p_share, b_dc, mask=m_pair)
    tl.store(p_share + HALF, b_ds, mask=m_pair)


@guarded
@triton.jit(do_not_specialize=VARYING)
def rank_form_factors_kernel(
    shares, a, b, da, db, n_shares, HALF: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """The sums of the shares, and from them the gradients of a and b."""
    o_pair = tl.arange(0, BP)
    m_pair = o_pair < HALF
    b_dc, b_ds = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    for first in range(0, n_shares, BT):
        o_share = first + tl.arange(0, BT)
        b_shares_c, b_shares_s = load_pairs(shares, o_share, o_share < n_shares, o_pair, m_pair, HALF)
        b_dc += tl.sum(b_shares_c, 0)
        b_ds += tl.sum(b_shares_s, 0)
    b_a1, b_a2 = load_halves(a, o_pair, m_pair, HALF)
    b_b1, b_b2 = load_halves(b, o_pair, m_pair, HALF)
    dtype: tl.constexpr = da.dtype.element_ty
    tl.store(da + o_pair, (b_dc * b_b1 - b_ds * b_b2).to(dtype), mask=m_pair)
    tl.store(da + HALF + o_pair, (b_dc * b_b2 + b_ds * b_b1).to(dtype), mask=m_pair)
    tl.store(db + o_pair, (b_dc * b_a1 + b_ds * b_a2).to(dtype), mask=m_pair)
    tl.store(db + HALF + o_pair, (b_dc * b_a2 - b_ds * b_a1).to(dtype), mask=m_pair)


# ---------------------------------------------------------------- launchers


@launcher
def rank_form_forward(a: Tensor, b: Tensor, turns: Tensor, *, config: Config | Choose | None = None) -> Tensor:
    """The bias (n,) of a and b (S,) at the distances whose cosines and sines `turns` has: (n, S), contiguous, fp32."""
    out = a.new_empty(turns.shape[0])
    block = _block(a)
    rank_form_kernel[(triton.cdiv(out.shape[0], block["BT"]),)](
        a.contiguous(), b.contiguous(), turns, out, out.shape[0], **block, **FUSED_ADDITION
    )
    return out


@launcher
def rank_form_backward(
    dbias: Tensor, a: Tensor, b: Tensor, turns: Tensor, *, config: Config | Choose | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of a and b."""
    block, n_rows = _block(a), turns.shape[0]
    span = triton.cdiv(triton.cdiv(n_rows, block["BT"]), processors(a.device)) * block["BT"]
    shares = turns.new_empty(triton.cdiv(n_rows, span), a.shape[0])
    rank_form_backward_kernel[(shares.shape[0],)](
        dbias.contiguous(), turns, shares, n_rows, span, **block, **FUSED_ADDITION
    )
    a, b, da, db = a.contiguous(), b.contiguous(), a.new_empty(a.shape), b.new_empty(b.shape)
    rank_form_factors_kernel[(1,)](shares, a, b, da, db, shares.shape[0], **block, **FUSED_ADDITION)
    return da, db


def _block(a: Tensor) -> dict[str, int]:
    """How many distances and pairs of channels a program holds."""
    half = a.shape[0] // 2
    pairs = max(16, triton.next_power_of_2(half))
    return {"HALF": half, "BT": max(1, _BLOCK // pairs), "BP": pairs}

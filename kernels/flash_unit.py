"""One token of a FLASH layer between its two products (Hua et al. 2022, code 1), in two launches.

token    from x W^T + b = [u | v | z]: silu, the four heads in registers, turned by RoPE, a tile of columns of the gated
         output, and the token's row of the open chunk
close    counts it, and closes the chunk if it is full: as after any token (`mixed_chunk_kernels.py`)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flashgau.options import MixedChunkOptions, OpenChunk, TokenHeads

from .common import VARYING, Choose, Config, Sizes, chosen_by, launcher
from .gated import GatedRule, bias_rule, rows
from .glu import activate
from .guarded import guarded
from .mixed_chunk import close, lin_inv_norm
from .mixed_chunk_kernels import attend, keep_token, load_token, tile_of_token
from .projection import partners, scaled


@triton.jit
def cosine_and_sine(b_angle):
    """Of angles in fp32, of many turns too: what a quarter turn leaves is found in fp64, whose error is 1e-10 of it."""
    b_quarters = b_angle.to(tl.float64) * 0.6366197723675814  # 2 / pi; angles are not negative
    b_nearest = (b_quarters + 0.5).to(tl.int64)
    x = ((b_quarters - b_nearest.to(tl.float64)) * 1.5707963267948966).to(tl.float32)  # within pi / 4
    z = x * x
    b_sin = x + x * z * (((2.7557319e-6 * z - 1.9841270e-4) * z + 8.3333333e-3) * z - 1.6666667e-1)  # Taylor's series
    b_cos = 1 + z * ((((-2.7557319e-7 * z + 2.4801587e-5) * z - 1.3888889e-3) * z + 4.1666667e-2) * z - 0.5)
    odd, b_half = b_nearest % 2 == 1, b_nearest % 4
    b_first, b_second = tl.where(odd, b_sin, b_cos), tl.where(odd, b_cos, b_sin)
    return tl.where((b_half == 1) | (b_half == 2), -b_first, b_first), tl.where(b_half >= 2, -b_second, b_second)


@triton.jit
def load_activated(x, i_row, o_column, WIDTH: tl.constexpr):
    """silu of some columns of a token."""
    return activate(load_token(x, i_row, o_column, WIDTH).to(tl.float32), "silu")


@triton.jit
def head(b_z, b_other, gamma, beta, o_channel, o_partner, b_cos, b_sin, turns, dtype: tl.constexpr, S: tl.constexpr):
    """A head of a token (S,), in the type in which a sequence's are stored."""
    b_head = scaled(b_z[None, :], gamma, beta, o_channel, S)
    if b_other is not None:
        b_turned = scaled(b_other[None, :], gamma, beta, o_partner, S)
        b_head = tl.where(turns[None, :], b_head * b_cos[None, :] + b_turned * b_sin[None, :], b_head)
    return tl.sum(b_head, 0).to(dtype)


@guarded
@triton.jit(do_not_specialize=VARYING)
def token_kernel(
    u, v, z, gammas, betas, frequencies, kv, held_quad_k, held_lin_k, held_v, position, out,
    inv_norm, bias, bias_batch, max_distance, lin_inv_norm,
    SIZES: tl.constexpr,  # C, S, E, BS, BE, BC
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """A tile of a token's output, and its row of the open chunk. `gammas` and `betas` are a pointer for each head."""
    i_row, i_tile, seen, place, o_s, o_column = tile_of_token(position, SIZES)
    dtype: tl.constexpr = out.dtype.element_ty

    b_z, b_other, b_cos, b_sin, turns, o_partner = load_activated(z, i_row, o_s, SIZES.S), None, None, None, None, o_s
    if frequencies is not None:
        o_pair, second, o_partner, turns = partners(o_s, PAIRS, INTERLEAVED)
        b_angle = seen.to(tl.float32) * tl.load(frequencies + o_pair, mask=turns, other=0.0)
        b_cos, b_sin = cosine_and_sine(b_angle)
        b_sin = tl.where(second, b_sin, -b_sin)
        b_other = load_activated(z, i_row, o_partner, SIZES.S)
    b_quad_q = head(b_z, b_other, gammas[0], betas[0], o_s, o_partner, b_cos, b_sin, turns, dtype, SIZES.S)
    b_quad_k = head(b_z, b_other, gammas[1], betas[1], o_s, o_partner, b_cos, b_sin, turns, dtype, SIZES.S)
    b_lin_q = head(b_z, b_other, gammas[2], betas[2], o_s, o_partner, b_cos, b_sin, turns, dtype, SIZES.S)
    b_v = load_activated(v, i_row, o_column, SIZES.E).to(dtype)

    b_out = attend(
        b_quad_q, b_quad_k, b_lin_q, b_v, kv, held_quad_k, held_v, i_row, seen, o_s, o_column,
        GatedRule(None, 0, inv_norm, bias, bias_batch, max_distance), lin_inv_norm, SIZES, SCORE,
    )  # fmt: skip
    keep_token(b_v, held_v, i_row, place, o_column, SIZES.C, SIZES.E)
    if i_tile == 0:
        keep_token(b_quad_k, held_quad_k, i_row, place, o_s, SIZES.C, SIZES.S)
        b_lin_k = head(b_z, b_other, gammas[3], betas[3], o_s, o_partner, b_cos, b_sin, turns, dtype, SIZES.S)
        keep_token(b_lin_k, held_lin_k, i_row, place, o_s, SIZES.C, SIZES.S)
    b_out *= load_activated(u, i_row, o_column, SIZES.E)
    p_out = out + tl.cast(i_row, tl.int64) * SIZES.E + o_column
    tl.store(p_out, b_out.to(dtype), mask=o_column < SIZES.E)


@launcher
def flash_unit_token_(
    wide: Tensor,
    heads: TokenHeads,
    state: OpenChunk,
    options: MixedChunkOptions = MixedChunkOptions(),
    *,
    config: Config | Choose | None = None,
) -> Tensor:
    """What u multiplies, times silu(u), (B, 1, E) of one token, from x W^T + b = [u | v | z] (B, 1, 2E + S).

    The state, contiguous tensors, is advanced in place.
    """
    kv, *held, position = state
    (b, c, s), e = held[0].shape, held[2].shape[-1]
    out, choose, width = wide.new_empty(b, 1, e), chosen_by(config), max(16, triton.next_power_of_2(s))
    if b == 0:
        return out
    chosen = choose("mixed_chunk_step", wide, width)
    block = min(chosen.block_n, max(16, triton.next_power_of_2(e)))
    gamma, beta = heads.gamma.contiguous(), None if heads.beta is None else heads.beta.contiguous()
    token_kernel[(b * triton.cdiv(e, block),)](
        *map(rows, wide.split((e, e, s), -1)), tuple(gamma[i] for i in heads.order),
        (None,) * 4 if beta is None else tuple(beta[i] for i in heads.order), heads.frequencies,
        kv, *held, position, out,
        1 / options.divisor, *bias_rule(options.rel_bias), lin_inv_norm(options),
        Sizes(C=c, S=s, E=e, BS=width, BE=block, BC=chosen.block_k),
        PAIRS=0 if heads.frequencies is None else heads.frequencies.shape[0], INTERLEAVED=heads.interleaved,
        SCORE=options.score, **chosen.launch(),
    )  # fmt: skip
    close(state, wide, choose)
    return out

"""A researcher's own scores in the kernels of attention and GAU: jitted functions of a block, compiled into them.

    score_mod(b_s, o_query, o_key, i_head, aux)      of the scaled and capped scores, before bias and mask
    score_slope(b_s, o_query, o_key, i_head, aux)    its derivative by b_s, at the same b_s
    weight_mod(b_s)                                  an elementwise weight in the place of softmax: A = weight_mod(S)
    weight_slope(b_s)                                its derivative

They reach the kernels as fields of `Sizes`; `attention_with` in `attention.py` and `gau_with` in `gau.py` are their
front doors. A score of -inf hides a key, for softmax and for any weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NO_INTERPRETED_BF16, executed
from .common import FUSED_ADDITION, Sizes, is_visible, launcher
from .guarded import check_unchanged, guarded
from .interpreted import mend

WIDEST = 256  # head dimension


class OwnScores(NamedTuple):
    """Functions under `triton.jit`, each of which may be None, and what the first two read."""

    score_mod: Any = None
    score_slope: Any = None
    weight_mod: Any = None
    weight_slope: Any = None
    aux: Tensor | None = None  # fp32, contiguous; a pointer in the functions

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self.score_mod is not None or self.weight_mod is not None

    def sizes(self, *, backward: bool) -> dict[str, Any]:
        """What a kernel is compiled with: functions that are there, slopes for the backward only."""
        names = ("score_mod", "score_slope", "weight_mod", "weight_slope") if backward else ("score_mod", "weight_mod")
        return {name.upper(): getattr(self, name) for name in names if getattr(self, name) is not None}


BUILT_IN = OwnScores()  # no function at all


def check_own(op: str, own: OwnScores, *, differentiated: bool, device: torch.device | None = None) -> None:
    """Refuse functions that no kernel can take.

    Raises:
        TypeError: if a function is not jitted, or `aux` no fp32 tensor.
        ValueError: if a slope stands without its function, a function without the slope that gradients need, or `aux`
            without a function that reads it, on another device, not contiguous, or to be differentiated.
        RuntimeError: if what a function calls was replaced after it had been compiled.
    """
    for name in ("score_mod", "score_slope", "weight_mod", "weight_slope"):
        function = getattr(own, name)
        if function is not None and type(function) is not type(is_visible):
            raise TypeError(f"{op}: `{name}` is a {type(function).__name__}; expected a function under @triton.jit")
        check_unchanged(function)
    for kind in ("score", "weight"):
        there, slope = (getattr(own, f"{kind}_{part}") is not None for part in ("mod", "slope"))
        if slope and not there:
            raise ValueError(f"{op}: `{kind}_slope` was given without `{kind}_mod`; expected both")
        if differentiated and there and not slope:
            raise ValueError(
                f"{op}: `{kind}_mod` was given without `{kind}_slope`, and an argument requires gradients; expected "
                f"its derivative by b_s, or a call under torch.no_grad()"
            )
    aux = own.aux
    if aux is None:
        return
    if not isinstance(aux, Tensor) or aux.dtype != torch.float32:
        got = f"has dtype {aux.dtype}" if isinstance(aux, Tensor) else f"is a {type(aux).__name__}"
        raise TypeError(f"{op}: `aux` {got}; expected a contiguous float32 tensor")
    if own.score_mod is None:
        raise ValueError(f"{op}: `aux` was given without `score_mod`, which alone reads it; expected both")
    if not aux.is_contiguous():
        raise ValueError(f"{op}: `aux` has strides {aux.stride()}; expected a contiguous float32 tensor")
    if device is not None and aux.device != device:
        raise ValueError(f"{op}: `aux` is on {aux.device}; expected {device}, where `q` is")
    if aux.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: `aux` requires a gradient, which is not computed; expected aux.detach(), or `rel_bias` for what is "
            f"learned by distance and q * t for a temperature"
        )


def check_operands(op: str, q: Tensor, k: Tensor, v: Tensor, widest_value: int = WIDEST) -> None:
    """Refuse what the kernels would read wrongly, as launchers do not.

    Raises:
        TypeError: if they are not tensors of one of the kernels' dtypes.
        ValueError: if shapes or devices do not belong together.
        RuntimeError: if no kernel can run there.
    """
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype not in dtypes or x.dtype != q.dtype:
            got = f"has dtype {x.dtype}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
            raise TypeError(f"{op}: `{name}` {got}; expected float16, bfloat16 or float32, the same for q, k and v")
        if x.dim() != 4 or x.device != q.device:
            got = f"has shape {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{op}: `{name}` {got}; expected (B, H, N, D) on {q.device}")
    (b, n_heads, _, d), (n_kv_heads, n, e) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    if k.shape != (b, n_kv_heads, n, d) or v.shape != (b, n_kv_heads, n, e):
        got = f"`k` and `v` have shapes {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"{op}: {got}; expected (B, Hkv, N, D) and (B, Hkv, N, E) with B = {b} and D = {d}")
    if n_heads != 0 and (n_kv_heads == 0 or n_heads % n_kv_heads):
        raise ValueError(f"{op}: `q` has {n_heads} heads; expected a multiple of the {n_kv_heads} of `k`")
    if not (1 <= d <= WIDEST and 1 <= e <= widest_value):
        raise ValueError(f"{op}: `q` and `v` have widths {d} and {e}; expected 1 to {WIDEST} and {widest_value}")
    interpreting = type(is_visible).__name__ != "JITFunction"
    if interpreting and q.dtype == torch.bfloat16 and not mend():
        raise RuntimeError(f"{op}: {NO_INTERPRETED_BF16}; expected float16 or float32 there")
    if not interpreting and q.device.type == "cpu" and executed.target is None:
        raise RuntimeError(f"{op}: the tensors are on the CPU; expected TRITON_INTERPRET=1, set before Python starts")


def check_sequences(
    op: str,
    b: int,
    m: int,
    n: int,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    """Refuse padding and packing that do not belong to `b` rows of `m` queries and `n` keys.

    Raises:
        ValueError: with what was given and what was expected.
    """
    if lengths is not None and (cu_seqlens is not None or lengths.shape != (b,)):
        raise ValueError(f"{op}: `lengths` has shape {tuple(lengths.shape)}; expected ({b},), and no `cu_seqlens`")
    if cu_seqlens is None and cu_seqlens_k is not None:
        raise ValueError(f"{op}: `cu_seqlens_k` was given without `cu_seqlens`; expected both")
    for name, ends in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is None:
            continue
        if ends.dim() != 1 or ends.numel() == 0 or (cu_seqlens is not None and ends.shape != cu_seqlens.shape):
            raise ValueError(f"{op}: `{name}` has shape {tuple(ends.shape)}; expected (G+1,), as of the other")
        if b != 1:
            raise ValueError(f"{op}: `{name}` was given with B = {b}; expected one row, B = 1")
    if cu_seqlens is not None and cu_seqlens_k is None and m != n:
        raise ValueError(f"{op}: `cu_seqlens` was given with M = {m} and N = {n}; expected also `cu_seqlens_k`")


def check_options(
    op: str,
    own: OwnScores,
    q: Tensor,
    k: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    rel_bias: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Refuse padding, packing, biases and sinks of attention that do not belong to these queries and keys.

    Raises:
        ValueError: with what was given and what was expected.
    """
    (b, n_heads, m, _), n = q.shape, k.shape[2]
    check_sequences(op, b, m, n, lengths, cu_seqlens, cu_seqlens_k)
    if rel_bias is not None:
        longest = 1 if cu_seqlens is not None else max(m, n, 1)
        fits = rel_bias.dim() in (2, 3) and rel_bias.shape[-2] == n_heads and rel_bias.shape[:-2] in ((), (1,), (b,))
        if not fits or rel_bias.shape[-1] < 2 * longest - 1 or rel_bias.shape[-1] % 2 == 0:
            raise ValueError(
                f"{op}: `rel_bias` has shape {tuple(rel_bias.shape)}; expected (Hq, 2P-1) or (B, Hq, 2P-1) with Hq = "
                f"{n_heads} and P >= {longest}"
            )
    if sinks is not None and sinks.shape != (n_heads,):
        raise ValueError(f"{op}: `sinks` has shape {tuple(sinks.shape)}; expected ({n_heads},)")
    if sinks is not None and own.weight_mod is not None:
        raise ValueError(f"{op}: `sinks` was given with `weight_mod`; expected softmax, whose denominator they are in")


class _Once(torch.autograd.Function):
    """A gradient that refuses to be differentiated, by whatever it depends on."""

    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *operands: Tensor | None) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"{ctx.op}: it is differentiated twice; expected once, as its slopes have no derivative")


def once(op: str, grads: tuple[Tensor | None, ...], *operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients as they are; under `create_graph=True` such that differentiating them by the operands is refused."""
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if x is None else _Once.apply(op, x, *operands) for x in grads)


@triton.jit
def own_scores(b_s, b_slope, aux, o_head, o_position, o_key, n, SIZES: tl.constexpr):
    """What a user's function makes of a block of scores, and its slope on top of the one that is there."""
    # Such a function may read from memory: what is out of range stands at the last key.
    o_query_in, o_key_in = tl.minimum(o_position, n - 1), tl.minimum(tl.maximum(o_key, 0), n - 1)
    if SIZES.SCORE_SLOPE is not None:
        b_slope = SIZES.SCORE_SLOPE(b_s, o_query_in, o_key_in, o_head, aux) * b_slope
    return SIZES.SCORE_MOD(b_s, o_query_in, o_key_in, o_head, aux), b_slope


@triton.jit
def own_hidden(b_s, b_slope, o_position, o_key, n):
    """A function may be anything out of range, and have any slope where it is -inf."""
    b_s = tl.where((o_position < n) & (o_key < n), b_s, -float("inf"))
    return b_s, tl.where(b_s == -float("inf"), 0.0, b_slope)


@triton.jit
def own_weights(b_s, SIZES: tl.constexpr):
    """A user's elementwise weight of a block of scores. What is hidden has weight 0."""
    return tl.where(b_s == -float("inf"), 0.0, SIZES.WEIGHT_MOD(b_s))


@triton.jit
def own_weight_slopes(b_s, SIZES: tl.constexpr):
    """The slope of such a weight."""
    return tl.where(b_s == -float("inf"), 0.0, SIZES.WEIGHT_SLOPE(b_s))


@guarded
@triton.jit
def probe_kernel(x, out, n_keys, aux, SIZES: tl.constexpr):  # BM, BN, and the function as SCORE_MOD or WEIGHT_MOD
    """A user's function at each of x (heads, BM, BN)."""
    o_query, o_key = tl.arange(0, SIZES.BM)[:, None], tl.arange(0, SIZES.BN)[None, :]
    i_head = tl.program_id(0)
    o_flat = (i_head * SIZES.BM + o_query) * SIZES.BN + o_key
    b_s = tl.load(x + o_flat)
    if SIZES.SCORE_MOD is not None:
        b_s = SIZES.SCORE_MOD(b_s, tl.minimum(o_query, n_keys - 1), tl.minimum(o_key, n_keys - 1), i_head, aux)
    else:
        b_s = SIZES.WEIGHT_MOD(b_s)
    tl.store(out + o_flat, tl.zeros([SIZES.BM, SIZES.BN], tl.float32) + b_s)


@launcher
def _probed(x: Tensor, n_keys: int, aux: Tensor | None, functions: dict[str, Any]) -> Tensor:
    out = torch.empty_like(x)
    sizes = Sizes(BM=x.shape[1], BN=x.shape[2], **functions)
    probe_kernel[(x.shape[0],)](x, out, n_keys, aux, sizes, **FUSED_ADDITION)
    return out


def check_slopes(
    *,
    score_mod: Any = None,
    score_slope: Any = None,
    weight_mod: Any = None,
    weight_slope: Any = None,
    aux: Tensor | None = None,
    n_keys: int = 16,
    n_heads: int = 2,
    device: torch.device | str | None = None,
) -> None:
    """Hold slopes to finite differences of their functions, at random scores, as the kernels would run them.

    Where a function has a kink, a slope between those of both sides is right. Where it is infinite, a key is hidden
    and no slope matters.

    Args:
        score_mod: as `attention_with` takes it.
        score_slope: its derivative by b_s.
        weight_mod: as `attention_with` takes it.
        weight_slope: its derivative.
        aux: what the first two read.
        n_keys: how many queries and keys there are, at most 16 of which are tried.
        n_heads: how many heads there are.
        device: where to run; unless given, that of `aux`, or a GPU if there is one.

    Raises:
        AssertionError: if a slope is another one, with the place and both values.
        TypeError, ValueError: as `attention_with`.

    Example:
        >>> import triton, triton.language as tl
        >>> @triton.jit
        ... def square(b_s):
        ...     return b_s * b_s
        >>> @triton.jit
        ... def slope(b_s):
        ...     return 2 * b_s
        >>> check_slopes(weight_mod=square, weight_slope=slope)  # doctest: +SKIP
    """
    own = OwnScores(score_mod, score_slope, weight_mod, weight_slope, None if aux is None else aux.detach())
    check_own("check_slopes", own, differentiated=True)
    if device is None:
        device = aux.device if aux is not None else "cuda" if torch.cuda.is_available() else "cpu"
    steps = 2.0**-8
    x = 3 * torch.randn(n_heads, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    for name, size in (("score", "SCORE_MOD"), ("weight", "WEIGHT_MOD")):
        function, slope = getattr(own, f"{name}_mod"), getattr(own, f"{name}_slope")
        if function is None:
            continue
        low, middle, high = (_probed(y, n_keys, own.aux, {size: function}) for y in (x - steps, x, x + steps))
        found = _probed(x, n_keys, own.aux, {size: slope})
        left, right = (middle - low) / steps, (high - middle) / steps
        there = torch.isfinite(left) & torch.isfinite(right)
        largest = [float(torch.where(there, y, 0).abs().max()) for y in (left, right, middle)]
        allowed = 1e-3 * max(largest[:2]) + 8 * torch.finfo(torch.float32).eps / steps * largest[2]
        below, above = torch.minimum(left, right) - allowed, torch.maximum(left, right) + allowed
        beyond = torch.maximum(below - found, found - above).nan_to_num(nan=float("inf"))
        beyond = torch.where(there, beyond, 0.0)
        if beyond.max() > 0:
            h, i, j = (int(place) for place in torch.unravel_index(beyond.argmax(), x.shape))
            raise AssertionError(
                f"check_slopes: `{name}_slope` is {float(found[h, i, j]):.6g} at b_s = {float(x[h, i, j]):.6g}, query "
                f"{i}, key {j}, head {h}; differences give {float((left + right)[h, i, j]) / 2:.6g}"
            )

"""Relative biases as Toeplitz vectors: ALiBi, T5 buckets, and the rank form of rotary vectors.

Each function returns one value per distance t = j - p from query position p to key position j, for
t = -(length-1) .. length-1: entry `length - 1 + t` of the last axis. That is the `rel_bias` of the
operations, for sequences of up to `length` tokens. All are plain differentiable PyTorch and cost O(length).
"""

import math

import torch
from torch import Tensor


def alibi_bias(slopes: Tensor | float, length: int) -> Tensor:
    """Linear bias of ALiBi: -slope * |j - p|.

    Under a causal mask only keys with j <= p count, where this is slope * (j - p), the form of the paper; for
    attention in both directions the penalty is the same on either side. The paper's slopes for H heads (H a
    power of 2) are 2^(-8 h / H), h = 1 .. H.

    Args:
        slopes: one slope, or (H,) one per head; any floating dtype. They may be learned.
        length: longest sequence to cover, in tokens, at least 1.

    Returns:
        (2 * length - 1,) for one slope, else (H, 2 * length - 1); dtype and device of `slopes`.

    Raises:
        TypeError: `slopes` is not floating point, or `length` is not an int.
        ValueError: `slopes` has more than one axis, or `length` is below 1.

    Source: Press et al. 2022 (arXiv 2108.12409), section 3.

    Example:
        >>> alibi_bias(torch.tensor([0.5, 0.25]), 3).tolist()
        [[-1.0, -0.5, 0.0, -0.5, -1.0], [-0.5, -0.25, 0.0, -0.25, -0.5]]
    """
    _check_length("alibi_bias", length)
    slope = torch.as_tensor(slopes) if isinstance(slopes, Tensor) else torch.tensor(float(slopes))
    _check_floating("alibi_bias", "slopes", slope)
    if slope.ndim > 1:
        raise ValueError(f"alibi_bias: `slopes` has shape {tuple(slope.shape)}; expected () or (H,)")
    toward = -_distances(length, slope.device).abs()
    return (slope[..., None].to(_inner_dtype(slope)) * toward).to(slope.dtype)


def t5_bias(table: Tensor, length: int, *, causal: bool, max_distance: int = 128) -> Tensor:
    """Learned bias of T5: one table entry per bucket of distances.

    With `causal` all buckets serve the keys at or before the query, and keys after it fall into bucket 0;
    otherwise the first half of the buckets serves keys at or before the query, and the second half keys after
    it. Of the buckets of one direction, the first half hold one distance each; the others grow in proportion
    to the distance, up to `max_distance`, and the last one holds everything beyond.

    T5 does not scale its table; a model that does (by sqrt(d), say) scales the table before the call.

    Args:
        table: (buckets,) or (buckets, H), as in the weight of an embedding; any floating dtype. T5 has 32
            buckets.
        length: longest sequence to cover, in tokens, at least 1.
        causal: how the buckets are shared out; give it as the attention's `causal`.
        max_distance: distance, in tokens, from which on the last bucket serves.

    Returns:
        (2 * length - 1,), or (H, 2 * length - 1); dtype and device of `table`.

    Raises:
        TypeError: `table` is not floating point, or `length` is not an int.
        ValueError: `table` has another number of axes or too few buckets (at least 2 if causal, else an even
            number of at least 4), `max_distance` is within the one-distance buckets, or `length` is below 1.

    Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1, with the buckets of its published code.

    Example:
        >>> t5_bias(torch.arange(32.0), 4, causal=True).tolist()
        [3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        >>> t5_bias(torch.arange(32.0), 4, causal=False).tolist()
        [3.0, 2.0, 1.0, 0.0, 17.0, 18.0, 19.0]
    """
    _check_length("t5_bias", length)
    _check_floating("t5_bias", "table", table)
    if table.ndim not in (1, 2):
        raise ValueError(f"t5_bias: `table` has shape {tuple(table.shape)}; expected (buckets,) or (buckets, H)")
    buckets = table.shape[0]
    if buckets < 2 or (not causal and (buckets < 4 or buckets % 2)):
        needed = "at least 2 with causal=True" if causal else "an even number of at least 4 with causal=False"
        raise ValueError(f"t5_bias: `table` has {buckets} buckets; expected {needed}")
    exact = buckets // (2 if causal else 4)
    if max_distance <= exact:
        raise ValueError(
            f"t5_bias: `max_distance` is {max_distance}; expected more than {exact}, the number of distances "
            f"with a bucket of their own"
        )
    bucket = _t5_buckets(_distances(length, table.device), buckets, max_distance, causal)
    # Indexing, not index_select: its backward on a GPU sums in a fixed order.
    return table.movedim(0, -1)[..., bucket].contiguous()


def rotary_bias(a: Tensor, b: Tensor, length: int) -> Tensor:
    """Rank form: the inner product of two vectors rotated to the positions of query and key.

    <RoPE_p(a), RoPE_j(b)> depends on t = j - p alone. With the pairs (x[c], x[c + S/2]) turned by the angle
    p theta_c, theta_c = 10000^(-2c/S), it is
        sum over c of (a1 b1 + a2 b2) cos(t theta_c) + (a2 b1 - a1 b2) sin(t theta_c).

    Args:
        a: (..., S), S even; the query side, learned.
        b: (..., S), the shape, dtype and device of `a`; the key side.
        length: longest sequence to cover, in tokens, at least 1.

    Returns:
        (..., 2 * length - 1), in the dtype of `a`; computed in fp32 for half inputs.

    Raises:
        TypeError: `a` or `b` is not floating point, their dtypes differ, or `length` is not an int.
        ValueError: shapes or devices differ, S is odd or missing, or `length` is below 1.

    Source: the relative position bias of Hua et al. 2022 (arXiv 2202.10447) for long sequences, with the
    rotation of Su et al. 2021 (arXiv 2104.09864).

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> rotary_bias(a, b, 3)  # with S = 2, theta = 1: -sin(t)
        tensor([ 0.9093,  0.8415,  0.0000, -0.8415, -0.9093])
    """
    _check_length("rotary_bias", length)
    _check_floating("rotary_bias", "a", a)
    _check_floating("rotary_bias", "b", b)
    if b.dtype != a.dtype:
        raise TypeError(f"rotary_bias: `b` has dtype {b.dtype}; expected {a.dtype}, as `a` has")
    if a.ndim == 0 or a.shape[-1] == 0 or a.shape[-1] % 2:
        raise ValueError(f"rotary_bias: `a` has shape {tuple(a.shape)}; expected (..., S) with S even")
    if b.shape != a.shape:
        raise ValueError(f"rotary_bias: `b` has shape {tuple(b.shape)}; expected {tuple(a.shape)}, as `a` has")
    if b.device != a.device:
        raise ValueError(f"rotary_bias: `b` is on {b.device}; expected {a.device}, where `a` is")
    return rank_form(a, b, rank_turns(a, length))


def rank_turns(a: Tensor, length: int) -> Tensor:
    """What `rank_form` takes: [cos(t theta) | sin(t theta)] of every distance t, (2 * length - 1, S)."""
    half = a.shape[-1] // 2
    # Large angles lose their fraction in fp32, so they are formed in fp64.
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=a.device) / half)
    angle = _distances(length, a.device)[:, None] * theta
    return torch.cat((angle.cos(), angle.sin()), -1).to(_inner_dtype(a))


def rank_form(a: Tensor, b: Tensor, turns: Tensor) -> Tensor:
    """`rotary_bias` of these distances."""
    half, inner = a.shape[-1] // 2, _inner_dtype(a)
    (a1, a2), (b1, b2) = a.to(inner).split(half, dim=-1), b.to(inner).split(half, dim=-1)
    both = torch.cat((a1 * b1 + a2 * b2, a2 * b1 - a1 * b2), -1)
    return (both @ turns.mT).to(a.dtype)


def _t5_buckets(distance: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Give the bucket of each distance j - p."""
    if causal:
        first, away = torch.zeros_like(distance), (-distance).clamp(min=0)
    else:
        buckets //= 2
        first, away = (distance > 0) * buckets, distance.abs()
    exact = buckets // 2
    # The share of the way from `exact` to `max_distance`, on a logarithmic scale. Where a power falls on a
    # bucket's edge, rounding must not leave it below: hence the small addition.
    way = torch.log(away.clamp(min=1).double() / exact) / math.log(max_distance / exact)
    coarse = exact + torch.floor(way * (buckets - exact) + 1e-9).long()
    return first + torch.where(away < exact, away, coarse.clamp(max=buckets - 1))


def _distances(length: int, device: torch.device) -> Tensor:
    return torch.arange(1 - length, length, device=device)


def _inner_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_length(name: str, length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):  # the second: a traced length
        raise TypeError(f"{name}: `length` has type {type(length).__name__}; expected int")
    if length < 1:
        raise ValueError(f"{name}: `length` is {length}; expected at least 1")


def _check_floating(name: str, argument: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: `{argument}` has type {type(value).__name__}; expected Tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name}: `{argument}` has dtype {value.dtype}; expected a floating-point dtype")

"""PTX's arithmetic on numpy arrays: exact where PTX is exact, and what hardware is free in as `Freedom` chooses.

Halves are held as their bits in uint16: numpy has no bfloat16, and fp16 is held alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashgau.kernels import interpreted as bf16

Array = np.ndarray[Any, Any]
_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
_TINY = np.float32(np.finfo(np.float32).tiny)


# ---- fp32 ----


def flushed(x: Array) -> Array:
    """Subnormal numbers become zeros of their sign (`.ftz`)."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def canonical(x: Array) -> Array:
    """Every NaN becomes PTX's."""
    wrong = np.isnan(x)
    return np.where(wrong, _NAN, x) if wrong.any() else x


def saturated(x: Array) -> Array:
    """Clamped to [0, 1], NaN to 0 (`.sat`)."""
    return np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1)))


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once (to nearest even) to fp32."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)  # the product is exact
    total = product + addend
    narrow = total.astype(np.float32)
    # Rounding twice is wrong only where fp64 lies halfway between two fp32 numbers, or these are subnormal.
    doubtful = ((total.view(np.int64) & 0x1FFFFFFF) == 0x10000000) | (np.abs(total) < 2 * _TINY)
    if doubtful.any():
        narrow = np.where(doubtful, bf16.added(product, addend).astype(np.float32), narrow)
    return narrow


def wide_fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c of fp64, rounded once, where a b neither overflows nor loses its last bits below 2^-1022: the product in
    two parts (Dekker 1971), and all but the last sum rounded to odd (Boldo and Melquiond 2008)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    with np.errstate(all="ignore"):
        product = a * b
        (a_high, a_low), (b_high, b_low) = _halves_of(a), _halves_of(b)
        below = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
        plain = product + c
        low, low_missed = _two_sum(c, below)
        high, high_missed = _two_sum(product, low)
        total: Array = high + bf16.added(low_missed, high_missed)
        return np.where(np.isfinite(below) & np.isfinite(total), total, plain)


def _halves_of(x: Array) -> tuple[Array, Array]:
    """Upper and lower digits of fp64 numbers, whose products are exact (Veltkamp)."""
    scaled = x * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - x)
    return high, x - high


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what that misses (Knuth)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def larger(a: Array, b: Array) -> Array:
    """max: a NaN loses, and +0 is more than -0."""
    return _chosen(a, b, (a.view(np.uint32) & b.view(np.uint32)).view(np.float32), np.maximum(a, b))


def smaller(a: Array, b: Array) -> Array:
    """min, likewise."""
    return _chosen(a, b, (a.view(np.uint32) | b.view(np.uint32)).view(np.float32), np.minimum(a, b))


def _chosen(a: Array, b: Array, equal: Array, other: Array) -> Array:
    """One for equal numbers, the other else; beside a NaN, of whatever kind, the number."""
    return np.where(a == b, equal, np.where(np.isnan(a), b, np.where(np.isnan(b), a, other)))


# ---- halves ----


def widened(bits: Array, kind: str) -> Array:
    """fp32 of halves' bits: "bf16" or "f16"."""
    if kind == "bf16":
        return bf16.widened(bits)
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def halved(x: Array, kind: str, *, towards_zero: bool = False, relu: bool = False) -> Array:
    """Bits of the half nearest to fp32 or fp64 numbers (to even), or of fp32 the next one towards zero; NaN is PTX's
    0x7FFF."""
    if relu:
        x = np.where(x > 0, x, np.where(np.isnan(x), x, np.float32(0)))
    if kind == "bf16":
        bits = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16) if towards_zero else bf16.rounded(x)
    else:
        bits = _fp16_towards_zero(x) if towards_zero else x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def _fp16_towards_zero(x: Array) -> Array:
    near = x.astype(np.float16)
    too_far = np.abs(near.astype(np.float32)) > np.abs(x)
    return near.view(np.uint16) - too_far.astype(np.uint16)


def half_fma(a: Array, b: Array, c: Array, kind: str) -> Array:
    """a b + c of halves' bits, rounded once."""
    a, b, c = (widened(x, kind).astype(np.float64) for x in (a, b, c))
    return halved(bf16.added(a * b, c), kind)


# ---- integers ----


def quotient(a: Array, b: Array) -> Array:
    """Integer division, truncated; by 0 it is unspecified in PTX, and here all ones."""
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        found = a // b
    else:
        found = np.abs(a) // np.abs(b)
        found = np.where((a < 0) != (b < 0), -found, found)
    return np.where(zero, a.dtype.type(0) - a.dtype.type(1), found)


def remainder(a: Array, b: Array) -> Array:
    """a - b (a / b), of the sign of a."""
    return a - b * quotient(a, b)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of a product of 32-bit or 64-bit integers."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)]).astype(object).astype(a.dtype)


def shifted_left(a: Array, by: Array) -> Array:
    """Amounts of the width and more give 0."""
    width = a.dtype.itemsize * 8
    amount = np.minimum(by, by.dtype.type(width - 1)).astype(a.dtype)
    return np.where(by >= width, a.dtype.type(0), a << amount)


def shifted_right(a: Array, by: Array) -> Array:
    """Signed numbers keep their sign; amounts of the width and more give 0, or the sign in every bit."""
    width = a.dtype.itemsize * 8
    amount = np.minimum(by, by.dtype.type(width - 1)).astype(a.dtype)
    if a.dtype.kind == "i":
        return a >> amount
    return np.where(by >= width, a.dtype.type(0), a >> amount)


def _ones(count: Array) -> Array:
    """So many ones from the lowest bit on."""
    most = np.minimum(count, np.uint64(63))
    return np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << most) - np.uint64(1))


def field_of(a: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits from `start` on, sign-extended for signed types."""
    width = np.uint64(a.dtype.itemsize * 8)
    bits = a.view(f"u{a.dtype.itemsize}").astype(np.uint64)
    start, length = (start & 0xFF).astype(np.uint64), (length & 0xFF).astype(np.uint64)
    there = np.minimum(length, width - np.minimum(start, width))  # what lies beyond the highest bit is its sign, or 0
    taken = (bits >> np.minimum(start, np.uint64(63))) & _ones(there)
    if a.dtype.kind == "i":
        highest = np.minimum(start + np.maximum(length, np.uint64(1)), width) - np.uint64(1)
        negative = ((bits >> highest) & np.uint64(1) == 1) & (length > 0)
        taken = np.where(negative, taken | ~_ones(there), taken)
    return taken.astype(f"u{a.dtype.itemsize}").view(a.dtype)


def inserted(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: `length` bits of a put into b from `start` on."""
    width = np.uint64(a.dtype.itemsize * 8)
    start, length = (start & 0xFF).astype(np.uint64), np.minimum((length & 0xFF).astype(np.uint64), width)
    place = np.minimum(start, np.uint64(63))
    mask = np.where(start >= width, np.uint64(0), _ones(length) << place)
    return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << place) & mask)).astype(a.dtype)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes chosen from the eight of a and b, or their signs."""
    source = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    found = np.zeros_like(source)
    for i in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (source >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(0xFF)
        sign = np.where(byte >= 128, np.uint64(0xFF), np.uint64(0))
        found |= np.where(choice >= 8, sign, byte) << np.uint64(8 * i)
    return found.astype(np.uint32)


def to_integer(x: Array, kind: str, rounding: str) -> Array:
    """cvt of a float to an integer: NaN gives 0, what is out of range the nearest that is in it."""
    steps = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    whole = np.where(np.isnan(x), 0.0, steps[rounding](x.astype(np.float64)))
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    limits = np.iinfo(dtype)
    inside = np.clip(whole, float(limits.min), float(limits.max))
    top = inside >= float(limits.max)
    return np.where(top, limits.max, np.where(top, 0, inside).astype(dtype)).astype(dtype)


# ---- what hardware is free in ----


@dataclass
class Freedom:
    """Choices that PTX leaves to hardware.

    Attributes:
        seed: of the errors of approximate functions, within the bounds that PTX documents; None for correct rounding.
        descending: whether products of a matrix instruction are added up from the last to the first, each sum in fp32;
            None lets numpy add them in the order that suits it.
    """

    seed: int | None = None
    descending: bool | None = None

    def approximate(self, function: str, *args: Array) -> Array:
        """An approximate function of fp32: `ex2`, `lg2`, `rcp`, `rsqrt`, `sqrt`, `sin`, `cos`, `tanh` or `div`."""
        compute, relative, absolute = _APPROXIMATE[function]
        exact = compute(*(x.astype(np.float64) for x in args))
        if self.seed is not None:
            error = _scattered(args[0], self.seed)
            kept = np.isfinite(exact) & (exact != 0) & (exact != 1)
            near_one = np.abs(np.log2(np.abs(args[0]))) < 1 if function == "lg2" else True
            bound = np.where(near_one, absolute, 0) + relative * np.abs(exact)
            exact = np.where(kept, exact + error * bound, exact)
        return exact.astype(np.float32)


def _scattered(x: Array, seed: int) -> Array:
    """Numbers in [-1, 1) that look random, and are the same for the same x: hardware's functions are functions."""
    bits = x.view(np.uint32).astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64's, of Steele et al. 2014
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(factor)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


# Function, largest relative and absolute error: PTX ISA 8.7, section 9.7.3. An ulp counts as 2^-23 of the value.
_APPROXIMATE: dict[str, tuple[Any, float, float]] = {
    "ex2": (np.exp2, 2**-22.0, 0.0),
    "lg2": (np.log2, 2**-22.0, 2**-22.0),
    "rcp": (lambda x: 1 / x, 2**-23.0, 0.0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2**-22.9, 0.0),
    "sqrt": (np.sqrt, 2**-23.0, 0.0),
    "sin": (np.sin, 0.0, 2**-20.5),
    "cos": (np.cos, 0.0, 2**-20.5),
    "tanh": (np.tanh, 2**-11.0, 0.0),
    "div": (lambda x, y: x / y, 2**-22.0, 0.0),
}

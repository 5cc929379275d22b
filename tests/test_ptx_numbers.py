"""PTX's arithmetic: held to exact rational numbers and to Python's integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flashgau.ptx import numbers

BITS = st.integers(0, 2**32 - 1)
HALF_BITS = st.integers(0, 2**16 - 1)
# Numbers whose products and sums lie halfway between others more often than by chance.
SHORT = st.builds(
    lambda sign, digits, power: np.float32(sign * digits * 2.0**power),
    st.sampled_from([-1, 1]), st.integers(0, 2**13), st.integers(-140, 100),
)  # fmt: skip
FLOATS = st.one_of(BITS.map(lambda b: np.uint32(b).view(np.float32)), SHORT)
DOUBLES = st.one_of(
    st.floats(-1e100, 1e100).filter(lambda x: x == 0 or abs(x) > 1e-100),
    st.builds(lambda digits, power: digits * 2.0**power, st.integers(-(2**27), 2**27), st.integers(-100, 100)),
)
FORMATS = {
    "f64": (53, -1074, 1023),
    "f32": (24, -149, 127),
    "f16": (11, -24, 15),
    "bf16": (8, -133, 127),
}  # digits, smallest power, largest


def nearest(x: Fraction, kind: str) -> float:
    """The nearest number of a format, to even; beyond the largest an infinity."""
    digits, smallest, largest = FORMATS[kind]
    if x == 0:
        return 0.0
    power = math.floor(math.log2(abs(x.numerator)) - math.log2(x.denominator))
    power += -1 if abs(x) < Fraction(2) ** power else 1 if abs(x) >= Fraction(2) ** (power + 1) else 0
    unit = Fraction(2) ** max(power - digits + 1, smallest)
    rounded = round(x / unit) * unit
    return float(rounded) if abs(rounded) < Fraction(2) ** (largest + 1) else math.copysign(math.inf, x)


def array(*values):
    return [np.array([x]) for x in values]


@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_once(a, b, c):
    found = float(numbers.fma(*array(a, b, c))[0])
    if not all(map(np.isfinite, (a, b, c))):
        with np.errstate(all="ignore"):
            expected = float(np.float64(a) * np.float64(b) + np.float64(c))
        assert found == expected or (math.isnan(found) and math.isnan(expected))
        return
    assert found == nearest(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)), "f32")


@given(DOUBLES, DOUBLES, DOUBLES)
@example(1.0 + 2.0**-30, 1.0 + 2.0**-23, 2.0**-53)
@example(1.0 + 2.0**-52, 1.0 + 2.0**-52, -1.0)
@example(3.0, 2.0**-53, 1.0)
def test_fma_of_fp64_rounds_once(a, b, c):
    found = float(numbers.wide_fma(*array(a, b, c))[0])
    assert found == nearest(Fraction(a) * Fraction(b) + Fraction(c), "f64")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@given(FLOATS)
def test_halves_are_the_nearest(kind, x):
    with np.errstate(all="ignore"):
        bits = numbers.halved(np.array([x]), kind)
    back = float(numbers.widened(bits, kind)[0])
    if np.isnan(x):
        assert bits[0] == 0x7FFF
    elif np.isinf(x):
        assert back == x
    else:
        assert back == nearest(Fraction(float(x)), kind)
        assert math.copysign(1, back) == math.copysign(1, float(x))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_every_half_is_what_pytorch_says(kind, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    found = numbers.widened(bits, kind)
    assert np.array_equal(found, expected, equal_nan=True)
    again = numbers.halved(found, kind)
    assert np.array_equal(again[~np.isnan(found)], bits[~np.isnan(found)])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@given(FLOATS)
def test_towards_zero_is_never_farther(kind, x):
    if not np.isfinite(x):
        return
    with np.errstate(all="ignore"):
        back = float(numbers.widened(numbers.halved(np.array([x]), kind, towards_zero=True), kind)[0])
    assert abs(back) <= abs(float(x))
    digits, smallest, largest = FORMATS[kind]
    unit = max(abs(float(x)) * 2.0 ** (1 - digits), 2.0**smallest)
    assert abs(float(x)) - abs(back) < unit or abs(float(x)) >= 2.0**largest


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@given(HALF_BITS, HALF_BITS, HALF_BITS)
def test_fma_of_halves_rounds_once(kind, a, b, c):
    bits = array(*(np.uint16(x) for x in (a, b, c)))
    wide = [float(numbers.widened(x, kind)[0]) for x in bits]
    with np.errstate(all="ignore"):
        found = float(numbers.widened(numbers.half_fma(*bits, kind), kind)[0])
    if all(map(math.isfinite, wide)):
        x, y, z = map(Fraction, wide)
        assert found == nearest(x * y + z, kind)


@example(a=0, b=0x7F800001)  # a NaN that signals
@given(BITS, BITS)
def test_min_and_max_know_zeros_and_nan(a, b):
    x, y = (np.array([v], np.uint32).view(np.float32) for v in (a, b))
    small, large = numbers.smaller(x, y)[0], numbers.larger(x, y)[0]
    if np.isnan(x[0]) or np.isnan(y[0]):
        other = y[0] if np.isnan(x[0]) else x[0]
        assert all(v == other or (np.isnan(v) and np.isnan(other)) for v in (small, large))
    else:
        assert (small, large) == (min(x[0], y[0]), max(x[0], y[0]))
    plus, minus = np.array([0.0], np.float32), np.array([-0.0], np.float32)
    assert np.signbit(numbers.smaller(plus, minus))[0]
    assert not np.signbit(numbers.larger(minus, plus))[0]


def signed(x: int, width: int) -> int:
    x %= 1 << width
    return x - (1 << width) if x >> (width - 1) else x


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
@given(st.integers(-(2**64), 2**64), st.integers(-(2**64), 2**64), st.integers(0, 300))
def test_integers(dtype, a, b, shift):
    width = np.dtype(dtype).itemsize * 8
    wrap = (lambda x: signed(x, width)) if np.dtype(dtype).kind == "i" else (lambda x: x % (1 << width))
    a, b = wrap(a), wrap(b)
    x, y = np.array([a], dtype), np.array([b], dtype)
    by = np.array([shift], np.uint32)
    assert numbers.shifted_left(x, by)[0] == wrap(a << shift if shift < width else 0)
    assert numbers.shifted_right(x, by)[0] == a >> shift
    assert numbers.high_product(x, y)[0] == wrap((a * b) >> width)
    if b != 0 and not (b == -1 and a == -(1 << (width - 1))):
        whole = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        assert numbers.quotient(x, y)[0] == whole
        assert numbers.remainder(x, y)[0] == a - b * whole


@given(BITS, BITS, st.integers(0, 40), st.integers(0, 40))
def test_fields(a, b, start, length):
    place, count = np.array([start], np.uint32), np.array([length], np.uint32)
    raw = (a >> start) & ((1 << length) - 1)
    assert numbers.field_of(np.array([a], np.uint32), place, count)[0] == raw % 2**32
    x = signed(a, 32)
    if length == 0:
        expected = 0
    elif start + length <= 32:
        expected = signed(raw << (32 - length), 32) >> (32 - length)
    else:
        expected = x >> min(start, 31)
    assert numbers.field_of(np.array([x], np.int32), place, count)[0] == expected
    mask = (((1 << min(length, 32)) - 1) << start) % 2**32 if start < 32 else 0
    moved = (a << start) % 2**32 if start < 32 else 0
    found = numbers.inserted(np.array([a], np.uint32), np.array([b], np.uint32), place, count)
    assert found[0] == (b & ~mask) | (moved & mask)


@given(st.lists(st.tuples(BITS, st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=5))
def test_fields_that_differ_by_thread(rows):
    a, start, length = (np.array(x, np.uint32) for x in zip(*rows, strict=True))
    for x in (a, a.view(np.int32)):
        alone = [numbers.field_of(x[i : i + 1], start[i : i + 1], length[i : i + 1])[0] for i in range(len(rows))]
        assert numbers.field_of(x, start, length).tolist() == alone


@given(BITS, BITS, BITS)
def test_bytes_are_chosen(a, b, selector):
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    expected = 0
    for i in range(4):
        choice = selector >> (4 * i) & 15
        byte = source[choice & 7]
        expected |= (0xFF if byte & 128 else 0) << 8 * i if choice & 8 else byte << 8 * i
    found = numbers.permuted(*(np.array([x], np.uint32) for x in (a, b, selector)))
    assert found[0] == expected


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@given(FLOATS)
def test_floats_become_integers(kind, x):
    limits = np.iinfo(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    found = int(numbers.to_integer(np.array([x]), kind, "rzi")[0])
    value = float(x)
    expected = (
        0
        if math.isnan(value)
        else limits.max
        if value == math.inf
        else limits.min
        if value == -math.inf
        else int(value)
    )
    assert found == min(max(expected, limits.min), limits.max)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(
    ("function", "exact", "relative", "absolute"),
    [
        ("ex2", np.exp2, 2**-22, 0), ("lg2", np.log2, 2**-22, 2**-22), ("rcp", np.reciprocal, 2**-23, 0),
        ("sqrt", np.sqrt, 2**-23, 0), ("tanh", np.tanh, 2**-11, 0),
    ],
)  # fmt: skip
def test_approximations_keep_their_bounds(function, exact, relative, absolute, seed):
    x = np.linspace(0.01, 20, 4001, dtype=np.float32)
    expected = exact(x.astype(np.float64))
    found = numbers.Freedom(seed).approximate(function, x)
    allowed = (relative + 2**-24) * np.abs(expected) + absolute
    assert (np.abs(found - expected) <= allowed).all()
    rounded = found == expected.astype(np.float32)
    assert rounded.all() == (seed is None)

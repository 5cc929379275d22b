"""The bias functions against dense matrices and the formulas of their papers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from flashgau import reference
from flashgau.bias import alibi_bias, rotary_bias, t5_bias

seeds = st.integers(0, 2**32)
lengths = st.integers(1, 12)


def randoms(seed: int, *shapes: tuple[int, ...], grad: bool = False) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_(grad) for s in shapes]


def matrix(bias: Tensor) -> Tensor:
    """The dense matrix of a Toeplitz vector, entry by entry: [..., p, j] = bias[..., L-1 + j - p]."""
    n = (bias.shape[-1] + 1) // 2
    return torch.stack([torch.stack([bias[..., n - 1 + j - p] for j in range(n)], -1) for p in range(n)], -2)


@given(seeds, lengths, st.sampled_from([(), (1,), (3,)]))
def test_alibi_is_its_matrix(seed, n, shape):
    (slopes,) = randoms(seed, shape)
    p, j = torch.arange(n)[:, None], torch.arange(n)
    expected = -slopes[..., None, None] * (j - p).abs()
    assert torch.equal(matrix(alibi_bias(slopes, n)), expected)
    below = torch.ones(n, n, dtype=torch.bool).tril()
    causal = slopes[..., None, None] * (j - p)
    assert torch.equal(matrix(alibi_bias(slopes, n))[..., below], causal[..., below])


def test_alibi_of_a_number():
    assert alibi_bias(0.5, 2).tolist() == [-0.5, 0.0, -0.5]
    assert alibi_bias(1, 1).dtype == torch.get_default_dtype()


def published_bucket(t: int, causal: bool, buckets: int, max_distance: int) -> int:
    """T5's bucket of t = key position - query position, by the definition: bucket e + s of one direction,
    e = half of its buckets, holds the distances from e (D / e)^(s / w) on, w = its wide buckets."""
    first = 0
    if causal:
        away = max(-t, 0)
    else:
        buckets //= 2
        first, away = (buckets if t > 0 else 0), abs(t)
    e = buckets // 2
    if away < e:
        return first + away
    w = buckets - e
    # away >= e (D/e)^(s/w), in integers: away^w e^s >= D^s e^w.
    steps = [s for s in range(w) if away**w * e**s >= max_distance**s * e**w]
    return first + e + max(steps)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 64), (4, 3), (8, 1000)])
def test_t5_buckets_are_those_published(causal, buckets, max_distance):
    n = 300
    # With the bucket's number in the table, the bias is the bucket.
    bias = t5_bias(torch.arange(float(buckets)), n, causal=causal, max_distance=max_distance)
    expected = [published_bucket(t, causal, buckets, max_distance) for t in range(1 - n, n)]
    assert bias.tolist() == expected


def test_t5_buckets_cover_the_table_in_order():
    n = 200
    for causal in (True, False):
        buckets = t5_bias(torch.arange(32.0), n, causal=causal)
        # In two directions, the bucket of distance 0 "after the query" can hold nothing.
        assert set(buckets.tolist()) == set(range(32)) - (set() if causal else {16})
        past = buckets[:n].flip(0).tolist()  # at distances 0, 1, 2, ...
        assert past == sorted(past)
        assert past[128:] == [past[-1]] * (n - 128)
    two_way = t5_bias(torch.arange(32.0), n, causal=False)
    assert torch.equal(two_way[n:], two_way[: n - 1].flip(0) + 16)  # the future mirrors the past
    assert (t5_bias(torch.arange(32.0), n, causal=True)[n:] == 0).all()


@given(seeds, lengths, st.booleans())
def test_t5_heads_are_columns(seed, n, causal):
    (table,) = randoms(seed, (32, 3))
    bias = t5_bias(table, n, causal=causal)
    assert bias.shape == (3, 2 * n - 1)
    for h in range(3):
        assert torch.equal(bias[h], t5_bias(table[:, h], n, causal=causal))


def rotate(x: Tensor, position: int) -> Tensor:
    """RoPE by its definition: the pair (x[c], x[c + S/2]) turned by position * 10000^(-2c/S)."""
    half = x.shape[-1] // 2
    out = x.clone()
    for c in range(half):
        angle = position * 10000 ** (-2 * c / x.shape[-1])
        out[..., c] = x[..., c] * math.cos(angle) - x[..., c + half] * math.sin(angle)
        out[..., c + half] = x[..., c + half] * math.cos(angle) + x[..., c] * math.sin(angle)
    return out


@given(seeds, lengths, st.sampled_from([2, 4, 6]), st.sampled_from([(), (3,), (2, 3)]))
def test_rotary_bias_is_the_product_of_rotated_vectors(seed, n, width, lead):
    a, b = randoms(seed, (*lead, width), (*lead, width))
    expected = torch.stack(
        [torch.stack([(rotate(a, p) * rotate(b, j)).sum(-1) for j in range(n)], -1) for p in range(n)], -2
    )
    assert_close(matrix(rotary_bias(a, b, n)), expected, rtol=1e-12, atol=1e-12)


def test_rotary_bias_keeps_its_accuracy_far_away():
    a, b = randoms(0, (128,), (128,))
    exact = rotary_bias(a, b, 100_000)
    error = (rotary_bias(a.float(), b.float(), 100_000) - exact).abs().max()
    assert error < 1e-6 * a.norm() * b.norm()


@given(seeds, lengths, st.integers(1, 12))
def test_a_longer_bias_is_the_same_bias(seed, n, shorter):
    """Entries depend on the distance only, so a bias made for a longer length serves a shorter one."""
    slopes, table, a, b = randoms(seed, (2,), (32, 2), (2, 4), (2, 4))
    m = min(n, shorter)
    middle = slice(n - m, n + m - 1)
    assert torch.equal(alibi_bias(slopes, n)[:, middle], alibi_bias(slopes, m))
    for causal in (True, False):
        assert torch.equal(t5_bias(table, n, causal=causal)[:, middle], t5_bias(table, m, causal=causal))
    assert_close(rotary_bias(a, b, n)[:, middle], rotary_bias(a, b, m), rtol=1e-13, atol=1e-13)


def test_derivatives():
    slopes, table, a, b = randoms(0, (2,), (4, 2), (2, 4), (2, 4), grad=True)
    functions = [
        (lambda s: alibi_bias(s, 4), (slopes,)),
        (lambda t: t5_bias(t, 4, causal=False), (table,)),
        (lambda t: t5_bias(t, 4, causal=True), (table,)),
        (lambda x, y: rotary_bias(x, y, 4), (a, b)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept_and_half_is_rounded_once(dtype):
    slopes, table, a, b = (x.to(dtype) for x in randoms(0, (2,), (32, 2), (2, 4), (2, 4)))
    for function, inputs in (
        (lambda s: alibi_bias(s, 500), (slopes,)),
        (lambda t: t5_bias(t, 500, causal=True), (table,)),
        (lambda x, y: rotary_bias(x, y, 500), (a, b)),
    ):
        bias = function(*inputs)
        assert bias.dtype == dtype
        assert bias.is_contiguous()
        if dtype.itemsize == 2:
            assert torch.equal(bias, function(*(x.float() for x in inputs)).to(dtype))


def test_the_operations_take_these_biases():
    q, table, a, b = randoms(0, (1, 2, 6, 4), (32, 2), (4,), (4,))
    plain = torch.softmax(q @ q.mT / 2 + matrix(t5_bias(table, 6, causal=False)), -1) @ q
    assert_close(reference.attention(q, q, q, rel_bias=t5_bias(table, 6, causal=False)), plain)
    z = q[:, 0]
    plain = torch.relu(z @ z.mT / 6 + matrix(rotary_bias(a, b, 6))).square() @ z
    assert_close(reference.gau_attention(z, z, z, rel_bias=rotary_bias(a, b, 6)), plain)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: alibi_bias(torch.ones(2), 0), ValueError, "alibi_bias: `length` is 0; expected at least 1"),
        (lambda: alibi_bias(torch.ones(2), 2.0), TypeError, "`length` has type float; expected int"),
        (lambda: alibi_bias(torch.ones(2), True), TypeError, "`length` has type bool"),
        (
            lambda: alibi_bias(torch.ones(2, 2), 3),
            ValueError,
            r"`slopes` has shape \(2, 2\); expected \(\) or \(H,\)",
        ),
        (lambda: alibi_bias(torch.ones(2).long(), 3), TypeError, "`slopes` has dtype torch.int64"),
        (lambda: t5_bias(torch.ones(2, 2, 2), 3, causal=True), ValueError, r"expected \(buckets,\) or"),
        (lambda: t5_bias(torch.ones(1), 3, causal=True), ValueError, "has 1 buckets; expected at least 2"),
        (
            lambda: t5_bias(torch.ones(7), 3, causal=False),
            ValueError,
            "has 7 buckets; expected an even number",
        ),
        (lambda: t5_bias(torch.ones(8), 3, causal=True, max_distance=4), ValueError, "expected more than 4"),
        (lambda: t5_bias([1.0], 3, causal=True), TypeError, "`table` has type list; expected Tensor"),
        (lambda: rotary_bias(torch.ones(3), torch.ones(3), 3), ValueError, "with S even"),
        (lambda: rotary_bias(torch.ones(()), torch.ones(()), 3), ValueError, "with S even"),
        (
            lambda: rotary_bias(torch.ones(4), torch.ones(2), 3),
            ValueError,
            r"`b` has shape \(2,\); expected \(4,\)",
        ),
        (
            lambda: rotary_bias(torch.ones(4), torch.ones(4).half(), 3),
            TypeError,
            "`b` has dtype torch.float16",
        ),
        (lambda: rotary_bias(torch.ones(4), torch.ones(4, device="meta"), 3), ValueError, "`b` is on meta"),
    ],
)
def test_bad_inputs_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""The reference on packed and padded rows, rows that see nothing, and empty tensors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_values import INF, SCORES, close, leaves, pad, randoms, seeds
from torch import Tensor

from flashgau import reference

# Each case: shapes of the sequence inputs (N for the tokens), of the shared inputs, the token axis, a call.
Case = tuple[list[tuple[Any, ...]], list[tuple[int, ...]], int, Callable[..., Tensor]]


def call_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, **where: Any) -> Tensor:
    out, lse = reference.attention(
        q, k, v, rel_bias=bias, sinks=sinks, causal=True, window=(4, None), return_lse=True, **where
    )
    return torch.cat([out, torch.where(lse == -INF, 0.0, lse)[..., None]], -1)


def call_gau(score: str, normalizer: Any, causal: bool) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, **where: Any) -> Tensor:
        return reference.gau_attention(
            q, k, v, gate, rel_bias=bias, score=score, normalizer=normalizer, causal=causal, **where
        )

    return call


def call_mixed_chunk(causal: bool) -> Callable[..., Tensor]:
    def call(*xs: Tensor, **where: Any) -> Tensor:
        *inputs, bias = xs
        return reference.mixed_chunk_attention(*inputs, rel_bias=bias, causal=causal, chunk_size=3, **where)

    return call


GAU_SHAPES = [("N", 2), ("N", 2), ("N", 3), ("N", 3)]
MIXED_SHAPES = [("N", 2)] * 4 + [("N", 3)] * 2
CASES: dict[str, Case] = {
    "attention": ([(4, "N", 2), (2, "N", 2), (2, "N", 3)], [(4, 21), (4,)], -2, call_attention),
    "relu2 keys": (GAU_SHAPES, [(21,)], -2, call_gau("relu2", "keys", True)),
    "relu2 row": (GAU_SHAPES, [(21,)], -2, call_gau("relu2", "row", True)),
    "laplace": (GAU_SHAPES, [(21,)], -2, call_gau("laplace", 2.0, False)),
    "softmax_plus": (GAU_SHAPES, [(21,)], -2, call_gau("softmax_plus", "keys", True)),
    "mixed causal": (MIXED_SHAPES, [(21,)], -2, call_mixed_chunk(True)),
    "mixed": (MIXED_SHAPES, [(21,)], -2, call_mixed_chunk(False)),
}


@pytest.mark.parametrize("name", CASES)
@given(
    seeds,
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([0.0, math.nan]),
)
def test_packed_and_padded_are_alone(name, seed, sizes, spare, filler):
    """Outputs and gradients of each sequence, run alone, packed and padded, whatever the padding holds."""
    shapes, shared_shapes, axis, call = CASES[name]
    shared = randoms(seed, *shared_shapes)
    alone = [
        randoms(seed + 1 + g, *[tuple(n if x == "N" else x for x in s) for s in shapes]) for g, n in enumerate(sizes)
    ]

    shared_a, outs, grads = leaves(shared), [], []
    for tensors in alone:
        inputs = leaves([x[None] for x in tensors])
        out = call(*inputs, *shared_a)
        out.square().sum().backward()
        outs.append(out[0])
        grads.append([x.grad[0] for x in inputs])

    # Packed: end to end in one row, with tokens of no sequence after them.
    total, bounds = sum(sizes), torch.tensor([0, *sizes]).cumsum(0).int()
    packed = leaves([pad(torch.cat(xs, axis), total + spare, filler, axis)[None] for xs in zip(*alone, strict=True)])
    shared_p = leaves(shared)
    out = call(*packed, *shared_p, cu_seqlens=bounds)
    out.square().sum().backward()
    close(out[0], pad(torch.cat(outs, axis), total + spare, 0.0, axis))
    for x, parts in zip(packed, zip(*grads, strict=True), strict=True):
        close(x.grad[0], pad(torch.cat(parts, axis), total + spare, 0.0, axis))

    # Padded: each in its row.
    longest = max(sizes) + spare
    padded = leaves([torch.stack([pad(x, longest, filler, axis) for x in xs]) for xs in zip(*alone, strict=True)])
    shared_b = leaves(shared)
    out = call(*padded, *shared_b, lengths=torch.tensor(sizes))
    out.square().sum().backward()
    close(out, torch.stack([pad(o, longest, 0.0, axis) for o in outs]))
    for x, parts in zip(padded, zip(*grads, strict=True), strict=True):
        close(x.grad, torch.stack([pad(part, longest, 0.0, axis) for part in parts]))
    for a, p, b in zip(shared_a, shared_p, shared_b, strict=True):
        close(p.grad, a.grad)
        close(b.grad, a.grad)


@given(seeds, st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=3))
def test_packed_cross_attention_is_alone(seed, sizes):
    ms, ns = [m for m, _ in sizes], [n for _, n in sizes]
    q, k, v, bias = randoms(seed, (1, 2, sum(ms), 3), (1, 1, sum(ns), 3), (1, 1, sum(ns), 2), (2, 9))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (ms, ns))
    options = {"causal": True, "rel_bias": bias, "return_lse": True}
    out, lse = reference.attention(q, k, v, cu_seqlens=cu_q, cu_seqlens_k=cu_k, **options)
    assert out.shape == (1, 2, sum(ms), 2)
    for g in range(len(sizes)):
        rows, keys = slice(cu_q[g], cu_q[g + 1]), slice(cu_k[g], cu_k[g + 1])
        alone = reference.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], **options)
        close((out[:, :, rows], lse[:, :, rows]), alone)


def test_padding_has_no_lse_even_with_sinks():
    q, k, v, sinks = randoms(0, (1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 4, 3), (2,))
    sinks.requires_grad_()
    _, lse = reference.attention(q, k, v, sinks=sinks, lengths=torch.tensor([0]), return_lse=True)
    assert (lse == -INF).all()
    lse.sum().backward()
    assert (sinks.grad == 0).all()


def test_a_row_that_sees_nothing_is_zero_with_zero_gradient():
    q, k, v = randoms(0, (1, 1, 5, 3), (1, 1, 2, 3), (1, 1, 2, 4), grad=True)
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == -INF).all()
    out[:, :, :3].sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))
    sinks = torch.tensor([0.3], dtype=torch.float64)
    out, lse = reference.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert (out[:, :, :3] == 0).all()
    close(lse[0, 0, :3], sinks.expand(3))
    for score in SCORES:
        q1, k1, v1 = (x[:, 0].detach().requires_grad_() for x in (q, k, v))
        out = reference.gau_attention(q1, k1, v1, score=score, causal=True)
        assert (out[:, :3] == 0).all()
        out[:, :3].sum().backward()
        assert all((x.grad == 0).all() for x in (q1, k1, v1))


@pytest.mark.parametrize(("batch", "m", "n"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_tensors_give_empty_or_zero_results_with_gradients(batch, m, n):
    q, k, v = randoms(0, (batch, 2, m, 3), (batch, 2, n, 3), (batch, 2, n, 4), grad=True)
    for out in (
        reference.attention(q, k, v),
        reference.gau_attention(q[:, 0], k[:, 0], v[:, 0]),
        reference.mixed_chunk_attention(*[k[:, 0]] * 4, v[:, 0], chunk_size=2, causal=True),
    ):
        assert (out == 0).all() or out.shape[-2] == n
        out.sum().backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))


def test_heads_may_be_absent():
    q = torch.zeros(2, 0, 3, 4)
    assert reference.attention(q, q, q).shape == (2, 0, 3, 4)


def test_short_bias_is_refused():
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="needs 7"):
        reference.attention(q, q, q, rel_bias=torch.zeros(5))

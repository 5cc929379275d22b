"""The reference against numerical derivatives, and its dtypes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flashgau.reference.mixed_chunk import MixedChunkState
from reference_values import ACTIVATIONS, INF, SCORES, randoms
from torch import Tensor
from torch.testing import assert_close

from flashgau import reference

# ---------------------------------------------------------------- derivatives


def finite_lse(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out, torch.where(lse == -INF, 0.0, lse)


LENGTHS, BOUNDS = torch.tensor([3, 1]), torch.tensor([0, 1, 1, 3])
HEADS = [(2, 2, 3, 2), (2, 1, 3, 2), (2, 1, 3, 1)]
ROW = [(1, 2, 3, 2), (1, 1, 3, 2), (1, 1, 3, 1)]
GAU = [(2, 3, 2), (2, 3, 2), (2, 3, 1), (2, 3, 1), (5,)]
MIXED = [(1, 5, 1)] * 4 + [(1, 5, 2)] * 2 + [(5,)]
STATE = [*MIXED, (1, 1, 2), (1, 2, 1), (1, 2, 1), (1, 2, 2)]


def continued(*xs: Tensor) -> tuple[Tensor, ...]:
    *inputs, bias, kv, quad_k, lin_k, v = xs
    state = MixedChunkState(kv, quad_k, lin_k, v, torch.tensor([5]))
    out, state = reference.mixed_chunk_attention(
        *inputs, chunk_size=2, causal=True, rel_bias=bias, initial_state=state, return_state=True
    )
    return out, state.kv, state.quad_k, state.lin_k, state.v


def gau(**options: Any) -> Callable[..., Any]:
    return lambda *xs: reference.gau_attention(*xs[:4], rel_bias=xs[4], **options)


def mixed(**options: Any) -> Callable[..., Any]:
    return lambda *xs: reference.mixed_chunk_attention(*xs[:6], rel_bias=xs[6], chunk_size=2, **options)


DERIVATIVES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "attention": (reference.attention, HEADS),
    "attention causal window lse": (
        lambda q, k, v: reference.attention(q, k, v, causal=True, window=(1, 0), return_lse=True),
        HEADS,
    ),
    "attention softcap bias sinks lse": (
        lambda q, k, v, b, s: reference.attention(
            q, k, v, softcap=1.5, rel_bias=b, sinks=s, scale=0.8, return_lse=True
        ),
        [*HEADS, (2, 5), (2,)],
    ),
    "attention lengths": (
        lambda q, k, v: finite_lse(*reference.attention(q, k, v, lengths=LENGTHS, return_lse=True)),
        HEADS,
    ),
    "attention packed": (
        lambda q, k, v, b: reference.attention(
            q, k, v, cu_seqlens=BOUNDS, cu_seqlens_k=torch.tensor([0, 0, 2, 3]), rel_bias=b
        ),
        [*ROW, (1, 2, 5)],
    ),
    "attention more queries than keys": (
        lambda q, k, v: finite_lse(*reference.attention(q, k, v, causal=True, return_lse=True)),
        [(1, 1, 3, 2), (1, 1, 2, 2), (1, 1, 2, 2)],
    ),
    "attention dropout": (
        lambda q, k, v: reference.attention(q, k, v, dropout_p=0.4, dropout_seed=3),
        HEADS,
    ),
    **{f"gau {score}": (gau(score=score), GAU) for score in SCORES},
    "gau row causal": (gau(normalizer="row", causal=True), GAU),
    "gau number lengths": (gau(score="laplace", normalizer=2.0, lengths=LENGTHS), GAU),
    "gau softmax causal lengths": (gau(score="softmax", causal=True, lengths=LENGTHS), GAU),
    "mixed": (mixed(), MIXED),
    "mixed laplace lengths": (mixed(score="laplace", lengths=torch.tensor([3])), MIXED),
    "mixed causal packed": (
        mixed(causal=True, lin_normalizer=1.5, cu_seqlens=torch.tensor([0, 3, 5])),
        MIXED,
    ),
    "mixed state": (continued, STATE),
    **{
        f"glu {a}": (lambda g, u, a=a: reference.glu(g, u, activation=a, up_activation=a), [(3,), (3,)])
        for a in ACTIVATIONS
    },
    "glu halves": (lambda g: reference.glu(g), [(2, 4)]),
    "glu_linear": (reference.glu_linear, [(2, 2), (3, 2), (3, 2), (3,), (3,)]),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_first_and_second_derivatives(name):
    function, shapes = DERIVATIVES[name]
    inputs = randoms(0, *shapes, grad=True)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_third_derivatives_exist(name):
    function, shapes = DERIVATIVES[name]
    inputs = randoms(1, *shapes, grad=True)
    out = function(*inputs)
    value = sum(x.pow(4).sum() for x in (out if isinstance(out, tuple) else (out,)))
    for _ in range(3):
        grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        assert all(torch.isfinite(g).all() for g in grads)
        value = sum(g.square().sum() for g in grads)


# ---------------------------------------------------------------- dtypes


CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "attention": (reference.attention, [(1, 2, 9, 4)] * 3),
    "gau": (reference.gau_attention, [(1, 9, 4)] * 4),
    "mixed": (reference.mixed_chunk_attention, [(1, 9, 4)] * 6),
    "glu": (reference.glu, [(9, 4)] * 2),
    "glu_linear": (reference.glu_linear, [(9, 4), (5, 4), (5, 4), (5,), (5,)]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_fp32(name, dtype):
    function, shapes = CALLS[name]
    inputs = [x.to(dtype) for x in randoms(0, *shapes)]
    wide = function(*(x.float() for x in inputs))
    out = function(*inputs)
    assert out.dtype == dtype
    assert torch.equal(out, wide.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(*inputs), out)
    plain = function.__wrapped__(*inputs)
    assert plain.dtype == dtype
    assert_close(plain.float(), wide, rtol=0.1, atol=0.1)
    leaf = inputs[0].clone().requires_grad_()
    function(leaf, *inputs[1:]).float().sum().backward()
    assert leaf.grad.dtype == dtype


def test_side_inputs_and_lse_may_be_fp32_beside_half():
    q, k, v, bias, sinks = (x.bfloat16() for x in randoms(0, *[(1, 2, 3, 4)] * 3, (5,), (2,)))
    out, lse = reference.attention(q, k, v, rel_bias=bias.float(), sinks=sinks.float(), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    same, _ = reference.attention(q, k, v, rel_bias=bias, sinks=sinks, return_lse=True)
    assert torch.equal(out, same)
    plain = reference.attention.__wrapped__(q, k, v, rel_bias=bias.float(), sinks=sinks.float())
    assert plain.dtype == torch.bfloat16

"""Attention's kernels for devices whose products and copies run beside other instructions: the same numbers."""

from __future__ import annotations

import contextvars

import kernel_calls
import pytest
import torch
from checks import check_agrees
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Call, randn

pytest.importorskip("triton")
import triton
from flashgau.kernels import descriptors
from flashgau.kernels.attention import attention_backward, attention_forward

from flashgau import tables
from flashgau.tables.config import Config

pytestmark = kernel_calls.pytestmark

AHEAD = Config(32, 16, asynchronous=True)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, one element into other memory: no descriptor can begin there."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def test_descriptors_are_of_aligned_rows_without_gaps():
    x = torch.empty(2, 3, 5, 8)
    assert descriptors.describable(x)
    assert descriptors.describable(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert descriptors.describable(x[:, :1])
    assert descriptors.describable(torch.empty(2, 1, 5, 12)[..., :7])  # rows of 48 bytes
    assert not descriptors.describable(shifted(x))
    assert not descriptors.describable(torch.empty(2, 3, 5, 7))  # rows of 28 bytes
    assert not descriptors.describable(x.half()[..., ::2])
    assert not descriptors.describable(x[:, :, :1].expand(2, 3, 5, 8))  # one row for all tokens
    assert not descriptors.describable(torch.empty(2, 3, 41)[..., :40].view(2, 3, 5, 8))  # heads 164 bytes apart


@settings(max_examples=8)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    window=st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)),
    valid=st.none() | st.integers(0, 70),
)
def test_keys_through_descriptors_and_pointers_give_the_same_bits(m, n, window, valid):
    """Forward and dQ, where rows past the valid keys hold NaN."""
    q, dout = randn(0, 1, 2, m, 8), randn(3, 1, 2, m, 8)
    k, v = randn(1, 1, 2, n, 8), randn(2, 1, 2, n, 8)
    lengths = None if valid is None else torch.tensor([min(valid, n)])
    if lengths is not None:
        k[:, :, lengths[0] :], v[:, :, lengths[0] :] = torch.nan, torch.nan
    options = {"window": window, "lengths": lengths, "config": AHEAD}
    found = []
    for keys, values in ((k, v), (shifted(k), shifted(v))):
        results = attention_forward(q, keys, values, **options)
        dq = attention_backward(dout, None, q, keys, values, results, **options)[0]
        found.append([*results, dq])
    assert descriptors.describable(k)
    assert not descriptors.describable(shifted(k))
    for described, pointed in zip(*found, strict=True):
        assert not described.isnan().any()
        assert torch.equal(described, pointed)


@settings(max_examples=8)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    window=st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)),
    valid=st.none() | st.integers(0, 70),
    groups=st.sampled_from([1, 2]),
)
def test_dv_of_wide_heads_ahead_and_in_turn_gives_the_same_bits(m, n, window, valid, groups):
    """It is a launch of its own there. Rows past the valid ones hold NaN."""
    q, k = randn(0, 1, groups, m, 8, dtype=torch.float16), randn(1, 1, 1, n, 8, dtype=torch.float16)
    v, dout = randn(2, 1, 1, n, 136, dtype=torch.float16), randn(3, 1, groups, m, 136, dtype=torch.float16)
    lengths = None if valid is None or m != n else torch.tensor([min(valid, n)])
    if lengths is not None:
        for x in (q, k, v, dout):
            x[:, :, lengths[0] :] = torch.nan
    found = []
    for ahead in (True, False):
        options = {"window": window, "lengths": lengths, "config": Config(16, 32, asynchronous=ahead)}
        results = attention_forward(q, k, v, **{**options, "config": Config(16, 32)})
        found.append(attention_backward(dout, None, q, k, v, results, **options)[2])
    assert not found[0].isnan().any()
    assert torch.equal(*found)


@pytest.mark.parametrize("config", [AHEAD, Config(32, 16)], ids=["ahead", "in turn"])
@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-30, 3.0])
@pytest.mark.parametrize("n_heads", [1, 3, 5])
def test_scales_of_any_sign_and_groups_of_any_number(config, scale, n_heads):
    q, k, v = randn(0, 1, n_heads, 37, 16), randn(1, 1, 1, 50, 16), randn(2, 1, 1, 50, 8)
    with tables.configured(lambda *_, **__: config):
        check_agrees(Call("attention", (q, k, v), {"scale": scale, "causal": True}), "triton")


@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 3.0, "window": (9, 4)}], ids=["causal", "softcap"])
def test_gradients_of_wide_heads_of_halves_are_made_apart(options):
    q, k, v = (randn(i, 1, h, 40, 130).half() for i, h in enumerate((3, 1, 1)))
    with tables.configured(lambda *_, **__: AHEAD):
        check_agrees(Call("attention", (q, k, v), options), "triton")


def test_a_users_allocator_stays():
    def mine(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        raise AssertionError("the user's allocator was asked")

    def set_and_launch() -> None:
        triton.set_allocator(mine)
        seen = []
        descriptors.launched(lambda: seen.extend(contextvars.copy_context().values()), described=True)
        assert descriptors._memory in seen
        assert mine not in seen
        assert mine in contextvars.copy_context().values()

    contextvars.copy_context().run(set_and_launch)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_infinite_values_are_weighed_as_the_reference_does(asynchronous):
    """The product that is begun before the first block reads none of its values: zero times infinity is no number."""
    q, k, v = (randn(i, 1, 1, 40, 8) for i in range(3))
    v[0, 0, 0, 0], v[0, 0, 20, 1] = torch.inf, -torch.inf
    out, _ = attention_forward(q, k, v, config=Config(32, 16, asynchronous=asynchronous))
    assert out[0, 0, :, 0].eq(torch.inf).all()
    assert out[0, 0, :, 1].eq(-torch.inf).all()
    assert out[0, 0, :, 2:].isfinite().all()


def test_the_lowest_finite_bias_hides_nothing_by_itself():
    """Such a score times log2(e) is beyond fp32; a row of nothing else has their mean."""
    q, k, v = (randn(i, 1, 1, 40, 8) for i in range(3))
    bias = torch.full((1, 1, 79), torch.finfo(torch.float32).min)
    out, lse = attention_forward(q, k, v, rel_bias=bias, config=AHEAD)
    assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-6)
    assert lse.eq(torch.finfo(torch.float32).min).all()

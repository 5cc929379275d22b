"""Triton kernels: which memory they write and read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import kernel_calls
import numpy as np
import pytest
import torch
from backends import TINY, blocks
from checks import gradients, outputs
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import CALLS
from strategies import Call, randn, step_calls
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
from flashgau.kernels import attention_kernels, common, gau_kernels, mixed_chunk_kernels
from flashgau.kernels import gated as gated_kernels
from flashgau.kernels import glu as glu_kernels

from flashgau import tables
from flashgau.contract import validate

pytestmark = kernel_calls.pytestmark


@contextmanager
def guarded_results() -> Iterator[list[Tensor]]:
    """Let every tensor that a launcher makes lie in NaN, between guards, and collect the guards."""
    guards: list[Tensor] = []
    make = Tensor.new_empty

    def guarded(x: Tensor, *shape: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count, dtype = math.prod(size), dtype or x.dtype
        if not dtype.is_floating_point:
            return make(x, size, dtype=dtype, **kwargs)
        room = make(x, count + 512, dtype=dtype, **kwargs).fill_(math.nan)
        room[:256], room[256 + count :] = 0.5, 0.5
        guards.extend((room[:256], room[256 + count :]))
        return room[256 : 256 + count].view(size)

    with mock.patch.object(Tensor, "new_empty", guarded):
        yield guards


@pytest.mark.parametrize("op", CALLS)
@given(st.data())
def test_everything_is_written_and_nothing_beside_it(op, data):
    call = data.draw(CALLS[op]("triton"))
    with tables.configured(fuse_glu_linear=True):
        plain = gradients(call, backend="triton")
        with guarded_results() as guards:
            guarded = gradients(call, backend="triton")
    assert guards
    assert all((g == 0.5).all() for g in guards)
    for a, b in zip([*plain[0], *plain[1]], [*guarded[0], *guarded[1]], strict=True):
        assert torch.equal(a, b)


@given(st.data())
def test_a_step_writes_all_of_its_state_and_nothing_beside_it(data):
    call = data.draw(step_calls("triton"))
    plain = outputs(call(backend="triton"))
    with guarded_results() as guards:
        guarded = outputs(call(backend="triton"))
    assert guards
    assert all((g == 0.5).all() for g in guards)
    assert all(torch.equal(a, b) for a, b in zip(plain, guarded, strict=True))


def test_offsets_past_two_to_the_31():
    """Rows of keys and values 2^27 elements apart; most of the memory between them is never touched."""
    n = 18
    far = torch.empty(n * 2**27, dtype=torch.float16).as_strided((1, 1, n, 8), (0, 0, 2**27, 1))
    q, near = randn(0, 1, 1, n, 8).half(), randn(1, 1, 1, n, 8).half()
    far.copy_(near)
    for causal in (True, False):
        a, b = (gradients(Call("attention", (q, x, x), {"causal": causal}), backend="triton") for x in (near, far))
        assert all(torch.equal(x, y) for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True))


def test_gated_offsets_past_two_to_the_31():
    """Rows 2^30 elements apart: a unit of the last ones, alone and behind a product."""
    far = torch.empty(5 * 2**30, dtype=torch.float16).as_strided((5, 24), (2**30, 1))
    near = randn(0, 5, 24).half()
    far.copy_(near)
    w = randn(1, 9, 24).half(), randn(2, 9, 24).half()
    for calls in (
        [Call("glu", (x,), {}) for x in (near, far)],
        [Call("glu", (near, x), {}) for x in (near, far)],
        [Call("glu_linear", (x, *w), {}) for x in (near, far)],
        [Call("glu_linear", (w[0], x, w[1][:5]), {}) for x in (near, far)],
        [Call("glu_linear", (x.T, w[0][:, :5], w[1][:, 5:10]), {}) for x in (near, far)],  # along the inner axis
    ):
        a, b = (gradients(call, backend="triton") for call in calls)
        assert all(torch.equal(x, y) for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True))


def test_wide_offsets_past_two_to_the_31():
    """Rows of the values, and of the gate, 2^28 elements apart; most of the memory between them is never touched."""
    n = 17
    far = torch.empty(n * 2**28, dtype=torch.float16).as_strided((1, n, 8), (0, 2**28, 1))
    q, near = randn(0, 1, n, 8).half(), randn(1, 1, n, 8).half()
    far.copy_(near)
    for width in (0, 512):
        with mock.patch("flashgau.kernels.gau._FUSED_WIDTH", width):
            a, b = (gradients(Call("gau_attention", (q, q, x, x), {}), backend="triton") for x in (near, far))
        assert all(torch.equal(x, y) for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_chunks_past_two_to_the_31(causal):
    """Tokens 2^28 elements apart; most of the memory between them is never touched."""
    n = 17
    far = torch.empty(n * 2**28, dtype=torch.float16).as_strided((1, n, 8), (0, 2**28, 1))
    heads, near = [randn(i, 1, n, 8).half() for i in range(4)], randn(4, 1, n, 8).half()
    far.copy_(near)
    options = {"chunk_size": 6, "causal": causal}
    a, b = (
        gradients(Call("mixed_chunk_attention", (*heads[:3], x, x, x), options), backend="triton") for x in (near, far)
    )
    assert all(torch.equal(x, y) for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True))


row_pointers, load_rows, store_rows = common.row_pointers, common.load_rows, common.store_rows
load_tile, store_tile, gated_bias_pointer = (
    gated_kernels.load_tile,
    gated_kernels.store_tile,
    gated_kernels.bias_pointer,
)
row_offsets, bias_pointers = attention_kernels.row_offsets, attention_kernels.bias_pointers
panel_pointers, load_lse, load_matrix = gau_kernels.panel_pointers, gau_kernels.load_lse, glu_kernels.load
state_pointers, panel_block = mixed_chunk_kernels.state_pointers, mixed_chunk_kernels.panel_block
open_rows, keep_token = mixed_chunk_kernels.open_rows, mixed_chunk_kernels.keep_token
Heads, Sequences, Matrix = common.Heads, common.Sequences, glu_kernels.Matrix
AttentionRule, GatedRule = attention_kernels.AttentionRule, gated_kernels.GatedRule


@triton.jit
def touch_kernel(x, row, head, many, big, WHAT: tl.constexpr, WIDE: tl.constexpr):
    """Touches the first element of x, then what a device function computes the place of."""
    tl.load(x)
    o = tl.arange(0, 16)
    there = o >= 0
    block = tl.zeros([16, 16], tl.float32)
    far = Heads(x, big, big + 2, big + 4, big + 6)
    p_far = row_pointers(far, row, head, o)
    if WHAT == "load_rows":
        load_rows(far, p_far, there, 16, 16, True)
    elif WHAT == "store_rows":
        store_rows(far, p_far, there, block, 16, 16)
    elif WHAT == "load_tile":
        load_tile(far, p_far, there, o, 16, 16)
    elif WHAT == "store_tile":
        store_tile(far, p_far, there, o, block, 16, 16)
    elif WHAT == "load_matrix":
        load_matrix(Matrix(x, big, big + 2), o, o, None)
    elif WHAT == "row_offsets":
        tl.load(x + row_offsets(Sequences(None, None, None, 1, big, big), row, head, 7, o, head, 11, row))
    elif WHAT == "bias_pointers":
        rule = AttentionRule(None, None, None, None, x, big, big + 2, 11, None, None, 0, 1.0)
        tl.load(bias_pointers(rule, row, o))
    elif WHAT == "bias_pointer":
        tl.load(gated_bias_pointer(GatedRule(None, None, 1.0, x, big, 11), row))
    elif WHAT == "load_lse":
        load_lse(x, row, big, o, there, "softmax")
    elif WHAT == "panel_pointers":
        tl.load(panel_pointers(x, many, 4096, o, 16))
    elif WHAT == "panel_block":
        tl.load(panel_block(x, many, o, o, 4096))
    elif WHAT == "state_pointers":
        tl.load(state_pointers(x, row, o, o, 16, WIDE))
    elif WHAT == "open_rows":
        open_rows(tl.load(x + 0 * o), x, many, 16, 0, o, 256, 16, 16)
    else:
        tl.static_assert(WHAT == "keep_token")
        keep_token(tl.load(x + 0 * o), x, many, 9, o, 256, 16)


@contextmanager
def touched() -> Iterator[list[Any]]:
    """Inside, an interpreted kernel's loads all read the first place it touched, its stores write nothing, and the list
    has how many bytes from there each access is meant to be."""
    from triton.runtime import interpreter

    builder, found = interpreter.InterpreterBuilder, []
    load = builder.create_masked_load

    def places(pointers: Any) -> Any:
        found.append(pointers.data.astype(np.int64))
        return interpreter.TensorHandle(np.full_like(pointers.data, found[0].flat[0]), pointers.dtype)

    with (
        mock.patch.object(builder, "create_masked_load", lambda self, p, *rest: load(self, places(p), *rest)),
        mock.patch.object(builder, "create_masked_store", lambda self, p, *rest: places(p) and None),
    ):
        yield found
    found[:] = [place - found[0] for place in found[1:]]


ROW, HEAD, MANY, BIG, WIDE = 3, 5, 2**28 + 1, 2**30, 2**28
ACROSS, DOWN = np.arange(16)[None, :], np.arange(16)[:, None]
FAR_ROWS = ROW * BIG + HEAD * (BIG + 2) + DOWN * (BIG + 4) + ACROSS * (BIG + 6)
OFFSETS = {
    **dict.fromkeys(("load_rows", "store_rows", "load_tile", "store_tile"), FAR_ROWS),
    "load_matrix": DOWN * BIG + ACROSS * (BIG + 2),
    "row_offsets": (ROW * 7 + HEAD) * BIG + 11 + ACROSS[0],
    "bias_pointers": ROW * BIG + ACROSS[0] * (BIG + 2) + 11,
    "bias_pointer": np.array(ROW * BIG + 11),
    "load_lse": ROW * BIG + ACROSS[0],
    "panel_pointers": (MANY * 16 + DOWN) * 4096 + ACROSS,
    "panel_block": (MANY * 4096 + DOWN) * 4096 + ACROSS,
    "state_pointers": ROW * 16 * WIDE + DOWN * WIDE + ACROSS,
    "open_rows": (MANY * 256 + DOWN) * 16 + ACROSS,
    "keep_token": (MANY * 256 + 9) * 16 + ACROSS[0],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads the interpreter's addresses")
@pytest.mark.parametrize("what", OFFSETS)
def test_every_place_is_computed_in_64_bits(what):
    """Numbers of rows, slots and states, and strides, whose products 32 bits do not hold: no memory is there."""
    with touched() as found:
        touch_kernel[(1,)](torch.zeros(1, dtype=torch.float16), ROW, HEAD, MANY, BIG, WHAT=what, WIDE=WIDE)
    place = found[1] if what in ("keep_token", "open_rows") else found[0]  # which are given a token that is read before
    assert np.array_equal(np.ravel(place), np.ravel(2 * OFFSETS[what]))


@given(st.data())
def test_axes_that_lie_behind_each_other_become_one(data):
    """Whatever the strides, the matrices hold the tensors' elements in one order, and dense tensors are not copied."""
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 5]), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    whole = torch.arange(math.prod(shape) * 2).view(*[shape[i] for i in order], 2)
    places = [order.index(i) for i in range(len(shape))]
    tensors = [torch.arange(math.prod(shape)).view(shape), *(whole[..., i].permute(places) for i in (0, 1))]
    matrices = glu_kernels.as_matrices(*tensors)
    for t, m in zip(tensors, matrices, strict=True):
        assert m.dim() == 2
        assert torch.equal(m.flatten(), t.flatten())
    dense = glu_kernels.as_matrices(tensors[0], tensors[0])
    assert all(m.data_ptr() == tensors[0].data_ptr() for m in dense)
    assert dense[0].shape[0] == 1  # all axes became one


def test_packed_halves_are_read_in_place():
    packed = randn(0, 2, 3, 14)
    for half, m in zip(packed.chunk(2, -1), glu_kernels.as_matrices(*packed.chunk(2, -1)), strict=True):
        assert m.data_ptr() == half.data_ptr()
        assert m.shape == (6, 7)


def test_offsets_that_nobody_looked_at_do_not_leave_the_tensors():
    """On a GPU they are not read: past the axis, negative or decreasing they give nonsense, but within the results."""
    ends = torch.tensor([-3, 50, 4, 2**31 - 1])
    wide, heads = [randn(i, 1, 18, 5) for i in range(6)], [randn(i, 1, 2, 18, 5) for i in range(3)]
    options = {"cu_seqlens": ends, "causal": True}
    with mock.patch.object(validate, "readable", return_value=False), blocks(TINY), guarded_results() as guards:
        gradients(Call("attention", tuple(heads), options), backend="triton")
        gradients(Call("gau_attention", tuple(wide[:4]), options), backend="triton")
        gradients(Call("mixed_chunk_attention", tuple(wide), {**options, "chunk_size": 6}), backend="triton")
    assert all((g == 0.5).all() for g in guards)

"""What holds for Triton kernels beyond what their operation promises: memory, configurations, compiling."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from backends import PANELS, TINY, backends_of, blocks
from checks import check_agrees, close_gradients, gradients, outputs
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Call,
    attention_calls,
    gau_calls,
    glu_calls,
    glu_linear_calls,
    mixed_chunk_calls,
    randn,
    step_calls,
)
from torch import Tensor

import flashgau
from flashgau import kernels

pytest.importorskip("triton")
import triton
import triton.language as tl
from flashgau.kernels import attention as attention_kernels
from flashgau.kernels import common
from flashgau.kernels import gated as gated_kernels
from flashgau.kernels import gau as gau_kernels
from flashgau.kernels import glu as glu_kernels
from flashgau.kernels import mixed_chunk as mixed_chunk_kernels
from flashgau.kernels import projection as projection_kernels
from flashgau.kernels.common import Config

from flashgau import tuning
from flashgau.eager import projection as eager_projection
from flashgau.ops import validate
from flashgau.tuning import ahead, search, shipped

CALLS = {
    "attention": attention_calls,
    "glu": glu_calls,
    "glu_linear": glu_linear_calls,
    "gau_attention": gau_calls,
    "mixed_chunk_attention": mixed_chunk_calls,
}
pytestmark = pytest.mark.skipif(
    any("triton" not in backends_of(op) for op in CALLS), reason="no GPU, and Triton was imported without interpreting"
)


# ---------------------------------------------------------------- memory


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
    with mock.patch.object(tuning, "fuses_glu_linear", return_value=True):
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
        with mock.patch.object(gau_kernels, "_FUSED_WIDTH", width):
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
join_token, keep_chunk = mixed_chunk_kernels.join_token, mixed_chunk_kernels.keep_chunk
Heads, Sequences, Matrix = common.Heads, common.Sequences, glu_kernels.Matrix
Rule, GatedRule = attention_kernels.Rule, gated_kernels.Rule


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
        rule = Rule(None, None, None, None, x, big, big + 2, 11, None, None, 0, 1.0)
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
    elif WHAT == "join_token":
        join_token(far, x, many, 16, o, o, 256, 16)
    else:
        tl.static_assert(WHAT == "keep_chunk")
        keep_chunk(x, block, many, False, o, o, 256, 16)


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
    "join_token": (MANY * 256 + DOWN) * 16 + ACROSS,
    "keep_chunk": (MANY * 256 + DOWN) * 16 + ACROSS,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads the interpreter's addresses")
@pytest.mark.parametrize("what", OFFSETS)
def test_every_place_is_computed_in_64_bits(what):
    """Numbers of rows, slots and states, and strides, whose products 32 bits do not hold: no memory is there."""
    with touched() as found:
        touch_kernel[(1,)](torch.zeros(1, dtype=torch.float16), ROW, HEAD, MANY, BIG, WHAT=what, WIDE=WIDE)
    assert np.array_equal(np.ravel(found[0]), np.ravel(2 * OFFSETS[what]))


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


# ---------------------------------------------------------------- which blocks


@triton.jit
def intervals_kernel(
    cases, found, WHOSE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """`keys_seen` or `rows_seeing` of many cases (first, last, m, n, left, right) at once."""
    o_case = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    n_cases = tl.num_programs(0) * COUNT
    first, last = tl.load(cases + o_case), tl.load(cases + n_cases + o_case)
    m, n = tl.load(cases + 2 * n_cases + o_case), tl.load(cases + 3 * n_cases + o_case)
    left = None
    right = None
    if LEFT:
        left = tl.load(cases + 4 * n_cases + o_case)
    if RIGHT:
        right = tl.load(cases + 5 * n_cases + o_case)
    visible = gated_kernels.Rule(left, right, 1.0, None, 0, 0)
    if WHOSE == "keys":
        a, b, c, d = common.keys_seen(visible, first, last, n, BLOCK)
    else:
        a, b, c, d = common.rows_seeing(visible, first, last, m, n, PER_TOKEN, BLOCK)
    tl.store(found + o_case, a + 0 * first)
    tl.store(found + n_cases + o_case, b + 0 * first)
    tl.store(found + 2 * n_cases + o_case, c + 0 * first)
    tl.store(found + 3 * n_cases + o_case, d + 0 * first)


@pytest.mark.parametrize("bounded", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(("whose", "per_token"), [("keys", 1), ("rows", 1), ("rows", 3)])
def test_blocks_are_skipped_masked_or_whole_as_the_window_says(whose, per_token, bounded):
    """Once, if some of the rows (keys) sees some of it, and without a mask if all of them see all of it.

    Windows from nothing to more than a block, fewer queries than keys and more, a last block that is not full.
    """
    block, own, generator = 16, 8, random.Random(7)
    cases = []
    for _ in range(4096):
        m, n = generator.choice([1, 2, generator.randint(1, 70)]), generator.randint(1, 97)
        total = m if whose == "keys" else n
        start = generator.randrange(0, total, own)
        first, last = start, min(start + own, total) - 1
        shift = n - m if whose == "keys" else 0
        cases.append((first + shift, last + shift, m, n, generator.randint(0, 20), generator.randint(0, 20)))
    table = torch.tensor(cases, dtype=torch.int32).T.contiguous()
    found = torch.empty(4, len(cases), dtype=torch.int32)
    intervals_kernel[(4,)](
        table, found, WHOSE=whose, LEFT=bounded[0], RIGHT=bounded[1], PER_TOKEN=per_token, BLOCK=block, COUNT=1024
    )
    for case, (a, b, c, d) in zip(cases, found.T.tolist(), strict=True):
        first, last, m, n, left, right = case
        left, right = (side if there else 200 for side, there in zip((left, right), bounded, strict=True))
        # Who sees what, from the first of them and from the last: an interval, whose ends grow.
        if whose == "keys":
            some = max(0, first - left), min(n, last + right + 1)
            every = max(0, last - left), min(n, first + right + 1)
        else:
            some = max(0, first - right - (n - m)), min(m, last + left - (n - m) + 1)
            every = max(0, last - right - (n - m)), min(m, first + left - (n - m) + 1)
        some, every = ([x * per_token for x in ends] for ends in (some, every))
        visited = [*range(some[0] // block * block, some[1], block)] if some[0] < some[1] else []
        whole = [x for x in visited if every[0] <= x and x + block <= every[1]]
        assert [*range(a, b, block), *range(b, c, block), *range(c, d, block)] == visited, (case, (a, b, c, d))
        assert [*range(b, c, block)] == whole, (case, (a, b, c, d))


def check_is_eagers(call: Call, sizes: dict[Any, Any]) -> None:
    """Results and gradients in the smallest blocks are those of eager."""
    with blocks({**TINY, **sizes}):
        found, expected = (gradients(call, backend=name) for name in ("triton", "eager"))
    for mine, theirs in zip(found, expected, strict=True):
        close_gradients([x for x in mine if x.is_floating_point()], [x for x in theirs if x.is_floating_point()])


@pytest.mark.parametrize("window", [(None, 0), (9, 3)], ids=str)
def test_borders_of_a_window_at_every_place_of_a_block(window):
    """Sequences of two queries, and as many keys as put the window's ends before and behind every key of a block."""
    counts = [*range(33, 49)]
    ends, ends_k = torch.arange(len(counts) + 1) * 2, torch.tensor([0, *counts]).cumsum(0)
    q = randn(0, 1, 2, 2 * len(counts), 4)
    k, v = (randn(i, 1, 1, int(ends_k[-1]), 4) for i in (1, 2))
    options = {"window": window, "cu_seqlens": ends, "cu_seqlens_k": ends_k, "return_lse": True}
    check_is_eagers(Call("attention", (q, k, v), options), {})


@pytest.mark.parametrize(
    ("m", "score", "normalizer", "sizes"),
    [(35, "relu2", "row", {}), (18, "softmax_plus", "keys", PANELS)],
    ids=["fused", "panels"],
)
def test_blocks_of_gated_attention_join(m, score, normalizer, sizes):
    operands = randn(0, 1, m, 5), randn(1, 1, 35, 5), randn(2, 1, 35, 18), randn(3, 1, m, 18)
    options = {"score": score, "normalizer": normalizer, "causal": True, "rel_bias": randn(4, 69) / 4}
    check_is_eagers(Call("gau_attention", operands, options), sizes)


@pytest.mark.parametrize(
    ("causal", "sizes"), [(True, {}), (True, PANELS), (False, PANELS)], ids=["causal", "causal, panels", "full, panels"]
)
def test_blocks_of_chunks_join(causal, sizes):
    """Chunks of two blocks, the last one open."""
    operands = [*(randn(i, 1, 42, 5) for i in range(4)), *(randn(i, 1, 42, 7) for i in (4, 5))]
    options = {"chunk_size": 19, "causal": causal, "return_state": causal, "rel_bias": randn(6, 37)}
    check_is_eagers(Call("mixed_chunk_attention", tuple(operands), options), sizes)


# ---------------------------------------------------------------- configurations


def blocks_of(op: str) -> list[Config]:
    """Every configuration of every table, without warps and stages, which change no result."""
    tables = [*map(tuning.shipped_table, tuning.ARCHITECTURES), *tuning.shipped_gpus()]
    found = {
        (c.block_m, c.block_n, c.block_k)
        for table in tables
        for key in table.entries
        if key.kernel.startswith(op) and (c := table.config(key))
    }
    return [Config(m, n, block_k=k) for m, n, k in sorted(found)]


def block_name(c: Config) -> str:
    return f"{c.block_m}x{c.block_n}x{c.block_k}"


@pytest.mark.parametrize("config", blocks_of("glu_linear"), ids=block_name)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_every_shipped_product_agrees(config, recompute):
    x, w, b = randn(0, 3, 47, 41), [randn(i, 137, 41) for i in (1, 2)], [randn(i, 137) for i in (3, 4)]
    small = tuning.lookup("interpreter", "glu_backward", 4, 0)

    def choose(kernel: str, *args: Any, **kwargs: Any) -> Config:
        return config if kernel.startswith("glu_linear") else small

    options = {"activation": "gelu", "up_activation": "silu", "recompute": recompute}
    with (
        mock.patch.object(tuning, "choose", choose),
        mock.patch.object(tuning, "fuses_glu_linear", return_value=True),
    ):
        check_agrees(Call("glu_linear", (x, *w, *b), options), "triton")


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("fused", [False, True], ids=["library", "fused"])
@given(st.data())
def test_products_of_either_maker_agree(fused, recompute, data):
    call = data.draw(glu_linear_calls("triton")).with_options(recompute=recompute)
    with mock.patch.object(tuning, "fuses_glu_linear", return_value=fused):
        check_agrees(call, "triton")


@pytest.mark.parametrize("config", blocks_of("glu_"), ids=block_name)
def test_every_shipped_elementwise_block_agrees(config):
    with mock.patch.object(tuning, "choose", return_value=config):
        for shape in ((3, 5, 7), (1, 4099), (4099, 3), (2, 2048)):
            check_agrees(Call("glu", (randn(0, *shape), randn(1, *shape)), {"activation": "gelu"}), "triton")
            check_agrees(Call("glu", (randn(2, *shape[:-1], 2 * shape[-1]),), {}), "triton")


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES[:-1])
@pytest.mark.parametrize("regime", ["fused", "panels"])
@pytest.mark.parametrize("head", [64, 128, 256])
def test_every_shipped_gated_attention_agrees(arch, regime, head):
    n = 150
    q, k, v, gate = randn(0, 1, n, 20), randn(1, 1, n, 20), randn(2, 1, n, 70), randn(3, 1, n, 70)

    def choose(kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False) -> Config:
        return tuning.lookup(arch, kernel, 2, head if width else 0, rows)

    fused_width = 512 if regime == "fused" else 0
    with mock.patch.object(tuning, "choose", choose), mock.patch.object(gau_kernels, "_FUSED_WIDTH", fused_width):
        options = {"causal": True, "rel_bias": randn(4, 2 * n - 1), "normalizer": "row"}
        check_agrees(Call("gau_attention", (q, k, v, gate), options), "triton")
        check_agrees(Call("gau_attention", (q[:, -1:], k, v, gate[:, -1:]), {"score": "softmax"}), "triton")


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head", [64, 128, 256])
def test_kernels_of_a_panel_share_its_blocks(arch, itemsize, head):
    for rows in (1, 100):
        product, weights = (tuning.lookup(arch, f"gau_{name}", itemsize, head, rows) for name in ("product", "weights"))
        assert (weights.block_m, weights.block_n) == (product.block_m, product.block_k)


@pytest.mark.parametrize("panel_bytes", [1, 4000, 2**25])
def test_the_size_of_a_panel_changes_rounding_only(panel_bytes):
    q, k, v, gate = (randn(i, 3, 70, 24) for i in range(4))
    options = {"rel_bias": randn(4, 3, 151), "lengths": torch.tensor([70, 3, 41]), "causal": True}
    with (
        mock.patch.object(gated_kernels, "_PANEL_BYTES", panel_bytes),
        mock.patch.object(gau_kernels, "_FUSED_WIDTH", 0),
    ):
        found = gradients(Call("gau_attention", (q, k, v, gate), options), backend="triton")
        with mock.patch.object(gated_kernels, "_PANEL_BYTES", 9000):
            other = gradients(Call("gau_attention", (q, k, v, gate), options), backend="triton")
    for a, b in zip([*found[0], *found[1]], [*other[0], *other[1]], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES[:-1])
@pytest.mark.parametrize("head", [256])
def test_every_shipped_mixed_chunk_agrees(arch, head):
    heads, (v, gate) = [randn(i, 1, 190, 20) for i in range(4)], [randn(i, 1, 190, 140) for i in (4, 5)]

    def choose(kernel: str, x: Tensor, width: int, **traits: Any) -> Config:
        return tuning.lookup(arch, kernel, 2, head if width else 0)

    options = {"causal": True, "chunk_size": 150, "rel_bias": randn(6, 299)}
    with mock.patch.object(tuning, "choose", choose):
        check_agrees(Call("mixed_chunk_attention", (*heads, v, gate), options), "triton")
        check_agrees(Call("mixed_chunk_attention", (*heads, v[..., :30]), {"chunk_size": 70}), "triton")
        token = Call("mixed_chunk_step", tuple(x[:, :1] for x in (*heads, v, gate)), {})
        _, state = flashgau.mixed_chunk_attention(*(x[:, :40] for x in (*heads, v)), causal=True, return_state=True)
        found, expected = (outputs(token(state=state, backend=name)) for name in ("triton", "reference"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_a_sequence_change_rounding_only(causal, packed):
    """However many programs share the chunks of a sequence, results, gradients and states are those of one."""
    operands = [randn(i, 1 if packed else 2, 42, 6) for i in range(6)]
    options: dict[str, Any] = {"chunk_size": 4, "causal": causal, "return_state": causal}
    options |= {"cu_seqlens": torch.tensor([0, 3, 3, 30, 42])} if packed else {"lengths": torch.tensor([42, 9])}
    results = []
    for count in (1, 2, 3, 100):
        with mock.patch.object(mixed_chunk_kernels, "processors", return_value=count):
            found = gradients(Call("mixed_chunk_attention", tuple(operands), options), backend="triton")
            results.append([*found[0], *found[1]])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@given(st.data())
def test_gated_projections_are_those_of_eager(interleaved, data):
    """Every pair of a rotation, of all channels or the first of them, angles of the row or shared by the batch."""
    b, n, s = (data.draw(st.sampled_from(sizes)) for sizes in ((1, 3), (0, 1, 7, 20), (2, 5, 16, 20)))
    count, pairs, wide = data.draw(st.integers(1, 4)), data.draw(st.integers(0, s // 2)), data.draw(st.integers(1, 40))
    x, weight, bias = randn(0, b, n, 6), randn(1, 2 * wide + s, 6), randn(2, 2 * wide + s)
    gamma, beta = randn(3, count, s), randn(4, count, s) if data.draw(st.booleans()) else None
    cos, sin = None, None
    if pairs:
        angles = randn(5, b if data.draw(st.booleans()) else 1, n, pairs)
        cos, sin = angles.cos(), angles.sin()
    douts = [randn(6 + i, b, n, w) for i, w in enumerate([wide, wide, *[s] * count])]
    douts[0] = douts[0].transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for module, choose in ((projection_kernels, {"choose": tuning.choose}), (eager_projection, {})):
        forward, backward = module.gated_projection_forward, module.gated_projection_backward
        options = {"interleaved": interleaved, **choose}
        found = forward(x, weight, bias, gamma, beta, cos, sin, save=True, **options)
        outs, saved = found[: 2 + count], found[2 + count :]
        grads = backward(*douts[:2], douts[2:], x, weight, gamma, cos, sin, saved, **options)
        results.append([*outs, *grads])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_projections_are_those_of_eager(rows):
    x, weight, bias, residual, dy = (
        randn(i, *s) for i, s in enumerate([(rows, 2, 6), (7, 6), (7,), *[(rows, 2, 7)] * 2])
    )
    results = []
    for module, choose in ((projection_kernels, {"choose": tuning.choose}), (eager_projection, {})):
        y = module.projection_forward(x, weight, bias, residual, **choose)
        results.append([y, *module.projection_backward(dy, x, weight, **choose)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_the_fused_product_is_chosen_where_it_can_win():
    def chosen(rows: int, k: int, dtype: torch.dtype) -> bool:
        x, w = (torch.empty(n, k, dtype=dtype, device="meta") for n in (rows, 64))
        return tuning.fuses_glu_linear(x, w)

    assert chosen(4096, 768, torch.bfloat16)
    assert not chosen(4096, 4096, torch.bfloat16)  # the vendor's product is too good
    assert not chosen(4096, 768, torch.float32)
    assert chosen(1, 4096, torch.float32)  # a decoded token
    assert not chosen(4096, 0, torch.float32)


@pytest.mark.parametrize("config", blocks_of("attention"), ids=block_name)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (40, 3), "softcap": 3.0}], ids=["causal", "window"])
def test_every_shipped_configuration_agrees(config, options):
    n = 150
    q, k, v = randn(0, 1, 3, n, 20), randn(1, 1, 1, n, 20), randn(2, 1, 1, n, 9)
    square = Config(config.block_n, config.block_n)

    def choose(kernel: str, *args: Any, **kwargs: Any) -> Config:
        return square if kernel == "attention_dbias" else config

    with mock.patch.object(tuning, "choose", choose):
        bias = randn(3, 3, 2 * n - 1) if config.block_m == config.block_n else None
        check_agrees(Call("attention", (q, k, v), {**options, "rel_bias": bias}), "triton")


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tables_are_complete(arch, width, itemsize):
    for name, entry in shipped.ENTRIES.items():
        has_heads = entry.widths != (0,)
        for options in (False, True) if has_heads else (False,):
            rows = 1 if "few" in name else None
            kernel = name.removesuffix("_few_rows")
            config = tuning.lookup(arch, kernel, itemsize, width if has_heads else 0, rows, options)
            sizes = config.block_m, config.block_n, config.block_k
            assert all(n & (n - 1) == 0 for n in sizes)
            own = [n for n, axis in zip(sizes, "mnk", strict=True) if axis in search.BLOCKS[kernel]]
            assert entry.matrix is None or min(own, default=16) >= 16
            if name == "attention_dbias":
                assert config.block_m == config.block_n


@pytest.mark.parametrize(
    ("shared", "major", "arch"),
    [
        (232_448, 9, "sm_90"),
        (232_448, 10, "sm_100"),
        (166_912, 8, "sm_80"),
        (101_376, 12, "sm_86"),
        (65_536, 7, "sm_75"),
    ],
)
def test_an_unknown_gpu_gets_what_fits_its_shared_memory(monkeypatch, shared, major, arch):
    properties = mock.Mock(shared_memory_per_block_optin=shared, major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert tuning.architecture(torch.device("cuda")) == arch


# ---------------------------------------------------------------- split keys


@given(st.data())
def test_parts_of_the_keys_merge_into_the_whole(data):
    """However many programs share the keys of a row, the result is that of one, to rounding."""
    call = data.draw(attention_calls("triton", dtype=torch.float32)).with_options(return_lse=True)
    results = []
    for processors in (1, 7, 400):
        with mock.patch.object(attention_kernels, "processors", lambda device, p=processors: p):
            results.append(outputs(call(backend="triton")))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(torch.isfinite(a), torch.isfinite(b))
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------- limits


def test_what_is_too_wide_goes_to_eager():
    assert kernels.SUPPORTED["attention"] == 256
    for width, reason in ((256, None), (257, "its kernels take widths of up to 256, not 257")):
        assert flashgau.ops.dispatch.explain("attention", "cpu", width=width)["triton"] == reason
    wide = randn(0, 1, 1, 3, 257)
    with pytest.raises(RuntimeError, match=r'attention: backend="triton" cannot run this call: .* up to 256, not 257'):
        flashgau.attention(wide, wide, wide, backend="triton")
    assert flashgau.ops.dispatch.default_backend("attention", "cuda", width=257) == "eager"
    assert flashgau.attention(wide, wide, wide).shape == wide.shape


def test_fp32_products_follow_pytorchs_switches():
    """The old switch, and the new one, after which the old one may not be read."""
    program = """
import torch
from flashgau.kernels.common import matmul_precision
assert matmul_precision(torch.float32) == matmul_precision(torch.bfloat16) == "ieee"
{}
assert matmul_precision(torch.float32) == "tf32"
assert matmul_precision(torch.bfloat16) == "ieee"
"""
    for switch in (
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ):
        compiled(program.format(switch))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's products")
def test_hidden_blocks_and_padding_do_no_products(monkeypatch):
    from triton.runtime import interpreter

    count = 0
    dot = interpreter.InterpreterBuilder.create_dot

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return dot(*args)

    def products(length: int, **options: Any) -> int:
        nonlocal count
        count, q = 0, randn(0, 1, 1, length, 16)
        gradients(Call("attention", (q, q, q), options), backend="triton")
        return count

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(attention_kernels, "processors", lambda device: 1)  # keys are not split
    alone = products(128)
    assert alone > 0
    assert products(512, lengths=torch.tensor([128])) == alone
    whole, causal, window = products(512), products(512, causal=True), products(512, window=(40, 0))
    assert causal < 0.65 * whole
    assert window < 0.3 * whole
    assert products(1024, window=(40, 0)) < 2.2 * window


@pytest.mark.parametrize("hidden", ["_patch_builtin", "_get_np_dtype", "is_builtin", None])
def test_interpreting_needs_none_of_the_names_that_make_it_faster(monkeypatch, hidden):
    """The tests' patch of Triton's interpreter leaves alone what a version calls otherwise."""
    from conftest import _patch_the_language_once

    calls = []
    plain = {"_patch_builtin": lambda *args: calls.append(args), "_get_np_dtype": lambda dtype: np.float32}
    module = SimpleNamespace(**{name: value for name, value in plain.items() if name != hidden})
    if hidden == "is_builtin":
        monkeypatch.delattr(tl.core, "is_builtin")
    _patch_the_language_once(module)
    assert hidden is None or not hasattr(module, hidden)
    replaced = {name for name, value in vars(module).items() if value is not plain[name]}
    assert replaced == {
        None: set(plain), "_patch_builtin": {"_get_np_dtype"}, "_get_np_dtype": {"_patch_builtin"},
        "is_builtin": {"_get_np_dtype"},
    }[hidden]  # fmt: skip
    if "_patch_builtin" in replaced:  # with a scope, or as Triton 3.5 without
        module._patch_builtin(SimpleNamespace(), "builder", "scope")
        module._patch_builtin(SimpleNamespace(), "builder")
        assert [args[1:] for args in calls] == [("builder", "scope"), ("builder",)]


# ---------------------------------------------------------------- compiled ahead of time


def compiled(code: str) -> str:
    """What a program prints that runs where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


PREPARE = """
import torch
from flashgau.kernels.attention import attention_backward, attention_forward
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

def call(b, hq, hk, m, n, d, window, backward=False, dtype=torch.bfloat16, **options):
    q = torch.empty(b, hq, m, d, dtype=dtype, device="meta")
    k = torch.empty(b, hk, n, d, dtype=dtype, device="meta")
    options |= {"scale": 0.1, "window": window, "choose": lambda *args, **traits: Config(16, 16, 4, 1)}
    out, lse = attention_forward(q, k, k, **options)
    if backward:
        attention_backward(out, lse, q, k, k, out, lse, **options)
"""


def test_lengths_windows_and_batches_cause_no_compilation():
    printed = compiled(
        PREPARE
        + """
with compiling_for("sm_80") as found:
    for b, n, left in [(1, 2048, 100), (3, 4096, 256), (7, 2051, 1), (1, 2049, 0), (2, 16384, 16)]:
        call(b, 8, 2, 1, n, 64, (left, 0))
        call(b, 8, 2, n, n, 64, (left, 0), backward=True)
from flashgau.kernels import attention
for name in ("forward_kernel", "merge_kernel", "dq_kernel", "dkv_kernel"):
    kernel = getattr(attention, name)
    print(name, sum(len(cache[0]) for cache in kernel.device_caches.values()))
"""
    )
    # The forward: few rows with split keys, many rows with and without. Lengths that 16 divides or not share a kernel.
    counts = dict(line.split() for line in printed.splitlines())
    assert int(counts["forward_kernel"]) <= 3
    assert counts["merge_kernel"] == counts["dq_kernel"] == counts["dkv_kernel"] == "1"


def test_chunks_lengths_and_batches_cause_no_compilation():
    printed = compiled(
        """
import torch
from flashgau.kernels import mixed_chunk
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

choose = lambda *args, **traits: Config(16, 16, 4, 1, 16)
options = {"chunk_size": 32, "score": "relu2", "causal": True, "quad_normalizer": 32.0, "lin_normalizer": None}
with compiling_for("sm_80"):
    for b, n in [(1, 2048), (3, 4096), (7, 2051), (1, 20), (2, 65536), (64, 128)]:
        heads = torch.empty(4, b, n, 16, dtype=torch.bfloat16, device="meta")
        v = torch.empty(b, n, 64, dtype=torch.bfloat16, device="meta")
        mixed_chunk.mixed_chunk_attention_forward(*heads, v, v, **options, choose=choose)
        mixed_chunk.mixed_chunk_attention_backward(v, None, *heads, v, v, v, **options, choose=choose)
for name in dir(mixed_chunk):
    caches = getattr(getattr(mixed_chunk, name), "device_caches", {})
    if caches:
        print(name, sum(len(cache[0]) for cache in caches.values()))
"""
    )
    # Sequences of one segment or of several, forward and backward in one kernel, strides that 16 divides or not.
    counts = {name: int(count) for name, count in (line.split() for line in printed.splitlines())}
    assert counts.keys() == {f"{name}_kernel" for name in ("states", "carry", "weights", "product", "linear",
                                                           "gradient", "heads")}  # fmt: skip
    assert all(count <= (4 if name in ("product_kernel", "linear_kernel") else 2) for name, count in counts.items()), (
        counts
    )


COUNT = """
for name in dir(module):
    caches = getattr(getattr(module, name), "device_caches", {})
    if caches:
        print(name, sum(len(cache[0]) for cache in caches.values()))
"""


def test_gated_attentions_lengths_and_batches_cause_no_compilation():
    printed = compiled(
        """
import torch
from flashgau.kernels import gau as module
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

choose = lambda *args, **traits: Config(16, 16, 4, 1, 16)
options = {"score": "relu2", "normalizer": "keys", "causal": True, "choose": choose}
with compiling_for("sm_80"):
    for b, n in [(1, 512), (3, 1024), (7, 515), (2, 100), (1, 2048)]:
        for e in (64, 528):
            q = torch.empty(b, n, 16, dtype=torch.bfloat16, device="meta")
            v = torch.empty(b, n, e, dtype=torch.bfloat16, device="meta")
            module.gau_attention_forward(q, q, v, v, save=True, **options)
            module.gau_attention_backward(v, q, q, v, v, v, **options)
"""
        + COUNT
    )
    counts = {name: int(count) for name, count in (line.split() for line in printed.splitlines())}
    # Two widths of values, which are compiled in; and panels whose width 16 divides, as it always does.
    assert {"weights_kernel", "product_kernel", "gradient_kernel", "columns_kernel", "dq_kernel"} <= counts.keys()
    assert counts["weights_kernel"] == 1
    assert all(count <= 4 for count in counts.values()), counts


def test_rows_of_gated_products_cause_no_compilation():
    printed = compiled(
        """
import torch
from flashgau.kernels import glu as module
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

choose = lambda *args, **traits: Config(16, 16, 4, 1, 16)
options = {"activation": "silu", "up_activation": "identity", "choose": choose}
with compiling_for("sm_80"):
    for rows in (512, 4096, 515, 100, 65536):
        x, w, d = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((rows, 32), (48, 32), (rows, 48)))
        module.glu_linear_forward(x, w, w, None, None, save=True, **options)
        module.glu_linear_backward(d, x, w, w, None, None, None, None, **options)
"""
        + COUNT
    )
    counts = {name: int(count) for name, count in (line.split() for line in printed.splitlines())}
    assert counts.keys() == {"linear_kernel", "linear_backward_kernel"}
    assert all(count <= 2 for count in counts.values()), counts  # rows that 16 divides, or not


def test_every_launch_says_that_multiply_adds_are_fused():
    """Whatever the default of Triton, which differs by version: here it is off."""
    printed = compiled(
        """
import os
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
from unittest import mock
import torch, triton
from flashgau.kernels import attention, gated, gau, glu, mixed_chunk, projection
from flashgau.tuning import compiler, lookup
from flashgau.tuning.ahead import target_of
from flashgau.tuning.shipped import ENTRIES, Operands

def choose(kernel, x, width, rows=None, options=False):
    return lookup("sm_80", kernel, x.element_size(), width, rows, options)

launched = {}

def launch(kernel, grid):
    said = launched.setdefault(kernel, set())
    return lambda *args, **keywords: said.add(keywords.get("enable_fp_fusion"))

with mock.patch.object(triton.JITFunction, "__getitem__", launch):
    for entry in ENTRIES.values():
        for kind in entry.kinds["bf16"]:
            entry.call(kind, entry.widths[-1], Operands(torch.bfloat16), choose)
    x, w, gamma = (torch.empty(*shape, device="meta") for shape in ((1, 8, 4), (40, 4), (2, 8)))
    options = {"interleaved": False, "save": False, "choose": choose}
    projection.gated_projection_forward(x, w, None, gamma, None, None, None, **options)
for module in (attention, gated, gau, glu, mixed_chunk, projection):
    for name, kernel in vars(module).items():
        if name.endswith("_kernel") and kernel.fn.__module__ == module.__name__:
            print(name, launched.get(kernel))

def compile(name, kernel):
    print(name, {kernel().metadata.enable_fp_fusion})

x = torch.empty(2, 64, device="meta")
for target in ("sm_80", "gfx942"):
    with compiler.instead_of_launching(target, target_of(target), compile):
        glu.glu_forward(x, x, activation="silu", up_activation="identity", choose=choose)
"""
    )
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert len(lines) >= 28
    assert all(said == "{True}" for _, said in lines), printed


def test_all_options_compile_together():
    compiled(
        PREPARE
        + """
for target in ("sm_80", "gfx942"):
    with compiling_for(target) as found:
        call(
            1, 6, 2, 100, 100, 40, (7, 3), backward=True, dtype=torch.float16, softcap=5.0,
            rel_bias=torch.empty(1, 6, 201, device="meta"), sinks=torch.empty(6, device="meta"),
            cu_seqlens=torch.empty(4, dtype=torch.int32, device="meta"),
            dropout_p=0.1, dropout_seed=torch.empty(1, dtype=torch.int64, device="meta"),
        )
        call(1, 1, 1, 1, 1, 1, (1, 1), backward=True, lengths=torch.empty(1, dtype=torch.int64, device="meta"))
    assert len(found) == 9, [c.kernel for c in found]
"""
    )


def test_a_target_that_is_none_is_refused():
    with pytest.raises(ValueError, match="compile: `target` is 'h100'; expected a name such as sm_80"):
        ahead.jobs(["sm_90", "h100"])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_kernel_compiles_for_every_target(target):
    """One of each: `flashgau compile` does all of them."""
    work = [
        ahead.Job(target, "attention_forward", "bf16", 128, "causal"),
        ahead.Job(target, "glu_linear", "bf16", 0, "inference"),
        ahead.Job(target, "glu_backward", "bf16", 0, "swiglu separate"),
    ]
    for row in ahead.compile_all(work, processes=1):
        assert row.ok, row.reason
        assert row.tensor_core == (row.kernel != "glu_backward_kernel")
        assert row.registers > 0
        assert row.spills == 0


def needs(**changes: Any) -> ahead.Compiled:
    return ahead.Compiled(**{"kernel": "k", "target": "sm_80", "registers": 9, "spills": 0, "shared_bytes": 0,
                             "matrix": frozenset({"HMMA"}), "vectors": True, **changes})  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"spills": 3}, "3 spill instructions"),
        ({"shared_bytes": 166_913}, "166913 bytes of shared memory, the device has 166912"),
        ({"matrix": frozenset()}, "no matrix instruction HMMA"),
        ({"vectors": False}, "no loads or stores of 16 bytes"),
    ],
)
def test_what_makes_a_row_bad(changes, problem):
    assert needs(**changes).problem("HMMA", vectors=True) == problem


def test_the_interpreter_is_refused_what_it_computes_wrongly():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and Triton compiles")
    q = randn(0, 1, 1, 3, 4).bfloat16()
    with pytest.raises(RuntimeError, match="interpreter"):
        flashgau.attention(q, q, q, backend="triton")

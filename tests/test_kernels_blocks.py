"""Triton kernels: which blocks they take, and that the parts join."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import kernel_calls
import pytest
import torch
from backends import PANELS, TINY, blocks
from checks import close_gradients, gradients, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Call, attention_calls, randn

pytest.importorskip("triton")
import triton
import triton.language as tl
from flashgau.kernels import attention as attention_launchers
from flashgau.kernels import common
from flashgau.kernels import gated as gated_kernels

from flashgau import tables
from flashgau.tables.config import Config

pytestmark = kernel_calls.pytestmark


@triton.jit
def intervals_kernel(
    cases, found, WHOSE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
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
    visible = gated_kernels.GatedRule(left, right, 1.0, None, 0, 0)
    if WHOSE == "keys":
        a, b, c, d = common.keys_seen(visible, first, last, n, BLOCK)
    else:
        a, b, c, d = common.rows_seeing(visible, first, last, m, n, BLOCK)
    tl.store(found + o_case, a + 0 * first)
    tl.store(found + n_cases + o_case, b + 0 * first)
    tl.store(found + 2 * n_cases + o_case, c + 0 * first)
    tl.store(found + 3 * n_cases + o_case, d + 0 * first)


@pytest.mark.parametrize("bounded", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("whose", ["keys", "rows"])
def test_blocks_are_skipped_masked_or_whole_as_the_window_says(whose, bounded):
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
    intervals_kernel[(4,)](table, found, WHOSE=whose, LEFT=bounded[0], RIGHT=bounded[1], BLOCK=block, COUNT=1024)
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


@given(st.data())
def test_parts_of_the_keys_merge_into_the_whole(data):
    """However many programs share the keys of a row, the result is that of one, to rounding."""
    call = data.draw(attention_calls("triton", dtype=torch.float32)).with_options(return_lse=True)
    results = []
    for processors in (1, 7, 400):
        with mock.patch.object(attention_launchers, "processors", lambda device, p=processors: p):
            results.append(outputs(call(backend="triton")))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(torch.isfinite(a), torch.isfinite(b))
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def smallest(*args: Any, **traits: Any) -> Config:
    return Config(16, 16)


@settings(max_examples=5)
@given(st.data())
def test_parts_merge_however_many_are_read_at_once(data):
    call = data.draw(attention_calls("triton", dtype=torch.float32)).with_options(return_lse=True)
    results = []
    with mock.patch.object(attention_launchers, "processors", return_value=400):
        for merged in (8192, 64):
            with mock.patch.object(attention_launchers, "_MERGED", merged), blocks({(tables, "choose"): smallest}):
                results += [outputs(call(backend="triton")) for _ in range(2)]
    for a, again, b, _ in zip(*results, strict=True):
        assert torch.equal(a, again)
        assert torch.equal(torch.isfinite(a), torch.isfinite(b))
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@given(programs=st.integers(0, 2000), processors=st.integers(1, 200), n_blocks=st.integers(0, 3000))
def test_keys_are_split_where_that_saves_time(programs, processors, n_blocks):
    """Waves of parts, each as long as its blocks, of which it has two, and one more that a part is charged."""
    waves = lambda parts: -(-programs * parts // processors)
    time = lambda parts: waves(parts) * (-(-n_blocks // parts) + (parts > 1))
    parts = common.parts_of(programs, processors, n_blocks)
    if programs * n_blocks >= 0.85 * processors * time(1):  # the processors are busy, or there is nothing to do
        assert parts is None
        return
    allowed = range(1, max(1, min(n_blocks // 2, 8 * processors // programs)) + 1)
    best = min(map(time, allowed))
    assert parts is None or 2 <= parts in allowed
    assert time(parts or 1) <= 1.05 * best
    assert all(time(fewer) > 1.05 * best for fewer in range(1, parts or 1))


@given(programs=st.integers(1, 132))
def test_no_number_of_programs_leaves_a_device_half_idle(programs):
    """Of long rows of keys: also 67 to 112 programs, which are more than half as many as there are processors."""
    n_blocks = 4096
    parts = common.parts_of(programs, 132, n_blocks) or 1
    used = programs * n_blocks / (132 * -(-programs * parts // 132) * -(-n_blocks // parts))
    assert used >= 0.85


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's products")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_hidden_blocks_and_padding_do_no_products(monkeypatch, asynchronous):
    """But one of zeros in each block of padded rows, where the products of neighbouring blocks are begun together."""
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
        with tables.configured(lambda *_, **__: Config(64, 32, asynchronous=asynchronous)):
            gradients(Call("attention", (q, q, q), options), backend="triton")
        return count

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    monkeypatch.setattr(attention_launchers, "processors", lambda device: 1)  # keys are not split
    alone = products(128)
    assert alone > 0
    assert products(512, lengths=torch.tensor([128])) == alone + (512 - 128) // 64 * asynchronous
    whole, causal, window = products(512), products(512, causal=True), products(512, window=(40, 0))
    assert causal < 0.65 * whole
    assert window < 0.3 * whole
    assert products(1024, window=(40, 0)) < 2.2 * window

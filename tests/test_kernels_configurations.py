"""Triton kernels: every launch configuration gives the same, to rounding."""

from __future__ import annotations

from typing import Any
from unittest import mock

import kernel_calls
import pytest
import torch
from checks import check_agrees, gradients, outputs
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, glu_linear_calls, randn
from torch import Tensor

import flashgau

pytest.importorskip("triton")
from flashgau.kernels import gated as gated_kernels
from flashgau.kernels import gau as gau_kernels
from flashgau.kernels import mixed_chunk as mixed_chunk_launchers
from flashgau.kernels import projection as projection_kernels
from flashgau.kernels.common import chosen_by

from flashgau import tables
from flashgau.eager import projection as eager_projection
from flashgau.options import Angles, ProjectionWeights
from flashgau.tables.config import Config
from flashgau.tuning import searching, shipped

pytestmark = kernel_calls.pytestmark


def blocks_of(op: str) -> list[Config]:
    """Every configuration of every table, without warps and stages, which change no result."""
    sources = [*map(tables.shipped_table, tables.ARCHITECTURES), *tables.shipped_gpus()]
    found = {
        (c.block_m, c.block_n, c.block_k)
        for table in sources
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
    small = tables.lookup("interpreter", "glu_backward", 4, 0)

    def choose(kernel: str, *args: Any, **kwargs: Any) -> Config:
        return config if kernel.startswith("glu_linear") else small

    options = {"activation": "gelu", "up_activation": "silu", "recompute": recompute}
    with tables.configured(choose, fuse_glu_linear=True):
        check_agrees(Call("glu_linear", (x, *w, *b), options), "triton")


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("fused", [False, True], ids=["library", "fused"])
@given(st.data())
def test_products_of_either_maker_agree(fused, recompute, data):
    call = data.draw(glu_linear_calls("triton")).with_options(recompute=recompute)
    with tables.configured(fuse_glu_linear=fused):
        check_agrees(call, "triton")


@pytest.mark.parametrize("k", [24, 5, 1])
def test_weights_of_a_product_lie_anywhere(k):
    """Each in strides of its own, an odd number of elements apart, or one before the other in one tensor."""
    x, (w_gate, w_up) = randn(0, 19, k), (randn(i, 37, k) for i in (1, 2))
    shifted = torch.empty(w_up.numel() + 1)[1:].view(w_up.shape).copy_(w_up)
    turned = w_up.mT.contiguous().mT
    behind, ahead = torch.cat([w_up, w_gate]).split(37)
    with tables.configured(chosen_by(Config(32, 16, block_k=16)), fuse_glu_linear=True):
        expected = flashgau.glu_linear(x, w_gate, w_up, backend="triton")
        for gate, up in ((w_gate, shifted), (w_gate, turned), (ahead, behind)):
            assert torch.equal(flashgau.glu_linear(x, gate, up, backend="triton"), expected)
            check_agrees(Call("glu_linear", (x, gate, up), {"recompute": True}), "triton")


@pytest.mark.parametrize("config", blocks_of("glu_"), ids=block_name)
def test_every_shipped_elementwise_block_agrees(config):
    with tables.configured(chosen_by(config)):
        for shape in ((3, 5, 7), (1, 4099), (4099, 3), (2, 2048)):
            check_agrees(Call("glu", (randn(0, *shape), randn(1, *shape)), {"activation": "gelu"}), "triton")
            check_agrees(Call("glu", (randn(2, *shape[:-1], 2 * shape[-1]),), {}), "triton")


@pytest.mark.parametrize("arch", tables.ARCHITECTURES[:-1])
@pytest.mark.parametrize("regime", ["fused", "panels"])
@pytest.mark.parametrize("head", [64, 128, 256])
def test_every_shipped_gated_attention_agrees(arch, regime, head):
    n = 150
    q, k, v, gate = randn(0, 1, n, 20), randn(1, 1, n, 20), randn(2, 1, n, 70), randn(3, 1, n, 70)

    def choose(kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False) -> Config:
        return tables.lookup(arch, kernel, 2, head if width else 0, rows)

    fused_width = 512 if regime == "fused" else 0
    with tables.configured(choose), mock.patch.object(gau_kernels, "_FUSED_WIDTH", fused_width):
        options = {"causal": True, "rel_bias": randn(4, 2 * n - 1), "normalizer": "row"}
        check_agrees(Call("gau_attention", (q, k, v, gate), options), "triton")
        check_agrees(Call("gau_attention", (q[:, -1:], k, v, gate[:, -1:]), {"score": "softmax"}), "triton")


@pytest.mark.parametrize("arch", tables.ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head", [64, 128, 256])
def test_kernels_of_a_panel_share_its_blocks(arch, itemsize, head):
    for rows in (1, 100):
        product, weights = (tables.lookup(arch, f"gau_{name}", itemsize, head, rows) for name in ("product", "weights"))
        assert weights.block_m == product.block_m
        assert weights.block_n % product.block_k == 0


@pytest.mark.parametrize("panel_bytes", [1, 4000, 2**25])
def test_the_size_of_a_panel_changes_rounding_only(panel_bytes):
    q, k, v, gate = (randn(i, 3, 70, 24) for i in range(4))
    options = {"rel_bias": randn(4, 3, 151), "lengths": torch.tensor([70, 3, 41]), "causal": True}
    with (
        mock.patch.object(gated_kernels, "_PANEL_BYTES", panel_bytes),
        mock.patch.object(gated_kernels, "_MOST_BYTES", 1),
        mock.patch.object(gau_kernels, "_FUSED_WIDTH", 0),
    ):
        found = gradients(Call("gau_attention", (q, k, v, gate), options), backend="triton")
        with mock.patch.object(gated_kernels, "_PANEL_BYTES", 9000):
            other = gradients(Call("gau_attention", (q, k, v, gate), options), backend="triton")
    for a, b in zip([*found[0], *found[1]], [*other[0], *other[1]], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@given(blocks=st.integers(1, 2000), programs=st.integers(1, 300), processors=st.integers(1, 200))
def test_panels_occupy_the_device(blocks, programs, processors):
    """A launch has a program for each processor at least, if there are as many, and about two at most."""
    with (
        mock.patch.object(gated_kernels, "processors", return_value=processors),
        mock.patch.object(gated_kernels, "_PANEL_BYTES", 1),
    ):
        room, step = gated_kernels.room_for_panel(torch.empty(0), 3, blocks, programs)
        assert room.numel() == 3 * step
        assert step == blocks or step * programs >= processors
        assert step == 1 or step * programs <= 2 * processors
        with mock.patch.object(gated_kernels, "_MOST_BYTES", 12):
            assert gated_kernels.room_for_panel(torch.empty(0), 3, blocks, programs)[1] == 1


@pytest.mark.parametrize(("score", "causal"), [("relu2", True), ("softmax", False), ("softmax_plus", True)])
@pytest.mark.parametrize("m", [3, 40])
def test_split_keys_of_few_gated_queries_change_rounding_only(score, causal, m):
    q, k, v, gate = (randn(i, 2, size, 24) for i, size in enumerate((m, 90, 90, m)))
    options = {"score": score, "causal": causal, "rel_bias": randn(4, 2, 199) / 4, "lengths": torch.tensor([90, 37])}
    call, results = Call("gau_attention", (q, k, v, gate), options), []
    for processors in (1, 400):
        with (
            tables.configured(chosen_by(Config(16, 16, block_k=16))),
            mock.patch.object(gau_kernels, "processors", return_value=processors),
            mock.patch.object(gau_kernels, "_PART", 1),
        ):
            check_agrees(call, "triton")
            results.append(call(backend="triton"))
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)
    assert not torch.equal(*results)  # they were split


@pytest.mark.parametrize("arch", tables.ARCHITECTURES[:-1])
@pytest.mark.parametrize("head", [256])
def test_every_shipped_mixed_chunk_agrees(arch, head):
    heads, (v, gate) = [randn(i, 1, 190, 20) for i in range(4)], [randn(i, 1, 190, 140) for i in (4, 5)]

    def choose(kernel: str, x: Tensor, width: int, **traits: Any) -> Config:
        return tables.lookup(arch, kernel, 2, head if width else 0)

    options = {"causal": True, "chunk_size": 150, "rel_bias": randn(6, 299)}
    with tables.configured(choose):
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
        with mock.patch.object(mixed_chunk_launchers, "processors", return_value=count):
            found = gradients(Call("mixed_chunk_attention", tuple(operands), options), backend="triton")
            results.append([*found[0], *found[1]])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_programs_share_the_rows_of_few_large_chunks(causal):
    operands = [randn(i, 1, 90, 6) for i in range(6)]
    call = Call("mixed_chunk_attention", tuple(operands), {"chunk_size": 70, "causal": causal, "return_state": causal})
    results = []
    for count in (1, 2, 100):
        with mock.patch.object(mixed_chunk_launchers, "processors", return_value=count):
            found = gradients(call, backend="triton")
            results.append([*found[0], *found[1]])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_states_are_kept_or_summed_again(causal):
    heads, v = [randn(i, 2, 23, 4) for i in range(4)], randn(4, 2, 23, 6)
    options: dict[str, Any] = {"chunk_size": 5, "causal": causal}
    forward, backward = (getattr(mixed_chunk_launchers, f"mixed_chunk_attention_{x}") for x in ("forward", "backward"))
    *_, kept = forward(heads, v, save=True, **options)
    assert kept.shape == (10 if causal else 2, 4, 6)
    found = [backward(v, None, heads, v, None, chunk_states=x, **options) for x in (kept, None)]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))
    wide = [randn(i, 2, 23, 8) for i in range(4)]
    assert (forward(wide, v, save=True, **options)[3] is None) == causal  # they would be larger than the values


@pytest.mark.parametrize("raw_gate", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@given(st.data())
def test_gated_projections_are_those_of_eager(interleaved, raw_gate, data):
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
    for module in (projection_kernels, eager_projection):
        forward, backward = module.gated_projection_forward, module.gated_projection_backward
        weights, rotary = ProjectionWeights(weight, bias, gamma, beta, raw_gate), Angles(cos, sin, interleaved)
        found = forward(x, weights, rotary, save=True)
        outs, saved = found[: 2 + count], found[2 + count :]
        grads = backward(*douts[:2], douts[2:], x, weights, saved, rotary)
        results.append([*outs, *grads])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-5)
    before = torch.nn.functional.linear(x, weight[:wide], bias[:wide])
    expected = before if raw_gate else torch.nn.functional.silu(before)
    torch.testing.assert_close(results[0][0], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_projections_are_those_of_eager(rows):
    x, weight, bias, residual, dy = (
        randn(i, *s) for i, s in enumerate([(rows, 2, 6), (7, 6), (7,), *[(rows, 2, 7)] * 2])
    )
    results = []
    for module in (projection_kernels, eager_projection):
        y = module.projection_forward(x, weight, bias, residual)
        results.append([y, *module.projection_backward(dy, x, weight, bias)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", blocks_of("attention"), ids=block_name)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (40, 3), "softcap": 3.0}], ids=["causal", "window"])
def test_every_shipped_configuration_agrees(config, options):
    n = 150
    q, k, v = randn(0, 1, 3, n, 20), randn(1, 1, 1, n, 20), randn(2, 1, 1, n, 9)
    square = Config(config.block_n, config.block_n)

    def choose(kernel: str, *args: Any, **kwargs: Any) -> Config:
        return square if kernel == "attention_dbias" else config

    with tables.configured(choose):
        bias = randn(3, 3, 2 * n - 1) if config.block_m == config.block_n else None
        check_agrees(Call("attention", (q, k, v), {**options, "rel_bias": bias}), "triton")


@pytest.mark.parametrize("arch", tables.ARCHITECTURES)
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tables_are_complete(arch, width, itemsize):
    for name, entry in shipped.ENTRIES.items():
        has_heads = entry.widths != (0,)
        for options in (False, True) if has_heads else (False,):
            rows = 1 if "few" in name else None
            kernel = name.removesuffix("_few_rows")
            config = tables.lookup(arch, kernel, itemsize, width if has_heads else 0, rows, options)
            sizes = config.block_m, config.block_n, config.block_k
            assert all(n & (n - 1) == 0 for n in sizes)
            own = [n for n, axis in zip(sizes, "mnk", strict=True) if axis in searching.BLOCKS[kernel]]
            assert entry.matrix is None or min(own, default=16) >= 16
            if name in ("attention_dbias", "second_dbias"):
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
    assert tables.architecture(torch.device("cuda")) == arch

"""Who makes the products of a gated linear unit: the model of both forms, and the rule that follows from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashgau import tables
from flashgau.sass.model import MACHINES
from flashgau.tables import products
from flashgau.tables.config import Config

ARCHITECTURES = [arch for arch in products.GPUS if arch != "interpreter"]
sizes = st.integers(1, 40_000)


def tile_of(arch: str) -> Config:
    return tables.lookup(arch, "glu_linear", 2, 0)


def wins(arch: str, m: int, k: int, n: int, activations: tuple[str, str] = ("silu", "identity")) -> bool:
    gpu = products.GPUS[arch]
    return products.fused(gpu, tile_of(arch), m, k, n, activations) <= products.library(gpu, m, k, n)


def chosen(m: int, k: int, n: int = 4096, dtype: torch.dtype = torch.bfloat16, **activations: tuple[str, str]) -> bool:
    x, w = (torch.empty(rows, k, dtype=dtype, device="meta") for rows in (m, n))
    return tables.fuses_glu_linear(x, w, **activations)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_model_of_products_is_of_the_machines_of_the_model_of_loops(arch):
    gpu, machine = products.GPUS[arch], MACHINES[arch]
    assert (gpu.processors, gpu.hertz, gpu.macs) == (machine.sms, machine.ghz * 1e9, machine.macs)
    assert gpu.issue == 4 / machine.fp32


def test_what_is_counted_by_hand():
    """Five tiles of 32 x 16 of both sides on four processors are two waves; a step along K waits for the cache."""
    gpu = products.Gpu(4, 1e9, macs=4096, memory=1e15, cache=2.0, issue=4.0)
    step = (32 + 2 * 16) * 2 / 2.0
    unit = 32 * 16 * (products.WRITING + products.ACTIVATIONS["gelu"]) / 128
    seconds = products.LAUNCH + 2 * (products.START + 100 * step + unit) * 1e-9
    assert products.fused(gpu, Config(32, 16), 150, 100, 16, ("gelu", "identity")) == pytest.approx(seconds)
    slow = gpu._replace(memory=1e9)
    moved = (150 * 100 + 2 * 16 * 100 + 150 * 16) * 2 / 0.9e9
    assert products.fused(slow, Config(32, 16), 150, 100, 16, ("gelu", "identity")) == pytest.approx(
        products.LAUNCH + moved
    )
    peak = 2 * 4 * 4096 * 1e9
    assert products.library(gpu, 150, 100, 16) == pytest.approx(
        3 * products.LAUNCH + 4 * 150 * 100 * 16 / (0.8 * peak) + 3 * 150 * 16 * 2 / 0.9e15
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@given(size=st.tuples(sizes, st.integers(0, 9000), sizes), more=st.tuples(*[st.integers(0, 9000)] * 3), data=st.data())
def test_neither_form_takes_less_time_for_more(arch, size, more, data):
    """Along each axis. (Who wins may change twice along K: of few rows the kernel waits for its start, then memory.)"""
    activations = data.draw(st.tuples(*[st.sampled_from(list(products.ACTIVATIONS))] * 2))
    gpu, larger = products.GPUS[arch], tuple(a + b for a, b in zip(size, more, strict=True))
    assert products.fused(gpu, tile_of(arch), *size, activations) <= products.fused(
        gpu, tile_of(arch), *larger, activations
    )
    assert products.library(gpu, *size) <= products.library(gpu, *larger)


@given(m=sizes, n=sizes, k=st.integers(0, 9000), pair=st.tuples(*[st.sampled_from(list(products.ACTIVATIONS))] * 2))
def test_what_is_chosen_is_what_the_model_finds_faster(m, n, k, pair):
    assert chosen(m, k, n, activations=pair) == (m <= tables.FEW_ROWS or wins("sm_90", m, k, n, pair))


@given(m=sizes, n=sizes, k=st.integers(0, 9000), activation=st.sampled_from(list(products.ACTIVATIONS)))
def test_a_unit_of_fewer_instructions_is_fused_where_a_longer_one_is(m, n, k, activation):
    if wins("sm_90", m, k, n, (activation, "gelu")):
        assert wins("sm_90", m, k, n, (activation, "identity"))


def test_few_rows_are_fused_whatever_else():
    for dtype in (torch.float32, torch.bfloat16):
        for k in (0, 1, 4096):
            assert chosen(1, k, dtype=dtype)
            assert chosen(tables.FEW_ROWS, k, dtype=dtype)
    assert not chosen(4096, 512, dtype=torch.float32)  # arithmetic is all the time
    assert not chosen(4096, 0, dtype=torch.float32)


def test_wide_layers_are_the_librarys():
    assert chosen(16384, 512)
    assert not chosen(16384, 4096)
    assert not chosen(128, 1024)  # 32 tiles do not occupy 132 processors


def test_a_gpu_that_the_model_does_not_know_has_the_library_make_its_products(monkeypatch):
    assert products.GPUS.keys().isdisjoint({"sm_75", "gfx942"})
    monkeypatch.setattr(tables, "architecture", lambda device: "gfx942")
    monkeypatch.setattr(tables, "gpu_name", lambda device: "AMD Instinct MI300X")
    tables._modelled.cache_clear()
    assert not chosen(16384, 64)
    assert chosen(1, 64)
    tables._modelled.cache_clear()


def test_a_gpu_counts_its_own_processors_and_memory(monkeypatch):
    properties = type("Properties", (), {"multi_processor_count": 114})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tables, "gpu_name", lambda device: "NVIDIA H200")
    tables._modelled.cache_clear()
    found = tables._modelled(torch.device("cuda:0"))
    assert found == products.GPUS["sm_90"]._replace(processors=114, memory=4.8e12)
    tables._modelled.cache_clear()

"""Tables of launch configurations: their format, who decides, and that `check` covers them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import tuning_tables
from tuning_tables import CPU, KEY, OTHER, chosen, user_table

pytest.importorskip("triton")
from flashgau.kernels.common import chosen_by

from flashgau import tables, tuning
from flashgau.tables import table
from flashgau.tables.config import Config
from flashgau.tables.table import FUSED, Key, TableEntry
from flashgau.tuning import ahead, shipped
from flashgau.verification import checking as check
from flashgau.verification import configurations

folder = tuning_tables.folder
interpreted = tuning_tables.interpreted


# ---- the format


EXAMPLES = [
    {KEY: TableEntry(Config(64, 32, 8, 3))},
    {KEY: TableEntry(Config(64, 32, 8, 3, maxnreg=128))},
    {KEY: TableEntry(Config(64, 32, 8, 3, 16), 1.5, 2.25), Key("glu_linear", 2, 0, True): TableEntry(Config(16, 32))},
    {Key(FUSED, 2, 1024): TableEntry(True, 1.0, 1.2), KEY._replace(options=True): TableEntry(Config(16, 16))},
    {},
]


@pytest.mark.parametrize("entries", EXAMPLES)
def test_a_table_is_read_as_it_was_written(entries, tmp_path):
    written = user_table(entries=entries)
    table.write(tmp_path / "deep" / "t.json", written)
    assert table.read(tmp_path / "deep" / "t.json") == written
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["t.json"]


ROW = {"kernel": "attention_dq", "itemsize": 2, "width": 64, "few_rows": False,
       "config": {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}}  # fmt: skip
HEADER = {"format": 1, "gpu": None, "architecture": "sm_90", "measured": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "t.json: `format` is 2; expected 1, which this version reads"),
        ({"measured": "no"}, 't.json: `measured` is "no"; expected true or false'),
        ({"gpu": 3}, "t.json: `gpu` is 3; expected a name or null"),
        ({"versions": {"torch": 2}}, "expected an object of strings"),
        ({"speed": 1}, "t.json: `speed` is no field; expected architecture, date"),
        ({"entries": {}}, "t.json: `entries` is {}; expected a list"),
        ({"entries": [ROW, 7]}, "t.json: entry 1: 7; expected an object"),
        ({"entries": [ROW, ROW]}, r"t.json: entry 1: attention_dq \(16 bit, width 64\) is there twice"),
        ({"entries": [{**ROW, "itemsize": 3}]}, "t.json: entry 0: `itemsize` is 3; expected 1, 2, 4 or 8 bytes"),
        ({"entries": [{**ROW, "itemsize": True}]}, "`itemsize` is true"),
        ({"entries": [{**ROW, "width": 100}]}, "`width` is 100; expected a power of two, or 0"),
        ({"entries": [{**ROW, "few_rows": 0}]}, "`few_rows` is 0; expected true or false"),
        ({"entries": [{**ROW, "ms": -1}]}, "`ms` is -1; expected milliseconds above 0"),
        ({"entries": [{**ROW, "batch": 8}]}, "t.json: entry 0: `batch` is no field"),
        ({"entries": [{**ROW, "kernel": FUSED}]}, "`fused` is missing; expected true or false"),
        (
            {"entries": [{**ROW, "config": {}}]},
            "t.json: entry 0: config: `block_m` is missing; expected a power of two",
        ),
        (
            {"entries": [{**ROW, "config": {**ROW["config"], "block_m": 48}}]},
            "config: `block_m` is 48; expected a power",
        ),
        ({"entries": [{**ROW, "config": {**ROW["config"], "num_warps": 3}}]}, "`num_warps` is 3; expected 1, 2, 4"),
        ({"entries": [{**ROW, "config": {**ROW["config"], "num_stages": 0}}]}, "`num_stages` is 0; expected 1 to 8"),
        (
            {"entries": [{**ROW, "config": {**ROW["config"], "maxnreg": 100}}]},
            "`maxnreg` is 100; expected a multiple of 8",
        ),
    ],
)
def test_a_wrong_table_is_refused_by_file_entry_and_field(change, message):
    table.parse(json.dumps({**HEADER, "entries": [ROW]}), "t.json")
    with pytest.raises(ValueError, match=message):
        table.parse(json.dumps({**HEADER, "entries": [ROW], **change}), "t.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_corrupt_table_is_reported_once_and_skipped(content, folder):
    path = tables.user_path(CPU)
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert chosen() == tables.lookup("interpreter", "attention_forward", 4, 64)
        assert chosen("attention_dq") == tables.lookup("interpreter", "attention_dq", 4, 64)
    assert [w.category for w in warned] == [RuntimeWarning]
    assert str(path) in str(warned[0].message)
    assert path.read_bytes() == content


def test_a_corrupt_table_is_kept_when_another_is_written(folder):
    path = tables.user_path(CPU)
    path.write_text("my notes")
    with pytest.warns(RuntimeWarning, match="kept as"):
        table.merge(path, user_table(entries=EXAMPLES[0]))
    assert table.read(path).entries == EXAMPLES[0]
    assert [p.read_text() for p in folder.glob("*.unreadable*")] == ["my notes"]


def test_a_write_that_fails_leaves_the_table_alone(folder, monkeypatch):
    path = folder / "t.json"
    table.write(path, user_table(entries=EXAMPLES[0]))

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        table.write(path, user_table(entries=EXAMPLES[1]))
    assert table.read(path).entries == EXAMPLES[0]
    assert list(folder.iterdir()) == [path]


def test_processes_that_write_at_once_lose_nothing(folder):
    program = """
import sys
from pathlib import Path
from flashgau.tables.config import Config
from flashgau.tables.table import TableEntry, Key, Table, merge
for width in range(8):
    key = Key(f"kernel_{sys.argv[2]}", 2, 2**width)
    merge(Path(sys.argv[1]), Table("g", "sm_90", True, entries={key: TableEntry(Config(16, 16), 1.0)}))
"""
    path = folder / "t.json"
    runs = [subprocess.Popen([sys.executable, "-c", program, str(path), str(i)]) for i in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert len(table.read(path).entries) == 16


# ---- who decides


def test_the_users_table_comes_before_the_shipped_one_before_the_architectures(folder, tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("shipped")
    by_architecture = chosen()
    monkeypatch.setattr(tables, "_SHIPPED", home)
    gpu, own = Config(16, 16, 2, 1), Config(32, 16, 1, 1)
    table.write(home / "gpus" / "interpreter.json", user_table(entries={KEY: TableEntry(gpu), OTHER: TableEntry(gpu)}))
    tables.reload()
    assert chosen() == chosen("attention_dq") == gpu != by_architecture
    table.write(tables.user_path(CPU), user_table(entries={KEY: TableEntry(own)}))
    tables.reload()
    assert (chosen(), chosen("attention_dq")) == (own, gpu)
    assert chosen(width=16) == own  # of the class
    assert chosen(width=128) == tables.lookup("interpreter", "attention_forward", 4, 128)
    assert chosen(rows=1) == tables.lookup("interpreter", "attention_forward", 4, 64, rows=1)
    assert chosen(options=True) == tables.lookup("interpreter", "attention_forward", 4, 64, options=True)


def test_a_table_of_another_gpu_is_not_used(folder):
    table.write(tables.user_path(CPU), dataclasses.replace(user_table(entries=EXAMPLES[0]), gpu="NVIDIA H200"))
    assert chosen() == tables.lookup("interpreter", "attention_forward", 4, 64)


def test_tables_are_read_once(folder):
    table.write(tables.user_path(CPU), user_table(entries=EXAMPLES[0]))
    before = chosen(), chosen("attention_dq")
    with mock.patch.object(table, "read", side_effect=AssertionError("read again")):
        assert (chosen(rows=99), chosen("attention_dq")) == before
        assert chosen("attention_dkv") == tables.lookup("interpreter", "attention_dkv", 4, 64)
    table.write(tables.user_path(CPU), user_table(entries={KEY: TableEntry(Config(16, 16))}))
    assert chosen() == before[0]
    tables.reload()
    assert chosen() == Config(16, 16)


def test_a_measurement_decides_who_makes_the_products(folder):
    x, w = torch.empty(50, 900), torch.empty(64, 900)
    assert not tables.fuses_glu_linear(x, w)  # the rule, for fp32
    table.write(tables.user_path(CPU), user_table(entries={Key(FUSED, 4, 1024): TableEntry(True)}))
    tables.reload()
    assert tables.fuses_glu_linear(x, w)
    assert not tables.fuses_glu_linear(torch.empty(50, 1025), torch.empty(64, 1025))
    assert tables.fuses_glu_linear(x[:1], w)


def test_unknown_kernels_and_widths_are_refused():
    with pytest.raises(ValueError, match=r"tuning: flash \(32 bit, width 64\); expected a kernel of the table"):
        chosen("flash")
    with pytest.raises(ValueError, match="width 512"):
        chosen(width=512)


def test_a_configuration_is_in_force_inside_its_block_in_every_thread():
    """A backward on a GPU runs in a thread of autograd's."""
    x, w = torch.empty(50, 900), torch.empty(64, 900)

    def seen() -> tuple[Config, bool]:
        return tables.in_force()("attention_forward", x, 64), tables.fuses_glu_linear(x, w)

    outer, inner, before = Config(16, 16), Config(32, 32), (chosen(), False)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(seen).result() == seen() == before
        with tables.configured(chosen_by(outer), fuse_glu_linear=True):
            assert other.submit(seen).result() == seen() == (outer, True)
            with tables.configured(chosen_by(inner)):  # which leaves the other choice alone
                assert other.submit(seen).result() == seen() == (inner, True)
            with pytest.raises(ZeroDivisionError), tables.configured(chosen_by(inner)):
                _ = 1 / 0
            with tables.configured(fuse_glu_linear=False):
                assert other.submit(seen).result() == seen() == (outer, False)
            assert seen() == (outer, True)
            assert chosen() == before[0]  # what the tables say
        assert other.submit(seen).result() == seen() == before


def test_a_launcher_takes_a_configuration_a_function_or_nothing():
    x, one, other = torch.empty(1), Config(16, 16), Config(32, 16)
    assert chosen_by(one)("attention_dq", x, 64, rows=3, options=True) == one
    assert chosen_by(tables.choose) is tables.choose
    assert chosen_by(None) is tables.choose
    with tables.configured(chosen_by(other)):
        assert chosen_by(None)("attention_dq", x, 64) == other
        assert chosen_by(one)("attention_dq", x, 64) == one


@pytest.mark.parametrize(("target", "arch"), [("sm_90", "sm_90"), ("sm_89", "sm_86"), ("gfx942", "gfx942")])
def test_what_is_compiled_for_a_target_has_its_table(target, arch, monkeypatch):
    monkeypatch.setattr(ahead.compiler, "is_compiled", lambda kernel: True)  # nothing is launched here
    x = torch.empty(1, device="meta")
    with ahead.compiling_for(target):
        found = chosen_by(None)("attention_forward", x, 128, rows=1, options=True)
    assert found == tables.lookup(arch, "attention_forward", 4, 128, rows=1, options=True)
    assert chosen_by(None) is tables.choose


@pytest.mark.parametrize("field", ["block_m", "block_n", "block_k", "num_warps"])
@pytest.mark.parametrize("size", [48, 0, -16, 16.0, True, None])
def test_a_size_that_is_no_power_of_two_is_refused_by_name(field, size):
    message = re.escape(f"Config: `{field}` is {size!r}; expected a power of two")
    with pytest.raises(ValueError, match=message):
        Config(**{"block_m": 64, "block_n": 32, field: size})
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Config(64, 32), **{field: size})


@pytest.mark.parametrize("stages", [0, -1, 1.0, False])
def test_stages_that_are_no_positive_number_are_refused(stages):
    with pytest.raises(ValueError, match=re.escape(f"Config: `num_stages` is {stages!r}; expected a positive number")):
        Config(64, 32, num_stages=stages)


@pytest.mark.parametrize("registers", [0, 16, 100, 264, 128.0, True])
def test_a_limit_of_registers_is_one_that_a_thread_can_have(registers):
    with pytest.raises(ValueError, match=re.escape(f"Config: `maxnreg` is {registers!r}; expected None or a multiple")):
        Config(64, 32, maxnreg=registers)


def test_a_limit_of_registers_is_launched_with():
    assert Config(64, 32, maxnreg=128).launch() == Config(64, 32).launch() | {"maxnreg": 128}


def test_nothing_is_compiled_by_an_interpreter(interpreted):
    with pytest.raises(RuntimeError, match=r"compiling_for: TRITON_INTERPRET=1 was set .* unset TRITON_INTERPRET"):
        ahead.compiling_for("sm_90").__enter__()
    assert chosen_by(None) is tables.choose


def test_documented_names_are_those_of_the_tables():
    for name in ("choose", "fuses_glu_linear", "lookup", "reload"):
        assert getattr(tuning, name) is getattr(tables, name)


def test_shipped_tables_are_valid_and_complete():
    shipped_file = json.loads(Path(tables.__file__).with_name("architectures.json").read_text())
    assert tuple(shipped_file["architectures"]) == tables.ARCHITECTURES
    assert set(shipped_file["config"]) == {field.name for field in dataclasses.fields(Config)}
    for row in shipped_file["rows"]:
        configs = [values for values in row[len(shipped_file["key"]) :] if values is not None]
        assert all(5 <= len(values) <= len(shipped_file["config"]) for values in configs), row
    wanted = {ahead.Job("", name, dtype, width, "").key for name, e in shipped.ENTRIES.items() for width in e.widths
              for dtype in e.kinds}  # fmt: skip
    for arch in tables.ARCHITECTURES:
        found = tables.shipped_table(arch)
        assert (found.architecture, found.gpu, found.measured) == (arch, None, False)
        assert wanted <= found.entries.keys()
    for gpu in tables.shipped_gpus():
        assert gpu.measured
        assert gpu.gpu is not None
        assert gpu.architecture in tables.ARCHITECTURES


@pytest.mark.parametrize(
    ("target", "limit"), [("sm_75", 65_536), ("sm_89", 101_376), ("sm_120", 101_376), ("sm_999", 65_536)]
)
def test_devices_with_little_shared_memory_get_what_fits(target, limit):
    """Compiled for GPUs of 64 KB and 100 KB: what `choose` would give there."""
    assert ahead.shared_bytes_of(target) == limit
    assert ahead.table_of(target) == ("sm_75" if limit == 65_536 else "sm_86")
    if target == "sm_999":
        return  # which this compiler does not know
    if target == "sm_75":  # which it compiles without the matrix units, so that no row is ok
        widths = {"attention_dkv": 128, "mixed_chunk_product": 128, "glu_linear": 0}
        kinds = {entry: shipped.ENTRIES[entry].kinds["fp16"][0] for entry in widths}
        work = [ahead.Job(target, entry, "fp16", width, kinds[entry]) for entry, width in widths.items()]
        work.append(ahead.Job(target, "attention_forward", "fp16", 256, "causal"))  # the widest head
        assert all(0 < row.shared_bytes <= limit for row in ahead.compile_all(work, processes=1))
        return
    work = [
        ahead.Job(target, "attention_dq", "bf16", 256, "causal"),
        ahead.Job(target, "gau_product", "bf16", 128, "relu2 causal"),
        ahead.Job(target, "mixed_chunk_product", "bf16", 128, "relu2 causal"),
        ahead.Job(target, "glu_linear", "bf16", 0, "training"),
    ]
    for row in ahead.compile_all(work, processes=1):
        assert 0 < row.shared_bytes <= limit, row
        assert row.ok, row


@pytest.mark.parametrize("arch", tables.ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", ["attention_forward", "attention_dq", "attention_dkv", "attention_dbias"])
def test_options_leave_room_for_what_they_take(arch, itemsize, kernel):
    """A cap's slope or dropout's words take a block of registers more: the blocks of the next wider heads, no pipeline.

    Behind the widest heads there is no wider class: their blocks are of 32 at most. An entry for options comes first.
    """
    for rows in (None, 1) if kernel == "attention_forward" else (None,):
        plain = [tables.lookup(arch, kernel, itemsize, width, rows) for width in (64, 128, 256)]
        found = [tables.lookup(arch, kernel, itemsize, width, rows, options=True) for width in (64, 128, 256)]
        assert all(c.num_stages == 1 for c in found)
        for width, c, wider in zip((64, 128), found, plain[1:], strict=False):
            own = tables.shipped_table(arch).config(Key(kernel, itemsize, width, rows is not None, options=True))
            if own is not None:
                assert c == own
                continue
            assert (c.block_m, c.block_n, c.num_warps) == (wider.block_m, wider.block_n, wider.num_warps)
        assert (found[-1].block_m, found[-1].block_n) == (min(plain[-1].block_m, 32), min(plain[-1].block_n, 32))


@pytest.mark.parametrize(
    "name", [n for n, e in shipped.ENTRIES.items() if n.startswith("attention") and e.matrix is not None]
)
def test_the_widest_heads_fit_64_kilobytes(name):
    """Rows, keys and their gradients of 256 columns, in fp16: blocks of 32 at most, one of each at a time."""
    widest = ahead.Job("", name, "fp16", 256, "").key
    config = tables.shipped_table("sm_75").config(widest)
    assert config is not None
    assert max(config.block_m, config.block_n) <= 32
    assert config.num_stages == 1
    operands = (2 if name in ("attention_dq", "attention_dkv", "attention_dbias") else 1) * (
        config.block_m + config.block_n
    )
    assert operands * 256 * 2 <= ahead.shared_bytes_of("sm_75")


# ---- check covers the tables


@pytest.mark.usefixtures("interpreted")
def test_check_covers_every_configuration(folder):
    own = Config(16, 16, 1, 1)
    table.write(tables.user_path(CPU), user_table(entries={KEY: TableEntry(own)}))
    tables.reload()
    pairs = check.select("attention", "triton", CPU, False)
    cases = [case for case, _ in pairs if isinstance(case, configurations.Configured)]
    entries = tables.shipped_table("interpreter").entries.items()
    wanted = {(key, e.choice) for key, e in entries if ahead.op_of(key.kernel) in ("attention", "derivatives")} | {
        (KEY, own)
    }
    assert {(case.key_of_table, case.config) for case in cases} == wanted
    assert not [case for case, _ in check.select("attention", "eager", CPU, False) if hasattr(case, "config")]
    rows = check.run_cases([(case, "triton") for case in cases[-2:]], CPU)
    assert all(row.ok for row in rows), rows


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernel", ["glu_forward", "glu_linear_backward", "mixed_chunk_step", "heads"])
def test_a_case_asks_for_its_kernel(kernel):
    key = next(key for key in tables.shipped_table("interpreter").entries if key.kernel == kernel and key.itemsize == 4)
    case = configurations.case_of(key, tables.shipped_config(CPU, key), "float32", True)
    assert configurations.hold(case, CPU).ok
    with pytest.raises(RuntimeError, match="no launch asked for"):
        configurations.hold(dataclasses.replace(case, key_of_table=key._replace(kernel="other")), CPU)


def test_choosing_is_one_look_into_a_dictionary():
    x = torch.empty(1)
    before = tables.choose("attention_forward", x, 64, rows=100)
    with (
        mock.patch.object(tables, "lookup", side_effect=AssertionError),
        mock.patch.object(tables, "architecture", side_effect=AssertionError),
    ):
        for rows in range(17, 40):
            assert tables.choose("attention_forward", x, 64, rows=rows) == before

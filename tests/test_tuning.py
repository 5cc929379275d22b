"""Tables of launch configurations, who decides, and the search for faster ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")
from flashgau.kernels.common import Config

from flashgau import tuning
from flashgau.cli import app, main
from flashgau.tuning import ahead, compiler, search, shipped, table
from flashgau.tuning.table import FUSED, TableEntry, Key, Table
from flashgau.verification import candidates as tune_command
from flashgau.verification import checking as check
from flashgau.verification import configurations

CPU = torch.device("cpu")
KEY = Key("attention_forward", 4, 64)
OTHER = Key("attention_dq", 4, 64)
runner = CliRunner()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The user's tables are in a folder of the test, and nothing read in it stays."""
    monkeypatch.setenv("FLASHGAU_TUNING", str(tmp_path))
    tuning.reload()
    yield tmp_path
    tuning.reload()


def user_table(**entries: Any) -> Table:
    return Table("interpreter", "interpreter", True, {"torch": "2"}, "2026-01-31", **entries)


def chosen(kernel: str = "attention_forward", width: int = 64, **traits: Any) -> Config:
    return tuning.choose(kernel, torch.empty(1), width, **traits)


# ---- the format

EXAMPLES = [
    {KEY: TableEntry(Config(64, 32, 8, 3))},
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
    ],
)
def test_a_wrong_table_is_refused_by_file_entry_and_field(change, message):
    table.parse(json.dumps({**HEADER, "entries": [ROW]}), "t.json")
    with pytest.raises(ValueError, match=message):
        table.parse(json.dumps({**HEADER, "entries": [ROW], **change}), "t.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_corrupt_table_is_reported_once_and_skipped(content, folder):
    path = tuning.user_path(CPU)
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert chosen() == tuning.lookup("interpreter", "attention_forward", 4, 64)
        assert chosen("attention_dq") == tuning.lookup("interpreter", "attention_dq", 4, 64)
    assert [w.category for w in warned] == [RuntimeWarning]
    assert str(path) in str(warned[0].message)
    assert path.read_bytes() == content


def test_a_corrupt_table_is_kept_when_another_is_written(folder):
    path = tuning.user_path(CPU)
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
from flashgau.kernels.common import Config
from flashgau.tuning.table import TableEntry, Key, Table, merge
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
    (home / "architectures").symlink_to(Path(tuning.__file__).parent / "architectures")
    by_architecture = chosen()
    monkeypatch.setattr(tuning, "_SHIPPED", home)
    gpu, own = Config(16, 16, 2, 1), Config(32, 16, 1, 1)
    table.write(home / "gpus" / "interpreter.json", user_table(entries={KEY: TableEntry(gpu), OTHER: TableEntry(gpu)}))
    tuning.reload()
    assert chosen() == chosen("attention_dq") == gpu != by_architecture
    table.write(tuning.user_path(CPU), user_table(entries={KEY: TableEntry(own)}))
    tuning.reload()
    assert (chosen(), chosen("attention_dq")) == (own, gpu)
    assert chosen(width=16) == own  # of the class
    assert chosen(width=128) == by_architecture
    assert chosen(rows=1) == tuning.lookup("interpreter", "attention_forward", 4, 64, rows=1)
    assert chosen(options=True) == tuning.lookup("interpreter", "attention_forward", 4, 64, options=True)


def test_a_table_of_another_gpu_is_not_used(folder):
    table.write(tuning.user_path(CPU), dataclasses.replace(user_table(entries=EXAMPLES[0]), gpu="NVIDIA H200"))
    assert chosen() == tuning.lookup("interpreter", "attention_forward", 4, 64)


def test_tables_are_read_once(folder):
    table.write(tuning.user_path(CPU), user_table(entries=EXAMPLES[0]))
    before = chosen(), chosen("attention_dq")
    with mock.patch.object(table, "read", side_effect=AssertionError("read again")):
        assert (chosen(rows=99), chosen("attention_dq")) == before
        assert chosen("attention_dkv") == tuning.lookup("interpreter", "attention_dkv", 4, 64)
    table.write(tuning.user_path(CPU), user_table(entries={KEY: TableEntry(Config(16, 16))}))
    assert chosen() == before[0]
    tuning.reload()
    assert chosen() == Config(16, 16)


def test_a_measurement_decides_who_makes_the_products(folder):
    x, w = torch.empty(50, 900), torch.empty(64, 900)
    assert not tuning.fuses_glu_linear(x, w)  # the rule, for fp32
    table.write(tuning.user_path(CPU), user_table(entries={Key(FUSED, 4, 1024): TableEntry(True)}))
    tuning.reload()
    assert tuning.fuses_glu_linear(x, w)
    assert not tuning.fuses_glu_linear(torch.empty(50, 1025), torch.empty(64, 1025))
    assert tuning.fuses_glu_linear(x[:1], w)


def test_unknown_kernels_and_widths_are_refused():
    with pytest.raises(ValueError, match=r"tuning: flash \(32 bit, width 64\); expected a kernel of the table"):
        chosen("flash")
    with pytest.raises(ValueError, match="width 512"):
        chosen(width=512)


def test_shipped_tables_are_valid_and_complete():
    names = {p.stem for p in (Path(tuning.__file__).parent / "architectures").glob("*.json")}
    assert names == set(tuning.ARCHITECTURES)
    wanted = {ahead.Job("", name, dtype, width, "").key for name, e in shipped.ENTRIES.items() for width in e.widths
              for dtype in e.kinds}  # fmt: skip
    for arch in tuning.ARCHITECTURES:
        found = tuning.shipped_table(arch)
        assert (found.architecture, found.gpu, found.measured) == (arch, None, False)
        assert wanted <= found.entries.keys()
    for gpu in tuning.shipped_gpus():
        assert gpu.measured
        assert gpu.gpu is not None
        assert gpu.architecture in tuning.ARCHITECTURES


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


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", ["attention_forward", "attention_dq", "attention_dkv", "attention_dbias"])
def test_options_leave_room_for_what_they_take(arch, itemsize, kernel):
    """A cap's slope or dropout's words take a block of registers more: the blocks of the next wider heads, no pipeline.

    Behind the widest heads there is no wider class: their blocks are of 32 at most.
    """
    for rows in (None, 1) if kernel == "attention_forward" else (None,):
        plain = [tuning.lookup(arch, kernel, itemsize, width, rows) for width in (64, 128, 256)]
        found = [tuning.lookup(arch, kernel, itemsize, width, rows, options=True) for width in (64, 128, 256)]
        assert all(c.num_stages == 1 for c in found)
        for c, wider in zip(found, plain[1:], strict=False):
            assert (c.block_m, c.block_n, c.num_warps) == (wider.block_m, wider.block_n, wider.num_warps)
        assert (found[-1].block_m, found[-1].block_n) == (min(plain[-1].block_m, 32), min(plain[-1].block_n, 32))


@pytest.mark.parametrize(
    "name", [n for n, e in shipped.ENTRIES.items() if n.startswith("attention") and e.matrix is not None]
)
def test_the_widest_heads_fit_64_kilobytes(name):
    """Rows, keys and their gradients of 256 columns, in fp16: blocks of 32 at most, one of each at a time."""
    widest = ahead.Job("", name, "fp16", 256, "").key
    config = tuning.shipped_table("sm_75").config(widest)
    assert config is not None
    assert max(config.block_m, config.block_n) <= 32
    assert config.num_stages == 1
    operands = (2 if name in ("attention_dq", "attention_dkv", "attention_dbias") else 1) * (
        config.block_m + config.block_n
    )
    assert operands * 256 * 2 <= ahead.shared_bytes_of("sm_75")


# ---- what is taken from Triton


def test_a_driver_that_was_there_is_there_again():
    seen, there = [], object()
    before = compiler.driver.active if torch.cuda.is_available() else None
    try:
        for active in (there, None):
            compiler.driver.set_active(active)
            with compiler.instead_of_launching("sm_80", ahead.target_of("sm_80"), lambda *args: seen.append(args)):
                assert compiler.driver.active.get_current_target() == ahead.target_of("sm_80")
            if active is not None or torch.cuda.is_available():
                assert compiler.driver.active is active or active is None
            else:
                with pytest.raises(RuntimeError):  # there is none
                    _ = compiler.driver.active
    finally:
        compiler.driver.set_active(before)
    assert not seen


def test_cuobjdump_is_found_without_tritons_help(monkeypatch, tmp_path):
    """Its path among Triton's knobs, the package, the PATH: each is hidden in turn, and what is nowhere is named."""
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    assert Path(compiler.cuobjdump()) == bundled
    monkeypatch.setattr(triton, "knobs", object())
    assert Path(compiler.cuobjdump()) == bundled
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "triton" / "__init__.py"))
    (tmp_path / "cuobjdump").symlink_to(bundled)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler.cuobjdump() == str(tmp_path / "cuobjdump")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="compile: cuobjdump is neither in Triton nor on the PATH"):
        compiler.cuobjdump()


# ---- the search


def job(config: Config = Config(64, 32), entry: str = "attention_forward", dtype: str = "fp32") -> ahead.Job:  # noqa: B008
    return ahead.Job("sm_80", entry, dtype, 64, "causal", config)


@pytest.mark.parametrize("entry", list(shipped.ENTRIES))
@pytest.mark.parametrize("arch", ["sm_90", "interpreter"])
def test_the_space_is_around_the_entry(entry, arch):
    key = ahead.Job("", entry, "bf16", shipped.ENTRIES[entry].widths[0], "").key
    start = tuning.lookup(arch, key.kernel, key.itemsize, key.width, 1 if key.few_rows else None)
    found = search.space(key, start)
    assert found[0] == (0, start)
    assert len({c for _, c in found}) == len(found)
    assert [far for far, _ in found] == sorted(far for far, _ in found)
    for _, c in found:
        assert c == start or c.num_warps in (4, 8)
        assert c.num_stages == start.num_stages or 1 <= c.num_stages <= 4
        for name in ("block_m", "block_n", "block_k"):
            assert getattr(c, name) in {getattr(start, name) * 2**i // 2 for i in range(3)}
        if entry == "attention_dbias":
            assert c.block_m == c.block_n


def fast_where(config: Config) -> float:
    """A clock for tests: milliseconds that a configuration takes, fastest with 64 rows, 64 keys and 1 stage."""
    return 1 + abs(config.block_m - 64) + abs(config.block_n - 64) + config.num_stages / 10


def row_of(j: ahead.Job, ok: bool = True) -> ahead.Row:
    return ahead.Row("attention", "forward_kernel", j.dtype, "", {}, j.target, ok=ok, reason=None if ok else "spills")


def searching(folder: Path, **changes: Any) -> search.Search:
    options: dict[str, Any] = {
        "starts": [job(), job(Config(32, 32), "attention_dq")],
        "check": lambda j: None,
        "clock": lambda j: fast_where(j.config),
        "journal": search.Journal(folder / "j.jsonl", {"torch": "2"}),
        "compile": lambda work: ((j, row_of(j)) for j in work),
    }
    return search.Search(**(options | changes))


def test_the_fastest_that_compiles_and_is_right_wins(folder):
    checked, timed = [], []

    def compile(work: list[ahead.Job]) -> Iterator[tuple[ahead.Job, ahead.Row]]:
        return ((j, row_of(j, ok=j.config.num_stages != 1)) for j in work)

    def check(j: ahead.Job) -> str | None:
        checked.append(j)
        return "out is off by 1" if j.config.num_warps == 8 else None

    def clock(j: ahead.Job) -> float:
        assert checked[-1] == j  # checked right before
        timed.append(j)
        return fast_where(j.config) - (j.config.num_warps == 8)

    found = searching(folder, compile=compile, check=check, clock=clock)
    list(found.run())
    best = found.best()
    assert best[KEY] == TableEntry(Config(64, 64, 4, 2), fast_where(Config(64, 64, 4, 2)), fast_where(Config(64, 32, 4, 2)))
    assert best[OTHER].choice == Config(64, 64, 4, 2)
    assert all(j.config.num_stages > 1 for j in checked)
    assert all(j.config.num_warps == 4 for j in timed)
    assert found.outcomes[KEY, Config(64, 32, 4, 1)].reason == "spills"


def test_a_gain_within_the_noise_changes_nothing(folder):
    found = searching(folder, clock=lambda j: 1.0 if j.config == Config(64, 32) else 0.99)
    list(found.run())
    assert found.best()[KEY] == TableEntry(Config(64, 32), 1.0, 1.0)


def test_near_candidates_of_all_entries_come_first(folder):
    found = searching(folder)
    order = [j for j, _ in found.run()]
    assert [j.config for j in order[:2]] == [Config(64, 32), Config(32, 32)]
    assert len(order) == len(found.candidates()) == len(set(order))


def test_a_search_goes_on_where_it_was_stopped(folder):
    clock = iter(range(10_000))
    first = searching(folder)
    some = list(first.run(seconds=30, now=lambda: next(clock)))
    assert 2 < len(some) < len(first.candidates())
    with open(folder / "j.jsonl", "a") as file:
        file.write('{"key": {"kern')  # killed while it wrote
    tried = []
    second = searching(folder, check=tried.append)
    assert len(list(second.run())) == len(second.candidates())
    assert not {j for j, _ in some} & set(tried)
    assert len(tried) + len(some) == len(second.candidates())
    whole = searching(folder / "other")
    list(whole.run())
    assert second.best() == whole.best()


def test_measurements_of_other_versions_count_for_nothing(folder):
    list(searching(folder).run())
    tried = []
    list(searching(folder, check=tried.append, journal=search.Journal(folder / "j.jsonl", {"torch": "3"})).run())
    assert len(tried) == len(searching(folder).candidates())


# ---- the command


@pytest.fixture
def interpreted():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, and Triton compiles")


@pytest.mark.usefixtures("interpreted")
def test_tuning_from_end_to_end(folder, monkeypatch):
    """Compiled ahead of time for sm_80, held to the reference in the interpreter, ranked by a clock of the test."""
    near = [(0, Config(64, 32, 4, 2)), (1, Config(32, 32, 4, 2)), (2, Config(32, 32, 8, 1))]
    huge = Config(16, 128, 4, 4)  # whose stages take 256 KB of shared memory
    monkeypatch.setattr(search, "space", lambda key, start: [*near, (3, huge)])
    monkeypatch.setattr(
        search, "tasks", lambda target, *rest: [ahead.Job(target, "attention_forward", "fp32", 64, "causal")]
    )
    monkeypatch.setattr(tune_command.Bench, "clock", lambda self, j: fast_where(j.config))
    result = runner.invoke(app, ["tune", "--device", "cpu", "--op", "attention", "--shapes", "64", "--json"])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["rows"][0]
    assert row["choice"] == dataclasses.asdict(Config(64, 32, 4, 2))
    assert not row["changed"]
    outcomes = search.Journal(folder / "interpreter.journal.jsonl", tune_command.versions()).read()
    assert "shared memory" in outcomes[KEY, huge].reason
    assert all(outcomes[KEY, c].ms == fast_where(c) for _, c in near)
    assert chosen() == Config(64, 32, 4, 2)

    # A clock that likes small blocks; the journal of the first has to go.
    (folder / "interpreter.journal.jsonl").unlink()
    monkeypatch.setattr(tune_command.Bench, "clock", lambda self, j: float(j.config.block_m * j.config.num_warps))
    result = runner.invoke(app, ["tune", "--device", "cpu", "--op", "attention", "--shapes", "64"])
    assert result.exit_code == 0, result.output
    assert "2.00x" in result.stdout
    assert "1 entries measured, 1 changed" in result.stdout
    assert chosen() == Config(32, 32, 4, 2)

    result = runner.invoke(app, ["tune", "--device", "cpu", "--show"])
    assert "2.00x" in result.stdout
    assert len(result.stdout.splitlines()) > 100
    (folder / "out").mkdir()
    result = runner.invoke(app, ["tune", "--device", "cpu", "--export", str(folder / "out")])
    assert result.exit_code == 0
    assert table.read(folder / "out" / "interpreter.json") == table.read(tuning.user_path(CPU))
    again = runner.invoke(app, ["tune", "--device", "cpu", "--export", str(folder / "out")])
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.usefixtures("interpreted")
def test_ctrl_c_keeps_the_best_so_far(folder, monkeypatch):
    count = 0

    def clock(self: Any, j: ahead.Job) -> float:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return 1 / count

    monkeypatch.setattr(tune_command.Bench, "clock", clock)
    monkeypatch.setattr(tune_command.Bench, "check", lambda self, j: None)
    monkeypatch.setattr(ahead, "compile_each", lambda work: ((j, row_of(j)) for j in work))
    assert main(["tune", "--device", "cpu", "--op", "glu"]) == 130
    measured = table.read(tuning.user_path(CPU)).entries
    assert len(measured) > 0
    assert all(e.ms is not None for e in measured.values())


@pytest.mark.usefixtures("interpreted")
def test_a_candidate_whose_results_are_wrong_is_not_timed(folder, monkeypatch):
    bench = tune_command.Bench(CPU)
    good = job(Config(16, 32))
    assert bench.check(good) is None
    assert bench.clock(dataclasses.replace(good, kind="causal")) > 0
    forward = configurations.flashgau.ops.autograd.implementation

    def spoiled(op: str, backend: str, function: str) -> Any:
        call = forward(op, backend, function)
        if backend != "triton" or function != "attention_forward":
            return call
        return lambda *args, **kwargs: tuple(x * 1.01 for x in call(*args, **kwargs))

    monkeypatch.setattr(configurations.flashgau.ops.autograd, "implementation", spoiled)
    assert "is off by" in bench.check(good)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("entry", ["attention_forward", "glu_backward", "gau_fused", "projection"])
def test_timed_calls_run_on_tensors_made_once(entry, monkeypatch):
    """The very calls that are compiled, with values; the second makes no operand."""
    dtype = "fp32"
    j = ahead.Job(
        "sm_80", entry, dtype, shipped.ENTRIES[entry].widths[0], search._kind(shipped.ENTRIES[entry].kinds[dtype])
    )
    j = dataclasses.replace(j, config=tuning.shipped_config(CPU, j.key))
    made = []

    def twice(call: Any) -> float:
        call()
        with mock.patch.object(Tensor, "normal_", lambda x: made.append(x)):
            call()
        return 1.0

    from torch import Tensor

    assert tune_command.Bench(CPU, twice).clock(j) == 1.0
    assert not made


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "softmax"], ["softmax", "glu_linear"]),
        (["--minutes", "0"], ["--minutes", "positive"]),
        (["--minutes", "nan"], ["--minutes", "positive"]),
        (["--shapes", "100"], ["--shapes", "100", "64, 128 and 256"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_wrong_use_is_one_line_and_status_2(arguments, words, capsys):
    assert main(["tune", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashgau tune: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_exporting_nothing_says_so(capsys):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, and Triton compiles")
    assert main(["tune", "--device", "cpu", "--export", "x.json"]) == 1
    assert "no table of yours" in capsys.readouterr().err


# ---- check covers the tables


@pytest.mark.usefixtures("interpreted")
def test_check_covers_every_configuration(folder):
    own = Config(16, 16, 1, 1)
    table.write(tuning.user_path(CPU), user_table(entries={KEY: TableEntry(own)}))
    tuning.reload()
    pairs = check.select("attention", "triton", CPU, False)
    cases = [case for case, _ in pairs if isinstance(case, configurations.Configured)]
    entries = tuning.shipped_table("interpreter").entries.items()
    wanted = {(key, e.choice) for key, e in entries if key.kernel.startswith("attention")} | {(KEY, own)}
    assert {(case.key_of_table, case.config) for case in cases} == wanted
    assert not [case for case, _ in check.select("attention", "eager", CPU, False) if hasattr(case, "config")]
    rows = check.run_cases([(case, "triton") for case in cases[-2:]], CPU)
    assert all(row.ok for row in rows), rows


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernel", ["glu_forward", "glu_linear_backward", "mixed_chunk_step", "heads"])
def test_a_case_asks_for_its_kernel(kernel):
    key = next(key for key in tuning.shipped_table("interpreter").entries if key.kernel == kernel and key.itemsize == 4)
    case = configurations.case_of(key, tuning.shipped_config(CPU, key), "float32", True)
    assert configurations.hold(case, CPU).ok
    with pytest.raises(RuntimeError, match="no launch asked for"):
        configurations.hold(dataclasses.replace(case, key_of_table=key._replace(kernel="other")), CPU)


def test_choosing_is_one_look_into_a_dictionary():
    x = torch.empty(1)
    before = tuning.choose("attention_forward", x, 64, rows=100)
    with (
        mock.patch.object(tuning, "lookup", side_effect=AssertionError),
        mock.patch.object(tuning, "architecture", side_effect=AssertionError),
    ):
        for rows in range(17, 40):
            assert tuning.choose("attention_forward", x, 64, rows=rows) == before


# ---- the suite of benchmarks, which tunes


def test_a_suite_gives_each_step_its_share_and_goes_on(tmp_path, monkeypatch):
    from bench import suite

    monkeypatch.setattr(suite, "PATIENCE", 1.0)
    sleep, fail = (sys.executable, "-c", "import time; time.sleep(60)"), (sys.executable, "-c", "raise SystemExit(3)")
    work = [
        suite.Step("slow", sleep, 1.0),
        suite.Step("bad", fail, 1.0),
        suite.Step("good", (sys.executable, "-V"), 8.0),
    ]
    monkeypatch.setattr(suite, "steps", lambda *args: work)
    said: list[str] = []
    record = suite.run("cpu", 0.5, tmp_path, True, said.append)
    assert [suite.verdict(row) for row in record["steps"]] == ["stopped, time over", "status 3", "ok"]
    assert record["complete"]
    assert json.loads((tmp_path / "suite.json").read_text()) == record
    assert "Python" in (tmp_path / "good.log").read_text()
    assert len(said) == 3


def test_a_suite_without_time_says_so_of_every_step(tmp_path):
    from bench import suite

    record = suite.run("cpu", 1e-9, tmp_path, False, lambda line: None)
    assert {suite.verdict(row) for row in record["steps"]} == {"no time left"}


def test_a_suite_has_everything_the_most_important_first(tmp_path):
    from bench import suite
    from bench.cases import OPERATIONS

    names = [step.name for step in suite.steps("cuda", tmp_path, False)]
    assert set(names) >= {"doctor", "tune", "tests", *(f"bench {op}" for op in OPERATIONS)}
    assert len(set(names)) == len(names)
    assert names[:4] == ["doctor", "check attention", "bench attention", "tune"]
    assert "tune" not in [step.name for step in suite.steps("cpu", tmp_path, False)]
    for step in suite.steps("cuda", tmp_path, True):
        if "bench" in step.command:
            from bench.__main__ import parse

            parse(list(step.command[3:]))


def test_the_page_has_every_result_and_its_origin(tmp_path):
    from bench import page

    results = Path(__file__).resolve().parents[1] / "bench" / "results"
    written = page.write(results, tmp_path)
    text = written[0].read_text()
    found = page.records(results)
    assert found
    for _, record in found:
        assert record["machine"]["date"][:10] in text
        assert f"torch {record['machine']['torch']}" in text
        timed = [e["name"] for e in record["cases"] if any(r["times"] for w, r in e["providers"].items() if "gau" in w)]
        assert all(f"| {name} | forward |" in text for name in timed)
    for path in written[1:]:
        assert f"]({path.relative_to(tmp_path).as_posix()})" in text
    with pytest.raises(ValueError, match="no results"):
        page.write(tmp_path, tmp_path)


def test_the_hardwares_limit_is_the_floor_or_the_copy():
    from bench import report

    entry = {"floors": {"forward": 2.0}, "work": {"forward": 8.0, "forward+backward": 9.0}, "work_unit": "B"}
    record = {"machine": {"copy_bytes_per_second": 5.0}}
    assert report.roof(record, entry, "forward") == 4
    assert report.roof(record, entry, "forward+backward") == 5
    assert report.roof(record, entry | {"work_unit": "FLOP"}, "forward+backward") is None
    assert report.roof({"machine": {}}, entry, "forward+backward") is None

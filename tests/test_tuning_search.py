"""The search for faster launch configurations: what it takes from Triton, its order, and its command."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import tuning_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuning_tables import CPU, KEY, OTHER, chosen, fast_where, job, row_of
from typer.testing import CliRunner

pytest.importorskip("triton")
from flashgau import tables
from flashgau.cli import app, main
from flashgau.cli import tune as command
from flashgau.tables import table
from flashgau.tables.config import Config
from flashgau.tables.table import Key, TableEntry
from flashgau.tuning import ahead, compiler, searching, shipped
from flashgau.verification import candidates as tune_command
from flashgau.verification import configurations

folder = tuning_tables.folder
interpreted = tuning_tables.interpreted

runner = CliRunner()


# ---- what is taken from Triton


def test_a_driver_that_was_there_is_there_again():
    seen, there, launched = [], object(), compiler.triton.JITFunction.__getitem__
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
    assert compiler.triton.JITFunction.__getitem__ is launched


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


@pytest.mark.parametrize("entry", list(shipped.ENTRIES))
@pytest.mark.parametrize("arch", ["sm_90", "interpreter"])
def test_the_space_is_around_the_entry(entry, arch):
    key = ahead.Job("", entry, "bf16", shipped.ENTRIES[entry].widths[0], "").key
    start = tables.lookup(arch, key.kernel, key.itemsize, key.width, 1 if key.few_rows else None)
    found = searching.space(key, start)
    assert found[0] == (0, start)
    assert len({c for _, c in found}) == len(found)
    assert [far for far, _ in found] == sorted(far for far, _ in found)
    for _, c in found:
        assert c == start or c.num_warps in (4, 8)
        assert c.num_stages == start.num_stages or 1 <= c.num_stages <= 4
        for name in ("block_m", "block_n", "block_k"):
            assert getattr(c, name) in {getattr(start, name) * 2**i // 2 for i in range(3)}
        if entry in ("attention_dbias", "second_dbias"):
            assert c.block_m == c.block_n


def a_search(folder: Path, **changes: Any) -> searching.Search:
    options: dict[str, Any] = {
        "starts": [job(), job(Config(32, 32), "attention_dq")],
        "check": lambda j: None,
        "clock": lambda j: fast_where(j.config),
        "journal": searching.Journal(folder / "j.jsonl", {"torch": "2"}),
        "compile": lambda work: ((j, row_of(j)) for j in work),
    }
    return searching.Search(**(options | changes))


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

    found = a_search(folder, compile=compile, check=check, clock=clock)
    list(found.run())
    best = found.best()
    assert best[KEY] == TableEntry(
        Config(64, 64, 4, 2), fast_where(Config(64, 64, 4, 2)), fast_where(Config(64, 32, 4, 2))
    )
    assert best[OTHER].choice == Config(64, 64, 4, 2)
    assert all(j.config.num_stages > 1 for j in checked)
    assert all(j.config.num_warps == 4 for j in timed)
    assert found.outcomes[KEY, Config(64, 32, 4, 1)].reason == "spills"


def test_a_gain_within_the_noise_changes_nothing(folder):
    found = a_search(folder, clock=lambda j: 1.0 if j.config == Config(64, 32) else 0.99)
    list(found.run())
    assert found.best()[KEY] == TableEntry(Config(64, 32), 1.0, 1.0)


def test_near_candidates_of_all_entries_come_first(folder):
    found = a_search(folder)
    order = [j for j, _ in found.run()]
    assert [j.config for j in order[:2]] == [Config(64, 32), Config(32, 32)]
    assert len(order) == len(found.candidates()) == len(set(order))


def test_a_search_goes_on_where_it_was_stopped(folder):
    clock = iter(range(10_000))
    first = a_search(folder)
    some = list(first.run(seconds=30, now=lambda: next(clock)))
    assert 2 < len(some) < len(first.candidates())
    with open(folder / "j.jsonl", "a") as file:
        file.write('{"key": {"kern')  # killed while it wrote
    tried = []
    second = a_search(folder, check=tried.append)
    assert len(list(second.run())) == len(second.candidates())
    assert not {j for j, _ in some} & set(tried)
    assert len(tried) + len(some) == len(second.candidates())
    whole = a_search(folder / "other")
    list(whole.run())
    assert second.best() == whole.best()


def test_measurements_of_other_versions_count_for_nothing(folder):
    list(a_search(folder).run())
    tried = []
    list(a_search(folder, check=tried.append, journal=searching.Journal(folder / "j.jsonl", {"torch": "3"})).run())
    assert len(tried) == len(a_search(folder).candidates())


# ---- the command


@pytest.mark.usefixtures("interpreted")
def test_tuning_from_end_to_end(folder, monkeypatch):
    """Compiled ahead of time for sm_80, held to the reference in the interpreter, ranked by a clock of the test."""
    shipped = tables.lookup("interpreter", "attention_forward", 4, 64)
    near = [(0, shipped), (1, Config(32, 32, 4, 2)), (2, Config(32, 32, 8, 1))]
    huge = Config(16, 128, 4, 4)  # whose stages take 256 KB of shared memory
    monkeypatch.setattr(searching, "space", lambda key, start: [*near, (3, huge)])
    monkeypatch.setattr(
        searching, "tasks", lambda target, *rest: [ahead.Job(target, "attention_forward", "fp32", 64, "causal")]
    )
    monkeypatch.setattr(tune_command.Bench, "clock", lambda self, j: fast_where(j.config))
    result = runner.invoke(app, ["tune", "--device", "cpu", "--op", "attention", "--shapes", "64", "--json"])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["rows"][0]
    assert row["choice"] == dataclasses.asdict(shipped)
    assert not row["changed"]
    outcomes = searching.Journal(folder / "interpreter.journal.jsonl", tune_command.versions()).read()
    assert "shared memory" in outcomes[KEY, huge].reason
    assert all(outcomes[KEY, c].ms == fast_where(c) for _, c in near)
    assert chosen() == shipped

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
    assert table.read(folder / "out" / "interpreter.json") == table.read(tables.user_path(CPU))
    again = runner.invoke(app, ["tune", "--device", "cpu", "--export", str(folder / "out")])
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.usefixtures("interpreted")
def test_shapes_of_ones_own_are_timed_and_kept_apart(folder, monkeypatch, capsys):
    """Only the entries asked for; measurements of another shape count for nothing; what remains is told."""
    timed = []

    def clock(self: tune_command.Bench, j: ahead.Job) -> float:
        timed.append((j.key, self.shape))
        return fast_where(j.config)

    monkeypatch.setattr(tune_command.Bench, "check", lambda self, j: None)
    monkeypatch.setattr(tune_command.Bench, "clock", clock)
    monkeypatch.setattr(ahead, "compile_each", lambda work: ((j, row_of(j)) for j in work))
    monkeypatch.setattr(command, "LINE_EVERY", 0.0)
    arguments = ["tune", "--device", "cpu", "--kernel", "attention_forward,attention_dq", "--dtype", "fp32", "--json"]
    arguments += ["--width", "80"]
    assert main(arguments) == 0
    first, (out, err) = len(timed), capsys.readouterr()
    keys = {Key(kernel, 4, 128, few) for kernel, few in [*dict.fromkeys((k.kernel, k.few_rows) for k, _ in timed)]}
    assert {key for key, _ in timed} == keys == {Key(*row) for row in named(json.loads(out)["rows"])}
    assert {key.kernel for key in keys} == {"attention_forward", "attention_dq"}
    assert {shape.width for _, shape in timed} == {80}
    lines = err.splitlines()
    assert lines[0].startswith(f"{first} candidates for {len(keys)} entries; about ")
    assert "at most 30 min" in lines[0]
    assert len(lines) == 1 + first  # progress, without a terminal
    assert all(line.startswith(f"{i} of {first}, ") for i, line in enumerate(lines[1:], 1))
    assert (json.loads(out)["candidates"], json.loads(out)["untried"]) == (first, 0)

    assert main(arguments) == 0  # nothing is left
    assert len(timed) == first
    assert f"{first} candidates for {len(keys)} entries, {first} of them known; about 0" in capsys.readouterr().err
    assert main([*arguments, "--heads", "64", "--kv-heads", "2", "--batch", "3", "--length", "64"]) == 0
    assert timed[-1][1] == shipped.CallShape(64, 3, 64, 2, 80)
    assert not [key for key, _ in timed[first:] if key.few_rows]  # 32 rows a key head are many


def named(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in Key._fields) for row in rows]


@pytest.mark.usefixtures("interpreted")
def test_what_remains_untried_is_told(folder, monkeypatch, capsys):
    """Stopped by Ctrl-C at the fifth of the candidates; every entry measured is shown with its gain."""
    count = iter(range(10_000))

    def clock(self: Any, j: ahead.Job) -> float:
        if next(count) == 4:
            raise KeyboardInterrupt
        return 4.0 if j.config == tables.shipped_config(CPU, j.key) else 2.0

    monkeypatch.setattr(tune_command.Bench, "check", lambda self, j: None)
    monkeypatch.setattr(tune_command.Bench, "clock", clock)
    monkeypatch.setattr(ahead, "compile_each", lambda work: ((j, row_of(j)) for j in work))
    assert main(["tune", "--device", "cpu", "--op", "glu", "--kernel", "glu_forward"]) == 130
    out, err = capsys.readouterr()
    total = int(err.split()[0])
    assert f"{total - 4} of {total} candidates are untried; 0 of 2 entries have no measurement yet" in out
    assert "2 entries measured, 1 changed" in out  # both with what they have, then the first with its neighbours
    assert (out.count("2.00x"), out.count("1.00x")) == (1, 1)


def test_what_cannot_be_timed_is_a_reason(folder):
    def clock(j: ahead.Job) -> float:
        if j.config.num_warps == 8:
            raise searching.NotTimed("out of memory")
        return fast_where(j.config)

    found = a_search(folder, clock=clock)
    assert {what.reason for j, what in found.run() if j.config.num_warps == 8} == {"out of memory"}
    assert found.best()[KEY].choice == Config(64, 64, 4, 1)
    assert not found.untried()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("entry", ["attention_forward", "attention_dkv", "gau_fused", "glu_forward", "glu_linear"])
def test_a_timed_call_has_the_shape_asked_for(entry, monkeypatch):
    """Batch, length, heads and exact width; the entry stays that of its class."""
    sizes = {tuple(x.shape) for x in operands_of(entry, shipped.CallShape(40, 2, 4, 2, 24), monkeypatch)}
    expected = {
        "attention": {(2, 4, 40, 24), (2, 2, 40, 24)}, "gau_fused": {(2, 40, 24), (2, 40, 512)},
        "glu_forward": {(80, 8192)}, "glu_linear": {(80, 1024)},
    }  # fmt: skip
    assert next(found for name, found in expected.items() if entry.startswith(name)) <= sizes


def operands_of(entry: str, shape: shipped.CallShape, monkeypatch: Any) -> list[torch.Tensor]:
    """The tensors of a timed call, which does not run but asks."""
    made, launched = [], shipped.ENTRIES[entry]
    j = ahead.Job("sm_80", entry, "fp32", launched.widths[0], searching._kind(launched.kinds["fp32"]))
    bench = tune_command.Bench(CPU, lambda call: call() or 1.0, shape)
    place, result = shipped.Kept.__call__, None

    def noted(self: Any, *size: int, **options: Any) -> torch.Tensor:
        made.append(place(self, *size, **options))
        return made[-1]

    def call(kind: str, width: int, make: Any) -> None:
        launched.call(kind, width, make)

    for module, names in {
        shipped.attention: ["attention_forward", "attention_backward"], shipped.gau: ["gau_attention_forward"],
        shipped.glu: ["glu_forward", "glu_linear_forward"],
    }.items():  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, lambda *args, **options: result)
    monkeypatch.setattr(shipped.Kept, "__call__", noted)
    with pytest.raises(searching.NotTimed, match="never starts the kernel"):  # nobody asked
        bench.clock(dataclasses.replace(j, config=Config(16, 16)))
    return made


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.none() | st.sets(st.sampled_from(["attention", "glu", "glu_linear", "gau_attention"]), min_size=1),
    st.none() | st.sets(st.sampled_from(["attention_dq", "glu_linear", "gau_gradient", "heads"]), min_size=1),
    st.none() | st.sets(st.sampled_from(["bf16", "fp32"]), min_size=1),
    st.none() | st.sets(st.sampled_from([64, 128, 256]), min_size=1),
    st.none() | st.integers(1, 256),
)
def test_filters_keep_what_they_say(folder, ops, kernels, dtypes, widths, width):
    """Of all entries those that fit each of them, whether they are tuned or shown."""
    own = {Key("mine", 4, 64): TableEntry(Config(16, 16))}
    table.write(tables.user_path(CPU), tuning_tables.user_table(entries=own))
    tables.reload()
    wanted = tune_command.Wanted(
        ops and frozenset(ops), kernels and frozenset(kernels), dtypes and tuple(dtypes), widths and tuple(widths),
        shipped.CallShape(width=width),
    )  # fmt: skip
    bytes_of = {"fp16": 2, "bf16": 2, "fp32": 4}

    def fits(key: Key) -> bool:
        ours = key.kernel != "mine"
        return (
            (ops is None or (ours and ahead.op_of(key.kernel) in ops))
            and (kernels is None or key.kernel in kernels)
            and (dtypes is None or key.itemsize in {bytes_of[dtype] for dtype in dtypes})
            and (widths is None or key.width in {0, *widths})
            and (width is None or key.width == 0 or key.width // 2 < max(width, 33) <= key.width)
        )

    everything, shown = tune_command.choices(CPU), tune_command.choices(CPU, wanted)
    powers = {Key(*row) for row in named(everything)}
    mixed = {key for key in powers if key.kernel.startswith("mixed_chunk")}  # which have fewer classes
    assert {Key(*row) for row in named(shown)} - mixed == {key for key in powers if fits(key)} - mixed
    tuned = {j.key for j in tune_command.starts(CPU, wanted)}
    everything_tuned = {j.key for j in tune_command.starts(CPU, tune_command.Wanted())}
    assert tuned - mixed == {key for key in everything_tuned if fits(key)} - mixed


@pytest.mark.usefixtures("interpreted")
def test_show_honours_filters(folder, capsys):
    assert (
        main(["tune", "--device", "cpu", "--show", "--json", "--op", "attention", "--dtype", "bf16", "--width", "80"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["itemsize"], row["width"]) for row in rows} == {(2, 128)}
    kernels = {row["kernel"] for row in rows}
    assert {f"attention_{part}" for part in ("forward", "dq", "dkv", "dbias")} | {"tangent", "second_dq"} <= kernels
    assert {ahead.op_of(kernel) for kernel in kernels} == {"attention", "derivatives"}


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
    measured = table.read(tables.user_path(CPU)).entries
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
        "sm_80", entry, dtype, shipped.ENTRIES[entry].widths[0], searching._kind(shipped.ENTRIES[entry].kinds[dtype])
    )
    j = dataclasses.replace(j, config=tables.shipped_config(CPU, j.key))
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
        (["--kernel", "flash"], ["flash", "attention_dq"]),
        (["--dtype", "int8"], ["int8", "bf16, fp16 and fp32"]),
        (["--dtype", "fp16,bf16"], ["the same entries"]),
        (["--heads", "8", "--kv-heads", "3"], ["3", "8", "divisor"]),
        (["--op", "glu", "--kernel", "attention_dq"], ["no entry"]),
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

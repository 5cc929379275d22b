"""Tables that others measured come into the user's: nothing is lost, and the faster of two choices stays."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import tuning_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuning_tables import CPU, KEY, OTHER, user_table

pytest.importorskip("triton")
from flashgau import tables
from flashgau.cli import main
from flashgau.tables import merging, table
from flashgau.tables.config import Config
from flashgau.tables.table import Key, TableEntry

folder = tuning_tables.folder

keys = st.sampled_from([KEY, OTHER, Key("glu_forward", 2), Key("attention_dq", 4, 64, options=True)])
entries = st.builds(
    TableEntry,
    st.builds(Config, st.sampled_from([16, 32]), st.sampled_from([16, 64])),
    st.none() | st.floats(0.125, 8, width=16),
)
some = st.dictionaries(keys, entries)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.none() | some, st.lists(some, min_size=1, max_size=3))
def test_nothing_is_lost_and_the_faster_stays(folder, own, others):
    """What an entry gives way to was timed, as it was, and took less; a file that loses an entry is kept whole."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        mine = tables.user_path(CPU)
        for path in folder.glob("interpreter.*"):
            path.unlink()
        if own is not None:
            table.write(mine, user_table(entries=own))
        files = [Path(name) / f"{i}.json" for i in range(len(others))]
        for path, other in zip(files, others, strict=True):
            table.write(path, user_table(entries=other))
        (merged,) = merging.merge_files(files)
    found = table.read(mine).entries
    before = own or {}
    assert merged.table.entries == found
    assert found.keys() == before.keys() | {key for other in others for key in other}
    replaced = False
    for key, entry in found.items():
        came = [other[key] for other in (before, *others) if key in other]
        first, times = came[0], [e.ms for e in came]
        assert entry in came
        if first.ms is None:
            assert entry == first  # which nothing can be compared with
        elif entry != first:
            assert entry.ms is not None
            assert entry.ms < first.ms
        if len(came) == 2 and None not in times and came[0].choice != came[1].choice:
            assert entry.ms == min(times)
        replaced |= key in before and entry != before[key]
    assert (merged.kept is not None) == replaced
    if merged.kept is not None:
        assert table.read(merged.kept).entries == own


def test_tables_of_several_gpus_go_to_their_own(folder, tmp_path_factory, capsys):
    """Of GPUs that are not here, too; what stays and why is said; kernels of others stay out."""
    there = tmp_path_factory.mktemp("others")
    slow, fast = TableEntry(Config(16, 16), 2.0), TableEntry(Config(32, 16), 1.0)
    table.write(tables.user_path(CPU), user_table(entries={KEY: slow, OTHER: fast}))
    first = user_table(entries={KEY: fast, OTHER: slow, Key("mine", 4): fast})
    table.write(there / "a.json", table.replace(first, versions={"torch": "3", "triton": "4"}, date="2026-02-01"))
    h200 = table.Table("NVIDIA H200", "sm_90", True, {"torch": "2"}, "2026-01-31", {KEY: fast})
    table.write(there / "b.json", h200)
    assert main(["tune", "--merge", str(there / "a.json"), "--merge", str(there / "b.json")]) == 0
    assert table.read(folder / "nvidia_h200.json") == h200
    found = table.read(folder / "interpreter.json")
    assert found.entries == {KEY: fast, OTHER: fast}
    assert (found.versions, found.date) == ({"torch": "2, 3", "triton": "4"}, "2026-02-01")
    printed = capsys.readouterr().out
    a = there / "a.json"
    for line in (
        "interpreter.json: 0 entries added, 1 replaced, 2 in all",
        f"32x16x32, 4 warps, 2 stages (1 ms) of {a} is faster than 16x16x32, 4 warps, 2 stages (2 ms)",
        f"32x16x32, 4 warps, 2 stages (1 ms) stays; {a} has 16x16x32, 4 warps, 2 stages (2 ms)",
        "1 entries of kernels that are not flashgau's are left out",
        "the table as it was is kept: " + str(folder / "interpreter.before1"),
        "nvidia_h200.json: 1 entries added, 0 replaced, 1 in all",
    ):
        assert line in printed
    assert main(["tune", "--merge", str(a), "--json"]) == 0  # once more: nothing changes
    (again,) = json.loads(capsys.readouterr().out)["tables"]
    assert (again["added"], again["kept"], [d["taken"] for d in again["differences"]]) == (0, None, [False])
    assert table.read(folder / "interpreter.json") == found


@pytest.mark.parametrize("bad", ["architecture", "nothing", "text", "folder"])
def test_all_files_are_read_before_one_is_written(bad, folder, capsys):
    good = folder / "good.json"
    table.write(good, user_table(entries={KEY: TableEntry(Config(16, 16), 1.0)}))
    other = folder / "other.json"
    if bad == "architecture":
        table.write(other, tables.shipped_table("sm_90"))
    elif bad == "text":
        other.write_text("{")
    elif bad == "folder":
        other.mkdir()
    assert main(["tune", "--merge", str(good), "--merge", str(other)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "other.json" in error
    assert not tables.user_path(CPU).exists()


def test_another_gpu_of_the_same_file_name_is_not_touched(folder):
    other = table.replace(user_table(entries={KEY: TableEntry(Config(16, 16))}), gpu="Interpreter")
    table.write(tables.user_path(CPU), other)
    file = folder / "file.json"
    table.write(file, user_table(entries={OTHER: TableEntry(Config(16, 16))}))
    with pytest.raises(ValueError, match="a table of Interpreter; expected one of interpreter"):
        merging.merge_files([file])
    assert table.read(tables.user_path(CPU)) == other

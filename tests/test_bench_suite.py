"""The suite of benchmarks, which tunes, and the page of its results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tuning_tables

pytest.importorskip("triton")

folder = tuning_tables.folder


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

    committed, results = Path(__file__).resolve().parents[1] / "bench" / "results", tmp_path / "results"
    for some in ("cpu-2.5GHz", "cpu-amx/decode", "cpu-amx/glu_linear"):
        shutil.copytree(committed / some, results / some)
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
        page.write(tmp_path / "nothing", tmp_path)


def test_the_hardwares_limit_is_the_floor_or_the_copy():
    from bench import report

    entry = {"floors": {"forward": 2.0}, "work": {"forward": 8.0, "forward+backward": 9.0}, "work_unit": "B"}
    record = {"machine": {"copy_bytes_per_second": 5.0}}
    assert report.roof(record, entry, "forward") == 4
    assert report.roof(record, entry, "forward+backward") == 5
    assert report.roof(record, entry | {"work_unit": "FLOP"}, "forward+backward") is None
    assert report.roof({"machine": {}}, entry, "forward+backward") is None


def test_the_page_on_proof_has_the_table_of_the_committed_result():
    from bench import executed

    results = json.loads(executed.RESULTS.read_text())
    assert executed.markdown(results) in (Path(__file__).parents[1] / "docs" / "proof.md").read_text(encoding="utf-8")
    assert {row[results["fields"].index("verdict")] for row in results["rows"]} == {"ok"}

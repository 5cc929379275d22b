"""`flashgau check --execute`: its cases, its refusals, the file that it goes on from, and one run in earnest."""

import json
import math

import pytest

pytest.importorskip("triton")
from cli_runs import runner

from flashgau import tables
from flashgau.cli import app, main
from flashgau.cli.instruments import executing
from flashgau.tuning.shipped import ENTRIES
from flashgau.verification.checking import Row


def test_every_kernel_and_configuration_is_a_case():
    for target in ("sm_80", "sm_90"):
        table = tables.shipped_table(target)
        cases = executing.cases(target, None, None, quick=False)
        held = {(case.key_of_table, case.config) for case in cases if hasattr(case, "config")}
        assert held == {(key, table.config(key)) for key in table.entries}
        options = {(case.op, case.options, case.dtype) for case in cases if not hasattr(case, "config")}
        assert {dtype for _, _, dtype in options} == {"bfloat16", "float16", "float32"}
        quick = executing.cases(target, None, None, quick=True)
        assert {case.dtype for case in quick} == {"bfloat16"}
        assert {case.key_of_table.kernel for case in quick} == {e.removesuffix("_few_rows") for e in ENTRIES}


def test_cases_are_chosen_by_operation_and_dtype():
    cases = executing.cases("sm_80", "glu_linear", "float16", quick=False)
    assert {(case.op, case.dtype) for case in cases} == {("glu_linear", "float16")}
    gau = executing.cases("sm_80", "gau_attention", None, quick=True)
    assert {case.op for case in gau} == {"gau_attention", "projection", "heads", "norm"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--execute", "gfx942"], "expected NVIDIA GPUs up to sm_90"),
        (["--execute", "sm_100"], "expected NVIDIA GPUs up to sm_90"),
        (["--execute", "sm_80", "--dtype", "fp64"], "there are fp32, bf16, fp16"),
        (["--execute", "sm_80", "--quick", "--dtype", "fp32"], "there is no case of any operation in float32"),
        (["--execute", "sm_80", "--backend", "eager"], "expected no --device, --backend"),
        (["--quick"], "come with --execute"),
    ],
)
def test_wrong_use_is_refused(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch):
    """Cases are done at once, but those of `broken`; the list collects them."""
    done = []

    def execute_all(work, processes=None):
        for task in work:
            done.append(task)
            case = task.case
            ok = "reverse" not in case.options
            yield task, Row(case.op, case.options, case.shape, case.dtype, f"triton, {task.target}",
                            "ok" if ok else "miss", "out", 1.0 if ok else 3.0, 1.0, 2.0,
                            counts={"launches": 1, "read_bytes": 8, "instructions": {"float": 5}})  # fmt: skip

    monkeypatch.setattr(executing, "execute_all", execute_all)
    return done


def test_a_run_goes_on_where_it_was_stopped(pretended, tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    command = ["check", "--execute", "sm_80,sm_90", "--quick", "--op", "glu", "--out", str(file)]
    whole = executing.execute_all

    def stopped(work, processes=None):
        for number, pair in enumerate(whole(work, processes)):
            if number == 3:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(executing, "execute_all", stopped)
    assert main(command) == 130
    assert len(json.loads(file.read_text())["rows"]) == 3
    monkeypatch.setattr(executing, "execute_all", whole)
    pretended.clear()
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    total = sum(len(executing.cases(target, "glu", None, quick=True)) for target in ("sm_80", "sm_90"))
    assert len(pretended) == total - 3
    assert f"{total - 3} of {total} cases executed" in result.output
    found = json.loads(file.read_text())
    assert found["versions"]["triton"]
    assert [row["row"]["verdict"] for row in found["rows"]] == ["ok"] * total


def test_a_file_of_other_versions_is_kept(pretended, tmp_path, capsys):
    file = tmp_path / "rows.json"
    command = ["check", "--execute", "sm_80", "--quick", "--op", "glu", "--out", str(file)]
    for text, message in (
        (json.dumps({"schema": "flashgau-check-execute", "schema_version": 1, "versions": {}, "rows": []}), "of other"),
        ("{}", "holds no rows"),
        ("nothing", "holds no rows"),
    ):
        file.write_text(text)
        assert main(command) == 2
        assert message in capsys.readouterr().err
        assert file.read_text() == text


def test_counts_and_misses_are_shown(pretended, monkeypatch):
    result = runner.invoke(app, ["check", "--execute", "sm_80", "--quick", "--op", "glu", "--counts"])
    assert result.exit_code == 0, result.output
    assert "matrix FLOP" in result.output
    whole = executing.execute_all
    monkeypatch.setattr(
        executing,
        "execute_all",
        lambda work, processes: (
            (t, Row(r.op, r.options, r.shape, r.dtype, r.backend, "error", detail="Fault: race"))
            for t, r in whole(work)
        ),
    )
    result = runner.invoke(app, ["check", "--execute", "sm_80", "--quick", "--op", "glu"])
    assert result.exit_code == 1
    assert "Fault: race" in result.output


def test_kernels_run_in_earnest():
    """In processes that compile, whatever this one does."""
    result = runner.invoke(app, ["check", "--execute", "sm_90", "--quick", "--op", "glu", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["rows"]
    assert {row["backend"] for row in rows} == {"triton, sm_90"}
    for row in rows:
        assert row["verdict"] == "ok"
        assert row["max_error"] <= row["tolerance"]
        assert math.prod([row["counts"]["launches"], row["counts"]["read_bytes"], row["counts"]["written_bytes"]]) > 0

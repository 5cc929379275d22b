"""The command line: help, exit statuses, tables of launch configurations, and `doctor`."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from cli_runs import runner
from hypothesis import given
from hypothesis import strategies as st

import flashgau
from flashgau.cli import app, main
from flashgau.cli.doctor import OPERATIONS
from flashgau.tables import table

COMMANDS = ("doctor", "check", "train", "sample", "eval", "convert", "demo")


# The application ------------------------------------------------------------------------------------------


def test_help_names_every_command():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", result.output, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_and_plain_text(command):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"flashgau {command}" in result.output
    assert "Examples:" in result.output
    assert "\x1b" not in result.output


def test_version_and_python_m():
    result = subprocess.run([sys.executable, "-m", "flashgau", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["flashgau", flashgau.__version__]
    assert result.stderr == ""


def test_the_command_line_itself_does_not_import_pytorch():
    """Only `import flashgau` may; a command does when it runs."""
    code = (
        "import sys, types; package = types.ModuleType('flashgau'); package.__path__ = [sys.argv[1]];"
        "sys.modules['flashgau'] = package; import flashgau.cli; print('torch' in sys.modules)"
    )
    package = os.path.dirname(flashgau.__file__)
    result = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["nothing"]),
        (["check", "--nothing"], ["--nothing"]),
        (["check", "--seed", "many"], ["--seed", "integer"]),
        (["check", "--op", "softmax"], ["softmax", "gau_attention"]),
        (["check", "--backend", "cublas"], ["cublas", "eager"]),
        (["check", "--device", "abacus"], ["abacus"]),
        (["check", "--device", "privateuseone"], ["'privateuseone' cannot be used"]),
        (["check", "--device", "meta"], ["'meta' cannot be used"]),
        (["check", "--seed", str(2**64)], ["--seed"]),
        (["compile", "--processes", "1000000000"], ["--processes"]),
        (["demo", "--minutes", "0"], ["--minutes", "positive"]),
        (["demo", "--minutes", "nan"], ["--minutes", "positive"]),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, words, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("flashgau")
    assert output.err.count("\n") == 1
    for word in words:
        assert word in output.err


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


# tables of launch configurations -----------------------------------------------------------------------------


ODD = [None, True, -1, 0, 3, 2**40, 10**400, 1e30, 0.5, "", "a", "\ud800", [], [[1]], {}, {"a": 1}]
TABLE = {
    "format": 1, "gpu": "g", "architecture": "sm_90", "measured": True, "versions": {"torch": "2"}, "date": "",
    "entries": [{
        "kernel": "attention_dq", "itemsize": 2, "width": 64, "few_rows": False, "options": False,
        "config": {"block_m": 64, "block_n": 64, "block_k": 16, "num_warps": 4, "num_stages": 2},
        "ms": 1.5, "default_ms": 2.0,
    }],
}  # fmt: skip


@given(data=st.data())
def test_a_table_of_any_form_is_a_table_or_refused(data, tmp_path_factory):
    changed = json.loads(json.dumps(TABLE))
    places = [changed, changed["entries"][0], changed["entries"][0]["config"]]
    place = data.draw(st.sampled_from(places))
    key = data.draw(st.sampled_from([*sorted(place), "new", "new\nline"]))
    if data.draw(st.booleans()):
        place[key] = data.draw(st.sampled_from(ODD))
    else:
        place.pop(key, None)
    path = tmp_path_factory.mktemp("t") / "t.json"
    path.write_text(json.dumps(changed))
    try:
        found = table.read(path)
    except ValueError as error:
        message = str(error)
    else:
        message = f"{path}: "
        assert table.parse(table.dump(found), "again") == found
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"format": ' + b"1" * 5000 + b"}", b"NaN", b"\xff\xfe1"])
def test_files_that_are_no_json_are_refused_by_name(content, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.json: (not JSON|not UTF-8)"):
        table.read(path)
    with pytest.raises(ValueError, match="not a file"):
        table.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a file"):
        table.read(tmp_path / "pipe")


def test_lines_of_a_journal_of_any_form_count_for_nothing(tmp_path):
    pytest.importorskip("triton")
    from flashgau.tuning.searching import Journal

    row = {"key": {"kernel": "attention_dq", "itemsize": 2, "width": 64}, "versions": {"torch": "2"}}
    row |= {"config": TABLE["entries"][0]["config"], "ms": 1.5, "reason": None}
    odd = [{**row, name: value} for name in row for value in ODD if value is not None and (name, value) != ("ms", 0.5)]
    odd = [other for other in odd if not (isinstance(other["reason"], str) or type(other["ms"]) is int)]
    path = tmp_path / "j.jsonl"
    path.write_text("\n".join(["[" * 100_000, "7", *(json.dumps(other) for other in odd), json.dumps(row)]))
    found = Journal(path, {"torch": "2"}).read()
    assert [(key.kernel, outcome.ms) for (key, _), outcome in found.items()] == [("attention_dq", 1.5)]


# doctor ---------------------------------------------------------------------------------------------------


def test_doctor_json():
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert set(facts["versions"]) == {"python", "flashgau", "torch", "triton", "einops", "numpy"}
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["usable_cores"] >= 1
    assert facts["memory"]["total_bytes"] is None or facts["memory"]["total_bytes"] > 2**20
    assert set(facts["environment"]) == {"FLASHGAU_BACKEND", "FLASHGAU_TUNING", "TRITON_INTERPRET"}
    rows = {(row["op"], row["device"]): row for row in facts["backends"]}
    for op in OPERATIONS:
        row = rows[op, "cpu"]
        for dtype, chosen in row["default"].items():
            assert row["unusable_because"][dtype][chosen] is None


def test_doctor_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FLASHGAU_BACKEND", "reference")
    facts = json.loads(runner.invoke(app, ["doctor", "--json"]).output)
    assert facts["environment"]["FLASHGAU_BACKEND"] == "reference"
    assert {row["default"]["float32"] for row in facts["backends"] if row["device"] == "cpu"} == {"reference"}


def test_doctor_fails_when_no_backend_can_run(monkeypatch):
    monkeypatch.setenv("FLASHGAU_BACKEND", "abacus")
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "none" in result.output


def test_doctor_prints_plain_tables():
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    for op in OPERATIONS:
        assert op in result.output
    assert torch.__version__ in result.output

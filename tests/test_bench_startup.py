"""`python -m bench startup`: what it runs, writes and says. It asserts no times."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import __main__ as command_line
from bench import startup


@pytest.fixture
def few(monkeypatch):
    """One process of each sort in a round, and none that takes long."""
    monkeypatch.setattr(startup, "WHOLE", {"python, doing nothing": ["-c", "pass"]})
    monkeypatch.setattr(startup, "CALLS", {"glu": "print(0.25)"})
    monkeypatch.setattr(startup, "FIRST_CALL", "{call}")
    monkeypatch.setattr(startup, "LIMIT", 1e9)


@pytest.mark.parametrize("limit", [1e9, 0.0])
def test_a_record_and_a_table(limit, few, monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "LIMIT", limit)
    said, errors = io.StringIO(), io.StringIO()
    status = startup.main(2, tmp_path / "new", Console(file=errors), Console(file=said, width=120))
    assert status == (0 if limit else 1)
    record = json.loads((tmp_path / "new" / "startup.json").read_text())
    assert (record["schema"], record["schema_version"], record["limit_seconds"]) == ("flashgau-startup", 1, limit)
    assert set(record["seconds"]) == {"python, doing nothing", "glu"}
    assert record["seconds"]["glu"] == [0.25, 0.25]
    assert min(record["seconds"]["python, doing nothing"]) > 0
    assert "load_average_after" in record["machine"]
    for words in ("glu, first call", "2 processes of each", "startup.json"):
        assert words in said.getvalue()


def test_a_process_that_fails_is_named(few, monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "CALLS", {"glu": "raise SystemExit('broken')"})
    errors = io.StringIO()
    assert startup.main(1, tmp_path / "new", Console(file=errors), Console(file=io.StringIO())) == 1
    assert "bench startup: glu: broken" in errors.getvalue()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", startup.CALLS)
def test_the_calls_are_calls(name):
    """Each is the operation of its name, on tensors it takes."""
    assert startup.CALLS[name].startswith(f"flashgau.{name}(")
    exec(startup.FIRST_CALL.format(call=startup.CALLS[name]), {"print": lambda seconds: None})


def test_the_command_takes_it(few, tmp_path, capsys):
    assert command_line.main(["startup", "--quick", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "startup.json").read_text())["seconds"]["glu"]
    assert "glu, first call" in capsys.readouterr().out

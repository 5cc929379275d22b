"""`flashgau new-kernel` writes a kernel whose test passes, and fails where the kernel is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flashgau import cli


def run_tests(folder) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_my_gate.py"]
    return subprocess.run(command, cwd=folder, env={**os.environ}, capture_output=True, text=True, check=False)


def test_it_passes_as_written_and_sees_a_wrong_derivative(tmp_path, capsys):
    pytest.importorskip("triton")
    assert cli.main(["new-kernel", "my_gate", "--out", str(tmp_path)]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["my_gate.py", "test_my_gate.py"]
    assert "NAME" not in "".join(path.read_text() for path in tmp_path.iterdir())
    passed = run_tests(tmp_path)
    assert passed.returncode == 0, passed.stdout
    path = tmp_path / "my_gate.py"
    wrong = path.read_text().replace("b_do * 2 * b_relu", "b_do * 3 * b_relu")
    assert wrong != path.read_text()
    path.write_text(wrong)
    failed = run_tests(tmp_path)
    assert failed.returncode == 1
    assert any(line.split()[1:2] == ["dgate"] and line.endswith("MISS") for line in failed.stdout.splitlines())


def test_nothing_is_overwritten(tmp_path, capsys):
    path = tmp_path / "test_mine.py"
    path.write_text("mine")
    assert cli.main(["new-kernel", "mine", "--out", str(tmp_path)]) == 2
    assert f"{path} is there already" in capsys.readouterr().err
    assert [x.read_text() for x in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["class", "two words", "1st", "_hidden", "a-b", "a.b", "../a"])
def test_names_that_are_none_are_refused(name, tmp_path, capsys):
    assert cli.main(["new-kernel", name, "--out", str(tmp_path)]) == 2
    assert "expected a name of Python's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""The command line: what becomes of its output."""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings

import cli_runs
import pytest

from flashgau.cli import main
from flashgau.cli.console import with_outputs
from flashgau.cli.training import demo

folder = cli_runs.folder
small = cli_runs.small

TRAIN = ["train", "--data", "\u00d7.txt", "--steps", "3", "--length", "8", "--batch", "1", "--log-every", "1"]
TRAIN += ["--eval-windows", "1", "--validation-fraction", "0.2", "--device", "cpu"]
PRINTING = {
    "help": ["--help"],
    "version": ["--version"],
    "doctor": ["doctor"],
    "doctor-json": ["doctor", "--json"],
    "check": ["check", "--op", "glu"],
    "compile": ["compile", "--target", "sm_90"],
    "tune": ["tune", "--show", "--device", "cpu"],
    "sample": ["sample", "\u00e9.safetensors", "--max-new", "60", "--seed", "1", "--prompt", "\u2264"],
    "sample-json": ["sample", "\u00e9.safetensors", "--max-new", "3", "--json"],
    "eval": ["eval", "\u00e9.safetensors", "--data", "\u00d7.txt", "--context", "100"],
    "train": TRAIN,
    "train-json": [*TRAIN, "--json"],
    "demo": ["demo"],
    "demo-json": ["demo", "--json"],
}


def in_a_new_folder(arguments, tmp_path):
    """The command line, with what it writes in `tmp_path`."""
    writes = arguments[0] in ("train", "demo")
    return [*arguments, "--out", str(tmp_path / "\u2264\u00d7")] if writes else arguments


def what_is_kept(name, tmp_path):
    """The run or demo that a command has written is there, to its end."""
    out = tmp_path / "\u2264\u00d7"
    if name.startswith("train"):
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert steps == [0, 1, 2, 3, 3]
        assert {"last.safetensors", "best.safetensors"} <= {path.name for path in out.iterdir()}
    elif name.startswith("demo"):
        assert json.loads((out / demo.FACTS).read_text())["finished"] is True
        assert (out / demo.REPORT).exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", PRINTING)
def test_every_command_prints_in_any_encoding(name, encoding, small, tmp_path):
    """PYTHONIOENCODING makes such streams: strict for the output; of errors what is lacking is escaped."""
    if name in ("compile", "tune"):
        pytest.importorskip("triton")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(in_a_new_folder(PRINTING[name], tmp_path))
    text = out.buffer.getvalue().decode(encoding)
    assert status == 0, (text, err.buffer.getvalue())
    assert text.strip()
    if name.endswith("json"):
        json.loads(text)
    if name == "sample":
        assert text.startswith("?")  # U+2264 is in neither
    what_is_kept(name, tmp_path)


@contextlib.contextmanager
def outputs(kind, both):
    """Standard output (and standard error, if `both`) that cannot be written; gives what is written to the latter."""
    if kind == "reader gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    found = io.StringIO()
    with (
        os.fdopen(writer, "w", encoding="utf-8") as out,
        os.fdopen(os.dup(writer), "w", encoding="utf-8") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err if both else found),
    ):
        yield found


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device is always full here")


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["reader gone", pytest.param("full", marks=needs_full)])
@pytest.mark.parametrize("name", PRINTING)
def test_every_command_survives_its_output(name, kind, both, small, tmp_path):
    """One line tells of it, if that can be told; a run goes on to its end; only a full output is a failure."""
    if name in ("compile", "tune"):
        pytest.importorskip("triton")
    with outputs(kind, both) as errors:
        status = main(in_a_new_folder(PRINTING[name], tmp_path))
    assert status == (1 if kind == "full" else 0)
    if not both:
        lines = errors.getvalue().splitlines()
        reason = "No space left on device" if kind == "full" else "Broken pipe"
        assert lines[-1] == f"flashgau: cannot write to standard output: {reason}"
        assert "Traceback" not in errors.getvalue()
        if not name.startswith(("train", "demo")):
            assert len(lines) == 1
    what_is_kept(name, tmp_path)


def test_a_sample_ends_with_its_reader(small, monkeypatch):
    from flashgau.models import language

    drawn = []
    draw = language.sample
    monkeypatch.setattr(language, "sample", lambda *arguments: drawn.append(1) or draw(*arguments))
    with outputs("reader gone", both=False):
        assert main(["sample", "\u00e9.safetensors", "--max-new", "100000"]) == 0
    assert len(drawn) < 5


@pytest.mark.parametrize(
    ("redirection", "status", "line"),
    [
        (None, 0, "Broken pipe"),
        (">&-", 1, "Bad file descriptor"),
        pytest.param(">/dev/full", 1, "No space left on device", marks=needs_full),
    ],
)
def test_a_process_ends_in_peace_without_its_output(redirection, status, line):
    """Neither does Python complain when it ends. None: a pipe that nobody reads."""
    help_ = [sys.executable, "-c", "import sys; from flashgau.cli import main; sys.exit(main(['--help']))"]
    if redirection is None:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer) as out:
            done = subprocess.run(help_, stdout=out, stderr=subprocess.PIPE, text=True)
    else:
        shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
        done = subprocess.run([*shell, *help_], stderr=subprocess.PIPE, text=True)
    assert done.stderr.splitlines() == [f"flashgau: cannot write to standard output: {line}"]
    assert done.returncode == status


def test_warnings_are_one_line_and_all_is_restored(capsys):
    def action():
        warnings.warn("a table\nis skipped", RuntimeWarning, stacklevel=1)
        return 3

    before = sys.stdout, sys.stderr, sys.stdout.errors, warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: sys.stderr.write(warnings.formatwarning(message, *_))
        assert with_outputs("program", action) == 3
    assert capsys.readouterr().err == "program: a table is skipped\n"
    assert (sys.stdout, sys.stderr, sys.stdout.errors, warnings.formatwarning) == before

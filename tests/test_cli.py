"""The command line: help, JSON, exit statuses, and the parts of the demo and its report."""

import base64
import contextlib
import html.parser
import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import flashgau
from flashgau.cli import app, demo, doctor, main, report
from flashgau.cli.console import with_outputs
from flashgau.cli.doctor import OPERATIONS
from flashgau.tuning import table
from flashgau.verification import checking as check
from flashgau.verification import measuring as measure
from flashgau.verification.cases import ACTIVATIONS, all_cases

runner = CliRunner()
COMMANDS = ("doctor", "check", "train", "sample", "eval", "demo")


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


# what becomes of the output ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and names that few encodings have."""
    from flashgau.models import CausalLM, ModelConfig

    place = tmp_path_factory.mktemp("\u2264\u00e9")
    CausalLM(ModelConfig(dim=8, depth=1, key_dim=4, chunk_size=4)).save(place / "\u00e9.safetensors")
    (place / "\u00d7.txt").write_text("\u00e9" * 500, encoding="utf-8")
    return place


@pytest.fixture
def small(monkeypatch, folder):
    """Every command does little."""
    from flashgau.models import CausalLM, ModelConfig
    from flashgau.training import trainer

    tiny = ModelConfig(dim=8, depth=1, key_dim=4, chunk_size=4)
    few_cases(monkeypatch, "glu")
    monkeypatch.setattr(trainer, "_build", lambda config: (CausalLM(tiny), tiny.to_dict()))
    monkeypatch.setattr(trainer, "loss_plot", lambda rows, path, title: path.write_bytes(b"plot"))
    monkeypatch.setattr(demo.Demo, "train", lambda self: self.say("\u2264\u00d7\ufffd"))
    monkeypatch.setattr(demo.Demo, "sample", lambda self: None)
    monkeypatch.setattr(demo.Demo, "measure", lambda self: None)
    monkeypatch.setattr("flashgau.tuning.ahead.compile_all", lambda jobs, processes: iter(()))
    monkeypatch.chdir(folder)


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
    from flashgau.tuning.search import Journal

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


# check ----------------------------------------------------------------------------------------------------


def test_the_cases_cover_every_option():
    cases = all_cases()
    assert {case.op for case in cases} == set(OPERATIONS)
    assert {case.dtype for case in cases} == {"float32", "bfloat16", "float16", "float64"}
    assert len({case.key for case in cases}) == len(cases)

    used: dict[str, set] = {op: set() for op in OPERATIONS}
    values: dict[tuple[str, str], set] = {}
    for case in cases:
        if case.dtype != "float32":
            continue
        _, keywords = case.arguments(torch.device("cpu"))
        used[case.op] |= set(keywords)
        for name, value in keywords.items():
            if isinstance(value, str | bool | float | int):
                values.setdefault((case.op, name), set()).add(value)
    attention = "causal scale window softcap rel_bias sinks lengths cu_seqlens cu_seqlens_k dropout_p dropout_seed"
    assert used["attention"] == {*attention.split(), "return_lse"}
    assert values["glu", "activation"] == values["glu", "up_activation"] == set(ACTIVATIONS)
    assert values["glu_linear", "activation"] | {"silu"} == set(ACTIVATIONS)
    assert values["glu_linear", "up_activation"] | {"identity"} == set(ACTIVATIONS)
    assert {"b_gate", "b_up", "recompute"} <= used["glu_linear"]
    assert values["gau_attention", "score"] == {"laplace", "softmax", "softmax_plus"}  # relu2 is the default
    assert values["gau_attention", "normalizer"] == {"row", 4.0}
    assert {"causal", "rel_bias", "lengths", "cu_seqlens"} <= used["gau_attention"]
    assert values["mixed_chunk_attention", "score"] == {"relu2", "laplace"}
    assert {"quad_normalizer", "lin_normalizer", "rel_bias", "lengths", "cu_seqlens"} <= used["mixed_chunk_attention"]
    assert {"initial_state", "return_state", "chunk_size"} <= used["mixed_chunk_attention"]
    assert {"state", "score", "quad_normalizer", "lin_normalizer", "rel_bias"} == used["mixed_chunk_step"]


def test_a_case_draws_the_same_values_again_and_others_with_another_seed():
    case = all_cases("glu")[0]
    first, again, other = (case.arguments(torch.device("cpu"), seed)[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_check_rows_are_complete():
    result = runner.invoke(app, ["check", "--op", "glu_linear", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["cases"] == len(facts["rows"]) == len(all_cases("glu_linear"))
    assert facts["missed"] == 0
    for row in facts["rows"]:
        assert row["verdict"] == "ok"
        assert {"out", "dx", "dw_gate", "dw_up"} <= {tensor["name"] for tensor in row["tensors"]}
        assert row["backend"] == "eager"
        assert row["max_error"] <= row["tolerance"]
        assert row["plain_max_error"] >= 0


def test_check_refuses_a_backend_that_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(
        "flashgau.ops.dispatch.explain", lambda op, device, dtype: {"triton": "it is asleep", "eager": None}
    )
    assert main(["check", "--op", "glu", "--backend", "triton"]) == 2
    assert "it is asleep" in capsys.readouterr().err


def few_cases(monkeypatch, op, count=3):
    """Let check run only the first cases of an operation."""
    cases = all_cases(op)[:count]
    monkeypatch.setattr("flashgau.verification.checking.all_cases", lambda *_: cases)


def test_check_finds_a_wrong_operation(monkeypatch):
    few_cases(monkeypatch, "glu", 49)
    right = flashgau.glu

    def glu(gate, up=None, *, activation="silu", up_activation="identity", backend=None):
        out = right(gate, up, activation=activation, up_activation=up_activation, backend=backend)
        return out * 1.001 if activation == "gelu" else out

    monkeypatch.setattr(flashgau, "glu", glu)
    result = runner.invoke(app, ["check", "--op", "glu"])
    assert result.exit_code == 1
    missed = [line for line in result.output.splitlines() if " miss" in line and line.startswith(" glu ")]
    assert len(missed) == len(ACTIVATIONS)
    assert all(" gelu * " in line for line in missed)
    assert "49 cases on cpu" in result.output
    assert "7 missed" in result.output


def test_check_survives_a_call_that_fails(monkeypatch):
    few_cases(monkeypatch, "glu")

    def glu(gate, up=None, **options):
        raise RuntimeError("the abacus\nis broken")

    monkeypatch.setattr(flashgau, "glu", glu)
    result = runner.invoke(app, ["check", "--op", "glu", "--json"])
    assert result.exit_code == 1
    rows = json.loads(result.output)["rows"]
    assert [row["verdict"] for row in rows] == ["error"] * 3
    assert rows[0]["detail"] == "RuntimeError: the abacus is broken"
    assert rows[0]["max_error"] is None


def test_json_has_no_nan(monkeypatch):
    few_cases(monkeypatch, "glu", 1)
    monkeypatch.setattr(flashgau, "glu", lambda gate, up=None, **options: gate * up * math.nan)
    flashgau.glu.__name__ = "glu"
    result = runner.invoke(app, ["check", "--op", "glu", "--json"])
    assert result.exit_code == 1
    json.loads(result.output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# demo: measuring ------------------------------------------------------------------------------------------


def test_peak_memory_is_exact():
    """Two blocks of 4 MB are alive at once, the third comes after one is gone."""

    def run():
        a = torch.empty(1_000_000)
        b = torch.empty(1_000_000)
        del a
        c = torch.empty(500_000)
        del b, c

    assert measure.peak_memory(run, torch.device("cpu")) == pytest.approx(8_000_000, rel=0.001)


def test_measure_covers_all_and_stops_when_it_takes_too_long(monkeypatch):
    """By a clock that goes on by a millisecond whenever it is read."""
    now = iter(range(10**6))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: 1e-3 * next(now)))
    sizes = measure.Sizes(width=16, heads=2, narrow=8, chunk=16)
    points = measure.measure([32, 64], budget=30.0, rounds=3, sizes=sizes)
    assert [(point.provider, point.length) for point in points] == [
        (provider, length) for length in (32, 64) for provider in measure.PROVIDERS
    ]
    assert all(point.median > 0 and point.peak_bytes > 0 for point in points)

    points = measure.measure([32, 64], budget=1e-9, rounds=3, sizes=sizes)
    assert [point.skipped is None for point in points] == [True] * 3 + [False] * 3
    points = measure.measure([32, 64], budget=30.0, rounds=3, sizes=sizes, memory_limit=1)
    assert all("memory" in point.skipped for point in points[3:])


def test_naive_attention_of_the_plot_is_attention():
    q, k, v = torch.randn(3, 1, 2, 17, 4, dtype=torch.float64)
    torch.testing.assert_close(measure._naive(q, k, v), flashgau.reference.attention(q, k, v, causal=True))


# demo: the report -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts():
    """What a demo finds, small, with text that HTML must escape."""
    pairs = [(case, "eager") for case in all_cases("glu")[:3]]
    rows = check.run_cases(pairs, torch.device("cpu"))
    points = [
        measure.Point(provider, length, (1e-6 * length,), 1000 * length)
        for length in (256, 512)
        for provider in measure.PROVIDERS
    ]
    points[-1] = measure.Point("FLASH", 512, skipped="would take too long")
    log = [{"kind": "train", "step": step, "loss": 5.5 - 0.1 * step} for step in range(10)]
    return {
        "version": "1.2.3",
        "started": "2026-01-02 03:04 UTC",
        "finished": True,
        "seconds": 200.0,
        "device": "cpu",
        "doctor": doctor.collect(),
        "check": {
            "extent": "Everything",
            "cases": 3,
            "missed": 0,
            "seconds": 1.0,
            "summary": check.summary(rows),
            "rows": [vars(row) for row in rows],
        },
        "training": {
            "config": {"batch": 8, "accumulate": 1, "length": 512},
            "parameters": 12345,
            "step": 10,
            "elapsed_seconds": 150.0,
            "bits_per_byte": 2.5,
            "tokens_per_second": 1e4,
            "data_source": "<the library>",
            "interrupted": False,
            "log": [*log, {"kind": "validation", "step": 9, "loss": 4.7}],
        },
        "sample": {
            "prompt": "def ",
            "text": "f(a):\n    return a < b && '<script>'",
            "new_bytes": 30,
            "temperature": 0.8,
            "bytes_per_second": 100.0,
            "state_bytes": [4096, 4096],
        },
        "sizes": vars(measure.Sizes()),
        "measurements": [point.to_dict() for point in points],
    }


class Page(html.parser.HTMLParser):
    """Collects headings, pictures, text, and checks that tags match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.pictures, self.outside = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.pictures.append(values)
        self.outside += [values[name] for name in ("src", "href", "action") if name in values]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_report_is_complete_and_self_contained(facts):
    text = report.render(facts)
    page = Page(text)
    assert page.open == []
    assert page.headings == ["flashgau demo", *(title for title, _, _ in report.SECTIONS)]
    assert len(page.pictures) == 3
    assert all(value.startswith("data:image/png;base64,") for value in page.outside)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    for picture in page.pictures:
        assert picture["alt"]
        png = base64.b64decode(picture["src"].partition(",")[2], validate=True)
        assert_png(png)
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "&lt;the library&gt;" in text
    assert "would take too long" in text
    assert "3 / 3" in text


def assert_png(data):
    """A PNG whose every chunk has its right checksum, not tiny."""
    import struct
    import zlib

    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, kinds = 8, []
    while place < len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            assert min(struct.unpack(">II", body[:8])) >= 300
        kinds.append(kind)
        place += 12 + length
    assert kinds[-1] == b"IEND"


def test_report_of_every_unfinished_demo(facts):
    """Whatever stage it was stopped in, the page says what is missing."""
    stages = ("doctor", "check", "training", "sample", "measurements")
    for done in range(len(stages)):
        partial = {key: value for key, value in facts.items() if key not in stages[done:]}
        text = report.render({**partial, "finished": False})
        page = Page(text)
        assert len(page.headings) == 1 + len(report.SECTIONS)
        assert "stopped before its end" in text
        missing = sum(key not in partial for _, key, _ in report.SECTIONS)
        assert text.count("Not done.") == missing > 0


def test_report_without_a_single_measurement(facts):
    skipped = [
        {**p, "median": None, "peak_bytes": None, "skipped": "would take too long"} for p in facts["measurements"]
    ]
    training = {**facts["training"], "log": [], "bits_per_byte": None, "tokens_per_second": None}
    page = Page(report.render({**facts, "measurements": skipped, "training": training}))
    assert page.pictures == []


# demo: its folder and stages ------------------------------------------------------------------------------


def test_an_older_demo_is_kept(tmp_path):
    out = tmp_path / "runs" / "demo"
    assert demo.fresh_folder(out) is None
    assert demo.fresh_folder(out) is None  # empty: nothing to keep
    for number in (1, 2, 3):
        (out / demo.FACTS).write_text(str(number))
        (out / "own.txt").write_text("mine")
        assert demo.fresh_folder(out) == out.with_name(f"demo.{number}")
        assert list(out.iterdir()) == []
    for number in (1, 2, 3):
        kept = out.with_name(f"demo.{number}")
        assert (kept / demo.FACTS).read_text() == str(number)
        assert (kept / "own.txt").read_text() == "mine"


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "not an older demo" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "thesis.tex")]) == 1
    assert "not a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_ctrl_c_leaves_a_report_of_what_was_done(tmp_path, monkeypatch):
    few_cases(monkeypatch, "glu")

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Demo, "train", interrupted)
    out = tmp_path / "demo"
    result = runner.invoke(app, ["demo", "--out", str(out)])
    assert result.exit_code == 130
    assert str(out / "report.html") in result.output.replace("\n", "")
    facts = json.loads((out / demo.FACTS).read_text())
    assert facts["finished"] is False
    assert facts["check"]["cases"] == 3
    assert "training" not in facts
    text = (out / demo.REPORT).read_text()
    assert "3 / 3" in text
    assert text.count("Not done.") == 4


def test_the_state_of_the_sample_has_constant_size():
    from flashgau.models import CausalLM, ModelConfig

    model = CausalLM(ModelConfig.named("flash-tiny", depth=1)).eval()
    short, long = (demo.state_bytes(model, torch.zeros(1, n, dtype=torch.int64)) for n in (3, 300))
    assert short == long > 0

"""The command line: help, JSON, exit statuses, and the parts of the demo and its report."""

import base64
import html.parser
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import flashgau
from flashgau.cli import app, check, demo, doctor, main, measure, report
from flashgau.cli.cases import ACTIVATIONS, all_cases
from flashgau.cli.doctor import OPERATIONS

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
    monkeypatch.setattr("flashgau.cli.cases.all_cases", lambda *_: cases)


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


def test_measure_covers_all_and_stops_when_it_takes_too_long():
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

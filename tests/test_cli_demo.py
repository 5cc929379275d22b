"""The command line: the parts of the demo, and its report."""

import base64
import html.parser
import json
from types import SimpleNamespace

import cli_runs
import pytest
import torch
from cli_runs import few_cases, runner

import flashgau
from flashgau.cli import app, main
from flashgau.cli.training import demo, report
from flashgau.cli.training import measuring as measure

facts = cli_runs.facts


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

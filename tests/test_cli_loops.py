"""Hot loops on the command line: what `compile --loops` tells and is held to, and what `tune --model` ranks."""

import dataclasses
import json
import os

import pytest
import torch
import tuning_tables

pytest.importorskip("triton")
from flashgau import tables
from flashgau.cli import main
from flashgau.cli.instruments import loops
from flashgau.roof import modelling
from flashgau.sass import HotLoop
from flashgau.tables.config import Config
from flashgau.tuning import ahead, searching
from flashgau.verification import candidates

folder = tuning_tables.folder

COMPILE = ["compile", "--loops", "--target", "sm_90"]


def test_loops_are_recorded_and_held_to_what_was_recorded(tmp_path, capsys):
    """One kernel, compiled for sm_90; then the record says that it was better."""
    file = tmp_path / "loops.json"
    chosen = [*COMPILE, "--kernel", "gau_gradient", "--dtype", "bf16", "--shapes", "128", "--processes", "1"]
    assert main([*chosen, "--out", str(file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows
    for row in rows:
        assert (row["target"], row["kernel"], row["redundancy"], row["spills"]) == ("sm_90", "gau_gradient", 1, 0)
        assert sum(row["classes"].values()) == row["instructions"]
        assert row["clocks"]["total"] > 0
        assert row["rate"] <= row["overlap"]

    assert main([*chosen, "--against", str(file)]) == 0
    out = capsys.readouterr().out
    assert "no loop is worse than recorded" in out
    assert f"{len(rows)} hot loops, " in out

    faster = {**rows[0], "total": rows[0]["clocks"]["total"] / 1.06}
    others = [{**faster, "loop": 7}, {**faster, "loop": 7, "kernel": "gau_lse"}]
    file.write_text(json.dumps({**loops.SCHEMA, "rows": [faster, *rows[1:], *others]}))
    assert main([*chosen, "--against", str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["against"]
    assert [line.partition(": ")[2].split()[1:3] for line in found["worse"]] == [["modelled", "clocks,"]]
    assert [line[-6:] for line in found["gone"]] == ["loop 7"]


def test_spills_outside_hot_loops_are_reported_not_failed(monkeypatch, capsys):
    """And those inside are a reason."""
    job = ahead.jobs(["sm_90"])[0]
    cold = dataclasses.replace(ahead._row(job)(), spills=9, ok=True)
    monkeypatch.setattr(ahead, "compile_all", lambda jobs, processes: iter([cold]))
    assert main(["compile", "--target", "sm_90", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["spills"] == 9
    monkeypatch.setattr(ahead, "compile_all", lambda jobs, processes: iter([dataclasses.replace(cold, loops=None)]))
    assert main(["compile", "--target", "sm_90", "--json"]) == 0
    assert capsys.readouterr().err.endswith("1 kernels spill; whether inside a hot loop, flashgau-instruments tells: "
                                            "pip install ./wheels/instruments, in a checkout\n")  # fmt: skip
    bad = dataclasses.replace(cold, ok=False, reason="9 spill instructions in a hot loop")
    monkeypatch.setattr(ahead, "compile_all", lambda jobs, processes: iter([bad]))
    assert main(["compile", "--target", "sm_90", "--loops"]) == 1
    assert "9 spill instructions in a hot loop" in capsys.readouterr().out


@pytest.fixture
def modelled(monkeypatch):
    """Candidates are not compiled: a loop's rate is its rows, so that the largest blocks rank first."""

    def compile(work, processes=None):
        for job in work:
            loop = HotLoop(
                100, {}, {}, 64, 2**20, 1.0, 1.0, 0, 0, True, 0, 0, 0, {}, rate=job.config.block_m, bound="exp"
            )
            row = ahead._row(job)(ok=job.config.num_warps == 4, reason="spills", loops=(loop,))
            yield job, row

    monkeypatch.setattr(ahead, "compile_each", compile)


@pytest.mark.usefixtures("modelled")
def test_a_model_ranks_candidates_without_a_gpu(capsys):
    arguments = [
        "tune",
        "--model",
        "--target",
        "sm_90",
        "--kernel",
        "attention_forward",
        "--shapes",
        "128",
        "--top",
        "3",
    ]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {key for key in tables.shipped_table("sm_90").entries if key[:3] == ("attention_forward", 2, 128)}
    assert {tables.Key(*(row[name] for name in tables.Key._fields)) for row in found["rows"]} == keys
    for key in keys:
        rows = [row for row in found["rows"] if row["few_rows"] == key.few_rows]
        assert [row["place"] for row in rows][:3] == [1, 2, 3]
        assert [row["rate"] for row in rows] == sorted((row["rate"] for row in rows), reverse=True)
        assert {row["choice"]["num_warps"] for row in rows} == {4}
    assert main(arguments) == 0
    assert "2 of 2 entries have loops to model; nothing was measured or written" in capsys.readouterr().out


def test_only_the_best_of_a_model_are_measured(monkeypatch):
    starts = [ahead.Job("sm_90", "attention_dq", "bf16", 64, "causal", Config(64, 64))]
    key, among = starts[0].key, frozenset({Config(128, 64), Config(128, 64, 8)})
    search = searching.Search(starts, None, None, searching.Journal(tables.user_path(torch.device("cpu")), {}), None)
    narrowed = dataclasses.replace(search, among={key: among})
    assert {job.config for _, job in narrowed.candidates()} == among | {Config(64, 64)}
    assert len(search.candidates()) > 3
    rates = [HotLoop(1, {}, {}, 64, 2**20, 1.0, 1.0, 0, 0, free, 0, 0, 0, {}, rate=rate) for free, rate in
             ((True, 400.0), (True, 800.0), (False, 1.0))]  # fmt: skip
    assert modelling.combined_rate(rates) == pytest.approx(2 / (1 / 400 + 1 / 800))
    assert modelling.combined_rate([]) is None
    found = [modelling.Modelled(dataclasses.replace(starts[0], config=Config(m, 64)), rate) for m, rate in
             ((16, 3.0), (32, 9.0), (64, None), (128, 5.0))]  # fmt: skip
    assert modelling.best(modelling.ranking(found), 2) == {key: {Config(32, 64), Config(128, 64)}}


@pytest.mark.usefixtures("modelled")
def test_a_search_begins_from_the_best_of_the_model(monkeypatch, capsys):
    """Two of each entry, by the largest blocks of rows, and the one that the table has."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, and Triton compiles")
    timed = []
    monkeypatch.setattr(candidates.Bench, "check", lambda self, job: None)
    monkeypatch.setattr(candidates.Bench, "clock", lambda self, job: timed.append(job) or 1.0)
    arguments = ["tune", "--model", "--device", "cpu", "--kernel", "attention_dq", "--dtype", "fp32", "--shapes", "64"]
    assert main([*arguments, "--top", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (start,) = candidates.starts(
        torch.device("cpu"), candidates.Wanted(None, frozenset({"attention_dq"}), ("fp32",), (64,))
    )
    others = [job.config for job in timed if job.config != start.config]
    assert (found["candidates"], found["untried"]) == (len(others) + 1, 0)
    assert 1 <= len(others) <= 2
    assert {c.block_m for c in others} == {max(c.block_m for _, c in searching.space(start.key, start.config))}


def test_a_gpu_without_a_model_is_refused(capsys):
    assert main(["tune", "--model", "--target", "gfx942", "--op", "glu_linear"]) == 1
    assert "tune: there is no model of gfx942; expected one of sm_80, " in capsys.readouterr().err

"""Options that choose kernels and shapes: what `flashgau compile` compiles, and what `flashgau tune --show` shows."""

import contextlib
import dataclasses
import json

import pytest
import torch
import tuning_tables

pytest.importorskip("triton")
from flashgau import tables
from flashgau.cli import main
from flashgau.tuning import ahead, shipped

folder = tuning_tables.folder


@pytest.fixture
def compiled(monkeypatch):
    """The jobs that `flashgau compile` would compile."""
    found: list[ahead.Job] = []
    monkeypatch.setattr(ahead, "compile_all", lambda jobs, processes: iter(found.extend(jobs) or ()))
    return found


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ("--op attention", lambda j: ahead.op_of(j.entry) in ("attention", "derivatives")),
        ("--op gau_attention", lambda j: ahead.op_of(j.entry) in ("gau_attention", "projection", "heads", "norm")),
        ("--dtype bf16", lambda j: j.dtype == "bf16"),
        ("--dtype fp16,fp32 --op glu", lambda j: j.dtype != "bf16" and ahead.op_of(j.entry) == "glu"),
        ("--kernel attention_dq,glu_linear", lambda j: j.key.kernel in ("attention_dq", "glu_linear")),
        ("--shapes 64,256", lambda j: j.width in (0, 64, 256)),
        ("--op glu,attention --width 80 --kernel second_dq", lambda j: j.entry == "second_dq" and j.width == 128),
        (
            "--op attention --heads 32 --kv-heads 1",
            lambda j: ahead.op_of(j.entry) in ("attention", "derivatives") and not j.key.few_rows,
        ),
    ],
)
def test_compile_honours_filters(options, keeps, compiled):
    """Of all jobs those that fit, for each target."""
    assert main(["compile", "--target", "sm_80,gfx942", *options.split()]) == 0
    everything = ahead.jobs(["sm_80", "gfx942"])
    plain = [dataclasses.replace(j, shape=shipped.CallShape()) for j in compiled]
    assert plain == [j for j in everything if keeps(j)]
    assert 0 < len(plain) < len(everything)


def test_compile_takes_a_shape(compiled, monkeypatch):
    options = "--kernel attention_dq --dtype bf16 --length 96 --batch 3 --heads 6 --kv-heads 2 --width 80"
    assert main(["compile", "--target", "sm_90", *options.split()]) == 0
    seen = []
    entry = dataclasses.replace(shipped.ENTRIES["attention_dq"], call=lambda *call: seen.append(call))
    monkeypatch.setitem(ahead.ENTRIES, "attention_dq", entry)
    monkeypatch.setattr(ahead, "compiling_for", lambda target, only: contextlib.nullcontext([]))
    rows = [ahead.compile_one(job) for job in compiled]
    assert seen
    for (kind, width, make), row in zip(seen, rows, strict=True):
        assert (width, make.dtype, make.shape) == (80, torch.bfloat16, shipped.CallShape(96, 3, 6, 2, 80))
        assert row.shape == f"D=80, {kind}"
        assert (row.ok, row.reason) == (False, "a call of this shape never starts the kernel")


@pytest.mark.parametrize("target", ["sm_90", "sm_103", "gfx942"])
def test_show_takes_an_architecture_that_is_not_there(target, capsys):
    assert main(["tune", "--show", "--target", target, "--op", "glu_linear", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["device"] == target
    table = tables.shipped_table({"sm_103": "sm_100"}.get(target, target))
    expected = {key: e for key, e in table.entries.items() if key.kernel.startswith("glu_linear")}
    found = {tables.Key(*(row[name] for name in tables.Key._fields)): row["choice"] for row in shown["rows"]}
    assert found == {key: dataclasses.asdict(entry.choice) for key, entry in expected.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("compile --op softmax", "compile: no operation is called 'softmax'"),
        ("compile --kernel glu_linear_fused", "compile: no kernel is called 'glu_linear_fused'"),
        ("compile --dtype fp8", "compile: --dtype is 'fp8'"),
        ("compile --shapes 80", "compile: --shapes is '80'"),
        ("compile --heads 6 --kv-heads 4", "compile: --kv-heads is 4 of --heads 6; expected a divisor"),
        ("compile --kernel heads --op glu", "compile: there is no kernel of this target"),
        ("compile --target h100 --op glu", "compile: `target` is 'h100'"),
        ("tune --show --target h100", "tune: `target` is 'h100'"),
        ("tune --target sm_90", "tune: --target is 'sm_90' without --show"),
        ("tune --model --target h100", "tune: `target` is 'h100'"),
        ("tune --top 3", "tune: --top is 3 without --model"),
        ("compile --against loops.json", "compile: --against is given without --loops or --operations"),
        ("compile --out loops.json", "compile: --out is given without --loops or --operations"),
    ],
)
def test_what_fits_nothing_is_refused(arguments, words, compiled, capsys):
    assert main(arguments.split()) == 2
    assert words in capsys.readouterr().err
    assert not compiled

"""The papers' claims: statistics and verdicts of made-up records, the journal, trials that go on, and all five run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("matplotlib")

from bench import __main__ as command_line  # noqa: E402
from bench.claims import (  # noqa: E402  # noqa: E402
    NAMES,
    Settings,
    Trial,
    attention_memory,
    contest,
    flash_lengths,
    gau_memory,
    gau_vs_transformer,
    glu_variants,
    load,
    run,
    statistics,
    table,
    train,
    variants,
)
from bench.claims.statistics import CONFIRMED, OPEN, REFUTED, UNFINISHED, Comparison, Interval, compare, exact, interval  # noqa: E402


def test_the_quantiles_are_those_of_student():
    """Of the density of t, integrated, 95% lies between them."""
    for degrees, quantile in enumerate(statistics.T95, 1):
        x = np.linspace(0, quantile, 20001)
        scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        assert abs(2 * np.trapezoid(density, x) - 0.95) < 2e-4, degrees


def test_intervals_hold_the_mean_as_often_as_they_say():
    draws = np.random.Generator(np.random.Philox(key=3)).normal(2.0, 1.5, (4000, 4))
    held = [found.low <= 2.0 <= found.high for found in map(interval, draws.tolist())]
    assert abs(np.mean(held) - 0.95) < 0.015
    assert interval([1.0]) == Interval(1.0, None, None, 1)


@pytest.mark.parametrize(
    ("low", "high", "published", "outcome"),
    [
        (-3.0, -1.0, -2.0, CONFIRMED),
        (-3.0, 1.0, -2.0, OPEN),  # cannot tell what was published from nothing
        (-1.0, 1.0, -2.0, REFUTED),  # can
        (-1.0, 1.0, None, OPEN),
        (0.5, 1.0, -2.0, REFUTED),
        (None, None, -2.0, OPEN),
    ],
)
def test_a_comparison_is_judged_by_its_interval(low, high, published, outcome):
    assert Comparison("a", Interval(0.0, low, high, 3), published).outcome == outcome


def test_a_verdict_is_that_of_its_worst_part():
    good, bad, unclear = Comparison("g", exact(-1.0)), Comparison("b", exact(1.0)), Comparison("u", interval([1.0]))
    assert statistics.verdict("c", [good]).outcome == CONFIRMED
    assert statistics.verdict("c", [good, unclear]).outcome == OPEN
    assert statistics.verdict("c", [good, unclear, bad]).outcome == REFUTED
    assert statistics.verdict("c", []).outcome == OPEN
    assert "no trial" in statistics.verdict("c", []).sentence
    part = statistics.unfinished(statistics.verdict("It holds", [good]))
    assert part.outcome == statistics.UNFINISHED
    assert part.sentence.startswith("It holds: not finished (")
    assert part.comparisons == (good,)


def test_pairs_take_the_spread_of_seeds_away():
    """What all contestants of a seed share says nothing of their difference."""
    theirs = [2.0, 3.0, 4.0]
    found = compare("a", [0.99 * x for x in theirs], theirs).found
    np.testing.assert_allclose([found.mean, found.low, found.high], [-1.0] * 3)


def test_costs_and_crossings_are_found_again():
    a, b = statistics.cost([(n, 3.0 + 0.002 * n) for n in (512, 1024, 4096)])
    np.testing.assert_allclose([a, b], [3.0, 0.002])
    a, b = statistics.cost([(n, 3.0 - 1e-4 * n) for n in (512, 1024, 4096)])  # falls: no negative part
    assert b == 0
    assert 2.5 < a < 3.0
    np.testing.assert_allclose(statistics.crossings([(n, 300 / n) for n in (64, 256, 1024, 4096)]), [300], rtol=1e-3)


def settings_of(name: str, **other: Any) -> Settings:
    return Settings(**({"claim": name, "scale": "cpu", "minutes": 10.0, "seeds": 3} | other))


def finished(settings: Settings, found: contest.Contest, loss: Any) -> dict[str, Any]:
    """Results of a contest whose losses are `loss(name, lr, seed)`; a pace of a second for everyone."""
    results: dict[str, Any] = {contest.PACE: {"seconds": dict.fromkeys(found.models, 0.1), "reading": 0.0}}
    while True:
        left = [trial for trial in found.trials(settings, results) if trial.key not in results]
        if not left:
            return results
        for trial in left:
            name = trial.key.split("/")[1]
            results[trial.key] = {"loss": loss(name, trial.spec["lr"], trial.spec["seed"]), "curve": []}


def test_every_contestant_searches_and_spends_alike():
    settings = settings_of("glu-variants")
    found = glu_variants.contest(settings)
    best = dict(zip(found.models, [*found.lrs, None] * 3, strict=False))

    def loss(name: str, lr: float, seed: int) -> float | None:
        return None if lr == found.lrs[-1] and best[name] is None else abs(math.log(lr / (best[name] or 1.0)))

    results = finished(settings, found, loss)
    trials = found.trials(settings, results)
    for name in found.models:
        mine = [trial.spec for trial in trials if trial.key.endswith(f"/{name}") or f"/{name}/" in trial.key]
        searched = [spec for spec in mine if spec["seed"] == contest.SEARCH_SEED]
        assert [spec["lr"] for spec in searched] == list(found.lrs)
        finals = [spec for spec in mine if spec["seed"] != contest.SEARCH_SEED]
        assert [spec["seed"] for spec in finals] == [0, 1, 2]
        wanted = best[name] or found.lrs[-2]  # the last diverged: the next best
        assert {spec["lr"] for spec in finals} == {wanted}
    assert len({trial.spec["steps"] for trial in trials if trial.key.startswith("seed")}) == 1
    steps = sum(trial.spec["steps"] for trial in trials if trial.run == "train")
    assert 0.5 * 60 * settings.minutes < 0.1 * steps < 60 * settings.minutes  # of the budget, at 0.1 s a step


def test_equal_compute_is_equal_time():
    settings = settings_of("flash-lengths", minutes=500.0)
    found = flash_lengths.contest(settings)
    pace = {name: 0.1 * (1 + place) for place, name in enumerate(found.models)}
    steps = found.steps(settings, {contest.PACE: {"seconds": pace, "reading": 0.0}})
    spent = [steps[name] * pace[name] for name in pace]
    assert max(spent) - min(spent) <= max(pace.values())


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("module", [glu_variants, gau_vs_transformer, flash_lengths])
def test_contestants_are_of_equal_size(module, scale):
    groups: dict[Any, list[int]] = {}
    for spec in module.contest(settings_of("", scale=scale)).models.values():
        groups.setdefault(spec["config"]["dim"], []).append(variants.parameters(spec))
    for counts in groups.values():
        assert max(counts) < 1.02 * min(counts)


def test_shared_shapes_begin_with_equal_weights():
    models = glu_variants.contest(settings_of("")).models
    states = {name: variants.build(models[name], 5).state_dict() for name in ("ReLU", "GELU", "GLU", "SwiGLU")}
    for one, other in (("ReLU", "GELU"), ("GLU", "SwiGLU")):
        assert all(torch.equal(tensor, states[other][key]) for key, tensor in states[one].items())
    for key, tensor in states["ReLU"].items():
        if "feedforward." not in key:
            assert torch.equal(tensor, states["SwiGLU"][key]), key


def test_heads_and_formulas_compute_what_they_stand_for():
    q, k, v, gate = (torch.randn(2, 9, n, dtype=torch.float64) for n in (8, 8, 16, 16))
    options = {"causal": True, "normalizer": "row", "rel_bias": torch.randn(17, dtype=torch.float64)}
    plain = variants.gau_formula(q, k, v, gate, **options)
    torch.testing.assert_close(variants.gau_of_heads(1, q, k, v, gate, **options), plain)
    torch.testing.assert_close(gate * variants.gau_without_gate(q, k, v, gate, **options), plain)
    parts = [variants.gau_of_heads(1, *(x.chunk(4, -1)[i] for x in (q, k, v, gate)), **options) for i in range(4)]
    torch.testing.assert_close(variants.gau_of_heads(4, q, k, v, gate, **options), torch.cat(parts, -1))
    heads = [x[:, None] for x in (q, k, v)]
    together = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    torch.testing.assert_close(variants.attention_formula(*heads, causal=True), together)
    one = variants.gau_formula(q, k, v, torch.ones_like(gate), causal=True, normalizer="row", rel_bias=None)
    torch.testing.assert_close(variants.relu2_heads(*heads, causal=True)[:, 0], one)


def glu_losses(better: float) -> Any:
    def loss(name: str, lr: float, seed: int) -> float:
        return (2.0 + 0.1 * seed) * (1 - better * (name in glu_variants.GATED) + 1e-4 * ((seed * 7 + len(name)) % 3))

    return loss


@pytest.mark.parametrize(("better", "outcome"), [(0.02, CONFIRMED), (-0.02, REFUTED)])
def test_gated_layers_are_judged(better, outcome):
    settings = settings_of("glu-variants")
    results = finished(settings, glu_variants.contest(settings), glu_losses(better))
    assert load("glu-variants").verdict(settings, results).outcome == outcome


def test_the_front_is_compared_at_equal_time():
    settings = settings_of("gau-vs-transformer")
    found = gau_vs_transformer.contest(settings)
    results = finished(settings, found, lambda name, lr, seed: 3.0)
    widths = {"": 2, ", width 64": 1, ", width 192": 4}  # seconds, of attention; a GAU takes half
    for kind, factor in (("GAU", 0.5), ("attention", 1.0)):
        for suffix, seconds in widths.items():
            results[contest.PACE]["seconds"][kind + suffix] = factor * seconds
            for seed in range(3):
                results[f"seed {seed}/{kind}{suffix}"]["loss"] = 3.0 - math.log2(seconds) / 10
    # At its own time a GAU has the loss of an attention of twice the time: a tenth less, at 1 s and at 2 s.
    expected = 100 * ((2.9 / 3.0 - 1) + (2.8 / 2.9 - 1)) / 2
    np.testing.assert_allclose(gau_vs_transformer.beside_front(settings, results), [expected] * 3)


def times_of_gau(crossing: float, settings: Settings) -> dict[str, Any]:
    """Steps of which GAU's is the cheaper from `crossing` on."""
    results = {}
    for seed in range(settings.seeds):
        for n in gau_memory.sizes(settings)[0]:
            ratio = (crossing / n) ** 0.3 * (1 + 0.002 * seed)
            seconds = {"GAU": [ratio], "Transformer++": [1.0], "GAU, plain": [ratio], "Transformer++, plain": [1.0]}
            peaks = {name: round(1e6 * of[0]) for name, of in seconds.items()}
            results[f"N={n}/seed {seed}"] = {"seconds": seconds, "peak_bytes": peaks if seed == 0 else {}}
    return results


@pytest.mark.parametrize(
    ("crossing", "outcome"), [(500.0, CONFIRMED), (1800.0, REFUTED), (150.0, REFUTED), (1e-3, REFUTED), (1e6, REFUTED)]
)
def test_the_crossing_is_judged_by_its_distance(crossing, outcome):
    settings = settings_of("gau-memory")
    said = load("gau-memory").verdict(settings, times_of_gau(crossing, settings))
    assert said.outcome == outcome
    if crossing == 500.0:
        assert "crosses at 50" in said.sentence


def test_traffic_is_held_to_the_theorem():
    settings = settings_of("attention-memory")
    results: dict[str, Any] = {}
    for d, n, rows in attention_memory.traffic_sizes(settings):
        key = f"traffic/D={d}, N={n}" + ("" if rows is None else f", {rows} rows")
        block = rows or 128
        blocks = {"asked": 2 * (2 * n * n * d / block + 2 * n * d), "plain": 2 * (4 * n * n + 4 * n * d), "rows": block}
        results[key] = {"found": blocks, "reason": None}
    good = load("attention-memory").verdict(settings, results)
    assert good.outcome == CONFIRMED
    for row in results.values():
        row["found"]["asked"] = row["found"]["plain"]
    assert load("attention-memory").verdict(settings, results).outcome == REFUTED
    next(iter(results.values()))["found"] = None  # a size that could not be executed
    assert load("attention-memory").verdict(settings, results).outcome == UNFINISHED


# ---- the journal


def test_a_journal_survives_being_cut_anywhere(tmp_path):
    path, head = tmp_path / "journal.jsonl", {"settings": {"claim": "x"}}
    journal = run.Journal(path, head)
    for key in ("a", "b", "c"):
        journal.add(key, {"loss": len(key)}, 1.0)
    whole = path.read_bytes()
    for end in (*range(0, len(whole), 5), len(whole) - 1, len(whole)):
        path.write_bytes(whole[:end])
        again = run.Journal(path, head)
        assert list(again.rows) == ["a", "b", "c"][: whole[:end].count(b"}\n") - 1 if b"}\n" in whole[:end] else 0] or (
            whole[end : end + 1] == b"\n"  # a line without its end is whole all the same
        )
        again.add("d", {}, 0.0)
        assert "d" in run.Journal(path, head).rows


def test_a_journal_of_something_else_is_not_touched(tmp_path):
    path = tmp_path / "journal.jsonl"
    run.Journal(path, {"settings": {"seeds": 3}}).add("a", {}, 0.0)
    with pytest.raises(ValueError, match="another run: settings was"):
        run.Journal(path, {"settings": {"seeds": 4}})
    path.write_text("my diary\n")
    with pytest.raises(ValueError, match="no journal"):
        run.Journal(path, {"settings": {"seeds": 3}})
    assert path.read_text() == "my diary\n"


TEXT = b"".join(b"%d bottles of beer on the wall, %d bottles of beer;\n" % (i, i) for i in range(400))


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return str(path)


def test_a_trial_that_was_stopped_equals_one_that_was_not(tmp_path, text):
    settings = settings_of("glu-variants", data=text, quick=True)
    spec = glu_variants.contest(settings).models["SwiGLU"]
    spec = {**spec, "steps": 7, "lr": 1e-3, "seed": 1, "windows": 4, "save_every": 2}
    whole = train.run(spec, run.Context(settings, tmp_path / "whole", lambda what: None))

    def kill(what: str) -> None:
        if what.startswith("step 5"):
            raise SystemExit  # as a kill, it saves nothing: four steps are on the disk

    with pytest.raises(SystemExit):
        train.run(spec, run.Context(settings, tmp_path / "parts", kill))
    told: list[str] = []
    parts = train.run(spec, run.Context(settings, tmp_path / "parts", told.append))
    assert told[0].startswith("step 5")
    assert parts == whole


def small(settings: Settings, log: list[str], stop: str = "") -> Any:
    """A claim of three trials that write what they do into `log`."""

    def runner(spec: dict[str, Any], context: run.Context) -> dict[str, Any]:
        if spec["n"] == stop:
            raise KeyboardInterrupt
        log.append(spec["n"])
        return {"n": spec["n"]}

    from bench.claims import Claim

    run.RUNNERS["small"] = runner
    trials = [Trial(n, "small", {"n": n}) for n in "abc"]
    return Claim("small", "Small", "It is small.", {}, lambda s: "", lambda s, r: trials[: len(r) + 1],
                 lambda s, r: statistics.verdict("small", [Comparison("n", exact(-len(r)))]),
                 lambda record, path: None)  # fmt: skip


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, text, monkeypatch):
    monkeypatch.setattr(run, "RUNNERS", dict(run.RUNNERS))
    settings, log = settings_of("small", data=text), []
    silent = (lambda what: None, lambda trial, seconds: None)
    record = run.run(small(settings, log, "c"), settings, tmp_path / "out", *silent)
    assert record["interrupted"]
    assert not record["complete"]
    record = run.run(small(settings, log), settings, tmp_path / "out", *silent)
    assert record["complete"]
    assert log == ["a", "b", "c"]
    assert json.loads((tmp_path / "out" / run.RECORD).read_text()) == json.loads(json.dumps(record))
    record = run.run(small(settings, log), settings_of("small", data=text, minutes=1e-9), tmp_path / "late", *silent)
    assert record["missing"] == ["b"]  # one began while there was time


# ---- the command, and the documentation


def test_all_five_run(tmp_path, text, capsys, monkeypatch):
    # Tested elsewhere, and a second for each claim, half a second for each trial.
    monkeypatch.setattr("bench.machine.product_speed", dict)
    monkeypatch.setattr("flashgau.training.trainer.loss_plot", lambda rows, path, title: None)
    command = ["claims", "all", "--minutes", "0.1", "--seeds", "2", "--quick", "--data", text, "--out"]
    assert command_line.main([*command, str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    for name in NAMES:
        record = json.loads((tmp_path / "out" / name / "results.json").read_text())
        assert record["complete"]
        assert record["outcome"] in (CONFIRMED, REFUTED, OPEN)
        assert record["sentence"] in " ".join(told.split())
        assert (tmp_path / "out" / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert not (tmp_path / "out" / name / run.PARTS).exists()
    (tmp_path / "results").mkdir()
    (tmp_path / "out" / NAMES[0]).rename(tmp_path / "results" / NAMES[0])
    rows = table.markdown(tmp_path / "results").splitlines()
    assert [row.split("|")[1].strip(" `") for row in rows[2:]] == list(NAMES)
    assert ["not run yet" in row for row in rows[2:]] == [False, True, True, True, True]


def test_ctrl_c_ends_with_130_and_keeps_what_is_there(tmp_path, text, capsys, monkeypatch):
    command = ["claims", NAMES[0], "--seeds", "1", "--quick", "--data", text, "--out", str(tmp_path / "out")]
    kept = dict(run.RUNNERS)

    def interrupted(spec: dict[str, Any], context: run.Context) -> dict[str, Any]:
        if spec["feedforward"] == "geglu":
            raise KeyboardInterrupt
        return kept["train"](spec, context)

    monkeypatch.setitem(run.RUNNERS, "train", interrupted)
    assert command_line.main(command) == 130
    record = json.loads((tmp_path / "out" / run.RECORD).read_text())
    assert record["interrupted"]
    assert list(record["results"]) == [contest.PACE, "seed 0/ReLU"]
    monkeypatch.setitem(run.RUNNERS, "train", kept["train"])
    assert command_line.main(command) == 0
    again = json.loads((tmp_path / "out" / run.RECORD).read_text())
    assert again["results"]["seed 0/ReLU"] == record["results"]["seed 0/ReLU"]
    assert again["complete"]


@pytest.mark.parametrize("wrong", [("--seeds", "0"), ("--minutes", "-1"), ("--data", "/no/such/text")])
def test_what_no_run_can_mean_is_refused(tmp_path, capsys, wrong):
    assert command_line.main(["claims", "glu-variants", "--out", str(tmp_path / "out"), *wrong]) == 2
    assert wrong[1] in capsys.readouterr().err


def test_the_documentation_has_the_table_of_the_committed_records(tmp_path):
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert table.markdown() in page
    copy = tmp_path / "page.md"
    copy.write_text(page, encoding="utf-8")
    assert table.fill(copy).read_text(encoding="utf-8") == page
    copy.write_text("nothing")
    with pytest.raises(ValueError, match="no lines"):
        table.fill(copy)

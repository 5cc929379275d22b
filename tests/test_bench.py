"""The benchmark harness: what it refuses to time, what it computes from times, what it writes."""

from __future__ import annotations

import doctest
import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import flashgau

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import __main__ as command_line  # noqa: E402
from bench import decode, flash_layer, harness, machine, memory, mixed_chunk, report, timing, transformer  # noqa: E402
from bench.cases import (  # noqa: E402
    BACKWARD,
    FORWARD,
    OPERATIONS,
    PASSES,
    TRAINING,
    BenchCase,
    Goal,
    Operation,
    Provider,
    draw,
    load,
    on_tensors,
    prepare,
    runs,
)

product_speed = functools.cache(machine.product_speed)


@pytest.fixture(autouse=True)
def the_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "product_speed", product_speed)


class FakeTimer:
    """Runs the call, and says it took what the call's name is worth; keeps the order of the calls."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds
        self.order: list[str] = []

    def __call__(self, call: Callable[[], object]) -> float:
        name = call()
        assert isinstance(name, str)
        times = self.seconds[name]
        self.order.append(name)
        return times[(self.order.count(name) - 1) % len(times)]


def square(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
    return t["x"] * t["x"]


def toy(*providers: Provider, goals: tuple[Goal, ...] = ()) -> Operation:
    def cases(device: str, quick: bool) -> list[BenchCase]:
        return [BenchCase("toy", n, "fp32", {"D": 4}, 8, goals=goals, work={FORWARD: float(n)}) for n in (8, 16)]

    def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": torch.randn(length, case.shape["D"], generator=generator)}

    build = on_tensors(square)
    return Operation("toy", "Toy", cases, inputs, build, build, providers)


QUICK = harness.Settings(memory=False, seconds=0.01, min_rounds=3, max_rounds=3)


def run(operation: Operation, out: Path, **options: Any) -> dict[str, Any]:
    return harness.run(operation, out, QUICK, lambda what: None, **options)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_quartiles_are_those_of_numpy(values: list[float]) -> None:
    np.testing.assert_allclose(timing.quartiles(values), np.quantile(values, [0.25, 0.5, 0.75]), rtol=1e-12)


def test_every_round_has_every_call_once_in_no_fixed_order() -> None:
    timer = FakeTimer({"a": [9.0, 1.0, 2.0, 3.0], "b": [5.0, 4.0, 4.0, 4.0]})
    calls: dict[str, Callable[[], object]] = {"a": lambda: "a", "b": lambda: "b"}
    times = timing.alternate(calls, timer, warmup=1, min_rounds=2, max_rounds=9, seconds=43.0)
    rounds = [timer.order[i : i + 2] for i in range(0, len(timer.order), 2)]
    assert len(rounds) == 1 + 3  # 43 s at 9 + 5 s a round
    assert all(sorted(names) == ["a", "b"] for names in rounds)
    assert times == {"a": [1.0, 2.0, 3.0], "b": [4.0, 4.0, 4.0]}
    low, middle, high = timing.speed_ratio(times["b"], times["a"])
    assert middle == 2.0
    assert low <= middle <= high

    timing.alternate(calls, timer, min_rounds=100, max_rounds=100)
    assert {"a", "b"} == set(timer.order[8::2])  # who has the first turn of a round


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=40))
def test_a_speed_ratio_lies_between_its_quartiles(rounds: list[tuple[float, float]]) -> None:
    theirs, ours = zip(*rounds, strict=True)
    low, middle, high = timing.speed_ratio(theirs, ours)
    assert low <= middle <= high
    np.testing.assert_allclose(middle, np.median(np.divide(theirs, ours)), rtol=1e-12)


def test_the_ratio_of_the_medians_is_no_speed_ratio() -> None:
    """The two medians are of different rounds, and their ratio outside what any two quartiles hold."""
    theirs, ours = [1.0, 2.0, 3.0], [0.9, 2.5, 2.1]
    low, middle, high = timing.speed_ratio(theirs, ours)
    assert middle == 1.0 / 0.9
    assert low <= middle <= high
    assert not low <= 2.0 / 2.1 <= high


def test_cpu_timer_reads_the_clock_around_the_call() -> None:
    ticks = iter([10.0, 12.5])
    assert timing.CpuTimer(lambda: next(ticks))(lambda: None) == 2.5


def test_garbage_collection_is_off_while_timing() -> None:
    import gc

    states: list[bool] = []
    timing.alternate({"a": lambda: states.append(gc.isenabled())}, timing.CpuTimer(), min_rounds=2, seconds=0)
    assert states
    assert not any(states)
    assert gc.isenabled()


def test_wrong_providers_are_reported_and_not_timed(tmp_path: Path) -> None:
    def wrong_gradient(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
        return t["x"] * t["x"].detach()

    def crash(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError("no such luck\nsecond line")

    record = run(
        toy(
            Provider("good", on_tensors(square)),
            Provider("wrong", on_tensors(lambda case, t: 1.001 * square(case, t))),
            Provider("nan", on_tensors(lambda case, t: square(case, t) * float("nan"))),
            Provider("wrong gradient", on_tensors(wrong_gradient)),
            Provider("wrong shape", on_tensors(lambda case, t: square(case, t)[:-1])),
            Provider("crash", on_tensors(crash)),
            Provider("absent", on_tensors(square), lambda case, device: "absent-package is not installed"),
        ),
        tmp_path,
    )
    assert record["complete"]
    for entry in record["cases"]:
        results = entry["providers"]
        status = {name: result["status"] for name, result in results.items()}
        assert status == {
            "good": "ok",
            "wrong": "wrong",
            "nan": "wrong",
            "wrong gradient": "wrong",
            "wrong shape": "failed",
            "crash": "failed",
            "absent": "skipped",
        }
        assert [name for name, result in results.items() if result["times"]] == ["good"]
        assert "off by" in results["wrong"]["reason"]
        assert "d x off by" in results["wrong gradient"]["reason"]
        assert results["crash"]["reason"] == "NotImplementedError: no such luck"
        assert results["absent"]["reason"] == "absent-package is not installed"
    shown = screen(record)
    for text in ("WRONG", "SKIPPED", "FAILED", "absent-package is not installed", "no such luck"):
        assert text in shown


def screen(record: dict[str, Any]) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.show(record, console)
    return console.export_text()


def test_a_plain_formula_that_is_not_the_oracles_sets_no_tolerance(tmp_path: Path) -> None:
    import dataclasses

    skewed = on_tensors(lambda case, t: 1.1 * square(case, t))
    operation = dataclasses.replace(toy(Provider("good", on_tensors(square))), plain=skewed)
    record = run(operation, tmp_path)
    reason = record["cases"][0]["providers"]["good"]["reason"]
    assert "plain PyTorch in fp64 and the oracle differ" in reason


class PassTimer:
    """Seconds by provider name, whatever the call."""

    def __init__(self, seconds: dict[str, float], operation_calls: list[str]) -> None:
        self.seconds, self.calls = seconds, operation_calls

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        return self.seconds[self.calls[-1]]


def test_goals_and_rates_come_from_the_medians(tmp_path: Path) -> None:
    seen: list[str] = []

    def tracked(name: str) -> Provider:
        def call(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
            seen.append(name)
            return square(case, t)

        return Provider(name, on_tensors(call))

    goals = (
        Goal("flashgau-eager", "peer", "speed", FORWARD, 1.5),
        Goal("flashgau-eager", "peer", "speed", TRAINING, 2.5),
        Goal("flashgau-eager", "peer", "memory", FORWARD, 0.6),
    )
    operation = toy(tracked("flashgau-eager"), tracked("peer"), goals=goals)
    record = run(operation, tmp_path, timer=PassTimer({"flashgau-eager": 2.0, "peer": 4.0}, seen))
    entry = record["cases"][0]
    times = entry["providers"]["peer"]["times"]
    assert set(times) == set(PASSES)
    assert times[FORWARD]["median_s"] == 4.0
    assert times[FORWARD]["raw_s"] == [4.0] * 3
    assert [goal["verdict"] for goal in entry["goals"]] == ["met", "missed", "not measured"]
    assert entry["goals"][0]["measured"] == 2.0
    assert "2.00x" in screen(record)


def measured(group: str, length: int, **seconds: tuple[float, float]) -> dict[str, Any]:
    """A case's entry: forward and training seconds of each provider, at 1 unit of work a token."""

    def result(times: tuple[float, float]) -> dict[str, Any]:
        both = {run: {"median_s": s, "raw_s": [s]} for run, s in zip(PASSES, times, strict=True)}
        return {"times": both, "peak_bytes": {}, "stands_for": 0}

    return {
        "group": group,
        "length": length,
        "work": dict.fromkeys(PASSES, float(length)),
        "floors": {FORWARD: 1.0, BACKWARD: 2.0},
        "providers": {name: result(times) for name, times in seconds.items()},
    }


def test_a_floor_bounds_the_forward_and_what_training_adds_to_it() -> None:
    entry = measured("g", 64, flashgau=(1.5, 6.0))
    outcomes = [
        harness.judge_goal(entry, Goal("flashgau", None, "floor", run, bound), [entry])
        for run, bound in ((FORWARD, 1.6), (FORWARD, 1.4), (BACKWARD, 2.3), (BACKWARD, 2.2))
    ]
    assert [goal["measured"] for goal in outcomes] == [1.5, 1.5, 2.25, 2.25]
    assert [goal["verdict"] for goal in outcomes] == ["met", "missed", "met", "missed"]
    assert report.goal_text(entry, outcomes[2]) == "backward time of flashgau <= 2.3x the floor, 2 s"
    absent = harness.judge_goal(entry, Goal("other", None, "floor", BACKWARD, 2.0), [entry])
    assert absent["verdict"] == "not measured"


def test_a_flat_rate_is_that_of_every_length_in_range() -> None:
    seconds = {16: 9.0, 64: 64.0, 128: 134.4, 256: 256.0, 512: 999.0}  # 128 is 5 percent slower than 64 and 256
    entries = [measured("g", n, flashgau=(s, s)) for n, s in seconds.items()]
    entries.append(measured("other group", 128, flashgau=(1e9, 1e9)))
    goal = Goal("flashgau", None, "flat", FORWARD, 1.1, since=64)
    outcome = harness.judge_goal(entries[3], goal, entries)
    assert outcome["measured"] == pytest.approx(1.05)
    assert outcome["verdict"] == "met"
    assert report.goal_text(entries[3], outcome) == "forward rate of flashgau within 1.1x from N=64 to N=256"
    assert harness.judge_goal(entries[3], goal, [e for e in entries if e["length"] != 64])["measured"] is None


def test_crossings_count_what_a_peer_stands_for() -> None:
    entries = [measured("g", n, flashgau=(1.0, 1.0), rival=(n / 1000, 1.0)) for n in (500, 1000, 4000)]
    entries[0]["providers"]["rival"]["times"].pop(TRAINING)
    for entry in entries:
        entry["providers"]["rival"]["stands_for"] = 2
    forward, training = harness.crossing_rows(entries)
    assert (forward["run"], forward["since"]) == (FORWARD, 2000.0)  # where two of ours take one rival's time
    assert (training["run"], training["since"], training["shortest"]) == (TRAINING, None, 1000)
    table = report.crossings_table({"crossings": [forward, training]})
    assert list(table.columns[-1].cells) == ["N=2000", "not up to N=4000"]


def test_who_overwrites_its_inputs_spoils_nobody_elses(tmp_path: Path) -> None:
    seen: set[float] = set()

    def overwrite(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
        result = square(case, t)
        t["x"].detach().zero_()
        return result

    def watch(case: BenchCase, t: dict[str, Tensor]) -> Tensor:
        if len(t["x"]) == 16:
            seen.add(t["x"].sum().item())
        return square(case, t)

    providers = (
        Provider("first", on_tensors(overwrite), other="spoils", overwrites=True),
        Provider("second", on_tensors(watch)),
    )
    run(toy(*providers), tmp_path)
    assert len(seen) == 1
    assert seen != {0.0}


def test_json_is_strict_versioned_and_complete(tmp_path: Path) -> None:
    nan = Provider("nan", on_tensors(lambda case, t: square(case, t) * float("nan")))
    run(toy(Provider("good", on_tensors(square)), nan), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert (record["schema"], record["schema_version"]) == (harness.SCHEMA, harness.SCHEMA_VERSION)
    assert {"cpu", "cores", "threads", "torch", "python", "date", "load_average_before"} <= set(record["machine"])
    assert record["machine"]["torch"] == torch.__version__
    for path in report.plot(record, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    count = 0

    def interrupt(what: str) -> None:
        nonlocal count
        count += 1
        if "N=16" in what:
            raise KeyboardInterrupt

    operation = toy(Provider("good", on_tensors(square)))
    record = harness.run(operation, tmp_path, QUICK, interrupt)
    assert not record["complete"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["cases"][0]["providers"]["good"]["times"][FORWARD]["runs"] == 3
    assert count <= harness.steps(operation, QUICK)


def test_memory_growth_holds_only_our_own_providers_to_the_bound() -> None:
    mib = 2**20

    def entry(length: int, ours: int, peer: int) -> dict[str, Any]:
        peaks = {"flashgau-eager": ours * mib, "peer": peer * mib}
        results = {name: {"peak_bytes": {FORWARD: peak}} for name, peak in peaks.items()}
        return {"group": "g", "length": length, "providers": results}

    def found(*entries: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(r["provider"], r["from"], r["factor"], r["verdict"]) for r in harness.growth_rows(list(entries))]

    growth = found(entry(64, 2, 4), entry(128, 5, 16), entry(512, 9, 9))
    assert growth == [("flashgau-eager", 64, 2.5, "missed"), ("peer", 64, 4.0, None)]
    # What the probe cannot tell from nothing counts as the least that it can.
    assert found(entry(8, 0, 0), entry(16, 2, 0)) == [("flashgau-eager", 8, 2.0, "met")]


@pytest.mark.skipif(sys.platform != "linux", reason="the probe reads /proc")
def test_memory_probe_sees_an_allocation_of_known_size() -> None:
    program = """
import torch
from bench.memory import cpu_peak_growth
torch.ones(10).sum()
kept = torch.ones(50 * 2**18)                       # 50 MiB that were there before do not count
torch.ones(200 * 2**18)                             # nor does an earlier, larger peak
def call():
    a = torch.ones(60 * 2**18)                      # 60 MiB
    b = a + 1                                       # 120 MiB at once
    del a
    return b + 1                                    # again 120 MiB at once
print(cpu_peak_growth(call), cpu_peak_growth(lambda: None))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | memory.ALLOCATOR,
        capture_output=True,
        text=True,
        check=True,
    )
    growth, nothing = (int(word) for word in done.stdout.split())
    assert abs(growth - 120 * 2**20) < 4 * 2**20
    assert nothing < 2**20


def test_a_failing_memory_probe_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nMemoryError: 9 GiB\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match=r"^MemoryError: 9 GiB$"):
        memory.in_fresh_process("attention", "case", "plain", True, 1)


@pytest.mark.parametrize(("name", "status"), [("flashgau-eager", 1), ("peer", 0)])
def test_exit_status_is_1_if_ours_is_wrong(
    name: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Provider(name, on_tensors(lambda case, t: 2.0 * square(case, t)))
    operation = toy(wrong, Provider("good", on_tensors(square)))
    monkeypatch.setattr(command_line, "load", lambda name: operation)
    arguments = ["glu", "--quick", "--no-memory", "--out", str(tmp_path)]
    assert command_line.main(arguments) == status


@pytest.mark.parametrize(("module", "examples"), [(report, 2), (harness, 1)])
def test_examples_in_the_harness(module: Any, examples: int) -> None:
    assert doctest.testmod(module) == (0, examples)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["attention", "--providers", "nonesuch"],
            "no provider nonesuch on cpu; there are flashgau-eager, sdpa",
        ),
        (["attention", "--only", "N=3"], "no case's name contains N=3"),
        (["attention", "--threads", "0"], "--threads must be positive"),
        (["glu", "--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_bad_requests_are_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line.main([*arguments, "--out", str(tmp_path)]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "feed_forward"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_cases_are_well_formed(name: str, device: str, quick: bool) -> None:
    operation = load(name)
    cases = operation.cases(device, quick)
    assert len({case.name for case in cases}) == len(cases)
    here = {p.name for p in operation.providers if device in p.devices}
    for case in cases:
        assert set(case.work) <= set(PASSES)
        for goal in case.goals:
            assert {goal.ours, goal.theirs} <= here | {None}
            assert (goal.theirs is None) == (goal.metric in ("floor", "flat"))
            assert goal.metric != "floor" or goal.run in case.floors
            assert goal.metric != "flat" or goal.since in {c.length for c in cases if c.group == case.group}
    lengths = {case.length for case in cases}
    assert any(2 * n in lengths for n in lengths)  # else memory growth cannot be judged
    json.dumps([dict(case.options) for case in cases])


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "feed_forward"])
def test_every_operation_runs_quickly_from_end_to_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "plot", lambda record, out: [])  # drawn in other tests
    arguments = [name, "--quick", "--no-memory", "--seconds", "0.05", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["complete"]
    have_peer = importlib.util.find_spec("flash_pytorch") is not None
    for entry in record["cases"]:
        for provider, result in entry["providers"].items():
            # Compiling takes a minute, whatever the size.
            skipped = provider.endswith("-compiled") or (provider == "flash-pytorch" and not have_peer)
            expected = "skipped" if skipped else "ok"
            assert result["status"] == expected, (provider, result["reason"])


def linear_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, normalize: bool, **options: bool) -> Any:
    """fla's function of that name, as far as it is used: (B, N, H, .)."""
    assert options in ({}, {"head_first": False})
    assert not normalize
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril() * scale
    return torch.einsum("bhij,bjhe->bihe", scores, v), None


def with_heads_first(q: Tensor, k: Tensor, v: Tensor, scale: float, normalize: bool, head_first: bool) -> Any:
    return linear_attention(q, k, v, scale, normalize, head_first=head_first)


@pytest.mark.parametrize("fla", [linear_attention, with_heads_first])
@pytest.mark.parametrize("operation", [mixed_chunk.OPERATION, flash_layer.OPERATION])
def test_providers_for_a_gpu_run_here_too(operation: Operation, fla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", types.SimpleNamespace(chunk_linear_attn=fla))
    case = operation.cases("cpu", True)[0]
    inputs = draw(operation, case, case.length, "cpu", torch.float32)
    expected = prepare(case, operation.oracle, inputs).call()
    for provider in operation.providers:
        for_gpus = provider.devices == ("cuda",) or provider.name.endswith("-compiled")
        if for_gpus and not provider.name.startswith("flashgau"):
            if provider.name.startswith("flash-pytorch"):
                pytest.importorskip("flash_pytorch")
            problem = prepare(case, provider.build, inputs)
            out = problem.call()
            assert out.shape == expected.shape
            assert provider.other is not None or torch.allclose(out, expected, atol=1e-4)
            assert set(runs(case, problem)) == set(PASSES)
            runs(case, problem)[TRAINING]()


@pytest.mark.parametrize(("dim", "wide", "narrow"), [(512, 1024, 128), (1024, 2048, 128), (256, 512, 64)])
def test_a_transformer_layer_has_the_parameters_of_two_gated_units(dim: int, wide: int, narrow: int) -> None:
    layer = transformer.Layer(dim, wide, narrow, 64, device="meta")
    units = [flashgau.nn.FLASH(dim, hidden=wide, key_dim=narrow, device="meta") for _ in range(2)]
    mine, theirs = (sum(p.numel() for m in modules for p in m.parameters()) for modules in ([layer], units))
    assert abs(mine / theirs - 1) < 0.03


def test_a_transformer_layer_steps_as_it_computes() -> None:
    torch.manual_seed(0)
    layer, x = transformer.Layer(64, 128, 32, 16), torch.randn(2, 9, 64)
    cache = torch.full((2, 2, 4, 9, 16), float("nan"))
    with torch.no_grad():
        for i in range(9):
            at = transformer.angles(torch.tensor([i]), 16)
            out = layer.step(x[:, i : i + 1], cache, i, at)
        torch.testing.assert_close(out, layer(x)[:, 8:], atol=1e-5, rtol=1e-5)


def test_decoding_has_no_backward_and_its_context_ends_a_chunk() -> None:
    case = decode.OPERATION.cases("cpu", True)[0]
    inputs = draw(decode.OPERATION, case, case.length, "cpu", torch.float32)
    context = inputs["tokens"].shape[1] - case.shape["steps"]
    assert context < case.length < inputs["tokens"].shape[1]
    for provider in decode.OPERATION.providers:
        if "cpu" not in provider.devices or provider.unavailable(case, "cpu"):
            continue
        problem = prepare(case, provider.build, inputs)
        assert list(runs(case, problem)) == [FORWARD]
        first = problem.call()
        assert first.shape == (1, case.shape["steps"], 256)
        if (
            provider.name != "mc-tfm++"
        ):  # which goes on from where it was: what stands there does not matter to the time
            torch.testing.assert_close(first, problem.call())  # from the same state again


def test_what_decoding_remembers_is_counted_and_drawn(tmp_path: Path) -> None:
    flash, attention = (decode.ModelConfig.named(f"{kind}-tiny") for kind in ("flash", "transformer++"))
    assert decode.remembered(flash, 2**20) == decode.remembered(flash, 64)
    assert decode.remembered(attention, 1000) == 1000 * 2 * attention.depth * attention.dim * 4
    times = {FORWARD: {"median_s": 0.5}}
    who = {"flashgau-eager": {"times": times}, "transformer++": {"times": times}, "flash-quad": {"times": {}}}
    entry = {"length": 1024, "shape": {"B": 1}, "work": {FORWARD: 64.0}, "options": {"model": "flash-tiny"}}
    record = {"title": "Decoding", "x_label": "context", "machine": {"cpu": "some", "date": "2026-11-29"}}
    assert decode.plot(record | {"cases": [entry | {"providers": who}]}, tmp_path / "context.png")
    assert not decode.plot(record | {"cases": [entry | {"providers": {}}]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert (tmp_path / "context.png").stat().st_size > 1000


def test_module_command_measures_time_and_memory(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench",
        "attention",
        "--quick",
        "--only",
        "N=128",
        "--providers",
        "sdpa,plain",
    ]
    done = subprocess.run(
        [*command, "--threads", "1", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "plain" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "time.png", "memory.png"}
    (entry,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    peaks = {name: result["peak_bytes"][TRAINING] for name, result in entry["providers"].items()}
    assert peaks["plain"] >= 2 * 128 * 128 * 4  # at least one matrix of scores for each of two heads


@pytest.mark.parametrize("more", [{}, {"machine": 7}, {"machine": {"cpu": "c"}, "title": [], "operation": {}}])
def test_a_record_that_lacks_something_is_refused_by_name(more: dict[str, Any], tmp_path: Path) -> None:
    from bench import harness, page

    place = tmp_path / "results" / "op" / "results.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"schema": harness.SCHEMA, "schema_version": harness.SCHEMA_VERSION, **more}))
    (tmp_path / "results" / "nested.json").write_text("[" * 100_000)  # no record: left alone
    with pytest.raises(ValueError, match=r"op/results\.json is no record of a benchmark of this version"):
        page.write(tmp_path / "results", tmp_path / "docs")
    assert not (tmp_path / "docs").exists()

"""The command line: `check`, and the cases that it draws."""

import inspect
import json
import math

import pytest
import torch
from cli_runs import few_cases, runner

import flashgau
from flashgau.cli import app, main
from flashgau.cli.doctor import OPERATIONS
from flashgau.eager import glu as eager_glu
from flashgau.verification.cases import ACTIVATIONS, all_cases


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
    assert used["attention"] == inspect.signature(flashgau.attention).parameters.keys() - {"q", "k", "v", "backend"}
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
    assert {"state", "gate_activation", "score", "quad_normalizer", "lin_normalizer", "rel_bias"} == used[
        "mixed_chunk_step"
    ]


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


def test_check_finds_a_wrong_operation(monkeypatch):
    few_cases(monkeypatch, "glu", 49)
    right = eager_glu.glu_forward

    def glu_forward(*, options, **named):
        out, kept = right(options=options, **named)
        return (out * 1.001 if options.activation == "gelu" else out), kept

    monkeypatch.setattr(eager_glu, "glu_forward", glu_forward)
    result = runner.invoke(app, ["check", "--op", "glu"])
    assert result.exit_code == 1
    missed = [line for line in result.output.splitlines() if " miss" in line and line.startswith(" glu ")]
    assert len(missed) == len(ACTIVATIONS)
    assert all(" gelu * " in line for line in missed)
    assert "49 cases on cpu" in result.output
    assert "7 missed" in result.output


def test_check_survives_a_call_that_fails(monkeypatch):
    few_cases(monkeypatch, "glu")

    def glu_forward(**named):
        raise RuntimeError("the abacus\nis broken")

    monkeypatch.setattr(eager_glu, "glu_forward", glu_forward)
    result = runner.invoke(app, ["check", "--op", "glu", "--json"])
    assert result.exit_code == 1
    rows = json.loads(result.output)["rows"]
    assert [row["verdict"] for row in rows] == ["error"] * 3
    assert rows[0]["detail"] == "RuntimeError: the abacus is broken"
    assert rows[0]["max_error"] is None


def test_json_has_no_nan(monkeypatch):
    few_cases(monkeypatch, "glu", 1)
    monkeypatch.setattr(eager_glu, "glu_forward", lambda gate, **named: (gate * math.nan, None))
    result = runner.invoke(app, ["check", "--op", "glu", "--json"])
    assert result.exit_code == 1
    json.loads(result.output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

"""`flashgau.compare` finds what is wrong, and only that."""

import json
import math

import pytest
import torch
from strategies import randn

import flashgau
from flashgau.eager import attention as eager_attention
from flashgau.eager import gau as eager_gau
from flashgau.eager import glu as eager_glu
from flashgau.verification.cases import all_cases
from flashgau.verification.checking import run_cases

OPERANDS = {
    "attention": [randn(i, 2, 2, 9, 4) for i in range(3)],
    "glu": [randn(i, 5, 6) for i in range(2)],
    "glu_linear": [randn(0, 5, 6), randn(1, 3, 6), randn(2, 3, 6), randn(3, 3), randn(4, 3)],
    "gau_attention": [randn(i, 2, 9, 4) for i in range(4)],
    "mixed_chunk_attention": [randn(i, 2, 9, 4) for i in range(6)],
}
GRADIENTS = {
    "attention": ["dq", "dk", "dv"],
    "glu": ["dgate", "dup"],
    "glu_linear": ["dx", "dw_gate", "dw_up", "db_gate", "db_up"],
    "gau_attention": ["dq", "dk", "dv", "dgate"],
    "mixed_chunk_attention": ["dquad_q", "dquad_k", "dlin_q", "dlin_k", "dv", "dgate"],
}


@pytest.mark.parametrize("op", OPERANDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_rows_and_names(op, dtype, backend):
    operands = [x.to(dtype) for x in OPERANDS[op]]
    report = flashgau.compare(getattr(flashgau, op), *operands, backend=backend)
    assert report.ok
    assert bool(report)
    assert (report.op, report.backend, report.dtype) == (op, backend, dtype)
    assert [row.name for row in report.rows] == ["out", *GRADIENTS[op]]
    for row, x in zip(report.rows[1:], operands, strict=True):
        assert row.shape == x.shape
    for row in report.rows:
        assert row.scale > 0
        assert 0 <= row.rms_error <= row.max_error <= row.tolerance
        assert 0 <= row.plain_rms_error <= row.plain_max_error


def test_keywords_states_and_lse_have_rows():
    q, k, v = OPERANDS["attention"]
    report = flashgau.compare(flashgau.attention, q, k=k, v=v, return_lse=True, sinks=randn(5, 2))
    assert [row.name for row in report.rows] == ["out", "lse", "dq", "dk", "dv", "dsinks"]
    state = flashgau.MixedChunkState.empty(2, 4, 4, 4)
    options = {"chunk_size": 4, "causal": True, "initial_state": state, "return_state": True}
    report = flashgau.compare(flashgau.mixed_chunk_attention, *OPERANDS["mixed_chunk_attention"], **options)
    names = [row.name for row in report.rows]
    assert names[:6] == ["out", "state.kv", "state.quad_k", "state.lin_k", "state.v", "state.position"]
    assert "dinitial_state.kv" in names
    assert report.ok


def test_without_gradients():
    report = flashgau.compare(flashgau.glu, *OPERANDS["glu"], grad=False)
    assert [row.name for row in report.rows] == ["out"]


def spoil(monkeypatch, module, function, how):
    """Let a function of the eager floor return something wrong."""
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args, **kwargs: how(right(*args, **kwargs)))


@pytest.mark.parametrize("wrong", [1e-4, math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wrong_result_is_a_miss(monkeypatch, wrong, dtype):
    def spoilt(results):
        results[0][0, 0] += wrong
        return results

    spoil(monkeypatch, eager_glu, "glu_forward", spoilt)
    report = flashgau.compare(flashgau.glu, *(x.to(dtype) for x in OPERANDS["glu"]), backend="eager")
    assert not report.ok
    assert not bool(report)
    assert report.rows[0].name == "out"
    assert not report.rows[0].ok
    assert str(report).splitlines()[2].endswith("MISS")


@pytest.mark.parametrize("place", range(4))
def test_a_wrong_gradient_is_a_miss(monkeypatch, place):
    def spoilt(grads):
        grads[place].mul_(1.001)
        return grads

    spoil(monkeypatch, eager_gau, "gau_attention_backward", spoilt)
    report = flashgau.compare(flashgau.gau_attention, *OPERANDS["gau_attention"], backend="eager")
    assert [row.name for row in report.rows if not row.ok] == [GRADIENTS["gau_attention"][place]]


def test_a_missing_scale_in_half_precision_is_a_miss(monkeypatch):
    def spoilt(grads):
        dq, *rest = grads
        return dq * 2, *rest

    spoil(monkeypatch, eager_attention, "attention_backward", spoilt)
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = (randn(i, 2, 2, 65, 16, dtype=dtype) for i in range(3))
        report = flashgau.compare(flashgau.attention, q, k, v, causal=True, backend="eager")
        assert [row.name for row in report.rows if not row.ok] == ["dq"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_that_loses_a_little_at_every_step_is_a_miss(monkeypatch, dtype):
    """The gradient of values, added up in half precision: `flashgau check` has a case that is long enough to see it."""
    (case,) = (x for x in all_cases("attention") if x.options == "many queries" and x.dtype == dtype)
    right = eager_attention.attention_backward

    def lossy(dout, dlse, q, k, v, *rest, **kwargs):
        dq, dk, dv, *others = right(dout, dlse, q, k, v, *rest, **kwargs)
        p = torch.softmax(kwargs["options"].resolved(q.shape[-1]).factor * q.float() @ k.float().mT, -1).to(q.dtype)
        dv = torch.zeros_like(dv)
        for p_block, dout_block in zip(p.split(256, 2), dout.split(256, 2), strict=True):
            dv += p_block.mT @ dout_block
        return dq, dk, dv, *others

    assert [row.verdict for row in run_cases([(case, "eager")], torch.device("cpu"))] == ["ok"]
    monkeypatch.setattr(eager_attention, "attention_backward", lossy)
    (row,) = run_cases([(case, "eager")], torch.device("cpu"))
    assert [tensor["name"] for tensor in row.tensors if not tensor["ok"]] == ["dv"]


def test_the_reference_is_never_what_is_compared(monkeypatch):
    """A floor that always fails cannot pass by being replaced."""
    spoil(monkeypatch, eager_glu, "glu_forward", lambda results: (torch.zeros_like(results[0]), results[1]))
    assert not flashgau.compare(flashgau.glu, *OPERANDS["glu"]).ok
    assert flashgau.compare(flashgau.glu, *OPERANDS["glu"], backend="reference").ok


def test_equal_infinities_agree():
    """Rows that see nothing have an LSE of -inf on both sides."""
    q, k, v = randn(0, 1, 1, 6, 4), randn(1, 1, 1, 2, 4), randn(2, 1, 1, 2, 4)
    report = flashgau.compare(flashgau.attention, q, k, v, causal=True, return_lse=True)
    assert report.ok
    assert all(math.isfinite(row.max_error) for row in report.rows)


def test_table():
    report = flashgau.compare(flashgau.glu, *OPERANDS["glu"])
    head, names, *lines = str(report).splitlines()
    assert head == "glu: eager against the fp64 reference, float32 input"
    assert names.split() == ["max", "error", "allowed", "plain", "rms", "plain", "rms"]
    assert [line.split()[0] for line in lines] == ["out", "dgate", "dup"]
    assert all(line.endswith("ok") for line in lines)


def test_plain_data_is_json():
    report = flashgau.compare(flashgau.glu, *OPERANDS["glu"])
    found = json.loads(json.dumps(report.to_dict()))
    assert found["op"] == "glu"
    assert found["ok"] is True
    assert found["rows"][0]["name"] == "out"
    assert found["rows"][0]["shape"] == [5, 6]


def test_inputs_are_copied_in_their_layout(monkeypatch):
    seen = []
    right = eager_glu.glu_forward

    def watched(gate, up, **kwargs):
        seen.append((gate.stride(), gate.data_ptr()))
        gate.zero_()
        return right(gate, up, **kwargs)

    monkeypatch.setattr(eager_glu, "glu_forward", watched)
    base = randn(0, 6, 40)
    gate = base[:, 3:33:3].T
    before = base.clone()
    assert not flashgau.compare(flashgau.glu, gate, randn(1, 10, 6), grad=False).ok
    assert torch.equal(base, before)
    assert seen[0][0] == gate.stride()
    assert seen[0][1] != gate.data_ptr()


def test_the_error_of_an_operation_reaches_the_caller():
    with pytest.raises(ValueError, match="attention: `k` has shape"):
        flashgau.compare(flashgau.attention, randn(0, 1, 2, 3, 4), randn(0, 1, 2, 3, 5), randn(0, 1, 2, 3, 4))


def test_dropout_without_a_seed_compares_the_same_elements():
    operands = OPERANDS["attention"]
    assert flashgau.compare(flashgau.attention, *operands, dropout_p=0.5).ok

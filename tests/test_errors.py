"""Bad calls are refused by name, before any work, alike on every backend."""

import re
from typing import Any

import pytest
import torch
from bad_calls import BAD, GOOD
from checks import outputs

import flashgau
from flashgau.ops import autograd, dispatch


def call(op: str, changes: dict[str, Any]) -> Any:
    return getattr(flashgau, op)(**{**GOOD[op](), **changes})


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a backend is asked to compute."""

    def unwanted(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(autograd, "run", unwanted)


def test_there_are_many():
    assert len(BAD) >= 60


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_the_good_calls_are_good(op, backend):
    assert all(torch.isfinite(x).all() for x in outputs(call(op, {"backend": backend})))


@pytest.mark.parametrize("backend", [None, "eager", "reference", "triton"])
@pytest.mark.parametrize("case", BAD, ids=str)
def test_refused_by_name(case, backend, nothing_runs):
    changes = case.changes if "backend" in case.changes else {**case.changes, "backend": backend}
    with pytest.raises(case.error) as caught:
        call(case.op, changes)
    message = str(caught.value)
    assert message.startswith(f"{case.op}: `{case.argument}`"), message
    assert case.expected in message.split("; expected ", 1)[1], message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("op", GOOD)
def test_unknown_keywords_are_refused(op):
    """A misspelt option is never ignored."""
    with pytest.raises(TypeError, match="causual"):
        call(op, {"causual": True})


@pytest.mark.parametrize("op", GOOD)
def test_options_are_keywords_only(op):
    operands = list(GOOD[op]().values())
    with pytest.raises(TypeError, match="positional"):
        getattr(flashgau, op)(*operands[:6], *[None] * 4)


@pytest.mark.parametrize("op", GOOD)
def test_a_backend_that_cannot_run_says_why(op):
    reason = dispatch.explain(op, "cpu")["triton"]
    if reason is None:
        pytest.skip("the Triton kernels run here")
    with pytest.raises(RuntimeError, match=re.escape(f'{op}: backend="triton" cannot run this call: {reason}')):
        call(op, {"backend": "triton"})


def test_values_are_not_read_where_reading_costs(monkeypatch):
    """Fake tensors have no values to check, and shapes are checked all the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        operands = [torch.empty(2, 2, 6, 4) for _ in range(3)]
        out = flashgau.attention(*operands, lengths=torch.empty(2, dtype=torch.int64))
        assert out.shape == (2, 2, 6, 4)
        with pytest.raises(ValueError, match="lengths"):
            flashgau.attention(*operands, lengths=torch.empty(3, dtype=torch.int64))


def test_compare_refuses_what_is_no_operation():
    with pytest.raises(
        ValueError, match=r"compare: `fn` is 'relu' without `reference`; expected one of flashgau\.attention, "
    ):
        flashgau.compare(torch.relu, torch.ones(3))
    with pytest.raises(ValueError, match="no argument is a floating tensor"):
        flashgau.compare(flashgau.glu, torch.ones(3, dtype=torch.int64))

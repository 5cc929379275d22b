"""Training: its schedule and its configuration."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashgau.training import TrainConfig, learning_rate
from flashgau.training.config import FREE


@given(
    lr=st.floats(1e-6, 1.0),
    final=st.floats(0.0, 1.0),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 300),
)
def test_schedule_is_linear_warmup_times_cosine(lr: float, final: float, warmup: int, steps: int) -> None:
    config = TrainConfig(lr=lr, lr_final=final, warmup=warmup, steps=steps)
    rates = [learning_rate(config, step, step / steps) for step in range(steps + 1)]
    for step, rate in enumerate(rates):
        # cos(x) = 1 - 2 sin(x/2)^2: the same curve by another formula.
        decay = 1 - (1 - final) * math.sin(math.pi * step / steps / 2) ** 2
        warm = 1.0 if step + 1 >= warmup else (step + 1) / warmup
        assert rate == pytest.approx(lr * decay * warm, rel=1e-9, abs=1e-15 * lr)
        assert 0.0 <= rate <= lr
    if warmup <= steps:
        assert rates[steps] == pytest.approx(lr * final, abs=1e-15 * lr)
    after = rates[max(warmup - 1, 0) :]
    assert all(a >= b - 1e-15 for a, b in pairwise(after))


def test_default_warmup_is_at_most_a_tenth() -> None:
    assert TrainConfig(steps=50).warmup_steps == 5
    assert TrainConfig(steps=5000).warmup_steps == 100
    assert TrainConfig(steps=None, max_minutes=1).warmup_steps == 100
    assert TrainConfig(steps=5000, warmup=0).warmup_steps == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("steps", "batch", "accumulate", "length", "log_every", "eval_every", "save_every")),
        *((name, -3) for name in ("steps", "warmup", "eval_windows", "seed", "weight_decay", "grad_clip")),
        *((name, 1.5) for name in ("steps", "batch", "lr_final", "beta1", "beta2", "validation_fraction")),
        *((name, math.nan) for name in ("lr", "lr_final", "beta2", "weight_decay", "validation_fraction")),
        *((name, math.inf) for name in ("lr", "max_minutes", "grad_clip", "weight_decay")),
        *((name, "3") for name in ("batch", "lr", "bf16")),
        *((name, None) for name in ("batch", "lr", "seed", "model")),
        *(("batch", True), ("bf16", 1), ("seed", 2**63), ("out", ""), ("model", 5), ("data", 7)),
        *((name, 10**12) for name in ("batch", "length", "accumulate")),
        *((name, 10**400) for name in ("steps", "eval_windows", "lr", "max_minutes", "weight_decay")),
    ],
)
def test_configuration_refuses_by_name(field: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"TrainConfig: `{field}` is") as caught:
        TrainConfig(**{field: value})
    assert "expected" in str(caught.value)


def test_a_step_that_no_memory_holds_is_refused_before_any_work() -> None:
    assert TrainConfig(batch=2**12, accumulate=2**8, length=2**12).bytes_per_step == 2**32
    with pytest.raises(ValueError, match=r"`batch` is 4096, .*together 8589934592 bytes in a step; expected at most"):
        TrainConfig(batch=2**12, accumulate=2**9, length=2**12)


def test_configuration_needs_a_limit_and_known_fields() -> None:
    with pytest.raises(ValueError, match="both None"):
        TrainConfig(steps=None)
    with pytest.raises(ValueError, match="no field named momentum"):
        TrainConfig.from_dict({"momentum": 1})
    assert {field.name for field in fields(TrainConfig)} >= FREE
    assert TrainConfig(lr=1).lr.hex() == (1.0).hex()  # an integer is taken as the float it means

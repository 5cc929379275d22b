"""Hypothesis profiles, one thread per test process, and interpreted kernels where no GPU compiles them."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported

# What compiles kernels cannot run where they are interpreted: `test_executed.py` starts a process for each of these.
collect_ignore_glob = ["executed/*"] if os.environ.get("TRITON_INTERPRET") == "1" else []

# A fixture holds for all examples of a test, as the backend should: pytest ends one of a wider scope only when some
# later test asks for another value, so that tests without it would run on the backend of whichever test came before.
_HARMLESS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
_QUIET = {"deadline": None, "suppress_health_check": _HARMLESS}
settings.register_profile("ci", max_examples=25, **_QUIET)
settings.register_profile("thorough", max_examples=500, **_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)

# A failed assertion of these helpers shows its values, as one of a test file does.
pytest.register_assert_rewrite("distributed_world", "transformers_models")

try:
    import quick_interpreter
    import triton
    import triton.runtime.interpreter
except ImportError:
    triton = None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """An interpreted kernel takes milliseconds a program: fewer examples for it than for what is compiled."""
    parameters = getattr(item, "callspec", None)
    if parameters is None or not hasattr(item.obj, "hypothesis"):
        return
    test = getattr(item.obj, "__func__", item.obj)
    usual = _usual.setdefault(test, test._hypothesis_internal_use_settings)
    values = [str(value) for value in parameters.params.values()]
    triton = item.path.name.startswith("test_kernels_") or any(value.startswith("triton") for value in values)
    interpreted = triton and not torch.cuda.is_available()
    test._hypothesis_internal_use_settings = (
        settings(usual, max_examples=max(2, usual.max_examples * (1 if "triton, panels" in values else 2) // 12))
        if interpreted
        else usual
    )


_usual: dict[Any, settings] = {}


def _demand_masks_of_truth_values(interpreter: Any) -> None:
    """Refuse, in every version, what Triton 3.9 refuses: a mask of another type, such as a block & a number's mask."""
    builder = interpreter.InterpreterBuilder

    def checking(method: Any, place: int) -> Any:
        def checked(self, *args, **keywords):
            mask = np.asarray(args[place].data)  # of a descriptor's load a buffer
            assert mask.dtype == bool, f"a mask of {mask.dtype}; expected truth values, as Triton 3.9 does"
            return method(self, *args, **keywords)

        return checked

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        if hasattr(builder, name):
            setattr(builder, name, checking(getattr(builder, name), place))


if triton is not None:
    quick_interpreter.hasten(triton.runtime.interpreter)
    _demand_masks_of_truth_values(triton.runtime.interpreter)

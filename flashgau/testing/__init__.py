"""For the tests of your own kernels: the rule that ours are held to, and hypothesis strategies for awkward calls.

    from hypothesis import given
    from flashgau import testing

    @given(x=testing.tensors(7, 16, dtypes=testing.HALVES))
    def test_mine(x):
        testing.assert_close(mine, naive, x)

`assert_close` and `held` need PyTorch alone; the strategies need hypothesis, which `flashgau[testing]` brings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from flashgau.ops.compare import Report, Row, compare, held

_STRATEGIES = ("DTYPES", "HALVES", "LAYOUTS", "SIZES", "lay_out", "layouts", "lengths", "packings", "sizes", "tensors")

__all__ = ["Report", "Row", "assert_close", "held", *_STRATEGIES]


def assert_close(
    fn: Callable[..., Any],
    reference: Callable[..., Any] | None,
    *args: Any,
    names: Sequence[str] | None = None,
    grad: bool = True,
    **kwargs: Any,
) -> Report:
    """Fail unless results and gradients are as near to the fp64 reference as the rule of `flashgau.compare` asks.

    Args:
        fn: a function or module.
        reference: its definition in naive PyTorch; None for an operation of flashgau.
        *args: of the call.
        names: of the results, where there are several.
        grad: also compare the gradient of every floating argument.
        **kwargs: of the call.

    Returns:
        The report.

    Raises:
        AssertionError: with the table, if a row is beyond its tolerance; and whatever `flashgau.compare` raises.

    Example:
        >>> import torch
        >>> from flashgau.testing import assert_close
        >>> report = assert_close(torch.nn.functional.silu, lambda x: x / (1 + torch.exp(-x)), torch.randn(8))
        >>> [row.name for row in report.rows]
        ['out', 'dinput']
    """
    report = compare(fn, *args, reference=reference, names=names, grad=grad, **kwargs)
    if not report.ok:
        raise AssertionError(f"beyond tolerance\n{report}")
    return report


def __getattr__(name: str) -> Any:
    if name not in _STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.strategies"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

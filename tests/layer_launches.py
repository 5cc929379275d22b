"""What a training step of a layer would start on a GPU: `python layer_launches.py FLASH 16384` prints it as JSON.

The layer runs on CPU tensors in a process in which Triton compiles, its kernels on the processors of an H100 but for
their last step: a launch is noted, and nothing runs. So results are whatever memory holds, and only what is started
counts: each launch of ours, and each of PyTorch's operators that is neither a view nor an allocation.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashgau
from flashgau import kernels, tables
from flashgau.ops import autograd, dispatch
from flashgau.tuning import compiler
from flashgau.tuning.ahead import target_of

PROCESSORS = 132
_NO_KERNEL = ("empty", "detach", "view", "alias", "reshape", "lift", "as_strided", "squeeze")


class Started(TorchDispatchMode):
    """Collects PyTorch's operators that would start a kernel, with the function of ours that they are in."""

    def __init__(self, found: list[tuple[str, str]], where: str) -> None:
        super().__init__()
        self.found, self.where = found, where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "flashgau":
            return func(*args, **kwargs)
        with self:  # what an operator is made of, such as `to` of a copy, or of nothing
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func._overloadpacket.__name__
        if not (func.is_view or any(part in name for part in _NO_KERNEL)):
            self.found.append((self.where, name))
        return func(*args, **kwargs)


def launches_of(layer: torch.nn.Module, x: torch.Tensor, token: bool = False) -> list[list[tuple[str, str]]]:
    """Those of a forward, and of its backward, in order: (function of ours, or "", kernel or operator).

    With `token` those of one more token after x, in place.
    """
    found: list[tuple[str, str]] = []
    run, where = autograd.run, [""]

    def watched(op: str, backend: str, function: str, *args: Any, **kwargs: Any) -> Any:
        where.append(function)
        try:
            with Started(found, function):  # inside an operator the mode around it sees nothing
                return run(op, backend, function, *args, **kwargs)
        finally:
            where.pop()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels.executed, "processors", PROCESSORS))
        stack.enter_context(mock.patch.object(kernels.executed, "target", "sm_90"))
        stack.enter_context(mock.patch.object(autograd, "run", watched))
        stack.enter_context(flashgau.use_backend("triton"))
        stack.enter_context(dispatch.use_backend_in_layers("triton"))
        stack.enter_context(tables.configured(tables.of_architecture("sm_90")))
        noted = compiler.instead_of_launching(
            "sm_90", target_of("sm_90"), lambda name, _: found.append((where[-1], name))
        )
        stack.enter_context(noted)
        if token:
            with torch.no_grad():
                _, state = layer.step(x[:, :1], layer(x, return_state=True)[1], inplace=True)
                found.clear()
                with Started(found, ""):
                    layer.step(x[:, :1], state, inplace=True)
            return [found]
        layer(x)  # what is kept from the first call on is made
        found.clear()
        with Started(found, ""):
            y = layer(x)
        forward = list(found)
        found.clear()
        with Started(found, ""):
            torch.autograd.backward(y, y.detach())
    return [forward, found]


if __name__ == "__main__":
    kind, length = sys.argv[1], int(sys.argv[2])
    layer = getattr(flashgau.nn, kind)(64, hidden=2048, causal=True, dtype=torch.bfloat16)
    x = torch.zeros(1, length, 64, dtype=torch.bfloat16, requires_grad=True)
    print(json.dumps(launches_of(layer, x, token=sys.argv[3:] == ["token"])))

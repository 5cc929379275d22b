"""Implementations by others that several benchmarks stand beside."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Provider, on_tensors


def compiled(plain: Callable[[Case, dict[str, Tensor]], Tensor]) -> Provider:
    """The plain formula under `torch.compile`, with static shapes, which is its fastest form."""

    @cache
    def function(name: str) -> Callable[..., Tensor]:
        torch._dynamo.reset()
        return torch.compile(plain, dynamic=False)

    return Provider("torch.compile", on_tensors(lambda case, t: function(case.name)(case, t)), devices=("cuda",))


def without_liger(case: Case, device: str) -> str | None:
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def liger(name: str) -> Any:
    """One of Liger's functions for gated units: LigerSiLUMulFunction or LigerGELUMulFunction."""
    module = {"LigerSiLUMulFunction": "swiglu", "LigerGELUMulFunction": "geglu"}[name]
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)

"""Implementations by others that several benchmarks stand beside."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.cases import BenchCase, Problem, Provider, anywhere, on_tensors


def compiled(
    plain: Callable[[BenchCase, dict[str, Tensor]], Tensor],
    unavailable: Callable[[BenchCase, str], str | None] = anywhere,
) -> Provider:
    """The plain formula under `torch.compile`."""
    function = cache(lambda name: compile_for(name, plain))
    return Provider(
        "torch.compile", on_tensors(lambda case, t: function(case.name)(case, t)), unavailable, devices=("cuda",)
    )


def compile_for(case_name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` with static shapes, which is its fastest form."""
    _forget_other_cases(case_name)
    return torch.compile(function, dynamic=False)


@cache
def _forget_other_cases(case_name: str) -> None:
    """Drop, once in a case, what was compiled before: after a few shapes of one function `torch.compile` gives up."""
    torch.compiler.reset()


def without_liger(case: BenchCase, device: str) -> str | None:
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def liger(name: str) -> Any:
    """One of Liger's functions for gated units: LigerSiLUMulFunction or LigerGELUMulFunction."""
    module = {"LigerSiLUMulFunction": "swiglu", "LigerGELUMulFunction": "geglu"}[name]
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def without_fla(case: BenchCase, device: str) -> str | None:
    return None if importlib.util.find_spec("fla") else "fla-core is not installed"


def linear_attention(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """fla's chunked causal linear attention of one head over lin_q, lin_k and v, neither normalised nor gated."""
    chunk_linear_attn = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    options: dict[str, Any] = {"scale": 1.0, "normalize": False}
    if "head_first" in inspect.signature(chunk_linear_attn).parameters:  # until 0.5
        options["head_first"] = False
    operands = {name: tensors[name] for name in ("lin_q", "lin_k", "v")}

    def call() -> Tensor:
        out: Tensor = chunk_linear_attn(*(t.unsqueeze(2) for t in operands.values()), **options)[0]  # (B, N, 1, .)
        return out.squeeze(2)

    return Problem(call, operands)

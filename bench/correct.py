"""The check each provider must pass before it is timed.

The rule is FlashAttention's: against an fp64 oracle fed the same values, a provider may err at most twice
(gradients: three times) as much as the plain PyTorch formula in the same dtype, plus a floor of a few units
in the last place of the result's scale.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.cases import DTYPES, BenchCase, Build, Operation, Problem, draw, output_gradient, prepare

OUTPUT_FACTOR, GRADIENT_FACTOR, FLOOR_ULPS = 2.0, 3.0, 4.0
SAME_FORMULA = 1e-6  # largest relative difference of two fp64 evaluations of one formula (peers keep fp32 constants)


@dataclass(frozen=True)
class Row:
    """One compared tensor. Errors are the largest absolute differences from the oracle."""

    tensor: str
    error: float
    plain_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    @property
    def used(self) -> float:
        """Fraction of the allowance that the error uses: above 1 is wrong."""
        if self.error != self.error:
            return math.inf
        return 0.0 if self.error == 0 else self.error / self.allowed if self.allowed else math.inf


@dataclass(frozen=True)
class Check:
    length: int
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row that uses most of its allowance."""
        return max(self.rows, key=lambda row: row.used)

    def as_json(self) -> dict[str, object]:
        # JSON has no NaN and no infinity: an error that is not finite is null.
        rows = [
            {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in asdict(row).items()} | {"ok": row.ok}
            for row in self.rows
        ]
        return {"length": self.length, "ok": self.ok, "rows": rows}


def _results(case: BenchCase, problem: Problem) -> dict[str, Tensor]:
    out = problem.call()
    named = {"output": out.detach()}
    if problem.leaves:
        grads = torch.autograd.grad(out, list(problem.leaves.values()), output_gradient(case, out))
        shared = problem.shared(dict(zip(problem.leaves, grads, strict=True)))
        named |= {f"d {name}": g for name, g in shared.items()}
    return {name: t.double() for name, t in named.items()}


class Judge:
    """Checks providers, once per group of cases and length."""

    def __init__(self, operation: Operation, device: str) -> None:
        self.operation = operation
        self.device = device
        self._truth: dict[tuple[str, int], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._checks: dict[tuple[str, int, str], Check] = {}

    def _run(self, case: BenchCase, build: Build, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return _results(case, prepare(case, build, draw(self.operation, case, length, self.device, dtype)))

    def _yardstick(self, case: BenchCase, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The oracle, and plain PyTorch in the case's dtype, once seen in fp64 to be the same formula."""
        oracle = self._run(case, self.operation.oracle, length, torch.float64)
        for name, same in self._run(case, self.operation.plain, length, torch.float64).items():
            apart = (same - oracle[name]).abs().max().item()
            if not apart <= SAME_FORMULA * oracle[name].abs().max().item():
                raise RuntimeError(f"plain PyTorch in fp64 and the oracle differ in {name} by {apart:.2g}")
        return oracle, self._run(case, self.operation.plain, length, DTYPES[case.dtype])

    def check(self, case: BenchCase, provider: str, build: Build) -> Check:
        length = min(case.check_length, case.length)
        key = (case.group, length)
        done = (*key, provider)
        if done not in self._checks:
            if key not in self._truth:
                self._truth = {key: self._yardstick(case, length)}  # groups follow one another: keep the last
            ulp = torch.finfo(DTYPES[case.dtype]).eps
            oracle, plain = self._truth[key]
            got = self._run(case, build, length, DTYPES[case.dtype])
            if got.keys() != oracle.keys():
                raise RuntimeError(f"{provider} gives {sorted(got)}, the oracle {sorted(oracle)}")
            rows = []
            for name, true in oracle.items():
                if got[name].shape != true.shape:
                    shapes = f"{tuple(got[name].shape)}, the oracle {tuple(true.shape)}"
                    raise RuntimeError(f"{provider} gives {name} of shape {shapes}")
                factor = OUTPUT_FACTOR if name == "output" else GRADIENT_FACTOR
                plain_error = (plain[name] - true).abs().max().item()
                allowed = factor * plain_error + FLOOR_ULPS * ulp * true.abs().max().item()
                rows.append(Row(name, (got[name] - true).abs().max().item(), plain_error, allowed))
            self._checks[done] = Check(length, tuple(rows))
        return self._checks[done]

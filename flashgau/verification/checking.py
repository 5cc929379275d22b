"""Cases held to the fp64 reference, and the verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

import flashgau
from flashgau.ops import dispatch
from flashgau.ops.compare import Report
from flashgau.verification.cases import CheckCase, all_cases

# What is kept of each tensor that `compare` reports on.
FIELDS = ("name", "max_error", "rms_error", "plain_max_error", "plain_rms_error", "tolerance", "ok")


@dataclass(frozen=True)
class Row:
    """The verdict on one case, with the errors of its worst tensor: the one nearest to, or past, its tolerance.

    `verdict` is "ok", "miss" (an error past its tolerance) or "error" (the call itself failed: see `detail`).
    `counts` is what executed kernels did.
    """

    op: str
    options: str
    shape: str
    dtype: str
    backend: str
    verdict: str
    worst: str = ""
    max_error: float | None = None
    plain_max_error: float | None = None
    tolerance: float | None = None
    detail: str = ""
    tensors: tuple[dict[str, Any], ...] = ()
    counts: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether the case agrees with the reference."""
        return self.verdict == "ok"


def select(op: str | None, backend: str | None, device: torch.device, thorough: bool) -> list[tuple[CheckCase, str]]:
    """The cases that can run on `device`, each with the backend to hold to the reference.

    Without `backend` that is the one a call would use. A named backend that does not take a dtype (Triton and
    fp64) is not asked for it. Where it is Triton, one case more for every launch configuration of the device's tables.

    Raises:
        ValueError: no case can run; with the reason.
    """
    chosen: dict[tuple[str, str], str | None] = {}
    reasons: list[str] = []
    pairs = []
    for case in all_cases(op, thorough):
        key = case.op, case.dtype
        if key not in chosen:
            dtype = getattr(torch, case.dtype)
            if backend is None:
                chosen[key] = dispatch.resolve(case.op, None, device, dtype)
            else:
                reason = dict(dispatch.explain(case.op, device, dtype)).get(backend, "it does not exist")
                chosen[key] = backend if reason is None else None
                reasons += [reason] if reason is not None else []
        name = chosen[key]
        if name is not None:
            pairs.append((case, name))
    if not pairs:
        raise ValueError(f"backend {backend!r} cannot run on {device}: {reasons[0]}")
    launched = {case.op for case, name in pairs if name == "triton"}
    if launched:
        from flashgau.verification.configurations import cases_of  # which needs Triton

        pairs += [(case, "triton") for case in cases_of(device, launched)]
    return pairs


def held_row(case: CheckCase, backend: str, device: torch.device, seed: int) -> Row:
    """The verdict on one case."""
    row = Row(case.op, case.options, case.shape, case.dtype, backend, verdict="error")
    try:
        report = _report(case, backend, device, seed)
    except Exception as error:  # whatever goes wrong in one case is its verdict, and the others still run
        return replace(row, detail=" ".join(f"{type(error).__name__}: {error}".split()))
    tensors = tuple({name: getattr(tensor, name) for name in FIELDS} for tensor in report.rows)
    if not tensors:
        return replace(row, detail="nothing was compared")
    worst = max(tensors, key=_nearness)
    return replace(
        row,
        verdict="ok" if report.ok else "miss",
        worst=worst["name"],
        max_error=worst["max_error"],
        plain_max_error=worst["plain_max_error"],
        tolerance=worst["tolerance"],
        tensors=tensors,
    )


def _report(case: CheckCase, backend: str, device: torch.device, seed: int) -> Report:
    if hasattr(case, "config"):
        from flashgau.verification import configurations

        assert isinstance(case, configurations.Configured)
        return configurations.hold(case, device, seed)
    arguments, keywords = case.arguments(device, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # `compare` draws the weights of the gradients
        return flashgau.compare(getattr(flashgau, case.op), *arguments, backend=backend, **keywords)


def _nearness(tensor: dict[str, Any]) -> tuple[bool, float]:
    """Orders tensors by how near their error is to the tolerance; those past it come last."""
    error, tolerance = tensor["max_error"], tensor["tolerance"]
    if error != error:
        return True, float("inf")
    share = error / tolerance if tolerance > 0 else (float("inf") if error > 0 else 0.0)
    return not tensor["ok"], share


def run_cases(
    pairs: Iterable[tuple[CheckCase, str]],
    device: torch.device,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Run each (case, backend) and return its row; `on_row` is told of each as it comes."""
    rows = []
    for case, backend in pairs:
        row = held_row(case, backend, device, seed)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def summary(rows: list[Row]) -> list[tuple[str, str, int, int, float | None]]:
    """(operation, backends, cases, misses, largest error as a share of its tolerance) per operation."""
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == op]
        backends = ", ".join(dict.fromkeys(row.backend for row in own))
        shares = [row.max_error / row.tolerance for row in own if row.max_error is not None and row.tolerance]
        lines.append((op, backends, len(own), sum(not row.ok for row in own), max(shares, default=None)))
    return lines

"""`flashgau.compare`: how far a backend is from the fp64 reference, beside plain PyTorch's own error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashgau import reference

from . import dispatch

_ULPS = 8  # floor of the tolerance, in units in the last place of the result's largest value
_MOVES = 4  # of the inputs, at most
_FORWARD, _GRADIENT = 2.0, 3.0  # FlashAttention's rule: multiples of plain PyTorch's error


@dataclass(frozen=True)
class Row:
    """One tensor's errors against the fp64 reference: largest and root mean square, of both contestants.

    Attributes:
        name: "out", "lse", "state.kv", ... for results, "d" and the argument's name for gradients.
        shape: of the tensor.
        scale: largest absolute value of the reference.
        max_error: of the backend.
        rms_error: of the backend.
        plain_max_error: of the naive formula in plain PyTorch of the input's dtype.
        plain_rms_error: of the same.
        tolerance: what `max_error` may be.
        ok: whether it is, and everything is finite that should be.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    max_error: float
    rms_error: float
    plain_max_error: float
    plain_rms_error: float
    tolerance: float
    ok: bool


@dataclass(frozen=True)
class Report:
    """What `compare` found: one row for every result and every gradient.

    `print(report)` shows a table; `bool(report)` and `report.ok` tell whether every row is within tolerance.
    """

    op: str
    backend: str
    dtype: torch.dtype
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = f"{self.op}: {self.backend} against the fp64 reference, {str(self.dtype).removeprefix('torch.')} input"
        lines = [head, f"{'':10}{'max error':>11}{'allowed':>11}{'plain':>11}{'rms':>11}{'plain rms':>11}"]
        for r in self.rows:
            numbers = (r.max_error, r.tolerance, r.plain_max_error, r.rms_error, r.plain_rms_error)
            lines.append(f"{r.name:10}" + "".join(f"{x:11.2e}" for x in numbers) + ("  ok" if r.ok else "  MISS"))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"op": self.op, "backend": self.backend, "dtype": str(self.dtype), "ok": self.ok, "rows": rows}


def compare(op: Callable[..., Any], *args: Any, backend: str | None = None, grad: bool = True, **kwargs: Any) -> Report:
    """Hold one call of an operation against the fp64 reference on the same values, forward and every gradient.

    The rule is FlashAttention's: the largest error may be twice (three times for gradients) that of the naive
    formula in plain PyTorch of the same dtype, plus a floor of 8 units in the last place of the result's largest
    value. Gradients are differences that may cancel: their floor is also 8 units, of the precision of sums, of the
    call's largest gradient, and of the smallest normal number. The naive formula's error counts as no less than the
    change of the reference when every input moves at random by up to 8 units in the last place of fp32 (of fp64 for
    fp64; four such moves, if the first leaves a miss): where terms cancel it may have none by luck. The inputs are
    copied; gradients are of a random weighting of the results, with a mean: an error of sums in one direction shows.

    Source of the rule: the tests of Dao et al.'s flash-attention.

    Args:
        op: a public operation, such as `flashgau.attention`.
        *args: its arguments.
        backend: the backend to hold to the reference; None for the default.
        grad: also compare the gradient of every floating argument.
        **kwargs: its keyword arguments.

    Returns:
        A `Report`: `.ok`, `.rows`, and a table when printed.

    Raises:
        ValueError: if `op` is not a public operation of flashgau; and whatever the operation itself raises.

    Example:
        >>> import torch, flashgau
        >>> q, k, v = torch.randn(3, 1, 2, 33, 16)
        >>> flashgau.compare(flashgau.attention, q, k, v, causal=True).ok
        True
    """
    name = getattr(op, "__name__", repr(op))
    if name not in dispatch.FILES:
        raise ValueError(f"compare: `op` is {name!r}; expected one of {', '.join(dispatch.FILES)}")
    naive = getattr(reference, name)
    tensors = [x for _, x in _leaves(args, kwargs)]
    floating = [x for x in tensors if x.is_floating_point()]
    if not floating:
        raise ValueError("compare: no argument is a floating tensor; expected those of " + name)
    if kwargs.get("dropout_p") and kwargs.get("dropout_seed") is None:
        kwargs = {**kwargs, "dropout_seed": 0}
    counts = {"attention": 3, "gau_attention": 2, "mixed_chunk_attention": 4, "mixed_chunk_step": 4}
    heads = floating[: counts.get(name, 0)]  # whose width decides who can run the call
    width = max((x.shape[-1] for x in heads if x.dim()), default=0)
    chosen = dispatch.resolve(name, backend, floating[0].device, floating[0].dtype, width)

    seed = int(torch.randint(2**31, ()))
    dtype = floating[0].dtype

    def weighting(shape: torch.Size, place: int) -> Tensor:
        """The random weights of a result, the same numbers in every run: rounded to the input's dtype.

        Their mean is as large as their deviation. About a mean of zero what a long sum loses at every step, in one
        direction, would average out, as the sum itself does.
        """
        generator = torch.Generator().manual_seed(seed + place)
        return (1 + torch.randn(shape, generator=generator)).to(dtype)

    ours = _run(
        op, args, {**kwargs, "backend": chosen}, None, weighting if grad else None
    )  # first: it checks the arguments
    exact = _run(naive, args, kwargs, torch.float64, weighting if grad else None)
    plain = _run(naive.__wrapped__, args, kwargs, None, weighting if grad else None)
    # Plain PyTorch may be right by luck where terms cancel: it gets no better than the last places of fp32 allow. So
    # may one random move of the inputs have no effect; hence others before a miss is one.
    others = [plain]
    for place in range(_MOVES):
        change = _nudged(seed + place, dtype)
        others.append(_run(naive, args, kwargs, torch.float64, weighting if grad else None, change))
        report = Report(name, chosen, dtype, held(ours, exact, others, dtype))
        if report.ok:
            break
    return report


def _leaves(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the arguments, also those inside a recurrent state, with a name."""
    for key, value in (*((str(i), x) for i, x in enumerate(args)), *kwargs.items()):
        if isinstance(value, Tensor):
            yield key, value
        elif dataclasses.is_dataclass(value):
            yield from ((f"{key}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))


Weighting = Callable[[torch.Size, int], Tensor]


def _run(
    fn: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    dtype: torch.dtype | None,
    weighting: Weighting | None,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor]:
    """Results and, with a weighting, gradients by name, of changed copies of the arguments in `dtype` (None: as is)."""
    inputs: dict[str, Tensor] = {}

    def copied(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            copy = _copy(value)
            if value.is_floating_point():
                copy = change(copy if dtype is None else copy.to(dtype))
                copy = inputs[name] = copy.requires_grad_(weighting is not None)
            return copy
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: copied(f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)}
            return type(value)(**parts)
        return value

    names = _argument_names(fn)
    copies = [copied(names[i] if i < len(names) else str(i), x) for i, x in enumerate(args)]
    result = fn(*copies, **{key: copied(key, x) for key, x in kwargs.items()})
    results = _named_results(result)
    found = {key: value.detach() for key, value in results.items()}
    if weighting is not None:
        terms = []
        for place, value in enumerate(results.values()):
            if value.requires_grad:
                weight = weighting(value.shape, place).to(value)
                alive = torch.isfinite(value)  # the log-sum-exp of a row that sees nothing is -inf
                terms.append((torch.where(alive, value, 0) * torch.where(alive, weight, 0)).sum())
        if terms:
            total = torch.stack([t.to(torch.float64) for t in terms]).sum()
            grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
            for (key, x), g in zip(inputs.items(), grads, strict=True):
                found[f"d{key}"] = torch.zeros_like(x) if g is None else g
    return found


def _nudged(seed: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Moves every element at random by up to `_ULPS` units in the last place of what sums are kept in."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps

    def moved(x: Tensor) -> Tensor:
        steps = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return x * (1 + _ULPS * unit * steps.to(x))

    return moved


def _copy(x: Tensor) -> Tensor:
    """A copy in the very memory layout, surroundings included, that the backend would get."""
    x = x.detach()
    storage = x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.shape, x.stride())


def _argument_names(fn: Callable[..., Any]) -> list[str]:
    code = getattr(fn, "__wrapped__", fn).__code__
    return list(code.co_varnames[: code.co_argcount])


def _named_results(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"out": result}
    out, extra = result
    if isinstance(extra, Tensor):
        return {"out": out, "lse": extra}
    return {"out": out, **{f"state.{f.name}": getattr(extra, f.name) for f in dataclasses.fields(extra)}}


def held(
    ours: dict[str, Tensor], exact: dict[str, Tensor], plain: list[dict[str, Tensor]], dtype: torch.dtype
) -> list[Row]:
    """Results and gradients ("d" and a name) held to the exact ones, beside the worst of plain PyTorch's."""
    steepest = max((_scale(x) for key, x in exact.items() if key.startswith("d")), default=0.0)
    return [_row(key, ours[key], exact[key], [x[key] for x in plain], steepest, dtype) for key in exact]


def _row(
    name: str,
    ours: Tensor,
    exact: Tensor,
    plain: list[Tensor],
    steepest: float,
    dtype: torch.dtype,
) -> Row:
    gradient = name.startswith("d")
    scale = _scale(exact)
    max_error, rms_error = _errors(ours, exact)
    plain_max, plain_rms = map(max, zip(*(_errors(x, exact) for x in plain), strict=True))
    # An fp32 gradient beside half inputs is made of half-precision values: their unit counts.
    unit = torch.finfo(dtype if gradient else ours.dtype).eps if ours.is_floating_point() else 0.0
    floor = unit * scale
    if gradient:
        # Gradients are differences of terms as large as the largest gradient. Where these cancel (a query that sees
        # one key) the sums' rounding stays, and plain PyTorch may have none by luck; if all is gone, the inputs' too.
        sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        floor = max(floor, (unit if scale < 1e-6 * steepest else sums.eps) * steepest, sums.tiny * sums.eps)
    tolerance = (_GRADIENT if gradient else _FORWARD) * plain_max + _ULPS * floor
    ok = ours.shape == exact.shape and max_error <= tolerance
    return Row(name, tuple(exact.shape), scale, max_error, rms_error, plain_max, plain_rms, tolerance, ok)


def _scale(exact: Tensor) -> float:
    return float(torch.where(torch.isfinite(exact), exact, 0).abs().max()) if exact.numel() else 0.0


def _errors(x: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference; equal infinities differ by 0, a NaN by infinity."""
    if x.numel() == 0 or x.shape != exact.shape:
        return (0.0, 0.0) if x.shape == exact.shape else (float("inf"), float("inf"))
    x, exact = x.to(torch.float64), exact.to(torch.float64)
    difference = torch.where(x == exact, 0.0, (x - exact).abs()).nan_to_num(nan=float("inf"))
    return float(difference.max()), float(difference.square().mean().sqrt())

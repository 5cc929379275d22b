"""`flashgau.compare`: how far a function is from its fp64 reference, beside plain PyTorch's own error."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import flashgau.reference

from . import dispatch
from .attention import attention
from .gau import gau_attention
from .glu import glu, glu_linear
from .mixed_chunk import mixed_chunk_attention, mixed_chunk_step

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

    Attributes:
        op: the name of the function.
        backend: which one it ran on, of an operation of flashgau; "" of another function.
        dtype: of the first floating argument.
        rows: results, then gradients.
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
        who = f"{self.op}: {self.backend}" if self.backend else self.op
        head = f"{who} against the fp64 reference, {str(self.dtype).removeprefix('torch.')} input"
        width = max(10, *(len(r.name) + 1 for r in self.rows)) if self.rows else 10
        lines = [head, f"{'':{width}}{'max error':>11}{'allowed':>11}{'plain':>11}{'rms':>11}{'plain rms':>11}"]
        for r in self.rows:
            numbers = (r.max_error, r.tolerance, r.plain_max_error, r.rms_error, r.plain_rms_error)
            lines.append(f"{r.name:{width}}" + "".join(f"{x:11.2e}" for x in numbers) + ("  ok" if r.ok else "  MISS"))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"op": self.op, "backend": self.backend, "dtype": str(self.dtype), "ok": self.ok, "rows": rows}


def compare(
    fn: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    names: Sequence[str] | None = None,
    backend: str | None = None,
    grad: bool = True,
    **kwargs: Any,
) -> Report:
    """Hold one call of a function to its definition in fp64 on the same values, forward and every gradient.

    Operations of flashgau bring their definition. Any other function, `functools.partial`, module or compiled function
    is held to the `reference` that is given with it: naive PyTorch that computes the same from the same arguments.

    The rule is FlashAttention's: the largest error may be twice (three times for gradients) that of the naive
    formula in plain PyTorch of the same dtype, plus a floor of 8 units in the last place of the result's largest
    value. Gradients are differences that may cancel: their floor is also 8 units, of the precision of sums, of the
    call's largest gradient, and of the smallest normal number. The naive formula's error counts as no less than the
    change of the reference when every input moves at random by up to 8 units in the last place of fp32 (of fp64 for
    fp64; four such moves, if the first leaves a miss): where terms cancel it may have none by luck. The inputs are
    copied; gradients are of a random weighting of the results, with a mean: an error of sums in one direction shows.

    Source of the rule: the tests of Dao et al.'s flash-attention.

    Args:
        fn: a public operation, such as `flashgau.attention`, or any callable. Of a module, the gradients of its
            parameters are compared too, if `reference` is a module that has parameters of those names; it then
            computes with the values of `fn`'s.
        *args: its arguments: tensors, anything that holds tensors (tuples, lists, dicts, dataclasses), and others.
        reference: the definition, of any `fn` that is no operation of flashgau. It is called with the arguments in
            fp64, and once as they are.
        names: of the results, where `fn` returns several in a tuple or list; "out0", "out1" ... unless given. Those
            of a dict, a named tuple or a dataclass have their own.
        backend: the backend to hold to the reference; None for the default. Of an operation of flashgau only.
        grad: also compare the gradient of every floating argument.
        **kwargs: its keyword arguments.

    Returns:
        A `Report`: `.ok`, `.rows`, and a table when printed.

    Raises:
        TypeError: if `fn` or `reference` cannot be called.
        ValueError: if `fn` is no operation of flashgau and comes without `reference`, or is one and comes with one; if
            no argument is a floating tensor; if the results of both have other names; and whatever `fn` itself raises.

    Example:
        >>> import torch, flashgau
        >>> q, k, v = torch.randn(3, 1, 2, 33, 16)
        >>> flashgau.compare(flashgau.attention, q, k, v, causal=True).ok
        True
        >>> halved = lambda x: torch.nn.functional.gelu(x) / 2  # a function of yours, and its definition
        >>> naive = lambda x: x * (1 + torch.erf(x / 2**0.5)) / 4
        >>> print(flashgau.compare(halved, torch.randn(9), reference=naive).ok)
        True
    """
    name = _operation(fn, reference, backend)
    floating = [x for x in [*_tensors((args, kwargs)), *_parameters(fn).values()] if x.is_floating_point()]
    if not floating:
        raise ValueError(f"compare: no argument is a floating tensor; expected those of {name or _name_of(fn)}")
    dtype = floating[0].dtype
    naive = plain = reference
    chosen, changes = "", {}
    if name is not None:
        if kwargs.get("dropout_p") and kwargs.get("dropout_seed") is None:
            kwargs = {**kwargs, "dropout_seed": 0}
        naive = getattr(flashgau.reference, name)
        plain = naive.__wrapped__
        heads = floating[: _HEADS.get(name, 0)]  # whose width decides who can run the call
        width = max((x.shape[-1] for x in heads if x.dim()), default=0)
        chosen = dispatch.resolve(name, backend, floating[0].device, dtype, width)
        changes = {"backend": chosen}
    assert naive is not None
    assert plain is not None

    if name is not None:
        names = ("out", "lse" if name == "attention" else "state")
    standard = Standard(fn, naive, plain, args, kwargs, names=names, grad=grad)
    return Report(name or _name_of(fn), chosen, dtype, standard.hold(fn, **changes))


class Standard:
    """What the reference of one call gives, computed when it is needed and once, for any number of functions.

    Args:
        fn: a function of those that are held: its arguments have their names, and a module its parameters.
        naive: its definition.
        plain: the definition in the arguments' own dtype; the same, unless that is another function.
        args: of the call.
        kwargs: of the call.
        names: of several results.
        grad: also hold the gradient of every floating argument.
    """

    dtype: torch.dtype
    seed: int

    def __init__(
        self,
        fn: Callable[..., Any],
        naive: Callable[..., Any],
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        names: Sequence[str] | None = None,
        grad: bool = True,
    ) -> None:
        self.dtype = next(
            x for x in [*_tensors((args, kwargs)), *_parameters(fn).values()] if x.is_floating_point()
        ).dtype
        self.seed = int(torch.randint(2**31, ()))
        self._runs = _Runs(fn, naive, args, kwargs, names, self._weighting if grad else None)
        self._naive, self._plain = naive, plain
        self._exact: dict[str, Tensor] | None = None
        self._others: list[dict[str, Tensor]] = []

    def _weighting(self, shape: torch.Size, place: int) -> Tensor:
        """The random weights of a result, the same numbers in every run: rounded to the input's dtype.

        Their mean is as large as their deviation. About a mean of zero what a long sum loses at every step, in one
        direction, would average out, as the sum itself does.
        """
        generator = torch.Generator().manual_seed(self.seed + place)
        return (1 + torch.randn(shape, generator=generator)).to(self.dtype)

    @property
    def exact(self) -> dict[str, Tensor]:
        """The results of the definition in fp64, and their gradients."""
        if self._exact is None:
            self._exact = self._runs.naive(self._naive, torch.float64)
        return self._exact

    def _other(self, place: int) -> dict[str, Tensor]:
        """Those in the arguments' dtype, then those in fp64 of random moves of the arguments."""
        if place == len(self._others):
            if place == 0:
                self._others.append(self._runs.naive(self._plain, None))
            else:
                moved = nudged(self.seed + place - 1, self.dtype)
                self._others.append(self._runs.naive(self._naive, torch.float64, moved))
        return self._others[place]

    def hold(self, fn: Callable[..., Any], **changes: Any) -> list[Row]:
        """The rows of one function, which is called with the arguments and `changes`."""
        ours = self._runs.ours(fn, **changes)  # first: it checks the arguments
        if ours.keys() != self.exact.keys():
            raise ValueError(f"compare: `fn` gives {', '.join(ours)}; its reference gives {', '.join(self.exact)}")
        return held_beside_moves(ours, self.exact, self._other, self.dtype)


_HEADS = {"attention": 3, "gau_attention": 2, "mixed_chunk_attention": 4, "mixed_chunk_step": 4}
_OPERATIONS: dict[Any, str] = {
    function: function.__name__
    for function in (attention, glu, glu_linear, gau_attention, mixed_chunk_attention, mixed_chunk_step)
}


def _operation(fn: Any, naive: Any, backend: str | None) -> str | None:
    """The name of one of ours, known by what it is and not by what it is called; None for another function."""
    if not callable(fn):
        raise TypeError(f"compare: `fn` is a {type(fn).__name__}; expected a function or module")
    name = _OPERATIONS.get(fn) if isinstance(fn, Hashable) else None
    if name is not None and naive is not None:
        raise ValueError(f"compare: `reference` was given with flashgau.{name}; expected none, as it brings its own")
    if name is None and naive is None:
        ours = ", ".join(f"flashgau.{ours}" for ours in _OPERATIONS.values())
        raise ValueError(
            f"compare: `fn` is {_name_of(fn)!r} without `reference`; expected one of {ours}, or a naive function that "
            f"defines it as `reference`"
        )
    if name is None and not callable(naive):
        raise TypeError(f"compare: `reference` is a {type(naive).__name__}; expected a function or module")
    if name is None and backend is not None:
        raise ValueError(f"compare: `backend` is {backend!r} with {_name_of(fn)!r}, which is no operation of flashgau")
    return name


def _name_of(fn: Any) -> str:
    if isinstance(fn, functools.partial):
        return _name_of(fn.func)
    own = getattr(_module(fn), "__name__", None)
    return str(own or type(_module(fn)).__name__)


def _module(fn: Any) -> Any:
    """What was compiled, of a module that torch.compile made."""
    return getattr(fn, "_orig_mod", fn)


def _parameters(fn: Any) -> dict[str, Tensor]:
    """Those of a module that are trained, by name."""
    module = _module(fn)
    found = module.named_parameters() if isinstance(module, torch.nn.Module) else ()
    return {name: x for name, x in found if x.requires_grad}


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in a value, also those inside of containers and states."""
    found: list[Tensor] = []
    map_tensors("", value, lambda name, x: found.append(x))
    return found


def map_tensors(name: str, value: Any, change: Callable[[str, Tensor], Any]) -> Any:
    """The value with every tensor in it changed; the name says where it stands."""

    def part(key: Any, x: Any) -> Any:
        return map_tensors(f"{name}.{key}" if name else str(key), x, change)

    if isinstance(value, Tensor):
        return change(name, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: part(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(part(key, x) for key, x in zip(value._fields, value, strict=True)))
    if isinstance(value, (tuple, list)):
        return type(value)(part(i, x) for i, x in enumerate(value))
    return {key: part(key, x) for key, x in value.items()} if isinstance(value, dict) else value


Weighting = Callable[[torch.Size, int], Tensor]


class _Runs:
    """Runs of functions and of their reference, each on copies of the arguments: results and gradients by name.

    Args:
        fn: a function, after whose arguments gradients are called.
        naive: its reference.
        args: of the call.
        kwargs: of the call.
        names: of several results.
        weighting: of the results, for gradients; None for none.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        naive: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Sequence[str] | None,
        weighting: Weighting | None,
    ) -> None:
        self.args, self.kwargs, self.names, self.weighting = args, kwargs, names, weighting
        self.arguments = _argument_names(fn, len(args))
        both = _parameters(naive).keys()
        self.shared = {name: x for name, x in _parameters(fn).items() if name in both}

    def ours(self, fn: Callable[..., Any], **changes: Any) -> dict[str, Tensor]:
        """Of a function, with the arguments as they are."""
        args, kwargs, inputs = self._copied(lambda x: x)
        return self._found(fn(*args, **{**kwargs, **changes}), inputs | self.shared)

    def naive(
        self, reference: Any, dtype: torch.dtype | None, change: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, Tensor]:
        """Of a reference, with changed arguments in `dtype` (None: their own)."""

        def changed(x: Tensor) -> Tensor:
            return change(x if dtype is None else x.to(dtype))

        args, kwargs, inputs = self._copied(changed)
        if not isinstance(reference, torch.nn.Module):
            return self._found(reference(*args, **kwargs), inputs)
        state = {**dict(reference.named_parameters()), **dict(reference.named_buffers()), **self.shared}
        state = {name: changed(x.detach()) if x.is_floating_point() else x for name, x in state.items()}
        shared = {name: state[name].requires_grad_(self.weighting is not None) for name in self.shared}
        return self._found(torch.func.functional_call(reference, state, args, kwargs), inputs | shared)

    def _copied(self, change: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """Changed copies of the arguments, and of those that floating tensors by name."""
        inputs: dict[str, Tensor] = {}

        def copied(name: str, x: Tensor) -> Tensor:
            copy = _copy(x)
            if x.is_floating_point():
                copy = inputs[name] = change(copy).requires_grad_(self.weighting is not None)
            return copy

        args = tuple(map_tensors(name, x, copied) for name, x in zip(self.arguments, self.args, strict=True))
        return args, {name: map_tensors(name, x, copied) for name, x in self.kwargs.items()}, inputs

    def _found(self, result: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results, and the gradients of `inputs`."""
        results = _named_results(result, self.names)
        found = {key: value.detach() for key, value in results.items()}
        if self.weighting is None:
            return found
        terms = []
        for place, value in enumerate(results.values()):
            if value.requires_grad:
                weight = self.weighting(value.shape, place).to(value)
                alive = torch.isfinite(value)  # the log-sum-exp of a row that sees nothing is -inf
                terms.append((torch.where(alive, value, 0) * torch.where(alive, weight, 0)).sum())
        if terms:
            total = torch.stack([t.to(torch.float64) for t in terms]).sum()
            grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
            for (key, x), g in zip(inputs.items(), grads, strict=True):
                found[f"d{key}"] = torch.zeros_like(x) if g is None else g
        return found


def nudged(seed: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
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


def _argument_names(fn: Any, count: int) -> list[str]:
    """Names of that many positional arguments, as far as the function has names for them."""
    module = _module(fn)
    try:
        parameters = inspect.signature(module.forward if isinstance(module, torch.nn.Module) else fn).parameters
    except (TypeError, ValueError):  # built in, without a signature
        parameters = {}  # type: ignore[assignment]
    named = [x.name for x in parameters.values() if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    return [named[i] if i < len(named) else str(i) for i in range(count)]


def _named_results(result: Any, names: Sequence[str] | None) -> dict[str, Tensor]:
    """The tensors of a result by name: one is "out"; those of a container have its keys, fields or places."""
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> Tensor:
        found[name] = x
        return x

    if isinstance(result, Tensor):
        found["out"] = result
    elif type(result) in (tuple, list):
        if names is None:
            names = [f"out{i}" for i in range(len(result))]
        if len(names) != len(result):
            raise ValueError(f"compare: `names` has {len(names)} names; expected one for each of {len(result)} results")
        for name, x in zip(names, result, strict=True):
            map_tensors(name, x, keep)
    else:
        map_tensors("", result, keep)
    if not found:
        raise TypeError(
            f"compare: the result is a {type(result).__name__}; expected tensors, or something that holds them"
        )
    return found


def held(
    ours: dict[str, Tensor], exact: dict[str, Tensor], plain: list[dict[str, Tensor]], dtype: torch.dtype
) -> list[Row]:
    """Results and gradients ("d" and a name) held to the exact ones, beside the worst of plain PyTorch's."""
    steepest = max((_scale(x) for key, x in exact.items() if key.startswith("d")), default=0.0)
    return [_row(key, ours[key], exact[key], [x[key] for x in plain], steepest, dtype) for key in exact]


def held_beside_moves(
    ours: dict[str, Tensor], exact: dict[str, Tensor], other: Callable[[int], dict[str, Tensor]], dtype: torch.dtype
) -> list[Row]:
    """`held` beside plain PyTorch's run, which is `other(0)`, and the exact one of `nudged` arguments, `other(1)`.

    Plain PyTorch may be right by luck where terms cancel: it gets no better than the last places of fp32 allow. So may
    one random move of the arguments have no effect; hence up to `other(4)` before a miss is one.
    """
    others = [other(0)]
    for place in range(1, _MOVES + 1):
        others.append(other(place))
        rows = held(ours, exact, others, dtype)
        if all(row.ok for row in rows):
            break
    return rows


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

"""Forward mode and second derivatives of an operation, which follow from two more functions of the floors.

With J the derivative of the forward at x, the backward gives J^T g for gradients g of the results. The floors add
NAME_jvp, which gives J t for tangents t of the inputs, and NAME_second, the gradient H(g, t) by x of <g, J t>. What is
differentiated again is always that number:

    J t     by t: J^T g     by x: H(g, t)
    J^T g   by g: J t       by x: H(g, t)     its tangent: J^T tg + H(g, t)
    H(g, t) by t, along u:  H(g, u)

An operation without these functions is written in others (`Operation.others`), which are differentiated in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flashgau.eager.common import accumulator

from .. import pytorch
from . import autograd
from .names import Name, flat, grouped
from .operator import Operator, refusal
from .plain import AT_ONCE
from .tuples import Flattening

FLOOR = "tangents"  # the file, on every floor, that has the functions


class Higher:
    """The operators flashgau::NAME_jvp and flashgau::NAME_second, and the rules that make use of them.

    Args:
        operation: whose they are. Its `tuples` have `tangents`, the kind with a field "t" + the name of each input, and
            `along`, the kind with the results' tangents, if NAME_second reads these. Inputs without such a field are
            None where these operators are called.
        fixed: what follows the tensors in an operator's schema.
        error: what the refusal of a third derivative calls the operation.
    """

    inputs: list[Any]
    absent: list[Any]
    tangents: list[Name]
    cotangents: list[Any]
    arguments: Any
    arguments_second: Any
    flattening: Flattening
    flattening_second: Flattening
    jvp: Operator
    second: Operator
    refusal: str

    def __init__(self, operation: Any, fixed: list[str], error: str) -> None:
        self.of = operation
        fields = operation.tuples["tangents"]._fields
        self.inputs = [x for x in operation.differentiated if f"t{x.name}" in fields]
        self.absent = [x.name for x in operation.differentiated if x not in self.inputs]
        unread = {*self.absent, *(x.name for x in operation.saved)}
        read = [x for x in operation.kept if x.name not in unread]
        self.tangents = [Name(f"t{x.name}", "?", "") for x in self.inputs]
        self.cotangents = [x._replace(name=f"d{x.name}") for x in operation.results]
        along = [x._replace(name=f"t{x.name}", mark="") for x in operation.results if "along" in operation.tuples]
        takes = [*self.tangents, *read]
        takes_second = [*self.cotangents, *self.tangents, *read, *along]
        self.arguments = [*(x.name for x in takes), *operation.fixed]
        self.arguments_second = [*(x.name for x in takes_second), *operation.fixed]
        self.flattening, self.flattening_second = (
            Flattening(operation.tuples, x) for x in (self.arguments, self.arguments_second)
        )
        schemas = [f"({', '.join([*(x.schema for x in names), *fixed])})" for names in (takes, takes_second)]
        self.jvp = Operator(f"{operation.name}_jvp", schemas[0], self._jvp, self._fake)
        self.second = Operator(f"{operation.name}_second", schemas[1], self._second, self._fake_second)
        self.jvp.register_autograd(self._differentiate_jvp, self._keep_jvp, no_tangents=_twice_forward(error))
        self.refusal = refusal(error, "twice")
        refused = {x.name for x in (*self.cotangents, *self.inputs)}
        others = [i for i, x in enumerate(takes_second) if x.name in refused]
        self.second.register_autograd(
            self._differentiate_second, self._keep_second, no_tangents=self.refusal, refused=others
        )

    def applies(self, named: dict[str, Any]) -> bool:
        """Whether there is no input that these functions know nothing of."""
        return all(named[name] is None for name in self.absent)

    # ------------------------------------------------------------ the operators

    def _jvp(self, *args: Any) -> list[Any]:
        named = self.flattening.named(args)
        found = autograd.run(FLOOR, named.pop("backend"), f"{self.of.name}_jvp", **named)
        return [found] if isinstance(found, Tensor) else list(found)

    def _fake(self, *args: Any) -> list[Any]:
        named = dict.fromkeys(self.absent) | dict(zip(self.arguments, args, strict=True))
        return list(self.of.shapes(**named, save=False))[: len(self.of.results)]

    def _second(self, *args: Any) -> list[Any]:
        named = self.flattening_second.named(args)
        found = autograd.run(FLOOR, named.pop("backend"), f"{self.of.name}_second", **named)
        given = dict(zip(self.arguments_second, args, strict=True))
        return [None if given[x.name] is None else g for x, g in zip(self.inputs, found, strict=True)]

    def _fake_second(self, *args: Any) -> list[Any]:
        named = dict.fromkeys(self.absent) | dict(zip(self.arguments_second, args, strict=True))
        found = zip(self.of.differentiated, self.of.gradients(**named), strict=True)
        return [None if named[x.name] is None else g for x, g in found if x in self.inputs]

    # ------------------------------------------------------------ the rules

    def along(self, named: dict[str, Any]) -> dict[str, Any]:
        """J t by the results' names with "t", of everything by name."""
        found = self.jvp(*(named[name] for name in self.arguments))
        return {f"t{x.name}": t for x, t in zip(self.of.results, found, strict=True)}

    def of_product(self, named: dict[str, Any]) -> dict[str, Any]:
        """H(g, t) by the inputs' names, of everything by name, J t among it."""
        found = self.second(*(named[name] for name in self.arguments_second))
        return {x.name: g for x, g in zip(self.inputs, found, strict=True)}

    def filled(self, named: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
        """The gradients of the results, zeros for one that is missing and must be there."""
        return {
            x.name: torch.zeros_like(like[of.name]) if named[x.name] is None and x.mark != "?" else named[x.name]
            for x, of in zip(self.cotangents, self.of.results, strict=True)
        }

    def tangents_forward(self, primals: list[Any], tangents: list[Any], results: list[Any]) -> list[Any]:
        """The forward's rule in forward mode: J t, and nothing of what is saved."""
        of = self.of
        named = dict(zip(of.arguments, primals, strict=True))
        named |= {f"t{name}": t for name, t in zip(of.arguments, tangents, strict=True)}
        named |= {x.name: value for x, value in zip(of.results, results, strict=False)}
        found = list(self.along(named).values())
        return found + [None] * (len(results) - len(found))

    def tangents_backward(self, primals: list[Any], tangents: list[Any], results: list[Any]) -> list[Any]:
        """The backward's: J^T tg + H(g, t)."""
        of = self.of
        named = dict(zip(of.arguments_back, primals, strict=True))
        moved = dict(zip(of.arguments_back, tangents, strict=True))
        parts: list[dict[str, Any]] = []
        if any(moved[x.name] is not None for x in self.cotangents):
            like = {x.name: named[d.name] for x, d in zip(of.results, self.cotangents, strict=True)}
            parts.append(of.backward_by_name(named | self.filled(moved, like)))
        if any(moved[x.name] is not None for x in self.inputs):
            named |= {f"t{x.name}": moved[x.name] for x in self.inputs}
            named |= self.along(named)
            parts.append(self.of_product(named))
        return [_sum(part.get(x.name) for part in parts) for x in of.differentiated]

    def _keep_jvp(self, ctx: Any, inputs: tuple[Any, ...], output: Iterable[Any]) -> None:
        count = len(self.arguments) - len(self.of.fixed)
        ctx.save_for_backward(*inputs[:count], *output)
        ctx.fixed = inputs[count:]
        ctx.set_materialize_grads(False)

    def _differentiate_jvp(self, ctx: Any, gradients: list[Any]) -> tuple[Any, ...]:
        kept = list(ctx.saved_tensors)
        count = len(self.arguments) - len(self.of.fixed)
        named = dict.fromkeys(self.of.arguments_back)
        named |= dict(zip(self.arguments, [*kept[:count], *ctx.fixed], strict=True))
        named |= {f"t{x.name}": t for x, t in zip(self.of.results, kept[count:], strict=True)}
        given = dict(zip((x.name for x in self.cotangents), gradients, strict=True))
        if all(x is None for x in gradients):
            return tuple(None for _ in self.arguments)
        named |= self.filled(given, {x.name: named[f"t{x.name}"] for x in self.of.results})
        needed = {name for name, need in zip(self.arguments, ctx.needs_input_grad, strict=False) if need}
        found: dict[str, Any] = {}
        if any(x.name in needed for x in self.tangents):
            found = {f"t{name}": g for name, g in self.of.backward_by_name(named).items()}
        if any(x.name in needed for x in self.inputs):
            found |= self.of_product(named)
        return tuple(found.get(name) if name in needed else None for name in self.arguments)

    def _keep_second(self, ctx: Any, inputs: tuple[Any, ...], output: Iterable[Any]) -> None:
        count = len(self.arguments_second) - len(self.of.fixed)
        ctx.save_for_backward(*inputs[:count])
        ctx.fixed = inputs[count:]
        ctx.set_materialize_grads(False)

    def _differentiate_second(self, ctx: Any, gradients: list[Any]) -> tuple[Any, ...]:
        """By t alone, for which `torch.autograd.functional.hvp` asks: <H(g, t), u> = <H(g, u), t>."""
        named = dict(zip(self.arguments_second, [*ctx.saved_tensors, *ctx.fixed], strict=True))
        named |= {x.name: u for x, u in zip(self.tangents, gradients, strict=True)}
        named |= self.along(named)
        found = {f"t{name}": g for name, g in self.of_product(named).items()}
        for x in (*self.cotangents, *self.inputs):
            if named[x.name] is not None:  # nobody wants it, or it would have been refused
                found[x.name] = named[x.name].new_zeros(()).expand_as(named[x.name])
        return tuple(found.get(name) for name in self.arguments_second)

    def differentiate_backward(self, named: dict[str, Any], needed: set[str]) -> dict[str, Any]:
        """The gradients of the backward's arguments by name; `named` has the cotangents t of its results with "t"."""
        named |= self.along(named)
        found = {x.name: named[f"t{of.name}"] for x, of in zip(self.cotangents, self.of.results, strict=True)}
        if any(x.name in needed for x in self.inputs):
            found |= self.of_product(named)
        return found


def by_others(of: Any, named: dict[str, Any]) -> dict[str, Any]:
    """The same of an operation that is written in others: J t, and H(g, t).

    Where its rows are independent, and the results final, so many rows at a time that what lies between stays small.
    """
    shared = set() if of.rows is None else {mark + x for x in of.rows.shared.split() for mark in ("", "t")}
    rows = {name: x for name, x in named.items() if isinstance(x, Tensor) and name not in shared}
    largest = max(x.numel() for x in rows.values())
    final = not (torch.is_grad_enabled() or pytorch.transforms_active() or torch.compiler.is_compiling())
    if not final or largest <= AT_ONCE or of.rows is None or not of.rows.any_axes or of.rows.single:
        return _by_others(of, named)
    flattened = {name: x.flatten(0, -2) for name, x in rows.items()}
    count, found = next(iter(flattened.values())).shape[0], dict[str, Tensor]()
    step = max(1, AT_ONCE * count // largest)
    for i in range(0, count, step):
        parts = _by_others(of, named | {name: x[i : i + step] for name, x in flattened.items()})
        for name, part in parts.items():
            if name in shared:  # a sum over rows
                found[name] = found[name] + part if name in found else part.to(accumulator(part.dtype))
            else:
                found.setdefault(name, part.new_empty(count, part.shape[-1]))[i : i + step] = part
    return {name: x.to(named[name].dtype).view(named[name].shape) for name, x in found.items()}


def _by_others(of: Any, named: dict[str, Any]) -> dict[str, Any]:
    inputs = [x.name for x in of.differentiated if named[x.name] is not None]
    results = [x.name for x in of.results if named[f"d{x.name}"] is not None]
    sizes = {name: len(named[f"d{name}"]) for name in results if isinstance(named[f"d{name}"], list)}
    count = len(of.arguments)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = named | dict(zip(inputs, tensors, strict=True)) | {x.name: None for x in of.inputs if x.mark == "+"}
        found = of.by_others([given.get(name) for name in of.arguments[:count]])
        return tuple(flat(value for x, value in zip(of.results, found, strict=True) if x.name in results))

    tangents = [torch.zeros_like(named[x]) if named[f"t{x}"] is None else named[f"t{x}"] for x in inputs]

    def backward(primals: list[Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
        pulled: tuple[Tensor, ...] = torch.func.vjp(function, *primals)[1](tuple(given))
        return pulled

    # In reverse twice: PyTorch's own forward mode is not everywhere right where it is differentiated (of layer_norm).
    given = flat(named[f"d{name}"] for name in results)
    second, along = torch.func.vjp(backward, [named[name] for name in inputs], given)[1](tuple(tangents))
    back = grouped([x for x in of.results if x.name in results], along, sizes)
    return dict(zip(inputs, second, strict=True)) | {f"d{name}": value for name, value in back.items()}


def _sum(parts: Iterable[Any]) -> Any:
    given = [x for x in parts if x is not None]
    return None if not given else given[0] if len(given) == 1 else given[0] + given[1]


def _twice_forward(op: str) -> str:
    return f'{op}: a tangent has no tangent on the optimised backends; call it with backend="reference"'

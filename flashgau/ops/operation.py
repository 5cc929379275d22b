"""An operation declared once: its PyTorch operators, their schemas and shapes, and the derivative follow.

    _glu = Operation("glu", "gate up?", "out", _shapes, op="glu", saved="activated", options=GluOptions)
    out, _ = _glu(gate, up, options=GluOptions("silu", "identity"), save=True, backend="eager")

How a declaration is written: `names.py`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from typing import Any, Optional

from torch import Tensor

from . import autograd
from .names import Options, flat, grouped, names
from .operator import Operator

_SCHEMA: dict[Any, str] = {bool: "bool", int: "SymInt", float: "float", str: "str", list[int]: "SymInt[]"}
_SCHEMA |= {Optional[int]: "SymInt?", Optional[float]: "float?"}
Shapes = Callable[..., list[Any]]


class Operation:
    """The forward and the backward of an operation: what they take and give, in the order in which it is passed on.

    Args:
        name: of the operators flashgau::NAME and flashgau::NAME_backward, and of the floors' functions NAME_forward
            and NAME_backward, which get everything by name. The first returns the results, then what is saved; the
            second, which gets the results' gradients too ("d" before the name), the gradients of the inputs.
        inputs: the tensors that are differentiated.
        results: what is differentiated. A missing gradient of one with "?" is None, of others zeros.
        shapes: (everything by name) -> empty tensors, or None, like the results and what is saved.
        op: the operation whose file, on every floor, has the functions.
        data: tensors that are not differentiated.
        saved: what the forward makes for the backward alone, if called with `save`; else it is None.
        reads: the results that the backward reads.
        options: a tuple with a type for each field; floors get these by name.
        gradients: like `shapes`, for the backward; unless given, they are like the inputs and contiguous.
        adapt: changes everything by name to what the floors' functions take.
        error: what the refusal of a second derivative calls the operation, `op` unless given.
        differentiable: if not, the floors' one function is called NAME.
    """

    def __init__(
        self, name: str, inputs: str, results: str, shapes: Shapes, *, op: str, data: str = "", saved: str = "",
        reads: str = "", options: Any = Options, gradients: Shapes | None = None, error: str = "",
        adapt: Callable[[dict[str, Any]], None] | None = None, differentiable: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.op, self.options, self.adapt, self.shapes = name, op, options, adapt, shapes
        self.inputs, self.results, self.saved = names(inputs), names(results), names(saved)
        self.differentiated = [x for x in self.inputs if x.mark != "+"]
        self.required = [x for x in self.results if x.mark != "?"] if len(self.results) > 1 else []
        self.kept = [*self.differentiated, *names(data), *names(reads), *names(saved, mark="?")]
        types = typing.get_type_hints(options)
        fixed = [*(f"{_SCHEMA[types[field]]} {field}" for field in options._fields), "str backend"]
        takes = [*(x.schema for x in (*self.inputs, *names(data))), *(["bool save"] if saved else []), *fixed]
        takes_back = [*(x.schema for x in (*names(results, prefix="d"), *self.kept)), *fixed]
        self.arguments, self.arguments_back = ([part.split()[-1] for part in parts] for parts in (takes, takes_back))
        self.gradients = gradients or self._like_inputs
        self.function = f"{name}_forward" if differentiable else name
        self.forward = Operator(name, f"({', '.join(takes)})", self._forward, self._fake)
        if not differentiable:
            self.forward.refuse_derivative(op)
            return
        self.backward = Operator(f"{name}_backward", f"({', '.join(takes_back)})", self._backward, self._fake_back)
        self.backward.refuse_derivative(error or op)
        self.forward.register_autograd(self._differentiate, self._keep)

    def __call__(self, *tensors: Any, options: Any = (), save: bool = False, backend: str) -> list[Any]:
        """The results, and what was saved."""
        return self.forward(*tensors, *([save] if self.saved else []), *options, backend)

    def _run(self, function: str, named: dict[str, Any]) -> Any:
        """What a floor's function makes of everything by name."""
        if self.adapt is not None:
            self.adapt(named)
        return autograd.run(self.op, named.pop("backend"), function, **named)

    def _forward(self, *args: Any) -> Any:
        results = self._run(self.function, dict(zip(self.arguments, args, strict=True)))
        return [results] if isinstance(results, Tensor) else results

    def _fake(self, *args: Any) -> list[Any]:
        return self.shapes(**dict(zip(self.arguments, args, strict=True)))

    def _backward(self, *args: Any) -> list[Any]:
        named = dict(zip(self.arguments_back, args, strict=True))
        given = [named[x.name] is not None for x in self.differentiated]
        results = self._run(f"{self.name}_backward", named)
        return [gradient if there else None for gradient, there in zip(results, given, strict=True)]

    def _fake_back(self, *args: Any) -> list[Any]:
        return self.gradients(**dict(zip(self.arguments_back, args, strict=True)))

    def _like_inputs(self, **named: Any) -> list[Any]:
        inputs = (named[x.name] for x in self.differentiated)
        return [None if x is None else x.new_empty(x.shape) for x in inputs]

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Iterable[Any]) -> None:
        """Keep for the derivative what it reads."""
        named = dict(zip(self.arguments, inputs, strict=True))
        ctx.sizes = {x.name: len(named[x.of]) for x in self.results if x.of}
        named |= grouped([*self.results, *self.saved], output, ctx.sizes)
        if self.saved and not named["save"]:
            named |= {x.name: [] if x.is_list else None for x in self.saved}
        ctx.save_for_backward(*flat([named[x.name] for x in self.kept]))
        ctx.shapes = {x.name: [part.shape for part in flat([named[x.name]])] for x in self.required}
        ctx.fixed = [named[field] for field in self.options._fields] + [named["backend"]]
        ctx.set_materialize_grads(False)  # or zeros would be made for what is saved, which has no gradient

    def _differentiate(self, ctx: Any, gradients: list[Any]) -> tuple[Any, ...]:
        """The gradients of all arguments, from those of the results."""
        given = grouped(self.results, gradients, ctx.sizes)
        if all(x is None for x in flat(given.values())):
            return tuple(None for _ in self.arguments)
        kept = grouped(self.kept, ctx.saved_tensors, {})
        for x in self.required:
            parts = zip(flat([given[x.name]]), ctx.shapes[x.name], strict=True)
            filled = [kept[self.inputs[0].name].new_zeros(shape) if g is None else g for g, shape in parts]
            given[x.name] = filled if x.is_list else filled[0]
        results = self.backward(*given.values(), *kept.values(), *ctx.fixed)
        found = dict(zip((x.name for x in self.differentiated), results, strict=True))
        found |= {x.name: given[self.results[0].name] for x in self.inputs if x.mark == "+"}
        needed = zip(self.arguments, ctx.needs_input_grad, strict=False)  # which has one more: the function that ran
        return tuple(found.get(name) if need else None for name, need in needed)

"""An operation declared once: its PyTorch operators, their schemas and shapes, and the derivative follow.

    _glu = Operation("glu", "gate up?", "out", _shapes, op="glu", saved="activated", tuples={"options": GluOptions})
    out, _ = _glu(gate, up, options=GluOptions("silu", "identity"), save=True, backend="eager")

How a declaration is written: `names.py`. The tuples: `flashgau/options.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .. import pytorch
from . import autograd
from .folding import Folding, Rows
from .higher import Higher, by_others
from .names import Name, flat, grouped, names
from .operator import Operator
from .tuples import Flattening, fields

Shapes = Callable[..., list[Any]]


class Operation:
    """The forward and the backward of an operation: what they take and give, in the order in which it is passed on.

    Args:
        name: of the operators flashgau::NAME and flashgau::NAME_backward, and of the floors' functions NAME_forward
            and NAME_backward, which get everything by name. The first returns the results, then what is saved; the
            second, which gets the results' gradients too ("d" before the name), the gradients of the inputs.
        inputs: the tensors that are differentiated. If some are written ("!"), there is one result and no derivative.
        results: what is differentiated. A missing gradient of one with "?" is None, of others zeros.
        shapes: (everything by name) -> empty tensors, or None, like the results and what is saved.
        op: the operation whose file, on every floor, has the functions.
        data: tensors that are not differentiated.
        saved: what the forward makes for the backward alone, if called with `save`; else it is None.
        reads: the results that the backward reads.
        tuples: kinds of tuples by name, in which the floors' functions get tensors named above, and everything that is
            no tensor. A function gets those of which it has a field.
        gradients: like `shapes`, for the backward; unless given, they are like the inputs and contiguous.
        error: what the refusal of a derivative calls the operation, `op` unless given.
        others: (all arguments but `save`, as the floors' functions get them, and `backend`) -> the results, by
            operations that are differentiated forward and twice; unless `tuples` has `tangents` (`higher.py`).
        differentiable: if not, the floors' one function is called NAME.
        function: what the floors' forward is called, if it is another operation's.
        rows: which tensors have rows, so that torch.vmap makes one call of the operation; without, one for each entry.
    """

    name: str
    op: str
    tuples: dict[str, Any]
    shapes: Shapes
    inputs: list[Name]
    results: list[Name]
    saved: list[Name]
    differentiated: list[Name]
    required: list[Name]
    kept: list[Name]
    arguments: list[str]
    arguments_back: list[str]
    fixed: list[str]
    flattening: Flattening
    flattening_back: Flattening
    gradients: Shapes
    function: str
    writes: bool
    forward: Operator
    backward: Operator
    higher: Higher | None

    def __init__(
        self, name: str, inputs: str, results: str, shapes: Shapes, *, op: str, data: str = "", saved: str = "",
        reads: str = "", tuples: dict[str, Any] | None = None, gradients: Shapes | None = None, error: str = "",
        differentiable: bool = True, function: str = "", rows: Rows | None = None,
        others: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.op, self.tuples, self.shapes = name, op, tuples or {}, shapes
        self.inputs, self.results, self.saved = names(inputs), names(results), names(saved)
        self.differentiated = [x for x in self.inputs if x.mark != "+"]
        self.required = [x for x in self.results if x.mark != "?"] if len(self.results) > 1 else []
        self.kept = [*self.differentiated, *names(data), *names(reads), *names(saved, mark="?")]
        tensors = [*self.inputs, *names(data)]
        fixed = [*(part for kind in self.tuples.values() for x in fields(kind) for part in x.schema), "str backend"]
        takes = [*(x.schema for x in tensors), *(["bool save"] if saved else []), *fixed]
        takes_back = [*(x.schema for x in (*names(results, prefix="d"), *self.kept)), *fixed]
        self.arguments, self.arguments_back, self.fixed = (
            [part.split()[-1] for part in parts] for parts in (takes, takes_back, fixed)
        )
        self.flattening, self.flattening_back = (
            Flattening(self.tuples, x) for x in (self.arguments, self.arguments_back)
        )
        self.gradients = gradients or self._like_inputs
        self.rows = rows
        self.function = function or (f"{name}_forward" if differentiable else name)
        self.others = others
        self.writes = any(x.mark == "!" for x in self.inputs)
        returns = "Tensor" if self.writes else "Tensor[]"
        folding = None if rows is None else Folding(self.arguments, rows)
        self.forward = Operator(name, f"({', '.join(takes)})", self._forward, self._fake, returns, folding)
        if self.writes:
            return
        if not differentiable:
            self.forward.refuse_derivative(op)
            return
        folding = None if rows is None else Folding(self.arguments_back, rows.of_backward())
        self.backward = Operator(
            f"{name}_backward", f"({', '.join(takes_back)})", self._backward, self._fake_back, folding=folding
        )
        self.higher = Higher(self, fixed, error or op) if "tangents" in self.tuples else None
        rules = (None, None) if self.higher is None else (self.higher.tangents_forward, self.higher.tangents_backward)
        self.forward.register_autograd(self._differentiate, self._keep, rules[0])
        if self.higher is None and others is None:
            self.backward.refuse_derivative(error or op)
        else:
            self.backward.register_autograd(self._differentiate_back, self._keep_back, rules[1])

    def __call__(self, *tensors: Any, save: bool = False, backend: str, **tuples: Any) -> Any:
        """The results, and what was saved, in a list; the only result of what writes its inputs."""
        plain = [*tensors, *([save] if self.saved else []), backend]
        args = self.flattening.flat(plain, tuples)
        if self.others is not None and not torch.compiler.is_compiling() and pytorch.in_forward_mode():
            named = dict(zip(self.arguments, args, strict=True))
            if self.higher is None or not self.higher.applies(named):
                return [*flat(self.by_others(args)), *(None for _ in self.saved)]
        return self.forward(*args)

    def by_others(self, args: list[Any]) -> Any:
        """The results of these arguments by operations that are differentiated forward and twice."""
        named = self.flattening.named(args)
        named.pop("save", None)
        assert self.others is not None
        return self.others(**named)

    def _forward(self, *args: Any) -> Any:
        named = self.flattening.named(args)
        results = autograd.run(self.op, named.pop("backend"), self.function, **named)
        return [results] if isinstance(results, Tensor) and not self.writes else results

    def _fake(self, *args: Any) -> Any:
        return self.shapes(**dict(zip(self.arguments, args, strict=True)))

    def _backward(self, *args: Any) -> list[Any]:
        named = self.flattening_back.named(args)
        results = autograd.run(self.op, named.pop("backend"), f"{self.name}_backward", **named)
        given = args[len(self.results) :]
        return [gradient if x is not None else None for gradient, x in zip(results, given, strict=False)]

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
        ctx.fixed = [named[argument] for argument in self.fixed]
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

    def backward_by_name(self, named: dict[str, Any]) -> dict[str, Any]:
        """The gradients of the inputs by name, of everything by name."""
        found = self.backward(*(named[name] for name in self.arguments_back))
        return dict(zip((x.name for x in self.differentiated), found, strict=True))

    def _keep_back(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep for the second derivative all that the backward was given."""
        count = len(self.arguments_back) - len(self.fixed)
        ctx.lists = [len(x) if isinstance(x, (list, tuple)) else None for x in inputs[:count]]
        ctx.save_for_backward(*flat(inputs[:count]))
        ctx.fixed = inputs[count:]
        ctx.set_materialize_grads(False)

    def _differentiate_back(self, ctx: Any, gradients: list[Any]) -> tuple[Any, ...]:
        """The gradients of the backward's arguments, from those of the gradients that it gave."""
        rest = iter(ctx.saved_tensors)
        kept = [next(rest) if size is None else list(islice(rest, size)) for size in ctx.lists]
        named = dict(zip(self.arguments_back, [*kept, *ctx.fixed], strict=True))
        named |= {f"t{x.name}": t for x, t in zip(self.differentiated, gradients, strict=True)}
        needs, sizes = iter(ctx.needs_input_grad), [*ctx.lists, *(None for _ in ctx.fixed)]
        needed = {
            name
            for name, size in zip(self.arguments_back, sizes, strict=True)
            if any(list(islice(needs, 1 if size is None else size)))
        }
        found: dict[str, Any] = {}
        if all(x is None for x in gradients):
            needed.clear()
        elif self.higher is not None and self.higher.applies(named):
            found = self.higher.differentiate_backward(named, needed)
        else:
            found = by_others(self, named)
        return tuple(
            found[name] if name in needed and name in found else None if size is None else [None] * size
            for name, size in zip(self.arguments_back, sizes, strict=True)
        )

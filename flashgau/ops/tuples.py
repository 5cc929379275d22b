"""The tuples that a floor's functions take as the flat arguments of a PyTorch operator, and back."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Optional

from flashgau.options import NumberOrRule, Window

_SCHEMA: dict[Any, str] = {bool: "bool", int: "SymInt", float: "float", str: "str", list[int]: "SymInt[]"}
_SCHEMA |= {Optional[int]: "SymInt?", Optional[float]: "float?"}


class Field(NamedTuple):
    """A field that is no tensor, as one argument or two."""

    name: str
    parts: tuple[str, ...]  # the arguments' names
    types: tuple[str, ...]  # and types, in PyTorch's language of schemas
    split: Callable[[Any], tuple[Any, ...]] = lambda x: (x,)
    join: Callable[..., Any] = lambda x: x

    @property
    def schema(self) -> list[str]:
        """The arguments in PyTorch's language of schemas."""
        return [f"{type_} {part}" for type_, part in zip(self.types, self.parts, strict=True)]


def fields(kind: Any) -> list[Field]:
    """Those of a tuple."""
    found = []
    for name, type_ in typing.get_type_hints(kind).items():
        if type_ in _SCHEMA:
            found.append(Field(name, (name,), (_SCHEMA[type_],)))
        elif type_ == Window:
            found.append(Field(name, ("left", "right"), ("SymInt?", "SymInt?"), lambda x: x, lambda *sides: sides))
        elif type_ == NumberOrRule:
            found.append(Field(name, (f"{name}_rule", f"{name}_value"), ("str", "float"), _of_rule, _rule_or_value))
    return found


def _of_rule(x: str | float) -> tuple[str, float]:
    return (x, 1.0) if isinstance(x, str) else ("", float(x))


def _rule_or_value(rule: str, value: float) -> str | float:
    return rule or value


class Flattening:
    """The flat arguments of one operator, by name, and what a function is given in place of them.

    Everything is looked up here, once: a call only moves values.

    Args:
        tuples: kinds by name; those of which no field is among the arguments are left out.
        arguments: names in order.
    """

    names: list[str]
    joined: list[tuple[Callable[..., Any], Callable[[Sequence[Any]], tuple[Any, ...]]]]
    tuples: Any
    plain: list[tuple[str, int]]
    split: list[tuple[Callable[[Any], tuple[Any, ...]], int]]
    order: list[int]

    def __init__(self, tuples: dict[str, Any], arguments: Sequence[str]) -> None:
        split = [x for kind in tuples.values() for x in fields(kind) if len(x.parts) > 1 and x.parts[0] in arguments]
        self.names = [*arguments, *(x.name for x in split)]  # of an operator's arguments, then of what they make
        place = {name: i for i, name in enumerate(self.names)}
        self.joined = [(x.join, _pick([place[part] for part in x.parts])) for x in split]
        taken = {part for x in split for part in x.parts}
        self.tuples = []
        for name, kind in tuples.items():
            if any(field in place for field in kind._fields):
                self.tuples.append((name, kind, _pick([place.get(field, len(self.names)) for field in kind._fields])))
                taken.update(kind._fields)
        self.plain = [(name, i) for i, name in enumerate(arguments) if name not in taken]
        given = [name for name, _ in self.plain] + [field for _, kind, _ in self.tuples for field in kind._fields]
        whence = {name: i for i, name in enumerate(given)}
        self.split = [(x.split, whence[x.name]) for x in split]
        whence |= {part: len(given) + i for i, part in enumerate(part for x in split for part in x.parts)}
        self.order = [whence[name] for name in arguments]

    def flat(self, plain: list[Any], tuples: dict[str, Any]) -> list[Any]:
        """The arguments, from those that are in no tuple, in order, and the tuples."""
        values = plain + [value for name, _, _ in self.tuples for value in tuples[name]]
        for split, i in self.split:
            values += split(values[i])
        return [values[i] for i in self.order]  # torch.compile traces this, and no itemgetter

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """What a function is given: tuples, and what is in none, by name. A field that is no argument is None."""
        values = [*args]
        values += [join(*parts(args)) for join, parts in self.joined]
        values.append(None)
        found = {name: args[i] for name, i in self.plain}
        for name, kind, parts in self.tuples:
            found[name] = tuple.__new__(kind, parts(values))
        return found


def _pick(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the values at these places."""
    one = places[0]
    return itemgetter(*places) if len(places) > 1 else lambda values: (values[one],)

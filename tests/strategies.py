"""Calls of the public operations, drawn by hypothesis: awkward sizes, dtypes, memory layouts, all options together.

A strategy draws a `Call`: an operation's name with its arguments. Values come from a generator seeded by
hypothesis, so a failing example repeats; sizes, layouts and options shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from backends import dtypes_of
from hypothesis import strategies as st
from torch import Tensor

import flashgau
from flashgau.testing.strategies import LAYOUTS, SIZES, lay_out, lengths, packings

WIDTHS = (1, 2, 3, 8, 15, 16, 17, 33)

ACTIVATIONS = ("identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh", "silu")
GAU_SCORES = (
    ("relu2", "keys"),
    ("relu2", "row"),
    ("relu2", 3.5),
    ("laplace", "keys"),
    ("laplace", "row"),
    ("laplace", 8),
    ("softmax", "keys"),
    ("softmax_plus", "keys"),
)

seeds = st.integers(0, 2**31)
sizes = st.sampled_from(SIZES)


@dataclass(frozen=True)
class Call:
    """One call of `flashgau.<name>`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **changes: Any) -> Any:
        return run(self.name, self.args, {**self.kwargs, **changes})

    def __repr__(self) -> str:
        shown = [_shown(x) for x in self.args] + [f"{key}={_shown(x)}" for key, x in self.kwargs.items()]
        return f"{self.name}({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, those of a state included."""
        found: list[Tensor] = []
        self.map(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed."""

        def mapped(x: Any) -> Any:
            if isinstance(x, Tensor):
                return change(x)
            if is_dataclass(x) and not isinstance(x, type):
                return replace(x, **{f.name: change(getattr(x, f.name)) for f in fields(x)})
            return x

        return Call(self.name, tuple(map(mapped, self.args)), {key: mapped(x) for key, x in self.kwargs.items()})

    def leaves(self) -> Call:
        """The same call on fresh leaves of autograd, in the same memory layout."""
        return self.map(lambda x: x.detach().requires_grad_(x.is_floating_point()))

    def with_options(self, **changes: Any) -> Call:
        """The same call with other keyword arguments."""
        return Call(self.name, self.args, {**self.kwargs, **changes})


def run(name: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """`flashgau.<name>`; a fourth argument of attention is its gate, which it takes by name."""
    if name == "attention" and len(args) > 3:
        args, options = args[:3], {**options, "gate": args[3]}
    return getattr(flashgau, name)(*args, **options)


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            return str(x.tolist())
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}/{list(x.stride())}"
    if is_dataclass(x):
        return f"{type(x).__name__}({', '.join(_shown(getattr(x, f.name)) for f in fields(x))})"
    return repr(x)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values from their own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Maker:
    """Draws tensors of one call."""

    def __init__(self, draw: Any, dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        self.generator = torch.Generator().manual_seed(draw(seeds))
        # One odd layout in a call shows as much as many, and half of all calls are plain.
        self.layouts = draw(st.sampled_from([("contiguous",), LAYOUTS]))

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, layout: str | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)
        return lay_out(x, layout or self.draw(st.sampled_from(self.layouts)))

    def beside(self, *shape: int) -> Tensor:
        """A parameter that may be fp32 beside half inputs."""
        wide = self.dtype.itemsize == 2 and self.draw(st.booleans())
        return self(*shape, dtype=torch.float32 if wide else self.dtype)

    def bias(self, leading: tuple[int, ...], longest: int, spare: int = 3) -> Tensor | None:
        """A relative bias of any accepted shape, sometimes longer than it must be, or None."""
        if not self.draw(st.booleans()):
            return None
        keep = self.draw(st.integers(0, len(leading)))
        lead = [s if self.draw(st.booleans()) else 1 for s in leading[len(leading) - keep :]]
        reach = max(longest, 1) + self.draw(st.integers(0, spare))
        return self.beside(*lead, 2 * reach - 1)


def offsets(draw: Any, total: int, parts: int | None = None) -> Tensor:
    """Ends of packed sequences."""
    return draw(packings(total, parts))


def valid_lengths(draw: Any, batch: int, n: int) -> Tensor:
    """Lengths of padded rows."""
    return draw(lengths(batch, n))


def _some(draw: Any, *values: Any) -> Any:
    """One of the values, or as likely None."""
    return draw(st.sampled_from(values)) if draw(st.booleans()) else None


def _present(**options: Any) -> dict[str, Any]:
    return {key: x for key, x in options.items() if x is not None}


@st.composite
def attention_calls(
    draw: Any, backend: str = "eager", dtype: torch.dtype | None = None, plain: bool | None = None
) -> Call:
    """`flashgau.attention`; `plain` draws no option, as the commonest call has none."""
    make = Maker(draw, dtype or draw(st.sampled_from(dtypes_of(backend))))
    few = draw(st.booleans()) if plain is None else plain
    slow = backend == "triton" and not torch.cuda.is_available()  # an interpreted program takes milliseconds
    many = st.tuples(st.integers(1, 3), st.integers(1, 3))
    heads_k, group = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1)]) if slow else many)
    heads = heads_k * group
    width = draw(st.sampled_from(WIDTHS))
    value_width = width if draw(st.booleans()) else draw(st.sampled_from(WIDTHS))
    kind = draw(st.sampled_from(["dense", "dense", "lengths", "packed", "packed twice"]))
    sizes = st.sampled_from((*SIZES[:6], *SIZES)) if slow else st.sampled_from(SIZES)
    m = draw(sizes)
    n = draw(sizes) if kind in ("packed twice",) or draw(st.booleans()) else m
    n = m if kind == "packed" else n
    batch = 1 if kind.startswith("packed") else draw(st.sampled_from([1, 1, 2, 0] if slow else [1, 2, 3, 0]))
    options: dict[str, Any] = {"causal": draw(st.booleans()), "return_lse": draw(st.booleans())}
    if kind == "lengths":
        options["lengths"] = valid_lengths(draw, batch, n)
    if kind.startswith("packed"):
        options["cu_seqlens"] = offsets(draw, m)
    if kind == "packed twice":
        options["cu_seqlens_k"] = offsets(draw, n, len(options["cu_seqlens"]) - 1).to(options["cu_seqlens"].dtype)
    if not few:
        side = st.sampled_from([None, 0, 1, 7, 16, 40])
        options |= _present(
            scale=_some(draw, 0.3, 1, -0.2),
            window=draw(st.tuples(side, side)) if draw(st.booleans()) else None,
            softcap=_some(draw, 0.7, 5.0, 30),
            rel_bias=make.bias((batch, heads), max(m, n)),
            sinks=make.beside(heads) if draw(st.booleans()) else None,
            dropout_p=_some(draw, 0.1, 0.5, 1.0),
        )
        if "dropout_p" in options:
            options["dropout_seed"] = draw(st.one_of(st.integers(0, 2**63 - 1), st.integers(-5, 5)))
        if draw(st.booleans()):
            options["gate"] = make(batch, heads, m, draw(st.sampled_from([1, value_width])))
            options["gate_activation"] = draw(st.sampled_from(ACTIVATIONS))
    q = make(batch, heads, m, width)
    k, v = make(batch, heads_k, n, width), make(batch, heads_k, n, value_width)
    return Call("attention", (q, k, v), options)


@st.composite
def glu_calls(draw: Any, backend: str = "eager", dtype: torch.dtype | None = None) -> Call:
    """`flashgau.glu`, packed and in two parts."""
    make = Maker(draw, dtype or draw(st.sampled_from(dtypes_of(backend))))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 17, 65]), min_size=0, max_size=3))
    options = {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "up_activation": draw(st.sampled_from(ACTIVATIONS)),
    }
    if draw(st.booleans()) and shape:
        return Call("glu", (make(*shape[:-1], 2 * shape[-1]),), options)
    return Call("glu", (make(*shape), make(*shape)), options)


@st.composite
def glu_linear_calls(draw: Any, backend: str = "eager", dtype: torch.dtype | None = None) -> Call:
    """`flashgau.glu_linear`."""
    make = Maker(draw, dtype or draw(st.sampled_from(dtypes_of(backend))))
    lead = draw(st.lists(st.sampled_from([0, 1, 2, 5, 17]), max_size=2))
    d, f = draw(st.sampled_from([0, *WIDTHS])), draw(st.sampled_from([0, *WIDTHS]))
    args: list[Any] = [make(*lead, d), make(f, d), make(f, d)]
    args += [make(f) if draw(st.booleans()) else None for _ in range(2)]
    options = {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "up_activation": draw(st.sampled_from(ACTIVATIONS)),
        "recompute": draw(st.booleans()),
    }
    return Call("glu_linear", tuple(args), options)


@st.composite
def gau_calls(draw: Any, backend: str = "eager", dtype: torch.dtype | None = None) -> Call:
    """`flashgau.gau_attention`."""
    make = Maker(draw, dtype or draw(st.sampled_from(dtypes_of(backend))))
    width, value_width = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    kind = draw(st.sampled_from(["dense", "lengths", "packed"]))
    m = draw(sizes)
    n = draw(sizes) if kind != "packed" and draw(st.booleans()) else m
    batch = 1 if kind == "packed" else draw(st.sampled_from([1, 2, 3, 0]))
    score, normalizer = draw(st.sampled_from(GAU_SCORES))
    options: dict[str, Any] = {"score": score, "normalizer": normalizer, "causal": draw(st.booleans())}
    options |= _present(gate_activation=_some(draw, *ACTIVATIONS))
    if kind == "lengths":
        options["lengths"] = valid_lengths(draw, batch, n)
    if kind == "packed":
        options["cu_seqlens"] = offsets(draw, m)
    options |= _present(rel_bias=make.bias((batch,), max(m, n)))
    q, k, v = make(batch, m, width), make(batch, n, width), make(batch, n, value_width)
    gate = (make(batch, m, value_width),) if draw(st.booleans()) else ()
    return Call("gau_attention", (q, k, v, *gate), options)


def draw_state(make: Maker, count: int, width: int, value_width: int, chunk: int) -> flashgau.MixedChunkState:
    """A state in the middle of its sequences, as some prefix may have left it."""
    position = torch.tensor([make.draw(st.integers(0, 3 * chunk)) for _ in range(count)], dtype=torch.int64)
    opened = torch.arange(chunk) < (position % chunk)[:, None]
    quad_k, lin_k, v = (
        torch.where(opened[..., None], make(count, chunk, w, layout="contiguous"), 0)
        for w in (width, width, value_width)
    )
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    kv = torch.where((position >= chunk)[:, None, None], make(count, width, value_width, dtype=wide), 0)
    return flashgau.MixedChunkState(kv, quad_k, lin_k, v, position)


@st.composite
def mixed_chunk_calls(
    draw: Any,
    backend: str = "eager",
    dtype: torch.dtype | None = None,
    causal: bool | None = None,
    stateful: bool | None = None,
) -> Call:
    """`flashgau.mixed_chunk_attention`, chunks of 1 to 16 with lengths about their multiples."""
    make = Maker(draw, dtype or draw(st.sampled_from(dtypes_of(backend))))
    width, value_width = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    chunk = draw(st.integers(1, 16))
    few = backend == "triton"  # programs that an interpreter goes through
    n = max(0, chunk * draw(st.integers(0, 3 if few else 5)) + draw(st.sampled_from([0, -1, 1, 3])))
    kind = draw(st.sampled_from(["dense", "lengths", "packed"]))
    batch = 1 if kind == "packed" else draw(st.sampled_from([1, 2, 0] if few else [1, 2, 3, 0]))
    causal = draw(st.booleans()) if causal is None else causal
    options: dict[str, Any] = {
        "chunk_size": chunk,
        "score": draw(st.sampled_from(["relu2", "laplace"])),
        "causal": causal,
    }
    options |= _present(
        gate_activation=_some(draw, *ACTIVATIONS),
        quad_normalizer=_some(draw, 1, 7.5),
        lin_normalizer=_some(draw, "tokens", 5, 0.5),
        lengths=valid_lengths(draw, batch, n) if kind == "lengths" else None,
        cu_seqlens=offsets(draw, n) if kind == "packed" else None,
        rel_bias=make.bias((batch,), chunk),
    )
    if causal and (draw(st.booleans()) if stateful is None else stateful):
        count = batch if kind != "packed" else len(options["cu_seqlens"]) - 1
        options["return_state"] = draw(st.booleans())
        if draw(st.booleans()):
            options["initial_state"] = draw_state(make, count, width, value_width, chunk)
    heads = [make(batch, n, width) for _ in range(4)]
    v = make(batch, n, value_width)
    gate = (make(batch, n, value_width),) if draw(st.booleans()) else ()
    return Call("mixed_chunk_attention", (*heads, v, *gate), options)


@st.composite
def step_calls(draw: Any, backend: str = "eager", dtype: torch.dtype | None = None) -> Call:
    """`flashgau.mixed_chunk_step`."""
    make = Maker(draw, dtype or draw(st.sampled_from(dtypes_of(backend))))
    width, value_width = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    batch, chunk = draw(st.sampled_from([1, 2, 3, 0])), draw(st.integers(1, 8))
    options: dict[str, Any] = {
        "state": draw_state(make, batch, width, value_width, chunk),
        "score": draw(st.sampled_from(["relu2", "laplace"])),
    }
    options |= _present(
        gate_activation=_some(draw, *ACTIVATIONS),
        quad_normalizer=_some(draw, 1, 7.5),
        lin_normalizer=_some(draw, "tokens", 5, 0.5),
        rel_bias=make.bias((batch,), chunk),
    )
    heads = [make(batch, 1, width) for _ in range(4)]
    gate = (make(batch, 1, value_width),) if draw(st.booleans()) else ()
    return Call("mixed_chunk_step", (*heads, make(batch, 1, value_width), *gate), options)

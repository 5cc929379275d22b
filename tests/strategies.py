"""Calls of the public operations, drawn by hypothesis: awkward sizes, dtypes, memory layouts, all options together.

A strategy draws a `Call`: an operation's name with its arguments. Values come from a generator seeded by
hypothesis, so a failing example repeats; sizes, layouts and options shrink.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashgau
from flashgau.eager import attention as eager_attention
from flashgau.eager import common as eager_common
from flashgau.eager import gau as eager_gau
from flashgau.eager import glu as eager_glu
from flashgau.eager import mixed_chunk as eager_mixed_chunk
from flashgau.ops import autograd, dispatch, validate

# Empty, single, and on both sides of every power-of-two block; odd, so that every block has a ragged end.
SIZES = (0, 1, 2, 15, 17, 33, 63, 65, 129)
WIDTHS = (1, 2, 3, 8, 15, 16, 17, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "heads inside", "guarded", "every second", "expanded")
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


# How the eager floor cuts its work: its own sizes, and the smallest, at which small inputs cross borders.
_BLOCKS = {
    (eager_attention, "_BLOCK_ELEMENTS"): 1,
    (eager_attention, "_PIECE_ELEMENTS"): 1,
    (eager_gau, "_PANEL_ELEMENTS"): 1,
    (eager_glu, "_PIECE"): 64,
    (eager_common, "_PANEL"): 4,
    (eager_mixed_chunk, "_GROUP_ELEMENTS"): 1,
    (importlib.import_module("flashgau.ops.glu"), "_KEPT_BYTES"): 0,  # its name is the function's, too
}
# Gated attention of any width by panels of one block, which Triton takes for wide values only; and all the chunks of
# a sequence in one segment, where otherwise 16 processors leave one chunk to each.
PANELS: dict[tuple[Any, str], Any] = {}
TINY: dict[tuple[Any, str], Any] = {}  # the smallest blocks that kernels may have, so that few rows cross many borders
if "triton" in [name for name, reason in dispatch.explain("gau_attention", "cpu").items() if reason is None]:
    _gau_kernels = importlib.import_module("flashgau.kernels.gau")
    _gated_kernels = importlib.import_module("flashgau.kernels.gated")
    _mixed_chunk_kernels = importlib.import_module("flashgau.kernels.mixed_chunk")
    PANELS = {
        (_gau_kernels, "_FUSED_WIDTH"): 0,
        (_gated_kernels, "_PANEL_BYTES"): 1,
        (_mixed_chunk_kernels, "_FUSED_TILES"): 0,
        (_mixed_chunk_kernels, "processors"): lambda device: 1,
    }
    _Config = importlib.import_module("flashgau.kernels.common").Config

    def _smallest(kernel: str, *args: Any, **traits: Any) -> Any:
        """Of chunks more queries than keys, where both need not be as many."""
        return _Config(32 if kernel.startswith("mixed_chunk") else 16, 16, block_k=16)

    TINY = {
        (importlib.import_module("flashgau.tuning"), "choose"): _smallest,
        (importlib.import_module("flashgau.kernels.attention"), "processors"): lambda device: 4,
    }
_SMALL = {"eager": _BLOCKS, "triton": PANELS}
_OWN_BLOCKS = {place: getattr(*place) for place in _BLOCKS}


@contextmanager
def blocks(sizes: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Let the eager floor cut its work into blocks of these sizes."""
    with ExitStack() as stack:
        for (module, name), size in sizes.items():
            stack.enter_context(mock.patch.object(module, name, size))
        yield


def small_blocks() -> Any:
    """The eager floor with its smallest blocks."""
    return blocks(_BLOCKS)


def backends_of(op: str) -> list[str]:
    """The optimised backends that can run an operation here."""
    return [name for name, reason in dispatch.explain(op, "cpu").items() if reason is None and name != "reference"]


def backend_fixture(op: str) -> Any:
    """A fixture over the optimised backends of an operation; eager also with its smallest blocks."""

    params = [*backends_of(op), "eager, small blocks"]
    if "triton" in params and op in ("gau_attention", "mixed_chunk_attention"):
        params.append("triton, panels")

    @pytest.fixture(params=params)
    def backend(request: pytest.FixtureRequest) -> Iterator[str]:
        name, *small = request.param.split(", ")
        with flashgau.use_backend(name), blocks(_SMALL[name] if small else _OWN_BLOCKS):
            yield name

    return backend


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """What the backend computes here. Triton's interpreter multiplies bf16 wrongly; no kernel takes fp64."""
    return (torch.float32, torch.float16) if backend == "triton" else DTYPES


def needs(backend: str, dtype: torch.dtype) -> None:
    """Skip the test where the backend does not take the dtype."""
    if dtype not in dtypes_of(backend):
        pytest.skip(f"no {dtype} on this backend")


@dataclass(frozen=True)
class Call:
    """One call of `flashgau.<name>`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **changes: Any) -> Any:
        return getattr(flashgau, self.name)(*self.args, **{**self.kwargs, **changes})

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


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            return str(x.tolist())
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}/{list(x.stride())}"
    if is_dataclass(x):
        return f"{type(x).__name__}({', '.join(_shown(getattr(x, f.name)) for f in fields(x))})"
    return repr(x)


def outputs(result: Any) -> list[Tensor]:
    """The result's tensors in order: of (out), (out, lse) or (out, state)."""
    if isinstance(result, Tensor):
        return [result]
    if is_dataclass(result):
        return [getattr(result, f.name) for f in fields(result)]
    return [x for part in result for x in outputs(part)]


def gradients(call: Call, seed: int = 0, **changes: Any) -> tuple[list[Tensor], list[Tensor]]:
    """All results and the gradients of all floating tensors, for a random weighting of the results."""
    call = call.leaves()
    leaves = [x for x in call.tensors() if x.requires_grad]
    results = outputs(call(**changes))
    grads = torch.autograd.grad(weighted(results, seed), leaves, allow_unused=True)
    return [x.detach() for x in results], [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


def weighted(results: list[Tensor], seed: int = 0) -> Tensor:
    """A random linear function of what is finite and differentiable in the results."""
    gen = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for x in results:
        weight = torch.randn(x.shape, generator=gen, dtype=torch.float64)
        if x.requires_grad:
            total = total + (torch.where(torch.isfinite(x), x, 0).double() * weight).sum()
    return total


@contextmanager
def largest_storages() -> Iterator[list[int]]:
    """Collect the bytes of every tensor that a backend makes; views count as what they look into."""
    found: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    found.append(x.untyped_storage().nbytes())
            return result

    def watched(*args: Any, **kwargs: Any) -> Any:
        with Watch():
            return run(*args, **kwargs)

    run = autograd.run
    with mock.patch.object(autograd, "run", watched), blocks(_OWN_BLOCKS):
        yield found


def close(actual: Tensor, expected: Tensor, ulps: float = 16, scale: float = 0.0) -> None:
    """Equal but for the order of sums: within a few units in the last place of the largest value, or of `scale`."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(actual))
    assert torch.equal(actual[~finite], expected[~finite])
    if finite.any():
        error = float((actual[finite].double() - expected[finite].double()).abs().max())
        size = max(float(expected[finite].abs().max()), scale)
        assert error <= ulps * torch.finfo(actual.dtype).eps * size, f"error {error:.3g} beside values of {size:.3g}"


def close_gradients(actual: list[Tensor], expected: list[Tensor], ulps: float = 64) -> None:
    """The same for gradients: where one cancels, the rounding of terms as large as the others stays."""
    steepest = max((float(x.abs().max()) for x in expected if x.numel()), default=0.0)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, ulps, steepest)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values from their own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (for "expanded", of its first row everywhere) in another memory layout.

    What surrounds them in "guarded" and "every second" is NaN: one read out of bounds shows in the result.
    """
    if layout == "transposed" and x.dim() >= 2:
        return x.mT.contiguous().mT
    if layout == "heads inside" and x.dim() >= 3:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "expanded" and x.dim() >= 2 and x.shape[0] > 0:
        return x[:1].clone().expand_as(x)
    if layout == "guarded":
        base = x.new_full([s + 5 for s in x.shape], math.nan)
        view = base[tuple(slice(2, 2 + s) for s in x.shape)]
        return view.copy_(x)
    if layout == "every second" and x.dim() >= 1:
        view = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)[..., ::2]
        return view.copy_(x)
    return x


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
    """Ends of packed sequences, some of them empty, after a leading 0."""
    count = draw(st.integers(1, 4)) if parts is None else parts
    cuts = sorted(draw(st.integers(0, total)) for _ in range(count - 1))
    return torch.tensor([0, *cuts, total], dtype=draw(st.sampled_from([torch.int32, torch.int64])))


def valid_lengths(draw: Any, batch: int, n: int) -> Tensor:
    """Lengths of padded rows, 0 and n among them."""
    values = [draw(st.sampled_from(sorted({0, 1, n // 2, n - 1, n} & set(range(n + 1))))) for _ in range(batch)]
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.int32, torch.int64])))


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
        quad_normalizer=_some(draw, 1, 7.5),
        lin_normalizer=_some(draw, "tokens", 5, 0.5),
        rel_bias=make.bias((batch,), chunk),
    )
    heads = [make(batch, 1, width) for _ in range(4)]
    gate = (make(batch, 1, value_width),) if draw(st.booleans()) else ()
    return Call("mixed_chunk_step", (*heads, make(batch, 1, value_width), *gate), options)


# What holds for every operation ------------------------------------------------------------------------


def check_agrees(call: Call, backend: str) -> None:
    """Results and every gradient are as near to the fp64 reference as plain PyTorch's."""
    torch.manual_seed(len(repr(call)))  # compare's weights are random; a failing example must repeat
    report = flashgau.compare(getattr(flashgau, call.name), *call.args, backend=backend, **call.kwargs)
    assert report.backend == backend
    assert report.ok, f"\n{report}"


def check_repeats_bitwise(call: Call) -> None:
    """A second run gives the same bits, forward and backward; so does a forward that keeps nothing for a backward."""
    first, second = gradients(call), gradients(call)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(first[0], outputs(call()), strict=True):
            assert torch.equal(a, b)


def _bytes(x: Tensor) -> Tensor:
    """All that x's storage holds, bit by bit: a NaN equals nothing."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def check_leaves_inputs_alone(call: Call) -> None:
    """No operand, nor what lies around it in memory, is written to by forward or backward."""
    call = call.leaves()
    before = [_bytes(x).clone() for x in call.tensors()]
    results = outputs(call())
    seen = [x.detach().clone() for x in results]
    differentiable = [x for x in results if x.requires_grad]
    cotangents = [torch.ones_like(x) for x in differentiable]
    torch.autograd.backward(differentiable, cotangents)
    assert all(torch.equal(_bytes(x), y) for x, y in zip(call.tensors(), before, strict=True))
    assert all(bool((x == 1).all()) for x in cotangents)
    assert all(torch.equal(x, y) for x, y in zip(results, seen, strict=True))


def check_backward_repeats(call: Call) -> None:
    """A second backward over a kept graph gives the same bits."""
    call = call.leaves()
    leaves = [x for x in call.tensors() if x.requires_grad]
    total = weighted(outputs(call()))
    first = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def check_some_gradients(call: Call, needed: list[bool]) -> None:
    """Gradients asked for alone are the same bits as among all."""
    _, every = gradients(call)
    call = call.leaves()
    leaves = [x for x in call.tensors() if x.requires_grad]
    for x, need in zip(leaves, needed, strict=False):
        x.requires_grad_(need)
    asked = [x for x in leaves if x.requires_grad]
    if not asked:
        assert not any(x.requires_grad for x in outputs(call()))
        return
    found = iter(torch.autograd.grad(weighted(outputs(call())), asked, allow_unused=True))
    for x, full in zip(leaves, every, strict=True):
        if x.requires_grad:
            g = next(found)
            assert g is None or torch.equal(g, full)


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """PyTorch fills what it allocates without a value: an element that nobody writes shows in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# Offsets of packed sequences that leave rows over, and how many rows there are: more than a block of 16 behind the
# last; more than one before the first, and fewer behind; no sequence at all; more sequences than blocks.
REST = (([0, 0, 9, 9, 23, 23], 41), ([18, 18, 25], 29), ([0], 17), ([1, 2, 4, 5, 6], 7))


def check_rest_is_padding(call: Call, axis: int, ends: dict[str, list[int]], operands: str, results: str) -> None:
    """Rows in no packed sequence: what they hold, NaN included, does not matter, and they get 0 (an LSE -inf).

    `ends` are the offsets of q(ueries) and k(eys). For each operand, and for each floating result, `operands` and
    `results` say whose rows it has on `axis`; the others have none. On a CPU such offsets are refused; on a GPU,
    where looking at them would wait for the device, they are not.
    """
    spans = {name: slice(values[0], values[-1]) for name, values in ends.items()}
    shapes: list[torch.Size] = []

    def inside(x: Tensor, name: str) -> Tensor:
        return x[(slice(None),) * axis + (spans[name],)] if name in spans else x

    def filled(x: Tensor, name: str) -> Tensor:
        whole = x.new_full(x.shape, math.nan)
        inside(whole, name).copy_(inside(x, name))
        return whole

    def run(cut: Callable[[Tensor, str], Tensor], first: int) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [cut(x, name).clone() for x, name in zip(call.args, operands, strict=True)]
        others = {key: x.clone() for key, x in call.kwargs.items() if isinstance(x, Tensor)}
        offsets = {
            {"q": "cu_seqlens", "k": "cu_seqlens_k"}[name]: torch.tensor(values) - first * values[0]
            for name, values in ends.items()
        }
        every = [x.requires_grad_() for x in (*leaves, *others.values())]
        found = outputs(Call(call.name, tuple(leaves), {**call.kwargs, **others, **offsets})())
        found = [x for x in found if x.is_floating_point()]
        shapes.extend(x.shape for x in found[len(shapes) :])  # of the first run, whose rows are the other's as well
        summed = [i for i, x in enumerate(found) if x.requires_grad]
        weights = [cut(randn(90 + i, *shapes[i]), results[i : i + 1]) for i in summed]
        grads = torch.autograd.grad([found[i] for i in summed], every, weights, allow_unused=True)
        return [x.detach() for x in found], [
            torch.zeros_like(x) if g is None else g for x, g in zip(every, grads, strict=True)
        ]

    with mock.patch.object(validate, "readable", return_value=False), fresh_memory_is_nan():
        whole = run(filled, 0)
    with flashgau.use_backend("eager"):
        alone = run(inside, 1)
    for found, expected, names in zip(whole, alone, (results, operands), strict=True):
        names = names.ljust(len(found), "-")
        close_gradients([inside(x, name) for x, name in zip(found, names, strict=True)], expected)
        for x, name in zip(found, names, strict=True):
            if name in spans:
                rest = torch.ones(x.shape[axis], dtype=torch.bool)
                rest[spans[name]] = False
                left = x[(slice(None),) * axis + (rest,)]
                assert torch.equal(left, torch.full_like(left, -math.inf if x.dim() == axis + 1 else 0))


def check_refuses_second_derivative(call: Call) -> None:
    """Differentiating twice says what to do instead."""
    call = call.leaves()
    leaves = [x for x in call.tensors() if x.requires_grad]
    total = weighted(outputs(call()))
    grads = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f'{call.name}: .*backend="reference"'):
        weighted(list(grads)).backward()
    reference = weighted(outputs(call(backend="reference")))
    grads = torch.autograd.grad(reference, leaves, create_graph=True)
    weighted(list(grads)).backward()


def check_owned(tensors: Iterable[Tensor]) -> None:
    """Each tensor in memory of its own on a boundary of 64 bytes, as PyTorch allocates it, and not of a mapped file.

    The last bits of a product may depend on where its factors lie: only so is a loaded model bit for bit the saved one.
    """
    held = [t for t in tensors if t.numel()]
    assert held
    for t in held:
        assert t.is_contiguous()
        assert t.data_ptr() % 64 == 0
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
        t.detach().add_(0)  # a page that only reads would end the process
    assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)

"""Cases that hold one launch configuration of one kernel to the fp64 reference: small, awkward, forward and backward.

The operands have the widths that `flashgau compile` and `flashgau tune` compile, so a kernel is not compiled once more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashgau
import flashgau.nn
from flashgau import tables
from flashgau.nn.norms import make_norm
from flashgau.ops import dispatch
from flashgau.ops.compare import Report, held
from flashgau.tables.config import Config
from flashgau.tables.table import Key, Table
from flashgau.tuning.ahead import op_of
from flashgau.verification.cases import Arguments, CheckCase, Draw
from flashgau.verification.derivatives import hold_derivatives

LAYERS = ("projection", "heads", "norm")  # operations of a layer alone
# Kernels of no operation of their own, which come with one.
BESIDE = {"gau_attention": LAYERS, "attention": ("derivatives",)}


def with_beside(ops: Iterable[str]) -> frozenset[str]:
    """Operations, and what comes with them."""
    ops = set(ops)
    return frozenset(ops.union(*(BESIDE.get(op, ()) for op in ops)))


@dataclass(frozen=True)
class Configured(CheckCase):
    """A case in which one kernel is launched as `config` says, and all others as they always are."""

    key_of_table: Key
    config: Config


def case_of(key: Key, config: Config, dtype: str, small: bool) -> Configured:
    """The case of one configuration; a small one where a block takes milliseconds, interpreted or executed."""
    shape = ", ".join([*([f"D{key.width}"] if key.width else []), *(["few rows"] if key.few_rows else [])])
    options = f"{key.kernel} {config.text()}"
    if key.options:
        options += ", softcap" if op_of(key.kernel) == "attention" else ", laplace"
    length, e = (70, 70) if small else (150, 300)
    return Configured(
        op_of(key.kernel), options, shape, dtype, lambda draw: _arguments(key, draw, length, e), key, config
    )


def cases_of(device: torch.device, ops: Iterable[str]) -> list[Configured]:
    """One case for every configuration that a call on `device` may be launched with, of these operations.

    Those of the user's table, of the table of the GPU and of that of its architecture; not those of kernels of the
    user's own, of which no operation is known. "projection", "heads" and "norm" are no operations of their own, but a
    layer's: they come with "gau_attention"; "derivatives" come with "attention".
    """
    ops = with_beside(ops)
    arch = tables.architecture(device)
    interpreted = arch == "interpreter"
    half = "float16" if interpreted and not dispatch.interprets_bf16() else "bfloat16"
    sources: list[Table] = [*tables.measured_tables(device), tables.shipped_table(arch)]
    found = {(key, config): None for table in sources for key in table.entries if (config := table.config(key))}
    return [
        case_of(key, config, "float32" if key.itemsize == 4 else half, small=interpreted)
        for key, config in found
        if key.kernel in tables.shipped_kernels() and op_of(key.kernel) in ops and is_asked(key, fp16=half == "float16")
    ]


def is_asked(key: Key, *, fp16: bool) -> bool:
    """Whether any call in halves asks for an entry: some kernels work on weights, which beside fp16 are fp32."""
    inputs = ("gau_lse", "gau_prologue", "mixed_chunk_states", "mixed_chunk_step", "mixed_chunk_step_close")
    weights = key.kernel.startswith(("gau_", "mixed_chunk_")) and key.kernel not in inputs
    return not (fp16 and key.itemsize == 2 and weights)


@contextmanager
def launched(key: Key, config: Config) -> Iterator[list[Key]]:
    """Inside, a kernel is launched as `config` says. The list collects its launches, so that one sees it was asked."""
    asked: list[Key] = []
    outer = tables.in_force()

    def chosen(kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False) -> Config:
        own = (kernel, x.element_size(), rows is not None and rows <= tables.FEW_ROWS, options)
        if own == (key.kernel, key.itemsize, key.few_rows, key.options):
            asked.append(key)
            return config
        return outer(kernel, x, width, rows, options)

    with tables.configured(chosen, fuse_glu_linear=True if key.kernel.startswith("glu_linear") else None):
        yield asked


def hold(case: Configured, device: torch.device, seed: int = 0) -> Report:
    """Hold a configuration to the fp64 reference.

    Raises:
        RuntimeError: if the case never asked for its kernel, which would prove nothing; and whatever a launch raises.
    """
    arguments, keywords = case.arguments(device, seed)
    with launched(case.key_of_table, case.config) as asked, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # `compare` draws the weights of the gradients
        if case.op in LAYERS:
            report = _hold_layer(case.op, *arguments)
        elif case.op == "derivatives":
            report = hold_derivatives(*arguments)
        else:
            # A step that someone differentiates runs on the kernels of whole sequences.
            keywords["grad"] = case.op != "mixed_chunk_step"
            report = flashgau.compare(getattr(flashgau, case.op), *arguments, backend="triton", **keywords)
    if not asked:
        raise RuntimeError(f"no launch asked for {case.key_of_table}")
    return report


# ---- the operands


def _arguments(key: Key, draw: Draw, n: int, e: int) -> Arguments:
    m = 1 if key.few_rows else n
    makers: dict[str, Callable[[], Arguments]] = {
        "attention": lambda: _attention(key, draw, m, n),
        "glu": lambda: ((draw(3, 1033), draw(3, 1033)), {"activation": "silu"}),
        "glu_linear": lambda: _glu_linear(key, draw, m),
        "gau_attention": lambda: _gau(key, draw, m, n),
        "mixed_chunk_attention": lambda: _mixed_chunk(key, draw, n, e),
        "mixed_chunk_step": lambda: _step(key, draw),
        "derivatives": lambda: _derivatives(key, draw, n),
        **dict.fromkeys(LAYERS, lambda: ((draw(2, n, 64),), {})),
    }
    return makers[op_of(key.kernel)]()


def _attention(key: Key, draw: Draw, m: int, n: int) -> Arguments:
    keywords: dict[str, Any] = {"causal": True, "softcap": 5.0 if key.options else None}
    if key.kernel == "attention_dbias":
        keywords["rel_bias"] = draw(2, 2 * n - 1).float()
    return (draw(1, 2, m, key.width), draw(1, 2, n, key.width), draw(1, 2, n, key.width)), keywords


def _glu_linear(key: Key, draw: Draw, m: int) -> Arguments:
    x, weights, biases = draw(m, 136), [draw(139, 136) / 136**0.5 for _ in "gu"], [draw(139) for _ in "gu"]
    return (x, *weights, *biases), {"activation": "gelu", "recompute": key.kernel == "glu_linear_backward"}


def _gau(key: Key, draw: Draw, m: int, n: int) -> Arguments:
    e = 70 if key.kernel == "gau_fused" else 520  # narrow values never make a panel
    score = "softmax" if key.kernel in ("gau_lse", "gau_prologue") else "laplace" if key.options else "relu2"
    keywords = {"score": score, "causal": True}
    s = key.width or 64
    return (draw(1, m, s), draw(1, n, s), draw(1, n, e), draw(1, m, e)), keywords


def _mixed_chunk(key: Key, draw: Draw, n: int, e: int) -> Arguments:
    e = 13 if key.kernel == "mixed_chunk_fused" else e  # more than a tile
    heads = [draw(1, 2 * n, key.width) for _ in range(4)]
    return (*heads, draw(1, 2 * n, e), draw(1, 2 * n, e)), {"causal": True, "chunk_size": n - 7}


def _step(key: Key, draw: Draw) -> Arguments:
    tokens = [draw(2, 16, key.width) for _ in range(4)] + [draw(2, 16, 70) for _ in range(2)]
    before = [x[:, :15] for x in tokens]  # the next token closes a chunk
    options: dict[str, Any] = {"causal": True, "chunk_size": 8, "return_state": True, "backend": "reference"}
    _, state = flashgau.mixed_chunk_attention(*before, **options)
    return tuple(x[:, 15:] for x in tokens), {"state": state}


def _derivatives(key: Key, draw: Draw, n: int) -> Arguments:
    shapes = [(1, heads, n, key.width) for heads in (2, 1, 1)] + [(1, 2, 2 * n - 1)]
    return (*map(lambda s: draw(*s), shapes * 2), draw(1, 2, n, key.width), draw(1, 2, n).float()), {}


# ---- kernels that only a layer starts


def _run_layer(layer: torch.nn.Module, x: Tensor, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output of a copy of a layer in `dtype`, and the gradients of its input and parameters."""
    layer, x = copy.deepcopy(layer).to(dtype), x.detach().to(dtype).requires_grad_()
    # A layer's own pieces run on what is best for the device: interpreted, they would be left out.
    with flashgau.use_backend(backend), dispatch.use_backend_in_layers(backend):
        out = layer(x)
        names, leaves = zip(*layer.named_parameters(), ("x", x), strict=True)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        grads = torch.autograd.grad((out.double() * weights).sum(), leaves)
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(names, grads, strict=True)}}


class _Norms(torch.nn.Sequential):
    """Every norm of a layer, one on the other, with weights beside 1."""

    def __init__(self, dim: int) -> None:
        names = ("layernorm", "rmsnorm", "scalenorm", "scalenorm_clamped", "rms")
        super().__init__(*(make_norm(name, dim) for name in names))
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.linspace(-0.3, 0.4, p.numel()).view_as(p))


def _hold_layer(op: str, x: Tensor) -> Report:
    """As `flashgau.compare` holds an operation, with the naive formula of the whole layer."""
    layer = (_Norms if op == "norm" else flashgau.nn.GAU)(x.shape[-1]).to(x)  # rounded to its dtype, as fp64 sees it
    exact, plain = (_run_layer(layer, x, "reference", dtype) for dtype in (torch.float64, x.dtype))
    ours = _run_layer(layer, x, "triton", x.dtype)
    return Report(op, "triton", x.dtype, held(ours, exact, [plain], x.dtype))

"""The operations of the table: a call of each at a stated size, and the closed formulas of its floor.

Floors count what the mathematics needs: products under a causal mask at half, nothing computed twice, each input read
and each output written once. What a forward keeps for its backward is not counted there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashgau.kernels import glu, mixed_chunk, norms, projection
from flashgau.options import Angles, NormOptions, ProjectionWeights
from flashgau.tuning.shipped import CALLS, CallShape, Operands

D_MODEL, E, S, CHUNK, HEADS = 1024, 2048, 128, 256, 16
POSITION = 100  # tokens of the open chunk where one more comes


@dataclass(frozen=True)
class Case:
    """One row: a forward, or a backward.

    Attributes:
        op: the operation.
        direction: "forward" or "backward".
        shape: in words.
        tokens: what "per token" divides by: those of all sequences; queries, where they are few.
        flop: of products, per token.
        moved: bytes that must be read or written, per token, by the bytes of an element.
        run: calls the launchers.
    """

    op: str
    direction: str
    shape: str
    tokens: int
    flop: float
    moved: Callable[[int], float]
    run: Callable[[Operands], None]

    @property
    def key(self) -> str:
        """Names it."""
        return f"{self.op} {self.direction} {self.shape}"


class _Counted(Operands):
    """Operands on "meta"; integers, on which branches may depend, on the CPU: a position is `POSITION`."""

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is not None and not dtype.is_floating_point:
            return torch.from_numpy(np.full(shape, POSITION)).to(dtype)
        return super().__call__(*shape, dtype=dtype)


def operands(dtype: torch.dtype) -> Operands:
    """What makes the tensors of a case."""
    return _Counted(dtype)


def cases() -> Iterator[Case]:
    """All of them, in the order of the table."""
    for width in (64, 128):
        for n in (4096, 16384):
            yield from _attention(n, width)
    yield from _gau(16384, 1)
    yield from _gau(4096, 8)
    yield _few_queries()
    for batch in (1, 8):
        yield from _mixed(batch)
    for batch in (1, 64):
        yield _step(batch)
    for variant in ("swiglu", "geglu"):
        yield from _glu(variant)
    yield from _glu_linear()
    yield from _heads()
    yield from _projection()
    yield from _norms()


def _shaped(make: Operands, shape: CallShape) -> Operands:
    return type(make)(make.dtype, make.device, shape)


def _attention(n: int, d: int) -> Iterator[Case]:
    def run(backward: bool, make: Operands) -> None:
        shape = CallShape(length=n, heads=HEADS)
        CALLS["attention"](backward, None, False, "causal", d, _shaped(make, shape))

    shape, product = f"B1 H{HEADS} D{d} N{n} causal", n * d * HEADS  # FLOP of one product, of half of all pairs
    # Forward QK and PV; q, k, v, O and LSE. Backward QK, dV, dP, dQ and dK; twice q, k, v and O; and LSE.
    row = HEADS * d
    yield Case("attention", "forward", shape, n, 2 * product, lambda b: 4 * row * b + 4 * HEADS, partial(run, False))
    yield Case("attention", "backward", shape, n, 5 * product, lambda b: 8 * row * b + 4 * HEADS, partial(run, True))


def _gau(n: int, batch: int) -> Iterator[Case]:
    def run(backward: bool, make: Operands) -> None:
        CALLS["gau_attention"](backward, None, E, "relu2 causal", S, _shaped(make, CallShape(n, batch)))

    shape = f"B{batch} N{n} S{S} E{E} causal"
    # Forward QK and AV; q, k, v, gate and O. Backward QK, dA, dV, dQ and dK; twice q, k, v and gate, dO and A V.
    forward, backward = n * (S + E), n * (3 * S + 2 * E)
    tokens = n * batch
    yield Case("gau_attention", "forward", shape, tokens, forward, lambda b: (2 * S + 3 * E) * b, partial(run, False))
    yield Case("gau_attention", "backward", shape, tokens, backward, lambda b: (4 * S + 6 * E) * b, partial(run, True))


def _few_queries() -> Case:
    n = 16384

    def run(make: Operands) -> None:
        CALLS["gau_attention"](False, 1, E, "relu2 causal", S, _shaped(make, CallShape(n)))

    moved = partial(_rows, n * (S + E) + S + 2 * E)  # keys and values; the query, gate and output
    return Case("gau_attention", "forward", f"B1 M1 N{n} S{S} E{E} causal", 1, 2 * n * (S + E), moved, run)


def _mixed(batch: int) -> Iterator[Case]:
    n = 16384

    def run(backward: bool, make: Operands) -> None:
        CALLS["mixed_chunk_attention"](backward, E, "relu2 causal", S, _shaped(make, CallShape(n, batch)))

    shape, tokens = f"B{batch} N{n} S{S} E{E} C{CHUNK} causal", n * batch
    state, pairs = 2 * S * E, CHUNK  # FLOP of a token and a state; of its pairs per column, half of the chunk twice
    # Forward lin_K^T V, lin_Q KV, QK, A V; four heads, v, gate and O.
    forward = 2 * state + pairs * (S + E)
    yield Case(
        "mixed_chunk_attention", "forward", shape, tokens, forward, lambda b: (4 * S + 3 * E) * b, partial(run, False)
    )
    # Backward dKV, dlin_Q, dlin_K and the linear part of dV; QK, dA, dQ, dK and A^T dX; twice the heads, v and gate,
    # dO and X. KV counts once more: keeping it is a choice.
    backward = 4 * state + pairs * (3 * S + 2 * E)
    yield Case(
        "mixed_chunk_attention", "backward", shape, tokens, backward, lambda b: (8 * S + 6 * E) * b, partial(run, True)
    )


def _step(batch: int) -> Case:
    def run(make: Operands) -> None:
        heads, v = make(4, batch, 1, S), make(batch, 1, E)
        held, kv = make(batch, CHUNK, S), make(batch, S, E, dtype=torch.float32)
        state = (kv, held, held, make(batch, CHUNK, E), make(batch, dtype=torch.int64))
        mixed_chunk.mixed_chunk_step_(heads, v, v, state)

    # KV in fp32, and keys and values of the open chunk so far; the token's own heads, v, gate and output, and its rows.
    flop, moved = 2 * S * E + 2 * POSITION * (S + E), lambda b: 4 * S * E + (POSITION * (S + E) + 6 * S + 4 * E) * b
    shape = f"B{batch} S{S} E{E} C{CHUNK}, {POSITION} tokens open"
    return Case("mixed_chunk_step", "forward", shape, batch, flop, moved, run)


def _run_shaped(run: Callable[[Operands], None], shape: CallShape, make: Operands) -> None:
    run(_shaped(make, shape))


def _glu(variant: str) -> Iterator[Case]:
    n, width = 16384, 4096
    for backward, tensors in ((False, 3), (True, 5)):
        run = partial(CALLS["glu"], backward, f"{variant} separate", 0)
        shape = f"{variant} {n} x {width}"
        yield Case(
            "glu", "backward" if backward else "forward", shape, n, 0, partial(_rows, tensors * width),
            partial(_run_shaped, run, CallShape(n)),
        )  # fmt: skip


def _glu_linear() -> Iterator[Case]:
    n, k, width = 16384, 1024, 4096

    def run(backward: bool, save: bool, fused: bool | None, make: Operands) -> None:
        x, w, bias = make(n, k), make(width, k), make(width)
        options: dict[str, Any] = {"activation": "gelu", "fused": fused}
        if backward:
            kept = (make(n, width), make(n, width)) if save else (None, None)
            glu.glu_linear_backward(make(n, width), x, (w, w, bias, bias), *kept, **options)
        else:
            glu.glu_linear_forward(x, (w, w, bias, bias), save=save, **options)

    def case(direction: str, kept: bool, products: int, moved: int, weights: int, fused: bool | None = None) -> Case:
        bytes_of = partial(_rows, moved + weights * k * width / n)
        shape = f"geglu M{n} K{k} N{width}" + ", sides kept" * kept + ", one kernel" * bool(fused)
        run_it = partial(run, direction == "backward", kept, fused)
        return Case("glu_linear", direction, shape, n, 2 * products * k * width, bytes_of, run_it)

    yield case("forward", False, 2, k + width, 2)  # x and the output, and both weights once
    yield case("forward", True, 2, k + 3 * width, 2)  # and both sides
    yield case("backward", True, 4, 2 * k + 3 * width, 4)  # x, dO, both sides and dX; both weights and their gradients
    yield case("backward", False, 6, 2 * k + width, 4)  # both sides again
    # The same by our own kernel, even where a call of this size would take the vendor's products.
    yield case("forward", False, 2, k + width, 2, fused=True)
    yield case("forward", True, 2, k + 3 * width, 2, fused=True)
    yield case("backward", False, 6, 2 * k + width, 4, fused=True)


def _heads() -> Iterator[Case]:
    n, heads = 16384, 4

    def run(backward: bool, make: Operands) -> None:
        z, gamma = make(1, n, S), make(heads, S, dtype=torch.float32)
        cos, sin = make(2, n, S // 2, dtype=torch.float32)[:, None]
        angles = Angles(cos, sin)
        if backward:
            projection.heads_backward([make(1, n, S) for _ in range(heads)], z, gamma, angles, make(1, n, S))
        else:
            projection.heads_forward(z, gamma, gamma, angles)

    shape, angles = f"B1 N{n} S{S}, {heads} heads", 4 * S  # bytes of cos and sin
    yield Case("heads", "forward", shape, n, 0, lambda b: (1 + heads) * S * b + angles, partial(run, False))
    yield Case("heads", "backward", shape, n, 0, lambda b: (2 + heads) * S * b + angles, partial(run, True))


def _projection() -> Iterator[Case]:
    n, heads, wide = 16384, 4, 2 * E + S

    def run(backward: bool, make: Operands) -> None:
        x, fp32 = make(1, n, D_MODEL), torch.float32
        gamma = make(heads, S, dtype=fp32)
        weights = ProjectionWeights(make(wide, D_MODEL), make(wide), gamma, gamma, raw_gate=True)
        cos, sin = make(2, n, S // 2, dtype=fp32)[:, None]
        angles = Angles(cos, sin)
        if backward:
            half, z = make(1, n, E), [make(1, n, S) for _ in range(heads)]
            projection.gated_projection_backward(half, half, z, x, weights, [make(1, n, wide - E)], angles)
        else:
            projection.gated_projection_forward(x, weights, angles, True)

    shape, product = f"B1 N{n} d{D_MODEL} e{E} s{S}, {heads} heads", 2 * D_MODEL * wide
    weight, angles = D_MODEL * wide / n, 4 * S
    outputs = 2 * E + heads * S
    yield Case(
        "projection", "forward", shape, n, product, lambda b: (D_MODEL + outputs + weight) * b + angles,
        partial(run, False),
    )  # fmt: skip
    # Backward dX and dW; x, the gradients of all outputs, v and z before silu, and dX.
    yield Case(
        "projection", "backward", shape, n, 2 * product,
        lambda b: (2 * D_MODEL + outputs + wide - E + 2 * weight) * b + angles, partial(run, True),
    )  # fmt: skip


def _norms() -> Iterator[Case]:
    n = 16384

    def run(backward: bool, kind: str, make: Operands) -> None:
        x, options = make(1, n, D_MODEL), NormOptions("layernorm" if kind == "layernorm" else "rms")
        weight, bias = make(1 if kind == "scalenorm" else D_MODEL), make(D_MODEL) if kind == "layernorm" else None
        if backward:
            norms.norm_backward(make(1, n, D_MODEL), x, weight, bias, options)
        else:
            norms.norm_forward(x, weight, bias, options)

    for kind in ("scalenorm", "layernorm"):
        for backward, tensors in ((False, 2), (True, 3)):
            direction = "backward" if backward else "forward"
            shape, moved = f"{kind} {n} x {D_MODEL}", partial(_rows, tensors * D_MODEL)
            yield Case("norm", direction, shape, n, 0, moved, partial(run, backward, kind))


def _rows(values: float, itemsize: int) -> float:
    return values * itemsize

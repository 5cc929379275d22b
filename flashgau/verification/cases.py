"""The cases of `flashgau check`: every operation with every option, at small awkward sizes.

A case is an operation, keywords, shapes and a dtype. The tables below are the whole list; a keyword given as
a function is called with a `Draw` to make its tensor, so that a case costs nothing until it runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16", "float64")
# A wide and a narrow one, where the product of all options with all four would take too long.
PAIR = ("float32", "bfloat16")
HALVES = ("bfloat16", "float16")
# One token; just under, just over and several times a block; odd, so that every block has a ragged end.
LENGTHS = (1, 15, 17, 65, 129)
THOROUGH_LENGTHS = (1, 2, 17, 64, 65, 129, 300)
ACTIVATIONS = ("identity", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh", "silu")
CHUNK = 16


class Draw:
    """Makes a case's tensors: normal values from its own generator, in its dtype, on its device."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def __init__(self, key: str, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) + seed) % 2**64)

    def __call__(self, *shape: int) -> Tensor:
        """Normal values of `shape`."""
        values = torch.randn(shape, generator=self.generator)
        return values.to(device=self.device, dtype=self.dtype)

    def integers(self, *values: int) -> Tensor:
        """These lengths or offsets, int32."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


Arguments = tuple[tuple[Tensor, ...], dict[str, Any]]


@dataclass(frozen=True)
class CheckCase:
    """One comparison: `build` makes the positional and keyword arguments of `flashgau.<op>`."""

    op: str
    options: str
    shape: str
    dtype: str
    build: Callable[[Draw], Arguments]

    @property
    def key(self) -> str:
        """Names the case, and seeds its values."""
        return f"{self.op} {self.options} {self.shape} {self.dtype}"

    def arguments(self, device: torch.device, seed: int = 0) -> Arguments:
        """The operation's arguments on `device`; another `seed` draws other values."""
        return self.build(Draw(self.key, getattr(torch, self.dtype), device, seed))


def _filled(keywords: dict[str, Any], draw: Draw) -> dict[str, Any]:
    return {name: value(draw) if callable(value) else value for name, value in keywords.items()}


def _lengths(n: int) -> Callable[[Draw], Tensor]:
    """Two rows of n: a full one, and one that is partly padding."""
    return lambda draw: draw.integers(n, n // 2)


def _offsets(n: int) -> Callable[[Draw], Tensor]:
    """Four sequences in n tokens, an empty one among them."""
    return lambda draw: draw.integers(0, n // 3, n // 3, n // 3 + (n + 1) // 2, n)


# attention --------------------------------------------------------------------------------------------


def _attention(
    options: str,
    dtype: str,
    n: int,
    *,
    m: int | None = None,
    b: int = 2,
    heads: tuple[int, int] = (2, 2),
    d: int = 8,
    e: int = 12,
    **keywords: Any,
) -> CheckCase:
    m, (hq, hkv) = n if m is None else m, heads

    def build(draw: Draw) -> Arguments:
        tensors = draw(b, hq, m, d), draw(b, hkv, n, d), draw(b, hkv, n, e)
        return tensors, _filled(keywords, draw)

    shape = f"B{b} H{hq if hq == hkv else f'{hq}/{hkv}'} N{n if m == n else f'{m}/{n}'} D{d} E{e}"
    return CheckCase("attention", options, shape, dtype, build)


def _gate(b: int, m: int, e: int = 12) -> Callable[[Draw], Tensor]:
    return lambda draw: draw(b, 2, m, e)


def _attention_cases(thorough: bool) -> Iterator[CheckCase]:
    op = _attention
    for n, causal, dtype in product(LENGTHS, (False, True), DTYPES):
        yield op("causal" if causal else "full", dtype, n, d=n % 5 + 3, causal=causal)
    for dtype in DTYPES:
        yield op("causal", dtype, 65, d=64, e=64, causal=True)
        yield op("causal, fewer queries", dtype, 65, m=17, causal=True)
        yield op("causal, more queries", dtype, 17, m=65, causal=True)
        yield op("causal, one query", dtype, 129, m=1, causal=True)
        yield op("no keys", dtype, 0, m=5)
        yield op("no queries", dtype, 5, m=0)
        yield op("D 1, E 1", dtype, 17, d=1, e=1)
        yield op("empty batch", dtype, 17, b=0)
    for dtype in HALVES:  # sums so long that half precision would lose percents of them
        yield op("many queries", dtype, 3, m=2**17, b=1, heads=(1, 1), d=4, e=4)

    for n, dtype in product(THOROUGH_LENGTHS if thorough else (65,), DTYPES):
        p = 2 * n - 1
        lengths, packed = _lengths(n), _offsets(n)
        yield op("scale", dtype, n, scale=0.7)
        yield op("window (5, 3)", dtype, n, window=(5, 3))
        yield op("window (5, None)", dtype, n, window=(5, None))
        yield op("window (None, 3)", dtype, n, window=(None, 3))
        yield op("causal, window (4, 0)", dtype, n, causal=True, window=(4, 0))
        yield op("window (4, 2), fewer queries", dtype, n, m=n // 2 + 1, window=(4, 2))
        yield op("softcap", dtype, n, softcap=2.0)
        yield op("causal, softcap, scale", dtype, n, causal=True, softcap=2.0, scale=0.7)
        yield op("rel_bias (2P-1,)", dtype, n, rel_bias=lambda x, p=p: x(p))
        yield op("rel_bias (H, 2P-1)", dtype, n, causal=True, rel_bias=lambda x, p=p: x(2, p))
        yield op("rel_bias (B, H, 2P-1)", dtype, n, rel_bias=lambda x, p=p: x(2, 2, p))
        yield op("rel_bias fp32, P > N", dtype, n, rel_bias=lambda x, p=p: x(2, p + 8).to(_wide(x)))
        yield op("sinks", dtype, n, sinks=lambda x: x(2))
        yield op("causal, sinks", dtype, n, m=n + 4, causal=True, sinks=lambda x: x(2))
        yield op("lengths", dtype, n, lengths=lengths)
        yield op("causal, lengths", dtype, n, causal=True, lengths=lengths)
        yield op("causal, lengths, fewer queries", dtype, n, m=n // 2 + 1, causal=True, lengths=lengths)
        yield op("lengths with a 0", dtype, n, lengths=lambda x, n=n: x.integers(0, n))
        yield op("packed", dtype, n, b=1, cu_seqlens=packed)
        yield op("packed, causal", dtype, n, b=1, causal=True, cu_seqlens=packed)
        yield op(
            "packed, causal, other keys",
            dtype,
            n + 3,
            m=n,
            b=1,
            causal=True,
            cu_seqlens=packed,
            cu_seqlens_k=lambda x, n=n: x.integers(0, n // 2, n // 2 + 1, n // 2 + 3, n + 3),
        )
        yield op("grouped queries 4/2", dtype, n, heads=(4, 2))
        yield op("grouped queries 3/1, causal", dtype, n, heads=(3, 1), causal=True)
        yield op("dropout", dtype, n, dropout_p=0.3, dropout_seed=7)
        yield op("dropout, causal, lengths", dtype, n, causal=True, lengths=lengths, dropout_p=0.3, dropout_seed=8)
        yield op("dropout, packed", dtype, n, b=1, cu_seqlens=packed, dropout_p=0.3, dropout_seed=2**40 + 1)
        yield op("dropout of all", dtype, n, dropout_p=1.0, dropout_seed=7)
        yield op("gate", dtype, n, causal=True, gate=_gate(2, n))
        yield op("gate per head, silu", dtype, n, gate=_gate(2, n, 1), gate_activation="silu")
        yield op("gate, lengths, lse", dtype, n, causal=True, gate=_gate(2, n), lengths=lengths, return_lse=True)
        yield op("gate, packed", dtype, n, b=1, gate=_gate(1, n), cu_seqlens=packed)
        yield op("gate, one query", dtype, n + 64, m=1, gate=_gate(2, 1), gate_activation="gelu")
        yield op("lse", dtype, n, return_lse=True)
        yield op("lse, causal, sinks", dtype, n, causal=True, sinks=lambda x: x(2), return_lse=True)
        yield op(
            "all together",
            dtype,
            n,
            heads=(4, 2),
            causal=True,
            scale=0.7,
            window=(9, None),
            softcap=3.0,
            rel_bias=lambda x, p=p: x(4, p),
            sinks=lambda x: x(4),
            lengths=lengths,
            dropout_p=0.2,
            dropout_seed=9,
            return_lse=True,
        )
        yield op(
            "all together, packed",
            dtype,
            n,
            b=1,
            heads=(4, 2),
            causal=True,
            window=(9, None),
            softcap=3.0,
            rel_bias=lambda x, p=p: x(4, p),
            sinks=lambda x: x(4),
            cu_seqlens=packed,
            dropout_p=0.2,
            dropout_seed=9,
            return_lse=True,
        )


def _wide(draw: Draw) -> torch.dtype:
    """What a bias may be beside half-precision tensors: fp32; fp64 beside fp64."""
    return torch.float64 if draw.dtype == torch.float64 else torch.float32


# glu and glu_linear -----------------------------------------------------------------------------------


def _glu(options: str, dtype: str, shape: tuple[int, ...], layout: str = "apart", **keywords: Any) -> CheckCase:
    def build(draw: Draw) -> Arguments:
        if layout == "joined":
            return (draw(*shape[:-1], 2 * shape[-1]),), keywords
        if layout == "strided":
            gate, up = (draw(*shape[::-1]).permute(*range(len(shape) - 1, -1, -1)) for _ in "gu")
            return (gate, up), keywords
        return (draw(*shape), draw(*shape)), keywords

    return CheckCase("glu", options, str(shape).replace(" ", ""), dtype, build)


def _glu_cases(thorough: bool) -> Iterator[CheckCase]:
    for activation, up in product(ACTIVATIONS, ACTIVATIONS):
        for dtype in DTYPES if thorough else ("float32",):
            yield _glu(f"{activation} * {up}", dtype, (3, 17), activation=activation, up_activation=up)
    for activation, dtype in product(ACTIVATIONS, DTYPES):
        both = {"activation": activation, "up_activation": activation}
        if not thorough and dtype != "float32":
            yield _glu(f"{activation} * {activation}", dtype, (3, 17), **both)
        yield _glu(f"joined, {activation} * identity", dtype, (2, 5, 65), "joined", activation=activation)
    for shape, dtype in product(((1,), (0, 5), (15, 129), (2, 3, 5, 7)), DTYPES):
        yield _glu("silu * identity", dtype, shape)
        yield _glu("strided, silu * identity", dtype, shape, "strided")


def _glu_linear(options: str, dtype: str, n: int, d: int, f: int, biases: str = "", **keywords: Any) -> CheckCase:
    def build(draw: Draw) -> Arguments:
        x, weights = draw(2, n, d), (draw(f, d) / d**0.5, draw(f, d) / d**0.5)
        bias = {f"b_{name}": draw(f) for name in biases.split()}
        return (x, *weights), {**keywords, **bias}

    return CheckCase("glu_linear", options, f"N{n} d{d} F{f}", dtype, build)


def _glu_linear_cases(thorough: bool) -> Iterator[CheckCase]:
    for n, dtype in product(LENGTHS, DTYPES):
        yield _glu_linear("silu", dtype, n, 24, 17)
    for activation, dtype in product(ACTIVATIONS, DTYPES):
        yield _glu_linear(activation, dtype, 17, 16, 24, activation=activation)
        yield _glu_linear(f"silu * {activation}", dtype, 17, 16, 24, up_activation=activation)
    for dtype in DTYPES:
        yield _glu_linear("silu, both biases", dtype, 17, 16, 24, "gate up")
        yield _glu_linear("silu, gate bias", dtype, 17, 16, 24, "gate")
        yield _glu_linear("silu, up bias", dtype, 17, 16, 24, "up")
        yield _glu_linear("silu, both biases, recomputed", dtype, 17, 16, 24, "gate up", recompute=True)
        yield _glu_linear("silu, d 1, F 1", dtype, 17, 1, 1)
        yield _glu_linear("silu, no tokens", dtype, 0, 16, 24)
    if thorough:
        for activation, up, dtype in product(ACTIVATIONS, ACTIVATIONS, DTYPES):
            keywords = {"activation": activation, "up_activation": up}
            yield _glu_linear(f"{activation} * {up}, biases", dtype, 65, 33, 49, "gate up", **keywords)


# gau_attention ----------------------------------------------------------------------------------------


def _gau(
    options: str,
    dtype: str,
    n: int,
    *,
    m: int | None = None,
    b: int = 2,
    s: int = 8,
    e: int = 20,
    gated: bool = True,
    **keywords: Any,
) -> CheckCase:
    m = n if m is None else m

    def build(draw: Draw) -> Arguments:
        q, k, v = draw(b, m, s), draw(b, n, s), draw(b, n, e)
        gate = (draw(b, m, e),) if gated else ()
        return (q, k, v, *gate), _filled(keywords, draw)

    return CheckCase("gau_attention", options, f"B{b} N{n if m == n else f'{m}/{n}'} S{s} E{e}", dtype, build)


# Softmax scores take no normaliser of their own.
GAU_SCORES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("relu2", {}),
    ("relu2, row", {"normalizer": "row"}),
    ("relu2, n 4", {"normalizer": 4.0}),
    ("laplace", {"score": "laplace"}),
    ("laplace, row", {"score": "laplace", "normalizer": "row"}),
    ("laplace, n 4", {"score": "laplace", "normalizer": 4.0}),
    ("softmax", {"score": "softmax"}),
    ("softmax_plus", {"score": "softmax_plus"}),
)


def _gau_cases(thorough: bool) -> Iterator[CheckCase]:
    for n, causal, dtype in product(LENGTHS, (False, True), DTYPES):
        yield _gau("relu2, causal" if causal else "relu2", dtype, n, s=n % 5 + 3, causal=causal)
    for dtype in DTYPES:
        yield _gau("relu2, causal, S 128", dtype, 65, s=128, e=64, causal=True)
        yield _gau("relu2, S 1, E 1", dtype, 17, s=1, e=1)
        yield _gau("relu2, no tokens", dtype, 0)
        yield _gau("relu2, empty batch", dtype, 17, b=0)
    for activation, dtype in product(ACTIVATIONS[1:], DTYPES):
        yield _gau(f"relu2, causal, {activation}(gate)", dtype, 33, causal=True, gate_activation=activation)
        yield _gau(f"softmax, {activation}(gate)", dtype, 17, m=9, score="softmax", gate_activation=activation)
    lengths = THOROUGH_LENGTHS if thorough else (33,)
    for n, (name, score), causal, dtype in product(lengths, GAU_SCORES, (False, True), DTYPES):
        if not thorough and dtype not in PAIR:
            continue
        p, mask = 2 * n - 1, ", causal" if causal else ""
        score = {**score, "causal": causal}
        yield _gau(f"{name}{mask}, no gate", dtype, n, gated=False, **score)
        yield _gau(f"{name}{mask}, rel_bias", dtype, n, rel_bias=lambda x, p=p: x(p), **score)
        yield _gau(f"{name}{mask}, lengths", dtype, n, lengths=_lengths(n), **score)
        yield _gau(f"{name}{mask}, packed", dtype, n, b=1, cu_seqlens=_offsets(n), **score)
        yield _gau(f"{name}{mask}, fewer queries", dtype, n, m=n // 2 + 1, **score)
        yield _gau(f"{name}{mask}, more queries", dtype, n, m=n + 9, **score)
        yield _gau(
            f"{name}{mask}, lengths, rel_bias (B, 2P-1)",
            dtype,
            n,
            lengths=_lengths(n),
            rel_bias=lambda x, p=p: x(2, p),
            **score,
        )


# mixed_chunk_attention and mixed_chunk_step -----------------------------------------------------------


def _mixed_tensors(draw: Draw, b: int, n: int, s: int, e: int, gated: bool) -> tuple[Tensor, ...]:
    tensors = [draw(b, n, s) for _ in range(4)] + [draw(b, n, e) for _ in range(1 + gated)]
    return tuple(tensors)


def _mixed(
    options: str,
    dtype: str,
    n: int,
    *,
    b: int = 2,
    s: int = 8,
    e: int = 20,
    gated: bool = True,
    prefix: int | None = None,
    op: str = "mixed_chunk_attention",
    **keywords: Any,
) -> CheckCase:
    """`prefix`: so many tokens come before; the case continues from the state that they leave."""
    chunk_size = keywords.pop("chunk_size", CHUNK)

    def build(draw: Draw) -> Arguments:
        filled = _filled(keywords, draw)
        if prefix is not None:
            import flashgau

            before = _mixed_tensors(draw, b, prefix, s, e, gated)
            prefixed = {**filled, "chunk_size": chunk_size, "causal": True, "return_state": True}
            _, state = flashgau.mixed_chunk_attention(*before, **prefixed, backend="reference")
            filled["state" if op == "mixed_chunk_step" else "initial_state"] = state
        if op == "mixed_chunk_attention":  # a step finds the size of its chunk in the state
            filled["chunk_size"] = chunk_size
        return _mixed_tensors(draw, b, n, s, e, gated), filled

    return CheckCase(op, options, f"B{b} N{n} S{s} E{e} C{chunk_size}", dtype, build)


MIXED_NORMALIZERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {}),
    (", lin n 16", {"lin_normalizer": 16.0}),
    (", quad n 4", {"quad_normalizer": 4.0}),
    (", quad n 4, lin n 9", {"quad_normalizer": 4.0, "lin_normalizer": 9.0}),
)


def _mixed_cases(thorough: bool) -> Iterator[CheckCase]:
    for n, causal, dtype in product(LENGTHS, (False, True), DTYPES):
        name = "relu2, causal" if causal else "relu2"
        yield _mixed(name, dtype, n, s=n % 5 + 3, causal=causal)
    for chunk, dtype in product((1, 7, 64, 256), DTYPES):
        yield _mixed("relu2, causal", dtype, 65, chunk_size=chunk, causal=True)
    for dtype in DTYPES:
        yield _mixed("relu2, causal, S 1, E 1", dtype, 33, s=1, e=1, causal=True)
        yield _mixed("relu2, no tokens", dtype, 0)
        yield _mixed("relu2, empty batch", dtype, 17, b=0, causal=True)
    for activation, dtype in product(ACTIVATIONS[1:], DTYPES):
        yield _mixed(f"relu2, causal, {activation}(gate)", dtype, 41, causal=True, gate_activation=activation)
    lengths = THOROUGH_LENGTHS if thorough else (41,)
    options = product(lengths, ("relu2", "laplace"), MIXED_NORMALIZERS, (False, True), DTYPES)
    for n, score, (normalizer, numbers), causal, dtype in options:
        if not thorough and normalizer and dtype not in PAIR:
            continue
        p, mask = 2 * max(n, CHUNK) - 1, ", causal" if causal else ""
        name, keywords = f"{score}{normalizer}{mask}", {"score": score, "causal": causal, **numbers}
        yield _mixed(f"{name}, no gate", dtype, n, gated=False, **keywords)
        yield _mixed(f"{name}, rel_bias", dtype, n, rel_bias=lambda x, p=p: x(p), **keywords)
        yield _mixed(f"{name}, lengths", dtype, n, lengths=_lengths(n), **keywords)
        yield _mixed(f"{name}, packed", dtype, n, b=1, cu_seqlens=_offsets(n), **keywords)
        if causal:
            state = {**keywords, "return_state": True}
            yield _mixed(f"{name}, state", dtype, n, **state)
            yield _mixed(f"{name}, state after 21", dtype, n, prefix=21, **state)
            state["lengths"] = _lengths(n)
            state["rel_bias"] = lambda x, p=p: x(2, p)
            yield _mixed(f"{name}, state, lengths, rel_bias", dtype, n, **state)


def _step_cases(thorough: bool) -> Iterator[CheckCase]:
    for activation, dtype in product(ACTIVATIONS[1:], DTYPES):
        name = f"relu2, {activation}(gate), token 5"
        yield _mixed(name, dtype, 1, prefix=5, op="mixed_chunk_step", gate_activation=activation)
    options = product(("relu2", "laplace"), MIXED_NORMALIZERS, DTYPES)
    for score, (normalizer, numbers), dtype in options:
        if not thorough and normalizer and dtype not in PAIR:
            continue
        # Into an empty state, into an open chunk, the last of a chunk, the first of the next.
        for prefix in (0, 5, CHUNK - 1, CHUNK, 3 * CHUNK + 2):
            yield _mixed(
                f"{score}{normalizer}, token {prefix}",
                dtype,
                1,
                prefix=prefix,
                op="mixed_chunk_step",
                score=score,
                **numbers,
            )
        yield _mixed(
            f"{score}{normalizer}, rel_bias, no gate",
            dtype,
            1,
            prefix=21,
            gated=False,
            op="mixed_chunk_step",
            score=score,
            rel_bias=lambda x: x(2 * CHUNK - 1),
            **numbers,
        )


_LISTS: dict[str, Callable[[bool], Iterator[CheckCase]]] = {
    "attention": _attention_cases,
    "glu": _glu_cases,
    "glu_linear": _glu_linear_cases,
    "gau_attention": _gau_cases,
    "mixed_chunk_attention": _mixed_cases,
    "mixed_chunk_step": _step_cases,
}


def all_cases(op: str | None = None, thorough: bool = False) -> list[CheckCase]:
    """The cases of one operation, or of all: about eleven hundred, and several times as many if `thorough`.

    Example:
        >>> sorted({case.op for case in all_cases()})[:3]
        ['attention', 'gau_attention', 'glu']
    """
    names = _LISTS if op is None else [op]
    return [case for name in names for case in _LISTS[name](thorough)]

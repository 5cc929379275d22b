"""What the tests of several operations check: closeness, repeatability, gradients, and memory that is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any
from unittest import mock

import torch
from backends import fresh_memory_is_nan
from strategies import Call, randn
from torch import Tensor

import flashgau
from flashgau.contract import validate


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


def check_second_derivative(call: Call) -> None:
    """The gradients of a function of the gradients are those of the reference."""

    def twice(**changes: Any) -> list[Tensor]:
        ours = call.leaves()
        leaves = [x for x in ours.tensors() if x.requires_grad]
        grads = torch.autograd.grad(weighted(outputs(ours(**changes))), leaves, create_graph=True)
        weighted(list(grads)).backward()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]

    close_gradients(twice(), twice(backend="reference"), ulps=256)


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

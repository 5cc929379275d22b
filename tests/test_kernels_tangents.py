"""Triton kernels of tangents and second derivatives: held to the fp64 reference that PyTorch differentiates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import kernel_calls
import pytest
import torch
from backends import fresh_memory_is_nan
from checks import REST
from hypothesis import given, reject
from hypothesis import strategies as st
from strategies import Call, attention_calls, gau_calls, lay_out, randn
from torch import Tensor

from flashgau import reference

pytest.importorskip("triton")
from flashgau.kernels import tangents as launchers
from flashgau.kernels.attention import attention_forward

from flashgau import tables
from flashgau.options import (
    AttentionOptions,
    AttentionTangents,
    GatedOptions,
    GatedTangents,
    Layout,
)
from flashgau.tables.config import Config
from flashgau.verification.derivatives import differentiated, held_derivatives

pytestmark = kernel_calls.pytestmark


def small(kernel: str, *args: Any, **traits: Any) -> Config:
    """Blocks of which few rows and columns cross borders; those of a bias's gradient are square."""
    return Config(16, 16, 4, 1, block_k=16) if kernel == "second_dbias" else Config(32, 16, 4, 1, block_k=16)


LAYOUT = ("lengths", "cu_seqlens", "cu_seqlens_k")


class Along(NamedTuple):
    """A call, tangents of what it is differentiated by, and weights of the tangents of its results."""

    call: Call
    tangents: dict[str, Tensor]  # by operand; one that is not there is zero
    weights: tuple[Tensor, ...]  # of tO, and of attention's tLSE

    def operands(self) -> dict[str, Tensor]:
        """What the call is differentiated by."""
        named = dict(zip("qkv", self.call.args, strict=False))
        return named | {name: self.call.kwargs[name] for name in ("rel_bias", "sinks") if name in self.call.kwargs}

    @property
    def layout(self) -> Layout:
        return Layout(**{name: x for name, x in self.call.kwargs.items() if name in LAYOUT})


def along(call: Call, *, seed: int = 0, layout: str = "contiguous", without: tuple[str, ...] = ()) -> Along:
    """Random tangents and weights. Operands are whole: a launcher takes a bias of every row and head."""
    kept = {name: x for name, x in call.kwargs.items() if name not in ("return_lse", "gate", "gate_activation")}
    if "rel_bias" in kept:
        lead = call.args[0].shape[:2] if call.name == "attention" else call.args[0].shape[:1]
        kept["rel_bias"] = kept["rel_bias"].expand(*lead, -1)
    call, found = Call(call.name, call.args[:3], kept), Along(call, {}, ())
    found = found._replace(call=call)
    tangents = {
        name: lay_out(randn(seed + i, *x.shape, dtype=x.dtype), layout)
        for i, (name, x) in enumerate(found.operands().items(), 1)
        if name not in without
    }
    q, v = call.args[0], call.args[2]
    weights = [lay_out(randn(seed + 9, *q.shape[:-1], v.shape[-1], dtype=q.dtype), layout)]
    if call.name == "attention":
        weights.append(randn(seed + 10, *q.shape[:-1]))
    return Along(call, tangents, tuple(weights))


def by_pytorch(case: Along, dtype: torch.dtype, *change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Tangents and second derivatives of the reference, differentiated twice, in one dtype, of changed operands."""
    operands, formula = case.operands(), getattr(reference, case.call.name).__wrapped__
    fixed = {name: x for name, x in case.call.kwargs.items() if name not in operands}
    if case.call.name == "attention":
        fixed["return_lse"] = True
    return differentiated(partial(formula, **fixed), operands, case.tangents, case.weights, dtype, *change)


def by_kernels(case: Along) -> dict[str, Tensor]:
    """The same by the launchers, in memory that is NaN until it is written."""
    with fresh_memory_is_nan():
        return (_attention if case.call.name == "attention" else _gated)(case)


def _attention(case: Along) -> dict[str, Tensor]:
    q, k, v = case.call.args
    kept = {name: x for name, x in case.call.kwargs.items() if name in AttentionOptions._fields}
    if "dropout_seed" in kept:
        kept["dropout_seed"] = torch.tensor([kept["dropout_seed"]], dtype=torch.int64)
    options = AttentionOptions(**kept | {"window": kept.get("window") or (None, None)})
    tangents = AttentionTangents(**{f"t{name}": x for name, x in case.tangents.items()})
    results = attention_forward(q, k, v, case.layout, options)
    moved = launchers.attention_jvp(q, k, v, results, tangents, case.layout, options)
    dout, dlse = case.weights
    grads = launchers.attention_second(dout, dlse, q, k, v, results, tangents, moved, case.layout, options)
    names = ("dq", "dk", "dv", "drel_bias", "dsinks")
    return moved._asdict() | {name: x for name, x in zip(names, grads, strict=True) if x is not None}


def _gated(case: Along) -> dict[str, Tensor]:
    q, k, v = case.call.args
    options = GatedOptions(**{name: x for name, x in case.call.kwargs.items() if name in GatedOptions._fields})
    tangents = GatedTangents(**{f"t{name}": x for name, x in case.tangents.items()})
    moved = launchers.gau_attention_jvp(q, k, v, tangents, case.layout, options)
    grads = launchers.gau_attention_second(case.weights[0], q, k, v, tangents, case.layout, options)
    found = dict(zip(("dq", "dk", "dv", "drel_bias"), grads, strict=True))
    return {"tout": moved} | {name: x for name, x in found.items() if x is not None}


def check(case: Along) -> None:
    """Held to the reference in fp64, beside plain PyTorch in the dtype of the call, by the rule of `compare`."""
    with tables.configured(small):
        ours = by_kernels(case)
    exact = by_pytorch(case, torch.float64)
    softmax = case.call.name == "attention" or case.call.kwargs.get("score", "relu2").startswith("softmax")
    gradients = [x for name, x in exact.items() if name.startswith("d")]
    if softmax and not (exact["tout"].any() and any(x.any() for x in gradients)):
        reject()  # rows see one key, and v or q and k stand still: all cancels, and only rounding would be left
    assert ours.keys() == exact.keys()
    rows = held_derivatives(ours, partial(by_pytorch, case), exact, case.call.args[0].dtype)
    assert all(row.ok for row in rows), "\n".join(map(str, rows))


def is_short(call: Call) -> bool:
    """Whether an interpreted kernel is through with it in seconds."""
    return call.args[0].shape[-2] <= 33 and call.args[1].shape[-2] <= 33


# ---- softmax attention


@given(st.data())
def test_attention_with_any_options(data):
    call = data.draw(attention_calls("triton").filter(is_short))
    names = ("q", "k", "v", "rel_bias", "sinks")
    without = data.draw(st.one_of(st.just(()), st.tuples(st.sampled_from(names), st.sampled_from(names))))
    layout = data.draw(st.sampled_from(["contiguous", "contiguous", "transposed", "guarded", "expanded"]))
    check(along(call, seed=data.draw(st.integers(0, 99)), layout=layout, without=without))


EVERY = {"scale": 0.4, "window": (9, 3), "softcap": 1.5, "dropout_p": 0.3, "dropout_seed": 11}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_with_every_option_at_once(dtype):
    m, n, ends = 19, 21, torch.tensor([0, 3, 3, 19])
    q, k, v = randn(1, 1, 2, m, 9, dtype=dtype), randn(2, 1, 1, n, 9, dtype=dtype), randn(3, 1, 1, n, 18, dtype=dtype)
    beside = {"rel_bias": randn(4, 1, 2, 2 * n + 1), "sinks": randn(5, 2)}
    packed = {"cu_seqlens": ends, "cu_seqlens_k": torch.tensor([0, 2, 4, 21])}
    check(along(Call("attention", (q, k, v), EVERY | beside | packed)))


# ---- gated attention


@given(st.data())
def test_gated_attention_with_any_options(data):
    call = data.draw(gau_calls("triton").filter(is_short))
    without = data.draw(st.sampled_from([(), (), ("q",), ("k", "rel_bias"), ("v",)]))
    layout = data.draw(st.sampled_from(["contiguous", "contiguous", "transposed", "guarded", "expanded"]))
    check(along(call, seed=data.draw(st.integers(0, 99)), layout=layout, without=without))


@pytest.mark.parametrize("score", ["relu2", "laplace", "softmax", "softmax_plus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_score_of_gated_attention(score, dtype):
    q, k, v, bias = (randn(i, 2, *shape, dtype=dtype) for i, shape in enumerate(((21, 9), (21, 9), (21, 40), (41,)), 1))
    options = {"score": score, "causal": True, "rel_bias": bias, "lengths": torch.tensor([21, 9])}
    check(along(Call("gau_attention", (q, k, v), options)))


# ---- what is no token


def poisoned(case: Along, rows: Any) -> Along:
    """With NaN in rows of every tensor that has one for each token."""

    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[rows] = torch.nan
        return x

    tokens = {name: changed(x) if name in "qkv" else x for name, x in case.tangents.items()}
    call = Call(case.call.name, tuple(map(changed, case.call.args)), case.call.kwargs)
    return Along(call, tokens, tuple(map(changed, case.weights)))


@pytest.mark.parametrize("name", ["attention", "gau_attention"])
def test_padding_is_not_read(name):
    one, wide = ((1,), {"sinks": randn(6, 1)}) if name == "attention" else ((), {"score": "laplace"})
    q, k, v = (randn(i, 1, *one, 20, width) for i, width in ((1, 8), (2, 8), (3, 17)))
    bias = randn(4, 1, *one, 39)
    case = along(Call(name, (q, k, v), {"causal": True, "lengths": torch.tensor([13]), "rel_bias": bias, **wide}))
    behind = (slice(None), *[slice(None)] * len(one), slice(13, None))
    with tables.configured(small):
        clean, found = by_kernels(case), by_kernels(poisoned(case, behind))
    for key, x in clean.items():
        assert torch.equal(found[key], x), key
        if x.shape[:-1] == q.shape[:-1] or key == "tlse":
            assert not x[behind].any(), key


@pytest.mark.parametrize(("ends", "n"), REST, ids=str)
@pytest.mark.parametrize("name", ["attention", "gau_attention"])
def test_rows_of_no_packed_sequence_are_padding(name, ends, n):
    one, wide = ((1,), {"sinks": randn(6, 1)}) if name == "attention" else ((), {"score": "laplace"})
    q, k, v = (randn(i, 1, *one, n, width) for i, width in ((1, 8), (2, 8), (3, 17)))
    options = {"rel_bias": randn(4, 1, *one, 2 * n - 1), **wide}
    case = along(Call(name, (q, k, v), options | {"cu_seqlens": torch.tensor(ends)}))
    outside = torch.ones(n, dtype=torch.bool)
    outside[ends[0] : ends[-1]] = False
    axes = (slice(None),) * (1 + len(one))
    inner = (*axes, slice(ends[0], ends[-1]))
    alone = Along(
        Call(name, (q[inner], k[inner], v[inner]), options | {"cu_seqlens": torch.tensor(ends) - ends[0]}),
        {key: x[inner] if key in "qkv" else x for key, x in case.tangents.items()},
        tuple(x[inner] for x in case.weights),
    )
    with tables.configured(small):
        found, expected = by_kernels(poisoned(case, (*axes, outside))), by_kernels(alone)
    for key, x in found.items():
        if key in ("drel_bias", "dsinks"):
            torch.testing.assert_close(x, expected[key])
        else:
            assert not x[(*axes, outside)].any(), key
            torch.testing.assert_close(x[inner], expected[key])


# ---- what repeats, and what is large


@pytest.mark.parametrize("name", ["attention", "gau_attention"])
def test_a_second_run_gives_the_same_bits(name):
    one = (1,) if name == "attention" else ()
    q, k, v = (randn(i, 1, *one, 20, width) for i, width in ((1, 8), (2, 8), (3, 17)))
    case = along(Call(name, (q, k, v), {"causal": True, "rel_bias": randn(4, 1, *one, 39)}))
    with tables.configured(small):
        first, second = by_kernels(case), by_kernels(case)
    assert all(torch.equal(x, second[key]) for key, x in first.items())


def test_rows_that_see_nothing_have_no_derivatives():
    """More queries than keys of a causal call: the first see none, whose dLSE may be anything."""
    q, k, v = randn(1, 1, 1, 24, 8), randn(2, 1, 1, 5, 8), randn(3, 1, 1, 5, 8)
    case = along(Call("attention", (q, k, v), {"causal": True}))
    case.weights[1][:, :, :19] = torch.nan
    with tables.configured(small):
        found = by_kernels(case)
    assert all(torch.isfinite(x).all() for x in found.values())
    for key in ("tout", "tlse", "dq"):
        assert not found[key][:, :, :19].any()


def test_the_launchers_give_what_the_forward_gives_in_its_memory():
    q = randn(1, 2, 7, 3, 8).transpose(1, 2)
    case = along(Call("attention", (q, q, q[..., :5]), {}))
    with tables.configured(small):
        results = attention_forward(*case.call.args)
        moved = launchers.attention_jvp(*case.call.args, results, AttentionTangents())
    assert moved.tout.stride() == results.out.stride()
    assert not moved.tout.any()
    assert not moved.tlse.any()

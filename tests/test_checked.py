"""Launchers with `check=True` refuse what the public functions refuse, in the same words, before a kernel starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_calls import BAD, GOOD, Bad
from strategies import randn

pytest.importorskip("triton")
from flashgau.kernels import attention, common, gau, glu, mixed_chunk, tangents

import flashgau
from flashgau.options import AttentionAlong, AttentionResults, AttentionTangents, GatedTangents, OpenChunk

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels would need a GPU's tensors")

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "attention": attention.attention_forward,
    "glu": glu.glu_forward,
    "glu_linear": glu.glu_linear_forward,
    "gau_attention": gau.gau_attention_forward,
    "mixed_chunk_attention": mixed_chunk.mixed_chunk_attention_forward,
    "mixed_chunk_step": mixed_chunk.mixed_chunk_step_,
}
NOT_THEIRS = {"backend", "inplace", "return_lse", "return_state", "initial_state", "state", "recompute"}
OF_GATED = {"gate", "gate_activation"}  # which attention's plain launcher does not take
CASES = [
    case
    for case in BAD
    if not NOT_THEIRS & case.changes.keys()
    and case.expected != "64 bits"  # of a number
    and not (case.op == "attention" and OF_GATED & case.changes.keys())
]


def operands(op: str) -> dict[str, Any]:
    """Of a good call, as a launcher takes them."""
    given = GOOD[op]()
    if op == "mixed_chunk_step":
        given |= {"state": OpenChunk(*given["state"].tensors()), "chunk_size": 4}
    return given


@pytest.fixture
def no_kernel(monkeypatch):
    def launched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(type(glu.glu_kernel), "run", launched)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_words_as_the_public_function(case: Bad, no_kernel):
    """A seed is a tensor here, or may be a number there: that one alone has another text."""
    with pytest.raises(case.error) as public:
        getattr(flashgau, case.op)(**{**GOOD[case.op](), **case.changes})
    launcher = LAUNCHERS[case.op]
    with pytest.raises(case.error) as found:
        launcher(**{**operands(case.op), **case.changes}, check=True)
    if case.argument == "dropout_seed":
        assert str(found.value).startswith("attention_forward: `dropout_seed` ")
    else:
        assert str(found.value) == str(public.value).replace(f"{case.op}: ", f"{launcher.__name__}: ", 1)


def test_there_are_many():
    assert len(CASES) >= 100
    assert {case.op for case in CASES} == LAUNCHERS.keys()


@pytest.mark.parametrize("op", LAUNCHERS)
def test_a_good_call_has_the_same_result(op):
    """Where memory was not written, both may hold anything: no tensor of these is."""
    plain, checked = (LAUNCHERS[op](**operands(op), check=check) for check in (False, True))
    for a, b in zip(plain, checked, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_nothing_is_checked_unless_asked(monkeypatch):
    monkeypatch.setattr(common.checked, "check", lambda *_: pytest.fail("checked"))
    for op, launcher in LAUNCHERS.items():
        launcher(**operands(op))


def backward(op: str, **changes: Any) -> Any:
    """The launcher of a backward, on operands that fit but for the changes."""
    given = GOOD[op]()
    saved = {
        "attention": {"dout": randn(9, 2, 4, 6, 5), "dlse": randn(9, 2, 4, 6),
                      "results": AttentionResults(randn(9, 2, 4, 6, 5), randn(9, 2, 4, 6))},
        "glu": {"dout": randn(9, 3, 4)},
        "glu_linear": {"dout": randn(9, 3, 6), "g": randn(9, 3, 6), "u": randn(9, 3, 6)},
        "gau_attention": {"dout": randn(9, 2, 6, 5), "product": randn(9, 2, 6, 5)},
        "mixed_chunk_attention": {"dout": randn(9, 2, 6, 5), "product": randn(9, 2, 6, 5), "dkv": None},
    }[op]  # fmt: skip
    launcher = {
        "attention": attention.attention_backward,
        "glu": glu.glu_backward,
        "glu_linear": glu.glu_linear_backward,
        "gau_attention": gau.gau_attention_backward,
        "mixed_chunk_attention": mixed_chunk.mixed_chunk_attention_backward,
    }[op]
    return launcher(**{**saved, **given, **changes}, check=True)


BACKWARDS = ["attention", "glu", "glu_linear", "gau_attention", "mixed_chunk_attention"]


@pytest.mark.parametrize("op", BACKWARDS)
def test_good_backwards_pass(op):
    assert all(torch.is_tensor(x) or x is None for x in backward(op))


@pytest.mark.parametrize("op", BACKWARDS)
def test_backwards_refuse_what_forwards_refuse(op, no_kernel):
    for case in [case for case in CASES if case.op == op and "dropout_seed" not in case.changes]:
        with pytest.raises(case.error) as found:
            backward(op, **case.changes)
        assert f"`{case.argument}" in str(found.value)
        assert case.expected in str(found.value)


@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("attention", {"dout": randn(9, 2, 4, 6, 8)}, "`dout` has shape (2, 4, 6, 8)"),
        ("attention", {"dout": randn(9, 2, 4, 6, 5).half()}, "`dout` has dtype torch.float16"),
        ("attention", {"dlse": randn(9, 2, 4)}, "`dlse` has shape (2, 4)"),
        ("attention", {"results": (randn(9, 2, 2, 6, 5), randn(9, 2, 4, 6))}, "`out` has shape (2, 2, 6, 5)"),
        ("attention", {"results": (randn(9, 2, 4, 6, 5), randn(9, 2, 2, 6))}, "`lse` has shape (2, 2, 6)"),
        ("glu", {"dout": randn(9, 4, 3)}, "`dout` has shape (4, 3); expected (3, 4) as the result"),
        ("glu", {"up": None}, "`dout` has shape (3, 4); expected (3, 2) as the result"),
        ("glu_linear", {"dout": randn(9, 6)}, "`dout` has shape (6,); expected (3, 6) as the result"),
        ("glu_linear", {"u": None}, "`g` was given alone"),
        ("glu_linear", {"u": randn(9, 3, 4)}, "`u` has shape (3, 4)"),
        ("gau_attention", {"dout": randn(9, 2, 6, 8)}, "`dout` has shape (2, 6, 8)"),
        ("gau_attention", {"product": randn(9, 2, 5, 5)}, "`product` has shape (2, 5, 5)"),
        ("mixed_chunk_attention", {"dout": randn(9, 2, 6, 3)}, "`dout` has shape (2, 6, 3)"),
        ("mixed_chunk_attention", {"dkv": randn(9, 1, 3, 5)}, "`dkv` has shape (1, 3, 5)"),
    ],
)
def test_gradients_that_do_not_belong_are_refused(op, changes, words, no_kernel):
    with pytest.raises((ValueError, TypeError)) as found:
        backward(op, **changes)
    assert words in str(found.value)


@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("attention", {n: x.double() for n, x in GOOD["attention"]().items()}, "`q` has dtype torch.float64"),
        ("attention", {n: randn(0, 1, 1, 2, 300) for n in "qkv"}, "`q` has width 300; expected a width of up to 256"),
        ("attention", {"rel_bias": torch.zeros(11)}, "`rel_bias` has shape (11,); expected (B, Hq, 2P-1)"),
        ("attention", {"dropout_p": 0.1}, "`dropout_seed` is None; expected a one-element int64 tensor"),
        ("gau_attention", {"rel_bias": torch.zeros(11)}, "`rel_bias` has shape (11,); expected (B, 2P-1)"),
        ("mixed_chunk_attention", {"initial_kv": randn(0, 2, 3, 5)}, "`initial_kv` and `closed_tokens` were not given"),
        (
            "mixed_chunk_attention",
            {"initial_kv": randn(0, 3, 3, 5), "closed_tokens": torch.tensor([4, 4]), "causal": True},
            "`initial_kv` has shape (3, 3, 5)",
        ),
        ("mixed_chunk_step", {"state": OpenChunk(*[randn(0, 2, 3, 5)] * 5)}, "`open_quad_k` has shape (2, 3, 5)"),
    ],
)
def test_what_kernels_alone_cannot_take_is_refused(op, changes, words, no_kernel):
    with pytest.raises((ValueError, TypeError)) as found:
        LAUNCHERS[op](**{**operands(op), **changes}, check=True)
    assert words in str(found.value)


def second(op: str, **changes: Any) -> Any:
    """The launcher of second derivatives, on operands that fit but for the changes."""
    given: dict[str, Any] = {**GOOD[op](), "dout": randn(9, 2, 4, 6, 5)}
    results = AttentionResults(randn(9, 2, 4, 6, 5), randn(9, 2, 4, 6))
    if op == "attention":
        given |= {"dlse": None, "results": results, "along": AttentionAlong(*results), "tangents": AttentionTangents()}
        return tangents.attention_second(**{**given, **changes}, check=True)
    given |= {"dout": randn(9, 2, 6, 5), "tangents": GatedTangents()}
    return tangents.gau_attention_second(
        **{name: x for name, x in {**given, **changes}.items() if name not in ("gate", "gate_activation")}, check=True
    )


@pytest.mark.parametrize("op", ["attention", "gau_attention"])
def test_good_second_derivatives_pass(op):
    given = GOOD[op]()
    second(op, tangents={"attention": AttentionTangents, "gau_attention": GatedTangents}[op](given["q"]))


@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("attention", {"tq": randn(9, 2, 4, 6, 2)}, "`tq` has shape (2, 4, 6, 2)"),
        ("attention", {"tv": randn(9, 2, 4, 6, 5).half()}, "`tv` has dtype torch.float16"),
        ("attention", {"tsinks": randn(9, 4)}, "`tsinks` was given without `sinks`; expected both"),
        ("attention", {"dlse": randn(9, 4, 6)}, "`dlse` has shape (4, 6)"),
        ("attention", {"tout": randn(9, 2, 4, 6)}, "`tout` has shape (2, 4, 6)"),
        ("gau_attention", {"tk": randn(9, 2, 6)}, "`tk` has shape (2, 6)"),
        ("gau_attention", {"trel_bias": randn(9, 2, 11)}, "`trel_bias` was given without `rel_bias`"),
        ("gau_attention", {"dout": randn(9, 2, 6, 8)}, "`dout` has shape (2, 6, 8)"),
    ],
)
def test_tangents_that_do_not_belong_are_refused(op, changes, words, no_kernel):
    with pytest.raises((ValueError, TypeError)) as found:
        second(op, **changes)
    assert words in str(found.value)


def test_a_launcher_without_a_check_says_so():
    @common.launcher
    def mine(x, config=None):
        return x

    x = torch.ones(2)
    assert mine(x) is x
    with pytest.raises(TypeError, match="mine: `check` is True; expected False: this launcher has no check"):
        mine(x, check=True)

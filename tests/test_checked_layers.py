"""The launchers of layers refuse with `check=True`, too, what their kernels cannot take, before one starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import randn

pytest.importorskip("triton")
from flashgau.kernels import checked, flash_unit, glu, norms, projection, rank_form

from flashgau.options import Angles, NormOptions, OpenChunk, ProjectionWeights, TokenHeads

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
WEIGHTS = ProjectionWeights(randn(1, 14, 7), randn(2, 14), randn(3, 2, 4), randn(4, 2, 4))
ANGLES = Angles(randn(5, 1, 6, 2), randn(6, 2, 6, 2)[:1])
RAW = WEIGHTS._replace(raw_gate=True)


def token() -> dict[str, Any]:
    state = OpenChunk(
        torch.zeros(2, 4, 5), torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2, 4, 5), torch.zeros(2).long()
    )
    heads = TokenHeads(randn(3, 4, 4), randn(4, 4, 4), randn(5, 2), False, [0, 1, 2, 3])
    return {"wide": randn(0, 2, 1, 14), "heads": heads, "state": state, "chunk_size": 4}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "norm_forward": (norms.norm_forward, lambda: {
        "x": randn(0, 2, 6, 7), "weight": randn(1, 7), "bias": randn(2, 7), "options": NormOptions(),
    }),
    "norm_backward": (norms.norm_backward, lambda: {
        "dy": randn(3, 2, 6, 7), "x": randn(0, 2, 6, 7), "weight": randn(1, 1), "bias": None,
        "options": NormOptions("rms", 1e-5, True),
    }),
    "heads_forward": (projection.heads_forward, lambda: {
        "z": randn(0, 2, 6, 4), "gamma": WEIGHTS.gamma, "beta": WEIGHTS.beta, "angles": ANGLES,
    }),
    "heads_backward": (projection.heads_backward, lambda: {
        "douts": [randn(7, 2, 6, 4), randn(8, 2, 6, 4)], "z": randn(0, 2, 6, 4), "gamma": WEIGHTS.gamma,
        "angles": ANGLES, "dz": torch.zeros(2, 6, 4),
    }),
    "gated_projection_forward": (projection.gated_projection_forward, lambda: {
        "x": randn(0, 2, 6, 7), "weights": WEIGHTS, "angles": ANGLES,
    }),
    "gated_projection_backward": (projection.gated_projection_backward, lambda: {
        "du": randn(7, 2, 6, 5), "dv": randn(8, 2, 6, 5), "dheads": [randn(9, 2, 6, 4), randn(10, 2, 6, 4)],
        "x": randn(0, 2, 6, 7), "weights": RAW, "saved": [randn(11, 2, 6, 9)], "angles": ANGLES,
    }),
    "rank_form_forward": (rank_form.rank_form_forward, lambda: {
        "a": randn(0, 6), "b": randn(1, 6), "turns": randn(2, 5, 6),
    }),
    "rank_form_backward": (rank_form.rank_form_backward, lambda: {
        "dbias": randn(3, 5), "a": randn(0, 6), "b": randn(1, 6), "turns": randn(2, 5, 6),
    }),
    "flash_unit_token_": (flash_unit.flash_unit_token_, token),
}  # fmt: skip


def call(name: str, check: bool, **changes: Any) -> Any:
    launcher, good = CALLS[name]
    return launcher(**{**good(), **changes}, check=check)


@pytest.fixture
def no_kernel(monkeypatch):
    def launched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(type(glu.glu_kernel), "run", launched)


def test_every_launcher_has_a_check():
    """But for the one that finds slopes of a user's function, which is not for others."""
    text = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    launchers = set(re.findall(r"^@launcher\ndef (\w+)", text, re.MULTILINE))
    assert launchers - {"_probed"} == checked.CHECKS.keys()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels would need a GPU's tensors")
@pytest.mark.parametrize("name", CALLS)
def test_a_good_call_has_the_same_result(name):
    plain, found = (call(name, check) for check in (False, True))
    for a, b in zip(*((x,) if torch.is_tensor(x) else x for x in (plain, found)), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("norm_forward", {"x": randn(0, 2, 6, 7).double()}, "`x` has dtype torch.float64; expected float16"),
        ("norm_forward", {"x": torch.zeros(1, 8193)}, "`x` has width 8193; expected a width of up to 8192"),
        ("norm_forward", {"weight": randn(1, 6)}, "`weight` has shape (6,); expected (1,) or (7,)"),
        ("norm_forward", {"bias": randn(1, 1)}, "`bias` has shape (1,); expected (7,)"),
        ("norm_forward", {"weight": 1.0}, "`weight` is a float; expected a torch.Tensor"),
        ("norm_forward", {"options": NormOptions("batch")}, "`kind` is 'batch'; expected one of 'layernorm', 'rms'"),
        ("norm_forward", {"options": NormOptions(eps=-1.0)}, "`eps` is -1.0; expected a number of at least 0"),
        ("norm_backward", {"dy": randn(3, 2, 5, 7)}, "`dy` has shape (2, 5, 7); expected (2, 6, 7) as `x` has"),
        ("norm_backward", {"dy": randn(3, 2, 6, 7).half()}, "`dy` has dtype torch.float16"),
        ("heads_forward", {"gamma": randn(3, 2, 5)}, "`gamma` has shape (2, 5); expected (H, S) with S = 4 as in `z`"),
        ("heads_forward", {"beta": randn(3, 1, 4)}, "`beta` has shape (1, 4); expected (H, S)"),
        ("heads_forward", {"angles": Angles(ANGLES.cos)}, "`sin` is None; expected both `cos` and `sin`, or neither"),
        ("heads_forward", {"angles": Angles(randn(0, 1, 6, 3), randn(0, 1, 6, 3))}, "`cos` has shape (1, 6, 3)"),
        ("heads_forward", {"angles": Angles(randn(0, 3, 6, 2), randn(0, 3, 6, 2))}, "expected (1 or 2, 6, pairs)"),
        ("heads_forward", {"angles": Angles(randn(0, 1, 5, 2), randn(0, 1, 5, 2))}, "`cos` has shape (1, 5, 2)"),
        ("heads_backward", {"douts": [randn(7, 2, 6, 4)]}, "`douts` has 1 tensors; expected H = 2 of them"),
        ("heads_backward", {"douts": [randn(7, 2, 6, 4), randn(7, 2, 6, 3)]}, "`douts[1]` has shape (2, 6, 3)"),
        ("heads_backward", {"dz": torch.zeros(2, 6, 5)}, "`dz` has shape (2, 6, 5)"),
        ("gated_projection_forward", {"x": randn(0, 2, 6)}, "`x` has shape (2, 6); expected (B, N, d)"),
        ("gated_projection_forward", {"weights": WEIGHTS._replace(weight=randn(1, 14, 6))}, "`weight` has shape"),
        ("gated_projection_forward", {"weights": WEIGHTS._replace(weight=randn(1, 13, 7), bias=None)},
         "`weight` has 13 rows; expected 2 e + S of them, with S = 4 as in `gamma`"),
        ("gated_projection_forward", {"weights": WEIGHTS._replace(bias=randn(1, 13))}, "`bias` has shape (13,)"),
        ("gated_projection_forward", {"weights": WEIGHTS._replace(raw_gate=1)}, "`raw_gate` is 1; expected True"),
        ("gated_projection_backward", {"dv": randn(8, 2, 6, 4)}, "`dv` has shape (2, 6, 4)"),
        ("gated_projection_backward", {"dheads": []}, "`dheads` has 0 tensors"),
        ("gated_projection_backward", {"weights": WEIGHTS}, "`saved` has shape (2, 6, 9); expected (2, 6, 14)"),
        ("rank_form_forward", {"b": randn(1, 4)}, "`b` has shape (4,); expected (S,) with S = 6 as in `a`"),
        ("rank_form_forward", {"turns": randn(2, 6, 5).T}, "`turns` has dtype torch.float32 and strides (1, 5)"),
        ("rank_form_forward", {"a": randn(0, 6).double()}, "`a` has dtype torch.float64"),
        ("rank_form_backward", {"dbias": randn(3, 4)}, "`dbias` has shape (4,); expected (n,) with n = 5"),
        ("flash_unit_token_", {"wide": randn(0, 2, 2, 14)}, "`wide` has shape (2, 2, 14); expected one token"),
        ("flash_unit_token_", {"wide": randn(0, 2, 1, 15)}, "expected 2 E + S = 14 columns, as `state` has"),
        ("flash_unit_token_", {"chunk_size": 5}, "`open_quad_k` has shape (2, 4, 4)"),
        ("flash_unit_token_", {"order": [0, 1, 2, 2]}, "`order` is [0, 1, 2, 2] of 4 rows; expected each of the four"),
        ("flash_unit_token_", {"frequencies": randn(0, 3)}, "`frequencies` has shape (3,); expected at most S / 2 = 2"),
        ("flash_unit_token_", {"state": token()["state"]._replace(kv=torch.zeros(2, 5, 4).mT)}, "`kv` has strides"),
    ],
)  # fmt: skip
def test_what_kernels_cannot_take_is_refused(name, changes, words, no_kernel):
    if name == "flash_unit_token_" and changes.keys() & {"order", "frequencies"}:
        changes = {"heads": CALLS[name][1]()["heads"]._replace(**changes)}
    with pytest.raises((ValueError, TypeError)) as found:
        call(name, True, **changes)
    assert str(found.value).startswith(f"{name}: ")
    assert words in str(found.value)

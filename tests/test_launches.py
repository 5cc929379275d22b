"""How much a training step of a layer starts on a GPU: what was taken out must not come back."""

import json
from pathlib import Path

import pytest
from kernel_calls import compiled

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("layer_launches.py")


def launches(kind: str, length: int, *what: str) -> list[list[tuple[str, str]]]:
    argv = ["", kind, str(length), *what]
    code = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); sys.argv = {argv!r}\n"
    printed = compiled(code + f"exec(compile({PROGRAM.read_text()!r}, {str(PROGRAM)!r}, 'exec'))")
    return [[tuple(x) for x in part] for part in json.loads(printed)]


def outside(found: list[tuple[str, str]]) -> list[str]:
    """What is not attention's."""
    return [name for where, name in found if not where.startswith(("gau_attention", "mixed_chunk"))]


# The way in (two products, silu of v, the heads), the way out (a product, the residual), and the norm.
FORWARD = ["norm_kernel", "addmm", "addmm", "silu_kernel", "heads_kernel", "addmm", "add_"]
BACKWARD = [
    *("sum", "mm", "mm"),  # of the way out: its bias, input and weight
    *("silu_backward_kernel", "heads_backward_kernel", "sum_kernel"),
    *("mm", "addmm_", "mm", "sum", "mm", "sum"),  # of the way in: both halves of its input, weight and bias
    *("norm_backward_kernel", "sum_kernel"),
    "add",  # of the two gradients of x
]


def test_a_flash_layer_starts_no_more_than_this():
    forward, backward = launches("FLASH", 16384)
    assert outside(forward) == FORWARD
    assert outside(backward) == BACKWARD
    assert len(forward) <= 11
    assert len(backward) <= 23


def test_a_gau_layer_starts_no_more_than_this():
    """The same, and its bias, whose every distance is kept."""
    forward, backward = launches("GAU", 16384)
    assert outside(forward)[5:-2] == ["rank_form_kernel"]
    assert [*outside(forward)[:5], *outside(forward)[-2:]] == FORWARD
    after = outside(backward)
    assert [*after[:3], *after[-len(BACKWARD) + 3 :]] == BACKWARD
    assert after[3 : -len(BACKWARD) + 3] == ["rank_form_backward_kernel", "rank_form_factors_kernel"]
    assert len(forward) <= 16
    assert len(backward) <= 40


def test_a_token_of_a_flash_layer_starts_no_more_than_this():
    """However many tokens came before: where it stands is read on the device."""
    [found] = launches("FLASH", 300, "token")
    assert [name for _, name in found] == ["norm_kernel", "addmm", "token_kernel", "close_kernel", "addmm", "add_"]

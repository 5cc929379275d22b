"""Triton kernels: how wide they are, what goes to eager, and what the interpreter is refused."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_calls
import pytest
import torch
from strategies import randn

import flashgau
from flashgau import kernels
from flashgau.ops import dispatch

pytest.importorskip("triton")
import quick_interpreter
import triton.language as tl
from flashgau.kernels import common
from flashgau.kernels.common import Sizes

pytestmark = kernel_calls.pytestmark


def test_what_is_too_wide_goes_to_eager():
    assert kernels.SUPPORTED["attention"] == 256
    for width, reason in ((256, None), (257, "its kernels take widths of up to 256, not 257")):
        assert flashgau.ops.dispatch.explain("attention", "cpu", width=width)["triton"] == reason
    wide = randn(0, 1, 1, 3, 257)
    with pytest.raises(RuntimeError, match=r'attention: backend="triton" cannot run this call: .* up to 256, not 257'):
        flashgau.attention(wide, wide, wide, backend="triton")
    assert flashgau.ops.dispatch.default_backend("attention", "cuda", width=257) == "eager"
    assert flashgau.attention(wide, wide, wide).shape == wide.shape


def test_no_function_of_the_kernels_takes_more_than_30_arguments():
    files = list(Path(kernels.__file__).parent.glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    counts = [(len(node.args.args), node.name) for node in nodes if isinstance(node, ast.FunctionDef)]
    assert len(counts) > 100
    assert [found for found in counts if found[0] > 30] == []


def test_sizes_are_constants_under_their_names():
    sizes = Sizes(D=64, BM=32, PRECISION="ieee")
    assert isinstance(sizes.BM, tl.constexpr)
    assert [sizes.BM.value, sizes.PRECISION.value] == [32, "ieee"]
    with pytest.raises(AttributeError, match="the kernel needs a size BN; it was launched with D, BM, PRECISION"):
        _ = sizes.BN


def test_equal_sizes_share_a_compiled_kernel():
    sizes, same = Sizes(D=64, BM=32), Sizes(BM=32, D=64)
    assert sizes == same
    assert hash(sizes) == hash(same)
    assert repr(sizes) == "Sizes(D=64, BM=32)"
    for other in (Sizes(D=64, BN=32), Sizes(D=32, BM=64), Sizes(D=64), (64, 32)):
        assert sizes != other
        assert repr(sizes) != repr(other)


NAMES = ["_get_np_dtype", "_patch_attr", "_patch_builtin", "_patch_lang", "_LangPatchScope", "interpreter_semantic"]


@pytest.mark.parametrize("hidden", [*NAMES, "is_builtin", None])
def test_interpreting_needs_none_of_the_names_that_make_it_faster(monkeypatch, hidden):
    """What a version of Triton calls otherwise is left alone."""
    for cls in (tl.core.block_type, tl.core.tensor):
        monkeypatch.setattr(cls, "__init__", cls.__init__)  # and put back
    monkeypatch.setattr(tl.core.dtype, "__eq__", tl.core.dtype.__eq__)
    calls = []
    plain: dict[str, Any] = {name: lambda *args: calls.append(args) for name in NAMES if name != hidden}
    module, package = SimpleNamespace(**plain), SimpleNamespace(exp=tl.exp, other=len)
    if hidden == "is_builtin":
        monkeypatch.delattr(tl.core, "is_builtin")
    quick_interpreter.hasten(module)
    assert hidden is None or not hasattr(module, hidden)
    replaced = {name for name, value in vars(module).items() if value is not plain[name]}
    needed = {
        "_get_np_dtype": {"_get_np_dtype"},
        "_patch_builtin": {"_patch_attr", "_patch_builtin", "is_builtin"},
        "_patch_lang": {"_patch_lang", "_LangPatchScope"},
    }
    assert replaced == {name for name, names in needed.items() if hidden not in names}
    if "_patch_builtin" in replaced:  # with a scope, or as Triton 3.5 without
        member = package.exp
        module._patch_builtin(package, "builder", "scope")
        module._patch_builtin(package, "builder")
        assert calls == [(package, "exp", member, "builder", "scope"), (package, "exp", member, "builder")]


LAUNCHERS = [
    (file.stem, node.name, ast.unparse(node.args.args[0].annotation))
    for file in sorted(Path(kernels.__file__).parent.glob("*.py"))
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and "launcher" in map(ast.unparse, node.decorator_list)
]


def test_a_version_whose_interpreter_cannot_be_put_right_is_refused_bf16(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and Triton compiles")
    q = randn(0, 1, 1, 3, 4).bfloat16()
    assert flashgau.attention(q, q, q, backend="triton").dtype == torch.bfloat16
    monkeypatch.setattr(dispatch, "_bf16", False)
    with pytest.raises(RuntimeError, match="interpreter"):
        flashgau.attention(q, q, q, backend="triton")
    assert len(LAUNCHERS) > 10


@pytest.mark.parametrize(("file", "name", "kind"), LAUNCHERS)
def test_launchers_refuse_bf16_to_the_interpreter_too(file, name, kind, monkeypatch):
    """In the words of the public functions; other dtypes, and Triton that compiles, are let by."""
    launch = getattr(importlib.import_module(f"flashgau.kernels.{file}"), name)
    monkeypatch.setattr(dispatch, "_bf16", False)
    reason = dispatch.explain("glu", "cpu", torch.bfloat16)["triton"]

    def first(dtype: torch.dtype, device: str = "cpu") -> object:
        x = torch.empty(1, 1, 3, 4, dtype=dtype, device=device)
        return x if kind == "Tensor" else [x]

    monkeypatch.setattr(common, "_TAKES_BF16", False)
    with pytest.raises(RuntimeError) as refused:
        launch(first(torch.bfloat16))
    assert str(refused.value) == f"{name}: {kernels.NO_INTERPRETED_BF16}"
    assert reason in (None, kernels.NO_INTERPRETED_BF16)
    for other in (first(torch.float16), first(torch.bfloat16, "meta")):
        with pytest.raises(TypeError, match="no argument `nothing`"):
            launch(other, nothing=0)
    monkeypatch.setattr(common, "_TAKES_BF16", True)
    with pytest.raises(TypeError, match="no argument `nothing`"):
        launch(first(torch.bfloat16), nothing=0)

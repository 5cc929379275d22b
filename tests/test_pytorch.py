"""PyTorch's private names: all in one file, and none that the package could not do without.

Run as a program, this file tries the operations without the names that it gets as arguments, each a try of its own,
those of one argument separated by commas.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import multiprocessing
import pkgutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]


def hide(hidden: list[str]) -> Any:
    """pkgutil.resolve_name as it is where PyTorch has not these names."""
    resolve = pkgutil.resolve_name

    def look_up(name: str) -> Any:
        if name in hidden:
            raise AttributeError(name)
        return resolve(name)

    return mock.patch.object(pkgutil, "resolve_name", look_up)


def selection(hidden: list[str]) -> dict[str, Any]:
    """What a fresh flashgau.pytorch offers without these names: each public name, by where it comes from."""
    spec = importlib.util.spec_from_file_location("flashgau.pytorch", ROOT / "flashgau" / "pytorch.py")
    module = importlib.util.module_from_spec(spec)
    with hide(hidden), mock.patch.dict(sys.modules, {"flashgau.pytorch": module}):
        spec.loader.exec_module(module)
    public = {name: x for name, x in vars(module).items() if not name.startswith("_")}
    return {name: getattr(x, "__qualname__", None) or str(x) for name, x in public.items() if name != "USED"}


NAMES = importlib.import_module("flashgau.pytorch").USED if __name__ != "__main__" else []


# ---------------------------------------------------------------- without a name


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def refused(error: type[Exception], words: str, function: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        function()


def try_operations() -> None:
    """Every operation against the reference, alone and under what PyTorch does with operators."""
    import flashgau

    x, y, w, v = randn(0, 2, 5, 4), randn(1, 2, 5, 4), randn(2, 6, 4), randn(3, 2, 5, 6)
    heads, bias = randn(4, 2, 2, 5, 4), randn(5, 2, 9)
    lengths = torch.tensor([5, 3])
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "attention": (lambda q, k: flashgau.attention(q, k, q, causal=True), (heads, heads + 1)),
        "blocks": (lambda q, b: flashgau.attention(q, q, q, rel_bias=b, lengths=lengths), (heads, bias)),
        "glu": (lambda x, y: flashgau.glu(x, y), (x, y)),
        "gelu": (lambda x, y: flashgau.glu(x, y, activation="gelu"), (x.mT, y.mT)),
        "two sides": (lambda x, y: flashgau.glu(x, y, activation="gelu", up_activation="silu"), (x, y)),
        "glu_linear": (lambda x, w: flashgau.glu_linear(x, w, w), (x, w)),
        "gau": (lambda q, v: flashgau.gau_attention(q, q, v, causal=True), (x, v)),
        "mixed chunk": (lambda q, v: flashgau.mixed_chunk_attention(q, q, q, q, v, chunk_size=2, causal=True), (x, v)),
    }
    for call, args in calls.values():
        leaves = [a.clone().requires_grad_() for a in args]

        def total(*args: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(*args).square().sum()

        with flashgau.use_backend("reference"):
            out, grads = call(*args), torch.autograd.grad(total(*leaves), leaves)
        near([call(*args)], [out])
        near(torch.autograd.grad(total(*leaves), leaves), grads)
        near(torch.func.grad(total, (0, 1))(*args), grads)
        mapped = torch.func.vmap(torch.func.grad(total), in_dims=(0, None))(torch.stack([args[0], -args[0]]), args[1])
        near(mapped, [torch.func.grad(total)(a, args[1]) for a in (args[0], -args[0])])

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    leaf = x.clone().requires_grad_()
    with Record():
        flashgau.glu(leaf, y).sum().backward()
    assert {"flashgau::glu", "flashgau::glu_backward"} <= set(seen), seen
    traced = torch.jit.trace(flashgau.glu, (x, y), check_trace=False)
    assert "flashgau::glu" in [node.kind() for node in traced.graph.nodes()]

    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, y: flashgau.glu(x, y).square().sum(), backend=keep, fullgraph=True)
    expected = torch.autograd.grad(flashgau.glu(leaf, y).square().sum(), leaf)
    near(torch.autograd.grad(compiled(leaf, y), leaf), expected)
    nodes = [node.target for node in graphs[0].graph.nodes]
    assert torch.ops.flashgau.glu.default in nodes, nodes

    near(
        torch.vmap(lambda q, n: flashgau.attention(q[None], q[None], q[None], lengths=n[None]))(heads, lengths)[:, 0],
        flashgau.attention(heads, heads, heads, lengths=lengths),
    )
    too_long = lambda q: flashgau.attention(q, q, q, lengths=lengths + 1).sum()
    refused(ValueError, "attention: `lengths`", lambda: torch.func.grad(too_long)(heads))
    second = lambda x: torch.func.grad(lambda x: flashgau.glu(x, y).square().sum())(x).sum()
    naive = lambda x: torch.func.grad(lambda x: flashgau.glu(x, y, backend="reference").square().sum())(x).sum()
    near([torch.func.grad(second)(x)], [torch.func.grad(naive)(x)])
    reference = partial(flashgau.attention, backend="reference")
    if flashgau.pytorch.sees_levels:
        moved = torch.func.jvp(flashgau.attention, (heads, heads, heads), (heads, heads, heads))
        near(moved, torch.func.jvp(reference, (heads, heads, heads), (heads, heads, heads)))
    else:
        along = lambda: torch.func.jvp(flashgau.attention, (heads, heads, heads), (heads, heads, heads))
        refused(RuntimeError, "no forward-mode derivative here", along)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = flashgau.attention(heads, heads, heads)
    assert torch.equal(cast, flashgau.attention(*[heads.bfloat16()] * 3))


def without(hidden: list[str], answers: Any) -> None:
    """Try the operations in this process, in which PyTorch has not these names."""
    try:
        torch.set_num_threads(1)
        with hide(hidden):
            try_operations()
        answers.put("")
    except BaseException:
        answers.put(traceback.format_exc())


def main() -> None:
    """Print, as JSON, what went wrong in each of the tries on the command line: nothing, it should be."""
    torch.compile(torch.sin, backend="eager")(torch.ones(1))  # brings the compiler into memory, which every fork shares
    context: Any = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # afresh where there is no other way
    )
    answers, found = context.Queue(), {}
    for hidden in sys.argv[1:]:
        process = context.Process(target=without, args=(hidden.split(","), answers))
        process.start()
        found[hidden] = answers.get(timeout=300)
        process.join()
    print(json.dumps(found))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_another_way_behind_it(name):
    """Without it something else is offered, and nothing is missing."""
    assert selection([name]) != selection([])
    assert selection([name]).keys() == selection([]).keys()


def test_the_other_ways_work():
    """Every set of ways that a missing name leads to, and that without any private name; each in a process that has
    not loaded flashgau before. Names that lead to the same ways need one try."""
    tries = {json.dumps(selection([name])): name for name in NAMES}
    tries[json.dumps(selection(NAMES))] = ",".join(NAMES)
    command = [sys.executable, str(Path(__file__)), *tries.values()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == len(tries)
    assert not any(found.values()), "\n".join(f"without {name}:\n{error}" for name, error in found.items() if error)


def test_the_tested_version_has_every_name():
    """So that what runs here is the fast way. (A name that PyTorch took away is no longer worth its line.)"""
    for name in NAMES:
        assert pkgutil.resolve_name(name) is not None


# ---------------------------------------------------------------- elsewhere


_OBJECTS = (torch.ones(1, 1), torch.nn.Module(), torch.ops.aten.sin.default)


def _chain(node: ast.expr) -> list[str]:
    """The names of a.b.c; of an attribute of something else than a name, "" and the names behind it."""
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]


def private_names(path: Path) -> list[str]:
    """Where a file goes through a name of PyTorch with a leading underscore, or to such an attribute of a tensor, a
    module or an operator."""
    found, tree = [], ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            words = [w for alias in node.names if alias.name.split(".")[0] == "torch" for w in alias.name.split(".")]
        elif isinstance(node, ast.Attribute):
            words = _chain(node)
            if words[0] == "self" and words[1] in own:
                continue
            if words[0] not in ("torch", "forward_ad", "dist", "F"):
                words = words[-1:] if any(hasattr(x, words[-1]) for x in _OBJECTS) else []
        else:
            continue
        if any(word.startswith("_") and not word.startswith("__") for word in words):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {'.'.join(words)}")
    return found


def test_no_private_name_is_used_elsewhere():
    files = [p for top in ("flashgau", "kernels", "reference", "bench") for p in sorted((ROOT / top).rglob("*.py"))]
    own = ROOT / "flashgau" / "pytorch.py"
    assert own in files
    assert private_names(own)
    for path in files:
        assert path == own or not private_names(path), f"look it up in {own.name}, with a public way behind it"


if __name__ == "__main__":
    main()

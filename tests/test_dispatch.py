"""Which backend runs a call: argument, block, environment, default."""

import importlib
import inspect
import threading
from unittest import mock

import pytest
import torch
from strategies import randn

import flashgau
from flashgau import kernels
from flashgau.ops import dispatch
from flashgau.ops.dispatch import BACKENDS, FILES, default_backend, explain, resolve, use_backend

CPU = torch.device("cpu")
FP32 = torch.float32


def chosen(op: str = "glu", requested: str | None = None) -> str:
    return resolve(op, requested, CPU, FP32)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FLASHGAU_BACKEND", raising=False)


@pytest.fixture
def used(monkeypatch):
    """The backends that compute, in order."""
    names = []
    found = dispatch.implementation

    def watched(op, backend, function):
        names.append(backend)
        return found(op, backend, function)

    monkeypatch.setattr("flashgau.ops.autograd.implementation", watched)
    return names


def test_a_block_holds_nests_and_ends():
    assert chosen() == "eager"
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("eager"):
            assert chosen() == "eager"
        assert chosen() == "reference"
    assert chosen() == "eager"


def test_a_block_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("reference"), use_backend("reference"):
        raise KeyError
    assert chosen() == "eager"


def test_one_context_serves_once_each():
    for _ in range(2):
        with flashgau.use_backend("reference"):
            assert chosen() == "reference"


def test_it_decorates_functions():
    @flashgau.use_backend("reference")
    def run():
        return chosen()

    assert [run(), chosen(), run()] == ["reference", "eager", "reference"]


@pytest.mark.parametrize("name", ["nope", "Eager", "", None, 3, ["eager"]])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"use_backend: `name` is .*; expected one of 'triton', 'eager', 'reference'"):
        use_backend(name).__enter__()
    assert chosen() == "eager"


def test_argument_before_block_before_environment(monkeypatch):
    monkeypatch.setenv("FLASHGAU_BACKEND", "reference")
    assert chosen() == "reference"
    with use_backend("eager"):
        assert chosen() == "eager"
        assert chosen(requested="reference") == "reference"
    assert chosen(requested="eager") == "eager"


@pytest.mark.parametrize("value", ["nope", "", "EAGER"])
def test_bad_environment_is_refused_by_name(monkeypatch, value):
    monkeypatch.setenv("FLASHGAU_BACKEND", value)
    with pytest.raises(ValueError, match=f"glu: `FLASHGAU_BACKEND` is '{value}'; expected one of 'triton'"):
        flashgau.glu(torch.ones(2, 4))
    flashgau.glu(torch.ones(2, 4), backend="eager")


def test_threads_do_not_leak():
    seen = []
    inside, checked = threading.Event(), threading.Event()

    def other():
        with use_backend("reference"):
            inside.set()
            checked.wait(10)
            seen.append(chosen())

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert chosen() == "eager"
    checked.set()
    thread.join()
    assert seen == ["reference"]
    assert chosen() == "eager"


def test_public_calls_go_where_they_are_sent(used):
    operands = [randn(i, 1, 2, 5, 4) for i in range(3)]
    flashgau.attention(*operands)
    flashgau.attention(*operands, backend="reference")
    with use_backend("reference"):
        flashgau.attention(*operands)
        flashgau.attention(*operands, backend="eager")
    assert used == ["eager", "reference", "reference", "eager"]


def test_backward_runs_where_the_forward_did(used):
    q = randn(0, 1, 2, 5, 4).requires_grad_()
    out = flashgau.attention(q, q, q, softcap=2.0, backend="eager")
    with use_backend("reference"):
        out.sum().backward()
    assert used == ["eager", "eager"]


@pytest.mark.parametrize("op", FILES)
def test_explain_names_every_backend(op):
    reasons = explain(op, "cpu")
    assert tuple(reasons) == BACKENDS
    assert reasons["eager"] is None
    assert reasons["reference"] is None
    assert reasons["triton"] is None or isinstance(reasons["triton"], str)
    assert default_backend(op, "cpu") == "eager"


def test_reasons_against_triton(monkeypatch):
    supported = set(kernels.SUPPORTED)
    for op, file in FILES.items():
        if file not in supported:
            assert explain(op, "cuda")["triton"] == f"this version has no Triton kernel for {op}"
    monkeypatch.setattr(kernels, "SUPPORTED", dict.fromkeys(FILES.values(), 256))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    find = dispatch.importlib.util.find_spec
    monkeypatch.setattr(dispatch, "_found", {})
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert explain("glu", "cuda")["triton"] == "Triton is not installed"
    monkeypatch.setattr(dispatch, "_found", {False: None, True: None})
    assert explain("glu", "cuda")["triton"] is None
    assert default_backend("glu", "cuda") == "triton"
    assert "fp64" in explain("glu", "cuda", torch.float64)["triton"]
    assert default_backend("glu", "cuda", torch.float64) == "eager"
    assert "TRITON_INTERPRET=1" in explain("glu", "cpu")["triton"]
    assert "'mps'" in explain("glu", "mps")["triton"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert explain("glu", "cpu")["triton"] is None
    assert default_backend("glu", "cpu") == "eager"  # interpreting is for tests: nobody gets it unasked


@pytest.mark.parametrize(
    ("triton", "numpy", "compiles", "interprets"),
    [
        ("3.4.0", "2.3.5", "need Triton 3.5 or newer, not 3.4.0", "need Triton 3.5 or newer, not 3.4.0"),
        ("2.10.1", "1.26.4", "not 2.10.1", "not 2.10.1"),
        ("3.5.1", "2.3.5", None, None),
        ("3.6.0+git1a2b3c", "2.4.0", None, r"3.6.0\+git1a2b3c interprets with NumPy before 2.4, not 2.4.0"),
        ("3.7.0", "2.4.6", None, None),
        ("3.10.0", "3.0.0", None, None),
        ("4.0.0", "2.4.0", None, None),
    ],
)
def test_versions_that_cannot_run_the_kernels_are_named(monkeypatch, triton, numpy, compiles, interprets):
    """Found before anything is compiled, by its version and the one that is needed; looked at once."""
    modules = pytest.importorskip("triton"), pytest.importorskip("numpy")
    looks = []
    look = dispatch._look_at_triton
    monkeypatch.setattr(dispatch, "_look_at_triton", lambda interpreting: looks.append(1) or look(interpreting))
    for interpret, device, reason in (("0", "cuda", compiles), ("1", "cpu", interprets)):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setattr(dispatch, "_found", {})
        with monkeypatch.context() as patch:
            for module, version in zip(modules, (triton, numpy), strict=True):
                patch.setattr(module, "__version__", version)
            found = explain("attention", device)["triton"]
            assert found == explain("glu", device)["triton"]
        assert default_backend("attention", "cuda") == ("triton" if reason is None else "eager")
        if reason is None:
            assert found is None
            continue
        with pytest.raises(RuntimeError, match=f'glu: backend="triton" cannot run this call: .*{reason}'):
            flashgau.glu(torch.ones(2, 4), backend="triton")
    assert len(looks) == 2


@pytest.mark.parametrize("request_by", ["argument", "block", "environment"])
def test_a_request_is_never_silently_replaced(monkeypatch, request_by):
    monkeypatch.setattr(kernels, "SUPPORTED", frozenset())
    reason = "cannot run this call: this version has no Triton kernel for glu"
    x = torch.ones(2, 4)
    if request_by == "argument":
        with pytest.raises(RuntimeError, match=f'glu: backend="triton" {reason}'):
            flashgau.glu(x, backend="triton")
    elif request_by == "block":
        with use_backend("triton"), pytest.raises(RuntimeError, match=rf'glu: use_backend\("triton"\) {reason}'):
            flashgau.glu(x)
    else:
        monkeypatch.setenv("FLASHGAU_BACKEND", "triton")
        with pytest.raises(RuntimeError, match=f"glu: FLASHGAU_BACKEND=triton {reason}"):
            flashgau.glu(x)


@pytest.mark.parametrize(("shared", "runs"), [(65_536, False), (101_376, True)])
def test_fp32_heads_that_do_not_fit_a_small_gpu_go_to_eager(monkeypatch, shared, runs):
    properties = mock.Mock(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for width, dtype, small in ((256, torch.float32, True), (128, torch.float32, False), (256, torch.float16, False)):
        name = default_backend("attention", "cuda", dtype, width)
        assert name == ("triton" if runs or not small else "eager")


@pytest.mark.parametrize("file", sorted(kernels.SUPPORTED.keys() - {"norms", "rank_form"}))  # eager's are PyTorch's
def test_floors_have_the_same_functions_with_the_same_arguments(file):
    """But for how kernels are launched, and for keys in pages, which only kernels read where they are."""
    pytest.importorskip("triton")
    floors = [importlib.import_module(f"flashgau.{floor}.{file}") for floor in ("eager", "kernels")]
    names = [
        f"{op}_{way}" for op in (*dispatch.FILES, "projection", "gated_projection") for way in ("forward", "backward")
    ] + ["mixed_chunk_step_"]
    found = [name for name in names if all(hasattr(floor, name) for floor in floors)]
    assert found
    assert [name for name in names if any(hasattr(floor, name) for floor in floors)] == found
    for name in found:
        eager, launcher = (list(inspect.signature(getattr(floor, name)).parameters) for floor in floors)
        assert [x for x in launcher if x not in ("config", "fused", "pages")] == eager, name
        assert len(launcher) <= 9, name

"""The backends that run here, what each computes, and how they are made to cut small inputs into many blocks."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashgau
from flashgau import tables
from flashgau.eager.sizes import SIZES, sized
from flashgau.ops import autograd, dispatch
from flashgau.tables.config import Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# How the eager floor cuts its work: its own sizes, and the smallest, at which small inputs cross borders.
_SMALLEST = {
    "attention_scores": 1, "attention_widened": 1, "attention_short": 0,
    "gau_scores": 1, "glu_bytes": 64, "gate_bytes": 64, "panel_rows": 4,
    "chunk_elements": 1, "glu_kept_bytes": 0,
}  # fmt: skip
# Gated attention of any width by panels of one block, which Triton takes for wide values only; and all the chunks of
# a sequence in one segment, where otherwise 16 processors leave one chunk to each.
PANELS: dict[tuple[Any, str], Any] = {}
LEAST: dict[tuple[Any, str], Any] = {}  # panels of chunks that are no larger than the values
TINY: dict[tuple[Any, str], Any] = {}  # the smallest blocks that kernels may have, so that few rows cross many borders
if "triton" in [name for name, reason in dispatch.explain("gau_attention", "cpu").items() if reason is None]:
    _gau_kernels = importlib.import_module("flashgau.kernels.gau")
    _gated_kernels = importlib.import_module("flashgau.kernels.gated")
    _mixed_chunk_kernels = importlib.import_module("flashgau.kernels.mixed_chunk")
    PANELS = {
        (_gau_kernels, "_FUSED_WIDTH"): 0,
        (_gau_kernels, "_SHORT"): 0,
        (_gau_kernels, "_PART"): 1,
        (_gated_kernels, "_PANEL_BYTES"): 1,
        (_gated_kernels, "_MOST_BYTES"): 1,
        (_mixed_chunk_kernels, "_FUSED_TILES"): 0,
        (_mixed_chunk_kernels, "processors"): lambda device: 1,
    }
    LEAST = PANELS | {(_mixed_chunk_kernels, "_PANEL_BYTES"): 0}

    def _smallest(kernel: str, *args: Any, **traits: Any) -> Config:
        """Of chunks more queries than keys, where both need not be as many."""
        return Config(32 if kernel.startswith("mixed_chunk") else 16, 16, block_k=16)

    TINY = {
        (tables, "choose"): _smallest,
        (importlib.import_module("flashgau.kernels.attention"), "processors"): lambda device: 4,
    }
_OWN_SIZES = {name: getattr(SIZES, name) for name in _SMALLEST}


@contextmanager
def blocks(sizes: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Let launchers cut their work into blocks of these sizes."""
    with ExitStack() as stack:
        for (module, name), size in sizes.items():
            stack.enter_context(mock.patch.object(module, name, size))
        yield


def small_blocks() -> Any:
    """The eager floor with its smallest blocks."""
    return sized(**_SMALLEST)


def backends_of(op: str) -> list[str]:
    """The optimised backends that can run an operation here."""
    return [name for name, reason in dispatch.explain(op, "cpu").items() if reason is None and name != "reference"]


def backend_fixture(op: str) -> Any:
    """A fixture over the optimised backends of an operation; eager also with its smallest blocks."""

    params = [*backends_of(op), "eager, small blocks"]
    if "triton" in params and op in ("gau_attention", "mixed_chunk_attention"):
        params.append("triton, panels")

    @pytest.fixture(params=params)
    def backend(request: pytest.FixtureRequest) -> Iterator[str]:
        name, *small = request.param.split(", ")
        sizes = sized(**_SMALLEST if small and name == "eager" else _OWN_SIZES)
        with flashgau.use_backend(name), sizes, blocks(PANELS if small and name == "triton" else {}):
            yield name

    return backend


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """What the backend computes here. Not every version of Triton interprets bf16; no kernel takes fp64."""
    halves = (torch.bfloat16, torch.float16) if dispatch.interprets_bf16() else (torch.float16,)
    return (torch.float32, *halves) if backend == "triton" else DTYPES


def needs(backend: str, dtype: torch.dtype) -> None:
    """Skip the test where the backend does not take the dtype."""
    if dtype not in dtypes_of(backend):
        pytest.skip(f"no {dtype} on this backend")


@contextmanager
def largest_storages() -> Iterator[list[int]]:
    """Collect the bytes of every tensor that a backend makes; views count as what they look into."""
    found: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    found.append(x.untyped_storage().nbytes())
            return result

    def watched(*args: Any, **kwargs: Any) -> Any:
        with Watch():
            return run(*args, **kwargs)

    run = autograd.run
    with mock.patch.object(autograd, "run", watched), sized(**_OWN_SIZES):
        yield found


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """PyTorch fills what it allocates without a value: an element that nobody writes shows in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

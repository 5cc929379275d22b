"""Which implementation runs a call: `triton`, `eager` or `reference`."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from flashgau import kernels, reference
from flashgau.eager import attention as eager_attention
from flashgau.eager import flash_unit as eager_flash_unit
from flashgau.eager import gau as eager_gau
from flashgau.eager import glu as eager_glu
from flashgau.eager import mixed_chunk as eager_mixed_chunk
from flashgau.eager import norms as eager_norms
from flashgau.eager import projection as eager_projection
from flashgau.eager import tangents as eager_tangents

BACKENDS = ("triton", "eager", "reference")
_CPU = torch.device("cpu")

# Each public operation and the file, on every floor, that implements it.
FILES = {
    "attention": "attention",
    "glu": "glu",
    "glu_linear": "glu",
    "gau_attention": "gau",
    "mixed_chunk_attention": "mixed_chunk",
    "mixed_chunk_step": "mixed_chunk",
}

# Fused pieces of layers, which no caller asks a backend for.
_INNER = {"projection": "projection", "flash_unit": "flash_unit", "norm": "norms", "rank_form": "rank_form",
          "tangents": "tangents"}  # fmt: skip


# The floors' files by name: the reference is one module for all. Loaded here and not at the first call, which
# torch.compile may be tracing: it does not trace an import.
_FLOORS: dict[str, dict[str, ModuleType]] = {
    "reference": dict.fromkeys((*FILES.values(), "norms"), reference),
    "eager": {
        "attention": eager_attention,
        "flash_unit": eager_flash_unit,
        "gau": eager_gau,
        "glu": eager_glu,
        "mixed_chunk": eager_mixed_chunk,
        "norms": eager_norms,
        "projection": eager_projection,
        "tangents": eager_tangents,
    },
}


def _floor(backend: str) -> dict[str, ModuleType]:
    if backend == "triton" and backend not in _FLOORS:  # which nobody wants to load who has no use for it
        from flashgau.kernels import (
            attention,
            flash_unit,
            gau,
            glu,
            mixed_chunk,
            norms,
            projection,
            rank_form,
            tangents,
        )

        _FLOORS[backend] = {
            "attention": attention,
            "flash_unit": flash_unit,
            "gau": gau,
            "glu": glu,
            "mixed_chunk": mixed_chunk,
            "norms": norms,
            "projection": projection,
            "rank_form": rank_form,
            "tangents": tangents,
        }
    return _FLOORS[backend]


class _Selected(threading.local):
    """The backends that were asked for in this thread. (torch.compile can read and guard this.)"""

    name: str | None = None  # by `use_backend`
    inner: str | None = None  # by `use_backend_in_layers`


_selected = _Selected()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every flashgau operation inside the `with` block on one backend.

    The choice holds for the current thread, nests, and yields to an explicit `backend=` argument. It is a
    request, honoured or refused: with `"triton"` an operation that cannot run there raises RuntimeError. The
    environment variable `FLASHGAU_BACKEND` makes the same request for the whole process.

    Args:
        name: `"triton"`, `"eager"` or `"reference"`.

    Raises:
        ValueError: if `name` is none of these.

    Example:
        >>> import torch, flashgau
        >>> with flashgau.use_backend("reference"):
        ...     y = flashgau.glu(torch.ones(2, 4), torch.ones(2, 4), activation="relu")
    """
    outer, _selected.name = _selected.name, _known("use_backend", "name", name)
    try:
        yield
    finally:
        _selected.name = outer


@contextmanager
def use_backend_in_layers(name: str) -> Iterator[None]:
    """Run the pieces of layers, which no caller asks a backend for, on this one, whatever is best. For verification."""
    outer, _selected.inner = _selected.inner, name
    try:
        yield
    finally:
        _selected.inner = outer


def explain(
    op: str, device: torch.device | str, dtype: torch.dtype = torch.float32, width: int = 0
) -> dict[str, str | None]:
    """For each backend, None if it can run `op` on such tensors, with heads of this width, else why it cannot."""
    return {"triton": _why_not_triton(op, torch.device(device), dtype, width), "eager": None, "reference": None}


def default_backend(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32, width: int = 0) -> str:
    """The backend that runs `op` when nobody asks for one: Triton on a GPU that it drives, else eager."""
    device = torch.device(device)
    if device == _CPU or device.type == "cpu":  # the first is enough for most, and a fraction of the second's time
        return "eager"
    return "triton" if _why_not_triton(op, device, dtype, width) is None else "eager"


def resolve(
    op: str,
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    width: int = 0,
    caller: str | None = None,
) -> str:
    """The backend for this call; a request that cannot be met is refused with the reason, in the caller's name."""
    if requested is not None:
        name, source = _known(caller or op, "backend", requested), f'backend="{requested}"'
    elif (chosen := _selected.name) is not None:
        name, source = chosen, f'use_backend("{chosen}")'
    elif (chosen := os.environ.get("FLASHGAU_BACKEND")) is not None:
        name, source = _known(caller or op, "FLASHGAU_BACKEND", chosen), f"FLASHGAU_BACKEND={chosen}"
    else:
        return default_backend(op, device, dtype, width)
    reason = _why_not_triton(op, device, dtype, width) if name == "triton" else None  # the others always can
    if reason is not None:
        raise RuntimeError(f"{caller or op}: {source} cannot run this call: {reason}")
    return name


def resolve_inner(op: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> str:
    """The backend for a piece of a layer: a request for the reference is honoured, else the best that can run."""
    if _selected.inner is not None:
        return _selected.inner
    requested = _selected.name or os.environ.get("FLASHGAU_BACKEND")
    return "reference" if requested == "reference" else default_backend(op, device, dtype, width)


def implementation(op: str, backend: str, function: str) -> Any:
    """The function of that name in the backend's file for `op`."""
    return getattr(_floor(backend)[_file(op)], function)


def _file(op: str) -> str:
    return FILES.get(op) or _INNER[op]


def _known(op: str, argument: str, name: object) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{op}: `{argument}` is {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return str(name)


def _why_not_triton(op: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    if _file(op) not in kernels.SUPPORTED:
        return f"this version has no Triton kernel for {op}"
    interpreting = kernels.interpreting()
    if unfit := unfit_triton(interpreting):
        return unfit
    if dtype == torch.float64:
        return "the Triton kernels take fp16, bf16 and fp32, not fp64"
    widest = kernels.SUPPORTED[_file(op)]
    if widest is not None and width > widest:
        return f"its kernels take widths of up to {widest}, not {width}"
    if (
        op in FILES
        and width > 128
        and dtype == torch.float32
        and device.type == "cuda"
        and _shared_bytes(device) <= 65_536
    ):
        return "in fp32 heads wider than 128 do not fit this GPU's shared memory"
    if device.type == "cpu" and not interpreting:
        executed = kernels.executed.target is not None
        return None if executed else "the tensors are on the CPU, and TRITON_INTERPRET=1 was not set"
    if device.type == "cpu" and dtype == torch.bfloat16 and not interprets_bf16():
        return kernels.NO_INTERPRETED_BF16
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"Triton does not drive devices of type {device.type!r}"
    return None


# The first Triton that compiles the kernels, the first that interprets with any NumPy, and the NumPy others cannot take
_OLDEST, _ANY_NUMPY, _NEW_NUMPY = (3, 5), (3, 7), (2, 4)
_bf16: bool | None = None
_found: dict[bool, str | None] = {}  # by `interpreting`; not a cache of functools, at which torch.compile warns


def unfit_triton(interpreting: bool) -> str | None:
    """Why the installed Triton cannot compile, or interpret, any kernel; None if it can. Found once in a process."""
    if interpreting not in _found:
        _found[interpreting] = _look_at_triton(interpreting)
    return _found[interpreting]


def interprets_bf16() -> bool:
    """Whether Triton's interpreter could be made to multiply bf16. Found once in a process."""
    global _bf16
    if _bf16 is None:
        from flashgau.kernels.interpreted import mend

        _bf16 = mend()
    return _bf16


def _look_at_triton(interpreting: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import numpy as np
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if _version(triton) < _OLDEST:
        return f"the kernels need Triton 3.5 or newer, not {triton.__version__}"
    if interpreting and _version(triton) < _ANY_NUMPY and _version(np) >= _NEW_NUMPY:
        return (
            f"Triton {triton.__version__} interprets with NumPy before 2.4, not {np.__version__} "
            "(from Triton 3.7 on with any)"
        )
    return None


def _version(package: Any) -> tuple[int, ...]:
    """The first two numbers of a version such as 3.5.0+git1a2b."""
    return tuple(int(number) for number in package.__version__.split(".")[:2])


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take on an NVIDIA GPU; AMD's, of any size, has kernels that fit it."""
    if torch.version.hip or not torch.cuda.is_available():
        return 2**20
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch's stubs lack the field
    return int(properties.shared_memory_per_block_optin)

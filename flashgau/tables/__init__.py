"""How kernels are launched: the only place that decides a configuration. Nothing is measured during a call.

Who decides, the first that has an entry: the user's table, which `flashgau tune` measures; the table shipped for this
GPU by its name; the table of its architecture, which has one for every kernel. A GPU that nobody knows gets that of the
largest architecture whose shared memory it has, in which everything fits.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashgau.files import parse_json, read_text

from . import products, table
from .config import Choose, Config
from .table import FUSED, Key, Table

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "interpreter")
_SHIPPED = Path(__file__).parent
FEW_ROWS = 16  # that fit one matrix instruction: a decoded token of a few heads


def choose(kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False) -> Config:
    """The configuration of a kernel for a tensor's device and dtype: after the first time, one look into a dictionary.

    Args:
        kernel: the launcher's name for it, such as "attention_dq".
        x: the call's first tensor.
        width: the widest head, a power of two; 0 for a kernel without heads.
        rows: rows of queries per key head, or of a product, where the kernel distinguishes few of them from many.
        options: whether the scores go through more than a scale and a mask, which takes registers and shared memory.

    Returns:
        The entry of the user's table, else of the GPU's, else of its architecture's. Of a kernel of the user's own,
        which no architecture has: that of the least width that is not below this one; few rows, or options, have the
        entry of any if they have none of their own.

    Raises:
        ValueError: for a kernel, or a width, that no table has.

    Example:
        >>> import torch
        >>> choose("attention_forward", torch.empty(1, 1, 5, 64), 64).block_m
        64
    """
    return _chosen(x.device, kernel, x.element_size(), width, rows is not None and rows <= FEW_ROWS, options)


@cache
def _chosen(device: torch.device, kernel: str, itemsize: int, width: int, few_rows: bool, options: bool) -> Config:
    return chosen(device, key_for(device, Key(kernel, itemsize, width, few_rows, options)))


def chosen(device: torch.device, key: Key) -> Config:
    """What `choose` gives for a key, whose width is that of a class."""
    if key.kernel not in shipped_kernels():
        return _of_users_kernel(device, key)
    own = user_table(device)
    return (own and own.config(key)) or shipped_config(device, key)


def key_for(device: torch.device, key: Key) -> Key:
    """Where a table has the entry of such a call: the width becomes that of a class.

    A kernel of the user's own has a class for every power of two.

    Raises:
        ValueError: for a width that is larger than what the kernel has.
    """
    return key_in(architecture(device), key)


def key_in(arch: str, key: Key) -> Key:
    """The same, of the tables of an architecture."""
    if key.kernel in shipped_kernels():
        return key._replace(width=_class(arch, key.kernel, key.itemsize, key.width, key.few_rows))
    return key._replace(width=1 << (key.width - 1).bit_length() if key.width else 0)


@cache
def shipped_kernels() -> frozenset[str]:
    """The kernels of this package, by the names that launchers ask for; all others are a user's own."""
    return frozenset(key.kernel for key in shipped_table("interpreter").entries) | {FUSED}


def _of_users_kernel(device: torch.device, key: Key) -> Config:
    """The nearest entry that serves: what was measured for many rows serves few, and so with options."""
    found = []
    for place, own in enumerate(measured_tables(device)):
        for other in own.entries:
            fits = (other.kernel, other.itemsize) == key[:2] and other.width >= key.width
            if fits and other.few_rows <= key.few_rows and other.options <= key.options:
                traits = other.few_rows != key.few_rows, other.options != key.options
                found.append((traits, other.width, place, own.config(other)))
    config = min(found, key=lambda item: item[:3])[3] if found else None
    if config is None:
        raise ValueError(
            f"tuning: {key}; expected a kernel of the table of {architecture(device)}, or one of yours that is in "
            f"{user_path(device)}, where flashgau.tuning.search(launcher, args, reference=..., "
            f"kernel={key.kernel!r}) puts it"
        )
    return config


def shipped_config(device: torch.device, key: Key) -> Config:
    """What a user without a table gets."""
    measured = gpu_table(device)
    rows = FEW_ROWS if key.few_rows else None
    return (measured and measured.config(key)) or lookup(architecture(device), *key[:3], rows, key.options)


def lookup(arch: str, kernel: str, itemsize: int, width: int, rows: int | None = None, options: bool = False) -> Config:
    """The entry of one architecture's table, for the head dimension's class: up to 64, 128 or 256.

    With `options` the entry for these; if there is none that of the next wider class, without a pipeline.

    Raises:
        ValueError: for a kernel, or a width, that the table does not have.
    """
    few_rows = rows is not None and rows <= FEW_ROWS
    widths = _widths(arch, kernel, itemsize, few_rows)
    place = widths.index(_class(arch, kernel, itemsize, width, few_rows))
    if options and (own := shipped_table(arch).config(Key(kernel, itemsize, widths[place], few_rows, True))):
        return own
    by_width = [shipped_table(arch).config(Key(kernel, itemsize, w, few_rows)) for w in widths]
    config = by_width[min(place + options, len(widths) - 1)]
    assert config is not None
    if not options:
        return config
    if place == len(widths) - 1:
        config = replace(config, block_m=min(config.block_m, 32), block_n=min(config.block_n, 32))
    return replace(config, num_stages=1, asynchronous=False)


def of_architecture(arch: str) -> Choose:
    """As `choose` does, but from one architecture's table, wherever the tensors are."""

    def choose(kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False) -> Config:
        return lookup(arch, kernel, x.element_size(), width, rows, options)

    return choose


def _class(arch: str, kernel: str, itemsize: int, width: int, few_rows: bool) -> int:
    """The class of a width: the least that is not below it."""
    widths = _widths(arch, kernel, itemsize, few_rows)
    if not widths or width > widths[-1]:
        raise ValueError(f"tuning: {Key(kernel, itemsize, width, few_rows)}; expected a kernel of the table of {arch}")
    return next(w for w in widths if width <= w)


@cache
def _widths(arch: str, kernel: str, itemsize: int, few_rows: bool) -> list[int]:
    """The classes of widths that a kernel has entries for."""
    wanted = kernel, itemsize, few_rows
    return sorted(
        key.width
        for key in shipped_table(arch).entries
        if (key.kernel, key.itemsize, key.few_rows) == wanted and not key.options
    )


def fuses_glu_linear(x: Tensor, w_gate: Tensor, activations: Sequence[str] = ("silu", "identity")) -> bool:
    """Whether one kernel that makes both sides of a gated linear unit beats the vendor's products and the unit after.

    Inside `configured` what that was given decides, if anything. Else, where a table has a measurement for the inner
    axis K (rounded up to a power of two) and dtype, that. Else, up to 16 rows, yes: reading the weights is all the
    work, and one kernel reads them both. Else a model of both forms on this GPU (`flashgau.tables.products`), in half
    precision; in IEEE fp32 arithmetic is so slow that there is nothing to spare, and of GPUs that the model does not
    know, nothing is known to be gained.

    On a CPU this is a question for interpreted kernels only, which are taken to be on an H100: the eager backend has
    one form, the unit in panels after whole products.
    """
    if _configured.fuse_glu_linear is not None:
        return _configured.fuse_glu_linear
    m, (n, k) = math.prod(x.shape[:-1]), w_gate.shape
    few_rows = m <= FEW_ROWS
    measured = _fusing_measured(x.device, x.element_size(), 1 << max(0, k - 1).bit_length(), few_rows)
    if measured is not None:
        return measured
    gpu = _modelled(x.device)
    if few_rows or gpu is None or x.element_size() != 2:
        return few_rows
    arch = architecture(x.device)
    tile = lookup("sm_90", "glu_linear", 2, 0) if arch == "interpreter" else choose("glu_linear", x, 0, rows=m)
    return products.fused(gpu, tile, m, k, n, activations) <= products.library(gpu, m, k, n)


@cache
def _modelled(device: torch.device) -> products.Gpu | None:
    """The numbers of a GPU's architecture, with its own processors and memory where they are known."""
    gpu = products.GPUS.get(architecture(device))
    if gpu is None or device.type != "cuda":
        return gpu
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return gpu._replace(processors=count, memory=products.MEMORY.get(gpu_name(device), gpu.memory))


@cache
def _fusing_measured(device: torch.device, itemsize: int, k: int, few_rows: bool) -> bool | None:
    for own in measured_tables(device):
        entry = own.entries.get(Key(FUSED, itemsize, k, few_rows))
        if entry is not None:
            return bool(entry.choice)
    return None


# ---- another choice


class _Configured(NamedTuple):
    """What `configured` was given; None where the tables decide."""

    choose: Choose | None = None
    fuse_glu_linear: bool | None = None


# One for all threads, not a context variable nor a thread's own: on a GPU autograd runs the backward in a thread of
# its own, and a forward inside `configured` shall have its backward there, too.
_configured = _Configured()


@contextmanager
def configured(choose: Choose | None = None, *, fuse_glu_linear: bool | None = None) -> Iterator[None]:
    """Inside the block, in every thread, kernels that are given no configuration have that of `choose`.

    Args:
        choose: called as the function `choose` of this package is; None leaves what is in force.
        fuse_glu_linear: what `fuses_glu_linear` answers; None leaves that, too.

    Example:
        >>> import torch
        >>> with configured(lambda kernel, x, width, **traits: Config(block_m=32, block_n=16)):
        ...     in_force()("attention_forward", torch.empty(1, 1, 5, 64), 64).block_m
        32
    """
    global _configured
    outer = _configured
    _configured = _Configured(
        outer.choose if choose is None else choose,
        outer.fuse_glu_linear if fuse_glu_linear is None else fuse_glu_linear,
    )
    try:
        yield
    finally:
        _configured = outer


def in_force() -> Choose:
    """Who configures kernels that are given no configuration: `configured`'s, else `choose`, which reads the tables."""
    return _configured.choose or choose


# ---- tables


def measured_tables(device: torch.device) -> list[Table]:
    """What was measured on a device: the user's table, then the shipped one, as far as they can be used."""
    return [found for found in (user_table(device), gpu_table(device)) if found is not None]


def user_table(device: torch.device) -> Table | None:
    """The table that the user measured on such a device."""
    return _of_device(user_path(device), device)


def gpu_table(device: torch.device) -> Table | None:
    """The table that is shipped for such a device."""
    return _of_device(_SHIPPED / "gpus" / table.file_name(gpu_name(device)), device)


def _of_device(path: Path, device: torch.device) -> Table | None:
    found = table.usable(path)
    return found if found is not None and found.gpu == gpu_name(device) else None


@cache
def shipped_table(arch: str) -> Table:
    """The table of one of `ARCHITECTURES`, which has every kernel."""
    return table.of_json(_architectures()[arch], f"{arch} of architectures.json")


@cache
def _architectures() -> dict[str, Any]:
    """Each as JSON has a table. The file has a row for each key, and in it every architecture's configuration."""
    path = Path(__file__).with_name("architectures.json")
    read = parse_json(read_text(path), str(path))
    found: dict[str, Any] = {
        arch: {"format": table.FORMAT, "gpu": None, "architecture": arch, "measured": False, "entries": []}
        for arch in read["architectures"]
    }
    for row in read["rows"]:
        key = dict(zip(read["key"], row, strict=False))
        for arch, values in zip(found, row[len(key) :], strict=True):
            if values is not None:  # which are as many as differ from the defaults
                found[arch]["entries"].append({**key, "config": dict(zip(read["config"], values, strict=False))})
    return found


def shipped_gpus() -> list[Table]:
    """The tables that were measured on one GPU and contributed."""
    return [table.read(path) for path in sorted((_SHIPPED / "gpus").glob("*.json"))]


def user_path(device: torch.device) -> Path:
    """Where the user's table for a device is, or would be: a file of its name in a folder of the user's data.

    The variable FLASHGAU_TUNING names another folder.
    """
    return user_path_of(gpu_name(device))


def user_path_of(gpu: str) -> Path:
    """The same, of a GPU by its name."""
    name = table.file_name(gpu)
    if folder := os.environ.get("FLASHGAU_TUNING"):
        return Path(folder) / name
    return _user_data() / "flashgau" / "tuning" / name


def _user_data() -> Path:
    """The folder in which programs keep the data of the user, by the custom of the system."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    named = os.environ.get("XDG_DATA_HOME")
    if named and os.path.isabs(named):  # another is to be ignored (XDG Base Directory Specification)
        return Path(named)
    return Path.home() / ("Library/Application Support" if sys.platform == "darwin" else ".local/share")


@cache
def gpu_name(device: torch.device) -> str:
    """What tables call a device; "interpreter" where kernels are interpreted."""
    return "interpreter" if architecture(device) == "interpreter" else torch.cuda.get_device_name(device)


def reload() -> None:
    """Forget what was read, so that the next call reads the tables again."""
    for cached in (_chosen, _fusing_measured, _modelled, _widths, shipped_kernels, shipped_table, gpu_name):
        cached.cache_clear()
    table.usable.cache_clear()


# ---- devices


def architecture(device: torch.device) -> str:
    """Whose table serves a device: its own, else that of the largest architecture whose shared memory it has."""
    if device.type in ("cpu", "meta"):
        return "interpreter"
    if device.type != "cuda" or torch.version.hip:
        return "gfx942"  # the one with the least shared memory
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch's stubs lack the field
    return table_for(properties.major, properties.shared_memory_per_block_optin)


def table_for(major: int, shared_bytes: int) -> str:
    """The table for an NVIDIA GPU of this major compute capability and shared memory per program."""
    if shared_bytes >= 232_448:
        return "sm_100" if major >= 10 else "sm_90"
    if shared_bytes >= 166_912:
        return "sm_80"
    return "sm_86" if shared_bytes >= 101_376 else "sm_75"

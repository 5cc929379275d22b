"""How kernels are launched: the only place that decides a configuration. Nothing is measured during a call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashgau.kernels.common import Config

from .tables import TABLES

_FEW_ROWS = 16  # that fit one matrix instruction: a decoded token of a few heads
_PRODUCT_SPEED = 0.8  # of a Triton product, as a part of the vendor's library's: an assumption until it is measured


def choose(kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False) -> Config:
    """The configuration of a kernel for a tensor's device and dtype.

    Args:
        kernel: the launcher's name for it, such as "attention_dq".
        x: the call's first tensor.
        width: the widest head, a power of two; 0 for a kernel without heads.
        rows: rows of queries per key head, or of a product, where the kernel distinguishes few of them from many.
        options: whether the scores go through more than a scale and a mask, which takes registers and shared memory.

    Returns:
        The entry of the table for the device's architecture.
    """
    return lookup(architecture(x.device), kernel, x.element_size(), width, rows, options)


def lookup(arch: str, kernel: str, itemsize: int, width: int, rows: int | None = None, options: bool = False) -> Config:
    """The entry of one architecture's table, for the head dimension's class: up to 64, 128 or 256.

    With `options` that of the next wider class, without a pipeline.
    """
    if rows is not None and rows <= _FEW_ROWS:
        kernel += "_few_rows"
    by_width = TABLES[arch][kernel][itemsize]
    place = next(i for i, w in enumerate(by_width) if width <= w)
    if not options:
        return list(by_width.values())[place]
    wider = list(by_width.values())[min(place + 1, len(by_width) - 1)]
    if place == len(by_width) - 1:
        wider = replace(wider, block_m=min(wider.block_m, 32), block_n=min(wider.block_n, 32))
    return replace(wider, num_stages=1)


def fuses_glu_linear(x: Tensor, w_gate: Tensor) -> bool:
    """Whether one kernel that makes both sides of a gated linear unit beats the vendor's products and the unit after.

    No GPU has been measured; so a rule decides. The fused form spares three tensors on their way to memory and back,
    which is worth 1 + 276 / K to a product over K (on a GPU that does 184 FLOP while a byte travels); and a Triton
    product is taken to run at 4/5 of the vendor's speed, in half precision. In IEEE fp32 arithmetic is so slow that
    there is nothing to spare. Up to 16 rows reading the weights is all the work, and one kernel reads them both.
    """
    k = w_gate.shape[1]
    rows = math.prod(x.shape[:-1])
    return rows <= _FEW_ROWS or (x.element_size() == 2 and _PRODUCT_SPEED * (1 + 276 / max(1, k)) >= 1)


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
    return "sm_86" if shared_bytes >= 101_376 else "gfx942"

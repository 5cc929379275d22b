"""Matrix instructions: which thread holds which element, and products with fp32 sums.

Warps are the rows of arrays (warps, 32). Source of the layouts: PTX ISA 8.7, sections 9.7.14 (mma, ldmatrix, stmatrix)
and 9.7.15 (wgmma, its descriptors and swizzles).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .memory import SHARED_BASE
from .numbers import Array, widened

_TF32 = np.uint32(0xFFFFE000)  # the bits of fp32 that tf32 has
_LANE = np.arange(32)
_ROW, _PAIR = _LANE // 4, 2 * (_LANE % 4)  # of the first element that a thread holds of an 8 x 8 tile


def product(a: Array, b: Array, c: Array, descending: bool | None) -> Array:
    """a b + c of fp32 matrices, batched; each product is exact in fp32 for halves and tf32.

    The order of the sums is numpy's, or from the first or last column on, each sum rounded to fp32.
    """
    if descending is None:
        return np.matmul(a, b) + c
    columns = range(a.shape[-1])
    for i in reversed(columns) if descending else columns:
        c = c + a[..., :, i, None] * b[..., None, i, :]
    return c


def halves_of(registers: list[Array], kind: str) -> list[Array]:
    """fp32 of the lower, then the upper half of each 32-bit register."""
    found = []
    for register in registers:
        found.append(widened(register.astype(np.uint16), kind))
        found.append(widened((register >> np.uint32(16)).astype(np.uint16), kind))
    return found


def _tiled(values: list[Array], rows: int, columns: int, row: list[Array], column: list[Array]) -> Array:
    """Matrices (warps, rows, columns) of what threads hold: value i of a thread stands at row[i], column[i]."""
    matrix = np.empty((len(values[0]), rows, columns), np.float32)
    for value, r, c in zip(values, row, column, strict=True):
        matrix[:, r, c] = value
    return matrix


_A16 = ([_ROW, _ROW, _ROW + 8, _ROW + 8] * 2, [_PAIR, _PAIR + 1] * 2 + [_PAIR + 8, _PAIR + 9] * 2)
_B16 = ([_PAIR, _PAIR + 1, _PAIR + 8, _PAIR + 9], [_ROW] * 4)
_C = ([_ROW, _ROW, _ROW + 8, _ROW + 8], [_PAIR, _PAIR + 1] * 2)
_A8 = ([_ROW, _ROW + 8] * 2, [_LANE % 4] * 2 + [_LANE % 4 + 4] * 2)
_B8 = ([_LANE % 4, _LANE % 4 + 4], [_ROW] * 2)


def mma(a: list[Array], b: list[Array], c: list[Array], kind: str, descending: bool | None) -> list[Array]:
    """mma.m16n8k16 of halves or m16n8k8 of tf32, on registers (warps, 32) of 32 bits; the results are fp32's bits."""
    if kind == "tf32":
        cut = [[(x & _TF32).view(np.float32) for x in y] for y in (a, b)]
        left, right = _tiled(cut[0], 16, 8, *_A8), _tiled(cut[1], 8, 8, *_B8)
    else:
        left, right = _tiled(halves_of(a, kind), 16, 16, *_A16), _tiled(halves_of(b, kind), 16, 8, *_B16)
    total = product(left, right, _tiled([x.view(np.float32) for x in c], 16, 8, *_C), descending)
    return [np.ascontiguousarray(total[:, r, k]).view(np.uint32) for r, k in zip(*_C, strict=True)]


# ---- ldmatrix and stmatrix ----


def matrix_rows(address: Array, count: int) -> list[Array]:
    """Where the row that a thread takes part in lies, for each of `count` 8 x 8 matrices: (warps, 32) of addresses."""
    return [address[:, 8 * i + _ROW] for i in range(count)]


def from_rows(words: Array, trans: bool) -> Array:
    """What threads get of 8 x 8 matrices of 16 bits (warps, 8, 8): two neighbours in a row, or in a column."""
    first, second = (
        (words[:, _PAIR, _ROW], words[:, _PAIR + 1, _ROW])
        if trans
        else (words[:, _ROW, _PAIR], words[:, _ROW, _PAIR + 1])
    )
    return first.astype(np.uint32) | (second.astype(np.uint32) << np.uint32(16))


def to_rows(register: Array, trans: bool) -> Array:
    """The reverse: matrices (warps, 8, 8) of what threads hold."""
    words = np.empty((len(register), 8, 8), np.uint16)
    low, high = register.astype(np.uint16), (register >> np.uint32(16)).astype(np.uint16)
    if trans:
        words[:, _PAIR, _ROW], words[:, _PAIR + 1, _ROW] = low, high
    else:
        words[:, _ROW, _PAIR], words[:, _ROW, _PAIR + 1] = low, high
    return words


# ---- wgmma ----

_WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes that are swizzled together, by the descriptor's field


@lru_cache(maxsize=256)
def _places(length: int, leading: int, stride: int, swizzle: int, transposed: bool, size: int) -> Array:
    """Byte offsets (length, 32 / size) of a tile of elements of `size` bytes from its start, before the swizzle."""
    mn, k = np.arange(length)[:, None], np.arange(32 // size)[None, :]
    width = _WIDTHS[swizzle]
    if not transposed:
        if swizzle == 0:
            return (mn // 8) * stride + (k * size // 16) * leading + (mn % 8) * 16 + k * size % 16
        return (mn // 8) * stride + (mn % 8) * width + k * size
    across = width // 2
    if swizzle == 0:
        leading, stride = stride, leading
    return (mn // across) * leading + (mn % across) * 2 + (k % 8) * width + (k // 8) * stride


def described(descriptor: int, length: int, transposed: bool, kind: str) -> Array:
    """Offsets in a block's shared memory, (length, 16) or of tf32 (length, 8), of the elements of the tile that a
    descriptor describes. Only tiles of halves may be transposed."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    swizzle = (descriptor >> 62) & 3
    address = start + _places(length, leading, stride, swizzle, transposed, 4 if kind == "tf32" else 2)
    if swizzle:
        address = address ^ (((address >> 7) & (_WIDTHS[swizzle] // 16 - 1)) << 4)
    return address - SHARED_BASE


def elements(views: dict[int, Array], offsets: Array, kind: str) -> Array:
    """fp32 of the elements at these offsets; of tf32 the bits that count."""
    if kind == "tf32":
        return (views[4][offsets // 4] & _TF32).view(np.float32)
    return widened(views[2][offsets // 2], kind)


_WARP_ROW = 16 * np.arange(4)[:, None] + _ROW[None, :]  # (4, 32): of the warps of a warpgroup


def group_rows(registers: list[Array], kind: str) -> Array:
    """A of wgmma from registers: (groups, 64, 16), or of tf32 (groups, 64, 8), of (groups, 4, 32)."""
    if kind == "tf32":
        matrix = np.empty((len(registers[0]), 64, 8), np.float32)
        column = np.broadcast_to(_LANE % 4, (4, 32))
        for i, register in enumerate(registers):
            cut = (register & _TF32).view(np.float32)
            matrix[:, _WARP_ROW + 8 * (i % 2), column + 4 * (i // 2)] = cut
        return matrix
    matrix = np.empty((len(registers[0]), 64, 16), np.float32)
    pair = np.broadcast_to(_PAIR, (4, 32))
    for i, value in enumerate(halves_of(registers, kind)):
        row = _WARP_ROW + 8 * ((i // 2) % 2)
        matrix[:, row, pair + i % 2 + 8 * (i // 4)] = value
    return matrix


def group_places(columns: int) -> list[tuple[Array, Array]]:
    """Row and column (4, 32) of each fp32 that a thread of a warpgroup holds of a result of 64 rows."""
    pair = np.broadcast_to(_PAIR, (4, 32))
    return [(_WARP_ROW + 8 * ((i // 2) % 2), pair + i % 2 + 8 * (i // 4)) for i in range(columns // 2)]

"""Launch configurations: architecture -> kernel -> bytes of an element -> widest head -> configuration.

None is measured yet. Each is the first, of a list that begins with what is known to be fast elsewhere, that compiles
for the architecture without spills and within its shared memory (`flashgau compile` holds them to that).
"""

from __future__ import annotations

from flashgau.kernels.common import Config

Table = dict[str, dict[int, dict[int, Config]]]
Blocks = tuple[int, int, int, int]  # rows, keys, warps, stages


def _table(half: dict[str, tuple[Blocks, Blocks, Blocks]], single: dict[str, tuple[Blocks, Blocks, Blocks]]) -> Table:
    """A table from the configurations for heads up to 64, 128 and 256 wide."""
    return {
        f"attention_{kernel}": {
            itemsize: {width: Config(*blocks) for width, blocks in zip((64, 128, 256), rows[kernel], strict=True)}
            for itemsize, rows in ((2, half), (4, single))
        }
        for kernel in half
    }


# IEEE fp32 products run outside the matrix units: their time is arithmetic, and registers are what is short.
_SINGLE: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
    "forward_few_rows": ((16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
    "dq": ((32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1)),
    "dkv": ((32, 32, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1)),
    "dbias": ((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}

_SM_80 = _table(
    {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "forward_few_rows": ((16, 128, 4, 3), (16, 128, 4, 2), (16, 64, 4, 2)),
        "dq": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        "dkv": ((64, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
        "dbias": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    },
    _SINGLE,
)

_SM_86 = _table(
    {
        "forward": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        "forward_few_rows": ((16, 128, 4, 3), (16, 128, 4, 2), (16, 64, 4, 2)),
        "dq": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        "dkv": ((64, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
        "dbias": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    },
    _SINGLE,
)

_SM_90 = _table(
    {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "forward_few_rows": ((16, 128, 4, 3), (16, 128, 4, 2), (16, 64, 4, 2)),
        "dq": ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        "dkv": ((64, 128, 8, 3), (32, 128, 8, 2), (16, 64, 8, 2)),
        "dbias": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    _SINGLE,
)

_SM_100 = _table(
    {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        "forward_few_rows": ((16, 128, 4, 3), (16, 128, 4, 2), (16, 64, 4, 2)),
        "dq": ((128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        "dkv": ((64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 8, 2)),
        "dbias": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    _SINGLE,
)

_GFX942 = _table(
    {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "forward_few_rows": ((16, 128, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
        "dq": ((128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        "dkv": ((32, 64, 4, 2), (32, 64, 8, 1), (16, 64, 8, 2)),
        "dbias": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    },
    _SINGLE,
)

# Triton's interpreter: a block costs much the same whatever its size, and small ones have more borders to get wrong.
_INTERPRETED: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((64, 32, 4, 2),) * 3,
    "forward_few_rows": ((16, 32, 4, 2),) * 3,
    "dq": ((64, 32, 4, 2),) * 3,
    "dkv": ((32, 64, 4, 2),) * 3,
    "dbias": ((64, 64, 4, 2),) * 3,
}

TABLES: dict[str, Table] = {
    "sm_80": _SM_80,
    "sm_86": _SM_86,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "gfx942": _GFX942,
    "interpreter": _table(_INTERPRETED, _INTERPRETED),
}

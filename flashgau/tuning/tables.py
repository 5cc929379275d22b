"""Launch configurations: architecture -> kernel -> bytes of an element -> widest head -> configuration.

None is measured yet. Each is the first, of a list that begins with what is known to be fast elsewhere, that compiles
for the architecture without spills and within its shared memory (`flashgau compile` holds them to that).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

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


def _glu(product: Config, few_rows: Config, single: Config) -> Table:
    """A table for gated linear units and a layer's projection: blocks of the products in half precision and in fp32.

    Where elements travel alone, a thread takes 16 bytes of each tensor at a time.
    """
    few_single = replace(few_rows, block_k=32)
    return {
        "glu_forward": {2: {0: Config(1, 2048, 4, 1)}, 4: {0: Config(1, 1024, 4, 1)}},
        "glu_backward": {2: {0: Config(1, 2048, 4, 1)}, 4: {0: Config(1, 1024, 4, 1)}},
        "projection": {2: {0: Config(1, 2048, 4, 1)}, 4: {0: Config(1, 1024, 4, 1)}},
        "heads": {2: {0: Config(16, 128, 8, 1)}, 4: {0: Config(16, 128, 8, 1)}},
        "glu_linear": {2: {0: product}, 4: {0: single}},
        "glu_linear_few_rows": {2: {0: few_rows}, 4: {0: few_single}},
        "glu_linear_backward": {2: {0: product}, 4: {0: single}},
        "glu_linear_backward_few_rows": {2: {0: few_rows}, 4: {0: few_single}},
    }


_GLU_SINGLE = Config(64, 64, 8, 2, 16)


def _gau(
    product: tuple[Config, Config, Config],
    fused: tuple[Config, Config, Config],
    gradient: tuple[Config, Config, Config],
    dv: Config,
    dq: tuple[Config, Config, Config],
    few_rows: Config,
) -> dict[str, dict[int, Config]]:
    """Entries for gated attention in one type of element, for S up to 64, 128 and 256.

    `block_n` of a product is a tile of the values' columns, and its `block_k` keys; of a gradient its `block_k` are
    columns. Kernels that share a panel share its blocks: the weights those of the product, dV and dQ the gradient's.
    """

    def by_width(configs: Iterable[Config]) -> dict[int, Config]:
        return dict(zip((64, 128, 256), configs, strict=True))

    return {
        "gau_lse": by_width(replace(c, block_n=c.block_k, num_stages=2) for c in fused),
        "gau_weights": by_width(replace(c, block_n=c.block_k, num_stages=1) for c in product),
        "gau_weights_few_rows": by_width((replace(few_rows, block_n=few_rows.block_k, num_stages=1),) * 3),
        "gau_product": by_width(product),
        "gau_product_few_rows": by_width((few_rows,) * 3),
        "gau_fused": by_width(fused),
        "gau_prologue": {0: Config(16, 256, 4, 1)},
        "gau_gradient": by_width(gradient),
        "gau_dv": by_width((dv,) * 3),
        "gau_dq": by_width(dq),
    }


def _two_types(half: dict[str, dict[int, Config]], single: dict[str, dict[int, Config]]) -> Table:
    return {name: {2: half[name], 4: single[name]} for name in half}


_GAU_SINGLE = _gau(
    product=(Config(32, 64, 8, 2, 32),) * 3,
    fused=(Config(32, 64, 8, 1, 32), Config(32, 64, 8, 1, 32), Config(16, 64, 8, 1, 32)),
    gradient=(Config(32, 32, 8, 2, 32),) * 3,
    dv=Config(32, 64, 8, 2),
    dq=(Config(32, 32, 8, 1),) * 3,
    few_rows=Config(16, 64, 4, 2, 32),
)

_GAU_SM_90 = _gau(
    product=(Config(128, 256, 8, 3, 64),) * 3,
    fused=(Config(64, 256, 8, 2, 64),) * 3,
    gradient=(Config(64, 128, 8, 3, 64),) * 3,
    dv=Config(64, 256, 8, 3),
    dq=(Config(64, 128, 8, 2),) * 3,
    few_rows=Config(16, 64, 4, 3, 128),
)

_GAU_SM_80 = _gau(
    product=(Config(128, 128, 8, 3, 64),) * 3,
    fused=(Config(128, 128, 8, 2, 32), Config(128, 128, 8, 2, 32), Config(32, 128, 8, 2, 32)),
    gradient=(Config(64, 128, 8, 3, 64), Config(64, 128, 8, 3, 64), Config(64, 64, 8, 3, 64)),
    dv=Config(64, 128, 8, 3),
    dq=(Config(64, 128, 8, 2), Config(64, 128, 8, 2), Config(64, 64, 8, 2)),
    few_rows=Config(16, 64, 4, 3, 128),
)

_GAU_SM_86 = _gau(
    product=(Config(128, 128, 8, 3, 32),) * 3,
    fused=(Config(64, 128, 8, 2, 32), Config(64, 128, 8, 2, 32), Config(64, 128, 8, 1, 32)),
    gradient=(Config(64, 64, 8, 2, 32),) * 3,
    dv=Config(64, 128, 8, 2),
    dq=(Config(64, 64, 4, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 1)),
    few_rows=Config(16, 64, 4, 2, 64),
)

_GAU_GFX942 = _gau(
    product=(Config(128, 128, 8, 2, 32),) * 3,
    fused=(Config(64, 128, 8, 2, 32), Config(64, 128, 8, 1, 32), Config(32, 128, 8, 1, 32)),
    gradient=(Config(64, 64, 8, 2, 32),) * 3,
    dv=Config(64, 128, 8, 2),
    dq=(Config(64, 64, 8, 1),) * 3,
    few_rows=Config(16, 64, 4, 2, 64),
)

_GAU_INTERPRETED = _gau(
    product=(Config(64, 32, 4, 1, 32),) * 3,
    fused=(Config(64, 32, 4, 1, 64),) * 3,
    gradient=(Config(64, 32, 4, 1, 32),) * 3,
    dv=Config(64, 32, 4, 1),
    dq=(Config(64, 32, 4, 1),) * 3,
    few_rows=Config(16, 32, 4, 1, 32),
)


def _mixed_chunk(**kernels: Config | tuple[Config, Config, Config]) -> dict[str, dict[int, Config]]:
    """Entries for mixed chunk attention in one type of element: one configuration, or three, for S up to 64, 128, 256.

    What a block's m, n and k are of, each kernel's launcher says: tokens, columns of the values (E), or S.
    """
    return {
        f"mixed_chunk_{name}": dict(zip((64, 128, 256), [c] * 3 if isinstance(c, Config) else c, strict=True))
        for name, c in kernels.items()
    }


_MIXED_SINGLE = _mixed_chunk(
    states=Config(32, 64, 8, 2, 16),
    weights=Config(32, 32, 8, 1),
    fused=Config(32, 64, 8, 1, 32),
    product=Config(32, 64, 8, 2, 32),
    gradient=Config(32, 32, 8, 2, 32),
    linear=Config(32, 64, 8, 2, 32),
    heads=Config(32, 32, 8, 1),
    step=Config(1, 32, 8, 1, 16),
)

_MIXED_SM_90 = _mixed_chunk(
    states=Config(128, 128, 8, 3, 64),
    weights=Config(128, 128, 8, 1),
    fused=Config(128, 128, 8, 2, 64),
    product=Config(128, 128, 8, 3, 64),
    gradient=Config(64, 128, 8, 3, 64),
    linear=Config(128, 128, 8, 3, 64),
    heads=(Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
    step=(Config(1, 64, 8, 1, 32), Config(1, 64, 8, 1, 32), Config(1, 32, 8, 1, 32)),
)

# An accumulator lives in a memory of its own there, on its way through which a block of 128 rows spills.
_MIXED_SM_100 = _MIXED_SM_90 | _mixed_chunk(fused=Config(64, 128, 8, 2, 64))

_MIXED_SM_80 = _mixed_chunk(
    states=Config(128, 64, 8, 3, 64),
    weights=Config(64, 128, 8, 1),
    fused=Config(128, 128, 8, 2, 32),
    product=Config(128, 128, 8, 3, 64),
    gradient=(Config(64, 128, 8, 3, 64), Config(64, 128, 8, 3, 64), Config(64, 64, 8, 3, 64)),
    linear=Config(128, 128, 8, 3, 32),
    heads=Config(64, 64, 8, 2),
    step=(Config(1, 64, 8, 1, 32), Config(1, 64, 8, 1, 32), Config(1, 32, 8, 1, 32)),
)

_MIXED_SM_86 = _mixed_chunk(
    states=Config(64, 128, 8, 2, 32),
    weights=Config(64, 64, 8, 1),
    fused=Config(64, 128, 8, 1, 32),
    product=Config(128, 128, 8, 3, 32),
    gradient=Config(64, 64, 8, 2, 32),
    linear=Config(64, 64, 8, 2, 32),
    heads=Config(64, 64, 8, 1),
    step=(Config(1, 64, 8, 1, 32), Config(1, 64, 8, 1, 32), Config(1, 32, 8, 1, 32)),
)

_MIXED_GFX942 = _mixed_chunk(
    states=Config(64, 128, 8, 2, 32),
    weights=Config(64, 64, 8, 1),
    fused=Config(64, 128, 8, 1, 32),
    product=Config(128, 128, 8, 2, 32),
    gradient=Config(64, 64, 8, 2, 32),
    linear=Config(64, 64, 8, 2, 32),
    heads=Config(64, 64, 8, 1),
    step=(Config(1, 64, 8, 1, 32), Config(1, 64, 8, 1, 32), Config(1, 32, 8, 1, 32)),
)

_MIXED_INTERPRETED = _mixed_chunk(
    states=Config(16, 32, 4, 1, 16),
    weights=Config(32, 16, 4, 1),
    fused=Config(16, 32, 4, 1, 32),
    product=Config(32, 32, 4, 1, 16),
    gradient=Config(16, 32, 4, 1, 32),
    linear=Config(32, 16, 4, 1, 32),
    heads=Config(32, 16, 4, 1),
    step=Config(1, 32, 4, 1, 16),
)

TABLES: dict[str, Table] = {
    "sm_80": _SM_80
    | _glu(Config(128, 64, 8, 3, 64), Config(16, 64, 4, 3, 128), _GLU_SINGLE)
    | _two_types(_GAU_SM_80, _GAU_SINGLE)
    | _two_types(_MIXED_SM_80, _MIXED_SINGLE),
    "sm_86": _SM_86
    | _glu(Config(128, 64, 8, 3, 32), Config(16, 32, 4, 3, 128), _GLU_SINGLE)
    | _two_types(_GAU_SM_86, _GAU_SINGLE)
    | _two_types(_MIXED_SM_86, _MIXED_SINGLE),
    "sm_90": _SM_90
    | _glu(Config(128, 64, 8, 3, 64), Config(16, 64, 4, 3, 128), _GLU_SINGLE)
    | _two_types(_GAU_SM_90, _GAU_SINGLE)
    | _two_types(_MIXED_SM_90, _MIXED_SINGLE),
    "sm_100": _SM_100
    | _glu(Config(128, 64, 8, 3, 64), Config(16, 64, 4, 3, 128), _GLU_SINGLE)
    | _two_types(_GAU_SM_90, _GAU_SINGLE)
    | _two_types(_MIXED_SM_100, _MIXED_SINGLE),
    "gfx942": _GFX942
    | _glu(Config(128, 64, 8, 2, 32), Config(16, 64, 4, 2, 128), _GLU_SINGLE)
    | _two_types(_GAU_GFX942, _GAU_SINGLE)
    | _two_types(_MIXED_GFX942, _MIXED_SINGLE),
    "interpreter": _table(_INTERPRETED, _INTERPRETED)
    | _glu(Config(32, 16, 4, 1, 32), Config(16, 32, 4, 1, 16), Config(32, 16, 4, 1, 32))
    | _two_types(_GAU_INTERPRETED, _GAU_INTERPRETED)
    | _two_types(_MIXED_INTERPRETED, _MIXED_INTERPRETED),
}

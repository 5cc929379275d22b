"""Attention, gated linear units, the gated attention unit and FLASH's mixed chunk attention.

Every operation has a Triton kernel or a blocked pure PyTorch form, or both, and a naive reference that defines it.

    >>> import torch, flashgau
    >>> q, k, v = torch.randn(3, 1, 4, 128, 64)
    >>> flashgau.attention(q, k, v, causal=True).shape
    torch.Size([1, 4, 128, 64])
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import convert, distributed, integrations, kernels, models, nn, reference, testing, tuning
    from . import training as training
    from .bias import alibi_bias, rotary_bias, t5_bias
    from .ops.attention import attention
    from .ops.compare import Report, compare
    from .ops.dispatch import use_backend
    from .ops.gau import gau_attention
    from .ops.glu import glu, glu_linear
    from .ops.mixed_chunk import mixed_chunk_attention, mixed_chunk_step
    from .ops.state import MixedChunkState

__version__ = "0.1.0"

__all__ = [
    "MixedChunkState",
    "Report",
    "__version__",
    "alibi_bias",
    "attention",
    "compare",
    "convert",
    "distributed",
    "gau_attention",
    "glu",
    "glu_linear",
    "integrations",
    "kernels",
    "mixed_chunk_attention",
    "mixed_chunk_step",
    "models",
    "nn",
    "reference",
    "rotary_bias",
    "t5_bias",
    "testing",
    "tuning",
    "use_backend",
]

_SUBMODULES = (
    "convert",
    "distributed",
    "integrations",
    "kernels",
    "models",
    "nn",
    "reference",
    "testing",
    "tuning",
)


def _find_kernels_and_reference() -> None:
    """In a checkout that is not installed they lie beside the package, and are found there; pip puts them into it."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Beside an installed package there may be a `kernels` that is not ours.
    if os.path.exists(os.path.join(root, "pyproject.toml")) and importlib.util.find_spec(f"{__name__}.kernels") is None:
        __path__.append(root)


_find_kernels_and_reference()


def __getattr__(name: str) -> Any:
    # Everything loads when it is first used, torch included: the command line starts at once.
    if name == "training":  # not in __all__: a wheel of its own, and `from flashgau import *` works without
        from .extras import wheel

        with wheel("training"):
            return importlib.import_module(f"{__name__}.{name}")
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.ops"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

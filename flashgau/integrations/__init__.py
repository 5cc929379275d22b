"""flashgau inside code that was written for something else: flash-attn's functions, Hugging Face models."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import flash_attn, transformers

__all__ = ["flash_attn", "transformers"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # each when it is first used: the second loads transformers
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

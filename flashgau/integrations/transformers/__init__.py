"""`flashgau.attention` and `flashgau.glu` inside the models of Hugging Face transformers (from 5.5), and ours there.

transformers asks for attention in two places. Once per forward a *mask function* describes which keys every query
sees; in every layer an *attention function* gets that description with queries, keys and values. What flashgau
computes is "query at position p sees the keys p - left .. p + right of its own sequence", so the mask function's work
is to cut the batch into sequences: a batch is laid end to end as one packed row, in which padding and unused slots of
a cache are sequences of their own, with keys but without queries, or the reverse. No token is gathered or moved.
"""

from typing import Any

from .attention import _transformers, register_attention
from .gate import patch_attention_gate
from .glu import patch_glu

__all__ = [
    "FlashGauCache",
    "FlashGauConfig",
    "FlashGauForCausalLM",
    "FlashGauForMaskedLM",
    "FlashGauModel",
    "byte_tokenizer",
    "export",
    "patch_attention_gate",
    "patch_glu",
    "register_attention",
    "to_transformers",
]

try:
    _transformers("flashgau")
except ImportError:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            _transformers(name)  # which says what is missing
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    from .export import byte_tokenizer, export
    from .models import (
        FlashGauCache,
        FlashGauConfig,
        FlashGauForCausalLM,
        FlashGauForMaskedLM,
        FlashGauModel,
        to_transformers,
    )

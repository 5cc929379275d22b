"""flashgau inside code that was written for something else: flash-attn's functions, Hugging Face models."""

from . import flash_attn, transformers

__all__ = ["flash_attn", "transformers"]

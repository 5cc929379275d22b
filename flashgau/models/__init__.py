"""Language models: FLASH and GAU stacks and the transformers they are compared with, causal or masked."""

from .config import KINDS, SIZES, ModelConfig
from .language import CausalLM, MaskedLM, mask_tokens
from .sampling import sample
from .stack import ModelState

__all__ = ["KINDS", "SIZES", "CausalLM", "MaskedLM", "ModelConfig", "ModelState", "mask_tokens", "sample"]

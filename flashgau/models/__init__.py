"""Language models: FLASH and GAU stacks and the transformers they are compared with, causal or masked."""

from .config import KINDS, SIZES, ModelConfig
from .language import CausalLM, Encoder, MaskedLM, load, mask_tokens
from .sampling import sample
from .stack import ModelState
from .states import load_state, save_state

__all__ = [
    "KINDS",
    "SIZES",
    "CausalLM",
    "Encoder",
    "MaskedLM",
    "ModelConfig",
    "ModelState",
    "load",
    "load_state",
    "mask_tokens",
    "sample",
    "save_state",
]

"""Weights of other implementations: FLASH-pytorch's layers and models, there and back, and GAU-alpha's encoder."""

from .files import load_layer
from .flash_pytorch import from_flash_pytorch, to_flash_pytorch
from .gau_alpha import from_gau_alpha

__all__ = ["from_flash_pytorch", "from_gau_alpha", "load_layer", "to_flash_pytorch"]

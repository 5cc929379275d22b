"""Weights of other implementations: FLASH-pytorch's layers and models, there and back."""

from .flash_pytorch import from_flash_pytorch, to_flash_pytorch

__all__ = ["from_flash_pytorch", "to_flash_pytorch"]

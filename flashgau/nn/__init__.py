"""Layers: gated feed-forward, multi-head attention, GAU and FLASH, with their norms and positions.

Everything is batch first, x (B, N, d). Layers that see several tokens take `lengths` (padded rows) or
`cu_seqlens` (packed rows); causal ones also take and give a `state`, and have `step(x, state)` for one token
at a time.
"""

from .biases import AlibiBias, RotaryBias, T5Bias, ToeplitzBias
from .cache import KeyValueCache
from .feedforward import FeedForward, GatedFeedForward
from .flash import FLASH
from .gated_unit import UnitState
from .gau import GAU
from .multi_head_attention import MultiHeadAttention
from .multi_head_mixed_chunk import MultiHeadMixedChunk
from .norms import ScaleNorm
from .offset_scale import OffsetScale
from .rotary import RotaryEmbedding
from .sinusoidal import ScaledSinusoidal
from .spread import Spread

__all__ = [
    "FLASH",
    "GAU",
    "AlibiBias",
    "FeedForward",
    "GatedFeedForward",
    "KeyValueCache",
    "MultiHeadAttention",
    "MultiHeadMixedChunk",
    "OffsetScale",
    "RotaryBias",
    "RotaryEmbedding",
    "ScaleNorm",
    "ScaledSinusoidal",
    "Spread",
    "T5Bias",
    "ToeplitzBias",
    "UnitState",
]

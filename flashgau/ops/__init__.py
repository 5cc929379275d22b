"""The public operations: their contract, their checks and their autograd formula, over whichever backend runs."""

from ..bias import alibi_bias, rotary_bias, t5_bias
from .attention import attention
from .compare import Report, compare
from .dispatch import use_backend
from .gau import gau_attention
from .glu import glu, glu_linear
from .mixed_chunk import mixed_chunk_attention, mixed_chunk_step
from .state import MixedChunkState

__all__ = [
    "MixedChunkState",
    "Report",
    "alibi_bias",
    "attention",
    "compare",
    "gau_attention",
    "glu",
    "glu_linear",
    "mixed_chunk_attention",
    "mixed_chunk_step",
    "rotary_bias",
    "t5_bias",
    "use_backend",
]

"""Every operation as its formula, in naive PyTorch; imported as `flashgau.reference`.

These functions define what the library computes. They have the public signatures, store every matrix the
formulas name, compute each sequence of a batch alone, and can be differentiated any number of times.
Half-precision inputs are computed in fp32;
`reference.attention.__wrapped__` and its like are the same formulas in the dtype of the input.
"""

from .attention import attention
from .gau import gau_attention
from .glu import glu, glu_linear
from .mixed_chunk import mixed_chunk_attention, mixed_chunk_step
from .norms import norm

__all__ = [
    "attention",
    "gau_attention",
    "glu",
    "glu_linear",
    "mixed_chunk_attention",
    "mixed_chunk_step",
    "norm",
]

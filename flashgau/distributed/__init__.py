"""One sequence over several GPUs: every process holds a slice of the tokens (context parallelism).

Layers and models compute their part of it with what `spread_tokens` gives. Each of the other functions is the operation
of that name over the tokens of all processes of a group of torch.distributed, and returns the process's own slice of
its result.
"""

from .attention import context_parallel_attention
from .gau import context_parallel_gau
from .mixed_chunk import context_parallel_mixed_chunk
from .spread import cut_tokens, spread_tokens

__all__ = [
    "context_parallel_attention",
    "context_parallel_gau",
    "context_parallel_mixed_chunk",
    "cut_tokens",
    "spread_tokens",
]

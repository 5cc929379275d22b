"""How much the eager floor works on at a time. Results do not depend on it but for rounding; tests set small sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Sizes:
    """What a CPU's caches like, measured on processors with 1 to 2 MB of second-level cache for each core."""

    panel_rows: int = 2048  # of four bytes a number: the weights' way through the cache no longer counts
    attention_scores: int = 2**20  # of a block, all heads together: a few MB
    attention_widened: int = 2**20  # elements of queries and keys that are widened to fp32 together: in reused memory
    attention_tile: int = 1024  # queries or keys of a call of PyTorch's kernel on halves: four or two of its blocks
    # Rows up to which that kernel's backward takes halves as fp32 on every processor. On two cores with AMX a backward
    # of 4096 tokens takes 79 ms in bf16 and 23 ms in fp32 in rows of 64, 60 and 51 ms in rows of 256.
    attention_short: int = 128
    gau_scores: int = 2**21  # of a panel: 8 MB in fp32
    # Chunks are multiplied together until one of their tensors or their tokens are that many: enough that neither the
    # calls nor the weights' way through the cache count, and not more than the cache holds.
    chunk_elements: int = 2**20
    chunk_tokens: int = 2**10
    glu_bytes: int = 2**22  # of a tensor, so that intermediates take no memory
    gate_bytes: int = 2**20  # the same of attention's gate, five tensors at a time
    glu_kept_bytes: int = 2**25  # allocators reuse memory up to about this; larger tensors pay for fresh pages


SIZES = Sizes()


@contextmanager
def sized(**sizes: int) -> Iterator[None]:
    """Inside the block the eager floor cuts its work so, in every thread."""
    before = {name: getattr(SIZES, name) for name in sizes}
    for name, size in sizes.items():
        setattr(SIZES, name, size)
    try:
        yield
    finally:
        for name, size in before.items():
            setattr(SIZES, name, size)

"""`flashgau.attention` and `flashgau.glu` inside the models of Hugging Face transformers (5.5 or later).

transformers asks for attention in two places. Once per forward a *mask function* describes which keys every query
sees; in every layer an *attention function* gets that description with queries, keys and values. What flashgau
computes is "query at position p sees the keys p - left .. p + right of its own sequence", so the mask function's work
is to cut the batch into sequences: a batch is laid end to end as one packed row, in which padding and unused slots of
a cache are sequences of their own, with keys but without queries, or the reverse. No token is gathered or moved.
"""

from .attention import register_attention
from .gate import patch_attention_gate
from .glu import patch_glu

__all__ = ["patch_attention_gate", "patch_glu", "register_attention"]

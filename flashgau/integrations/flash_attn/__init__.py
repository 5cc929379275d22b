"""The functions of flash-attn under their own names and signatures, computed by `flashgau.attention`.

    from flashgau.integrations.flash_attn import flash_attn_func  # instead of: from flash_attn import ...

They run on any device, in fp32 and fp64 too, and with any head width. Tensors have the tokens before the heads,
(B, N, H, D), a window side of -1 is open, softcap 0 is none. Signatures as of flash-attn 2.8.
"""

from .batch import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .helpers import apply_rotary_emb, index_first_axis, pad_input, unpad_input
from .kvcache import flash_attn_with_kvcache
from .varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = [
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "pad_input",
    "unpad_input",
]

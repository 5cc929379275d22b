"""Small language models in fp64, and tokens for them."""

import torch

from flashgau.models import KINDS, CausalLM, ModelConfig

VOCAB = 23
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def config(kind, **changes):
    options = {"dim": 24, "depth": 2, "heads": 4, "kv_heads": 2, "key_dim": 8, "chunk_size": 4, "vocab_size": VOCAB}
    return ModelConfig(kind=kind, **(options | changes))


def causal(kind, **changes):
    return stirred(CausalLM(config(kind, **changes), dtype=torch.float64))


def stirred(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


VARIANTS = [(kind, {}) for kind in KINDS] + [
    ("flash", {"spec": "lucidrains", "layer": {"token_shift": True}, "positions": "scaled_sin", "tied": False}),
    ("flash-quad", {"spec": "gau-alpha", "norm": "none", "embedding_norm": "rms", "head_bias": True}),
    ("transformer++", {"layer": {"bias": "alibi", "rotary_dim": 0}, "norm": "rmsnorm", "feedforward": "geglu"}),
]

"""Operations in fp32 by small blocks: run as a program with the name of a file, it saves what the interpreter gives."""

import sys

import torch
from strategies import randn

import flashgau
from flashgau import tables
from flashgau.tables.config import Config


def small(kernel, x, width, rows=None, options=False):
    """The same blocks wherever it runs, so that sums are cut alike."""
    return Config(16, 16, block_k=16) if "attention" in kernel and "mixed" not in kernel else Config(32, 32, block_k=32)


def results():
    """Outputs and gradients of operations, by name."""
    heads, rows, wide = (1, 2, 40, 8), (1, 40, 8), (1, 40, 20)
    found = {}
    for op, shapes, options in (
        ("attention", [heads] * 3, {"causal": True, "softcap": 3.0}),
        ("gau_attention", [rows, rows, wide, wide], {"score": "softmax"}),
        ("mixed_chunk_attention", [rows] * 4 + [wide, wide], {"causal": True, "chunk_size": 16}),
        ("glu_linear", [(17, 24), (40, 24), (40, 24)], {"activation": "gelu"}),
    ):
        leaves = [randn(i, *shape).requires_grad_() for i, shape in enumerate(shapes)]
        with tables.configured(small):
            out = getattr(flashgau, op)(*leaves, backend="triton", **options)
            grads = torch.autograd.grad((out * randn(9, *out.shape)).sum(), leaves)
        found |= {f"{op} {i}": x.detach() for i, x in enumerate([out, *grads])}
    return found


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])

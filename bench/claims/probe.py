"""What is measured in a process of its own: ``python -m bench.claims.probe REQUEST``, an answer as JSON.

"steps": the peak of resident memory that a training step adds, for every model, above what is there between steps.
"traffic": bytes that every program of the compiled kernel asks of global memory, from its addresses, executed.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.claims.train import stepper
from bench.memory import cpu_peak_growth
from flashgau.extras import wheel

WAVE = 264  # programs that run at a time on an sm_90: two on each of 132 multiprocessors


def step_peaks(models: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Of each model. A short step comes first: it makes the optimizer's state, and loads libraries."""
    found = {}
    for name, spec in models.items():
        stepper({**spec, "batch": 1, "length": 8}, "cpu")()
        step = stepper(spec, "cpu")
        step()
        found[name] = cpu_peak_growth(step)
    return found


def traffic(target: str, width: int, length: int, rows: int | None) -> dict[str, Any]:
    """The forward of one head of attention of `length` keys, bf16, no mask; beside three calls of PyTorch.

    Args:
        target: the GPU it is compiled for.
        width: of the head.
        length: queries and keys.
        rows: queries of a program; None for what the table of block sizes says.

    Returns:
        dict: "asked", bytes that programs load and store, repeats included; "moved", those that memory must move if
        caches catch all repeats; "shared", bytes of a program's shared memory; "rows" and "columns" of its blocks;
        "plain", bytes of operands of product, softmax and product.
    """
    with wheel("instruments"):
        from flashgau.ptx import footprint
        from flashgau.roof.launches import Kernel, PyTorch, recording
    from flashgau.kernels import attention

    from flashgau.options import AttentionOptions, Layout
    from flashgau.tables import Config

    # Whole waves of programs, of which none takes a part of the keys.
    heads = WAVE // math.gcd(WAVE, length // (rows or 128))
    q = torch.empty(1, heads, length, width, dtype=torch.bfloat16, device="meta")
    with recording(target) as found:
        config = None if rows is None else Config(block_m=rows, block_n=64, num_warps=4, num_stages=2)
        options = AttentionOptions(scale=width**-0.5)
        attention.attention_forward(q, q, q, Layout(), options, config=config)
    with recording(target) as others:
        torch.softmax(q @ q.mT, -1) @ q
    (one,) = [launch for launch in found if isinstance(launch, Kernel)]
    # The programs of the first head; those of the others do the same.
    touched = footprint.footprint(one.ptx, (one.programs // heads, 1, 1), one.values)
    row, column = (int(re.findall(rf"\b{name}=(\d+)", one.configuration)[0]) for name in ("BM", "BN"))
    plain = sum(launch.read + launch.written for launch in others if isinstance(launch, PyTorch))
    return {
        "target": target, "kernel": one.name, "configuration": one.configuration, "rows": row, "columns": column,
        "shared": one.code.shared_bytes, "asked": sum(x.asked for x in touched.values()),
        "moved": sum(x.read + x.written for x in touched.values()), "plain": plain / heads,
    }  # fmt: skip


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    what = request.pop("what")
    answers: dict[str, Callable[..., Any]] = {"steps": step_peaks, "traffic": traffic}
    print(json.dumps(answers[what](**request)))


if __name__ == "__main__":
    main()

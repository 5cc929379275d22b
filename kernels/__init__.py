"""Triton kernels, one file per operation, imported as `flashgau.kernels`.

A file `<op>.py` has the launchers; the kernels stand above them, or in `<op>_kernels.py` where there are many.

`SUPPORTED` names the files with the widest head, or row, their kernels take (None: any width); what is not there, or
wider, runs on the `eager` backend, and an explicit `backend="triton"` is refused with that reason.
"""

import os
import threading

# Why Triton does not run a call in bf16 on a CPU, where `interpreted.mend` cannot put that right: the public functions
# and the launchers say the same.
NO_INTERPRETED_BF16 = "this version of Triton's interpreter, which runs kernels on a CPU, multiplies bf16 wrongly"

SUPPORTED: dict[str, int | None] = {
    "attention": 256, "glu": None, "gau": 256, "mixed_chunk": 256, "projection": None,
    "norms": 8192,  # whose programs hold whole rows, and in the backward five numbers for each of a row's
    "rank_form": None,
}  # fmt: skip


def interpreting() -> bool:
    """Whether Triton runs kernels in Python: the variable must be set when they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Executed(threading.local):
    """The GPU for which kernels are compiled and then executed, in this thread (`flashgau.ptx`); and how many
    multiprocessors launchers take it to have, where launches are recorded (`flashgau.roof`)."""

    target: str | None = None
    processors: int | None = None


executed = _Executed()

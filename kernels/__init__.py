"""Triton kernels, one file per operation, imported as `flashgau.kernels`.

A file `<op>.py` has the launchers; the kernels stand above them, or in `<op>_kernels.py` where there are many.

`SUPPORTED` names the files with the widest head their kernels take (None: any width); what is not there, or wider, runs
on the `eager` backend, and an explicit `backend="triton"` is refused with that reason.
"""

SUPPORTED: dict[str, int | None] = {"attention": 256, "glu": None, "gau": 256, "mixed_chunk": 256, "projection": None}

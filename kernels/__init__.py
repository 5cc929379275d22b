"""Triton kernels, one file per operation, imported as `flashgau.kernels`.

`SUPPORTED` names the files that exist in this version, with the widest head or row their kernels take; what is not
there runs on the `eager` backend, and an explicit `backend="triton"` is refused with that reason.
"""

SUPPORTED: dict[str, int] = {"attention": 256}

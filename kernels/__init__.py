"""Triton kernels, one file per operation, imported as `flashgau.kernels`.

`SUPPORTED` names the operations that have a Triton kernel in this version; the others run on the
`eager` backend, and an explicit `backend="triton"` is refused with that reason.
"""

SUPPORTED: frozenset[str] = frozenset()

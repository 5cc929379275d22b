"""The optimised operations in plain PyTorch: blocked, memory linear in length, on any device.

Each file has the functions `<op>_forward` and `<op>_backward` on plain tensors, without autograd and without
validation; `flashgau.ops` adds both. The Triton kernels in `flashgau.kernels` have the same names and signatures.
"""

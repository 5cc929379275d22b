"""Kernels as anybody writes them: they know nothing of this package."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o, o < n) + tl.load(y + o, o < n), o < n)


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    start = tl.program_id(0) * n
    b_x = tl.load(x + start + o, o < n, -float("inf"))
    b_e = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(out + start + o, b_e / tl.sum(b_e, 0), o < n)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    b_c = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        m_k = k + o_k < K
        b_a = tl.load(a + o_m[:, None] * K + k + o_k[None, :], (o_m[:, None] < M) & m_k[None, :], 0.0)
        b_b = tl.load(b + (k + o_k[:, None]) * N + o_n[None, :], m_k[:, None] & (o_n[None, :] < N), 0.0)
        b_c = tl.dot(b_a, b_b, b_c)
    tl.store(c + o_m[:, None] * N + o_n[None, :], b_c, (o_m[:, None] < M) & (o_n[None, :] < N))


@triton.jit
def mapped_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    map_a = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    map_b = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BK, BN])
    map_c = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    b_c = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        b_c = tl.dot(map_a.load([m, k]), map_b.load([k, n]), b_c)
    map_c.store([m, n], b_c.to(tl.bfloat16))

"""Instructions of PTX, one by one, in kernels written by hand; and the reader of PTX."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from flashgau.ptx import Program, run
from flashgau.ptx.text import parse

KERNEL = """
.version 8.0
.target sm_80
.visible .entry one(.param .u64 a, .param .u64 b, .param .u64 out, .param .f32 f, .param .u16 h) .reqntid 64 {{
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .b64 %rd<19>;
  ld.param.b64 %rd1, [a]; ld.param.b64 %rd2, [b]; ld.param.b64 %rd3, [out];
  mov.u32 %r1, %tid.x;
  mad.wide.u32 %rd4, %r1, 8, %rd1; mad.wide.u32 %rd5, %r1, 8, %rd2; mad.wide.u32 %rd6, %r1, 8, %rd3;
  ld.global.b64 %rd7, [%rd4]; ld.global.b64 %rd8, [%rd5];
  mov.b64 {{%r2, %r4}}, %rd7; mov.b64 {{%r3, %r5}}, %rd8;
  mov.b32 {{%rs1, _}}, %r2; mov.b32 {{%rs2, _}}, %r3;
  mov.b64 %rd9, 0;
  {body}
  st.global.b64 [%rd6], %rd9;
  ret;
}}
"""


def execute(body, a, b):
    out = torch.zeros(64, dtype=torch.int64)
    run(
        KERNEL.format(body=body),
        (1,),
        torch.from_numpy(a.view(np.int64)),
        torch.from_numpy(b.view(np.int64)),
        out,
        0.5,
        7,
    )
    return out.numpy().view(np.uint64)


def operands():
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 2**64, 64, dtype=np.uint64) for _ in "ab")
    corners = np.array([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 5, 2**31 - 1], np.uint64)
    a[:8], b[:8], b[8:16], a[16:20] = corners, corners[::-1], 3, b[16:20]
    return a, b


def s(x, width):
    x %= 1 << width
    return x - (1 << width) if x >> (width - 1) else x


def float_of(x):
    return np.uint32(x % 2**32).view(np.float32)


def half_of(x):
    return np.uint16(x % 2**16).view(np.float16)


def bits_of(x):
    return int(np.float32(x).view(np.uint32))


LOW = "cvt.u64.u32 %rd9, %r9;"
FLAG = "selp.b32 %r9, 1, 0, %p1; " + LOW
SIXTEEN = "cvt.u32.u16 %r9, %rs3; " + LOW
M = 2**32
CASES = {
    "add.s32 %r9, %r2, %r3; " + LOW: lambda a, b: (a + b) % M,
    "sub.s32 %r9, %r2, -7; " + LOW: lambda a, b: (a + 7) % M,
    "sub.s64 %rd9, %rd7, %rd8;": lambda a, b: (a - b) % 2**64,
    "mul.lo.s32 %r9, %r2, %r3; " + LOW: lambda a, b: a * b % M,
    "mul.hi.u32 %r9, %r2, %r3; " + LOW: lambda a, b: (a % M) * (b % M) >> 32,
    "mul.hi.s32 %r9, %r2, %r3; " + LOW: lambda a, b: (s(a, 32) * s(b, 32) >> 32) % M,
    "mul.wide.s32 %rd9, %r2, %r3;": lambda a, b: s(a, 32) * s(b, 32) % 2**64,
    "mul.wide.u32 %rd9, %r2, %r3;": lambda a, b: (a % M) * (b % M),
    "mul.wide.u16 %r9, %rs1, %rs2; " + LOW: lambda a, b: (a % 2**16) * (b % 2**16),
    "mad.wide.s32 %rd9, %r2, 12, %rd8;": lambda a, b: (s(a, 32) * 12 + b) % 2**64,
    "mad.lo.s64 %rd9, %rd7, %rd8, %rd7;": lambda a, b: (a * b + a) % 2**64,
    "min.s32 %r9, %r2, %r3; " + LOW: lambda a, b: min(s(a, 32), s(b, 32)) % M,
    "max.u32 %r9, %r2, %r3; " + LOW: lambda a, b: max(a % M, b % M),
    "min.relu.s32 %r9, %r2, %r3; " + LOW: lambda a, b: max(0, min(s(a, 32), s(b, 32))),
    "min.s64 %rd9, %rd7, %rd8;": lambda a, b: min(s(a, 64), s(b, 64)) % 2**64,
    "abs.s32 %r9, %r2; " + LOW: lambda a, b: abs(s(a, 32)) % M,
    "neg.s32 %r9, %r2; " + LOW: lambda a, b: -a % M,
    "not.b32 %r9, %r2; " + LOW: lambda a, b: ~a % M,
    "xor.b64 %rd9, %rd7, %rd8;": lambda a, b: a ^ b,
    "and.b16 %rs3, %rs1, 255; " + SIXTEEN: lambda a, b: a & 255,
    "lop3.b32 %r9, %r2, %r3, %r4, 0xE8; " + LOW: lambda a, b: (a & b | a & a >> 32 | b & a >> 32) % M,
    "shl.b32 %r9, %r2, 5; " + LOW: lambda a, b: (a << 5) % M,
    "shl.b64 %rd9, %rd7, 33;": lambda a, b: (a << 33) % 2**64,
    "shr.s32 %r9, %r2, 40; " + LOW: lambda a, b: s(a, 32) >> 31 & M - 1,
    "shr.u32 %r9, %r2, 32; " + LOW: lambda a, b: 0,
    "shr.u16 %rs3, %rs1, 3; " + SIXTEEN: lambda a, b: a % 2**16 >> 3,
    "bfe.s32 %r9, %r2, 7, 1; " + LOW: lambda a, b: -(a >> 7 & 1) % M,
    "bfe.u32 %r9, %r2, 4, 14; " + LOW: lambda a, b: a >> 4 & 16383,
    "popc.b32 %r9, %r2; " + LOW: lambda a, b: (a % M).bit_count(),
    "prmt.b32 %r9, %r2, %r3, 0x5410U; " + LOW: lambda a, b: a % 2**16 | (b % 2**16) << 16,
    "mov.b32 %r9, {%rs2, %rs1}; " + LOW: lambda a, b: b % 2**16 | (a % 2**16) << 16,
    "cvt.s64.s32 %rd9, %rd7;": lambda a, b: s(a, 32) % 2**64,
    "cvt.s32.s16 %r9, %rs1; " + LOW: lambda a, b: s(a, 16) % M,
    "cvt.u16.u32 %rs3, %r2; " + SIXTEEN: lambda a, b: a % 2**16,
    "setp.lt.s32 %p1, %r2, %r3; " + FLAG: lambda a, b: s(a, 32) < s(b, 32),
    "setp.lt.u32 %p1, %r2, %r3; " + FLAG: lambda a, b: a % M < b % M,
    "setp.ge.s64 %p1, %rd7, %rd8; " + FLAG: lambda a, b: s(a, 64) >= s(b, 64),
    "setp.eq.b16 %p1, %rs1, %rs2; " + FLAG: lambda a, b: a % 2**16 == b % 2**16,
    "setp.lt.s32 %p2, %r2, 0; setp.ne.and.b32 %p1, %r3, 3, %p2; " + FLAG: lambda a, b: s(a, 32) < 0 and b % M != 3,
    "setp.gt.s32 %p2|%p1, %r2, %r3; " + FLAG: lambda a, b: not s(a, 32) > s(b, 32),
    "setp.lt.f32 %p1, %r2, %r3; " + FLAG: lambda a, b: float_of(a) < float_of(b),
    "setp.ltu.f32 %p1, %r2, %r3; " + FLAG: lambda a, b: not float_of(a) >= float_of(b),
    "setp.num.f32 %p1, %r2, %r3; " + FLAG: lambda a, b: not (np.isnan(float_of(a)) or np.isnan(float_of(b))),
    "setp.ne.f32 %p1, %r2, 0f7FFFFFFF; " + FLAG: lambda a, b: False,
    "setp.neu.f32 %p1, %r2, 0f7FFFFFFF; " + FLAG: lambda a, b: True,
    "setp.lt.f16x2 %p2|%p1, %r2, %r3; selp.b32 %r9, 2, 0, %p2; selp.b32 %r10, 1, 0, %p1; or.b32 %r9, %r9, %r10; " + LOW:
        lambda a, b: 2 * bool(half_of(a) < half_of(b)) + bool(half_of(a >> 16) < half_of(b >> 16)),
    "setp.eq.b32 %p2, %r2, %r2; selp.b32 %r9, %r3, 9, %p2; " + LOW: lambda a, b: b % M,
    "setp.lt.s32 %p1, %r2, 0; @%p1 mov.b32 %r9, 5; @!%p1 mov.b32 %r9, 6; " + LOW: lambda a, b: 5 if s(a, 32) < 0 else 6,
    "ld.param.f32 %r9, [f]; " + LOW: lambda a, b: bits_of(0.5),
    "ld.param.u16 %rs3, [h]; " + SIXTEEN: lambda a, b: 7,
    "cvt.rn.f32.s32 %r9, %r2; " + LOW: lambda a, b: bits_of(s(a, 32)),
    "cvt.rn.f32.u64 %r9, %rd7; " + LOW: lambda a, b: bits_of(np.uint64(a)),
    "{ .reg .b32 %own; add.s32 %own, %r2, 1; mov.b32 %r9, %own; } " + LOW: lambda a, b: (a + 1) % M,
    "mov.b32 %r9, 3; st.global.b32 [%rd6+4], %r9; ld.global.b32 %r10, [%rd6+4]; mov.b64 %rd9, {%r10, %r9};":
        lambda a, b: 3 + (3 << 32),
}  # fmt: skip


@pytest.mark.parametrize("body", CASES)
def test_integers_and_comparisons(body):
    a, b = operands()
    with np.errstate(all="ignore"):
        expected = [int(CASES[body](int(x), int(y))) for x, y in zip(a, b, strict=True)]
    assert execute(body, a, b).tolist() == expected


def two(x, y):
    """Two fp32 side by side in 64 bits."""
    low, high = (np.asarray(v, np.float32).view(np.uint32).astype(np.uint64) for v in (x, y))
    return low | high << np.uint64(32)


FLOATS = {
    "add.f32 %r9, %r2, %r3;": lambda a, b: a + b,
    "sub.f32 %r9, %r2, 0f3F800000;": lambda a, b: a - np.float32(1),
    "mul.f32 %r9, %r2, %r3;": lambda a, b: a * b,
    "div.rn.f32 %r9, %r2, %r3;": lambda a, b: a / b,
    "div.full.f32 %r9, %r2, %r3;": lambda a, b: a / b,
    "max.f32 %r9, %r2, %r3;": np.fmax,
    "min.NaN.f32 %r9, %r2, %r3;": np.minimum,
    "neg.f32 %r9, %r2;": lambda a, b: -a,
    "abs.ftz.f32 %r9, %r2;": lambda a, b: np.where(np.abs(a) < 2.0**-126, 0, np.abs(a)),
    "add.ftz.f32 %r9, %r2, %r3;": lambda a, b: np.where(np.abs(a + b) < 2.0**-126, 0, a + b),
    "mul.sat.f32 %r9, %r2, %r3;": lambda a, b: np.clip(np.nan_to_num(a * b, nan=0.0), 0, 1),
    "ex2.approx.ftz.f32 %r9, %r2;": lambda a, b: np.where(a < -126, 0, np.exp2(a.astype(np.float64))),
    "lg2.approx.f32 %r9, %r2;": lambda a, b: np.log2(a.astype(np.float64)),
    "rcp.approx.ftz.f32 %r9, %r2;": lambda a, b: 1 / a,
    "sqrt.rn.f32 %r9, %r2;": lambda a, b: np.sqrt(a),
    "cvt.rni.f32.f32 %r9, %r2;": lambda a, b: np.rint(a),
    "cvt.rn.f16.f32 %rs3, %r2; cvt.f32.f16 %r9, %rs3;": lambda a, b: a.astype(np.float16),
    "cvt.rn.f16x2.f32 %r9, %r3, %r2; mov.b32 {%rs3, %rs4}, %r9; cvt.f32.f16 %r9, %rs4;":
        lambda a, b: b.astype(np.float16),
    "cvt.rn.bf16.f32 %rs3, %r2; cvt.rn.bf16.f32 %rs4, %r3; mul.bf16 %rs5, %rs3, %rs4; cvt.f32.bf16 %r9, %rs5;":
        lambda a, b: (torch.tensor(a).bfloat16() * torch.tensor(b).bfloat16()).float().numpy(),
    "cvt.rn.bf16x2.f32 %r9, %r3, %r2; add.bf16x2 %r9, %r9, %r9; mov.b32 {%rs3, _}, %r9; cvt.f32.bf16 %r9, %rs3;":
        lambda a, b: (2 * torch.tensor(a).bfloat16()).float().numpy(),
}  # fmt: skip


@pytest.mark.parametrize("body", FLOATS)
def test_floats(body):
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal(64).astype(np.float32) * 3 for _ in "ab")
    a[:6] = [0.0, -0.0, np.inf, 2.5, -1e-39, 300.0]
    b[:6] = [1.0, 0.5, 2.0, np.nan, 0.0, -2.0]
    with np.errstate(all="ignore"):
        expected = np.asarray(FLOATS[body](a, b)).astype(np.float32)
    found = execute(body + LOW, two(a, a), two(b, b)).astype(np.uint32).view(np.float32)
    assert np.array_equal(found, expected, equal_nan=True)


def test_shuffles_and_votes():
    a = np.arange(64, dtype=np.uint64)
    lane, warp = np.arange(64) % 32, np.arange(64) // 32 * 32
    sent = lambda how, by, bounds: execute(f"shfl.sync.{how}.b32 %r9, %r2, {by}, {bounds}, -1; {LOW}", a, a).astype(int)
    assert (sent("bfly", 5, 31) == warp + (lane ^ 5)).all()
    assert (sent("idx", 9, 31) == warp + 9).all()
    assert (sent("up", 3, 0) == warp + np.where(lane < 3, lane, lane - 3)).all()
    assert (sent("down", 30, 31) == warp + np.where(lane > 1, lane, lane + 30)).all()
    assert (sent("idx", 1, 0x1C1F) == warp + lane // 4 * 4 + 1).all()  # within segments of four
    vote = "setp.gt.u32 %p2, %r2, 40; vote.sync.{} %p1, %p2, -1; " + FLAG
    assert (execute(vote.format("any.pred"), a, a) == np.repeat([0, 1], 32)).all()
    assert (execute(vote.format("all.pred"), a, a) == 0).all()
    ballot = "setp.gt.u32 %p2, %r2, 61; vote.sync.ballot.b32 %r9, %p2, -1; " + LOW
    assert (execute(ballot, a, a) == np.repeat([0, 3 << 30], 32)).all()
    assert (execute("redux.sync.max.u32 %r9, %r2, -1; " + LOW, a, a) == warp + 31).all()


def test_atomics_count_every_thread():
    body = "mov.b32 %r9, 2; atom.global.add.u32 %r10, [%rd3], %r9; mov.b64 %rd9, {%r10, %r9};"
    out = torch.zeros(64, dtype=torch.int64)
    kernel = KERNEL.format(body=body).replace("st.global.b64 [%rd6], %rd9;", "st.global.b64 [%rd5], %rd9;")
    b = torch.zeros(64, dtype=torch.int64)
    run(kernel, (1,), b.clone(), b, out)
    assert int(out[0]) == 128
    assert sorted((b % 2**32).tolist()) == list(range(0, 128, 2))


def test_counts():
    program = Program(KERNEL.format(body="add.s32 %r9, %r2, %r3;"))
    assert program.classes[0]["param load"] == 3
    x = torch.zeros(64, dtype=torch.int64)
    launch = run(KERNEL.format(body="add.s32 %r9, %r2, %r3;"), (1,), x, x.clone(), x.clone())
    assert launch.counts.read_bytes == 2 * 64 * 8
    assert launch.counts.written_bytes == 64 * 8
    assert launch.counts.instructions["param load"] == 3 * 2  # of two warps
    assert launch.counts.blocks == 1


def test_the_reader():
    kernel = parse(KERNEL.format(body="{ .reg .b32 %own; mov.b32 %own, 1; } { .reg .b64 %own; mov.b64 %own, 2; }"))
    assert (kernel.name, kernel.target, kernel.threads) == ("one", "sm_80", 64)
    assert [(p.name, p.offset, p.size) for p in kernel.parameters] == [
        ("a", 0, 8), ("b", 8, 8), ("out", 16, 8), ("f", 24, 4), ("h", 28, 2)
    ]  # fmt: skip
    own = [name for name in kernel.registers if name.startswith("%own")]
    assert [kernel.registers[name] for name in own] == ["b32", "b64"]
    with pytest.raises(ValueError, match=r"has no `\.visible \.entry`"):
        parse("nothing")

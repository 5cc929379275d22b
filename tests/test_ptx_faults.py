"""Faults planted in PTX: each is found, by name and line. The matrix products were compiled by Triton 3.7.1."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from strategies import randn

pytest.importorskip("triton")
from flashgau.ptx import KINDS, Fault, UnknownInstruction, run

M, N, K = 96, 80, 112
SHARED = {"sm_80": 16384, "sm_90": 24576}
TARGETS = list(SHARED)


def matmul(target):
    return (Path(__file__).parent / "ptx" / f"matmul_{target}.ptx").read_text()


def multiply(ptx, target, a=None, b=None, c=None, **options):
    a = randn(0, M, K, dtype=torch.bfloat16) if a is None else a
    b = randn(1, K, N, dtype=torch.bfloat16) if b is None else b
    c = torch.full((M, N), float("nan")) if c is None else c
    run(ptx, (2, 2), a, b, c, M, N, K, shared_bytes=SHARED[target], **options)
    return c


def without(ptx, text, place=0):
    """The text less one of its lines."""
    lines = ptx.splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if text in line.partition("//")[0]]
    del lines[found[place]]
    return "".join(lines)


def replaced(ptx, old, new, place=0):
    """One occurrence of many."""
    parts = ptx.split(old)
    place %= len(parts) - 1
    return old.join(parts[: place + 1]) + new + old.join(parts[place + 1 :])


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("descending", [None, False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_compiled_product_is_the_product(target, descending, seed):
    a, b = randn(0, M, K, dtype=torch.bfloat16), randn(1, K, N, dtype=torch.bfloat16)
    c = multiply(matmul(target), target, a, b, descending=descending, seed=seed)
    allowed = K * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs())
    assert ((c - a.double() @ b.double()).abs() <= allowed).all()
    if descending is not None:  # sums in an order that is written down do not depend on how warps are scheduled
        assert torch.equal(c, multiply(matmul(target), target, a, b, descending=descending))


def planted(target, change, kind, source, **arguments):
    """The changed product is refused with this fault at this line of the kernel."""
    with pytest.raises(Fault) as found:
        multiply(change(matmul(target)), target, **arguments)
    assert found.value.kind == kind, str(found.value)
    assert found.value.kernel == "matmul_kernel"
    assert re.search(source, found.value.source), str(found.value)
    return found.value


def same(ptx):
    return ptx


@pytest.mark.parametrize("target", TARGETS)
def test_a_read_outside_of_a_tensor(target):
    storage = randn(0, M * K, dtype=torch.bfloat16)
    fault = planted(target, same, "outside", r"outside_kernels.py:30", a=storage[: M * K - 8])
    assert fault.address is not None
    assert (fault.block, fault.thread) in {((1, y, 0), fault.thread) for y in (0, 1)}


@pytest.mark.parametrize("target", TARGETS)
def test_a_write_outside_of_a_tensor(target):
    planted(target, same, "outside", r"outside_kernels.py:33", c=torch.empty(M * N - 4))


@pytest.mark.parametrize("target", TARGETS)
def test_vectors_that_are_not_aligned(target):
    """The code was compiled for operands at multiples of 16 bytes."""
    planted(target, same, "misaligned", r"outside_kernels.py:3[01]", a=randn(0, M * K + 1, dtype=torch.bfloat16)[1:])


@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_that_is_not_waited_for(target):
    planted(target, lambda ptx: without(ptx, "cp.async.wait_group"), "early read", "outside_kernels.py")
    loose = lambda ptx: replaced(ptx, "cp.async.wait_group \t2", "cp.async.wait_group \t3")
    planted(target, loose, "early read", "outside_kernels.py")


@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_that_is_never_made(target):
    planted(target, lambda ptx: without(ptx, "cp.async.cg"), "unwritten", "outside_kernels.py")


@pytest.mark.parametrize("target", TARGETS)
def test_a_barrier_left_out_before_the_copies_of_others_are_read(target):
    start = matmul(target).index("Inner Loop Header")
    change = lambda ptx: ptx[:start] + without(ptx[start:], "bar.sync")
    fault = planted(target, change, "race", "outside_kernels.py")
    assert "another thread wrote it" in str(fault)


def test_a_barrier_left_out_before_what_was_read_is_overwritten():
    start = matmul("sm_80").index("Inner Loop Header")
    change = lambda ptx: ptx[:start] + without(ptx[start:], "bar.sync", 1)
    fault = planted("sm_80", change, "race", "outside_kernels.py")
    assert "another thread read it" in str(fault)


def test_a_buffer_that_a_product_still_reads_is_overwritten():
    change = lambda ptx: replaced(ptx, "wgmma.wait_group.sync.aligned 1", "wgmma.wait_group.sync.aligned 2")
    planted("sm_90", change, "early write", "outside_kernels.py:3[01]")


def test_a_product_whose_result_is_read_before_its_wait():
    change = lambda ptx: without(ptx, "wgmma.wait_group.sync.aligned 0")
    planted("sm_90", change, "early read", "outside_kernels.py:33")


def test_a_result_that_goes_through_shared_memory_without_a_barrier():
    planted("sm_80", lambda ptx: without(ptx, "bar.sync", -1), "race", "outside_kernels.py:33")


def test_a_copy_to_outside_of_shared_memory():
    with pytest.raises(Fault, match="shared outside: 16 bytes outside the 8192 of the block"):
        run(matmul("sm_80"), (2, 2), torch.zeros(M, K).bfloat16(), torch.zeros(K, N).bfloat16(), torch.zeros(M, N),
            M, N, K, shared_bytes=8192)  # fmt: skip


def test_two_blocks_that_write_one_place():
    """Every block takes itself for the first along y, so that two of them write the same columns."""
    change = lambda ptx: ptx.replace("%ctaid.y", "%ctaid.z")
    planted("sm_80", change, "two writers", "outside_kernels.py:33")


@pytest.mark.parametrize(
    ("target", "old", "new"), [("sm_80", ".trans.", "."), ("sm_90", ", 1, 1, 0, 1;", ", 1, 1, 0, 0;")]
)
def test_a_transposed_operand_is_a_wrong_product(target, old, new):
    """A fault without undefined behaviour is seen in the numbers; this one may also read where nothing was written."""
    ptx = matmul(target).replace(old, new)
    assert ptx != matmul(target)
    exact = randn(0, M, K, dtype=torch.bfloat16).double() @ randn(1, K, N, dtype=torch.bfloat16).double()
    with contextlib.suppress(Fault):
        assert (multiply(ptx, target) - exact).abs().max() > 1


# ---- copies by tensor maps

MAPPED = (Path(__file__).parent / "ptx" / "mapped_sm_90.ptx").read_text()


def multiply_mapped(ptx, **options):
    a, b = randn(0, M, K, dtype=torch.bfloat16), randn(1, K, N, dtype=torch.bfloat16)
    c, scratch = torch.zeros(M, N, dtype=torch.bfloat16), torch.zeros(4 * 384, dtype=torch.uint8)
    run(ptx, (2, 2), a, b, c, M, N, K, scratch, shared_bytes=24600, **options)
    return c, a.double() @ b.double()


@pytest.mark.parametrize("seed", [None, 0])
def test_copies_by_tensor_maps(seed):
    """What lies outside of the tensors is zero when it is read, and dropped when it is written."""
    c, exact = multiply_mapped(MAPPED, seed=seed)
    assert ((c - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda ptx: without(without(ptx, "@!complete bra"), "mbarrier.try_wait"), "early read"),
        (lambda ptx: ptx.replace("], 8192;", "], 8193;"), "endless"),
        (lambda ptx: without(ptx, "fence.proxy.async.shared::cta", -1), "race"),
        (lambda ptx: without(ptx, "mbarrier.init"), "unwritten"),
        (lambda ptx: replaced(ptx, "global_dim.shared::cta.b1024.b32 [ %rd2 + 0 ], 0x0, %r8", "global_dim.shared::cta."
                              "b1024.b32 [ %rd2 + 0 ], 0x0, 800", -1), "two writers"),
    ],
    ids=["not waited for", "wrong bytes", "no proxy fence", "no barrier", "a map that is too wide"],
)  # fmt: skip
def test_faults_of_copies_by_tensor_maps(change, kind):
    ptx = change(MAPPED)
    assert ptx != MAPPED
    with pytest.raises(Fault) as found:
        multiply_mapped(ptx, budget=3000)
    assert found.value.kind == kind, str(found.value)
    assert found.value.source.startswith("outside_kernels.py:")


# ---- kernels written by hand

HEAD = """
.version 8.0
.target sm_80
.visible .entry small(.param .u64 x, .param .u64 y) .reqntid 64 {
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .b64 %rd<9>;
  .loc 1 1 0 // small.py:1:0
  ld.param.b64 %rd1, [x];
  ld.param.b64 %rd2, [y];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mad.wide.u32 %rd3, %r1, 4, %rd1;
  mad.wide.u32 %rd4, %r1, 4, %rd2;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r3, memory;
"""
MEMORY = ".extern .shared .align 16 .b8 memory[];\n"


def small(body, grid=(1,), **options):
    text = body.strip().replace("\n", "\n  ")
    ptx = HEAD.replace(".visible", MEMORY + ".visible", 1) + "  .loc 1 2 0 // small.py:2:0\n  " + text + "\n  ret;\n}\n"
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(ptx, grid, x, y, shared_bytes=256, **options)
    return y


SHUFFLED = """
ld.global.b32 %r5, [%rd3];
st.shared.b32 [%r4], %r5;
bar.sync 0;
xor.b32 %r6, %r3, 128;
add.s32 %r6, %r6, memory;
ld.shared.b32 %r7, [%r6];
st.global.b32 [%rd4], %r7;
"""


def test_what_is_right_passes():
    assert torch.equal(small(SHUFFLED), torch.arange(64, dtype=torch.int32) ^ 32)
    assert torch.equal(small(SHUFFLED, seed=3), torch.arange(64, dtype=torch.int32) ^ 32)


FAULTS = {
    "race": SHUFFLED.replace("bar.sync 0;", ""),
    "unwritten": SHUFFLED.replace("st.shared.b32 [%r4], %r5;", ""),
    "shared outside": SHUFFLED.replace("[%r6]", "[%r6+128]"),
    "barrier": "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L_end;\nbar.sync 0;\n$L_end:",
    "diverged": "setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L_end;\nshfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;\n$L_end:",
    "two writers": "st.global.b32 [%rd4], %r2;",
    "two blocks": "setp.eq.b32 %p1, %r2, 0;\n@%p1 st.global.b32 [%rd4], 1;\n@!%p1 ld.global.b32 %r5, [%rd4];",
    "endless": "$L_again:\nadd.s32 %r5, %r5, 1;\nbra.uni $L_again;",
    "early read": """
        cp.async.ca.shared.global [%r4], [%rd3], 4;
        cp.async.commit_group;
        ld.shared.b32 %r5, [%r4];""",
    "early write": """
        cp.async.ca.shared.global [%r4], [%rd3], 4;
        cp.async.commit_group;
        st.shared.b32 [%r4], %r1;
        cp.async.wait_group 0;""",
    "misaligned": "ld.global.b32 %r5, [%rd3+2];",
    "outside": "ld.global.b32 %r5, [%rd3+4];",
}


def test_every_kind_of_fault_is_planted():
    assert set(FAULTS) == set(KINDS)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found(kind, seed):
    with pytest.raises(Fault) as found:
        small(FAULTS[kind], (2,) if kind.startswith("two") else (1,), seed=seed, budget=1000)
    # One warp after the other, a place may be read before the racing write.
    assert found.value.kind in ({kind, "unwritten"} if kind == "race" and seed is not None else {kind})
    assert found.value.source == "small.py:2:0"
    assert found.value.kind in str(found.value)
    assert "small at small.py:2:0 (line" in str(found.value)


def test_threads_of_a_warp_need_a_barrier_of_the_warp():
    exchange = SHUFFLED.replace("128", "4")
    with pytest.raises(Fault, match="race"):
        small(exchange.replace("bar.sync 0;", ""))
    expected = torch.arange(64, dtype=torch.int32) ^ 1
    assert torch.equal(small(exchange.replace("bar.sync 0;", "bar.warp.sync -1;")), expected)


def test_a_value_that_several_threads_write_is_no_race():
    """Layouts that hold a value more than once write it more than once."""
    body = """
        st.shared.b32 [memory], 7;
        bar.sync 0;
        ld.shared.b32 %r5, [memory];
        st.global.b32 [%rd4], %r5;"""
    assert (small(body) == 7).all()
    with pytest.raises(Fault, match="race: two threads write different values at once"):
        small(body.replace(", 7", ", %r1"))


def test_threads_that_part_meet_again():
    """One side of the branch stands behind what both sides come to."""
    body = """
        mov.b32 %r5, 1;
        and.b32 %r6, %r1, 1;
        setp.eq.b32 %p1, %r6, 0;
        @%p1 bra $L_side;
        $L_join:
        shfl.sync.bfly.b32 %r7, %r5, 1, 31, -1;
        st.global.b32 [%rd4], %r7;
        ret;
        $L_side:
        mov.b32 %r5, 2;
        bra.uni $L_join;"""
    assert small(body).tolist() == [1, 2] * 32


def test_an_instruction_that_is_not_known_is_named():
    with pytest.raises(UnknownInstruction, match=r"'frobnicate.b32 %r5, %r1' at line \d+ \(small.py:2:0\)"):
        small("frobnicate.b32 %r5, %r1;")


def test_more_arguments_than_parameters_are_refused():
    with pytest.raises(ValueError, match="3 arguments were given; expected at most the 2 of the kernel"):
        run(HEAD.replace("add.s32 %r4, %r3, memory;", "") + "ret;\n}\n", (1,), 1, 2, 3)

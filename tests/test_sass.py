"""Hot loops read from machine code: what is found in them, what a model makes of it, and what counts as worse."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import kernel_calls
import pytest

from flashgau.roof import loops as against
from flashgau.sass import HotLoop, inspect, model
from flashgau.sass.loops import hot_loops
from flashgau.sass.text import CLASSES, Instruction, parse
from flashgau.sass.tiles import Product, TileLoop, tile_loops

FOLDER = Path(__file__).parent / "sass"

# Hopper: the product of the next block, then that of the last, then what stands under them; a barrier polled out of
# line, behind the end of the program.
SKEWED = """
        /*0000*/                   MOV R1, RZ ;                                             /* 0x00000a00ff017b82 */
                                                                                            /* 0x000e700000000800 */
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0020*/                   MUFU.EX2 R2, R3 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R56, R8, gdesc[UR8], R56, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/                   MUFU.EX2 R4, R5 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   MUFU.EX2 R6, R7 ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0090*/              @!P0 BRA 0xd0 ;
        /*00a0*/                   ISETP.GE.AND P1, PT, R0, R1, PT ;
        /*00b0*/               @P1 BRA 0x10 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00e0*/              @!P0 BRA 0xd0 ;
        /*00f0*/                   BRA 0xa0 ;
"""
PROGRAM = model.Program(warps=8, registers=200, shared_bytes=100_000)

# A loop of 2 products whose blocks come in bulk copies, two iterations of which are issued before it.
BULK = """
    %k = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable> loc(#loc1)
    %k_0 = ttg.memdesc_index %k[%c0] : !ttg.memdesc<3x64x128xbf16, #shared> -> !ttg.memdesc<64x128xbf16, #shared>
    ttng.async_tma_copy_global_to_local %d[%c0, %c0] %k_0, %b, %t : !tt.tensordesc<x>, !ttg.memdesc<1xi64, #s> -> !ttg.memdesc<64x128xbf16, #shared> loc(#loc2)
    %k_1 = ttg.memdesc_index %k[%c1] : !ttg.memdesc<3x64x128xbf16, #shared> -> !ttg.memdesc<64x128xbf16, #shared>
    ttng.async_tma_copy_global_to_local %d[%c1, %c0] %k_1, %b, %t : !tt.tensordesc<x>, !ttg.memdesc<1xi64, #s> -> !ttg.memdesc<64x128xbf16, #shared> loc(#loc2)
    %l = scf.for %j = %c0 to %n step %c64 iter_args(%a = %z) -> (tensor<128x128xf32, #mma1>)  : i32 {
      %s = ttng.warp_group_dot %q, %kt, %z {isAsync = true} : !ttg.memdesc<128x128xbf16, #shared, #smem> * !ttg.memdesc<128x64xbf16, #shared2, #smem, mutable> -> tensor<128x64xf32, #mma> loc(#loc3)
      %v = ttng.warp_group_dot %p, %k_1, %a : tensor<128x64xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma1, kWidth = 2}>> * !ttg.memdesc<64x128xbf16, #shared, #smem, mutable> -> tensor<128x128xf32, #mma1> loc(#loc4)
      %k_2 = ttg.memdesc_index %k[%l] : !ttg.memdesc<3x64x128xbf16, #shared> -> !ttg.memdesc<64x128xbf16, #shared>
      ttng.async_tma_copy_global_to_local %d[%j, %c0] %k_2, %b, %t : !tt.tensordesc<x>, !ttg.memdesc<1xi64, #s> -> !ttg.memdesc<64x128xbf16, #shared> loc(#loc2)
      scf.yield %v : tensor<128x128xf32, #mma1> loc(#loc5)
    } loc(#loc5)
"""  # noqa: E501


def ours() -> tuple[str, str]:
    """The loop of a kernel of ours, compiled for sm_90: 128 x 64 x 64, three stages of cp.async."""
    return tuple((FOLDER / f"gau_gradient_sm_90.{end}").read_text() for end in ("sass", "ttgir"))  # type: ignore[return-value]


def test_parse():
    code = parse(SKEWED)
    assert [i.address for i in code] == list(range(0, 0x100, 0x10))
    assert code[9] == Instruction(0x90, "!P0", "BRA", "0xd0")
    assert [i.class_ for i in code[:6]] == ["integer", "matrix", "exp", "matrix", "synchronisation", "exp"]


@pytest.mark.parametrize(
    ("opcode", "class_"),
    [
        ("FSETP.NEU.FTZ.AND", "select"), ("FMNMX.FTZ", "compare"), ("UIADD3", "uniform"), ("STL.64", "spill"),
        ("LDGSTS.E.BYPASS.128", "global load"), ("UTMALDG.2D", "global load"), ("UTCHMMA", "matrix"),
        ("USETMAXREG.ALLOC", "synchronisation"), ("HMMA.16816.F32.BF16", "matrix"), ("XYZ", "other"),
        ("v_mfma_f32_32x32x8_bf16", "matrix"), ("v_pk_mul_f32", "fp32"), ("scratch_load_dword", "spill"),
        ("ds_read_b128", "shared memory"), ("s_waitcnt", "synchronisation"), ("v_lshl_add_u32", "integer"),
    ],
)  # fmt: skip
def test_classes(opcode, class_):
    assert class_ in CLASSES
    assert Instruction(0, None, opcode, "").class_ == class_


def test_a_hot_loop_leaves_out_what_only_polls():
    (loop,) = hot_loops(parse(SKEWED))
    assert [i.address for i in loop] == list(range(0x10, 0xC0, 0x10))


def test_only_the_innermost_loop_with_products_is_hot():
    code = """
        /*0000*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/ @P0 BRA 0x10 ;
        /*0030*/ FADD R1, R1, R2 ;
        /*0040*/ @P2 BRA 0x30 ;
        /*0050*/ @P1 BRA 0x0 ;
        /*0060*/ EXIT ;
    """
    assert [[i.address for i in loop] for loop in hot_loops(parse(code))] == [[0x10, 0x20]]


def test_a_jump_into_a_loops_middle_does_not_hide_it():
    """The loop's test stands first, and its end jumps back without a condition, which is not counted."""
    code = """
        /*0000*/ BRA 0x20 ;
        /*0010*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/ ISETP.GE.AND P0, PT, R0, R1, PT ;
        /*0030*/ @P0 EXIT ;
        /*0040*/ BRA 0x10 ;
    """
    assert [[i.address for i in loop] for loop in hot_loops(parse(code))] == [[0x10, 0x20, 0x30]]


def test_amd_labels_are_addresses():
    code = """	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
.LBB0_0:
	s_mov_b32 s0, 0
.LBB0_3:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16 v[0:15], v[48:49], v[84:85], 0
	v_exp_f32_e32 v1, v2 ; a comment
	s_cbranch_scc1 .LBB0_3
	s_endpgm
"""
    (loop,) = hot_loops(parse(code))
    assert [i.opcode for i in loop] == ["v_mfma_f32_32x32x8_bf16", "v_exp_f32_e32", "s_cbranch_scc1"]
    (found,) = inspect("gfx942", code, "", model.Program(4, 100, 0))
    assert (found.bound, found.rate, found.clocks, found.exps) == ("not modelled", None, {}, 1)
    assert found.prefetch is None


def test_a_wait_that_leaves_a_product_keeps_the_flight():
    (loop,) = hot_loops(parse(SKEWED))
    under, outside = model.flight(loop)
    assert [i.address for i in under if model.is_exp(i)] == [0x20, 0x50]
    assert [i.address for i in outside if model.is_exp(i)] == [0x70]


def test_what_flies_at_the_end_of_a_loop_flies_at_its_start():
    (loop,) = hot_loops(parse(SKEWED.replace("gsb0, 0x0", "gsb0, 0x1")))
    assert model.flight(loop).exps == 3


def test_clocks_of_a_loop_by_hand():
    """2 groups of warps, one program on the SM: the numbers of `model.Machine`."""
    (loop,) = hot_loops(parse(SKEWED))
    tiles = TileLoop((Product(128, 32, 16), Product(128, 64, 16)))
    found = model.estimate("sm_90", loop, PROGRAM, tiles)
    first = max(32 / 2, 32 / 4 + 16)  # its rows come from shared memory, which is slower than the product
    clocks = found.clocks
    assert clocks.tensor == 2 * (first + 64 / 2)
    assert clocks.shared == 2 * (32 / 4 + 16 + 64 / 4)
    assert (clocks.issue, clocks.exp) == (2 * 11, 2 * 3 * 8)
    assert (clocks.under, clocks.outside) == (2 * 2 * 8, 2 * 8)
    assert clocks.total == clocks.outside + clocks.tensor
    assert (found.programs, found.bound) == (1, "tensor")
    assert found.rate == pytest.approx(2 * tiles.macs / clocks.total * 132 * 1.83e9 / 1e12)
    assert found.serial < found.rate < found.overlap


def test_programs_that_share_a_multiprocessor_fill_each_others_gaps():
    (loop,) = hot_loops(parse(SKEWED))
    tiles = TileLoop((Product(64, 32, 16), Product(64, 64, 16)))
    alone = model.estimate("sm_90", loop, PROGRAM._replace(warps=4), tiles)
    shared = model.estimate("sm_90", loop, model.Program(4, 128, 50_000), tiles)
    assert (alone.programs, shared.programs) == (2, 4)
    whole = alone.clocks.outside + alone.clocks.tensor
    assert alone.clocks.total == max(alone.clocks.tensor, whole / 2)
    assert shared.rate == shared.overlap


# Ampere: one product of a warp, whose first factor it reads itself.
WARPS = """
        /*0000*/ LDSM.16.M88.4 R8, [R2] ;
        /*0010*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/ MUFU.EX2 R4, R4 ;
        /*0030*/ @P0 BRA 0x0 ;
        /*0040*/ EXIT ;
"""


@pytest.mark.parametrize(("warps", "together"), [(8, True), (4, False)])
def test_warps_overlap_each_other_where_two_share_a_scheduler(warps, together):
    (loop,) = hot_loops(parse(WARPS))
    tiles = TileLoop((Product(16 * warps, 8, 16),))
    found = model.estimate("sm_80", loop, model.Program(warps, 255, 160_000), tiles)
    clocks = found.clocks
    assert clocks.tensor == 16 * 8 * 16 * warps / 1024
    assert clocks.shared == 4 * 128 * warps / 128
    assert clocks.exp == clocks.soft == 8 * warps / 4
    assert clocks.total == (max(clocks.tensor, clocks.shared, clocks.exp) if together
                            else max(clocks.tensor + clocks.exp, clocks.shared))  # fmt: skip
    assert found.programs == 1


def test_blackwells_products_take_their_shape_from_what_was_asked():
    """One instruction for the whole program: 128 x 64 x 16, the second with its first factor in tensor memory."""
    code = """
        /*0000*/ UTCHMMA gdesc[UR8], gdesc[UR12], tmem[UR7], tmem[UR52], idesc[UR53], !UPT ;
        /*0010*/ UTCHMMA tmem[UR8], gdesc[UR12], tmem[UR7], tmem[UR52], idesc[UR53], !UPT ;
        /*0020*/ MUFU.EX2 R4, R4 ;
        /*0030*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR15+0x18200], R4 ;
        /*0040*/ @P0 BRA 0x0 ;
        /*0050*/ EXIT ;
    """
    (loop,) = hot_loops(parse(code))
    tiles = TileLoop((Product(128, 64, 16), Product(128, 64, 16, held=True)))
    clocks = model.estimate("sm_100", loop, PROGRAM, tiles).clocks
    assert clocks.tensor == max(64 / 2, 64 / 4 + 32) + 64 / 2
    assert clocks.shared == 64 / 4 + 32 + 64 / 4
    assert clocks.under == 2 * 8
    assert model.shapes(loop, tiles) == {(128, 64, 16): 2}
    assert model.machine_macs(loop, 8) is None
    assert model.estimate("sm_120", loop, PROGRAM, tiles) is None


def test_loads_awaited_at_once_cost_their_latency():
    sass, ttgir = ours()
    at_once = sass.replace("SB0, 0x2", "SB0, 0x0")
    one = model.Program(8, 255, 200_000)
    (ahead,), (late,) = inspect("sm_90", sass, ttgir, one), inspect("sm_90", at_once, ttgir, one)
    assert (ahead.prefetch, late.prefetch) == (1, 0)
    assert late.clocks["total"] - ahead.clocks["total"] == model.LATENCY
    assert "prefetch 0" in late.misses()


def test_a_kernel_of_ours():
    (loop,) = inspect("sm_90", *ours(), model.Program(8, 117, 73_728))
    assert loop.instructions == sum(loop.classes.values()) == 105
    assert loop.matrix == {"64x64x16": 4}
    assert (loop.useful, loop.redundancy, loop.narrow, loop.spills) == (128 * 64 * 64, 1, 0, 0)
    assert (loop.clocks["tensor"], loop.programs) == (4 * 2 * 64 / 2, 2)
    assert loop.misses() == ["8 selects without a mask"]


def test_warps_that_repeat_a_product_are_redundant():
    """Four groups of warps, each with the rows that two would have."""
    (loop,) = inspect("sm_90", *ours(), model.Program(16, 64, 73_728))
    assert loop.redundancy == 2
    assert "redundancy 2.00" in loop.misses()


def test_an_unrolled_loop_does_the_work_of_several_iterations():
    sass, ttgir = ours()
    lines = sass.splitlines()
    first, last = (next(at for at, line in enumerate(lines) if f"/*{a:04x}*/" in line) for a in (0xF10, 0x1590))
    body = [line.partition("*/")[2] for line in lines[first:last]]
    code = [f"/*{16 * at:04x}*/ {line}" for at, line in enumerate([*body, *body, "@!P0 BRA 0x0 ;"])]
    (once,), (twice,) = (inspect("sm_90", text, ttgir, PROGRAM) for text in (sass, "\n".join(code)))
    assert twice.useful == 2 * once.useful
    assert (twice.redundancy, twice.narrow, twice.prefetch) == (1, 0, 1)


def test_narrow_loads_are_those_of_blocks():
    sass, ttgir = ours()
    narrow = sass.replace("LDGSTS.E.BYPASS.128", "LDGSTS.E.64")
    (loop,) = inspect("sm_90", narrow, ttgir, PROGRAM)
    assert loop.narrow == 6
    rows = sass.replace("BAR.SYNC.DEFER_BLOCKING 0x0", "LDG.E R2, desc[UR14][R20.64]", 1)
    assert inspect("sm_90", rows, ttgir, PROGRAM)[0].narrow == 0


@pytest.mark.parametrize("factor", ["shared memory", "registers"])
def test_the_loop_with_fewest_selects_has_no_mask(factor):
    """Of equal products, wherever a factor stands in one of the loops."""
    sass, ttgir = ours()
    other = ttgir
    if factor == "registers":
        other = re.sub(r"!ttg.memdesc<(\w+), #shared, #smem, mutable> \*", r"tensor<\1, #ttg.dot_op<{}>> *", ttgir)
        assert other != ttgir
    start, end = 0xF10, 0x15A0
    first = [i for i in parse(sass) if start <= i.address < end]
    masked = [*first[:-1], Instruction(0, None, "FSEL", "R1, R2, R3, P0"), first[-1]]
    code, at = [], 0
    for part in (masked, first):
        header = at
        for i in part:
            operands = f"0x{header:x}" if i.opcode == "BRA" else i.operands
            code.append(f"/*{at:04x}*/ {'@' + i.predicate if i.predicate else ''} {i.opcode} {operands} ;")
            at += 16
    found = inspect("sm_90", "\n".join(code), ttgir + other, PROGRAM)
    assert [loop.mask_free for loop in found] == [False, True]
    assert [loop.selects for loop in found] == [9, 8]


def test_bulk_copies_ahead_of_a_loop():
    (loop,) = tile_loops(BULK)
    assert [product[:3] for product in loop.products] == [(128, 64, 128), (128, 128, 64)]
    assert [product.held for product in loop.products] == [False, True]
    assert (loop.bulk_ahead, loop.bulk_bytes) == (1, 64 * 128 * 2)
    lines = BULK.splitlines()
    first = next(at for at, line in enumerate(lines) if "async_tma" in line)
    assert tile_loops("\n".join(lines[:first] + lines[first + 1 :]))[0].bulk_ahead == 0


def test_products_of_plain_threads_are_none_of_the_matrix_units():
    assert tile_loops(BULK.replace("#mma", "#blocked")) == []


def test_useful_work_is_what_attention_asks_for():
    """Blocks of queries by blocks of keys, times the widths of keys and of values, on every target."""
    kernel_calls.compiled(
        """
import torch
from flashgau.kernels.attention import attention_forward
from flashgau.kernels.common import Config
from flashgau.tuning.ahead import compiling_for

q, v = (torch.empty(1, 2, 1024, d, dtype=torch.bfloat16, device="meta") for d in (64, 128))
for target, stages in (("sm_90", 3), ("sm_80", 2), ("sm_100", 2)):
    with compiling_for(target) as compiled:
        attention_forward(q, q, v, causal=True, config=Config(64, 32, 4, stages))
    (kernel,) = compiled
    assert len(kernel.loops) == 2
    for loop in kernel.loops:
        assert loop.useful == 64 * 32 * (64 + 128), loop
        assert loop.redundancy in (1, None), loop
    assert sum(loop.mask_free for loop in kernel.loops) == 1
    assert kernel.hot_spills == 0
"""
    )


# ---- what counts as worse


def row(**changes: Any) -> dict[str, Any]:
    """A recorded loop."""
    found = {
        "target": "sm_90", "kernel": "attention_forward", "dtype": "bf16", "shape": "D=128, causal", "loop": 0,
        "configuration": "128x64, 8 warps, 3 stages", "instructions": 400, "useful": 2**21, "redundancy": 1.0,
        "prefetch": 1.0, "spills": 0, "exps": 34, "exps_under": 34, "total": 1500.0, "rate": 700.0,
    }  # fmt: skip
    return found | changes


PLACE = [("sm_90", "attention_forward", "bf16", "D=128, causal")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instructions": 421}, "421 instructions, recorded 400"),
        ({"total": 1576.0}, "1576 modelled clocks, recorded 1500"),
        ({"redundancy": 1.5}, "redundancy 1.50, recorded 1.00"),
        ({"spills": 1}, "1 spills, recorded 0"),
        ({"prefetch": 0.0}, "prefetch 0, recorded 1"),
        ({"exps_under": 30}, "exp under products 88%, recorded 100%"),
        ({"useful": 2**20, "configuration": "64x64", "total": 800.0}, "(per product 1.07x)"),
    ],
)
def test_what_is_worse(changes, words):
    found = against.compare([row(**changes)], [row()], PLACE)
    assert len(found.worse) == 1
    assert words in found.worse[0]
    assert "attention_forward, bf16, D=128, causal, loop 0" in found.worse[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"instructions": 420, "total": 1574.0},
        {"instructions": 100, "total": 900.0, "prefetch": 2.0},
        {"useful": 2**22, "configuration": "128x128, 8 warps, 2 stages", "instructions": 800, "total": 2900.0},
    ],
)
def test_what_is_not_worse(changes):
    found = against.compare([row(**changes)], [row()], PLACE)
    assert found == against.Changes([], [], [])
    assert found.lines() == ["no loop is worse than recorded"]


def test_loops_that_are_new_or_gone():
    before = [row(), row(loop=1), row(shape="D=64, causal")]
    found = against.compare([row(), row(loop=2)], before, PLACE)
    assert not found.worse
    assert [line[-6:] for line in found.new] == ["loop 2"]
    assert [line[-6:] for line in found.gone] == ["loop 1"]  # what was not compiled is not missed
    elsewhere = row(target="sm_80")
    assert not against.compare([elsewhere], before, []).new  # of a target of which nothing is recorded


def test_fp16_is_recorded_where_it_differs():
    half = row(dtype="fp16")
    assert against.without_equals([row(), half, half | {"loop": 1}]) == [row(), half | {"loop": 1}]
    place = [("sm_90", "attention_forward", "fp16", "D=128, causal")]
    assert against.compare([half], [row()], place) == against.Changes([], [], [])
    assert against.compare([half | {"spills": 2}], [row()], place).worse


# ---- what a loop is held to


def hot(**changes: Any) -> HotLoop:
    (loop,) = inspect("sm_90", SKEWED, "", PROGRAM)
    return dataclasses.replace(loop, **{"exps_under": 3} | changes)


@pytest.mark.parametrize(
    ("changes", "misses"),
    [
        ({}, []),
        ({"spills": 2}, ["2 spills"]),
        ({"redundancy": 1.02}, ["redundancy 1.02"]),
        ({"narrowest": 16}, ["N 16"]),
        ({"prefetch": 0.5}, ["prefetch 0.5"]),
        ({"selects": 1}, ["1 selects without a mask"]),
        ({"selects": 1, "mask_free": False}, []),
        ({"narrow": 4}, ["4 narrow loads"]),
        ({"exps_under": 2}, ["exp 67% under products"]),
        ({"exps_under": 0, "exps": 0}, []),
    ],
)
def test_what_a_loop_is_held_to(changes, misses):
    assert hot(**changes).misses(skewed=True) == misses
    assert hot(exps_under=0).misses(skewed=False) == []


def test_a_recorded_file_is_compact(tmp_path):
    from flashgau.cli.instruments import loops

    (loop,) = inspect("sm_90", *ours(), PROGRAM)
    full = {name: row()[name] for name in ("target", "kernel", "dtype", "shape", "loop", "configuration")}
    full |= dataclasses.asdict(loop)
    loops.record(tmp_path / "new" / "loops.json", [full, {**full, "dtype": "fp16"}, {**full, "loop": None}])
    (read,) = loops.read(tmp_path / "new" / "loops.json")
    assert read.keys() == row().keys()
    assert math.isclose(read["total"], loop.clocks["total"])
    assert len((tmp_path / "new" / "loops.json").read_text().splitlines()) == 3  # of fp16 nothing differs
    (tmp_path / "whole.json").write_text(json.dumps({**loops.SCHEMA, "rows": [full]}))
    assert loops.read(tmp_path / "whole.json") == [read]
    for text in ("{", "[]", '{"schema": "flashgau-compile", "schema_version": 1, "rows": []}'):
        (tmp_path / "none.json").write_text(text)
        with pytest.raises(ValueError, match="holds no recorded loops"):
            loops.read(tmp_path / "none.json")

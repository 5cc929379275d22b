"""The table of operations: how programs share a GPU, how rows are held to recorded ones, and its floors."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

pytest.importorskip("triton")
from flashgau.cli import main
from flashgau.cli.instruments import operations
from flashgau.ptx import Program
from flashgau.roof import Row, against, clocks, report
from flashgau.roof.cases import cases
from flashgau.roof.schedule import makespan
from flashgau.sass import HotLoop
from flashgau.sass.model import MACHINES


def test_programs_take_turns():
    """By hand: two multiprocessors with one program each; 3 ends first, and its place is taken by 4, then 5's by 1."""
    assert makespan([5, 3, 4, 1], [0] * 4, 2, 1) == 7
    assert makespan([7, 1, 1, 1, 1], [0] * 5, 2, 1) == 7
    assert makespan([1, 1, 1, 1, 7], [0] * 5, 2, 1) == 9  # the longest last
    assert makespan([], [], 2, 1) == 0


def test_programs_that_share_fill_each_others_gaps():
    assert makespan([10, 10], [5, 5], 1, 2) == 10  # each has a pipe for half of the time
    assert makespan([10, 10], [8, 8], 1, 2) == 16  # but not for more
    assert makespan([10, 10], [8, 8], 2, 2) == 10  # one on each comes first
    # Together they take 16 and 32; after 16 the second is half done, and by itself it takes 20.
    assert makespan([10, 20], [8, 16], 1, 2) == pytest.approx(26)
    # Together both take 20; then the third is by itself.
    assert makespan([12, 16, 12.5], [10, 10, 10], 1, 2) == pytest.approx(32.5)


def test_equal_programs_run_in_waves():
    for count, processors, resident in ((1, 3, 2), (6, 3, 2), (7, 3, 2), (13, 3, 2), (400, 132, 2)):
        nearly = [10.0] * (count - 1) + [10.0 + 1e-6]  # which is simulated
        equal = makespan([10.0] * count, [7.0] * count, processors, resident)
        assert makespan(nearly, [7.0] * count, processors, resident) == pytest.approx(equal, rel=1e-3)
    assert makespan([10.0] * 13, [7.0] * 13, 3, 2) == 14 + 14 + 10


PTX = """
.version 8.0
.target sm_90
.visible .entry loops(.param .u32 n) .reqntid 128 {
  .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .pred %p<2>;
  ld.param.b32 %r1, [n];
  mov.u32 %r2, %ctaid.x;
  add.u32 %r1, %r1, %r2;
  mov.u32 %r3, 0;
$again:
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {%f1,%f2,%f3,%f4}, {%r4,%r5,%r6,%r7}, {%r4,%r5}, {%f1,%f2,%f3,%f4};
  add.u32 %r3, %r3, 1;
  setp.lt.u32 %p1, %r3, %r1;
  @%p1 bra $again;
  add.u32 %r3, %r3, 1;
  ret;
}
"""


def test_work_of_a_hot_loop():
    """Iterations by the branches of each program, clocks of the loop by the model, one of every other instruction."""
    program, counts = clocks_of(PTX, 3, 4)
    body = max(range(len(program.flops)), key=lambda block: program.flops[block])
    assert counts[body].tolist() == [3, 4, 5, 6]
    times = {"alone": 100.0, "busy": 40.0}
    loop = HotLoop(9, {}, {"16x8x16": 2}, None, None, None, None, 0, 0, True, 0, 0, 0, times)
    code = clocks.Code(warps=4, resident=1, loops=(loop,), registers=32, shared_bytes=0)
    done = clocks.work("sm_90", program, counts, code)
    assert done.flop == 2 * 16 * 8 * 16 * 4 * (3 + 4 + 5 + 6)
    rest = done.alone - 100.0 / 2 * np.array([3, 4, 5, 6])  # the machine code has two iterations in one
    assert len(set(rest.tolist())) == 1
    assert 1 <= rest[0] <= 8
    assert (done.busy - 40.0 / 2 * np.array([3, 4, 5, 6])).tolist() == pytest.approx(rest.tolist())
    longest = done.alone.max() / 1.83e9 / 0.8
    assert clocks.seconds("sm_90", done, code, 0, 4.32e9) == pytest.approx((longest, 1e-3))
    through_the_port = clocks.seconds("sm_90", done, code, 4 * 64 * 10_000, 0)
    assert through_the_port == pytest.approx((10_000 / 1.83e9 / 0.8, 0))


def clocks_of(ptx, n, programs):
    from flashgau.ptx.footprint import paths

    program, counts = paths(ptx, (programs, 1, 1), {"n": [("i32", n)]})
    assert isinstance(program, Program)
    return program, counts


def test_floors_by_hand():
    """Of the sizes that the issue of these kernels has its floors for, in ns."""
    floors = {case.key: 1e9 * clocks.floor_seconds("sm_90", case.flop, case.moved(2)) for case in cases()}
    expected = {
        "gau_attention forward B1 N16384 S128 E2048 causal": 16384 * 2176 / 791.6e3,
        "gau_attention backward B1 N16384 S128 E2048 causal": 16384 * (3 * 128 + 2 * 2048) / 791.6e3,
        "mixed_chunk_attention forward B1 N16384 S128 E2048 C256 causal": 13_312 / 4320,
        "glu forward swiglu 16384 x 4096": 3 * 4096 * 2 / 4320,
        "attention forward B1 H16 D128 N16384 causal": 2 * 16 * 128 * 16384 / 791.6e3,
    }
    for key, value in expected.items():
        assert floors[key] == pytest.approx(value, rel=2e-3), key
    assert len(floors) == len(list(cases()))


ROW = Row(
    "sm_90", "gau_attention", "forward", "B1", "bf16", launches=32, own=32, programs=64, smallest="product_kernel",
    bytes=5e4, panel_bytes=3e4, flop=3.6e7, ns=110.0, floor=45.0, ratio=2.4, sources={"ns": "model"},
    details=[{"kernel": "k"}],
)  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """Rows are there at once: what `change` makes of `ROW`."""
    changes = {}

    def all_of(work, processes=None):
        for task in work:
            case = task.what
            yield replace(ROW, op=case.op, direction=case.direction, shape=case.shape, **changes)

    monkeypatch.setattr("flashgau.roof.examine_all", all_of)
    return changes


COMMAND = ["compile", "--operations", "--op", "glu"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"launches": 34}, "34 launches, recorded 32"),
        ({"bytes": 5.3e4}, "5.3e+04 bytes of HBM per token, recorded 5e+04"),
        ({"ns": 116.0}, "116 modelled ns per token, recorded 110"),
        ({"programs": 60}, "60 programs in the smallest launch, recorded 64"),
        ({"reason": "it crashed"}, "it crashed"),
    ],
)
def test_what_got_worse_fails(made, tmp_path, capsys, change, what):
    file = tmp_path / "operations.json"
    assert main([*COMMAND, "--out", str(file)]) == 0
    assert main([*COMMAND, "--against", str(file)]) == 0
    assert "no operation is worse than recorded" in capsys.readouterr().out
    made |= change
    assert main([*COMMAND, "--against", str(file), "--json"]) == 1
    worse = json.loads(capsys.readouterr().out)["against"]["worse"]
    assert len(worse) == 4
    assert all(line.endswith(what) for line in worse)


def test_what_grew_little_or_became_better_does_not(made, tmp_path):
    file = tmp_path / "operations.json"
    assert main([*COMMAND, "--out", str(file)]) == 0
    made |= {"launches": 33, "bytes": 5.2e4, "ns": 50.0, "programs": 61, "panel_bytes": 1e6}
    assert main([*COMMAND, "--against", str(file)]) == 0


def test_fewer_programs_are_enough_above_the_multiprocessors():
    old = operations.recorded(replace(ROW, programs=1000))
    few, enough = ({**old, "programs": programs} for programs in (125, 126))
    assert few["programs"] < MACHINES["sm_90"].sms / 1.05 < enough["programs"]
    assert against.compare([few], [old], [against.place(few)]).worse
    assert not against.compare([enough], [old], [against.place(enough)]).worse


def test_new_and_gone_rows_are_told():
    old = operations.recorded(ROW)
    new, other = {**old, "shape": "B2"}, {**old, "op": "glu"}
    changes = against.compare([new], [old, other], [against.place(new)])
    assert (len(changes.new), len(changes.gone), changes.worse) == (1, 1, [])  # of glu nothing was asked
    assert changes.lines()[0].startswith("new: sm_90, gau_attention")


def test_what_is_recorded_is_read_again(tmp_path):
    file = tmp_path / "operations.json"
    operations.record(file, [operations.recorded(ROW)])
    (row,) = operations.read(file)
    assert {**row, "details": ROW.details} == asdict(ROW)
    for text in ("{}", "nothing", json.dumps({**operations.SCHEMA, "rows": [{"op": "glu"}]})):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no recorded operations"):
            operations.read(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compile --operations --loops", "--loops and --operations are given; expected one of them"),
        ("compile --operations --target gfx942", "gfx942 is not modelled; expected NVIDIA GPUs up to sm_90"),
        ("compile --operations --target sm_100", "sm_100 is not modelled"),
        ("compile --operations --op attention --dtype fp8", "expected some of bf16, fp16 and fp32"),
    ],
)
def test_wrong_use_is_refused(arguments, message, capsys):
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_panels_count_where_they_leave_the_cache(monkeypatch):
    """A panel that the last cache holds is told apart; a larger one is traffic."""
    from flashgau.ptx.footprint import Touched

    one = report.Kernel("k", (4, 1, 1), PTX, clocks.Code(4, 1, (), 32, 0), {"n": [("i32", 1)]})
    for size, expected in ((50 * 2**20, (300, 70)), (50 * 2**20 + 1, (370, 0))):
        touched = {"x": Touched(100, 200, 300, 0), "panel": Touched(30, 40, size, 0)}
        found = report._of_kernel("sm_90", one, report._work("sm_90", one), (touched, "by hand"))
        assert (found["bytes"], found["panel_bytes"]) == expected


def test_series_between_whose_ends_work_lies_on_no_line_are_executed(monkeypatch):
    """Of five launches three are executed, and the others lie between; unless their FLOP do not."""
    from flashgau.ptx.footprint import Touched

    executed = []

    def footprint(ptx, grid, values):
        executed.append(grid[0])
        return {"x": Touched(10 * grid[0], grid[0], 1000, 100 * grid[0])}

    monkeypatch.setattr(report.footprint, "footprint", footprint)
    series = [report.Kernel("k", (i, 1, 1), "ptx", None, {}) for i in range(1, 6)]
    for flop, expected in (([1, 2, 3, 4, 5], [1, 3, 5]), ([1, 2, 1, 2, 1], [1, 2, 3, 4, 5])):
        found = report._touched(series, dict(zip(map(id, series), flop, strict=True)))
        assert executed == expected
        assert [found[id(one)][0]["x"] for one in series] == [Touched(10 * i, i, 1000, 100 * i) for i in range(1, 6)]
        executed.clear()

"""What launches touch and how often their loops run, from branches and addresses alone, beside whole executions."""

import pytest
import torch
import triton
import triton.language as tl
from flashgau.kernels.attention import attention_forward
from flashgau.kernels.gau import gau_attention_backward, gau_attention_forward
from flashgau.kernels.mixed_chunk import mixed_chunk_attention_forward
from strategies import randn

from flashgau import kernels, tables
from flashgau.ptx import UnknownInstruction, executing, footprint
from flashgau.roof import examine, launches, tasks
from flashgau.sass.model import MACHINES
from flashgau.tables.config import Config

BF16 = torch.bfloat16


@triton.jit
def overlapping_kernel(x, out, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Each program reads BLOCK numbers, of which its neighbour reads some again, and its own result back."""
    o = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    b_x = tl.load(x + o, o < n, other=0.0) + tl.load(x + o, o < n, other=0.0)
    o_out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o_out, b_x)
    tl.debug_barrier()
    tl.store(out + o_out, tl.load(out + o_out) + 1.0)


@triton.jit
def triangle_kernel(x, counts, out, BLOCK: tl.constexpr):
    """Program i adds up i + counts[0] blocks."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tl.program_id(0) + tl.load(counts)):
        b_sum += tl.load(x + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), b_sum)


def recorded(call, target="sm_90"):
    """The launches of our kernels in a call on tensors without values."""
    with launches.recording(target) as found:
        call()
    return [one for one in found if isinstance(one, launches.Kernel)]


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_bytes_of_a_kernel_made_by_hand(target):
    """4 programs of 64 numbers, 32 apart: 160 numbers of x in all, each read twice or four times, 256 of out written
    twice and read after that."""
    x, out = randn(0, 160), torch.zeros(256)
    with executing(target) as executed:
        overlapping_kernel[(4,)](x, out, 160, STEP=32, BLOCK=64)
    counts = executed.counts
    assert (counts.distinct_read_bytes, counts.distinct_written_bytes) == (160 * 4, 256 * 4)
    assert counts.read_bytes > counts.distinct_read_bytes
    (one,) = recorded(lambda: overlapping_kernel[(4,)](empty(160), empty(256), 160, STEP=32, BLOCK=64), target)
    touched = footprint.footprint(one.ptx, one.grid, one.values)
    assert touched["x"] == footprint.Touched(640, 0, 640, touched["x"].asked)
    assert (touched["out"].read, touched["out"].written) == (0, 1024)
    asked = sum(x.asked for x in touched.values())
    assert asked == counts.read_bytes + counts.written_bytes


def test_iterations_of_every_program():
    counts = torch.tensor([2], dtype=torch.int32)
    (one,) = recorded(lambda: triangle_kernel[(5,)](empty(4096), counts, empty(640), BLOCK=128))
    program, times = footprint.paths(one.ptx, one.grid, one.values)
    loop = max(range(len(program.following)), key=lambda block: times[block].max())
    assert times[loop].tolist() == [2, 3, 4, 5, 6]
    touched = footprint.footprint(one.ptx, one.grid, one.values)
    assert (touched["x"].read, touched["counts"].read, touched["out"].written) == (6 * 512, 32, 5 * 512)
    (one,) = recorded(lambda: triangle_kernel[(5,)](empty(4096), empty(1, dtype=torch.int32), empty(640), BLOCK=128))
    with pytest.raises(UnknownInstruction, match="integers of a tensor without values"):
        footprint.paths(one.ptx, one.grid, one.values)


def small(kernel, x, width, rows=None, options=False):
    return Config(64, 64 if "gau" in kernel or "mixed" in kernel else 32, block_k=32, asynchronous="forward" in kernel)


def calls(make):
    q, v = make(1, 96, 64), make(1, 96, 128)
    heads, wide = make(4, 1, 96, 64), make(1, 2, 96, 64)
    gau = {"score": "relu2", "normalizer": "keys", "causal": True}
    chunks = {"chunk_size": 64, "causal": True}
    return {
        "attention": lambda: attention_forward(wide, make(1, 2, 96, 64), make(1, 2, 96, 64), causal=True),
        "gau": lambda: gau_attention_forward(q, make(1, 96, 64), v, make(1, 96, 128), **gau, save=True),
        "gau backward": lambda: gau_attention_backward(
            make(1, 96, 128), q, make(1, 96, 64), v, make(1, 96, 128), make(1, 96, 128), **gau
        ),
        "mixed": lambda: mixed_chunk_attention_forward(heads, v, make(1, 96, 128), **chunks, save=True),
    }


@pytest.mark.parametrize(
    ("call", "target"),
    [("attention", "sm_80"), ("attention", "sm_90"), ("gau", "sm_80"), ("gau backward", "sm_90"), ("mixed", "sm_90")],
)
def test_the_slice_agrees_with_the_whole(call, target, monkeypatch):
    """Launches, grids, products and bytes of our kernels: executed whole, and their branches and addresses alone."""
    monkeypatch.setattr(kernels.executed, "processors", MACHINES[target].sms)
    with executing(target) as executed, tables.configured(small):
        calls(lambda *shape: randn(0, *shape, dtype=BF16))[call]()
    with launches.recording(target) as found, tables.configured(small):
        calls(lambda *shape: empty(*shape, dtype=BF16))[call]()
    ours = [one for one in found if isinstance(one, launches.Kernel)]
    assert [(one.name, one.grid) for one in ours] == [(one.kernel, one.grid) for one in executed.launches]
    for one, whole in zip(ours, executed.launches, strict=True):
        program, times = footprint.paths(one.ptx, one.grid, one.values)
        flops = sum(f * n for f, n in zip(program.flops, times.sum(1), strict=True)) * program.kernel.threads // 32
        assert flops == whole.counts.matrix_flops, one.name
        touched = footprint.footprint(one.ptx, one.grid, one.values)
        read, written = (sum(getattr(x, name) for x in touched.values()) for name in ("read", "written"))
        assert read == pytest.approx(whole.counts.distinct_read_bytes, abs=64), one.name
        assert written == pytest.approx(whole.counts.distinct_written_bytes, abs=64), one.name


def test_one_row_in_earnest():
    (task,) = [t for t in tasks(["sm_90"], ("bf16",), frozenset({"norm"})) if "forward scalenorm" in t.case]
    row = examine(task)
    assert row.reason is None
    assert (row.launches, row.own, row.smallest) == (1, 1, "norm_kernel")
    (kernel,) = row.details
    assert kernel["bytes"] == 2 * 16384 * 1024 * 2 + 32  # x, the result, and a weight of one number
    assert row.bytes == kernel["bytes"] / 16384
    assert row.ns == pytest.approx(kernel["us"] * 1e3 / 16384)
    assert kernel["us"] == pytest.approx(2 + max(kernel["memory_us"], kernel["processors_us"]))
    assert 1 < row.ratio == row.ns / row.floor
    assert set(row.sources) == {"launches", "programs", "bytes", "flop", "ns", "floor"}


def test_what_pytorch_launches_is_recorded():
    """Products with their FLOP, also where the result's memory is given; views and new memory launch nothing."""
    a, b = empty(6, 4), empty(4, 5)
    with launches.recording("sm_90") as found:
        out = empty(3, 5).new_empty(6, 5)
        torch.mm(a, b, out=out)
        torch.nn.functional.linear(a, b.T, out[0]).T.reshape(-1)[3:]
        a.zero_()
    assert [(one.name, one.flop, one.read, one.written) for one in found] == [
        ("mm", 2 * 6 * 4 * 5, 4 * 44, 4 * 30), ("addmm", 2 * 6 * 4 * 5, 4 * 49, 4 * 30), ("clone", 0, 120, 120),
        ("zero_", 0, 0, 96),
    ]  # fmt: skip

"""`flashgau.tuning.search`: candidates for a kernel of one's own, and the entries of such kernels in tables."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import tuning_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tuning_tables import CPU, chosen, user_table

pytest.importorskip("triton")
import triton
import triton.language as tl
from flashgau.kernels.attention import attention_forward
from flashgau.kernels.common import chosen_by

import flashgau
from flashgau import tables, tuning
from flashgau.cli import main
from flashgau.tables import table
from flashgau.tables.config import Config
from flashgau.tables.table import Key, TableEntry
from flashgau.verification import candidates, configurations
from flashgau.verification import checking as check
from flashgau.verification.own import default_space

folder = tuning_tables.folder
interpreted = tuning_tables.interpreted

SPACE = [Config(m, n, 4, 1) for m in (16, 32, 64) for n in (16, 32)]
X = torch.linspace(-2, 2, 40 * 24).view(40, 24)


def naive(x: Tensor) -> Tensor:
    return x.exp() * 2


def launcher_of(fate: Callable[[Config], str]) -> Callable[..., Tensor]:
    """A launcher whose results are right, wrong or none, by its configuration; it notes what it is called with."""

    def launcher(x: Tensor, config: Any = None) -> Tensor:
        found = chosen_by(config)("mine", x, x.shape[-1])
        launcher.last = found  # type: ignore[attr-defined]
        if fate(found) == "fails":
            raise RuntimeError("out of something")
        return naive(x) * (1.01 if fate(found) == "wrong" else 1)

    return launcher


def ranked_by(launcher: Any, times: Callable[[Config], float], **changes: Any) -> Any:
    """A search with a clock that looks at what is launched."""
    timed: list[Config] = []

    def clock(call: Callable[[], object]) -> float:
        call()
        timed.append(launcher.last)
        return times(launcher.last)

    options: dict[str, Any] = {"reference": naive, "kernel": "mine", "space": SPACE, "clock": clock}
    return tuning.search(launcher, (X,), **(options | changes)), timed


FATES = st.lists(
    st.tuples(st.sampled_from(["right", "wrong", "fails"]), st.integers(1, 1000)),
    min_size=len(SPACE),
    max_size=len(SPACE),
)


@given(FATES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_candidates_are_ranked_by_time_and_what_is_wrong_is_never_timed(folder, fates):
    tables.user_path(CPU).unlink(missing_ok=True)
    tables.reload()
    fate_of = dict(zip(SPACE, fates, strict=True))
    found, timed = ranked_by(launcher_of(lambda c: fate_of[c][0]), lambda c: float(fate_of[c][1]))
    right = [c for c in SPACE if fate_of[c][0] == "right"]
    assert timed == right
    assert sorted(row.config.block_m for row in found.rows) == sorted(c.block_m for c in SPACE)
    assert [row.ms for row in found.rows[: len(right)]] == sorted(float(fate_of[c][1]) for c in right)
    for row in found.rows:
        fate = fate_of[row.config][0]
        assert (row.reason is None, row.ms is None) == (fate == "right", fate != "right")
        assert row.max_error is None if fate == "fails" else (row.max_error <= row.tolerance) == (fate == "right")
        expected = {"right": "", "wrong": "out is off by", "fails": "RuntimeError: out of something"}[fate]
        assert expected in (row.reason or "")
        assert (row.reason or "") in str(found)
    assert bool(found) == bool(right)
    if right:
        assert fate_of[found.best][1] == min(fate_of[c][1] for c in right)
        assert chosen("mine", 24) == chosen("mine", 32) == found.best
        assert table.read(found.path).entries == {Key("mine", 4, 32): found.entry}
    else:
        assert found.best is found.path is None
        with pytest.raises(ValueError, match=r"flashgau\.tuning\.search\(launcher.*kernel='mine'"):
            chosen("mine", 24)
    assert json.loads(json.dumps(found.to_dict()))["key"]["kernel"] == "mine"


def test_the_entry_stays_unless_something_is_gained(folder):
    """What the table has takes part, also if the space has it not."""
    had, near, far = Config(128, 16, 4, 1), Config(64, 32, 4, 1), Config(64, 16, 4, 1)
    table.write(tables.user_path(CPU), user_table(entries={Key("mine", 4, 32): TableEntry(had)}))
    tables.reload()
    launcher = launcher_of(lambda c: "right")
    found, timed = ranked_by(launcher, lambda c: {had: 1.0, near: 0.99}.get(c, 2.0))
    assert timed == [*SPACE, had]
    assert found.entry == TableEntry(had, 1.0, 1.0)
    found, _ = ranked_by(launcher, lambda c: {had: 1.0, far: 0.5}.get(c, 2.0))
    assert found.entry == TableEntry(far, 0.5, 1.0)
    assert "best: 64x16x32, 4 warps, 1 stage, 2.00x; written to" in str(found)
    assert chosen("mine", 32) == far


def test_the_report_is_readable(folder):
    fates = {16: "right", 32: "wrong", 64: "fails"}
    found, _ = ranked_by(launcher_of(lambda c: fates[c.block_m]), lambda c: c.block_n / 8, write=False)
    head, columns, first, second, *others, last = str(found).splitlines()
    assert head == "mine (32 bit, width 32) on interpreter: 2 of 6 candidates are right"
    assert columns.split()[:2] == ["configuration", "ms"]
    assert first.startswith("  1* 16x16x32, 4 warps, 1 stage")
    assert second.startswith("  2  16x32x32, 4 warps, 1 stage")
    assert all(line.startswith("   - ") for line in others)
    assert last == "best: 16x16x32, 4 warps, 1 stage"
    assert max(map(len, str(found).splitlines())) < 140
    assert not tables.user_path(CPU).exists()


def test_ctrl_c_keeps_the_best_so_far(folder):
    launcher = launcher_of(lambda c: "right")

    def times(config: Config) -> float:
        if config == SPACE[3]:
            raise KeyboardInterrupt
        return 10.0 - config.block_m / 16

    with pytest.raises(KeyboardInterrupt):
        ranked_by(launcher, times)
    assert chosen("mine", 32) == SPACE[2]


def test_an_error_that_breaks_the_device_ends_the_trying(folder, monkeypatch):
    """As a GPU does after an illegal access. What was timed before counts."""

    def failed(self: candidates.Bench, error: Exception) -> str:
        self.broken = True
        return str(error)

    monkeypatch.setattr(candidates.Bench, "failed", failed)
    found, timed = ranked_by(launcher_of(lambda c: "fails" if c == SPACE[2] else "right"), lambda c: 1.0 + c.block_n)
    assert timed == SPACE[:2]
    assert found.best == SPACE[0]
    assert [row.reason[:9] for row in found.rows[2:]] == ["out of so", *["not tried"] * 3]


def test_only_the_kernel_of_that_name_gets_the_candidate(folder):
    """A launcher with two kernels, one of them ours, and a configuration used as it is."""
    seen = []

    def launcher(x: Tensor, config: Any = None) -> Tensor:
        choose = chosen_by(config)
        other = choose("attention_dq", x, 64, rows=100)
        seen.append((choose("mine", x, 100, rows=3, options=True), other, config.block_m, config.launch()))
        return naive(x)

    usual = tables.choose("attention_dq", X, 64)
    found = tuning.search(launcher, (X,), reference=naive, kernel="mine", space=SPACE, clock=lambda call: call() or 1.0)
    assert found.key == Key("mine", 4, 128, True, True)  # as asked, and rounded up to a class
    for mine, other, block_m, launch in seen:
        assert mine in SPACE
        assert other == usual
        assert (block_m, launch) == (mine.block_m, mine.launch())
    assert chosen("mine", 128, rows=1, options=True) == found.best
    with pytest.raises(ValueError, match="mine"):
        chosen("mine", 128)  # what was measured for few rows does not serve many


def test_a_launcher_that_never_asks_for_the_kernel_says_so(folder):
    def launcher(x: Tensor, config: Any = None) -> Tensor:
        chosen_by(config)("attention_dq", x, 64)
        return naive(x)

    found = tuning.search(launcher, (X,), reference=naive, kernel="mine", space=SPACE, clock=lambda call: 1.0)
    assert not found
    assert {row.reason for row in found.rows} == {"RuntimeError: the launcher asked for attention_dq, never for mine"}


def test_a_small_call_is_checked_and_a_large_one_timed(folder):
    calls = []

    def launcher(x: Tensor, y: Tensor, config: Config, twice: bool) -> dict[str, Tensor]:
        calls.append(len(x))
        return {"sum": x + y, "more": x * (1 + twice)}

    def both(x: Tensor, y: Tensor, twice: bool) -> dict[str, Tensor]:
        return {"sum": x + y, "more": x * 2}

    options: dict[str, Any] = {"reference": both, "kernel": "sums", "kwargs": {"twice": True}, "space": SPACE[:2]}
    found = tuning.search(
        launcher, (X, X), check_args=(X[:3], X[:3]), clock=lambda call: call() or 1.0, width=64, **options
    )
    assert found.key == Key("sums", 4, 64)
    assert calls == [3, 40, 3, 40]
    options["kwargs"] = {"twice": False}
    assert "more is off by" in tuning.search(launcher, (X, X), **options).rows[0].reason


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"launcher": lambda x: x}, TypeError, "takes no `config`"),
        ({"kernel": "my kernel"}, ValueError, "'my kernel'"),
        ({"kernel": "glu_linear_fused"}, ValueError, "glu_linear_fused"),
        ({"space": []}, ValueError, "`space` is empty"),
        ({"args": (torch.arange(3), 2)}, ValueError, "floating tensor"),
        ({"target": "abacus"}, ValueError, "abacus"),
        ({"reference": lambda x: x @ x}, RuntimeError, "shapes"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_tried(changes, error, words, folder):
    options = {"launcher": launcher_of(lambda c: "right"), "args": (X,), "reference": naive, "kernel": "mine"} | changes
    launcher, args = options.pop("launcher"), options.pop("args")
    with pytest.raises(error, match=words):
        tuning.search(launcher, args, clock=lambda call: pytest.fail("timed"), **options)


def test_what_the_table_would_refuse_is_out(folder):
    found, timed = ranked_by(
        launcher_of(lambda c: "right"), lambda c: 1.0, space=[Config(16, 16, 4, 9), Config(16, 16)]
    )
    assert timed == [Config(16, 16)]
    assert "`num_stages` is 9; expected 1 to 8" in found.rows[1].reason


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 9), st.integers(1, 400), st.integers(1, 300))
@settings(max_examples=30)
def test_the_default_space_has_no_block_longer_than_the_call(dtype, heads, length, width):
    for device in ("meta", "cpu"):
        found = default_space(torch.empty(heads, length, width, dtype=dtype, device=device))
        assert len(set(found)) == len(found) >= 1
        for config in found:
            assert 16 <= config.block_m <= max(16, 2 * max(heads, length) - 1)
            assert config.block_m & (config.block_m - 1) == config.block_n & (config.block_n - 1) == 0
            assert max(config.block_m, config.block_n) <= (64 if dtype == torch.float32 or width > 128 else 128)


# ---- the tables


@given(
    st.dictionaries(st.sampled_from([0, 16, 64, 512, 1024]), st.integers(4, 9), min_size=1),
    st.integers(1, 1200),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_kernel_of_ones_own_has_the_classes_that_were_measured(folder, widths, asked):
    entries = {Key("mine", 2, w): TableEntry(Config(2**power, 16)) for w, power in widths.items()}
    table.write(tables.user_path(CPU), user_table(entries=entries))
    tables.reload()
    x = torch.empty(1, dtype=torch.float16)
    serving = [w for w in widths if w >= asked]
    if serving:
        assert tables.choose("mine", x, asked) == Config(2 ** widths[min(serving)], 16)
        assert tables.choose("mine", x, asked, rows=1, options=True) == tables.choose("mine", x, asked)
    else:
        with pytest.raises(ValueError, match=r"tuning: mine \(16 bit, width"):
            tables.choose("mine", x, asked)
    with pytest.raises(ValueError, match="mine"):
        chosen("mine", 16)  # of four bytes


def test_an_entry_of_ones_own_disturbs_no_command(folder, capsys):
    """Its name may begin as one of ours does."""
    entries = {Key(name, 4, 64): TableEntry(Config(16, 16), 2.0) for name in ("attention_mine", "mine")}
    table.write(tables.user_path(CPU), user_table(entries=entries))
    tables.reload()
    before = check.select(None, "triton", CPU, False) if os.environ.get("TRITON_INTERPRET") == "1" else []
    assert not [c for c, _ in before if isinstance(c, configurations.Configured) and "mine" in c.key_of_table.kernel]
    assert {"attention_mine", "mine"} <= {row["kernel"] for row in candidates.choices(CPU)}
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert main(["tune", "--device", "cpu", "--show"]) == 0
        assert "attention_mine" in capsys.readouterr().out
        table.merge(tables.user_path(CPU), user_table(entries={tuning_tables.KEY: TableEntry(Config(16, 16))}))
        tables.reload()
        assert main(["tune", "--device", "cpu", "--export", str(folder / "out.json")]) == 0
        assert set(table.read(folder / "out.json").entries) == {tuning_tables.KEY}  # what others have, too


def test_the_package_below_loads_nothing_from_above():
    code = """
import sys, flashgau
assert flashgau.tuning.choose
assert "flashgau.verification" not in sys.modules
assert flashgau.tuning.search.__module__ == "flashgau.verification.own"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- kernels


@triton.jit
def _softplus_kernel(x, out, n, BM: tl.constexpr):
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    value = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out + at, tl.log(1 + tl.exp(value)), mask=at < n)


def softplus(x: Tensor, config: Any = None) -> Tensor:
    out = torch.empty_like(x)
    c = chosen_by(config)("softplus", x, 0)
    programs = x.numel() // c.block_m  # wrong: what is left over is never computed
    _softplus_kernel[(programs,)](x, out.fill_(0), x.numel(), BM=c.block_m, **c.launch())
    return out


@pytest.mark.usefixtures("interpreted")
def test_a_kernel_with_a_mistake_gets_the_blocks_with_which_it_is_right(folder):
    """A jitted function, interpreted: 96 elements are whole blocks of 16 and 32 only."""
    x = torch.linspace(-3, 3, 96)
    found = tuning.search(
        softplus, (x,), reference=lambda x: (1 + x.exp()).log(), kernel="softplus",
        space=[Config(2**i, 1) for i in range(4, 8)], clock=lambda call: call() or 1.0,
    )  # fmt: skip
    assert {row.config.block_m for row in found.rows if row.reason is None} == {16, 32}
    assert torch.allclose(softplus(x), torch.nn.functional.softplus(x), atol=1e-5)  # the table's choice


@pytest.mark.usefixtures("interpreted")
def test_our_own_launchers_are_searched_alike(folder):
    """Beside the entry's neighbours, which stay its default space."""
    q = torch.randn(3, 1, 2, 33, 16).unbind()
    space, times = [Config(16, 16, 4, 1), Config(32, 16, 4, 1)], {16: 1.0, 32: 0.1}
    asked = []

    def clock(call: Any) -> float:
        call()
        return times.get(asked[-1].block_m, 9.0)

    def watched(*args: Any, config: Any = None, **kwargs: Any) -> Any:
        def choose(*a: Any, **k: Any) -> Config:
            asked.append(config(*a, **k))
            return asked[-1]

        return attention_forward(*args, config=choose, **kwargs)

    found = tuning.search(
        watched, q, kwargs={"causal": True}, names=("out", "lse"), space=space, clock=clock,
        reference=lambda *x, causal: flashgau.reference.attention(*x, causal=causal, return_lse=True),
        kernel="attention_forward",
    )  # fmt: skip
    assert found.key == Key("attention_forward", 4, 64)
    assert found.best == Config(32, 16, 4, 1) == chosen()
    assert len(found.rows) == 3  # and the table's
    near = default_space(q[0], "attention_forward")
    assert near[0] == found.best
    assert all(math.log2(c.block_m / 32) in (-1, 0, 1) for c in near)


@pytest.mark.parametrize("kernel", ["glu_forward", "attention_dq", "heads", "mixed_chunk_step"])
def test_every_kernel_of_ours_has_a_default_space_whatever_becomes_of_it(kernel, folder):
    """Also one without heads, and when all candidates fail."""

    def launcher(x: Tensor, config: Any) -> Tensor:
        raise RuntimeError("nothing works")

    found = tuning.search(launcher, (X,), reference=naive, kernel=kernel)
    assert not found
    assert found.key.width == (0 if kernel in ("glu_forward", "heads") else 64)
    assert len(found.rows) == len(default_space(X, kernel)) > 1


COMPILED = """
import torch, triton, triton.language as tl
from flashgau import tuning
from flashgau.kernels.common import Config, chosen_by

@triton.jit
def product_kernel(x, out, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tl.static_assert(BM < 256)
    rows, keys = tl.arange(0, BM), tl.arange(0, BN)
    a = tl.zeros((BM, BN), tl.float32)
    for i in range(0, N, BN):
        b = tl.load(x + rows[:, None] * N + i + keys)
        a += tl.dot(b, tl.trans(b)) if BM == BN else tl.sum(b, 1)[:, None].to(tl.float32)
    tl.store(out + rows[:, None] * BN + keys, a)

def launcher(x, config=None):
    c = chosen_by(config)("product", x, x.shape[-1])
    if x.device.type == "cpu":  # as if this were the GPU
        return x * 2
    product_kernel[(1,)](x, x, 8192, BM=c.block_m, BN=c.block_n, **c.launch())

space = [Config(64, 64, 4, 2), Config(128, 128, 4, 8), Config(16, 64, 4, 1), Config(256, 16, 4, 1)]
x = torch.ones(256, 64, dtype=torch.float16)
found = tuning.search(launcher, (x,), reference=lambda x: x + x, kernel="product", target="sm_80", space=space,
                      clock=lambda call: 1.0, write=False)
rows = {row.config: row for row in found.rows}
assert "bytes of shared memory, the device has 166912" in rows[space[1]].reason, found
assert rows[space[1]].max_error is rows[space[1]].ms is None
for config in (space[0], space[2]):
    assert rows[config].ms == 1.0, found
    needs = rows[config].needs[0]
    assert needs.kernel == "product_kernel" and needs.registers > 0 and needs.spills == 0
    assert "registers, 0 spills" in str(found)
assert rows[space[3]].needs == [] and rows[space[3]].ms == 1.0  # nothing is known before the call itself
assert found.to_dict()["rows"][0]["needs"][0]["target"] == "sm_80"
"""


def test_what_needs_too_much_never_runs(tmp_path):
    """Compiled for a GPU that is not there, in a process that does not interpret."""
    (tmp_path / "own.py").write_text(COMPILED)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "own.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("interpreted")
def test_a_target_in_the_interpreter_is_refused(folder):
    with pytest.raises(ValueError, match="`target` is 'sm_90', but Triton interprets"):
        ranked_by(launcher_of(lambda c: "right"), lambda c: 1.0, target="sm_90")


def test_a_configuration_offered_is_one(folder):
    """It has the fields and the launch of the candidate, and may be called."""
    offered = []

    def launcher(x: Tensor, config: Config) -> Tensor:
        offered.append(config)
        return naive(x)

    tuning.search(launcher, (X,), reference=naive, kernel="mine", space=SPACE[:1], clock=lambda call: 1.0, write=False)
    assert isinstance(offered[0], Config)
    assert dataclasses.astuple(offered[0]) == dataclasses.astuple(SPACE[0])
    assert offered[0]("mine", X, 24) == SPACE[0]


# ---- Triton's own autotuner

AUTOTUNED = """
import sys, torch, triton
from flashgau.kernels.attention_kernels import AttentionRule, forward_kernel
from flashgau.kernels.common import Sizes, heads, sequences_of
from flashgau.tuning import ahead, compiler

device = sys.argv[1]
q, k, v = torch.linspace(-1, 1, 3 * 2 * 2 * 70 * 16, device=device).view(3, 2, 2, 70, 16).sin()
(B, H, N, D), BLOCKS = q.shape, [(16, 16), (32, 16), (64, 32)]
out, lse = torch.empty_like(q), torch.empty(B, H, N, device=device)
widths = {"GROUPS": 1, "D": D, "E": D, "BD": 16, "BE": 16, "PRECISION": "ieee"}
configs = [triton.Config({"SIZES": Sizes(**widths, BM=m, BN=n)}, num_warps=4, num_stages=1) for m, n in BLOCKS]
counted = triton.heuristics({"n_blocks": lambda a: triton.cdiv(a["max_seqlen_q"], a["SIZES"].BM.value)})
times = {(16, 16): 3.0, (32, 16): 1.0, (64, 32): 2.0}
results = []

def clock(call, quantiles):
    out.fill_(float("nan"))
    call()
    results.append(out.clone())
    return [times[BLOCKS[len(results) - 1]]] * 3

tuned = triton.autotune(configs, key=["max_seqlen_q"], do_bench=clock)(counted(forward_kernel))
rule = AttentionRule(scale=D**-0.5, right=0)
args = heads(q), heads(k), heads(v), heads(out), lse, *sequences_of(B, N, N), *rule
if device == "cpu":  # interpreted
    tuned[lambda a: (a["n_blocks"] * H * B, 1)](*args, n_kv_heads=H, n_parts=None)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    for result in [*results, out]:
        assert (result - exact).abs().max() < 1e-6
    sizes = tuned.best_config.kwargs["SIZES"]
    assert (len(results), sizes.BM.value, sizes.BN.value) == (3, 32, 16)
else:  # compiled for a GPU that is not there, every configuration with its own blocks
    with compiler.instead_of_launching("sm_80", ahead.target_of("sm_80"), None):
        kernels = tuned.warmup(*args, n_kv_heads=H, n_parts=None, grid=(1,))
    shared = [compiler.needs(kernel).shared_bytes for kernel in kernels]
    assert len(set(shared)) == len(BLOCKS) and min(shared) > 0, shared
"""


@pytest.mark.parametrize(("device", "interpret"), [("cpu", "1"), ("meta", "0")], ids=["interpreted", "compiled"])
def test_the_bare_kernel_can_be_tuned_by_triton(device, interpret):
    """Nothing that the host passes depends on a block size, but the number of blocks, which a heuristic finds."""
    env = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [sys.executable, "-c", AUTOTUNED, device], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr

"""Exact attention without its matrix (Dao et al. 2022, arXiv 2205.14135): time, peak memory, and memory traffic."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import FORWARD, PASSES, TRAINING
from bench.claims import Claim, Results, Settings, Trial, draw
from bench.claims.statistics import Comparison, Verdict, compare, exact, interval, unfinished, verdict

PUBLISHED: dict[str, Any] = {
    "a100_ms": {"lengths": [512, 1024, 2048, 4096], "pytorch": [2.35, 8.29, 31.75, 124.19],
                "flashattention": [0.95, 2.55, 9.56, 37.49]},
    "memory": "up to 20 times less", "hbm_accesses": "N^2 d^2 / M beside N d + N^2 (theorem 2)",
}  # fmt: skip
TARGET = "sm_90"
ROWS = 64  # another block of queries than the shipped one: another M
SPREAD = 1.25  # what a theorem's "same order" may mean here: largest by smallest part of the formula
ASYMPTOTIC = 1024  # tokens from which the leading term is nearly all


def providers(settings: Settings) -> tuple[str, str]:
    """Ours, and the standard one."""
    return ("flashgau-triton" if settings.scale == "gpu" else "flashgau-eager"), "plain"


def lengths(settings: Settings) -> list[int]:
    if settings.quick:
        return [128]
    return [512, 1024, 2048, 4096, 8192]


def traffic_sizes(settings: Settings) -> list[tuple[int, int, int | None]]:
    """Widths of a head, lengths, and rows of a block other than the shipped one."""
    if settings.quick:
        return [(64, 256, None)]
    usual: list[tuple[int, int, int | None]] = [(d, n, None) for d in (64, 128) for n in (512, 1024, 2048, 4096, 8192)]
    return usual + [(d, 4096, ROWS) for d in (64, 128)]


def trials(settings: Settings, results: Results) -> list[Trial]:
    series = "causal" if settings.quick else "causal, fp32" if settings.scale == "cpu" else "causal D=64"
    each = 0.5 * 60 * settings.minutes / (len(PASSES) * len(lengths(settings)))
    found = [
        Trial(f"N={n}", "bench",
              {"operation": "attention", "only": [series, f"N={n}"], "providers": providers(settings),
               "seconds": 0.2 if settings.quick else each, "rounds": 2 if settings.quick else 5})
        for n in lengths(settings)
    ]  # fmt: skip
    for d, n, rows in traffic_sizes(settings):
        key = f"traffic/D={d}, N={n}" + ("" if rows is None else f", {rows} rows")
        found.append(Trial(key, "probe", {"what": "traffic", "target": TARGET, "width": d, "length": n, "rows": rows}))
    return found


def method(settings: Settings) -> str:
    return (
        "The benchmark `attention` of this folder: our attention and the plain formula, each held to fp64 first, "
        "timed in "
        "turns; intervals over rounds; peaks of memory in a process of their own (GPU: of the allocator). Memory "
        "traffic "
        f"is of the forward compiled for {TARGET}, bf16, no mask: bytes that all programs load and store, from "
        "addresses "
        "that are executed (a test holds that to whole executions), repeats included, since the theorem knows no cache "
        "between SRAM and HBM. M is 4 d times the rows of a block, as the paper's algorithm 1 chooses blocks. Beside "
        "it, "
        "the operands of product, softmax and product in PyTorch. On a CPU our attention uses PyTorch's fused kernel."
    )


def measured(settings: Settings, results: Results, kind: str, run: str) -> dict[str, dict[int, list[float]]]:
    """Of each provider, by length: "raw_s", seconds of every round, or "peak", bytes (a list of one)."""
    found: dict[str, dict[int, list[float]]] = {who: {} for who in providers(settings)}
    for n in lengths(settings):
        row = results.get(f"N={n}")
        for who in found:
            what = row["providers"].get(who, {}) if row else {}
            if kind == "peak" and run in what.get("peak_bytes", {}):
                found[who][n] = [float(what["peak_bytes"][run])]
            elif kind == "raw_s" and run in what.get("times", {}):
                found[who][n] = what["times"][run]["raw_s"]
    return found


def traffic(settings: Settings, results: Results) -> list[dict[str, Any]]:
    """Each executed size with its "width", "length", and "part": accesses by N^2 d^2 / M, in elements."""
    rows = []
    for d, n, rows_of in traffic_sizes(settings):
        key = f"traffic/D={d}, N={n}" + ("" if rows_of is None else f", {rows_of} rows")
        found = results.get(key, {}).get("found")
        if found:
            formula = n * n * d * d / (4 * d * found["rows"])
            rows.append({**found, "width": d, "length": n, "formula": formula, "part": found["asked"] / 2 / formula})
    return rows


def judge(settings: Settings, results: Results) -> Verdict:
    ours, theirs = providers(settings)
    found = []
    times, peaks = (measured(settings, results, kind, TRAINING) for kind in ("raw_s", "peak"))
    both = [n for n in times[ours] if n in times[theirs]]
    if both:
        published = PUBLISHED["a100_ms"]
        size = None
        if both[-1] in published["lengths"]:
            place = published["lengths"].index(both[-1])
            size = published["flashattention"][place] / published["pytorch"][place] - 1
        what = f"time of forward and backward at {both[-1]} tokens against the plain formula"
        found.append(compare(what, times[ours][both[-1]], times[theirs][both[-1]], size, "rounds"))
    both = [n for n in peaks[ours] if n in peaks[theirs] and peaks[theirs][n][0] > 0]
    if both:
        part = 100 * (peaks[ours][both[-1]][0] / peaks[theirs][both[-1]][0] - 1)
        found.append(Comparison(f"peak memory at {both[-1]} tokens against the plain formula", exact(part), -95.0))
    executed = traffic(settings, results)
    if executed:
        last = max((row for row in executed), key=lambda row: (row["length"], -row["width"]))
        less = 100 * (last["asked"] / last["plain"] - 1)
        found.append(Comparison(f"executed traffic at D = {last['width']}, {last['length']} tokens against the plain "
                                "formula's", exact(less)))  # fmt: skip
    parts = [row["part"] for row in executed if row["length"] >= ASYMPTOTIC]
    if len(parts) > 1:
        spread = max(parts) / min(parts)
        said = (
            f"executed accesses are {min(parts):.3g} to {max(parts):.3g} times N^2 d^2 / M, a factor {spread:.2f} "
            f"apart (at most {SPREAD} counts as the same order)"
        )
        found.append(Comparison("spread of accesses / (N^2 d^2 / M)", exact(spread - SPREAD), unit="", said=said))
    said = verdict("Exact attention without the matrix of scores takes less time, memory and traffic", found)
    failed = [key for key, result in results.items() if key.startswith("traffic/") and result["found"] is None]
    return unfinished(said) if failed else said


def plot(record: dict[str, Any], path: Path) -> None:
    settings, results = Settings(**record["settings"]), record["results"]
    figure, (left, middle, right, published) = draw.panels(record, 2, 2)
    shown = [n for n in lengths(settings) if f"N={n}" in results]
    for axis, kind, scale, label in (
        (left, "raw_s", 1e3, "time (ms)"),
        (middle, "peak", 2.0**-20, "peak memory (MiB)"),
    ):
        for place, (who, run) in enumerate((who, run) for who in providers(settings) for run in (FORWARD, TRAINING)):
            values = measured(settings, results, kind, run)[who]
            points = {float(n): interval([scale * v for v in of]) for n, of in values.items() if min(of) > 0}
            if points:
                draw.line(axis, points, f"{who}, {run}", place)
        if shown:
            draw.lengths(axis, shown, label)
    draw.legend(left)
    executed = [row for row in traffic(settings, results) if row["rows"] != ROWS]
    for place, d in enumerate(sorted({row["width"] for row in executed})):
        here = {float(row["length"]): row for row in executed if row["width"] == d}
        draw.line(right, {n: row["asked"] / 1e6 for n, row in here.items()}, f"executed, D = {d}", 2 * place)
        draw.line(right, {n: row["plain"] / 1e6 for n, row in here.items()}, f"plain formula, D = {d}", 2 * place + 1)
        part = statistics.fmean(row["part"] for row in list(here.values())[-2:])
        n = np.array(sorted(here))
        curve = 2 * part * n**2 * d / (4 * here[max(here)]["rows"]) / 1e6
        right.plot(n, curve, "--", color=draw.COLOURS[2 * place], linewidth=1, label=f"{part:.2g} N² d² / M, D = {d}")
    if executed:
        draw.lengths(right, [row["length"] for row in executed], "memory traffic of a head's forward (MB)")
    draw.legend(right)
    a100 = PUBLISHED["a100_ms"]
    for place, (who, label) in enumerate((("flashattention", "FlashAttention"), ("pytorch", "PyTorch"))):
        draw.line(published, dict(zip(a100["lengths"], a100[who], strict=True)), label, place)
    draw.lengths(published, a100["lengths"], "forward and backward (ms)")
    published.set_title("published, A100", fontsize=10)
    draw.legend(published)
    for axis, title in ((left, "time"), (middle, "memory"), (right, f"traffic, {TARGET}, not a measurement of time")):
        axis.set_title(title, fontsize=10)
    draw.save(figure, path)


CLAIM = Claim(
    name="attention-memory",
    title="Standard attention beside flashgau's",
    statement="Attention in blocks takes less time than the standard form and memory linear in length, because it "
    "moves N^2 d^2 / M rather than N d + N^2 elements.",
    published={
        "source": "Dao et al. 2022, arXiv 2205.14135: theorem 2, and forward and backward on an A100",
        **PUBLISHED,
    },
    method=method,
    trials=trials,
    verdict=judge,
    plot=plot,
)

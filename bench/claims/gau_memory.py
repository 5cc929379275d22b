"""From which length GAU saves time and memory in masked language models: the survey's closing remark, 512 tokens."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.claims import Claim, Results, Settings, Trial, draw
from bench.claims.statistics import Comparison, Interval, Verdict, crossings, exact, interval, verdict
from bench.claims.variants import Spec, model_spec, parameters, sized

REMARK = 512  # tokens below which GAU is said to gain nothing
FACTOR = 2.0  # between the remark's length and one that counts as the same
# GAU and Transformer++, on flashgau's operations and as formulas with their N x N matrices, as the remark knew them.
PAIRS = {"flashgau": ("GAU", "Transformer++"), "plain formulas": ("GAU, plain", "Transformer++, plain")}


def sizes(settings: Settings) -> tuple[list[int], int]:
    """Lengths, and tokens of a batch."""
    if settings.quick:
        return [32, 64], 64
    tokens = 4096 if settings.scale == "cpu" else 32768
    return [n for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= tokens], tokens


def models(settings: Settings, length: int) -> dict[str, Spec]:
    """The four, of equal parameters, with a batch of windows of this length."""
    if settings.quick:
        dim, depth, heads, narrow = 32, 1, 2, 16
    elif settings.scale == "cpu":
        dim, depth, heads, narrow = 256, 2, 4, 128
    else:
        dim, depth, heads, narrow = 768, 6, 12, 128
    unit = model_spec("mlm", kind="flash-quad", dim=dim, depth=2 * depth, key_dim=narrow)
    block = sized(model_spec("mlm", kind="transformer++", dim=dim, depth=depth, heads=heads), parameters(unit))
    batch = sizes(settings)[1] // length
    size = {"batch": batch, "length": length}
    # Kept for the backward by an autograd of formulas: about 4 matrices of each head and layer, in fp32.
    matrix = 16.0 * batch * length**2
    return {
        "GAU": {**unit, **size},
        "Transformer++": {**block, **size},
        "GAU, plain": {**unit, **size, "mixer": "gau formula", "matrices": matrix * 2 * depth},
        "Transformer++, plain": {**block, **size, "mixer": "attention formula", "matrices": matrix * depth * heads},
    }


def trials(settings: Settings, results: Results) -> list[Trial]:
    lengths, _ = sizes(settings)
    each = 0.9 * 60 * settings.minutes / (len(lengths) * settings.seeds)
    return [
        Trial(f"N={n}/seed {seed}", "steps",
              {"models": models(settings, n), "rounds": 2 if settings.quick else 3,
               "most": 2 if settings.quick else 40, "seconds": 0.5 * each,
               "memory": seed == 0 and (not settings.quick or n == lengths[-1])})
        for seed in range(settings.seeds) for n in lengths
    ]  # fmt: skip


def method(settings: Settings) -> str:
    return (
        f"Masked byte-level models of equal parameters, two gated units for each layer of Transformer++; one optimizer "
        f"step of {sizes(settings)[1]} tokens at every length, in windows of that length. Four models side by side in "
        "random turns, once for each seed: both on flashgau's operations, and both as formulas that write their N x N "
        "matrices, as when the remark was made. Memory: the peak of a step above what is there between steps, once, "
        "in a "
        "process of its own (GPU: of the allocator). Crossings are interpolated on logarithmic axes; "
        f"one within a factor {FACTOR:g} of {REMARK} confirms the remark."
    )


def ratios(settings: Settings, results: Results, kind: str, pair: str) -> list[list[tuple[float, float]]]:
    """GAU's part of Transformer++'s "time" or "memory" by length; one list for each seed (of memory one list)."""
    gau, other = PAIRS[pair]
    found = []
    for seed in range(settings.seeds):
        points = []
        for n in sizes(settings)[0]:
            row = results.get(f"N={n}/seed {seed}", {})
            values = row.get("seconds" if kind == "time" else "peak_bytes", {})
            if gau in values and other in values:
                a, b = (statistics.median(values[who]) if kind == "time" else values[who] for who in (gau, other))
                points += [(float(n), a / b)] if a > 0 and b > 0 else []
        if len(points) > 1:
            found.append(points)
    return found


def distance(found: list[list[tuple[float, float]]], exactly: bool) -> Interval | None:
    """Of the crossing's distance from the remark's length, in doublings; None unless every seed has one, downwards."""
    each = [crossings(points) for points in found]
    if not each or any(len(one) != 1 or points[0][1] < 1 for one, points in zip(each, found, strict=True)):
        return None
    logs = [math.log2(one[0] / REMARK) for one in each]
    return exact(logs[0]) if exactly else interval(logs)


def told(found: list[list[tuple[float, float]]]) -> str:
    """Where the crossings are, or on which side the ratio stays."""
    each = [crossings(points) for points in found]
    if any(each):
        where = ", ".join("/".join(f"{n:.0f}" for n in one) or "no length" for one in each)
        return f"crosses at {where} tokens" + (" (one for each seed)" if len(each) > 1 else "")
    values = [ratio for points in found for _, ratio in points]
    ends = f"{found[0][0][0]:.0f} to {found[0][-1][0]:.0f} tokens"
    side = "always less" if max(values) < 1 else "never less"
    return f"{side}: {min(values):.2f} to {max(values):.2f} times Transformer++'s from {ends}"


def judge(settings: Settings, results: Results) -> Verdict:
    comparisons, notes = [], []
    for pair in PAIRS:
        for kind in ("time", "memory"):
            found = ratios(settings, results, kind, pair)
            if not found:
                continue
            far = distance(found, kind == "memory")
            if pair == "plain formulas":
                one = _within(f"{kind}, {pair}", far, found)
                where = f"{pair}, {kind}: {told(found)}"
                comparisons.append(replace(one, said=where + f"; within a factor {FACTOR:g} of {REMARK} was asked"))
            else:
                notes.append(f"{pair}, {kind}: {told(found)}")
    said = verdict(f"From about {REMARK} tokens on, and not below, GAU saves time and memory", comparisons)
    return Verdict(said.outcome, said.sentence + (f" {'; '.join(notes)}." if notes else ""), said.comparisons)


def _within(what: str, far: Interval | None, found: list[list[tuple[float, float]]]) -> Comparison:
    """That the crossing lies within `FACTOR` of the remark's length: its distance less that of the factor, below zero.

    Where the ratio stays on one side, the crossing lies beyond the lengths on that side. Where GAU saves at short
    lengths alone, it is compared at the longest.
    """
    allowed, values = math.log2(FACTOR), [ratio for points in found for _, ratio in points]
    name = f"crossing of {what}, doublings from {REMARK} beyond {allowed:g}"
    if far is not None and far.low is not None and far.high is not None:
        nearest = 0.0 if far.low <= 0 <= far.high else min(abs(far.low), abs(far.high))
        furthest = max(abs(far.low), abs(far.high))
        around = Interval(abs(far.mean) - allowed, nearest - allowed, furthest - allowed, far.n)
        return Comparison(name, around, unit="")
    if far is not None:
        return Comparison(name, Interval(abs(far.mean) - allowed, None, None, far.n), unit="")
    if max(values) < 1 or min(values) >= 1:
        shortest, longest = found[0][0][0], found[0][-1][0]
        beyond = math.log2(REMARK / shortest if max(values) < 1 else longest / REMARK) - allowed
        return Comparison(name, exact(beyond) if beyond >= 0 else Interval(beyond, None, None, 1), unit="")
    more = [100 * (points[-1][1] - 1) for points in found]
    last = interval(more) if min(more) >= 0 else Interval(statistics.fmean(more), None, None, len(more))
    return Comparison(f"GAU's {what} at {found[0][-1][0]:.0f} tokens against Transformer++'s", last)


def plot(record: dict[str, Any], path: Path) -> None:
    settings, results = Settings(**record["settings"]), record["results"]
    figure, axes = draw.panels(record, 2)
    for axis, kind in zip(axes, ("time", "memory"), strict=True):
        for place, pair in enumerate(PAIRS):
            by_length: dict[float, list[float]] = {}
            for points in ratios(settings, results, kind, pair):
                for n, ratio in points:
                    by_length.setdefault(n, []).append(ratio)
            if by_length:
                draw.line(axis, {n: interval(values) for n, values in by_length.items()}, pair, place)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.axvline(REMARK, color="black", linewidth=0.8, linestyle=":", label=f"the remark: {REMARK}")
        draw.lengths(axis, sizes(settings)[0], f"{kind} of a training step: GAU / Transformer++")
        axis.set_title(kind, fontsize=10)
    draw.legend(axes[0])
    draw.save(figure, path)


CLAIM = Claim(
    name="gau-memory",
    title="GAU beside Transformer++ of equal parameters, masked language models",
    statement="Below 512 tokens GAU gains nothing over Transformer++ in masked language models; above, it saves memory "
    "and time.",
    published={"source": "the survey's closing remark, after practice with GAU in masked language models",
               "crossing_tokens": REMARK},
    method=method,
    trials=trials,
    verdict=judge,
    plot=plot,
)  # fmt: skip

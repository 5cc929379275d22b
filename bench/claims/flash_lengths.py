"""FLASH from 512 to 8192 tokens (Hua et al. 2022, arXiv 2202.10447): time of a step, and loss at equal compute."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from bench.claims import Claim, Results, Settings, Trial, draw
from bench.claims.contest import Contest
from bench.claims.statistics import Comparison, Verdict, compare, cost, interval, verdict
from bench.claims.variants import Spec, model_spec, parameters, sized

KINDS = ("transformer", "transformer++", "flash-quad", "mc-tfm++", "flash")
PUBLISHED: dict[str, Any] = {
    "latency_ms_c4": {"lengths": [512, 1024, 2048, 4096, 8192], "transformer++": [47.6, 64.6, 91.6, 143.4, 254.1],
                      "flash-quad": [43.8, 50.1, 61.7, 84.9, 132.1]},
    "perplexity_8192": {"C4, masked": {"flash": 3.897, "transformer++": 3.933},
                        "Wiki-40B, causal": {"flash": 15.109, "transformer++": 15.254}},
    "largest_training_speedup": {"Wiki-40B": 4.9, "PG-19": 12.1, "C4": 4.8},
}  # fmt: skip
TIMED, TRAINED = 0.2, 0.8  # of the budget
FURTHER = 65536  # the length to which the fitted cost is drawn


def sizes(settings: Settings) -> tuple[list[int], list[int], int]:
    """Lengths that are timed, those that are trained at, and tokens of a batch."""
    if settings.quick:
        return [32, 64], [64], 64
    if settings.scale == "cpu":
        return [512, 1024, 2048, 4096, 8192], [512, 2048, 8192], 8192
    return [512, 1024, 2048, 4096, 8192], [512, 2048, 8192], 65536


def model(settings: Settings, kind: str, length: int) -> Spec:
    """A model with the parameters of "flash", and a batch of windows of this length."""
    if settings.quick:
        base: dict[str, Any] = {"dim": 32, "pairs": 1, "heads": 2, "key_dim": 16, "chunk_size": 16}
    elif settings.scale == "cpu":
        base = {"dim": 128, "pairs": 2, "heads": 2, "key_dim": 64, "chunk_size": 256}
    else:
        base = {"dim": 512, "pairs": 6, "heads": 8, "key_dim": 128, "chunk_size": 256}
    pairs = base.pop("pairs")

    def of(kind: str) -> Spec:
        depth = 2 * pairs if kind.startswith("flash") else pairs
        return model_spec("clm", kind=kind, depth=depth, **base)

    tokens = sizes(settings)[2]
    return {**sized(of(kind), parameters(of("flash"))), "batch": tokens // length, "length": length}


def contest(settings: Settings) -> Contest:
    kinds = ("transformer++", "flash") if settings.quick else KINDS
    models = {f"{kind}, N={n}": model(settings, kind, n) for n in sizes(settings)[1] for kind in kinds}
    lrs = (1e-3, 3e-3) if settings.scale == "cpu" else (5e-4, 1e-3, 2e-3)
    return Contest(models, lrs, "compute", TRAINED)


def method(settings: Settings) -> str:
    return (
        f"Causal byte-level models of equal parameters, two gated units for each transformer layer, chunks of 256; "
        f"batches of {sizes(settings)[2]} tokens at every length. Steps are timed side by side in random turns, once "
        "for "
        "each seed. The cost drawn beyond the longest length is a N + b N^2 for each sequence, a and b not negative, "
        "by "
        "least squares of relative errors; it is an extrapolation, and not measured. " + contest(settings).method()
    )


def trials(settings: Settings, results: Results) -> list[Trial]:
    lengths = sizes(settings)[0]
    rounds = 2 if settings.quick else 3
    each = TIMED * 60 * settings.minutes / (len(lengths) * settings.seeds)
    timed = [
        Trial(f"steps/N={n}/seed {seed}", "steps",
              {"models": {kind: model(settings, kind, n) for kind in KINDS}, "rounds": rounds, "memory": False,
               "most": rounds if settings.quick else 30, "seconds": 0.6 * each})
        for seed in range(settings.seeds) for n in lengths
    ]  # fmt: skip
    return [*timed, *contest(settings).trials(settings, results)]


def times(settings: Settings, results: Results) -> dict[str, dict[int, list[float]]]:
    """Seconds of a step: of each kind, at each length, by seed."""
    found: dict[str, dict[int, list[float]]] = {kind: {} for kind in KINDS}
    for n in sizes(settings)[0]:
        keys = [f"steps/N={n}/seed {seed}" for seed in range(settings.seeds)]
        rows = [results[key]["seconds"] for key in keys if key in results]
        for kind in KINDS if rows else ():
            found[kind][n] = [statistics.median(row[kind]) for row in rows]
    return found


def judge(settings: Settings, results: Results) -> Verdict:
    lengths, trained, _ = sizes(settings)
    timed, losses = times(settings, results), contest(settings).losses(settings, results)
    found = []
    published = PUBLISHED["latency_ms_c4"]
    longest = lengths[-1]
    if longest in timed["flash"]:
        theirs = timed["transformer++"][longest]
        found.append(compare(f"step of flash against transformer++ at {longest}", timed["flash"][longest], theirs))
        size = published["flash-quad"][-1] / published["transformer++"][-1] - 1
        ours = timed["flash-quad"][longest]
        found.append(compare(f"step of flash-quad against transformer++ at {longest}", ours, theirs, size))
        first = lengths[0]
        growth = [100 * (a / b - c / d) for a, b, c, d in zip(timed["flash"][longest], theirs, timed["flash"][first],
                                                              timed["transformer++"][first], strict=True)]  # fmt: skip
        what = f"flash's part of transformer++'s time at {longest} less that at {first}"
        found.append(Comparison(what, interval(growth), unit=" points"))
    last = trained[-1]
    if losses:
        ppl = PUBLISHED["perplexity_8192"]["Wiki-40B, causal"]
        size = math.log(ppl["flash"]) / math.log(ppl["transformer++"]) - 1
        ours, theirs = (losses[f"{kind}, N={last}"] for kind in ("flash", "transformer++"))
        found.append(compare(f"loss of flash against transformer++ at {last}, equal compute", ours, theirs, size))
    said = verdict("FLASH is faster than Transformer++ at long sequences, the more the longer, at no loss", found)
    won = winners(settings, results)
    return Verdict(said.outcome, f"{said.sentence} {won}".strip(), said.comparisons)


def winners(settings: Settings, results: Results) -> str:
    """Who has the fastest step at each length, and who the lowest loss."""
    timed = times(settings, results)
    fastest = {n: min(KINDS, key=lambda kind, n=n: statistics.fmean(timed[kind][n]))
               for n in sizes(settings)[0] if n in timed["flash"]}  # fmt: skip
    found = contest(settings).intervals(settings, results)
    lowest = {}
    for n in sizes(settings)[1] if found else ():
        here = {name: one.mean for name, one in found.items() if name.endswith(f"N={n}")}
        lowest[n] = min(here, key=lambda name: here[name]).split(",")[0]
    text = "Fastest step: " + ", ".join(f"{n} {kind}" for n, kind in fastest.items()) + "." if fastest else ""
    if lowest:
        text += " Lowest loss at equal compute: " + ", ".join(f"{n} {kind}" for n, kind in lowest.items()) + "."
    return text


def plot(record: dict[str, Any], path: Path) -> None:
    settings, results = Settings(**record["settings"]), record["results"]
    figure, (left, middle, right, published) = draw.panels(record, 2, 2)
    timed, tokens = times(settings, results), sizes(settings)[2]
    shown = [n for n in sizes(settings)[0] if n in timed["flash"]]
    for place, kind in enumerate(KINDS if shown else ()):
        measured = {float(n): interval([1e3 * s for s in timed[kind][n]]) for n in shown}
        draw.line(left, measured, kind, place)
        a, b = cost([(n, statistics.fmean(timed[kind][n]) / tokens) for n in shown])
        draw.line(right, {n: one.mean for n, one in measured.items()}, kind, place)
        further = [shown[0] * 2**i for i in range(1 + int(math.log2(max(FURTHER, shown[-1]) / shown[0])))]
        right.plot(further, [1e3 * tokens * (a + b * n) for n in further], "--", color=draw.COLOURS[place], linewidth=1)
    if shown:
        draw.lengths(left, shown, f"training step of {tokens} tokens (ms)")
        draw.lengths(right, further[::2], f"training step of {tokens} tokens (ms)")
    left.set_title("time of a step", fontsize=10)
    right.set_title("dashed: a N + b N² fitted, extrapolated", fontsize=10)
    draw.legend(left)
    found = contest(settings).intervals(settings, results)
    for place, kind in enumerate(KINDS if found else ()):
        points = {float(n): found[f"{kind}, N={n}"] for n in sizes(settings)[1] if f"{kind}, N={n}" in found}
        if points:
            draw.line(middle, points, kind, place)
    if found:
        draw.lengths(middle, sizes(settings)[1], "held-out loss (nats per byte)", logarithmic=False)
    middle.set_title("loss at equal compute", fontsize=10)
    latency = PUBLISHED["latency_ms_c4"]
    for kind in ("transformer++", "flash-quad"):
        draw.line(published, dict(zip(latency["lengths"], latency[kind], strict=True)), kind, KINDS.index(kind))
    draw.lengths(published, latency["lengths"], "training step (ms)")
    published.set_title("published, masked C4 (as recalled)", fontsize=10)
    draw.legend(published)
    draw.save(figure, path)


CLAIM = Claim(
    name="flash-lengths",
    title="Five language models from 512 to 8192 tokens",
    statement="With a fixed number of tokens in a batch FLASH's step takes as long at 8192 tokens as at 512, "
    "Transformer++'s ever longer, and FLASH's loss is no higher.",
    published={"source": "Hua et al. 2022, arXiv 2202.10447 (latencies as recalled)", **PUBLISHED},
    method=method,
    trials=trials,
    verdict=judge,
    plot=plot,
)

"""GAU beside the transformer at 512 tokens (Hua et al. 2022, arXiv 2202.10447): quality against time, and ablations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.claims import Claim, Results, Settings, Trial, draw
from bench.claims.contest import PACE, Contest
from bench.claims.statistics import Comparison, Verdict, compare, interval, verdict
from bench.claims.variants import Spec, model_spec, parameters, sized

# Perplexity of the language model and of the masked one in the paper's ablations, recalled.
PUBLISHED = {
    "GAU": (16.78, 4.23), "GAU, softmax": (17.04, 4.31), "GAU, 4 heads": (17.76, 4.48), "GAU, no gate": (17.45, 4.58),
    "attention": (16.87, 4.35), "attention, relu2": (17.15, 4.77), "attention, one head": (17.89, 4.73),
    "attention, gated": (17.25, 4.43),
}  # fmt: skip
# What is changed in a GAU: its layer's options, its mixer, and its width beside the usual one.
UNITS: dict[str, dict[str, Any]] = {
    "GAU": {},
    "GAU, softmax": {"layer": {"score": "softmax", "normalizer": "keys"}},
    "GAU, laplace": {"layer": {"score": "laplace"}},
    "GAU, softmax_plus": {"layer": {"score": "softmax_plus", "normalizer": "keys"}},
    "GAU, 4 heads": {"mixer": "4 heads"},
    "GAU, no gate": {"mixer": "no gate"},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "attention": {},
    "attention, relu2": {"mixer": "relu2 heads"},
    "attention, one head": {"heads": 1},
    "attention, gated": {"layer": {"gate": "elementwise"}},
}
# Which of the ablations is below which, as far as they were published.
ORDER = (("GAU", "attention"), ("GAU", "GAU, softmax"), ("GAU", "GAU, 4 heads"), ("GAU", "GAU, no gate"))


def sizes(settings: Settings) -> tuple[list[int], int, int, int]:
    """Widths, the ablations' among them in the middle; transformer layers; windows of a batch; bytes of a window."""
    if settings.quick:
        return [32], 1, 2, 32
    return ([64, 128, 192], 2, 8, 512) if settings.scale == "cpu" else ([256, 512, 768], 6, 64, 512)


def contest(settings: Settings) -> Contest:
    widths, depth, batch, length = sizes(settings)
    base = widths[len(widths) // 2]
    small = ("GAU", "GAU, no gate", "attention")
    models: dict[str, Spec] = {}
    for width in widths:
        for name, change in (UNITS | BLOCKS).items():
            if (width == base or not change) and (not settings.quick or name in small):
                called = name if width == base else f"{name}, width {width}"
                models[called] = {**_model(name, change, width, depth), "batch": batch, "length": length}
    lrs = (1e-3, 2e-3, 4e-3) if settings.scale == "cpu" else (5e-4, 1e-3, 2e-3)
    return Contest(models, lrs)


def _model(name: str, change: dict[str, Any], width: int, depth: int) -> Spec:
    """Two units for each transformer layer, all with the parameters of units with e = 2 d."""
    other = {key: value for key, value in change.items() if key != "mixer"}
    mixer = {"mixer": change["mixer"]} if "mixer" in change else {}
    narrow = 128 if width >= 256 else width // 2
    unit: dict[str, Any] = {"kind": "flash-quad", "dim": width, "depth": 2 * depth, "key_dim": narrow}
    wanted = parameters(model_spec("clm", **unit))
    if name in UNITS:
        return sized(model_spec("clm", mixer, **unit, **other), wanted)
    block: dict[str, Any] = {
        "kind": "transformer++",
        "dim": width,
        "depth": depth,
        "heads": max(1, width // 64) if width > 64 else 2,
    }
    return sized(model_spec("clm", mixer, **(block | other)), wanted)


def method(settings: Settings) -> str:
    return (
        "Causal byte-level models of two gated units for each layer of Transformer++ (RoPE, SwiGLU), all of a width "
        "with "
        "equal parameters: hidden widths make up for heads and gates. Heads divide a unit's queries, keys and values. "
        "The front: loss against the time of a training step, of all widths; at the time of each GAU the loss of "
        "Transformer++ is interpolated on a logarithmic axis of time. " + contest(settings).method()
    )


def trials(settings: Settings, results: Results) -> list[Trial]:
    return contest(settings).trials(settings, results)


def front(settings: Settings, results: Results, name: str) -> list[tuple[float, list[float]]]:
    """Seconds of a step and losses by seed, of all widths of a kind, the fastest first."""
    losses, seconds = contest(settings).losses(settings, results), results[PACE]["seconds"]
    return sorted((seconds[n], found) for n, found in losses.items() if n == name or n.startswith(f"{name}, width"))


def beside_front(settings: Settings, results: Results) -> list[float]:
    """By seed: how many percent the GAUs' losses lie above Transformer++ of equal time, mean of those in its range."""
    units, blocks = (front(settings, results, name) for name in ("GAU", "attention"))
    found = []
    for seed in range(len(units[0][1]) if units else 0):
        x, y = [math.log(t) for t, _ in blocks], [losses[seed] for _, losses in blocks]
        inside = [100 * (losses[seed] / float(np.interp(math.log(t), x, y)) - 1)
                  for t, losses in units if x[0] <= math.log(t) <= x[-1]]  # fmt: skip
        found += [sum(inside) / len(inside)] if inside else []
    return found


def judge(settings: Settings, results: Results) -> Verdict:
    losses = contest(settings).losses(settings, results)
    found = []
    for ours, theirs in ORDER if losses else ():
        if ours in losses and theirs in losses:
            size = math.log(PUBLISHED[ours][0]) / math.log(PUBLISHED[theirs][0]) - 1
            found.append(compare(f"{ours} against {theirs}", losses[ours], losses[theirs], size))
    beside = beside_front(settings, results) if losses and len(sizes(settings)[0]) > 1 else []
    if beside:
        found.append(Comparison("GAU against Transformer++ of equal time per step", interval(beside)))
    return verdict("At 512 tokens GAU reaches the lower loss with a single head, relu2 and its gate", found)


def plot(record: dict[str, Any], path: Path) -> None:
    settings, results = Settings(**record["settings"]), record["results"]
    figure, (left, right) = draw.panels(record, 2)
    if PACE in results:
        for place, (name, label) in enumerate((("GAU", "GAU"), ("attention", "Transformer++"))):
            points = {1e3 * seconds: interval(losses) for seconds, losses in front(settings, results, name)}
            if points:
                draw.line(left, points, label, place)
    left.set_xlabel("training step (ms)")
    left.set_ylabel("held-out loss (nats per byte)")
    left.set_title("quality against time", fontsize=10)
    left.grid(linewidth=0.4, alpha=0.6)
    draw.legend(left)
    found = contest(settings).intervals(settings, results)
    named = {n: f"{n} ({PUBLISHED[n][0]:.2f})" if n in PUBLISHED else n for n in (*UNITS, *BLOCKS)}
    draw.dots(right, {label: found[n] for n, label in named.items() if n in found}, "held-out loss (nats per byte)")
    right.set_title("ablations, equal parameters (published perplexity)", fontsize=10)
    draw.save(figure, path)


CLAIM = Claim(
    name="gau-vs-transformer",
    title="GAU beside Transformer++ at 512 tokens",
    statement="At equal parameters and 512 tokens, two gated attention units reach a lower loss than a layer of "
    "Transformer++ in no more time; relu2 is as good as softmax there, one head suffices, and the gate is needed.",
    published={
        "source": "Hua et al. 2022, arXiv 2202.10447, ablations at 512 tokens: perplexity causal, masked (as recalled)",
        "perplexity": PUBLISHED,
    },
    method=method,
    trials=trials,
    verdict=judge,
    plot=plot,
)

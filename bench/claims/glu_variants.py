"""GLU variants (Shazeer 2020, arXiv 2002.05202, table 1): which feed-forward layer, at equal parameters and data."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.claims import Claim, Results, Settings, Trial, draw
from bench.claims.contest import Contest
from bench.claims.statistics import Verdict, compare, verdict
from bench.claims.variants import model_spec, parameters, sized

PUBLISHED = {  # T5-base, held-out log-perplexity after 65,536 and after 524,288 steps
    "ReLU": (1.997, 1.677), "GELU": (1.983, 1.679), "Swish": (1.994, 1.683), "GLU": (1.982, 1.663),
    "Bilinear": (1.960, 1.648), "ReGLU": (1.953, 1.645), "GEGLU": (1.942, 1.633), "SwiGLU": (1.944, 1.636),
}  # fmt: skip
LAYERS = {"ReLU": "relu", "GELU": "gelu", "Swish": "silu", "GLU": "glu", "Bilinear": "bilinear", "ReGLU": "reglu",
          "GEGLU": "geglu", "SwiGLU": "swiglu"}  # fmt: skip
PLAIN, GATED = ("ReLU", "GELU", "Swish"), ("Bilinear", "ReGLU", "GEGLU", "SwiGLU")
BEST = ("GEGLU", "SwiGLU")


def contest(settings: Settings) -> Contest:
    lrs: tuple[float, ...]
    names: tuple[str, ...]
    if settings.quick:
        dim, depth, batch, length, lrs, names = 32, 1, 2, 32, (1e-3,), ("ReLU", "GEGLU", "SwiGLU")
    elif settings.scale == "cpu":
        dim, depth, batch, length, lrs, names = 128, 2, 16, 256, (1e-3, 2e-3, 4e-3), tuple(LAYERS)
    else:
        dim, depth, batch, length, lrs, names = 512, 6, 64, 512, (5e-4, 1e-3, 2e-3), tuple(LAYERS)
    base = {"kind": "transformer++", "dim": dim, "depth": depth, "heads": max(1, dim // 64)}
    wanted = parameters(model_spec("clm", {"feedforward": "relu"}, **base, hidden=4 * dim))
    models = {}
    for name in names:
        spec = sized(model_spec("clm", {"feedforward": LAYERS[name]}, **base), wanted)
        models[name] = {**spec, "batch": batch, "length": length}
    return Contest(models, lrs)


def method(settings: Settings) -> str:
    return (
        "A causal byte-level transformer with RoPE; only the feed-forward layers differ, their widths so that all "
        "models have the parameters of the plain one. " + contest(settings).method()
    )


def trials(settings: Settings, results: Results) -> list[Trial]:
    return contest(settings).trials(settings, results)


def judge(settings: Settings, results: Results) -> Verdict:
    losses = contest(settings).losses(settings, results)
    pairs = [("mean of the four gated layers", [n for n in GATED if n in losses], "mean of the three plain ones",
              [n for n in PLAIN if n in losses])]  # fmt: skip
    pairs += [(name, [name], "ReLU", ["ReLU"]) for name in BEST]
    found = []
    for ours, these, theirs, those in pairs if losses else ():
        a, b = _mean(losses, these), _mean(losses, those)
        published = statistics.fmean(PUBLISHED[n][0] for n in these) / statistics.fmean(PUBLISHED[n][0] for n in those)
        found.append(compare(f"{ours} against {theirs}", a, b, published - 1))
    return verdict("Gated feed-forward layers have the lower held-out loss", found)


def _mean(losses: dict[str, list[float]], names: list[str]) -> list[float]:
    return [statistics.fmean(row) for row in zip(*(losses[name] for name in names), strict=True)]


def plot(record: dict[str, Any], path: Path) -> None:
    settings = Settings(**record["settings"])
    found = contest(settings).intervals(settings, record["results"])
    figure, (left, right) = draw.panels(record, 2)
    draw.dots(left, {name: one for name, one in found.items()}, "held-out loss (nats per byte)")
    left.set_title("here", fontsize=10)
    draw.dots(right, {name: PUBLISHED[name][0] for name in found or LAYERS}, "held-out log-perplexity (nats per token)")
    right.set_title("published, T5-base, 65,536 steps", fontsize=10)
    draw.save(figure, path)


CLAIM = Claim(
    name="glu-variants",
    title="Feed-forward layers at equal parameters and data",
    statement="Transformers with gated linear units in their feed-forward layers reach a lower held-out loss than with "
    "ReLU, GELU or Swish, at equal parameters and equal data; GEGLU and SwiGLU are the best.",
    published={"source": "Shazeer 2020, arXiv 2002.05202, table 1: T5-base, held-out log-perplexity",
               "steps": [65536, 524288], "loss": PUBLISHED},
    method=method,
    trials=trials,
    verdict=judge,
    plot=plot,
)  # fmt: skip

"""What the plots of the claims share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.claims.statistics import Interval
from bench.report import MARKERS, count
from flashgau.files import atomic_write

# Okabe and Ito's palette, and three more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#44AA99", "#7F7F7F")


def panels(record: Mapping[str, Any], columns: int, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """A figure with its title, machine and date, and its axes."""
    machine, settings = record["machine"], record["settings"]
    figure = Figure(figsize=(4.9 * columns, 3.9 * rows + 0.6), layout="constrained")
    place = machine.get("gpu") or f"{machine['cpu']}, {settings['threads']} threads"
    unfinished = "" if record["complete"] else "; not finished"
    figure.suptitle(
        f"{record['title']}\n{place}, torch {machine['torch']}, {machine['date'][:10]}, {settings['seeds']} "
        f"seeds{unfinished}",
        fontsize=10,
    )
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def style(place: int) -> dict[str, Any]:
    """Colour and marker of the series at `place`."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4.5}


def line(axis: Axes, points: Mapping[float, Interval | float], label: str, place: int) -> None:
    """Means against x with their intervals."""
    x = sorted(points)
    means, errors = _parts([points[one] for one in x])
    axis.errorbar(x, means, yerr=errors, label=label, capsize=2, linewidth=1.4, **style(place))


def dots(axis: Axes, rows: Mapping[str, Interval | float], label: str) -> None:
    """One row for each name, the first on top, with its interval."""
    for place, (_, value) in enumerate(rows.items()):
        means, errors = _parts([value])
        axis.errorbar(means, [-place], xerr=errors, capsize=3, linestyle="none", **style(place))
    axis.set_yticks([-place for place in range(len(rows))], list(rows))
    axis.set_xlabel(label)
    axis.grid(True, axis="x", linewidth=0.4, alpha=0.6)


def _parts(values: Sequence[Interval | float]) -> tuple[list[float], list[list[float]]]:
    means = [v.mean if isinstance(v, Interval) else v for v in values]
    below = [v.mean - v.low if isinstance(v, Interval) and v.low is not None else 0.0 for v in values]
    above = [v.high - v.mean if isinstance(v, Interval) and v.high is not None else 0.0 for v in values]
    return means, [below, above]


def lengths(axis: Axes, shown: Sequence[int], label: str, logarithmic: bool = True) -> None:
    """The axis of sequence lengths, and the name of what stands above it."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(shown)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(round(value))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("sequence length (tokens)")
    axis.set_ylabel(label)
    if logarithmic:
        plain_y(axis)
    axis.grid(True, which="major", linewidth=0.4, alpha=0.6)


def plain_y(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 100 * low else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write the picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=130)

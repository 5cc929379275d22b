"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extras import extra
from ..files import atomic_write

KINDS = ("train", "validation")


def check_installed() -> None:
    """Raise MissingExtra if there is nothing to draw with: better before a run than at its first curve."""
    with extra("plots"):
        import matplotlib  # noqa: F401


def loss_plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the training and validation loss of log `rows` into the PNG file `path`, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    # Imported here: it takes half a second, and nothing else of training needs it. No pyplot, whose global
    # state and choice of a display have no place in a library.
    with extra("plots"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = {kind: [(row["step"], row["loss"] / math.log(2)) for row in rows if row["kind"] == kind] for kind in KINDS}
    if points["train"]:
        # A training row is the mean of the steps since the row before it, so it belongs in their middle.
        ends, bits = zip(*points["train"], strict=True)
        middles = [(start + end) / 2 for start, end in zip((0, *ends), ends, strict=False)]
        axes.plot(middles, bits, color="#8fb3d9", linewidth=1.2, label="training")
    if points["validation"]:
        steps, bits = zip(*points["validation"], strict=True)
        label = f"validation (lowest {min(bits):.3f})"
        axes.plot(steps, bits, color="#c0392b", linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (bits per byte)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")

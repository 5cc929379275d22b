"""Tables for the screen, JSON for the record, plots for the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.cases import FORWARD, PASSES, TRAINING
from flashgau.files import atomic_write

# Okabe and Ito's palette, which colour-blind readers can tell apart. A provider has one colour in every plot.
COLOURS = {
    "flashgau-eager": "#0072B2",
    "flashgau-triton": "#D55E00",
    "plain": "#7F7F7F",
    "sdpa": "#E69F00",
    "sdpa-flash": "#E69F00",
    "sdpa-cudnn": "#009E73",
    "flash-pytorch": "#CC79A7",
}
SPARE_COLOURS = ("#56B4E9", "#F0E442", "#000000", "#882255", "#44AA99")
MARKERS = "osD^vP*X"
PLOT_COLUMNS = 4
VERDICT_STYLE = {"met": "green", "missed": "red", "not measured": "yellow"}


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record as `write_text` does."""
    write_text(json.dumps(record, indent=1, allow_nan=False, default=str) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write atomically: a reader, or a run cut short, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(text.encode())


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits.

    >>> duration(0.00123456), duration(2.5), duration(3.21e-5)
    ('1.23 ms', '2.5 s', '32.1 us')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _timing(times: dict[str, Any] | None) -> str:
    if not times:
        return ""
    half = (times["q3_s"] - times["q1_s"]) / 2
    return f"{duration(times['median_s'])} [dim]±{100 * half / times['median_s']:.0f}%[/dim]"


def _rate(entry: dict[str, Any], times: dict[str, Any]) -> str:
    """Work per second of the longest pass that was timed."""
    for run in reversed(PASSES):
        if run in times and run in entry["work"]:
            rate, unit = entry["work"][run] / times[run]["median_s"], entry["work_unit"]
            for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
                if rate >= scale:
                    return f"{rate / scale:.3g} {prefix}{unit}/s"
            return f"{rate:.0f} {unit}/s"
    return ""


def count(tokens: int) -> str:
    """A length in units of 1024 where it has them.

    >>> count(512), count(16384), count(2**20), count(1000)
    ('512', '16k', '1M', '1000')
    """
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def _mib(peak: int | None) -> str:
    return "" if peak is None else f"{peak / 2**20:.3g}" if peak < 100 * 2**20 else f"{peak / 2**20:.0f}"


def _place(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    if "gpu" in machine:
        return f"{machine['gpu']}, which copies {machine['copy_bytes_per_second'] / 1e12:.3g} TB/s (read + written)"
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def results_table(record: dict[str, Any]) -> Table:
    machine = record["machine"]
    place = _place(machine)
    table = Table(title=f"{record['title']}\n[dim]{place}, torch {machine['torch']}[/dim]", title_justify="left")
    table.add_column("case")
    table.add_column("provider")
    for run in PASSES:
        table.add_column(f"{run}\nmedian ±half IQR", justify="right")
    table.add_column("rate\n(longest pass)", justify="right")
    table.add_column("peak MiB\nforward", justify="right")
    table.add_column("peak MiB\nfwd+bwd", justify="right")
    table.add_column("error of allowed,\nor why not measured")
    for entry in record["cases"]:
        name = entry["name"]
        for who, result in entry["providers"].items():
            if result["status"] == "ok":
                if result["check"] is None:
                    note = f"not checked: {escape(result['reason'])}"
                else:
                    rows = result["check"]["rows"]
                    used = max((r["error"] / r["allowed"] for r in rows if r["allowed"]), default=0.0)
                    note = f"[green]{used:.0%}[/green] at N={result['check']['length']}"
                if "memory_failed" in result:
                    note += f"; memory: {escape(result['memory_failed'])}"
            else:
                style = {"skipped": "yellow"}.get(result["status"], "bold red")
                note = f"[{style}]{result['status'].upper()}[/{style}] {escape(result['reason'])}"
            times, peak = result["times"], result["peak_bytes"]
            table.add_row(
                name,
                who,
                *(_timing(times.get(run)) for run in PASSES),
                _rate(entry, times),
                *(_mib(peak.get(run)) for run in PASSES),
                note,
            )
            name = ""
        table.add_section()
    return table


def goals_table(record: dict[str, Any]) -> Table:
    table = Table(title="Goals", title_justify="left")
    for heading in ("case", "goal", "measured", "verdict"):
        table.add_column(heading)
    for entry in record["cases"]:
        name = entry["name"]
        for goal in entry["goals"]:
            measured = "" if goal["measured"] is None else f"{goal['measured']:.2f}x"
            if goal["low"] is not None:
                measured += f" [dim][{goal['low']:.2f}, {goal['high']:.2f}][/dim]"
            style = VERDICT_STYLE[goal["verdict"]]
            table.add_row(name, goal_text(entry, goal), measured, f"[{style}]{goal['verdict']}[/{style}]")
            name = ""
    return table


def goal_text(entry: dict[str, Any], goal: dict[str, Any]) -> str:
    """What a goal asks, in a line."""
    run, ours, bound = goal["run"], goal["ours"], f"{goal['bound']:g}x"
    if goal["metric"] == "flat":
        return f"{run} rate of {ours} within {bound} from N={goal['since']} to N={entry['length']}"
    if goal["metric"] == "floor":
        return f"{run} time of {ours} <= {bound} the floor, {duration(entry['floors'][run])}"
    sign = ">=" if goal["metric"] == "speed" else "<="
    return f"{run} {goal['metric']} of {ours} {sign} {bound} {goal['theirs']}"


def crossings_table(record: dict[str, Any]) -> Table:
    table = Table(title="From which length flashgau is faster (interpolated)", title_justify="left")
    for heading in ("series", "provider", "than", "run", "from"):
        table.add_column(heading)
    for row in record["crossings"]:
        than = f"one {row['than']} in place of {row['stands_for']}"
        if row["since"] is None:
            since = f"not up to N={row['longest']}"
        elif row["since"] == row["shortest"]:
            since = f"at N={row['shortest']} already"
        else:
            since = f"N={row['since']:.0f}"
        table.add_row(row["group"], row["provider"], than, row["run"], since)
    return table


def growth_table(record: dict[str, Any]) -> Table:
    table = Table(title="Peak memory when the length doubles: largest factor", title_justify="left")
    for heading in ("series", "provider", "run", "factor", "at", "verdict"):
        table.add_column(heading)
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in record["memory_growth"]:
        key = (row["group"], row["provider"], row["run"])
        if key not in worst or row["factor"] > worst[key]["factor"]:
            worst[key] = row
    for (group, provider, run), row in worst.items():
        verdict = row["verdict"]
        shown = (
            ""
            if verdict is None
            else f"[{VERDICT_STYLE[verdict]}]{verdict}[/{VERDICT_STYLE[verdict]}] (<= {row['bound']:g}x)"
        )
        table.add_row(group, provider, run, f"{row['factor']:.2f}x", f"{row['from']} to {row['to']}", shown)
    return table


def show(record: dict[str, Any], console: Console) -> None:
    """Print the tables that have something in them."""
    console.print(results_table(record))
    if any(entry["goals"] for entry in record["cases"]):
        console.print(goals_table(record))
    if record["crossings"]:
        console.print(crossings_table(record))
    if record["memory_growth"]:
        console.print(growth_table(record))
    if not record["complete"]:
        console.print("[yellow]Interrupted: this is what was measured until then.[/yellow]")


def _colour(name: str, names: list[str]) -> str:
    others = [n for n in names if n not in COLOURS]
    return COLOURS.get(name) or SPARE_COLOURS[others.index(name) % len(SPARE_COLOURS)]


def _panel(axis: Axes, entries: list[dict[str, Any]], key: str, scale: float, names: list[str]) -> dict[str, Any]:
    """One quantity of one group against length, on logarithmic axes. Returns what was drawn, by provider."""
    drawn: dict[str, Any] = {}
    largest, smallest = 0.0, math.inf
    for place, who in enumerate(names):
        points = []
        for entry in entries:
            value = _value(entry, who, key)
            if value is not None:
                points.append((entry["length"], *(scale * v for v in value)))
        if not points:
            continue
        x, low, middle, high = zip(*points, strict=True)
        below = [m - lo for m, lo in zip(middle, low, strict=True)]
        above = [hi - m for m, hi in zip(middle, high, strict=True)]
        marker = MARKERS[place % len(MARKERS)]
        style: dict[str, Any] = {"color": _colour(who, names), "marker": marker, "markersize": 4.5}
        drawn[who] = axis.errorbar(x, middle, yerr=[below, above], capsize=2, linewidth=1.4, **style)
        largest, smallest = max(largest, *middle), min(smallest, *middle)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sorted({entry["length"] for entry in entries}))
    plain_number = FuncFormatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(round(value))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if largest < 1e3 * smallest else (1.0,)))
    axis.yaxis.set_major_formatter(plain_number)
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", linewidth=0.4, alpha=0.6)
    return drawn


def _figure(record: dict[str, Any], rows: list[tuple[str, str, float]], path: Path) -> bool:
    """A column of panels per group of cases, wrapped; a row per (key, label, factor to the label's unit) measured."""
    places = [(entry, who) for entry in record["cases"] for who in entry["providers"]]
    rows = [row for row in rows if any(_value(entry, who, row[0]) for entry, who in places)]
    if not rows:
        return False
    groups = list(dict.fromkeys(entry["group"] for entry in record["cases"]))
    names = list(dict.fromkeys(who for entry in record["cases"] for who in entry["providers"]))
    columns = min(len(groups), PLOT_COLUMNS)
    bands = -(-len(groups) // columns)
    height = bands * len(rows)
    figure = Figure(figsize=(max(4.2 * columns, 5.5), 2.9 * height + 1.2), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharey="row")
    for axis in axes.flat:
        axis.set_visible(False)
    drawn: dict[str, Any] = {}
    for place, group in enumerate(groups):
        band, column = divmod(place, columns)
        entries = sorted((e for e in record["cases"] if e["group"] == group), key=lambda e: e["length"])
        for row, (key, label, scale) in enumerate(rows):
            axis = axes[band * len(rows) + row][column]
            axis.set_visible(True)
            drawn |= _panel(axis, entries, key, scale, names)
            if key.startswith("rate/"):
                roofs = [(e["length"], scale * r) for e in entries if (r := roof(record, e, key[5:])) is not None]
                if roofs:
                    drawn["the hardware's limit"] = axis.plot(*zip(*roofs, strict=True), "k--", linewidth=1)[0]
            axis.set_xlabel(record["x_label"] if row == len(rows) - 1 else "")
            axis.set_ylabel(label if column == 0 else "")
            axis.set_title(group if row == 0 else "", fontsize=10)
    machine = record["machine"]
    origin = f"{_place(machine)}, torch {machine['torch']}, {machine['date'][:10]}"
    figure.suptitle(f"{record['title']}\n{origin}", fontsize=10)
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(len(drawn), 2 * columns, 6), frameon=False
    )
    figure.savefig(path, dpi=130)
    return True


def _value(entry: dict[str, Any], who: str, key: str) -> tuple[float, float, float] | None:
    """(low, middle, high) of what is plotted, None if not measured. `key`: "time/", "rate/" or "memory/" and a pass."""
    kind, run = key.split("/")
    result = entry["providers"].get(who)
    if result is None:
        return None
    if kind == "memory":
        peak = result["peak_bytes"].get(run)
        return (peak, peak, peak) if peak else None
    times = result["times"].get(run)
    if not times:
        return None
    if kind == "time":
        return times["q1_s"], times["median_s"], times["q3_s"]
    work = entry["work"].get(run)
    return (work / times["q3_s"], work / times["median_s"], work / times["q1_s"]) if work else None


def roof(record: dict[str, Any], entry: dict[str, Any], run: str) -> float | None:
    """The rate of work that the hardware allows: by the case's floor of time, by how fast the GPU copies, or the
    CPU's products: of bf16 as they are or as fp32, whichever is faster."""
    if run in entry.get("floors", {}) and entry["work"].get(run):
        return float(entry["work"][run] / entry["floors"][run])
    products = record["machine"].get("product_flop_per_second")
    if products and entry["work_unit"] == "FLOP":
        return float(max(products.values()) if entry["dtype"] == "bf16" else products["fp32"])
    copied = record["machine"].get("copy_bytes_per_second")
    return float(copied) if copied and entry["work_unit"] == "B" else None


def plot(record: dict[str, Any], out: Path) -> list[Path]:
    """Draw `time.png` and `memory.png` on logarithmic axes; return those that show something."""
    out.mkdir(parents=True, exist_ok=True)
    times = [(f"time/{FORWARD}", "forward (ms)", 1e3), (f"time/{TRAINING}", "forward + backward (ms)", 1e3)]
    peaks = [(f"memory/{FORWARD}", "forward, peak (MiB)", 2.0**-20)]
    peaks += [(f"memory/{TRAINING}", "forward + backward, peak (MiB)", 2.0**-20)]
    return [
        path for rows, path in ((times, out / "time.png"), (peaks, out / "memory.png")) if _figure(record, rows, path)
    ]


def plot_rates(record: dict[str, Any], path: Path) -> bool:
    """Draw work per second against length, under the hardware's limit where that is known; whether there was any.

    Of cases with different units of work, those in the first one's.
    """
    units = [entry["work_unit"] for entry in record["cases"] if entry["work"]]
    if not units:
        return False
    unit = units[0]
    record = record | {"cases": [entry for entry in record["cases"] if entry["work_unit"] == unit]}
    prefix, scale = ("", 1.0) if unit == "token" else ("G", 1e-9)
    rows = [(f"rate/{run}", f"{run} ({prefix}{unit}/s)", scale) for run in PASSES]
    path.parent.mkdir(parents=True, exist_ok=True)
    return _figure(record, rows, path)


def plot_times(record: dict[str, Any], path: Path) -> bool:
    """Draw time against length; whether there was any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return _figure(record, [(f"time/{run}", f"{run} (ms)", 1e3) for run in PASSES], path)

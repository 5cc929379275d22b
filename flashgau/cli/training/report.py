"""The report of `flashgau demo`: one HTML file with everything in it, plots included, and nothing from elsewhere.

`render` takes the plain data that a demo collects (what `demo.json` holds) and leaves out, by name, what is not
there, so that a demo that was stopped half-way still has a report.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from flashgau.cli.check import number
from flashgau.cli.console import mebibytes, seconds
from flashgau.cli.doctor import backend_rows, facts_rows
from flashgau.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Facts = Mapping[str, Any]

# Okabe and Ito's colours, told apart by every kind of colour vision; markers and dashes say the same again.
BLUE, VERMILLION, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#1a1d21"
STYLES: dict[str, dict[str, Any]] = {
    "naive attention": {"color": VERMILLION, "marker": "s", "linestyle": "--"},
    "flashgau attention": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "FLASH": {"color": GREEN, "marker": "^", "linestyle": "-."},
}

STYLE_SHEET = """
:root { --ink: #1a1d21; --soft: #5b6570; --line: #dfe3e8; --tint: #f5f7f9; --accent: #0072B2; --bad: #b3261e; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: #fff;
       font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 2.2rem 1.1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; }
.soft, figcaption, small { color: var(--soft); }
figcaption, small { font-size: .88rem; line-height: 1.45; }
figure { margin: 1.1rem 0; }
figure img { display: block; width: 100%; max-width: 38rem; height: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { background: var(--tint); border-radius: .5rem; padding: .8rem .9rem; }
.card b { display: block; font-size: 1.3rem; line-height: 1.3; white-space: nowrap;
          font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--soft); font-size: .88rem; line-height: 1.35; }
.card.bad b { color: var(--bad); }
.wide { overflow-x: auto; margin: .9rem 0; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.bad td { color: var(--bad); font-weight: 600; }
pre { background: var(--tint); border-radius: .5rem; padding: .9rem 1rem;
      white-space: pre-wrap; overflow-wrap: anywhere;
      font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre b { color: var(--accent); }
details summary { cursor: pointer; color: var(--accent); margin: .7rem 0; }
@media (max-width: 30rem) { body { font-size: 16px; } h1 { font-size: 1.6rem; } main { padding-top: 1.4rem; } }
@media print { details { display: none; } .card, pre { border: 1px solid var(--line); } }
"""


# plots ----------------------------------------------------------------------------------------------------


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot with named axes. No pyplot: a report has no use for windows and global state."""
    with extra("plots"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.1), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(which="major", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure, axes: Axes) -> bytes:
    """The picture, with its legend above the axes, where it can cover no data."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=11, borderaxespad=0.2,
        handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def loss_plot(log: Sequence[Facts]) -> bytes | None:
    """PNG of training and validation loss, in bits per byte, over training steps; None without any."""
    figure, axes = _figure("training step", "loss (bits per byte)")
    styles: dict[str, dict[str, Any]] = {
        "train": {"color": BLUE, "linewidth": 1.3, "marker": ".", "markersize": 3, "label": "training"},
        "validation": {"color": VERMILLION, "marker": "o", "markersize": 4.5, "label": "validation"},
    }
    highest = 0.0
    for kind, style in styles.items():
        points = [(row["step"], row["loss"] / math.log(2)) for row in log if row["kind"] == kind]
        points = [(step, bits) for step, bits in points if math.isfinite(bits)]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
            highest = max(highest, *(bits for _, bits in points))
    if not axes.lines:
        return None
    axes.set_ylim(0, 1.05 * highest)
    return _png(figure, axes)


def length_plot(points: Sequence[Facts], value: Callable[[Facts], float | None], label: str) -> bytes | None:
    """PNG of a cost against length, both on logarithmic scales; None if nothing was measured."""
    with extra("plots"):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure, axes = _figure("length (tokens)", label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for provider, style in STYLES.items():
        pairs = [(point["length"], value(point)) for point in points if point["provider"] == provider]
        drawn = [(length, cost) for length, cost in pairs if cost]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), label=provider, markersize=6, linewidth=1.8, **style)
    if not axes.lines:
        return None
    axes.set_xticks(sorted({point["length"] for point in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    return _png(figure, axes)


def time_plot(points: Sequence[Facts]) -> bytes | None:
    """PNG of the median time of forward + backward against length."""
    return length_plot(points, lambda point: point["median"] and point["median"] * 1e3, "time (ms)")


def memory_plot(points: Sequence[Facts]) -> bytes | None:
    """PNG of the peak memory of forward + backward against length."""
    label = "peak memory beyond the inputs (MiB)"
    return length_plot(points, lambda point: point["peak_bytes"] and point["peak_bytes"] / 2**20, label)


# HTML -----------------------------------------------------------------------------------------------------


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: int = 0,
    bad: Callable[[int], bool] | None = None,
) -> str:
    """An HTML table whose last `numbers` columns are right-aligned; it scrolls sideways where it is too wide."""
    first = len(head) - numbers

    def cells(tag: str, values: Sequence[str]) -> str:
        kind = (" class=number" if column >= first else "" for column in range(len(values)))
        return "".join(f"<{tag}{own}>{escape(value)}</{tag}>" for own, value in zip(kind, values, strict=True))

    body = "".join(
        f"<tr{' class=bad' if bad and bad(index) else ''}>{cells('td', row)}</tr>\n" for index, row in enumerate(rows)
    )
    header = f"<thead><tr>{cells('th', head)}</tr></thead>\n" if any(head) else ""
    return f"<div class=wide><table>\n{header}<tbody>\n{body}</tbody></table></div>\n"


def _picture(png: bytes | None, alternative: str, caption: str) -> str:
    if png is None:
        return "<p class=soft>Nothing was measured.</p>\n"
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(alternative)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _card(value: str, label: str, bad: bool = False) -> str:
    return f'<div class="card{" bad" if bad else ""}"><b>{escape(value)}</b><span>{escape(label)}</span></div>\n'


def _cards(facts: Facts) -> str:
    cards = []
    if check := facts.get("check"):
        agree, count = check["cases"] - check["missed"], check["cases"]
        text = "cases agree with the fp64 reference"
        cards.append(_card(f"{agree} / {count}", text, bad=check["missed"] > 0))
    if (training := facts.get("training")) and training["bits_per_byte"] is not None:
        label = f"bits per byte on unseen files after {seconds(training['elapsed_seconds'])}"
        cards.append(_card(f"{training['bits_per_byte']:.2f}", label))
    if points := facts.get("measurements"):
        for provider, against in (("FLASH", "naive attention"), ("flashgau attention", "naive attention")):
            if ratio := _advantage(points, provider, against):
                length, times, memory = ratio
                label = f"the speed of {against}: {provider} at {length:,} tokens, in 1/{memory:.0f} of the memory"
                cards.append(_card(f"{times:.1f} \N{MULTIPLICATION SIGN}", label))
    return f"<div class=cards>\n{''.join(cards)}</div>\n" if cards else ""


def _advantage(points: Sequence[Facts], provider: str, against: str) -> tuple[int, float, float] | None:
    """(length, time ratio, memory ratio) at the longest length that both reached."""
    by_key = {(point["provider"], point["length"]): point for point in points if point["median"]}
    shared = [n for name, n in by_key if name == provider and (against, n) in by_key]
    if not shared:
        return None
    ours, theirs = by_key[provider, max(shared)], by_key[against, max(shared)]
    return max(shared), theirs["median"] / ours["median"], theirs["peak_bytes"] / max(ours["peak_bytes"], 1)


def _machine(doctor: Facts) -> str:
    html = _table(("", ""), facts_rows(dict(doctor)))
    head = ("operation", "device", "default backend", "not usable here")
    return html + _table(head, backend_rows(dict(doctor)))


def _agreement(check: Facts) -> str:
    rows, extent = check["rows"], check.get("extent", "every operation and option")
    html = (
        f"<p>{escape(extent)}, forward and backward, against the naive formula in fp64 on the same values. The "
        "largest error may be twice that of plain PyTorch in the same dtype (three times for gradients), plus a few "
        f"units in the last place. {check['cases']} cases in {seconds(check['seconds'])}: "
        f"{check['missed'] or 'none'} missed.</p>\n"
    )
    lines = [
        (op, backends, str(count), str(missed), "-" if share is None else f"{share:.0%}")
        for op, backends, count, missed, share in check["summary"]
    ]
    head = ("operation", "backend", "cases", "missed", "largest error / allowed")
    html += _table(head, lines, numbers=3, bad=lambda index: lines[index][3] != "0")
    full = [
        (
            row["op"],
            row["options"],
            row["shape"],
            row["dtype"],
            row["verdict"] + (f": {row['detail']}" if row["detail"] else ""),
            row["worst"],
            number(row["max_error"]),
            number(row["plain_max_error"]),
            number(row["tolerance"]),
        )
        for row in rows
    ]
    columns = (
        "operation",
        "options",
        "shape",
        "dtype",
        "verdict",
        "worst in",
        "error",
        "plain PyTorch",
        "allowed",
    )
    table = _table(columns, full, numbers=3, bad=lambda index: rows[index]["verdict"] != "ok")
    return html + f"<details><summary>Every case</summary>\n{table}</details>\n"


def _training(training: Facts) -> str:
    config = training["config"]
    html = (
        f"<p>A byte-level FLASH language model with {training['parameters']:,} parameters, trained for "
        f"{training['step']:,} steps of {config['batch'] * config['accumulate']} &times; {config['length']} bytes "
        f"on {escape(training['data_source'])}. "
    )
    if training["tokens_per_second"] is not None:
        html += f"It read {training['tokens_per_second']:,.0f} bytes per second. "
    html += "The files of the validation text are never trained on.</p>\n"
    if training.get("interrupted"):
        html += "<p>Training was interrupted before its time was up.</p>\n"
    caption = (
        "Cross-entropy of the next byte. A uniform guess costs 8 bits per byte. "
        "The training curve is the mean of the steps since its last point."
    )
    return html + _picture(loss_plot(training["log"]), "loss against training steps", caption)


def _sample(sample: Facts) -> str:
    html = (
        f"<p>{sample['new_bytes']} bytes written by the model just trained, at temperature {sample['temperature']:g}, "
        f"one byte at a time, {sample['bytes_per_second']:.0f} bytes per second. What the model remembers of the "
        f"text has constant size: {mebibytes(sample['state_bytes'][0])} after the prompt, "
        f"{mebibytes(sample['state_bytes'][1])} at the end. The prompt is in bold.</p>\n"
    )
    return html + f"<pre><b>{escape(sample['prompt'])}</b>{escape(sample['text'])}</pre>\n"


def _lengths_table(points: Sequence[Facts], value: Callable[[Facts], str | None]) -> str:
    lengths = sorted({point["length"] for point in points})
    by_key = {(point["provider"], point["length"]): point for point in points}
    rows = []
    for length in lengths:
        row = [f"{length:,}"]
        for provider in STYLES:
            point = by_key.get((provider, length))
            row.append("-" if point is None else (value(point) or point["skipped"] or "-"))
        rows.append(row)
    return _table(("length", *STYLES), rows, numbers=3)


def _time(facts: Facts) -> str:
    sizes = facts["sizes"]
    html = (
        f"<p>One way to mix tokens in a model of width {sizes['width']}, causal, fp32, forward and backward, batch 1: "
        f"attention with {sizes['heads']} heads, FLASH with narrow width {sizes['narrow']}, values of width "
        f"{2 * sizes['width']} and chunks of {sizes['chunk']}. The operations alone, without the projections around "
        "them.</p>\n"
    )
    points = facts["measurements"]
    caption = "Median of runs in which the three take turns. Both axes are logarithmic."
    html += _picture(time_plot(points), "time against length", caption)
    return html + _lengths_table(points, lambda point: point["median"] and seconds(point["median"]))


def _memory(facts: Facts) -> str:
    points = facts["measurements"]
    how = (
        "summed up from PyTorch's record of every allocation and release; scratch space inside a BLAS library is "
        "not in it"
        if facts.get("device", "cpu") == "cpu"
        else "as PyTorch's allocator on the GPU reports it"
    )
    caption = f"Most bytes held at once during forward and backward, beyond the inputs: {how}. Logarithmic axes."
    html = _picture(memory_plot(points), "memory against length", caption)
    return html + _lengths_table(points, lambda point: point["peak_bytes"] and mebibytes(point["peak_bytes"]))


# Title, what must be there, and how to write it.
SECTIONS: tuple[tuple[str, str, Callable[[Facts], str]], ...] = (
    ("Training", "training", lambda facts: _training(facts["training"])),
    ("A sample", "sample", lambda facts: _sample(facts["sample"])),
    ("Time against length", "measurements", _time),
    ("Memory against length", "measurements", _memory),
    ("Agreement with the reference", "check", lambda facts: _agreement(facts["check"])),
    ("The machine", "doctor", lambda facts: _machine(facts["doctor"])),
)


def render(facts: Facts) -> str:
    """The page for what a demo found so far: a complete HTML document with no outside resources."""
    title = "flashgau demo"
    state = "" if facts.get("finished") else " The demo was stopped before its end, or is still running."
    took = f", {seconds(facts['seconds'])}" if facts.get("seconds") else ""
    parts = [
        f"<h1>{title}</h1>\n<p class=soft>flashgau {escape(facts['version'])}, {escape(facts['started'])}{took}."
        f"{state}</p>\n",
        _cards(facts),
    ]
    for heading, key, write in SECTIONS:
        body = write(facts) if facts.get(key) else "<p class=soft>Not done.</p>\n"
        parts.append(f"<section>\n<h2>{heading}</h2>\n{body}</section>\n")
    return (
        "<!DOCTYPE html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{title}, {escape(facts['started'])}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )

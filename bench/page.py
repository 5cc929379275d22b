"""``python -m bench report``: everything under `bench/results/` as the documentation's page on performance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import report
from bench.cases import FORWARD, PASSES, TRAINING
from bench.harness import SCHEMA, SCHEMA_VERSION
from flashgau.files import parse_json, read_text

ASSETS = Path("assets") / "performance"
HEAD = """# Performance

All numbers of this page come from the JSON files under `bench/results/`, which have every single time, by
`python -m bench report`. Times are medians; "speed" is the fastest other implementation's time over flashgau's: above 1
flashgau is faster. How they are measured: [Benchmarks](benchmarks.md).
"""


def records(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every benchmark's record below a folder, by its path. Other files are left alone."""
    found = []
    for path in sorted(results.rglob("*.json")):
        try:
            record = parse_json(read_text(path), str(path))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and (record.get("schema"), record.get("schema_version")) == (
            SCHEMA,
            SCHEMA_VERSION,
        ):
            found.append((path, record))
    return found


def write(results: Path, docs: Path) -> list[Path]:
    """Write `docs/performance.md` and its plots; return what was written.

    Raises:
        ValueError: if there is no record, or one lacks something; then nothing is written.
    """
    found = records(results)
    if not found:
        raise ValueError(f"no results of a benchmark under {results}")
    for path, record in found:
        try:
            section(record, {}, path.parent.name)
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is no record of a benchmark of this version: {reason}") from error
    text, written = [HEAD], []
    places = {path: _place(path.relative_to(results), record) for path, record in found}
    for place in dict.fromkeys(places.values()):
        text.append(f"\n## {place}\n")
        for path, record in found:
            if places[path] == place:
                name = "_".join(path.relative_to(results).parent.parts)
                plots = {}
                for kind, draw in (("time", report.plot_times), ("rate", report.plot_rates)):
                    to = ASSETS / f"{name}_{kind}.png"
                    if draw(record, docs / to):
                        plots[kind] = to
                        written.append(docs / to)
                text.append(section(record, plots, path.parent.name))
    page = docs / "performance.md"
    report.write_text("\n".join(text), page)
    return [page, *written]


def _place(path: Path, record: dict[str, Any]) -> str:
    """The machine's name, and the folder under `results` that is its own: machines of one name may differ."""
    facts = record["machine"]
    return f"{facts.get('gpu') or facts['cpu']} ({path.parts[0]})"


def section(record: dict[str, Any], plots: dict[str, Path], name: str) -> str:
    """One benchmark: when and with what, its plots, its table."""
    facts = record["machine"]
    versions = [f"torch {facts['torch']}", f"triton {facts['triton']}", f"flashgau {facts['flashgau']}"]
    versions += [f"CUDA {facts['cuda']}, driver {facts['driver']}"] if facts.get("cuda") else []
    versions += [f"{peer} {version}" for peer, version in facts["peers"].items()]
    where = "" if facts.get("gpu") else f", {facts['threads']} threads"
    title = record["title"] if name == record["operation"] else f"{record['title']} ({name.replace('_', ' ')})"
    lines = [f"### {title}", "", f"{facts['date'][:10]}{where}; {', '.join(versions)}.", ""]
    if not record["complete"]:
        lines += ["This run was cut short: what it measured until then.", ""]
    for kind, what in (("time", "Time"), ("rate", "Work per second")):
        if kind in plots:
            lines += [f"![{what} against length: {title}]({plots[kind].as_posix()})", ""]
    return "\n".join(lines + table(record)) + "\n"


def table(record: dict[str, Any]) -> list[str]:
    """A line of Markdown per case and pass: ours, the fastest other, speed, part of the limit, peak memory."""
    limited = any(report.roof(record, entry, run) for entry in record["cases"] for run in PASSES)
    heads = ["case", "pass", "flashgau", "fastest other", "speed", *(["of the limit"] if limited else []), "peak MiB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for entry in record["cases"]:
        for run in (FORWARD, TRAINING):
            timed = {
                who: result["times"][run]["median_s"]
                for who, result in entry["providers"].items()
                if run in result["times"] and result["status"] == "ok"
            }
            ours = {who: t for who, t in timed.items() if who.startswith("flashgau")}
            others = {
                who: t for who, t in timed.items() if who not in ours and entry["providers"][who]["check"] is not None
            }
            if not ours:
                continue
            who = min(ours, key=lambda name: ours[name])
            best = min(others, key=lambda name: others[name], default=None)
            roof, peak = report.roof(record, entry, run), entry["providers"][who]["peak_bytes"].get(run)
            cells = [entry["name"], run, f"{report.duration(ours[who])} ({who.removeprefix('flashgau-')})"]
            cells += (
                [f"{report.duration(others[best])} ({best})", f"{others[best] / ours[who]:.2f}x"] if best else ["", ""]
            )
            cells += [f"{entry['work'][run] / ours[who] / roof:.0%}" if roof else ""] if limited else []
            lines.append("| " + " | ".join([*cells, f"{peak / 2**20:.0f}" if peak else ""]) + " |")
    return lines

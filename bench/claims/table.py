"""The table of the documentation: every claim beside the records that are committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import report
from bench.claims import NAMES, load
from flashgau.files import parse_json, read_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "bench" / "results" / "claims", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- claims -->", "<!-- end of claims -->"


def records(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Every committed record, by its path."""
    found = [parse_json(read_text(path), str(path)) for path in sorted(results.rglob("results.json"))]
    return [record for record in found if record.get("schema") == "flashgau-claims"]


def markdown(results: Path = RESULTS) -> str:
    """A row for each record of each claim, or one that says that there is none."""
    lines = ["| claim | scale, machine, day | outcome | with what numbers |", "|---|---|---|---|"]
    found = records(results)
    for name in NAMES:
        here = [record for record in found if record["claim"] == name]
        for record in here:
            machine, settings = record["machine"], record["settings"]
            place = machine.get("gpu") or f"{machine['cpu']}, {settings['threads']} threads"
            budget = f"{settings['minutes']:g} min, {settings['seeds']} seeds"
            where = f"{settings['scale']}, {place}, {machine['date'][:10]}; {budget}"
            told = "<br>".join(one["text"] for one in record["comparisons"]).replace("|", "\\|")
            lines.append(f"| `{name}` | {where} | {record['outcome']} | {told} |")
        if not here:
            lines.append(f"| `{name}` | | not run yet | {load(name).statement} |")
    return "\n".join(lines)


def fill(page: Path = PAGE) -> Path:
    """Write the table between its marks in a page.

    Raises:
        ValueError: the page has no such marks.
    """
    text = read_text(page)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END} for the table to stand between")
    report.write_text(f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}", page)
    return page

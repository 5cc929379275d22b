"""`make matrix`: the operator, kernel and model tests against the PyTorch and Triton that GPU machines carry and the
newest that are supported, each in an environment of its own, and the table of docs/matrix.md.

An environment, `.matrix/NAME`, is made once and used again as long as what it should hold is the same. Every test file
runs in a process of its own, whose results are kept: a run that was stopped goes on where it was, on the same commit.
Standard library only: whatever python3 runs it makes the environments.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".matrix"
PAGE = ROOT / "docs" / "matrix.md"
BEGIN, END = "<!-- the table, written by make matrix -->", "<!-- end of the table -->"

# What is tested, by the name of its environment. PyTorch 2.14.1 asks for just this Triton, and the others for theirs.
# Up to 3.6, Triton's interpreter needs numpy below 2.4. Everything else is as in constraints.txt.
PAIRS = {
    "torch-2.11": {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"},
    "torch-2.14": {"torch": "2.14.1", "triton": "3.8.0", "numpy": "2.4.6"},
}

FILES = [
    "operators",
    "pytorch",
    "compile",
    "kernels_memory",
    "kernels_blocks",
    "kernels_configurations",
    "kernels_limits",
    "kernels_compiled",
    "attention",
    "attention_laws",
    "attention_packing",
    "glu",
    "gau",
    "mixed_chunk",
    "mixed_chunk_laws",
    "mixed_chunk_states",
    "mixed_chunk_packing",
    "fused_layers",
    "nn",
    "models_decoding",
    "models_loss",
    "models_config",
    "models_files",
]


def constraints(pins: dict[str, str]) -> str:
    """constraints.txt with these versions instead of its own."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [x for x in lines if x and not x.startswith("#") and x.split("==")[0] not in pins]
    return "\n".join([*(f"{name}=={version}" for name, version in pins.items()), *kept, ""])


def environment(name: str, pins: dict[str, str]) -> Path:
    """The Python of the environment of that name, which is made unless it is there and complete."""
    place = PLACE / name
    python, mark = place / "bin" / "python", place / "complete.txt"
    wanted = constraints(pins) + (ROOT / "pyproject.toml").read_text()
    if python.exists() and mark.exists() and mark.read_text() == wanted:
        print(f"{name}: its environment is there", flush=True)
        return python
    print(f"{name}: installing {', '.join(f'{k} {v}' for k, v in pins.items())}; several GB the first time", flush=True)
    mark.unlink(missing_ok=True)
    if not python.exists():
        venv.create(place, with_pip=True)
    listed = place / "constraints.txt"
    listed.write_text(constraints(pins))
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", listed, "-e", ".[test]"]
    subprocess.run(install, cwd=ROOT, check=True)
    mark.write_text(wanted)
    return python


def versions(python: Path) -> dict[str, str]:
    """What the environment has in fact."""
    code = """
import importlib.metadata, json, platform
found = {name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "triton", "numpy")}
print(json.dumps({**found, "python": platform.python_version()}))
"""
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def commit() -> str | None:
    """The commit that is tested; None if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout:
        return None
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def results(report: Path) -> Counter[str]:
    """What a file's report counts: the tests that passed, failed and were skipped, and the seconds they took."""
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - failed - skipped
    return Counter(passed=passed, failed=failed, skipped=skipped, seconds=round(float(suite.get("time", 0))))


def run(name: str, python: Path, workers: int) -> Counter[str]:
    """The results of all files together; those that the environment already has from this commit are not run again."""
    place, mark = PLACE / f"{name}.results", PLACE / f"{name}.commit"
    tested = commit()
    if tested is None or not mark.exists() or mark.read_text() != tested:
        shutil.rmtree(place, ignore_errors=True)
        mark.write_text(str(tested))
    total: Counter[str] = Counter()
    for file in FILES:
        report, unfinished = place / f"{file}.xml", place / f"{file}.part"
        if not report.exists():
            options = ["-n", str(workers), "--dist", "worksteal", "-p", "no:cacheprovider", f"--junitxml={unfinished}"]
            tests = [python, "-m", "pytest", *options, f"tests/test_{file}.py"]
            status = subprocess.run(tests, cwd=ROOT, env=os.environ).returncode
            if status not in (0, 1):  # 1: some failed; the others mean that the tests did not run
                raise SystemExit(f"make matrix: pytest ended with {status} in {name}; the table is as it was")
            unfinished.rename(report)
        found = results(report)
        print(f"{name}: {file}: " + ", ".join(f"{number} {what}" for what, number in found.items()), flush=True)
        total += found
    return total


def table(rows: list[dict[str, str | int]]) -> str:
    """The results as a table of Markdown."""
    columns = ["torch", "triton", "numpy", "python", "passed", "failed", "skipped", "minutes", "date"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows)])


def replaced(page: str, text: str) -> str:
    """The page with `text` between its two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Test other versions of PyTorch and Triton; write docs/matrix.md.")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that test at once (2)")
    workers = parser.parse_args().workers
    PLACE.mkdir(exist_ok=True)
    pythons = {name: environment(name, pins) for name, pins in PAIRS.items()}
    rows: list[dict[str, str | int]] = []
    for name, python in pythons.items():
        found = versions(python)
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in found.items()), flush=True)
        total = run(name, python, workers)
        counts = {what: total[what] for what in ("passed", "failed", "skipped")}
        minutes = f"{total['seconds'] / 60:.1f}"
        rows.append({**found, **counts, "minutes": minutes, "date": datetime.date.today().isoformat()})
    print(table(rows))
    PAGE.write_text(replaced(PAGE.read_text(), table(rows)))
    print(f"written to {PAGE.relative_to(ROOT)}")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

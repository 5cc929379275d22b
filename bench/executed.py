"""What `flashgau check --execute --out FILE` kept, as a result of this folder and as the table of docs/proof.md.

python -m bench.executed FILE     writes bench/results/executed/results.json and prints the table
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import cpu_model
from flashgau import tables

RESULTS = Path(__file__).parent / "results" / "executed" / "results.json"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FIELDS = ("op", "options", "shape", "dtype", "verdict", "worst", "max_error", "tolerance")


def compact(kept: dict[str, Any]) -> dict[str, Any]:
    """Versions, the machine, the day, and one list for each case: its target, then `FIELDS`."""
    rows = sorted(
        [row["row"]["backend"].rpartition(" ")[2], *(row["row"][name] for name in FIELDS)] for row in kept["rows"]
    )
    day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"schema": "flashgau-executed", "schema_version": 1, "versions": kept["versions"],
            "processor": cpu_model(), "date": day, "fields": ["target", *FIELDS], "rows": rows}  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """One row for each kernel in its configurations and for each operation with all options: cases, and the largest
    error as a share of what is allowed."""
    rows = [dict(zip(results["fields"], row, strict=True)) for row in results["rows"]]
    targets, dtypes = sorted({row["target"] for row in rows}), list(DTYPES)
    cells: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        kernel = row["options"].split(" ")[0]
        name = f"`{kernel}`" if kernel in tables.shipped_kernels() else f"{row['op']}, options"
        share = row["max_error"] / row["tolerance"] if row["tolerance"] else 0.0
        share = share if row["verdict"] == "ok" else float("inf")
        cells.setdefault(name, {}).setdefault((row["target"], row["dtype"]), []).append(share)
    columns = [(target, dtype) for target in targets for dtype in dtypes]
    lines = ["| | " + " | ".join(f"{target} {DTYPES[dtype]}" for target, dtype in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for name in sorted(cells, key=lambda name: (not name.startswith("`"), name)):
        shares = [cells[name].get(column, []) for column in columns]
        texts = [f"{len(x)}: {max(x):.0%}" if x and max(x) < float("inf") else "missed" if x else "" for x in shares]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the result, and print its table."""
    results = compact(json.loads(Path(sys.argv[1]).read_text()))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**results, "rows": []}).removesuffix("[]}")
    RESULTS.write_text(head + "[\n" + ",\n".join(json.dumps(row) for row in results["rows"]) + "\n]}\n")
    print(markdown(results))


if __name__ == "__main__":
    main()

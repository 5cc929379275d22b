"""How much of what the package exports has a type that every checker finds, by pyright's verifier: at least 98%.

    python -m pip install 'pyright[nodejs]'
    make completeness

It looks at the package as it is installed, which `make types` leaves in build/types.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LEAST = 0.98
TYPES = Path(__file__).resolve().parents[1] / "build" / "types"


def unclear(symbol: dict[str, Any]) -> bool:
    """Whether a checker may find another type, or none."""
    return bool(symbol["isExported"] and (not symbol["isTypeKnown"] or symbol.get("isTypeAmbiguous")))


def main() -> int:
    """Exit status 1 below the least."""
    bin_folder = Path(sys.executable).parent
    paths = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(TYPES)}
    command = ["pyright", "--verifytypes", "flashgau", "--ignoreexternal", "--outputjson"]
    try:
        done = subprocess.run(
            command, cwd=TYPES, env={**os.environ, **paths}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        print("pyright is not installed: python -m pip install 'pyright[nodejs]'")
        return 1
    found = json.loads(done.stdout)["typeCompleteness"]
    for symbol in filter(unclear, found["symbols"]):
        print(symbol["name"], *(x["message"].splitlines()[0] for x in symbol["diagnostics"][:1]), sep=": ")
    score, counts = found["completenessScore"], found["exportedSymbolCounts"]
    print(
        f"{100 * score:.1f}% of {sum(counts.values())} exported symbols have a known type (at least {100 * LEAST:.0f}%)"
    )
    return int(score < LEAST)


if __name__ == "__main__":
    sys.exit(main())

"""What `flashgau new-kernel` writes."""

from __future__ import annotations

from pathlib import Path

from flashgau.cli.console import USAGE, fail

_TEMPLATES = Path(__file__).parent / "templates"


def write(name: str, out: Path) -> int:
    """A kernel of this name and its test, in files that are not there yet."""
    files = {out / f"{name}.py": "kernel.py.txt", out / f"test_{name}.py": "test.py.txt"}
    for path in files:
        if path.exists():
            fail("new-kernel", f"{path} is there already; expected another name, or another --out", USAGE)
    out.mkdir(parents=True, exist_ok=True)
    for path, template in files.items():
        text = (_TEMPLATES / template).read_text(encoding="utf-8").replace("NAME", name)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        print(f"wrote {path}")
    print(f"run  pytest {out / f'test_{name}.py'}")
    return 0

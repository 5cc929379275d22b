"""The scripts of docs/proof.md run, one after the other, and print what the page says."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "proof.md"


def test_the_scripts_of_the_page(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    blocks = [re.search(rf'```text title="{name}"\n(.*?)```', text, re.DOTALL)[1] for name in ("proof.py", "ours.py")]
    script = tmp_path / "script.py"  # Triton reads a kernel's source from its file
    script.write_text("".join(blocks))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"It prints `{done.stdout.strip()}`" in text

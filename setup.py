"""What pyproject.toml cannot say: the README as a package index shows it, and archives of the same bytes every time.

A relative link, which leads nowhere on an index, becomes the name of its file.
"""

import re
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "wheels"))
from archives import Source, Wheel  # noqa: E402

NOTE = "Files named in parentheses are in the source distribution.\n"
text = (ROOT / "README.md").read_text(encoding="utf-8")
text = re.sub(r"!?\[([^]]+)\]\((?![a-z]+:|#)([^)]+)\)", r"\1 (\2)", text)
setup(
    long_description=f"{text}\n{NOTE}",
    long_description_content_type="text/markdown",
    cmdclass={"bdist_wheel": Wheel, "sdist": Source},
)

"""The README as a package index shows it: a relative link, which leads nowhere there, becomes the name of its file."""

import re
from pathlib import Path

from setuptools import setup

NOTE = "Files named in parentheses are in the source distribution.\n"
text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(r"\[([^]]+)\]\((?![a-z]+:|#)([^)]+)\)", r"\1 (\2)", text)
setup(long_description=f"{text}\n{NOTE}", long_description_content_type="text/markdown")

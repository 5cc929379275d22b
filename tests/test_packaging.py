"""What a package index shows: the README, of which every link leads somewhere."""

import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from setuptools import build_meta
out = sys.argv[1]
print(build_meta.prepare_metadata_for_build_wheel(out), build_meta.build_sdist(out), sep="\\n", file=sys.stderr)
"""


def links(text: str) -> set[str]:
    """Where a page's links lead."""
    return set(re.findall(r"\]\(([^)\s]+)", text)) | set(re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.MULTILINE))


def test_the_long_description_has_no_relative_link(tmp_path):
    """Built as a wheel's metadata is, from a copy; what it names instead of a link is in the source distribution."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path / "source", tmp_path / "out"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "site", "tests", "bench", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    out.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    folder, archive = run.stderr.split()[-2:]
    metadata = message_from_string((out / folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    absolute = {link for link in links(readme) if "://" in link}
    relative = links(readme) - absolute
    assert links(shown) == absolute
    assert "docs/attention.md" in relative
    with tarfile.open(out / archive) as files:
        shipped = {name.partition("/")[2] for name in files.getnames()}
    for link in relative:
        path = link.partition("#")[0]
        assert path in shipped
        assert f"({link})" in shown
    assert len(shown) > 0.95 * len(readme)

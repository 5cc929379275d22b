"""What is built: small, complete, the same bytes every time; and what an index shows of it, without dead links."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 500_000  # bytes of the wheel
PROGRAM = """
import os, sys
from setuptools import build_meta
out, *others = sys.argv[1:]
build_meta.build_sdist(out)
build_meta.build_wheel(out)
build_meta.prepare_metadata_for_build_wheel(out)
for place in others:
    os.chdir(place)
    build_meta.build_wheel(out)
"""
SDIST, WHEEL, METADATA = "flashgau-*.tar.gz", "flashgau-*.whl", "flashgau-*.dist-info/METADATA"
OTHERS = {path.parent.name: f"flashgau_{path.parent.name}-*.whl" for path in (ROOT / "wheels").glob("*/pyproject.toml")}


def build(folder: Path) -> Path:
    """The folder with all that is built, from a copy that is made just now."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = folder / "source", folder / "out"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "site", "tests", "bench", "runs")
    shutil.copytree(ROOT, source, ignore=ignored, copy_function=shutil.copy)
    out.mkdir()
    stale = source / "build" / "lib" / "flashgau" / "left_by_another_build.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    command = [sys.executable, "-c", PROGRAM, str(out), *(str(source / "wheels" / name) for name in OTHERS)]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return out


def one(folder: Path, pattern: str) -> Path:
    """The file of this name."""
    (path,) = folder.glob(pattern)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("built"))


def links(text: str) -> set[str]:
    """Where a page's links lead."""
    return set(re.findall(r"\]\(([^)\s]+)", text)) | set(re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.MULTILINE))


def test_the_long_description_has_no_relative_link(built):
    """What it names instead of a link is in the source distribution."""
    metadata = message_from_string(one(built, METADATA).read_text(encoding="utf-8"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    absolute = {link for link in links(readme) if "://" in link}
    relative = links(readme) - absolute
    assert links(shown) == absolute
    assert "docs/attention.md" in relative
    with tarfile.open(one(built, SDIST)) as files:
        shipped = {name.partition("/")[2] for name in files.getnames()}
    for link in relative:
        path = link.partition("#")[0]
        assert path in shipped
        assert f"({link})" in shown
    assert len(shown) > 0.95 * len(readme)


def test_the_wheel_is_small(built):
    size = one(built, WHEEL).stat().st_size
    # Without zopfli, which builds in an environment of their own have, zlib packs it: 3% larger.
    assert size <= (LARGEST if importlib.util.find_spec("zopfli") else 1.03 * LARGEST), f"{size} bytes"


def test_every_module_and_table_is_in_one_wheel(built):
    shipped = []
    for pattern in (WHEEL, *OTHERS.values()):
        with zipfile.ZipFile(one(built, pattern)) as archive:
            assert archive.testzip() is None
            assert archive.namelist()[-1].endswith(".dist-info/RECORD")
            shipped += [name for name in archive.namelist() if ".dist-info/" not in name]
    sources = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("flashgau/**/*")}
    for folder in ("kernels", "reference"):
        sources |= {f"flashgau/{path.relative_to(ROOT).as_posix()}": path for path in ROOT.glob(f"{folder}/**/*")}
    sources |= {path.name: path for path in ROOT.glob("wheels/*/flashgau_*.p*")}
    wanted = {name for name, path in sources.items() if path.is_file() and path.suffix not in (".pyc", ".md")}
    assert sorted(shipped) == sorted(wanted)


def test_two_builds_give_the_same_bytes(built, tmp_path):
    again = build(tmp_path)
    for pattern in (SDIST, WHEEL, *OTHERS.values()):
        assert one(again, pattern).read_bytes() == one(built, pattern).read_bytes(), pattern


def test_all_wheels_are_of_one_version():
    texts = [(path / "pyproject.toml").read_text() for path in (ROOT, *(ROOT / "wheels" / name for name in OTHERS))]
    citation = re.sub(r"(?m)^version: (.*)$", r'version = "\1"', (ROOT / "CITATION.cff").read_text())
    (version,) = {re.search(r'(?m)^version = "(.*)"$', text)[1] for text in (*texts, citation)}
    for text in texts[1:]:
        assert re.search(rf'(?m)^dependencies = \["flashgau(\[[\w,]+\])?=={re.escape(version)}"', text)

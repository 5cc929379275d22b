"""The wheel flashgau-transformers, built and unpacked: a folder for `site.addsitedir`, which reads its .pth file."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def hooked(tmp_path_factory) -> Path:
    """What an installation would put into site-packages."""
    pytest.importorskip("setuptools", minversion="77")
    place = tmp_path_factory.mktemp("hooked")
    shutil.copytree(ROOT / "wheels", place / "wheels", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(place)!r})"
    folder = place / "wheels" / "transformers"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"

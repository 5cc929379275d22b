"""What pyproject.toml cannot say: a wheel of the same bytes every time."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from archives import Wheel

setup(cmdclass={"bdist_wheel": Wheel})

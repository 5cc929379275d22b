"""What pyproject.toml cannot say: a file that Python reads at its start, and a wheel of the same bytes every time."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from archives import Wheel  # noqa: E402

NAME = "flashgau_transformers.pth"


class Beside(build_py):
    """Modules, and the .pth file beside them; an editable install has none, since setuptools writes its own there."""

    def run(self):
        """Build them."""
        super().run()
        if not self.editable_mode:
            shutil.copyfile(HERE / NAME, Path(self.build_lib) / NAME)


setup(cmdclass={"bdist_wheel": Wheel, "build_py": Beside})

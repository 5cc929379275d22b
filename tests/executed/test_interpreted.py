"""What the interpreter gives in fp32 is what the compiled code gives, but for the order of sums."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from both_ways import results

from flashgau.ptx import executing

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    file = tmp_path_factory.mktemp("both") / "interpreted.pt"
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, str(HERE / "both_ways.py"), str(file)], env=environment, check=True)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiled_code_gives_what_the_interpreter_gives(interpreted, target):
    with executing(target):
        compiled = results()
    assert compiled.keys() == interpreted.keys()
    for name, x in compiled.items():
        other = interpreted[name]
        unit = torch.finfo(torch.float32).eps * other.abs().max()
        assert (x - other).abs().max() <= 8 * unit, name

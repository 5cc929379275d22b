"""What the interpreter gives is what compiled code gives: in fp32 but for the order of sums, in bf16 to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bf16_steps import STEPS, steps_kernel
from both_ways import results
from strategies import randn

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


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_steps_in_bf16_are_pytorchs_to_the_bit(target):
    """As `test_interpreted.py` holds the interpreter to them. What is summed in another order adds up exactly."""
    for step, expected in STEPS.items():
        x, y = randn(0, 100, dtype=torch.bfloat16), randn(1, 100, dtype=torch.bfloat16)
        if step in ("sum", "cumsum"):
            x = (4 * x).round()
        out = torch.zeros_like(x)
        with executing(target):
            steps_kernel[(1,)](x, y, out, 100, STEP=step, BLOCK=128)
        assert torch.equal(out, expected(x, y).to(torch.bfloat16)), step

"""What is installed with flashgau alone is enough for operators, kernels and their checks; all else names its extra."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = ("cli", "plots", "models", "testing", "transformers")  # for users
# What is in wheels of its own.
INSTRUMENTS = {"flashgau.cli.instruments", "flashgau.ptx", "flashgau.roof", "flashgau.sass"}
TRAINING = {"flashgau.cli.training", "flashgau.training"}
MODULES = {"typer": "cli", "rich": "cli", "matplotlib": "plots", "safetensors": "models", "hypothesis": "testing"}

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if {{name, name.partition(".")[0]}} & {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
assert not set({names!r}) & set(sys.modules)
sys.meta_path.insert(0, Blocker())
"""


def run_without(names: set[str], code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which these packages cannot be imported."""
    code = BLOCKER.format(names=names) + code
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def listed(name: str) -> list[str]:
    """The requirements in a list of pyproject.toml, without versions."""
    text = re.search(rf"(?ms)^{name} = (\[.*?\])$", PYPROJECT)
    assert text, name
    return [re.split(r"[><=;]", entry)[0] for entry in ast.literal_eval(text[1])]


def test_the_package_alone_requires_four():
    assert set(listed("dependencies")) == {"torch", "triton", "einops", "numpy"}
    assert listed("all") == [f"flashgau[{','.join(EXTRAS)}]"]
    assert all(module in listed(extra) for module, extra in MODULES.items())
    # What `make` installs has everything.
    assert "flashgau[all]" in listed("test")
    assert "flashgau[test,docs,bench]" in listed("dev")


def imported(node: ast.AST, extra: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Each module that is imported when the code runs, with the extra whose block it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], extra) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield (child.module or "").split(".")[0], extra
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif isinstance(child, ast.With) and (found := re.fullmatch(r"extra\('(\w+)'\)", ast.unparse(child.items[0]))):
            yield from imported(child, found[1])
        else:
            yield from imported(child, extra)


def test_every_import_of_an_extra_names_it():
    seen = set()
    for folder in ("flashgau", "kernels", "reference"):
        for path in (ROOT / folder).rglob("*.py"):
            for module, extra in imported(ast.parse(path.read_text())):
                wanted = MODULES.get(module)
                if (
                    extra is None
                    and wanted == "cli"
                    and path.parent.name in ("cli", "instruments", "training")
                    and path.name != "__init__.py"
                ):
                    continue  # `flashgau.cli` itself asks for them first
                assert extra == wanted, f"{path.relative_to(ROOT)} imports {module} in the block of {extra}"
                seen |= {module} & set(MODULES)
    assert seen == set(MODULES)


def test_operators_kernels_and_checks_need_no_extra(tmp_path):
    code = """
import torch, flashgau
from flashgau import tables, testing
from flashgau.kernels.attention import attention_forward
from flashgau.tables.config import Config
from flashgau.tables.table import Key, Table, TableEntry, merge

q, k, v = torch.randn(3, 1, 2, 33, 16)
for backend in ("triton", "eager", "reference"):
    assert flashgau.compare(flashgau.attention, q, k, v, causal=True, backend=backend).ok
    x = torch.randn(3, 16, requires_grad=True)
    flashgau.glu(x, backend=backend).sum().backward()
testing.assert_close(torch.nn.functional.silu, lambda x: x / (1 + torch.exp(-x)), torch.randn(8))
out, lse = attention_forward(q, k, v, config=Config(16, 16))[:2]
torch.testing.assert_close(out, flashgau.reference.attention(q, k, v), atol=1e-5, rtol=1e-5)

cpu, key = torch.device("cpu"), Key("attention_forward", 4, 64)
merge(tables.user_path(cpu), Table("interpreter", "interpreter", True, entries={key: TableEntry(Config(16, 16, 2))}))
tables.reload()
assert tables.choose("attention_forward", q, 64) == Config(16, 16, 2)

layer = flashgau.nn.FLASH(16, key_dim=16, chunk_size=16, causal=True)
layer(torch.randn(1, 20, 16)).sum().backward()
config = flashgau.models.ModelConfig(kind="flash", dim=16, depth=1, key_dim=16, chunk_size=16)
model = flashgau.models.CausalLM(config)
assert model.generate(torch.zeros(1, 3, dtype=torch.int64), 2).shape[1] in (2, 5)
import flashgau.convert, flashgau.distributed, flashgau.integrations, flashgau.tuning.searching
"""
    blocked = {*MODULES, "transformers", "platformdirs", "pytest", "tqdm", "mkdocs"}
    done = run_without(blocked, code, TRITON_INTERPRET="1", FLASHGAU_TUNING=str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("typer", "import flashgau.cli"),
        ("rich", "from flashgau.cli import main"),
        ("matplotlib", "from flashgau.training import *; train(TrainConfig())"),
        ("matplotlib", "from flashgau.training.plots import loss_plot; loss_plot([], Path('x.png'), '')"),
        ("matplotlib", "from flashgau.cli.training.report import loss_plot; loss_plot([])"),
        ("safetensors", "from flashgau.models import *; CausalLM(ModelConfig(dim=16, depth=1)).save('x')"),
        ("safetensors", "import flashgau.models; flashgau.models.load('pyproject.toml')"),
        ("hypothesis", "from flashgau.testing import sizes"),
    ],
)
def test_python_users_are_told_the_extra(module, use):
    code = f"""
import torch
from pathlib import Path
try:
    {use}
except ImportError as error:
    print(error)
"""
    done = run_without({module}, code)
    expected = f"{module} is not installed: pip install 'flashgau[{MODULES[module]}]'\n"
    assert done.stdout == expected, done.stderr


COMMAND = "import runpy; sys.argv = {arguments!r}; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", ["--help"]),
        ("rich", ["doctor"]),
        ("matplotlib", ["demo", "--out", "{folder}/demo"]),
        ("safetensors", ["demo", "--out", "{folder}/demo"]),
        ("matplotlib", ["train", "--out", "{folder}/run", "--steps", "1"]),
        ("safetensors", ["sample", "{folder}"]),
    ],
)
def test_commands_tell_the_extra_in_one_line(module, arguments, tmp_path):
    (tmp_path / "last.safetensors").write_bytes(b"x")
    before = sorted(tmp_path.iterdir())
    arguments = ["flashgau", *(argument.format(folder=tmp_path) for argument in arguments)]
    done = run_without({module}, COMMAND.format(arguments=arguments, name="flashgau"))
    expected = f"flashgau: {module} is not installed: pip install 'flashgau[{MODULES[module]}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--execute", "sm_90", "--quick"],
        ["compile", "--loops", "--target", "sm_90"],
        ["compile", "--operations"],
        ["tune", "--model", "--target", "sm_90", "--kernel", "attention_dq"],
    ],
)
def test_commands_tell_that_the_instruments_are_missing(arguments):
    done = run_without(INSTRUMENTS, COMMAND.format(arguments=["flashgau", *arguments], name="flashgau"))
    expected = "flashgau: flashgau-instruments is not installed: pip install ./wheels/instruments, in a checkout\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_everything_else_does_without_the_instruments(tmp_path):
    arguments = ["flashgau", "tune", "--show", "--target", "sm_90", "--op", "glu"]
    done = run_without(INSTRUMENTS, COMMAND.format(arguments=arguments, name="flashgau"))
    assert done.returncode == 0, done.stderr
    arguments = ["flashgau", "new-kernel", "mine", "--out", str(tmp_path)]
    done = run_without(INSTRUMENTS, COMMAND.format(arguments=arguments, name="flashgau"))
    assert done.returncode == 0, done.stderr
    compiled = ["flashgau", "compile", "--target", "sm_90", "--kernel", "glu_forward", "--dtype", "bf16"]
    done = run_without(INSTRUMENTS, COMMAND.format(arguments=compiled, name="flashgau"))
    assert done.returncode == 0, done.stderr


LINE = "flashgau-training is not installed: pip install ./wheels/training, in a checkout"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--steps", "1", "--out", "nowhere"],
        ["train", "--help"],
        ["sample"],
        ["eval"],
        ["export", "a", "b"],
        ["demo", "-h"],
    ],
)
def test_commands_tell_that_training_is_missing(arguments):
    done = run_without(TRAINING, COMMAND.format(arguments=["flashgau", *arguments], name="flashgau"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"flashgau: {LINE}\n")


def test_everything_else_does_without_training(tmp_path):
    """The help names every command, and models are saved and read."""
    code = f"""
import torch
from flashgau import *
from flashgau.cli import main
from flashgau.models import CausalLM, ModelConfig, load
try:
    from flashgau import training
except ImportError as error:
    assert str(error) == {LINE!r}
CausalLM(ModelConfig(dim=16, depth=1, key_dim=16, chunk_size=16)).save("model.safetensors")
assert load("model.safetensors").config.dim == 16
raise SystemExit(main(["--help"]))
"""
    done = run_without(TRAINING, f"import os; os.chdir({str(tmp_path)!r})\n{code}", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^  train  .*(?s:.*)^  sample  .*(?s:.*)^  eval  ", done.stdout), done.stdout


@pytest.mark.parametrize(("module", "extra"), [("rich", "bench"), ("matplotlib", "bench"), ("typer", "cli")])
def test_benchmarks_tell_the_extra_in_one_line(module, extra):
    done = run_without({module}, COMMAND.format(arguments=["bench", "--help"], name="bench"))
    expected = f"bench: {module} is not installed: pip install 'flashgau[{extra}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_the_command_is_the_same_installed_and_as_a_module():
    assert 'flashgau = "flashgau.__main__:main"' in PYPROJECT

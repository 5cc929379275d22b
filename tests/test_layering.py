"""Who may import whom, read from the source."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flashgau"
# The two floors that stand at the top of the tree, and what they are imported as.
ELSEWHERE = {"kernels": ROOT / "kernels", "reference": ROOT / "reference"}
FLOORS = {"reference": set(), "eager": set(), "kernels": {"contract", "tables"}}
OPS = {"ops", "contract", "tables", *FLOORS}
ALLOWED: dict[str, set[str]] = {
    "contract": set(),
    "tables": set(),
    **FLOORS,
    "sass": set(),
    "tuning": {"kernels", "sass", "tables"},
    "ptx": {"tuning", "kernels", "tables"},
    "roof": {"ptx", "tuning", "kernels", "sass", "tables"},
    "ops": {"contract", "tables", *FLOORS},
    "nn": OPS,
    "models": {"nn", *OPS},
    "convert": {"models", "nn", *OPS},
    "integrations": {"models", "nn", *OPS},
    "distributed": {"nn", *OPS},
    "training": {"distributed", "models", "nn", *OPS},
    "testing": {"ops"},
    "verification": {"nn", "ops", "tuning", "tables", "reference", "kernels"},
    "cli": {
        "bench",
        "verification",
        "roof",
        "ptx",
        "training",
        "convert",
        "integrations",
        "models",
        "nn",
        "sass",
        "tuning",
        *OPS,
    },
}


def sources(part: str) -> list[Path]:
    return sorted(ELSEWHERE.get(part, PACKAGE / part).rglob("*.py"))


def module_of(path: Path) -> list[str]:
    """The dotted name of a file, as it is imported."""
    if path.is_relative_to(PACKAGE):
        parts = ["flashgau", *path.relative_to(PACKAGE).with_suffix("").parts]
    else:
        parts = ["flashgau", *path.relative_to(ROOT).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> set[str]:
    """Every module of ours that a file imports anywhere, under dotted names."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found.add(".".join(base))
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("flashgau", *ELSEWHERE)}


def parts_of(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    found = set()
    for name in imports(path):
        top, *rest = name.split(".")
        assert top == "flashgau", f"{path}: import {name} as flashgau.{name}"
        if (rest and (PACKAGE / rest[0]).is_dir()) or (rest and rest[0] in ELSEWHERE):
            found.add(rest[0])
    return found


def test_every_part_has_its_place():
    here = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} | set(ELSEWHERE)
    assert here == set(ALLOWED)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_downwards(part):
    assert sources(part)
    for path in sources(part):
        assert parts_of(path) - {part} <= ALLOWED[part], f"{path.relative_to(ROOT)} imports upwards"


def test_what_every_part_may_import_imports_nothing_of_ours():
    """But for `extras`, which those among them may ask for a package."""
    for path in PACKAGE.glob("*.py"):
        if not path.name.startswith("__"):
            assert imports(path) <= {"flashgau.extras", "flashgau.extras.extra"}, path.name
    assert not imports(PACKAGE / "extras.py")


def test_the_test_sees_imports(tmp_path):
    """Each way to write an import is found."""
    path = PACKAGE / "ops" / "attention.py"
    assert {"flashgau.ops.autograd", "flashgau.contract.validate"} <= imports(path)
    assert parts_of(PACKAGE / "ops" / "compare.py") == {"reference", "ops"}


def listed(project: Path) -> set[str]:
    """The packages in the list of a pyproject.toml, which setuptools does not check."""
    text = project.read_text()
    start = text.index("packages = [")
    return set(ast.literal_eval(text[text.index("[", start) : text.index("]", start) + 1]))


# Of the wheels beside flashgau's; that of a module by itself has no packages.
WHEELS = {
    path.parent.name: listed(path)
    for path in (ROOT / "wheels").glob("*/pyproject.toml")
    if "packages = [" in path.read_text()
}


def test_every_package_is_shipped_once():
    """Each directory with Python files is in the list of one wheel."""
    shipped = Counter(chain(listed(ROOT / "pyproject.toml"), *WHEELS.values()))
    assert set(shipped.values()) == {1}
    assert set(shipped) == {
        ".".join(module_of(p)) for top in (PACKAGE, *ELSEWHERE.values()) for p in top.rglob("__init__.py")
    }
    for top in (PACKAGE, *ELSEWHERE.values()):
        for path in top.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package"


def of_wheel(module: str) -> str | None:
    """The wheel beside flashgau's that a module is in."""
    return next((name for name, held in WHEELS.items() for one in held if f"{module}.".startswith(f"{one}.")), None)


def beyond(node: ast.AST, package: list[str], wheel: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Each module of another wheel that code imports when it runs, with the wheel whose block it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, wheel) for alias in child.names if of_wheel(alias.name))
        elif isinstance(child, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - child.level + 1], child.module or ""] if child.level else [child.module]
            )
            names = [base, *(f"{base}.{alias.name}" for alias in child.names)]
            yield from ((name, wheel) for name in names[:1] if of_wheel(name))
            yield from ((name, wheel) for name in names[1:] if of_wheel(name) and not of_wheel(base))
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif isinstance(child, ast.With) and (found := re.fullmatch(r"wheel\('(\w+)'\)", ast.unparse(child.items[0]))):
            yield from beyond(child, package, found[1])
        else:
            yield from beyond(child, package, wheel)


def test_what_needs_another_wheel_says_so():
    """What one wheel takes from another, but for flashgau's own, stands where a missing one is named."""
    asking = set()
    for top in (PACKAGE, *ELSEWHERE.values()):
        for path in top.rglob("*.py"):
            package = module_of(path.parent / "__init__.py")
            for module, wheel in beyond(ast.parse(path.read_text()), package):
                if of_wheel(module) != of_wheel(".".join(package)):
                    assert wheel == of_wheel(module), (
                        f"{path.relative_to(ROOT)} imports {module} in the block of {wheel}"
                    )
                    asking.add((wheel, path.relative_to(ROOT).as_posix()))
    assert asking == {
        ("instruments", "flashgau/cli/check.py"),
        ("instruments", "flashgau/cli/compile.py"),
        ("instruments", "flashgau/cli/tune.py"),
        ("instruments", "flashgau/tuning/ahead.py"),
        ("training", "flashgau/cli/__init__.py"),
    }


def test_nothing_is_left_undone():
    for top in (PACKAGE, *ELSEWHERE.values()):
        for path in top.rglob("*.py"):
            for word in ("TODO", "FIXME", "XXX", "raise NotImplementedError"):
                assert word not in path.read_text(), f"{path.relative_to(ROOT)}: {word}"


def test_importing_the_package_loads_no_layers():
    """`import flashgau` brings the operations; layers, models and tools come when they are used."""
    late = ["nn", "models", "training", "convert", "verification", "cli"]
    code = f"""
import sys, flashgau
loaded = [m for m in {late!r} if "flashgau." + m in sys.modules]
heavy = [m for m in ("triton", "matplotlib", "typer", "rich") if m in sys.modules]
assert not loaded, loaded
assert not heavy, heavy
assert flashgau.nn.GAU
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def run_uninstalled(code: str, *path: Path) -> None:
    """Run code in an interpreter that takes modules from these folders first, and follows no editable install."""
    folders = [*map(str, path), *filter(None, sys.path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    # -S: without site-packages' .pth files, through which an editable install is found.
    subprocess.run([sys.executable, "-S", "-c", code], env=env, cwd=path[0], check=True, timeout=120)


@pytest.mark.parametrize("installed", [False, True])
def test_a_checkout_finds_its_own_kernels_and_reference(installed, tmp_path):
    """Not installed, and with a plain install behind it, which it shadows."""
    code = f"""
import importlib.util, torch, flashgau
for name in ("kernels", "reference"):
    assert importlib.util.find_spec("flashgau." + name).origin.startswith({str(ROOT)!r}), name
x = torch.randn(2, 4)
assert torch.allclose(flashgau.glu(x), flashgau.glu(x, backend="reference"))
"""
    (tmp_path / "flashgau" / "kernels").mkdir(parents=True)
    for folder in ("flashgau", "flashgau/kernels"):
        (tmp_path / folder / "__init__.py").touch()
    run_uninstalled(code, ROOT, *([tmp_path] if installed else []))


def test_other_peoples_kernels_are_not_ours(tmp_path):
    """A package of that name beside the installed one is another."""
    for folder in ("flashgau", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "flashgau")
    code = """
import importlib.util, flashgau, kernels
assert flashgau.__version__ and importlib.util.find_spec("flashgau.kernels") is None
"""
    run_uninstalled(code, tmp_path)


def from_triton(path: Path) -> set[str]:
    """What a file takes from Triton, as dotted names: its imports, and what it reads from the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if name.split(".")[0] == "triton"}


def test_two_files_reach_into_triton():
    """Into its compiler, and its interpreter. Everything else keeps to the language, launches, their helpers and the
    clock; nothing takes a private name."""
    inside, interpreter = PACKAGE / "tuning" / "compiler.py", ELSEWHERE["kernels"] / "interpreted.py"
    public = ("triton.language", "triton.testing.do_bench", "triton.jit", "triton.cdiv", "triton.next_power_of_2",
              "triton.set_allocator", "triton.__version__")  # fmt: skip
    for path in [p for top in (PACKAGE, *ELSEWHERE.values(), ROOT / "bench") for p in top.rglob("*.py")]:
        names = from_triton(path)
        assert not [n for n in names for part in n.split(".") if part.startswith("_") and not part.endswith("__")], path
        if path != inside:
            allowed = (*public, "triton.runtime", "triton.runtime.interpreter") if path == interpreter else public
            assert all(n == "triton" or n.startswith(allowed) for n in names), f"{path.relative_to(ROOT)}: {names}"
    assert {"triton.runtime.driver", "triton.knobs.nvidia.cuobjdump.path"} <= from_triton(inside)
    taken = {node.attr for node in ast.walk(ast.parse(inside.read_text())) if isinstance(node, ast.Attribute)}
    assert not [name for name in taken if name.startswith("_") and not name.endswith("__")]

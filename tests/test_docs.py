"""The documentation tells the truth: its code runs and prints what it says, its commands exist, its site builds."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import flashgau

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
OPERATIONS = {  # public functions by the page that documents them
    "attention.md": ["attention"],
    "glu.md": ["glu", "glu_linear"],
    "gau.md": ["gau_attention"],
    "mixed_chunk.md": ["mixed_chunk_attention", "mixed_chunk_step"],
}
DOCTEST_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the rest of its opening line, its text, and the line it begins at."""

    language: str
    info: str
    text: str
    line: int


def fenced_blocks(markdown: str) -> list[Block]:
    """All fenced blocks, also indented ones, in order."""
    blocks, opened, lines = [], None, []
    for number, line in enumerate(markdown.splitlines(), 1):
        fence = re.match(r"\s*```(\w*)\s*(.*)$", line)
        if fence and opened is None:
            opened, lines = (fence[1], fence[2], number + 1), []
        elif fence and opened is not None:
            blocks.append(Block(opened[0], opened[1], textwrap.dedent("\n".join(lines)) + "\n", opened[2]))
            opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"the block of line {opened} is never closed"
    return blocks


def without_blocks(markdown: str) -> str:
    """The prose: no fenced block, no code span."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", "", markdown))


def page_ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


# Python


def run_python(block: Block, name: str, namespace: dict[str, Any]) -> str:
    """Execute a block in `namespace` (prompts through doctest), and return what it printed."""
    if ">>>" in block.text:
        parsed = doctest.DocTestParser().get_doctest(block.text, namespace, name, name, block.line - 1)
        runner, complaints = doctest.DocTestRunner(optionflags=DOCTEST_OPTIONS), io.StringIO()
        result = runner.run(parsed, out=complaints.write, clear_globs=False)
        assert result.failed == 0, complaints.getvalue()
        namespace.update(parsed.globs)
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # Empty lines in front, so that a traceback has the line of the page.
        exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
    return printed.getvalue()


def load_forward_mode() -> None:
    """PyTorch warns of a part of its own, which it loads at the first dual number."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def normal(output: str, vary: bool) -> str:
    """Output to compare: without differences of white space and, if numbers vary, with every number as #."""
    lines = [" ".join(line.split()) for line in output.strip().splitlines()]
    text = "\n".join(lines)
    return re.sub(r"-?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", text) if vary else text


@pytest.mark.parametrize("page", PAGES, ids=page_ids(PAGES))
def test_python_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHGAU_TUNING", str(tmp_path))  # a page may write a table
    flashgau.tuning.reload()
    request.addfinalizer(flashgau.tuning.reload)
    torch.manual_seed(0)
    load_forward_mode()
    warnings.simplefilter("error")
    module = ModuleType("__docs__")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # torch.compile imports a function's module
    namespace: dict[str, Any] = vars(module)
    printed: str | None = None
    for block in fenced_blocks(page.read_text()):
        needed = re.search(r"Needs ([\w-]+)", block.info)
        if needed and importlib.util.find_spec(needed[1].lower().replace("-", "_")) is None:
            continue
        if block.language in ("python", "pycon"):
            printed = run_python(block, str(page), namespace)
        elif block.language == "text" and "Output" in block.info:
            assert printed is not None, f"{page}:{block.line}: an output block without a program before it"
            vary = "vary" in block.info
            assert normal(printed, vary) == normal(block.text, vary)
            printed = None


def own_lines(script: str) -> list[str]:
    """The lines that whoever writes a script thinks of: not blank, no comment, no part of an import."""
    imports = [node for node in ast.walk(ast.parse(script)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {number for node in imports for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = enumerate(script.splitlines(), 1)
    return [line for i, line in lines if i not in imported and line.strip() and not line.lstrip().startswith("#")]


SCRIPTS = {  # what a page's reader came for: the page, what tells the block, its most lines
    "scores of one's own": ("own_scores.md", "sigmoid_attention = partial(", 20),
    "a function of one's own": ("numerics.md", "def softplus_gate", 12),
    "block sizes of one's own": ("tuning.md", "tuning.search(", 15),
}


@pytest.mark.parametrize("wish", SCRIPTS)
def test_a_wish_is_one_short_script(wish, tmp_path, monkeypatch, request):
    """With its naive reference, and without the blocks before it."""
    page, words, most = SCRIPTS[wish]
    (block,) = [b for b in fenced_blocks((DOCS / page).read_text()) if b.language == "python" and words in b.text]
    assert len(own_lines(block.text)) <= most
    assert "assert" in block.text
    if page != "numerics.md":
        pytest.importorskip("triton")
    monkeypatch.setenv("FLASHGAU_TUNING", str(tmp_path))
    flashgau.tuning.reload()
    request.addfinalizer(flashgau.tuning.reload)
    torch.manual_seed(0)
    run_python(block, str(DOCS / page), {"__name__": "__docs__"})


def test_own_lines_are_counted():
    script = (
        "import a\nfrom b import (\n    c,\n)\n\n# why\nx = [\n    1,  # one\n]\n\ndef f():\n    import d\n    f()\n"
    )
    assert own_lines(script) == ["x = [", "    1,  # one", "]", "def f():", "    f()"]


def test_a_wrong_output_on_a_page_is_noticed():
    block = Block("pycon", "", ">>> 1 + 1\n3\n", 5)
    with pytest.raises(AssertionError, match="Expected:"):
        run_python(block, "page.md", {})
    namespace: dict[str, Any] = {}
    assert run_python(Block("python", "", "x = 2\nprint(x)\n", 5), "page.md", namespace) == "2\n"
    assert run_python(Block("pycon", "", ">>> x\n2\n", 9), "page.md", namespace) == ""
    assert normal("a  1.5e-03 ok", vary=True) == normal("a 2.0 ok", vary=True) != normal("a 2.0 MISS", vary=True)
    assert normal("a 1", vary=False) != normal("a 2", vary=False)


def test_fenced_blocks_are_found_with_their_lines():
    text = "a\n```python\nx\n```\n- b\n\n    ```bash title\n    y\n    ```\n"
    assert fenced_blocks(text) == [Block("python", "", "x\n", 3), Block("bash", "title", "y\n", 8)]


# Commands


def parse_flashgau(arguments: list[str]) -> None:
    """Let the command's own parser read the arguments, without running it."""
    import typer

    from flashgau import cli

    group: Any = typer.main.get_command(cli.app)
    if not arguments or arguments[0].startswith("-"):
        assert set(arguments) <= {"--version", "--help", "-h"}, f"flashgau has no options {arguments}"
        return
    assert arguments[0] in group.commands, f"flashgau has no command {arguments[0]!r}"
    rest = [argument for argument in arguments[1:] if argument not in ("--help", "-h")]
    group.commands[arguments[0]].make_context(arguments[0], rest)


def parse_bench(arguments: list[str]) -> None:
    from bench.__main__ import parse

    try:
        parse(arguments)
    except SystemExit as stopped:  # argparse's way to say no; 0 after --help
        if stopped.code:
            pytest.fail(f"python -m bench does not take {arguments}")


def parse_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in arguments:
        assert re.search(rf"^{re.escape(target)}\s*:", makefile, re.MULTILINE), f"the Makefile has no {target!r}"


def check_command(line: str) -> None:
    """A line of shell: it can be parsed, and what is ours in it exists."""
    for command in re.split(r"&&|\|\||[|;]", line):
        words = shlex.split(command.split(" > ")[0], comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        words = [re.sub(r"^\.venv/bin/", "", word) for word in words]
        if words[:1] == ["flashgau"]:
            parse_flashgau(words[1:])
        elif words[:3] == ["python", "-m", "flashgau"]:
            parse_flashgau(words[3:])
        elif words[:3] == ["python", "-m", "bench"]:
            parse_bench(words[3:])
        elif words[:1] == ["make"]:
            parse_make(words[1:])


def shell_lines(block: Block) -> Iterator[str]:
    joined = block.text.replace("\\\n", " ")
    for line in joined.splitlines():
        if block.language == "console":
            if line.startswith("$ "):
                yield line[2:]
        elif line.strip() and not line.lstrip().startswith("#"):
            yield line


@pytest.mark.parametrize("page", PAGES, ids=page_ids(PAGES))
def test_shell_blocks_name_commands_and_options_that_exist(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for block in fenced_blocks(page.read_text()):
        if block.language in ("bash", "console"):
            for line in shell_lines(block):
                check_command(line)


def test_a_command_with_a_wrong_option_is_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for line in ("flashgau chekc", "flashgau train --stepz 3", "python -m bench nothing", "make nothing"):
        # pytest.fail raises a BaseException, the command line's own parser an Exception.
        with pytest.raises((Exception, pytest.fail.Exception)):
            check_command(line)


def test_every_command_and_option_is_documented():
    import typer

    from flashgau import cli

    page = (DOCS / "cli.md").read_text()
    for name, command in typer.main.get_command(cli.app).commands.items():
        assert f"flashgau {name}" in page
        for parameter in command.params:
            assert f"`{parameter.opts[0]}" in page, f"cli.md does not mention {parameter.opts[0]} of {name}"


# The pages and the package


@pytest.mark.parametrize("page", OPERATIONS)
def test_every_argument_of_an_operation_is_on_its_page(page):
    text = (DOCS / page).read_text()
    for operation in OPERATIONS[page]:
        for argument, parameter in inspect.signature(getattr(flashgau, operation)).parameters.items():
            assert re.search(rf"\b{argument}\b", text), f"{page} does not mention {argument}"
            default = parameter.default
            if default is not inspect.Parameter.empty:
                shown = f'"{default}"' if isinstance(default, str) else str(default)
                assert f"{argument}={shown}" in text, f"{page} does not show {argument}={shown}"


@pytest.mark.parametrize(
    "module",
    [
        *("flashgau", "flashgau.nn", "flashgau.models", "flashgau.training", "flashgau.tuning", "flashgau.testing"),
        *("flashgau.convert", "flashgau.distributed"),
        *("flashgau.integrations.flash_attn", "flashgau.integrations.transformers"),
    ],
)
def test_every_public_name_is_on_a_page_of_names(module):
    """By the name under which it is imported: as what is described, or in its heading."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^(?:::: | {6}heading: )(\S+)$", pages, re.MULTILINE))
    found = importlib.import_module(module)
    public = {n for n in found.__all__ if not n.startswith("__") and not inspect.ismodule(getattr(found, n))}
    assert {f"{module}.{name}" for name in public} <= listed


def test_every_layer_is_on_the_page_of_layers():
    page = (DOCS / "layers.md").read_text()
    missing = [n for m in ("nn", "models") for n in getattr(flashgau, m).__all__ if not re.search(rf"\b{n}\b", page)]
    assert not missing


def test_every_environment_variable_is_in_the_one_table():
    table = (DOCS / "layout.md").read_text()
    sources = [p for folder in ("flashgau", "kernels", "reference", "bench") for p in (ROOT / folder).rglob("*.py")]
    read = {
        name
        for source in [*sources, ROOT / "tests" / "conftest.py"]
        for name in re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\s*\"([A-Z_]+)\"", source.read_text())
    }
    assert {"FLASHGAU_BACKEND", "TRITON_INTERPRET"} <= read
    missing = {name for name in read if f"| `{name}" not in table}
    assert not missing


# Docstrings


def modules() -> list[str]:
    packages = ["flashgau", "flashgau.kernels", "flashgau.reference"]  # the last two lie in folders of their own
    names = set(packages)
    for package in packages:
        path = importlib.import_module(package).__path__
        names |= {info.name for info in pkgutil.walk_packages(path, package + ".")}
    return sorted(names - {"flashgau.__main__"})


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_are_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = importlib.import_module(name)
    with torch.random.fork_rng():
        for test in doctest.DocTestFinder().find(module):
            complaints = io.StringIO()
            result = doctest.DocTestRunner(optionflags=DOCTEST_OPTIONS).run(test, out=complaints.write)
            assert result.failed == 0, complaints.getvalue()


def public(module: ModuleType) -> list[tuple[str, Any]]:
    """The functions and layers that `module` offers."""
    offered = [(name, getattr(module, name)) for name in module.__all__]
    return [
        (f"{module.__name__}.{name}", x)
        for name, x in offered
        if inspect.isfunction(x) or (inspect.isclass(x) and issubclass(x, torch.nn.Module))
    ]


@pytest.mark.parametrize("module", ["flashgau", "flashgau.nn", "flashgau.models", "flashgau.reference"])
def test_every_public_function_and_layer_has_an_example(module):
    found = public(importlib.import_module(module))
    assert found
    assert not [name for name, x in found if ">>>" not in (inspect.getdoc(x) or "")]


# Links and the site


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub and mkdocs make of headings."""
    prose = re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", "", markdown)
    headings = re.findall(r"(?m)^#+ +(.+?) *$", prose)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {re.sub(r"[ \-]+", "-", heading.strip()) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=page_ids(PAGES))
def test_internal_links_resolve(page):
    included = {DOCS / "changelog.md": ROOT, DOCS / "contributing.md": ROOT}
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (included.get(page, page.parent) / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page.name} links to {target}"


def test_the_site_builds_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path):
    for needed in ("mkdocs", "material", "latex2mathml"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed (pip install 'flashgau[docs]')")
    site = tmp_path / "site"
    # Not --quiet: it hides warnings from --strict as well.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.glob("*.md")))
    foreign = re.compile(
        r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//'
    )
    for page in pages:
        text = page.read_text()
        assert not foreign.search(text), page
        assert "arithmatex" not in text, f"{page} has formulas that were not set"
    survey = (site / "survey" / "index.html").read_text()
    assert survey.count("<math ") > 10
    assert survey.count('<svg aria-label="') == 5
    assert not list(site.rglob("*.py"))


def of_docs(name: str) -> Any:
    """A module that lies beside the pages."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawings_are_what_the_script_draws():
    drawn = of_docs("drawings").files()
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "assets").glob("*.svg")}
    for text in drawn.values():
        width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', text)[0])
        places = [(float(x), float(y)) for x, y in re.findall(r' x="([\d.]+)" y="([\d.]+)"', text)]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_a_formula_becomes_mathml():
    pytest.importorskip("latex2mathml")
    mathematics = of_docs("mathematics")
    page = '<p><span class="arithmatex">\\(a &lt; b\\)</span></p><div class="arithmatex">\\[\nx_i\n\\]</div>'
    made = mathematics.on_page_content(page)
    assert made.count("<math ") == 2
    assert "<msub><mi>x</mi><mi>i</mi></msub>" in made
    assert "arithmatex" not in made
    for wrong in (r"\nosuch{x}", r"a & b"):
        with pytest.raises(ValueError, match="is not known, in"):
            mathematics.mathml(wrong)


def test_every_formula_of_a_page_is_known():
    pytest.importorskip("latex2mathml")
    mathematics, found = of_docs("mathematics"), 0
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        formulas = [block.text for block in fenced_blocks(text) if block.language == "math"]
        for formula in (*formulas, *re.findall(r"\$([^$\n]+)\$", without_blocks(text))):
            assert mathematics.mathml(formula).startswith("<math "), f"{page.name}: {formula}"
            found += 1
    assert found > 50

"""flashgau-transformers: Auto classes that find our models without an import, and all that must not go wrong with it.

transformers and flashgau are small stand-ins here, whose Auto classes come as lazily and ask the same mapping. That the
true ones work is tested in `test_transformers_own.py`, and that the true mapping is as assumed, in the last test here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from transformers_wheel import ROOT, hooked  # noqa: F401  # a fixture

AUTO = """
import os
from collections import OrderedDict

class Mapping(OrderedDict):
    def __init__(self, known):
        self.known, self.extra = known, {}
    def __getitem__(self, key):
        if key in self.extra:
            return self.extra[key]
        return self.known[key]
    def __contains__(self, key):
        return key in self.known or key in self.extra
    def __iter__(self):
        return iter([*self.known, *self.extra])
    def register(self, key, value):
        self.extra[key] = value

CONFIG_MAPPING = Mapping({"bert": int})

class AutoConfig:
    pass
"""
MODELS = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
class FlashGauConfig:
    pass
CONFIG_MAPPING.register("flashgau", FlashGauConfig)
"""
FILES = {
    "transformers/__init__.py": """
def __getattr__(name):
    if name == "AutoConfig":
        from transformers.models.auto.configuration_auto import AutoConfig
        return AutoConfig
    raise AttributeError(name)
""",
    "transformers/models/__init__.py": "",
    "transformers/models/auto/__init__.py": "",
    "transformers/models/auto/configuration_auto.py": AUTO,
    "flashgau/__init__.py": "",
    "flashgau/integrations/__init__.py": "",
    "flashgau/integrations/transformers.py": MODELS,
}
HOME = "transformers.models.auto.configuration_auto"
BEGIN = """
import importlib, site, sys, threading, time
sys.dont_write_bytecode = True
sys.path.insert(0, {folder!r})
def waiting():
    return [one for one in sys.meta_path if type(one).__module__ == "flashgau_transformers"]
def ours():
    return sorted(name for name in sys.modules if name.split(".")[0] == "flashgau")
def start(folder={site!r}):
    site.addsitedir(folder)
"""


@pytest.fixture
def python(hooked, tmp_path):  # noqa: F811
    """Runs code with stand-ins, some of them changed, and nothing else that is installed; returns what it said."""

    def run(code, *options, **changed):
        for name, text in {
            **FILES,
            **{name.replace("__", "/") + ".py": text for name, text in changed.items()},
        }.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                shutil.rmtree(path.parents[path.relative_to(tmp_path).as_posix().count("/") - 1], ignore_errors=True)
            else:
                path.write_text(text)
        code = BEGIN.format(folder=str(tmp_path), site=str(hooked)) + code
        done = subprocess.run(
            [sys.executable, "-S", *options, "-c", code],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


@pytest.mark.parametrize("line", ["from transformers import AutoConfig", f"import {HOME}"])
def test_models_are_found_and_flashgau_is_imported_when_its_name_is_asked_for(python, line):
    said = python(f"""
import transformers
start()
assert len(waiting()) == 1
{line}
assert not waiting() and not ours()
module = sys.modules[{HOME!r}]
assert type(module.__loader__).__module__ == type(module.__spec__.loader).__module__ == "_frozen_importlib_external"
mapping = module.CONFIG_MAPPING
assert "bert" in mapping and mapping["bert"] is int and "other" not in mapping and [*mapping] == ["bert"]
assert not ours()
assert "flashgau" in mapping
assert mapping["flashgau"].__name__ == "FlashGauConfig" and [*mapping] == ["bert", "flashgau"]
assert ours() == ["flashgau", "flashgau.integrations", "flashgau.integrations.transformers"]
""")
    assert said == ""


def test_who_never_imports_transformers_gets_one_module_more(python):
    assert python("before = {*sys.modules}; start(); assert {*sys.modules} - before == {'flashgau_transformers'}") == ""
    assert python("start(); import json; assert len(waiting()) == 1 and 'transformers' not in sys.modules") == ""


def test_transformers_may_be_there_before(python):
    said = python("""
from transformers import AutoConfig
start()
assert not waiting() and not ours()
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert CONFIG_MAPPING["flashgau"]
""")
    assert said == ""


def test_two_installations_and_a_module_that_is_loaded_again_are_one(python, hooked, tmp_path):  # noqa: F811
    shutil.copytree(hooked, tmp_path / "again")
    said = python(f"""
start()
start({str(tmp_path / "again")!r})
import flashgau_transformers
importlib.reload(flashgau_transformers).install()
flashgau_transformers.install()
assert len(waiting()) == 1
sys.meta_path.insert(0, flashgau_transformers.Finder())  # even two of them
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
ask = type(CONFIG_MAPPING).__getitem__
importlib.reload(flashgau_transformers).install()
assert type(CONFIG_MAPPING).__getitem__ is ask
assert CONFIG_MAPPING["flashgau"]
import json
assert not waiting()
""")
    assert said == ""


FRONT = """
class Front:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.models.auto.configuration_auto":
            {answer}
start()
sys.meta_path.insert(0, Front())
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
"""
ALONE = "return importlib.machinery.PathFinder.find_spec(name, path)"
ASKING = """
            for one in sys.meta_path:
                if one is not self and (spec := one.find_spec(name, path)):
                    return spec"""
ASKING_ALL = """
            if not getattr(self, "busy", False):
                self.busy = True
                return importlib.util.find_spec(name)"""


def test_an_import_under_way_misses_no_finder_when_the_hook_leaves(python):
    said = python(f"""
import importlib.machinery
{FRONT.format(answer=ALONE)}
(hook,) = waiting()
sys.meta_path.remove(hook)
sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder), hook)
import csv
assert not waiting() and csv.__file__
""")
    assert said == ""


@pytest.mark.parametrize("answer", [ALONE, ASKING, ASKING_ALL])
def test_another_finder_in_front(python, answer):
    """One that finds the module by itself: then the next import tells. Or one that asks all others, this one too."""
    said = python(f"""
import importlib.machinery, importlib.util
{FRONT.format(answer=answer)}
import json
assert not waiting() and not ours()
assert CONFIG_MAPPING["flashgau"]
""")
    assert said == ""


def test_an_import_that_fails_in_the_middle_may_be_tried_again(python):
    said = python(
        """
start()
for _ in range(2):
    try:
        from transformers import AutoConfig
    except OSError as error:
        assert str(error) == "in the middle"
    assert len(waiting()) == 1
sys.whole = True
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert not waiting() and CONFIG_MAPPING["flashgau"]
""",
        transformers__models__auto__configuration_auto=AUTO.replace(
            "CONFIG_MAPPING =",
            'import sys\nif not hasattr(sys, "whole"): raise OSError("in the middle")\nCONFIG_MAPPING =',
        ),
    )
    assert said == ""


def test_threads_that_ask_at_once_all_get_an_answer(python):
    said = python(
        """
start()
found, gate = [], threading.Barrier(12)
def load():
    gate.wait()
    from transformers import AutoConfig
    mapping = sys.modules["transformers.models.auto.configuration_auto"].CONFIG_MAPPING
    found.append(("flashgau" in mapping, mapping["flashgau"]))
threads = [threading.Thread(target=load) for _ in range(12)]
for one in threads: one.start()
for one in threads: one.join()
assert len(found) == 12 and len({*found}) == 1 and not waiting()
""",
        flashgau__integrations__transformers="import time; time.sleep(0.2)\n" + MODELS,
    )
    assert said == ""


ASKED = """
start()
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
for _ in range(3):
    assert "flashgau" not in CONFIG_MAPPING
    try:
        CONFIG_MAPPING["flashgau"]
        raise SystemExit("found")
    except KeyError:
        pass
assert "bert" in CONFIG_MAPPING and not waiting()
"""
strictness = pytest.mark.parametrize("options", [(), ("-W", "error")], ids=["", "error"])


@strictness
def test_without_flashgau_nothing_happens(python, options):
    assert python(ASKED, *options, flashgau____init__=None, flashgau__integrations____init__=None,
                  flashgau__integrations__transformers=None) == ""  # fmt: skip


@strictness
@pytest.mark.parametrize("broken", ["1 / 0", "import a_module_that_is_not_there", "raise AttributeError('broken')"])
def test_a_flashgau_that_cannot_be_imported_is_told_once(python, options, broken):
    said = python(ASKED, *options, flashgau__integrations__transformers=broken)
    assert said.count("flashgau-transformers: ") == 1
    assert "Traceback" not in said


def test_a_transformers_that_is_too_old_is_told(python):
    old = "def __getattr__(name): raise ImportError('this is transformers 4.0; expected 5.5')"
    assert "ImportError: this is transformers 4.0" in python(ASKED, flashgau__integrations__transformers=old)


@strictness
@pytest.mark.parametrize("changed", ["CONFIG_MAPPING = {'bert': int}", "CONFIG_MAPPING = None", "del CONFIG_MAPPING"])
def test_a_transformers_that_is_built_otherwise_works_as_without(python, options, changed):
    said = python(
        """
start()
from transformers import AutoConfig
assert not ours()
""",
        *options,
        transformers__models__auto__configuration_auto=f"{AUTO}\n{changed}",
    )
    assert said.count("flashgau-transformers: ") == (1 if "{" in changed else 0), said
    assert "Traceback" not in said


def test_a_name_that_the_user_registered_stays_the_users(python):
    said = python("""
start()
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
CONFIG_MAPPING.register("flashgau", str)
assert CONFIG_MAPPING["flashgau"] is str and not ours()
""")
    assert said == ""


def test_flashgau_may_lie_in_a_zip_file(python, tmp_path):
    said = python(f"""
import shutil
shutil.make_archive("zipped", "zip", {str(tmp_path)!r}, "flashgau")
shutil.rmtree("flashgau")
sys.path.append("zipped.zip")
start()
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert CONFIG_MAPPING["flashgau"] and "zipped.zip" in sys.modules["flashgau"].__file__
""")
    assert said == ""


def test_the_true_mapping_is_as_assumed():
    """Its class takes other methods, which are those that the Auto classes ask."""
    pytest.importorskip("transformers", minversion="5.5")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = type(CONFIG_MAPPING)
    assert {"__getitem__", "__contains__"} <= vars(kind).keys()
    kind.__getitem__ = vars(kind)["__getitem__"]
    assert kind.__module__ == HOME
    assert f'HOME = "{HOME}"' in (ROOT / "wheels" / "transformers" / "flashgau_transformers.py").read_text()

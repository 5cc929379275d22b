"""The Auto classes of Hugging Face transformers find flashgau's models in a process that never imported flashgau.

transformers knows its own models and those that somebody registered, and asks no installed package. So a line of
`flashgau_transformers.pth`, which Python runs at its start, calls `install`: it waits for transformers to make its
Auto classes. From then on the first question for the model type "flashgau" imports
`flashgau.integrations.transformers`, which registers the models; whoever asks for others imports nothing of flashgau's.

Nothing here may break Python's start or transformers. At the start only `sys` and `_thread`, which are part of Python's
program, are imported; whatever goes wrong later is one warning, after which all is as it would be without this package.
"""

import sys
from _thread import get_ident

TYPE_CHECKING = False  # which costs less at every start than to import it
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["install"]

MODEL_TYPE = "flashgau"
HOME = "transformers.models.auto.configuration_auto"  # where CONFIG_MAPPING, from model types to classes, is made
MARK = "_asks_flashgau"


def install() -> None:
    """Let transformers know flashgau's models once it has its Auto classes. Called again, it does nothing more.

    Example:
        >>> import flashgau_transformers
        >>> flashgau_transformers.install()
    """
    if not _announced() and not any(map(_ours, sys.meta_path)):
        sys.meta_path.insert(0, Finder())


def _ours(finder: "Any") -> bool:
    """Whether a finder is one of this module, or of this module before it was loaded again."""
    return type(finder).__module__ == __name__


class Finder:
    """Finds nothing itself. Of the module that it waits for, it has the models announced once that is executed."""

    def __init__(self) -> None:
        self.asking: set[int] = set()  # threads that ask the other finders: one of them may ask all, this one too

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        """What the other finders say of the module that this one waits for; of all others nothing, at once."""
        if name != HOME:
            if HOME in sys.modules and _announced():  # a finder in front found it, and this one was not asked
                self.leave()
            return None
        thread = get_ident()
        if thread in self.asking:
            return None
        self.asking.add(thread)
        try:
            others = [one for one in sys.meta_path if not _ours(one) and hasattr(one, "find_spec")]
            found = (one.find_spec(name, path, target) for one in others)
            spec = next((one for one in found if one is not None), None)
        finally:
            self.asking.discard(thread)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = Loader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def leave(self) -> None:
        """Stop waiting."""
        # In another list: an import that goes along this one now, here or in another thread, would miss a finder.
        sys.meta_path = [one for one in sys.meta_path if one is not self]


class Loader:
    """Another loader, after which the models are announced."""

    def __init__(self, usual: "Any", finder: Finder) -> None:
        self.usual, self.finder = usual, finder

    def __getattr__(self, name: str) -> "Any":
        return getattr(self.usual, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        """As the other does."""
        return self.usual.create_module(spec)

    def exec_module(self, module: "Any") -> None:
        """As the other does, and leave nothing of this one on the module."""
        module.__loader__ = module.__spec__.loader = self.usual
        self.usual.exec_module(module)
        if _announced():
            self.finder.leave()


def _announced() -> bool:
    """Whether nothing is left to wait for: transformers asks flashgau from now on, or cannot be made to."""
    try:
        mapping = getattr(sys.modules.get(HOME), "CONFIG_MAPPING", None)
        if mapping is None:
            return False
        if not hasattr(type(mapping), MARK):
            _announce(type(mapping))
    except Exception as error:
        _warn(error)
    return True


def _announce(kind: "Any") -> None:
    """Let mappings of this class import flashgau when they are asked for its model type, once."""
    contains, getitem, asked = kind.__contains__, kind.__getitem__, [False]

    def ask(mapping: "Any", key: object) -> None:
        if key == MODEL_TYPE and not asked[0] and not contains(mapping, key):
            _register()
            asked[0] = True  # not before: another thread that asks meanwhile waits in its own import

    def new_contains(self: "Any", key: object) -> bool:
        ask(self, key)
        return contains(self, key)

    def new_getitem(self: "Any", key: object) -> "Any":
        ask(self, key)
        return getitem(self, key)

    kind.__contains__, kind.__getitem__ = new_contains, new_getitem
    setattr(kind, MARK, True)


def _register() -> None:
    """Import what registers the models, where flashgau is installed."""
    from importlib import import_module
    from importlib.util import find_spec

    try:
        if find_spec("flashgau") is not None:
            module = import_module("flashgau.integrations.transformers")
            getattr(module, "FlashGauConfig", None)  # of a transformers that is too old an ImportError says so
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    """Say once what went wrong."""
    import warnings

    text = f"flashgau-transformers: flashgau's models stay unknown to transformers: {type(error).__name__}: {error}"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors: not here
        print(text, file=sys.stderr)

"""Launch configurations: what a call is launched with (`flashgau.tables`), and finding and compiling them.

`search` finds those of a kernel of your own. It holds candidates to a reference, and so stands above this package, in
`flashgau.verification`; it is loaded when it is used.
"""

import importlib
from typing import Any

from flashgau.tables import choose, fuses_glu_linear, lookup, reload

__all__ = ["choose", "fuses_glu_linear", "lookup", "reload", "search"]


def __getattr__(name: str) -> Any:
    if name == "search":
        return importlib.import_module("flashgau.verification.own").search
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

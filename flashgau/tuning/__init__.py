"""Launch configurations: what a call is launched with (`flashgau.tables`), and finding and compiling them."""

from flashgau.tables import choose, fuses_glu_linear, lookup, reload

__all__ = ["choose", "fuses_glu_linear", "lookup", "reload"]

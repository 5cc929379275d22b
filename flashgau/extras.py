"""Packages that only some uses need: flashgau alone has operations and kernels, an extra brings what goes beyond, and
flashgau-instruments what executes and counts compiled kernels without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

INSTALL = "pip install ./instruments, in a checkout"  # flashgau-instruments


class MissingExtra(ImportError):
    """A package that is needed here is not installed; the message is one line that names what brings it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Inside, a module that is not installed is one that this extra of flashgau brings.

    Args:
        name: the extra's, as pyproject.toml has it.

    Raises:
        MissingExtra: it is not installed.

    Example:
        >>> with extra("plots"):
        ...     import a_module_that_draws
        Traceback (most recent call last):
            ...
        flashgau.extras.MissingExtra: a_module_that_draws is not installed: pip install 'flashgau[plots]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "a package").partition(".")[0]
        raise MissingExtra(f"{module} is not installed: pip install 'flashgau[{name}]'", name=error.name) from error


@contextmanager
def instruments() -> Iterator[None]:
    """Inside, a module of flashgau that is not installed is one that flashgau-instruments brings.

    Raises:
        MissingExtra: it is not installed.

    Example:
        >>> with instruments():
        ...     import flashgau.a_module_that_counts
        Traceback (most recent call last):
            ...
        flashgau.extras.MissingExtra: flashgau-instruments is not installed: pip install ./instruments, in a checkout
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("flashgau."):
            raise
        raise MissingExtra(f"flashgau-instruments is not installed: {INSTALL}", name=error.name) from error

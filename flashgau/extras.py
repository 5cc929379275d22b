"""Packages that only some uses need: flashgau alone has operations and kernels, an extra brings what goes beyond, and
two wheels more of its modules: flashgau-training, and flashgau-instruments, which executes and counts compiled kernels
without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


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


def install(name: Literal["instruments", "training"]) -> str:
    """How to install the wheel of this name.

    Example:
        >>> install("training")
        'pip install ./wheels/training, in a checkout'
    """
    return f"pip install ./wheels/{name}, in a checkout"


@contextmanager
def wheel(name: Literal["instruments", "training"]) -> Iterator[None]:
    """Inside, a module of flashgau that is not installed is one that this wheel brings.

    Args:
        name: without "flashgau-".

    Raises:
        MissingExtra: it is not installed.

    Example:
        >>> with wheel("training"):
        ...     import flashgau.a_module_that_trains
        Traceback (most recent call last):
            ...
        flashgau.extras.MissingExtra: flashgau-training is not installed: pip install ./wheels/training, in a checkout
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("flashgau."):
            raise
        raise MissingExtra(f"flashgau-{name} is not installed: {install(name)}", name=error.name) from error

"""Stopping a run from outside without losing anything."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop, and the second into KeyboardInterrupt."""

    reported: bool

    def __init__(self, told: Callable[[int], None]) -> None:
        self.signal: int | None = None
        self.told = told
        self.reported = False  # whether `told` has been called
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # Printing may refuse to be interrupted by itself (RuntimeError: reentrant call); the loop tells of it then.
        with contextlib.suppress(RuntimeError):
            self.told(number)
            self.reported = True

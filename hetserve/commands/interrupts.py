"""SIGINT and SIGTERM for a command that must always clean up: never in the middle of a start or a stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Interrupts:
    """While installed, a signal sets `asked`; inside `at_once` it also raises KeyboardInterrupt, there and then. `terminated` is
    whether one of them was SIGTERM: a command that goes on after Ctrl-C clears `asked`, and still ends on that.

    Main thread only. What was installed before is put back on leaving.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.terminated = False
        self._raises = False

    @contextmanager
    def installed(self) -> Iterator[Self]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raises KeyboardInterrupt on entry if a signal came before."""
        self._raises = True
        try:
            if self.asked.is_set():
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.asked.set()
        self.terminated = self.terminated or number == signal.SIGTERM
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt

"""One thread that looks after deadlines: it sleeps until the next one is due, and for ever when there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LEAST_WAIT_S = 0.001


class Sweeper:
    """Calls `sweep`, which returns the seconds until it should be called again, or None for not before `wake_within`."""

    def __init__(self, sweep: Callable[[], float | None], name: str) -> None:
        self._sweep = sweep
        self._changed = threading.Condition()
        self._wake_at_s: float | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake_within(self, delay_s: float) -> None:
        """Call `sweep` no later than `delay_s` from now. Cheap when it is due sooner anyway."""
        at_s = time.monotonic() + delay_s
        with self._changed:
            if self._wake_at_s is None or at_s < self._wake_at_s:
                self._wake_at_s = at_s
                self._changed.notify()

    def stop(self) -> None:
        """Returns when the thread has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            delay_s = self._sweep()
            if delay_s is not None:
                self.wake_within(max(delay_s, _LEAST_WAIT_S))

    def _wait(self) -> bool:
        """Wait until due. False when stopping."""
        with self._changed:
            while not self._stopping:
                left_s = None if self._wake_at_s is None else self._wake_at_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    self._wake_at_s = None
                    return True
                self._changed.wait(left_s)
        return False

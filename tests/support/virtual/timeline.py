"""Virtual time: a clock that jumps to the next thing to happen."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Timeline:
    """A clock and a heap of callbacks; those of one moment run in the order in which they were set."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self.events = 0

    def now(self) -> float:
        return self._now_s

    def at(self, time_s: float, callback: Callable[[], object]) -> None:
        heapq.heappush(self._due, (max(time_s, self._now_s), next(self._order), callback))

    def after(self, delay_s: float, callback: Callable[[], object]) -> None:
        self.at(self._now_s + delay_s, callback)

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Let things happen until `until()`; False if `limit_s` of virtual time came first, or nothing was left to happen."""
        while not until():
            if not self._due or self._due[0][0] > limit_s:
                return False
            self._now_s, _, callback = heapq.heappop(self._due)
            self.events += 1
            callback()
        return True

    def run_for(self, seconds: float) -> None:
        self.at(self._now_s + seconds, lambda: None)
        end_s = self._now_s + seconds
        self.run(lambda: self._now_s >= end_s, end_s)

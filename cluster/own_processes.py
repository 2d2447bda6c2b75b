"""The processes that this one started, by identity, so that stopping can make sure of them and touch nobody else's.

A process is its id *and* its creation time: ids are reused. psutil compares both.
"""

from __future__ import annotations

import contextlib

import psutil

PATIENCE_S = 5.0


class OwnProcesses:
    """Descendants of this process that appeared after this was made."""

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))
        self._ours: set[psutil.Process] = set()

    def note(self) -> None:
        """Remember the descendants that run now: one whose parent dies later is no longer found under us."""
        self._ours |= set(psutil.Process().children(recursive=True)) - self._before

    def end(self, patience_s: float = PATIENCE_S) -> list[int]:
        """Wait for all of them to be gone, and kill those that are not in time. Returns the ids that had to be killed."""
        self.note()
        _, alive = psutil.wait_procs(self._ours, timeout=patience_s)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=patience_s)
        self._ours.clear()
        return sorted(process.pid for process in alive)

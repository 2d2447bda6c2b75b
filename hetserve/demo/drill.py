"""The live kill: SIGKILL for the process that writes an answer, in the middle of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from hetserve.client import Client
from hetserve.demo.report import Kill
from hetserve.demo.typist import Typist
from hetserve.streams import Stream

ENDED_WITHIN_S = 10.0

PidOf = Callable[[str], int | None]
"""The process of an instance by the instance's name, from whoever started it; None when it has none."""


@dataclass
class Drill:
    """Told of each piece of one answer, kills its decode instance once `after_tokens` have come. `kill` is None until then, and
    stays so when nobody writes the answer any more.

    Only a descendant of this process is ever killed. The gateway says which instance writes the answer, and who started that
    instance says which process it is.
    """

    client: Client
    pid_of: PidOf
    after_tokens: int
    kill: Kill | None = None
    _victim: psutil.Process | None = field(default=None, repr=False)

    def __call__(self, stream: Stream, tokens: int, typist: Typist) -> None:
        if tokens < self.after_tokens or self._victim is not None:
            return
        name = self._writer(stream)
        pid = None if name is None else self.pid_of(name)
        mine = {process.pid: process for process in psutil.Process().children(recursive=True)}
        if name is None or pid not in mine:
            return
        self._victim = mine[pid]
        self._victim.kill()
        self.kill = Kill(name, pid, time.monotonic(), tokens, ended=False)
        typist.mark(f"⟨{name} killed⟩", "bold red")

    def confirm(self) -> Kill | None:
        """The kill, once the process is certain to have ended, or is known not to have."""
        if self.kill is None or self._victim is None:
            return None
        gone, _ = psutil.wait_procs([self._victim], timeout=ENDED_WITHIN_S)
        kill = self.kill
        self.kill = Kill(kill.victim, kill.pid, kill.at_s, kill.after_tokens, ended=bool(gone) or _zombie(self._victim))
        return self.kill

    def _writer(self, stream: Stream) -> str | None:
        """The instance that writes this answer now."""
        mine = (trace for trace in self.client.running() if stream.request_id and trace.id.startswith(stream.request_id))
        return next((trace.decode for trace in mine), None)


def _zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True

"""An instance's heartbeat: a thread of its own, so that a long step does not look like a death.

The beat says how long there has been no sign of life: a heart that beats over a loop or a device that hangs is found out by that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from core.messages import Address, Heartbeat
from mail.door import Door
from mail.peers import Peers


class Heart(threading.Thread):
    """Sends `beat()` to every gateway each `period_s`, from `start` to `stop`."""

    def __init__(self, door: Door, beat: Callable[[], Heartbeat], period_s: float) -> None:
        super().__init__(name="heart", daemon=True)
        self._door = door
        self._beat = beat
        self._period_s = period_s
        self._gateways: tuple[str, ...] = ()
        self._stopping = threading.Event()

    def connect(self, gateways: Iterable[Address]) -> None:
        """Beat for these gateways, and for no others, from the next beat on."""
        self._gateways = tuple(gateway.mailbox for gateway in gateways)

    def run(self) -> None:
        peers = Peers(self._door)
        known: tuple[str, ...] = ()
        try:
            while not self._stopping.is_set():
                gateways = self._gateways
                for gone in set(known) - set(gateways):
                    peers.forget(gone)
                known = gateways
                message = self._beat()
                for endpoint in gateways:
                    peers.send(endpoint, message)
                self._stopping.wait(self._period_s)
        finally:
            peers.close(linger_s=0)

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join()

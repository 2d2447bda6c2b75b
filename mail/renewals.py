"""Signs of life for attempts that two workers share: each tells the other, several times a lease, which it still holds."""

from __future__ import annotations

from collections.abc import Iterable

from core.clock import Clock
from core.messages import Address, Renew
from mail.peers import Peers

PER_LEASE = 3
"""Two renewals may be lost before the other side gives up."""
MOST_ATTEMPTS = 1024
"""In one message, well below what the wire takes."""


class Renewals:
    """Sends `Renew` messages for one worker. Not thread-safe."""

    def __init__(self, worker: Address, peers: Peers, clock: Clock, lease_s: float) -> None:
        self._worker = worker
        self._peers = peers
        self._clock = clock
        self._period_s = lease_s / PER_LEASE
        self._sent_s = clock.now()

    def send(self, shared: Iterable[tuple[Address, str]]) -> None:
        """Tell each peer which attempts it shares with us, if it is time again."""
        now_s = self._clock.now()
        if now_s - self._sent_s < self._period_s:
            return
        self._sent_s = now_s
        by_peer: dict[Address, list[str]] = {}
        for peer, attempt in shared:
            by_peer.setdefault(peer, []).append(attempt)
        for peer, attempts in by_peer.items():
            for start in range(0, len(attempts), MOST_ATTEMPTS):
                message = Renew(worker=self._worker, attempts=tuple(attempts[start : start + MOST_ATTEMPTS]))
                self._peers.send(peer.mailbox, message)

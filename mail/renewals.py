"""Signs of life for attempts that two workers share: each tells the other, several times a lease, where they stand with it."""

from __future__ import annotations

from collections.abc import Iterable

from core.attempts import Phase
from core.clock import Clock
from core.messages import Address, AttemptState, Renew
from mail.peers import MessageSender

PER_LEASE = 3
"""Two renewals may be lost before the other side gives up."""
MOST_STATES = 1024
"""In one message, well below what the wire takes."""

Shared = tuple[Address, str, Phase]
"""The other worker, an attempt, and where it stands here."""


class Renewals:
    """Sends `Renew` messages for one worker, numbered upwards. Not thread-safe. It remembers no peer."""

    def __init__(self, worker: Address, peers: MessageSender, clock: Clock, lease_s: float) -> None:
        self._worker = worker
        self._peers = peers
        self._clock = clock
        self._period_s = lease_s / PER_LEASE
        self._sent_s = clock.now()
        self.number = 0

    def due(self) -> bool:
        """Whether it is time again; if so, it counts as done."""
        now_s = self._clock.now()
        if now_s - self._sent_s < self._period_s:
            return False
        self._sent_s = now_s
        return True

    def send(self, shared: Iterable[Shared]) -> None:
        """Tell each peer where the attempts that it shares with us stand."""
        by_peer: dict[Address, list[AttemptState]] = {}
        for peer, attempt, phase in shared:
            by_peer.setdefault(peer, []).append(AttemptState(attempt, phase))
        for peer, states in by_peer.items():
            for start in range(0, len(states), MOST_STATES):
                self.number += 1
                portion = tuple(states[start : start + MOST_STATES])
                self._peers.send(peer.mailbox, Renew(worker=self._worker, number=self.number, states=portion))

"""What a worker has to tell gateways, gathered over one turn and sent as one message per gateway."""

from __future__ import annotations

from collections import defaultdict

from core.clock import Clock
from core.messages import Address, Failed, TokenItem, Tokens
from mail.peers import MessageSender

MOST_ITEMS = 1024
"""In one message, well below what the wire takes."""


class Outbox:
    """Not thread-safe. `lost` counts messages that a gateway had no room for; its next `Keep` asks for what they said."""

    def __init__(self, worker: Address, peers: MessageSender, clock: Clock) -> None:
        self._worker = worker
        self._peers = peers
        self._clock = clock
        self._items: defaultdict[str, list[TokenItem]] = defaultdict(list)
        self._oldest_s: dict[str, float] = {}
        self.lost = 0

    def tokens(self, gateway: Address, item: TokenItem) -> None:
        """Queue tokens for the next `flush`."""
        self._oldest_s.setdefault(gateway.mailbox, self._clock.now())
        self._items[gateway.mailbox].append(item)

    def failed(self, gateway: Address, failed: Failed) -> None:
        """Report at once, after any tokens queued for the same gateway, that an attempt is over here."""
        self._flush_one(gateway.mailbox)
        self._send(gateway.mailbox, failed)

    def flush(self) -> None:
        for endpoint in list(self._items):
            self._flush_one(endpoint)

    def _flush_one(self, endpoint: str) -> None:
        items = self._items.pop(endpoint, None)
        if items:
            age_s = self._clock.now() - self._oldest_s.pop(endpoint)
            for start in range(0, len(items), MOST_ITEMS):
                portion = tuple(items[start : start + MOST_ITEMS])
                self._send(endpoint, Tokens(worker=self._worker, items=portion, age_s=age_s))

    def _send(self, endpoint: str, message: Tokens | Failed) -> None:
        if not self._peers.send(endpoint, message):
            self.lost += 1

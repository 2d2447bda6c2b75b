"""The receiver's table of open grants: who may write, until when, and what becomes of those who may not. No I/O."""

from __future__ import annotations

import threading

from core.clock import Clock
from core.errors import LeaseExpired, TransferAborted, TransferError
from core.groups import Tables
from kv_transfer.events import Broken, OnReceiverEvent, Received
from kv_transfer.inbound import InboundGrant, Replies
from kv_transfer.store import KVStore
from kv_transfer.terms import Terms


class GrantTable:
    """Thread-safe. `on_event` is called without any lock held; what it raises is its caller's to bear."""

    def __init__(self, store: KVStore, clock: Clock, on_event: OnReceiverEvent) -> None:
        self._store = store
        self._clock = clock
        self._on_event = on_event
        self._lock = threading.Lock()
        self._open: dict[int, InboundGrant] = {}
        self._shut: str | None = None

    def open(self, terms: Terms, tables: Tables) -> None:
        """Raises ValueError if the grant is open already, cannot be, or its tokens have no blocks; TransferAborted once
        shut."""
        made, grant = InboundGrant(self._store, self._clock, terms, tables), terms.grant
        with self._lock:
            if self._shut is not None:
                raise TransferAborted(self._shut)
            if grant in self._open:
                raise ValueError(f"Got {grant = } but it is open already")
            self._open[grant] = made

    def get(self, grant: int) -> InboundGrant | None:
        with self._lock:
            return self._open.get(grant)

    def renew(self, grant: int) -> bool:
        found = self.get(grant)
        return found is not None and found.renew()

    def close(self, grant: int, error: TransferError) -> bool:
        """End it and tell its sender, with no event. False if it was not open."""
        found = self.get(grant)
        return found is not None and self._end(found, error)

    def fail(self, found: InboundGrant, error: TransferError, given_up: bool = False) -> None:
        """End it, tell its sender, raise `Broken`; nothing if it had ended before. `given_up` if its sender says so."""
        if self._end(found, error):
            self._on_event(Broken(found.grant, found.attempt, error, given_up))

    def commit(self, received: Received) -> None:
        """Forget a grant whose `finish` succeeded, and say so."""
        with self._lock:
            self._open.pop(received.grant, None)
        self._on_event(received)

    def lost(self, replies: Replies, error: TransferError) -> None:
        """The connection of a sender is gone, and with it what it was sending."""
        for found in self._all():
            if found.belongs_to(replies):
                self.fail(found, error)

    def expire(self) -> float | None:
        """Fail the grants whose lease is over. Seconds until the next is due, or None without any."""
        nearest_s = None
        for found in self._all():
            left_s = found.remaining_s()
            if left_s <= 0:
                self.fail(found, LeaseExpired(f"grant {found.grant} saw no sign of life for {found.lease_s} s"))
            elif nearest_s is None or left_s < nearest_s:
                nearest_s = left_s
        return nearest_s

    def shut(self, reason: str) -> None:
        """Fail all, and open no more."""
        with self._lock:
            self._shut = reason
        for found in self._all():
            self.fail(found, TransferAborted(reason))

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def _all(self) -> list[InboundGrant]:
        with self._lock:
            return list(self._open.values())

    def _end(self, found: InboundGrant, error: TransferError) -> bool:
        ended = found.end()
        if ended and found.replies is not None:
            found.replies.abort(found.grant, error)
        with self._lock:
            if self._open.get(found.grant) is found:
                del self._open[found.grant]
        return ended

"""One grant on the receiving side: what may arrive, what has, and the lock that ends it.

    OPEN ──begin──▶ BOUND ──finish──▶ COMMITTED        close, a lease, a fault or a lost connection end it from anywhere

Invariants: the store is written only under the lock, while the grant is live and its lease runs, with bytes whose digest was
right, at tokens that were granted and had not arrived before. Once `end` has returned, nothing of the grant is ever written.
"""

from __future__ import annotations

import threading
from typing import Protocol

from core.clock import Clock
from core.errors import CorruptTransfer, LeaseExpired, TransferAborted, TransferError
from core.groups import Tables
from kv_transfer.coverage import Coverage
from kv_transfer.events import Received
from kv_transfer.frames import NOWHERE, Begin, Commit, Finish, Header, SessionDigest, begin_of
from kv_transfer.store import KVStore, write_region
from kv_transfer.terms import Terms, check_room


class GrantEnded(TransferAborted):
    """A frame found its grant over, or about to be: whoever ended it tells the sender and the worker."""


class Replies(Protocol):
    """The way back to the sender of a bound grant."""

    def abort(self, grant: int, error: TransferError) -> None:
        """Tell the sender; never blocks, never raises."""


class InboundGrant:
    """`tables`, one for each group of the store, hold tokens `[0, num_tokens)`. What the terms do not ask for
    stays untouched."""

    def __init__(self, store: KVStore, clock: Clock, terms: Terms, tables: Tables) -> None:
        layout = store.layout
        terms.check()
        check_room(layout, store.groups, tables, terms)
        self.grant = terms.grant
        self.attempt = terms.attempt
        self.lease_s = terms.lease_s
        self._store = store
        self._clock = clock
        self._tables = [tuple(table) for table in tables]
        self._expected = begin_of(terms, layout)
        self._coverage = Coverage(terms.needed(layout))
        self._lock = threading.Lock()
        self._live = True
        self._ending = False
        self._replies: Replies | None = None
        self._expires_s = clock.now() + terms.lease_s
        self._frames = 0
        self._digest = SessionDigest()
        self._kv_bytes = 0
        self._started_s: float | None = None

    @property
    def replies(self) -> Replies | None:
        """Where its sender is, once that has begun."""
        return self._replies

    def belongs_to(self, replies: Replies) -> bool:
        return self._replies is replies

    def begin(self, header: Header, packed: memoryview, begin: Begin, replies: Replies) -> None:
        """Bind to the sender that has named the same attempt and tokens. Raises TransferError."""
        with self._lock:
            self._check_live()
            if header.region != NOWHERE:
                raise CorruptTransfer("Got a BEGIN that names tokens")
            if self._replies is not None or begin != self._expected:
                raise TransferAborted(f"grant {self.grant} is not for this attempt and these tokens")
            self._replies = replies
            self._check_sequence(header)
            self._accept(packed)

    def write(self, header: Header, packed: memoryview, payload: memoryview) -> None:
        """Store one piece whose digest was right. Raises TransferError; nothing is written then."""
        with self._lock:
            self._check_live()
            self._check_sequence(header)
            layout, region = self._store.layout, header.region
            if not layout.holds_all(region):
                raise CorruptTransfer(f"Got {region} but expected what {layout.shard} holds")
            expected = layout.region_bytes(region)
            if header.length != expected:
                raise CorruptTransfer(f"Got {header.length} bytes of {region} but expected {expected}")
            try:
                for layer in range(region.layers.start, region.layers.stop):
                    self._coverage.add(layer, region.heads, region.tokens)
            except ValueError as error:
                raise CorruptTransfer(str(error)) from error
            if self._started_s is None:
                self._started_s = self._clock.now()
            write_region(self._store, self._tables, region, payload)
            self._kv_bytes += header.length
            self._accept(packed)

    def finish(self, header: Header, packed: memoryview, finish: Finish) -> tuple[Received, Commit]:
        """Check that everything is there and end the grant: nothing more is written. Raises TransferError."""
        with self._lock:
            self._check_live()
            self._check_sequence(header)
            if header.region != NOWHERE:
                raise CorruptTransfer("Got a FINISH that names tokens")
            if finish.frames != self._frames or finish.digest != self._digest.value():
                raise CorruptTransfer(f"Got {self._frames} frames but the sender counts {finish.frames}, or their digests differ")
            if not self._coverage.complete:
                raise CorruptTransfer(f"the sender has finished but {self._coverage.remaining} rows are missing")
            self._accept(packed)
            self._live = False
            now_s = self._clock.now()
            transfer_s = now_s - (self._started_s if self._started_s is not None else now_s)
            received = Received(self.grant, self.attempt, finish.tail, self._kv_bytes, transfer_s)
            return received, Commit(self._digest.value())

    def renew(self) -> bool:
        """Start the lease anew. False if it is over."""
        with self._lock:
            if not self._live or self._clock.now() >= self._expires_s:
                return False
            self._expires_s = self._clock.now() + self.lease_s
            return True

    def end(self) -> bool:
        """After it returns, nothing is written. False if it had ended before."""
        self._ending = True  # before the lock: a sender in full flow must not overtake who waits for it
        with self._lock:
            was_live, self._live = self._live, False
            return was_live

    def remaining_s(self) -> float:
        """Seconds of lease left; not positive when it has expired."""
        return self._expires_s - self._clock.now()

    def _check_live(self) -> None:
        if not self._live or self._ending:
            raise GrantEnded(f"grant {self.grant} is over")
        if self._clock.now() >= self._expires_s:
            raise LeaseExpired(f"grant {self.grant} saw no sign of life for {self.lease_s} s")

    def _check_sequence(self, header: Header) -> None:
        if header.sequence != self._frames:
            raise CorruptTransfer(f"Got frame {header.sequence} of grant {self.grant} but expected {self._frames}")

    def _accept(self, packed: memoryview) -> None:
        """Count a frame that was right: it is the session's newest sign of life."""
        self._digest.add(packed)
        self._frames += 1
        self._expires_s = self._clock.now() + self.lease_s

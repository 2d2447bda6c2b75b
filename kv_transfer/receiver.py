"""The receiving side of KV transfer: a decode worker opens grants, senders fill them, events say how each ended.

Threads: one accepts, one per connection, one for leases and handshakes that take too long. All events come from these.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType

from core.clock import Clock
from core.errors import HandshakeRefused, TransferAborted, TransferError
from core.groups import Tables
from kv_transfer.carrier import Carrier
from kv_transfer.carriers.inline import INLINE
from kv_transfer.doorway import HANDSHAKE_TIMEOUT_S, Doorway
from kv_transfer.events import Broken, OnReceiverEvent, Received
from kv_transfer.grants import GrantTable
from kv_transfer.protocol import Handshake, Identity
from kv_transfer.receive_link import ReceiveLink
from kv_transfer.store import KVStore
from kv_transfer.sweeper import Sweeper
from kv_transfer.terms import Terms
from kv_transfer.transport import Connection, Transport

_log = logging.getLogger(__name__)


class KVReceiver:
    """A `sessions.Receiver` that listens from construction to `stop`. Usable as a context manager.

    Args:
        secret: the cluster's, at least 16 bytes; without it nobody connects.
        fingerprint: names the weights; peers with another are refused.
        incarnation: of this worker; told to peers.
        on_event: called from this object's threads, never with a lock held. It may call back into the receiver.
        carriers: what may carry payloads, best first; see `kv_transfer.carriers.carriers_for`.

    Raises:
        TransferError: the transport cannot listen.
    """

    def __init__(
        self,
        store: KVStore,
        transport: Transport,
        secret: bytes,
        fingerprint: str,
        incarnation: int,
        clock: Clock,
        on_event: OnReceiverEvent,
        carriers: Sequence[Carrier] = INLINE,
    ) -> None:
        self._handshake = Handshake(Identity(fingerprint, store.layout, incarnation), secret, carriers)
        self._clock = clock
        self._on_event = on_event
        self._grants = GrantTable(store, clock, self._emit)
        self._lock = threading.Lock()
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._links: dict[Connection, ReceiveLink] = {}
        self._doorway = Doorway(clock)
        self._listener = transport.listen()
        self._sweeper = Sweeper(self.sweep, "kv-receiver-leases")
        self._acceptor = threading.Thread(target=self._accept, name="kv-receiver-accept", daemon=True)
        self._acceptor.start()

    @property
    def endpoint(self) -> str:
        return self._listener.endpoint

    @property
    def open_grants(self) -> int:
        return len(self._grants)

    def open(self, terms: Terms, tables: Tables) -> None:
        self._grants.open(terms, tables)
        self._sweeper.wake_within(terms.lease_s)

    def renew(self, grant: int) -> bool:
        return self._grants.renew(grant)

    def close(self, grant: int, reason: str) -> bool:
        return self._grants.close(grant, TransferAborted(reason))

    def sweep(self) -> float | None:
        """End what has run out of time: leases, and connections that do not get through the handshake. Called by the
        receiver's own timer; tests call it after moving their clock. Seconds until the next is due, or None."""
        due_s = [left_s for left_s in (self._grants.expire(), self._doorway.expire()) if left_s is not None]
        return min(due_s, default=None)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            links = list(self._links.values())
        self._listener.close()
        self._grants.shut("the receiver has stopped")
        self._doorway.shut()
        for link in links:
            link.close()
        with self._lock:
            threads = [self._acceptor, *self._threads]
        for thread in threads:
            thread.join()
        self._sweeper.stop()

    def __enter__(self) -> KVReceiver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except TransferError as error:
                if not self._stopping:
                    _log.error("KV receiver: %s", error)
                return
            thread = threading.Thread(target=self._serve, args=(connection,), name="kv-receiver", daemon=True)
            with self._lock:
                if self._stopping:
                    connection.close()
                    return
                self._doorway.enter(connection)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads to be had: as with descriptors, until others let go of some
                    _log.error("KV receiver: cannot serve a peer: %s", error)
                    self._doorway.leave(connection)
                    connection.close()
                    continue
                self._threads = [*(other for other in self._threads if other.is_alive()), thread]
            self._sweeper.wake_within(HANDSHAKE_TIMEOUT_S)

    def _serve(self, connection: Connection) -> None:
        try:
            peer, acceptance = self._handshake.answer(connection)
            why = f" ({peer.declined})" if peer.declined else ""
            _log.info("KV from incarnation %d of a peer comes by %s%s", peer.identity.incarnation, peer.carrier, why)
            self._doorway.prove(connection)
            link = ReceiveLink(connection, peer, acceptance, self._grants)
            with self._lock:
                self._links[connection] = link
            link.run()
        except HandshakeRefused as error:
            _log.warning("KV receiver refused a peer: %s", error)
        except TransferError as error:
            _log.info("KV receiver lost a peer in the handshake: %s", error)
        except Exception:  # a connection's end, never the receiver's
            _log.exception("KV receiver dropped a connection")
        finally:
            connection.close()
            self._doorway.leave(connection)
            with self._lock:
                self._links.pop(connection, None)

    def _emit(self, event: Received | Broken) -> None:
        try:
            self._on_event(event)
        except Exception:  # the worker's fault must not end other sessions of this thread
            _log.exception("KV receiver: the handler of %s failed", type(event).__name__)

"""The sending side of KV transfer: a prefill worker begins a session per grant, pushes layers as they are computed, and an
event says how each session ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from core.clock import Clock
from core.errors import TransferAborted, TransferError
from core.groups import Tables
from kv_transfer.carrier import Carrier
from kv_transfer.carriers.inline import INLINE
from kv_transfer.events import Delivered, OnSenderEvent, SendFailed
from kv_transfer.line import Dialler
from kv_transfer.outbound import Outbound
from kv_transfer.protocol import Handshake, Identity
from kv_transfer.send_link import SendLink
from kv_transfer.send_session import LinkSession
from kv_transfer.sessions import SendSession
from kv_transfer.store import Fence, KVStore
from kv_transfer.sweeper import Sweeper
from kv_transfer.terms import Terms, check_endpoints, check_kept, check_tables
from kv_transfer.transport import Transport

_log = logging.getLogger(__name__)


class OpenSession:
    """A `sessions.SendSession` over a link."""

    def __init__(self, link: SendLink, session: LinkSession, sweeper: Sweeper) -> None:
        self._link = link
        self._session = session
        self._sweeper = sweeper

    @property
    def attempt(self) -> str:
        return self._session.outbound.attempt

    @property
    def grant(self) -> int:
        return self._session.outbound.grant

    @property
    def ended(self) -> bool:
        return self._session.ended

    def push(self, layer: int, start: int, count: int, fence: Fence | None = None) -> None:
        self._link.push(self._session, layer, start, count, fence)
        self._sweeper.wake_within(self._session.lease_s)

    def finish(self, tail: bytes) -> None:
        self._link.finish(self._session, tail)
        self._sweeper.wake_within(self._session.lease_s)

    def abort(self, reason: str) -> bool:
        return self._link.abort(self._session, TransferAborted(reason))


@dataclass(frozen=True)
class RefusedSession:
    """A `sessions.SendSession` of a grant that cannot be: it was over before it began."""

    attempt: str
    grant: int
    ended: bool = True

    def push(self, layer: int, start: int, count: int, fence: Fence | None = None) -> None:
        pass

    def finish(self, tail: bytes) -> None:
        pass

    def abort(self, reason: str) -> bool:
        return False


class KVSender:
    """A `sessions.Sender`, usable as a context manager. Two or three threads per peer that has sessions or a connection, and
    one for deadlines.

    Args: as for `KVReceiver`; `on_event` is called from this object's threads, never with a lock held, and may call back.
    """

    def __init__(
        self,
        store: KVStore,
        transport: Transport,
        secret: bytes,
        fingerprint: str,
        incarnation: int,
        clock: Clock,
        on_event: OnSenderEvent,
        carriers: Sequence[Carrier] = INLINE,
    ) -> None:
        self._store = store
        self._transport = transport
        self._handshake = Handshake(Identity(fingerprint, store.layout, incarnation), secret, carriers)
        self._clock = clock
        self._on_event = on_event
        self._lock = threading.Lock()
        self._links: dict[tuple[str, int | None], SendLink] = {}
        self._retired: list[SendLink] = []
        self._closed = False
        self._sweeper = Sweeper(self.sweep, "kv-sender-deadlines")

    def begin(self, terms: Terms, endpoints: tuple[str, ...], tables: Tables, incarnation: int | None = None) -> SendSession:
        layout, groups = self._store.layout, self._store.groups
        if terms.num_tokens < 0:
            raise ValueError(f"Got num_tokens = {terms.num_tokens} but expected a number of tokens")
        check_tables(tables, groups)
        try:
            terms.check()
            endpoint = check_endpoints(endpoints)
            check_kept(groups, terms)
        except ValueError as error:
            with self._lock:
                self._check_open()
            return self._refused(terms, f"an impossible grant: {error}")
        session = LinkSession(Outbound(layout, groups, terms, tables), terms.lease_s)
        with self._lock:
            self._check_open()
            link = self._link(endpoint, incarnation)
            taken = link.add(session)
        if not taken:
            return self._refused(terms, f"{endpoint} has given grant {terms.grant} twice")
        self._sweeper.wake_within(terms.lease_s)
        return OpenSession(link, session, self._sweeper)

    def sweep(self) -> float | None:
        """Fail sessions whose time is up. Called by the sender's own timer; tests call it after moving their clock.
        Seconds until the next is due, or None."""
        with self._lock:
            links = list(self._links.values())
        due = [left_s for link in links if (left_s := link.expire()) is not None]
        return min(due, default=None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links = [*self._links.values(), *self._retired]
        for link in links:
            link.stop("the sender is closed")
        for link in links:
            link.join()
        self._sweeper.stop()

    def __enter__(self) -> KVSender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _link(self, endpoint: str, incarnation: int | None) -> SendLink:
        """With the lock held: the link there. Each incarnation of a peer has its own: what is stuck towards a dead one holds
        nobody up, and how peers number their grants is their business."""
        link = self._links.get((endpoint, incarnation))
        if link is None:
            dialler = Dialler(endpoint, incarnation, self._transport, self._handshake)
            link = SendLink(endpoint, self._store, dialler, self._clock, self._emit, self._may_retire)
            self._links[endpoint, incarnation] = link
        return link

    def _may_retire(self, link: SendLink) -> bool:
        """Whether an idle link may end: from then on nobody adds to it."""
        with self._lock:
            if not link.idle:
                return False
            self._links = {key: other for key, other in self._links.items() if other is not link}
            self._retired = [*(other for other in self._retired if other.alive), link]
            return True

    def _check_open(self) -> None:
        if self._closed:
            raise TransferAborted("the sender is closed")

    def _refused(self, terms: Terms, reason: str) -> RefusedSession:
        self._emit(SendFailed(terms.attempt, TransferError(reason)))
        return RefusedSession(terms.attempt, terms.grant)

    def _emit(self, event: Delivered | SendFailed) -> None:
        try:
            self._on_event(event)
        except Exception:  # the worker's fault must not end other sessions of this thread
            _log.exception("KV sender: the handler of %s failed", type(event).__name__)

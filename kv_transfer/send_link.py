"""The sending end towards one peer: one connection, one thread that sends, one that hears the answers.

Sessions take turns piece by piece. A piece is read from the store into this link's buffer and sent from there, so that a
session can be ended, and its blocks reused, while the wire is stuck. A connection that breaks fails the sessions that had
begun on it; the next session dials anew. Without sessions and connection the link ends itself.

Locks: `_changed` guards sessions and queues and is never held over I/O; a session's `reading` is held while the store is read.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from core.clock import Clock
from core.errors import CorruptTransfer, HandshakeRefused, LeaseExpired, TransferAborted, TransferError
from kv_transfer.carrier import Outgoing
from kv_transfer.events import Delivered, OnSenderEvent, SendFailed
from kv_transfer.frames import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    Abort,
    Commit,
    Kind,
    abort_of,
    check_payload,
    error_of,
    pack_body,
    pack_frame,
    parse_header,
    unpack_body,
)
from kv_transfer.outbound import Outbound, Piece
from kv_transfer.protocol import Handshake, Peer
from kv_transfer.store import KVStore
from kv_transfer.transport import Connection, Transport

_log = logging.getLogger(__name__)


class LinkSession:
    """A session's place in its link. Fields are guarded by the link's lock; `reading` is held while the store is read."""

    def __init__(self, outbound: Outbound, lease_s: float, incarnation: int | None) -> None:
        self.outbound = outbound
        self.lease_s = lease_s
        self.incarnation = incarnation
        self.reading = threading.Lock()
        self.ended = False
        self.bound = False
        self.queued = False
        self.expires_s: float | None = None
        self.started_s: float | None = None


class SendLink:
    """The link to `endpoint`. `retire` is asked, without locks, whether an idle link may end its thread."""

    def __init__(
        self,
        endpoint: str,
        store: KVStore,
        transport: Transport,
        handshake: Handshake,
        clock: Clock,
        on_event: OnSenderEvent,
        retire: Callable[[SendLink], bool],
    ) -> None:
        self.endpoint = endpoint
        self._store = store
        self._transport = transport
        self._handshake = handshake
        self._clock = clock
        self._on_event = on_event
        self._retire = retire
        self._changed = threading.Condition()
        self._sessions: dict[int, LinkSession] = {}
        self._ready: deque[LinkSession] = deque()
        self._aborts: deque[tuple[int, TransferError]] = deque()
        self._connection: Connection | None = None
        self._peer: Peer | None = None
        self._outgoing: Outgoing | None = None
        self._listener: threading.Thread | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"kv-sender {endpoint}", daemon=True)
        self._thread.start()

    # --- called by any thread -----------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._sessions and not self._ready and self._connection is None

    def add(self, session: LinkSession) -> None:
        """Raises ValueError if the grant is in use here."""
        with self._changed:
            grant = session.outbound.grant
            if grant in self._sessions:
                raise ValueError(f"Got {grant = } but it is being sent to {self.endpoint} already")
            self._sessions[grant] = session
            self._make_ready(session)

    def push(self, session: LinkSession, layer: int, start: int, count: int) -> None:
        fence = self._store.fence()
        self._change(session, lambda outbound: outbound.push(layer, start, count, fence))

    def finish(self, session: LinkSession, tail: bytes) -> None:
        self._change(session, lambda outbound: outbound.finish(tail))

    def abort(self, session: LinkSession, error: TransferError) -> bool:
        """End it without an event. Once this returns, the store is no more read for it. False if it had ended."""
        with self._changed:
            ended = self._end(session)
            if ended and session.bound:
                self._aborts.append((session.outbound.grant, error))
                self._changed.notify()
        with session.reading:
            return ended

    def expire(self) -> float | None:
        """Fail sessions that saw no progress for their lease. Seconds until the next is due, or None."""
        now_s, stuck = self._clock.now(), False
        late: list[LinkSession] = []
        left_s: list[float] = []
        with self._changed:
            for session in self._sessions.values():
                if session.expires_s is None:
                    continue
                if session.expires_s <= now_s:
                    late.append(session)
                    stuck |= not session.outbound.finished
                else:
                    left_s.append(session.expires_s - now_s)
        for session in late:
            what = "committed" if session.outbound.finished else "taken"
            whose = f"of attempt {session.outbound.attempt} for {session.lease_s} s"
            self._fail(session, LeaseExpired(f"{self.endpoint} has {what} nothing {whose}"))
        if stuck:
            self._hang_up(TransferError(f"{self.endpoint} does not read"))
        return min(left_s, default=None)

    def stop(self, reason: str) -> None:
        """Fail all sessions and end. `join` waits for the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._hang_up(TransferAborted(reason))
        for session in self._all():
            self._fail(session, TransferAborted(reason))

    def join(self) -> None:
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # --- the sending thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            session, abort = self._wait()
            if session is None and abort is None:
                if self._stopping or self._retire(self):
                    break
                continue
            try:
                connection, peer, outgoing = self._connected()
                if abort is not None:
                    self._send_abort(connection, peer, *abort)
                if session is not None:
                    self._send_next(connection, peer, outgoing, session)
            except TransferError as error:
                self._hang_up(error)
            except Exception as error:  # ends this link's sessions, never the worker
                _log.exception("the link to %s failed", self.endpoint)
                self._hang_up(TransferError(f"the link to {self.endpoint} failed: {error!r}"))
        self._hang_up(TransferAborted("the sender has stopped"))
        self._join_listener()

    def _wait(self) -> tuple[LinkSession | None, tuple[int, TransferError] | None]:
        """The next turn: a session, or an abort to tell. Neither when stopping, or when there is nothing to keep alive."""
        with self._changed:
            while not self._stopping:
                if self._aborts:
                    if self._connection is not None:
                        return None, self._aborts.popleft()
                    self._aborts.clear()
                while self._ready:
                    session = self._ready.popleft()
                    session.queued = False
                    if not session.ended:
                        return session, None
                if self._connection is None and not self._sessions:
                    break
                self._changed.wait()
            return None, None

    def _connected(self) -> tuple[Connection, Peer, Outgoing]:
        """The connection, dialled if there is none. Raises TransferError: every session that waited for it has failed too
        (those that came during the dial get one of their own)."""
        with self._changed:
            if self._connection is not None and self._peer is not None and self._outgoing is not None:
                return self._connection, self._peer, self._outgoing
        self._join_listener()
        waiting = self._all()
        connection: Connection | None = None
        try:
            connection = self._transport.connect(self.endpoint)
            self._adopt(connection, None)  # so that it can be given up while it shakes hands
            peer, outgoing = self._handshake.dial(connection)
            why = f" ({peer.declined})" if peer.declined else ""
            _log.info("KV to %s goes by %s%s", self.endpoint, peer.carrier, why)
            self._outgoing = outgoing
            self._adopt(connection, peer)
        except TransferError as error:
            if connection is not None:
                connection.close()
                self._hang_up(error, connection)
            for session in waiting:
                self._fail(session, error)
            raise
        self._listener = threading.Thread(
            target=self._listen, args=(connection, peer, outgoing), name=f"kv-sender answers {self.endpoint}", daemon=True
        )
        self._listener.start()
        return connection, peer, outgoing

    def _adopt(self, connection: Connection, peer: Peer | None) -> None:
        """Make it the link's connection, proved once there is a peer. Raises TransferError if it was given up meanwhile, or
        if every session that it was dialled for has ended: then no lease would watch over its handshake."""
        with self._changed:
            given_up = not self._sessions if peer is None else self._connection is not connection
            if self._stopping or given_up:
                raise TransferAborted(f"the connection to {self.endpoint} was given up")
            self._connection, self._peer = connection, peer

    def _send_next(self, connection: Connection, peer: Peer, outgoing: Outgoing, session: LinkSession) -> None:
        """Send one frame of the session and queue it for its next turn. Raises TransferError if the connection breaks."""
        wanted, found = session.incarnation, peer.identity.incarnation
        if wanted is not None and wanted != found:
            message = f"incarnation: {self.endpoint} is incarnation {found} but the grant came from {wanted}"
            self._fail(session, HandshakeRefused(message, "incarnation"))
            return
        with self._changed:
            if session.ended or self._connection is not connection or not session.outbound.has_next():
                self._make_ready(session)
                return
            session.bound = True
            frame = session.outbound.next_frame()
        if isinstance(frame, Piece):
            self._send_piece(session, frame, peer, outgoing)
        else:
            kind, body = frame
            header = self._stamp(session, kind, body, None, peer.send_seed)
            if header is not None:
                connection.send([header, body])
        with self._changed:
            waits = session.outbound.has_next() or session.outbound.finished
            session.expires_s = self._clock.now() + session.lease_s if waits else None
            self._make_ready(session)

    def _send_piece(self, session: LinkSession, piece: Piece, peer: Peer, outgoing: Outgoing) -> None:
        out = outgoing.room(piece.count * self._store.layout.layer_bytes_per_token(piece.layer))
        header = self._stamp(session, Kind.DATA, out, piece, peer.send_seed) if self._read(session, piece, out) else None
        if header is None:
            outgoing.discard(out)
        else:
            outgoing.ship([header], out)

    def _stamp(
        self, session: LinkSession, kind: Kind, payload: bytes | memoryview, piece: Piece | None, seed: int
    ) -> bytes | None:
        """The frame's header, or None if the session has ended meanwhile."""
        with self._changed:
            if session.ended:
                return None
            if piece is not None and session.started_s is None:
                session.started_s = self._clock.now()
            return session.outbound.stamp(kind, payload, seed, piece)

    def _read(self, session: LinkSession, piece: Piece, out: memoryview) -> bool:
        """Gather the piece. False if the session has ended, or ends because it cannot be read."""
        try:
            if piece.fence is not None:
                piece.fence.wait()
            with session.reading:
                if session.ended:
                    return False
                self._store.read(piece.layer, session.outbound.blocks, piece.start, piece.count, out)
        except Exception as error:  # the store's fault ends this session, not the link's others
            _log.exception("cannot read KV of attempt %s", session.outbound.attempt)
            self._fail(session, TransferError(f"the sender cannot read: {error!r}"))
            return False
        return True

    def _send_abort(self, connection: Connection, peer: Peer, grant: int, error: TransferError) -> None:
        payload = pack_body(abort_of(error))
        connection.send([pack_frame(Kind.ABORT, grant, 0, payload, peer.send_seed), payload])

    def _join_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.join()

    # --- the thread that hears the answers ----------------------------------------------------------------------------

    def _listen(self, connection: Connection, peer: Peer, outgoing: Outgoing) -> None:
        header_bytes = memoryview(bytearray(HEADER_BYTES))
        body = memoryview(bytearray(MAX_CONTROL_BYTES))
        heard = 0
        try:
            while True:
                connection.recv_into(header_bytes)
                header = parse_header(header_bytes, peer.recv_seed)
                if header.sequence != heard or header.length > MAX_CONTROL_BYTES:
                    raise CorruptTransfer(f"Got answer {header.sequence} of {header.length} bytes but expected answer {heard}")
                heard += 1
                payload = body[: header.length]
                connection.recv_into(payload)
                check_payload(header, payload, peer.recv_seed)
                if header.kind is Kind.COMMIT:
                    self._committed(header.grant, unpack_body(payload, Commit))
                elif header.kind is Kind.NOTE:
                    outgoing.heard(bytes(payload))
                elif header.kind is Kind.ABORT:
                    self._refused(header.grant, error_of(unpack_body(payload, Abort)))
                else:
                    raise CorruptTransfer(f"Got a {header.kind.name} from a receiver")
        except TransferError as error:
            self._hang_up(error, connection)
        except Exception as error:  # ends this connection's sessions, never the worker
            _log.exception("cannot hear %s", self.endpoint)
            self._hang_up(TransferError(f"cannot hear {self.endpoint}: {error!r}"), connection)

    def _committed(self, grant: int, commit: Commit) -> None:
        with self._changed:
            session = self._sessions.get(grant)
            if session is None or not session.bound:
                return
            if not session.outbound.finished or commit.digest != session.outbound.digest:
                error = CorruptTransfer(f"{self.endpoint} has committed something else than was sent")
            else:
                error = None
                self._end(session)
        if error is not None:
            self._fail(session, error)
            return
        now_s = self._clock.now()
        started_s = session.started_s if session.started_s is not None else now_s
        self._on_event(Delivered(session.outbound.attempt, session.outbound.kv_bytes, now_s - started_s))

    def _refused(self, grant: int, error: TransferError) -> None:
        with self._changed:
            session = self._sessions.get(grant)
            if session is None or not session.bound:
                return
            session.bound = False  # the peer knows
        self._fail(session, error)

    # --- endings ------------------------------------------------------------------------------------------------------

    def _change(self, session: LinkSession, change: Callable[[Outbound], None]) -> None:
        """Apply a change to a live session; one that cannot be right fails the session."""
        try:
            with self._changed:
                if not session.ended:
                    change(session.outbound)
                    self._make_ready(session)
        except ValueError as error:
            self._fail(session, TransferError(str(error)))

    def _fail(self, session: LinkSession, error: TransferError) -> None:
        if self.abort(session, error):
            self._on_event(SendFailed(session.outbound.attempt, error))

    def _hang_up(self, error: TransferError, only: Connection | None = None) -> None:
        """Drop the connection (if it still is `only`) and fail the sessions that had begun on it."""
        with self._changed:
            connection = self._connection
            if connection is None or (only is not None and connection is not only):
                return
            # In one step: a session that begins after this begins on the next connection.
            outgoing = self._outgoing
            self._connection, self._peer, self._outgoing = None, None, None
            bound = [session for session in self._sessions.values() if session.bound]
            for session in bound:
                session.bound = False
            self._changed.notify()
        connection.close()
        if outgoing is not None:
            outgoing.close()
        for session in bound:
            self._fail(session, error)

    def _end(self, session: LinkSession) -> bool:
        """With the lock held. False if it had ended before."""
        if session.ended:
            return False
        session.ended = True
        self._sessions.pop(session.outbound.grant, None)
        self._changed.notify()
        return True

    def _make_ready(self, session: LinkSession) -> None:
        """With the lock held: give it a turn if it has something to send."""
        if session.ended or not session.outbound.has_next():
            return
        if session.expires_s is None:
            session.expires_s = self._clock.now() + session.lease_s
        if not session.queued:
            session.queued = True
            self._ready.append(session)
            self._changed.notify()

    def _all(self) -> list[LinkSession]:
        with self._changed:
            return list(self._sessions.values())

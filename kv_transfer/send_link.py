"""The sending end towards one incarnation of one peer: its sessions, whose turn it is, and how each ends.

Sessions take turns piece by piece; one whose next piece the device has not written yet is passed over. A piece is read from the
store into a room of the carrier and leaves from there, so that a session can be ended, and its blocks reused, while the wire is
stuck. A line that breaks fails the sessions that had begun on it; the next session dials anew. Without sessions and line the
link ends itself.

Locks: `_changed` guards all that is in here and is never held over I/O; a session's `reading` is held while the store is read.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum

from core.clock import Clock
from core.errors import CorruptTransfer, LeaseExpired, TransferAborted, TransferError
from core.layout import Region
from kv_transfer.answers import hear
from kv_transfer.events import Delivered, OnSenderEvent, SendFailed
from kv_transfer.frames import JOINED_BYTES, Commit, payload_digest
from kv_transfer.line import Dialler, Line, Parcel
from kv_transfer.outbound import Outbound
from kv_transfer.send_session import LinkSession, State
from kv_transfer.sending import Farewell, SendingThreads
from kv_transfer.store import Fence, KVStore, read_region

_log = logging.getLogger(__name__)

# How often fences are asked while nothing else can be sent: at first, and at most. Pushes wake the link at once.
_FENCE_POLL_S, _FENCE_POLL_MOST_S = 0.0001, 0.001


class LinkState(Enum):
    DOWN = "no line"
    DIALLING = "a line is being made"
    UP = "there is a line"
    OVER = "no session is taken any more"


class SendLink:
    """`retire` is asked, without locks, whether a link that has nothing to do may end."""

    def __init__(
        self,
        endpoint: str,
        store: KVStore,
        dialler: Dialler,
        clock: Clock,
        on_event: OnSenderEvent,
        retire: Callable[[SendLink], bool],
    ) -> None:
        self.endpoint = endpoint
        self._store = store
        self._dialler = dialler
        self._clock = clock
        self._on_event = on_event
        self._retire = retire
        self._changed = threading.Condition()
        self._state = LinkState.DOWN
        self._line: Line | None = None
        self._sessions: dict[int, LinkSession] = {}
        self._ready: OrderedDict[LinkSession, None] = OrderedDict()
        self._farewells: deque[Farewell] = deque()
        self._hearing: list[threading.Thread] = []
        self._threads = SendingThreads(self)
        self._threads.start()

    # --- called by any thread -----------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._sessions and self._state is LinkState.DOWN

    def add(self, session: LinkSession) -> bool:
        """False if its grant is being sent here already."""
        with self._changed:
            if session.outbound.grant in self._sessions:
                session.state = State.ENDED
                return False
            self._sessions[session.outbound.grant] = session
            if self._state is not LinkState.UP:  # else its BEGIN can leave with its first piece
                self._queue(session)
            return True

    def push(self, session: LinkSession, layer: int, start: int, count: int, fence: Fence | None = None) -> None:
        after = self._store.fence() if fence is None else fence
        self._change(session, lambda outbound: outbound.push(layer, start, count, after))

    def finish(self, session: LinkSession, tail: bytes) -> None:
        self._change(session, lambda outbound: outbound.finish(tail))

    def abort(self, session: LinkSession, error: TransferError) -> bool:
        """End it without an event. Once this returns, the store is no more read for it. False if it had ended."""
        with self._changed:
            line, ended = session.line, self._end(session)
            if ended and line is not None and line is self._line:
                self._farewells.append((line, session.outbound.grant, error))
                self._changed.notify()
        with session.reading:
            return ended

    def fail(self, session: LinkSession, error: TransferError) -> None:
        """End it with an event, if it had not ended."""
        if self.abort(session, error):
            self._on_event(SendFailed(session.outbound.attempt, error))

    def expire(self) -> float | None:
        """Fail sessions that saw no progress for their lease. Seconds until the next may be due, or None."""
        now_s, stuck = self._clock.now(), False
        late: list[LinkSession] = []
        left_s: list[float] = []
        with self._changed:
            for session in self._sessions.values():
                if session.expires_s is None:
                    if session in self._ready:
                        left_s.append(session.lease_s)
                        self._watch(session, now_s)
                elif session.expires_s <= now_s:
                    late.append(session)
                    stuck |= session.state is not State.FINISHED
                else:
                    left_s.append(session.expires_s - now_s)
        for session in late:
            what = "committed" if session.state is State.FINISHED else "taken"
            whose = f"of attempt {session.outbound.attempt} for {session.lease_s} s"
            self.fail(session, LeaseExpired(f"{self.endpoint} has {what} nothing {whose}"))
        if stuck:
            self.hang_up(TransferError(f"{self.endpoint} does not read"))
        return min(left_s, default=None)

    def hang_up(self, error: TransferError, only: Line | None = None) -> None:
        """Drop the line (if it still is `only`), or give up the dial, and fail the sessions that had begun on it."""
        with self._changed:
            line = self._line
            if only is not None and line is not only:
                return
            if self._state is LinkState.DIALLING:
                self._dialler.give_up()
            elif self._state is LinkState.UP:
                self._state = LinkState.DOWN
            # In one step: a session that begins after this begins on the next line.
            self._line = None
            self._farewells.clear()
            begun = [session for session in self._sessions.values() if session.line is not None]
            for session in begun:
                session.line = None
            self._changed.notify_all()
        if line is not None:
            line.close()
        for session in begun:
            self.fail(session, error)

    def stop(self, reason: str) -> None:
        """Fail all sessions and end. `join` waits for the threads."""
        error = TransferAborted(reason)
        with self._changed:
            dialling = self._state is LinkState.DIALLING
            self._state = LinkState.OVER
            self._changed.notify_all()
        if dialling:
            self._dialler.give_up()
        self.hang_up(error)
        for session in self._all():
            self.fail(session, error)

    def join(self) -> None:
        self._threads.join()
        for thread in self._hearing:
            thread.join()

    @property
    def alive(self) -> bool:
        return self._threads.alive or any(thread.is_alive() for thread in self._hearing)

    # --- called by the sending threads, one at a time (see `sending.Turns`) -------------------------------------------

    @property
    def busy(self) -> bool:
        with self._changed:
            return bool(self._farewells or self._ready)

    def next_turn(self) -> LinkSession | Farewell | None:
        while True:
            with self._changed:
                poll_s = _FENCE_POLL_S
                while self._state is not LinkState.OVER:
                    if self._farewells:
                        return self._farewells.popleft()
                    due, failure = self._first_sendable()
                    if due is not None:
                        break
                    if not self._sessions and self._state is LinkState.DOWN:
                        break
                    self._changed.wait(poll_s if self._ready else None)
                    poll_s = min(2 * poll_s, _FENCE_POLL_MOST_S)
                else:
                    return None
            if due is None:
                if self._retires():
                    return None
            elif failure is not None:
                self.fail(due, failure)
            else:
                return due

    def reach(self) -> Line:
        with self._changed:
            if self._line is not None:
                return self._line
            if self._state is LinkState.OVER or not self._sessions:
                raise TransferAborted("nobody needs the connection any more")
            self._state = LinkState.DIALLING
            self._dialler.prepare()
            waiting = list(self._sessions.values())
        try:
            line = self._dialler.dial()
        except TransferError as error:
            self._not_reached(waiting, error)
            raise
        except Exception as error:  # whoever waited for the line must not wait for it any longer
            self._not_reached(waiting, TransferError(f"cannot reach {self.endpoint}: {error!r}"))
            raise
        with self._changed:
            given_up = self._state is not LinkState.DIALLING
            if not given_up:
                self._state, self._line = LinkState.UP, line
                hearing = threading.Thread(target=hear, args=(line, self), name=f"kv-answers {self.endpoint}", daemon=True)
                self._hearing = [*(thread for thread in self._hearing if thread.is_alive()), hearing]
                hearing.start()
        if given_up:
            line.close()
            raise TransferAborted("nobody needs the connection any more")
        return line

    def pack(self, line: Line, session: LinkSession) -> Parcel | None:
        """The session's next frames: BEGIN if it is new, a piece if one is written, FINISH if that was the last."""
        outbound, seed = session.outbound, line.peer.send_seed
        with self._changed:
            if session.ended or self._line is not line:
                self._queue(session)
                return None
            begin = outbound.take_begin(seed)
            if begin is not None:
                session.state, session.line = State.BEGUN, line
            session.in_flight += 1
        parcel = Parcel([] if begin is None else [begin])
        if not self._add_pieces(parcel, line, session):
            return parcel
        with self._changed:
            if not session.ended:
                finish = outbound.take_finish(seed)
                if finish is not None:
                    session.state = State.FINISHED
                    parcel.tail.append(finish)
                self._queue(session)
        return parcel

    def shipped(self, session: LinkSession) -> None:
        with self._changed:
            session.shipped(self._clock.now())

    def _add_pieces(self, parcel: Parcel, line: Line, session: LinkSession) -> bool:
        """The next piece, if one is written, and where one room may hold several, small ones behind it. False if the session has
        ended, or ends because it cannot be read."""
        outgoing, room, used, readable = line.outgoing, None, 0, True
        while readable and (room is None or (outgoing.in_stream and used < JOINED_BYTES)):
            try:
                with self._changed:
                    region = session.outbound.take_region(None if room is None else room.nbytes - used)
            except Exception as error:  # the device's fault ends this session, not the link's others
                self.fail(session, TransferError(f"the sender's device failed: {error!r}"))
                readable = False
                break
            if region is None:
                break
            size = self._store.layout.region_bytes(region)
            if room is None:
                room = outgoing.room(max(size, JOINED_BYTES) if outgoing.in_stream else size)
            part = room[used : used + size] if outgoing.in_stream else room
            readable = self._read(session, region, part) and self._stamp(parcel, line, session, region, part)
            used += size
        if room is not None and parcel.payload is None:
            with line.wire:  # what was given before goes first
                outgoing.discard(room)
        return readable

    def _stamp(self, parcel: Parcel, line: Line, session: LinkSession, region: Region, data: memoryview) -> bool:
        """Digest a piece and put it into the parcel. False if the session has ended."""
        digest = payload_digest(data, line.peer.send_seed)
        with self._changed:
            if session.ended:
                return False
            if session.started_s is None:
                session.started_s = self._clock.now()
            parcel.add_piece(session.outbound.stamp_region(region, data.nbytes, digest, line.peer.send_seed), data)
            return True

    def _read(self, session: LinkSession, region: Region, out: memoryview) -> bool:
        try:
            with session.reading:
                if session.ended:
                    return False
                read_region(self._store, session.outbound.tables, region, out)
        except Exception as error:  # the store's fault ends this session, not the link's others
            _log.exception("cannot read KV of attempt %s", session.outbound.attempt)
            self.fail(session, TransferError(f"the sender cannot read: {error!r}"))
            return False
        return True

    def _first_sendable(self) -> tuple[LinkSession | None, TransferError | None]:
        """With the lock held: the first session in turn that can send now, or one whose fence fails, with its error."""
        now_s = self._clock.now()
        for session in self._ready:
            try:
                sendable = session.outbound.sendable()
            except Exception as error:  # the device's fault ends this session, not the link's others
                del self._ready[session]
                return session, TransferError(f"the sender's device failed: {error!r}")
            if sendable:
                session.watch(now_s)
                del self._ready[session]
                return session, None
        return None, None

    def _watch(self, session: LinkSession, now_s: float) -> None:
        """With the lock held: a session may wait behind what is stuck, and never be looked at by the sending threads."""
        with suppress(Exception):  # of a fence: the sending threads will meet it too
            if session.outbound.sendable():
                session.watch(now_s)

    def _retires(self) -> bool:
        if not self._retire(self):
            return False
        with self._changed:
            self._state = LinkState.OVER
            self._changed.notify_all()
        return True

    def _not_reached(self, waiting: list[LinkSession], error: TransferError) -> None:
        """Those that waited for the dial fail; those that came during it get one of their own."""
        with self._changed:
            if self._state is LinkState.DIALLING:
                self._state = LinkState.DOWN
        for session in waiting:
            self.fail(session, error)

    # --- called by the thread that hears the answers (see `answers.Hearer`) -------------------------------------------

    def committed(self, line: Line, grant: int, commit: Commit) -> None:
        with self._changed:
            session = self._sessions.get(grant)
            if session is None or session.line is not line:
                return
            right = session.state is State.FINISHED and commit.digest == session.outbound.digest
            if right:
                self._end(session)
        if not right:
            self.fail(session, CorruptTransfer(f"{self.endpoint} has committed something else than was sent"))
            return
        now_s = self._clock.now()
        started_s = session.started_s if session.started_s is not None else now_s
        self._on_event(Delivered(session.outbound.attempt, session.outbound.kv_bytes, now_s - started_s))

    def refused(self, line: Line, grant: int, error: TransferError) -> None:
        with self._changed:
            session = self._sessions.get(grant)
            if session is None or session.line is not line:
                return
            session.line = None  # the peer knows
        self.fail(session, error)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _change(self, session: LinkSession, change: Callable[[Outbound], None]) -> None:
        """Apply a change to a live session; one that cannot be right fails the session."""
        try:
            with self._changed:
                if not session.ended:
                    change(session.outbound)
                    self._queue(session)
        except ValueError as error:
            self.fail(session, TransferError(str(error)))

    def _end(self, session: LinkSession) -> bool:
        """With the lock held. False if it had ended before."""
        if session.ended:
            return False
        session.state = State.ENDED
        session.line = None
        self._sessions.pop(session.outbound.grant, None)
        self._ready.pop(session, None)
        if not self._sessions and self._state is LinkState.DIALLING:
            self._dialler.give_up()  # no lease would watch over its handshake any more
        self._changed.notify()
        return True

    def _queue(self, session: LinkSession) -> None:
        """With the lock held: give it a turn if it has something to send."""
        if not session.ended and session not in self._ready and session.outbound.pending():
            self._ready[session] = None
            self._changed.notify()

    def _all(self) -> list[LinkSession]:
        with self._changed:
            return list(self._sessions.values())

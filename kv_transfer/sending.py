"""The threads that send for one link: they take turns to choose and prepare, and ship in the order in which they prepared.

    thread A    choose, gather, digest, stamp │ ship ─────────────▶ │ choose, ...
    thread B                                  │ choose, gather, ... │ ship ─────────────▶

Whoever holds the turn prepares; it takes the wire before it gives the turn on. So the next piece is gathered while the last one
is on its way, each piece stays with one thread (and its core's cache) from the store to the socket, and nothing is handed over.
Small pieces, and those that the carrier moves without us, are sent sooner by one thread than the other wakes.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from typing import Protocol

from core.errors import TransferError
from kv_transfer.frames import Kind, abort_of, pack_body, pack_frame
from kv_transfer.line import Line, Parcel
from kv_transfer.send_session import LinkSession

_log = logging.getLogger(__name__)

OVERLAP_BYTES = 1 << 18

Farewell = tuple[Line, int, TransferError]  # an end to tell: on which line, of which grant, and why


class Turns(Protocol):
    """What the threads ask of their link. All but `next_turn` and `reach` return at once."""

    endpoint: str

    def next_turn(self) -> LinkSession | Farewell | None:
        """Wait for something to send. None: the link is over."""

    def reach(self) -> Line:
        """The line, dialled if there is none. Raises TransferError; what waited for it has failed then."""

    def pack(self, line: Line, session: LinkSession) -> Parcel | None:
        """Read and stamp the next frames of a session. Raises TransferError if the line breaks."""

    def shipped(self, session: LinkSession) -> None: ...

    def fail(self, session: LinkSession, error: TransferError) -> None: ...

    def hang_up(self, error: TransferError, only: Line | None = None) -> None: ...

    @property
    def busy(self) -> bool:
        """Whether there is something to prepare."""


class SendingThreads:
    """One thread from the start, a second one from when there is first something to prepare while something is shipped."""

    def __init__(self, link: Turns) -> None:
        self._link = link
        self._turn = threading.Lock()
        self._first = self._made()
        self._second: threading.Thread | None = None

    def start(self) -> None:
        self._first.start()

    @property
    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads())

    def join(self) -> None:
        """Returns when all have ended, which they do when the link is over."""
        self._first.join()
        for thread in self._threads():
            thread.join()

    def _threads(self) -> list[threading.Thread]:
        return [self._first] if self._second is None else [self._first, self._second]

    def _made(self) -> threading.Thread:
        return threading.Thread(target=self._run, name=f"kv-sender {self._link.endpoint}", daemon=True)

    def _run(self) -> None:
        while self._take_turn():
            pass

    def _take_turn(self) -> bool:
        """Send what is next. False when the link is over."""
        with ExitStack() as turn:
            turn.enter_context(self._turn)
            due = self._link.next_turn()
            if due is None:
                return False
            session = due if isinstance(due, LinkSession) else None
            line = None
            try:
                line = self._link.reach() if isinstance(due, LinkSession) else due[0]
                parcel = self._link.pack(line, due) if isinstance(due, LinkSession) else _farewell(due)
                if parcel is not None:
                    with line.wire:
                        if parcel.nbytes >= OVERLAP_BYTES and line.outgoing.moves_bytes and self._link.busy:
                            self._let_another(turn)
                        line.ship(parcel)
                    if session is not None:
                        self._link.shipped(session)
            except TransferError as error:
                if line is not None:
                    self._link.hang_up(error, line)
            except Exception as error:  # ends this link's sessions, never the worker
                _log.exception("the link to %s failed", self._link.endpoint)
                failure = TransferError(f"the link to {self._link.endpoint} failed: {error!r}")
                self._link.hang_up(failure, line)
                if session is not None:
                    self._link.fail(session, failure)
        return True

    def _let_another(self, turn: ExitStack) -> None:
        """Give the turn on, though this thread is not done."""
        if self._second is None:
            self._second = self._made()
            self._second.start()
        turn.close()


def _farewell(due: Farewell) -> Parcel:
    line, grant, error = due
    body = pack_body(abort_of(error))
    return Parcel([pack_frame(Kind.ABORT, grant, 0, body, line.peer.send_seed) + body])

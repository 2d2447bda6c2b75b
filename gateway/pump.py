"""The thread that owns the gateway's mailbox: receive, turn tokens into text, hand the event loop one batch per wake-up.

Invariants:
- The loop learns of everything in the order in which it arrived here, through one `call_soon_threadsafe` per wake-up.
- Commands (`open`, `close`, `fence`) that the loop gives before it sends a message take effect before any answer to that
  message is looked at: commands are applied after each receive and before the message received.
- An item counts only if its attempt is open and its sender, by name *and incarnation*, serves that attempt.
- A fault of the thread is told to the loop: a gateway without its pump must not go on.
- After `Fenced` comes back, no event of that attempt follows: what the loop has by then is all there will ever be.

Neighbours: `mail.mailbox` below, `gateway.reader` per generation, `gateway.dispatch` above.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from core.clock import Clock
from core.errors import HetServeError, TransferError
from core.messages import Failed, Heartbeat, Message, Tokens
from gateway.reader import Delta, TokenReader
from mail.mailbox import Mailbox
from router.state import InstanceKey

log = structlog.get_logger()

TICK_S = 0.25
MAX_BATCH = 256


@dataclass(frozen=True, slots=True)
class Progress:
    attempt: str
    delta: Delta


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt is over: a worker said so, or (`worker` None) its stream cannot go on."""

    attempt: str
    worker: InstanceKey | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Fenced:
    attempt: str


Event = Progress | Failure | Fenced | Heartbeat
Deliver = Callable[[list[Event]], None]
OnFault = Callable[[Exception], None]


@dataclass(slots=True)
class _Route:
    reader: TokenReader
    workers: frozenset[InstanceKey]
    gap_since_s: float | None = None


class Pump:
    """Owns `mailbox` from `start` to `stop`. `open`, `close` and `fence` are for the loop's thread.

    A position that is still missing `gap_timeout_s` after a later one came is taken for lost, and with it the attempt.
    `on_fault` is called in the loop, once, with the error that ended the thread.
    """

    def __init__(self, mailbox: Mailbox, deliver: Deliver, clock: Clock, on_fault: OnFault, gap_timeout_s: float = 3.0) -> None:
        self._mailbox = mailbox
        self._deliver = deliver
        self._clock = clock
        self._on_fault = on_fault
        self._gap_timeout_s = gap_timeout_s
        self._commands: deque[Callable[[list[Event]], None]] = deque()
        self._routes: dict[str, _Route] = {}
        self._gaps: set[str] = set()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="gateway-pump", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; the mailbox stays open."""
        self._stopping = True
        if self._thread is not None:
            self._mailbox.wake()
            self._thread.join()

    def open(self, attempt: str, reader: TokenReader, workers: frozenset[InstanceKey]) -> None:
        """From now on take `attempt`'s tokens from `workers`. Call before submitting it."""

        def apply(events: list[Event]) -> None:
            reader.forget_early()
            self._routes[attempt] = _Route(reader, workers)

        self._commands.append(apply)

    def close(self, attempt: str) -> None:
        """Take no more of the attempt."""
        self._commands.append(lambda events: self._drop(attempt))

    def fence(self, attempt: str) -> None:
        """Take no more of the attempt and say when that is so, with a `Fenced`."""

        def apply(events: list[Event]) -> None:
            self._drop(attempt)
            events.append(Fenced(attempt))

        self._commands.append(apply)
        self._mailbox.wake()

    @property
    def open_attempts(self) -> int:
        return len(self._routes)

    def _run(self) -> None:
        try:
            self._receive()
        except Exception as error:  # the thread's boundary: it ends, and whoever depends on it is told
            log.exception("pump ended")
            if self._loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended too
                    self._loop.call_soon_threadsafe(self._on_fault, error)

    def _receive(self) -> None:
        while not self._stopping:
            self._mailbox.wait(TICK_S)
            events: list[Event] = []
            while len(events) < MAX_BATCH:
                message = self._mailbox.receive()
                self._apply(events)
                if message is None:
                    break
                self._handle(message, events)
            if self._gaps:
                self._check_gaps(events)
            if events and self._loop is not None:
                try:
                    self._loop.call_soon_threadsafe(self._deliver, events)
                except RuntimeError:  # the loop is closed: nobody is left to tell
                    return

    def _apply(self, events: list[Event]) -> None:
        while self._commands:
            self._commands.popleft()(events)

    def _handle(self, message: Message, events: list[Event]) -> None:
        if isinstance(message, Tokens):
            worker = (message.worker.name, message.worker.incarnation)
            for item in message.items:
                route = self._routes.get(item.attempt)
                if route is None or worker not in route.workers:
                    continue
                try:
                    delta = route.reader.take(worker, item)
                except Exception as error:  # one item that no tokenizer can show ends its own request, never the pump
                    log.exception("cannot read tokens", attempt=item.attempt)
                    events.append(Failure(item.attempt, None, HetServeError.code, f"cannot decode tokens: {error}"))
                    self._drop(item.attempt)
                    continue
                if delta is not None:
                    events.append(Progress(item.attempt, delta))
                self._note_gap(item.attempt, route)
        elif isinstance(message, Heartbeat):
            events.append(message)
        elif isinstance(message, Failed):
            worker = (message.worker.name, message.worker.incarnation)
            route = self._routes.get(message.attempt)
            if route is not None and worker in route.workers:
                events.append(Failure(message.attempt, worker, message.code, message.message))

    def _note_gap(self, attempt: str, route: _Route) -> None:
        if not route.reader.gap:
            if route.gap_since_s is not None:
                route.gap_since_s = None
                self._gaps.discard(attempt)
        elif route.gap_since_s is None:
            route.gap_since_s = self._clock.now()
            self._gaps.add(attempt)

    def _check_gaps(self, events: list[Event]) -> None:
        now_s = self._clock.now()
        for attempt in list(self._gaps):
            since_s = self._routes[attempt].gap_since_s
            if since_s is not None and now_s - since_s > self._gap_timeout_s:
                self._drop(attempt)
                events.append(Failure(attempt, None, TransferError.code, "tokens were lost on the way from the worker"))

    def _drop(self, attempt: str) -> None:
        self._routes.pop(attempt, None)
        self._gaps.discard(attempt)

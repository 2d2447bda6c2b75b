"""The thread that owns the gateway's mailbox: receive, turn tokens into text, hand the event loop one batch per wake-up.

Invariants:
- The loop learns of everything in the order in which it arrived here, through one `call_soon_threadsafe` per wake-up.
- Commands (`open`, `close`, `fence`) that the loop gives before it sends a message take effect before any answer to that
  message is looked at: commands are applied after each receive and before the message received.
- An item counts only if its attempt is open and its sender, by name *and incarnation*, serves that attempt.
- Whoever serves an open attempt is told several times a lease that it is wanted (`awaited`), over connections that are this
  thread's own.
- A fault of the thread is told to the loop: a gateway without its pump must not go on.
- After `Fenced` comes back, no event of that attempt follows: what the loop has by then is all there will ever be.

Neighbours: `mail` below; `awaited` knows whom to ask for what, a `TokenReader` per generation makes text; `dispatcher` above.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

import structlog

from core.clock import Clock
from core.errors import HetServeError, TransferError
from core.messages import Address, Failed, Heartbeat, Message, TokenItem, Tokens
from gateway.serving.awaited import Awaited, AwaitedAttempts
from gateway.serving.events import Event, Failure, Fenced, Progress
from gateway.text.token_reader import TokenReader
from mail.mailbox import Mailbox
from mail.peers import MessageSender

log = structlog.get_logger()

TICK_S = 0.25
MAX_BATCH = 256


Deliver = Callable[[list[Event]], None]
OnFault = Callable[[Exception], None]


class Pump:
    """Owns `mailbox` and `peers` from `start` to `stop`. `open`, `close` and `fence` are for the loop's thread.

    `on_fault` is called in the loop, once, with the error that ended the thread.
    """

    def __init__(
        self, mailbox: Mailbox, peers: MessageSender, awaited: AwaitedAttempts, deliver: Deliver, clock: Clock, on_fault: OnFault
    ) -> None:
        self._mailbox = mailbox
        self._peers = peers
        self._awaited = awaited
        self._deliver = deliver
        self._clock = clock
        self._on_fault = on_fault
        self._commands: deque[Callable[[list[Event]], None]] = deque()
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

    def open(self, attempt: str, reader: TokenReader, decode: Address, prefill: Address | None) -> None:
        """From now on take `attempt`'s tokens from these, and ask them for what is missing. Call before submitting it."""
        opened_s = self._clock.now()

        def apply(events: list[Event]) -> None:
            reader.forget_early()
            self._awaited.open(attempt, Awaited(reader, decode, prefill, opened_s, reader.next_position))

        self._commands.append(apply)

    def close(self, attempt: str) -> None:
        """Take no more of the attempt."""
        self._commands.append(lambda events: self._awaited.drop(attempt))

    def fence(self, attempt: str) -> None:
        """Take no more of the attempt and say when that is so, with a `Fenced`."""

        def apply(events: list[Event]) -> None:
            self._awaited.drop(attempt)
            events.append(Fenced(attempt))

        self._commands.append(apply)
        self._mailbox.wake()

    @property
    def open_attempts(self) -> int:
        return len(self._awaited)

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
            self._mailbox.wait(min(TICK_S, self._awaited.tick_s))
            events: list[Event] = []
            while len(events) < MAX_BATCH:
                message = self._mailbox.receive()
                self._apply(events)
                if message is None:
                    break
                self._handle(message, events)
            self._watch(events)
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
            for item in message.items:
                self._take(message.worker, item, events)
        elif isinstance(message, Heartbeat):
            events.append(message)
        elif isinstance(message, Failed) and self._awaited.find(message.attempt, message.worker) is not None:
            worker = (message.worker.name, message.worker.incarnation)
            events.append(Failure(message.attempt, worker, message.code, message.message))

    def _take(self, worker: Address, item: TokenItem, events: list[Event]) -> None:
        awaited = self._awaited.find(item.attempt, worker)
        if awaited is None:
            return
        try:
            delta = awaited.reader.take((worker.name, worker.incarnation), item)
        except Exception as error:  # one item that no tokenizer can show ends its own request, never the pump
            log.exception("cannot read tokens", attempt=item.attempt)
            events.append(Failure(item.attempt, None, HetServeError.code, f"cannot decode tokens: {error}"))
            self._awaited.drop(item.attempt)
            return
        if delta is not None:
            events.append(Progress(item.attempt, delta))
        self._awaited.took(item.attempt, delta, self._clock.now())

    def _watch(self, events: list[Event]) -> None:
        """Ask for what is missing; give up what was asked for in vain."""
        now_s = self._clock.now()
        for attempt in self._awaited.lost(now_s):
            self._awaited.drop(attempt)
            events.append(Failure(attempt, None, TransferError.code, "tokens were lost on the way from the worker"))
        for worker, keep in self._awaited.keeps(now_s):
            self._peers.send(worker.mailbox, keep)

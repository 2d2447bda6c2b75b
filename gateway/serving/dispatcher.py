"""Carries out what the life cycle decides: speaks to workers, to the pump, to clients' inboxes.

    pump ──events──▶ LifeCycle ──actions──▶ workers (Submit, Cancel), pump (open, fence, close), inboxes (deltas, errors)

Runs in the event loop's thread; never blocks. All that is decided is decided in `gateway.serving.lifecycle`; here is what that
must not know: sockets, the clock, logs, metrics, and where a generation's text goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from core.clock import Clock
from core.errors import HetServeError, ProtocolError, Unavailable
from core.messages import Address, Cancel, Heartbeat
from core.request import Request
from gateway.serving.actions import Action, Close, Deliver, End, Fence, Launch, Stop
from gateway.serving.events import Event
from gateway.serving.generation import Attempt, Generation, submits
from gateway.serving.inbox import Inbox
from gateway.serving.journal import Journal
from gateway.serving.lifecycle import LifeCycle
from gateway.serving.metrics import Metrics
from gateway.serving.pump import Pump
from gateway.text.token_reader import TextOptions, TokenReader
from mail.peers import MessageSender
from router.state import InstanceKey, Snapshot

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Stream:
    """Where a generation's tokens become text, and where that goes."""

    reader: TokenReader
    inbox: Inbox
    index: int


class Dispatcher:
    """Serves generations through workers.

    Args:
        address: this gateway's mailbox, told to workers with every `Submit`.
        peers: connections to workers, owned by the loop's thread.
    """

    def __init__(
        self, *, address: Address, peers: MessageSender, pump: Pump, life: LifeCycle, metrics: Metrics, clock: Clock
    ) -> None:
        self._address = address
        self._peers = peers
        self._pump = pump
        self._life = life
        self._metrics = metrics
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self.draining = False

    # --- for the HTTP side

    @property
    def in_flight(self) -> int:
        return len(self._life)

    @property
    def max_concurrent(self) -> int:
        """More generations than these are never in flight at once."""
        return self._life.max_concurrent

    @property
    def journal(self) -> Journal:
        return self._life.journal

    def snapshot(self) -> Snapshot:
        return self._life.cluster.snapshot()

    def admit(self, generations: int) -> None:
        """Raises Unavailable while draining, Overloaded when the gateway itself is full."""
        if self.draining:
            raise Unavailable("the gateway is draining")
        self._life.admit(generations)

    def start(self, request: Request, options: TextOptions, inbox: Inbox, index: int) -> Generation:
        """Begin a generation whose deltas go to `inbox` under `index`.

        Raises:
            Overloaded, Unavailable: it is refused now.
        """
        stream = _Stream(TokenReader(request.prompt, options), inbox, index)
        generation, actions = self._life.arrive(request, self._clock.now())
        self._streams[request.request_id] = stream
        self._metrics.accepted()
        self._carry_out(actions)
        return generation

    def close(self, generation: Generation) -> None:
        """The client no longer wants it. Closing one that has ended does nothing."""
        self._carry_out(self._life.cancel(generation, self._clock.now()))

    def close_all(self, error: HetServeError) -> None:
        self._carry_out(self._life.close(error, self._clock.now()))

    # --- events

    def deliver(self, events: Iterable[Event]) -> None:
        """Take in what the pump received, in order."""
        for event in events:
            try:
                self._carry_out(self._life.take(event, self._clock.now()))
            except ProtocolError as error:
                log.warning("message refused", kind=type(event).__name__, reason=str(error))
            except Exception:  # a bug met in one event must not lose the events of other requests behind it
                log.exception("cannot handle event", kind=type(event).__name__)
                self._fail(None if isinstance(event, Heartbeat) else self._life.serving(event.attempt))

    def sweep(self) -> None:
        """Time has passed. Call several times a second."""
        self._carry_out(self._life.tick(self._clock.now()))

    def was_deaf(self, seconds: float) -> None:
        """This process was stopped, or its loop was held up, for so long, up to now: what workers said meanwhile is still to be
        heard. To be called before `sweep`."""
        self._life.cluster.was_deaf(seconds, self._clock.now())

    def worker_lost(self, key: InstanceKey) -> None:
        """Somebody who knows says that this incarnation is gone for good."""
        self._carry_out(self._life.lose(key, self._clock.now()))

    def invariants(self) -> dict[str, int]:
        """Counts that must all be back at rest once nothing runs."""
        return {**self._life.invariants(), "streams": len(self._streams), "pump_attempts": self._pump.open_attempts}

    # --- actions

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            try:
                self._do(action)
            except Exception:  # a bug met for one generation ends that one: the actions of others stand behind it
                log.exception("cannot carry out", kind=type(action).__name__)
                if isinstance(action, Launch | Deliver | End):
                    self._fail(action.generation.generation_id)
                else:
                    self._fail(self._life.serving(action.attempt.attempt_id))

    def _do(self, action: Action) -> None:
        match action:
            case Deliver(generation, delta, gap_s):
                stream = self._streams[generation.generation_id]
                if delta.tokens:
                    self._metrics.tokens(generation.entry, len(delta.tokens), gap_s)
                stream.inbox.put(stream.index, delta)
            case Launch(generation, attempt):
                self._launch(generation, attempt)
            case Stop(attempt):
                for worker in attempt.workers:
                    self._peers.send(worker.mailbox, Cancel(attempt=attempt.attempt_id))
            case Fence(attempt, error):
                self._pump.fence(attempt.attempt_id)
                self._metrics.retried(error.code)
                log.info("attempt failed", attempt=attempt.attempt_id, code=error.code, reason=str(error))
            case Close(attempt):
                self._pump.close(attempt.attempt_id)
            case End(generation, error):
                self._end(generation, error)

    def _launch(self, generation: Generation, attempt: Attempt) -> None:
        assignment = attempt.assignment
        prefill = None if assignment.prefill is None else assignment.prefill.address
        reader = self._streams[generation.generation_id].reader
        self._pump.open(attempt.attempt_id, reader, assignment.decode.address, prefill)
        now_s = self._clock.now()
        for worker, submit in submits(generation, attempt, self._address, now_s):
            if not self._peers.send(worker.mailbox, submit):
                key = (worker.name, worker.incarnation)
                self._carry_out(self._life.unreachable(attempt.attempt_id, key, now_s))
                return

    def _end(self, generation: Generation, error: HetServeError | None) -> None:
        stream = self._streams.pop(generation.generation_id)
        if error is not None:
            if error.__cause__ is not None:
                log.error("request failed", request=generation.generation_id, exc_info=error.__cause__)
            stream.inbox.fail(error)
        self._metrics.ended(generation.entry)

    def _fail(self, generation_id: str | None) -> None:
        """Tell the client, also where the life cycle has ended the generation already and its `End` is still to come."""
        if generation_id is None:
            return
        error = HetServeError("the gateway failed to handle the answer of a worker")
        if generation_id in self._streams:
            self._streams[generation_id].inbox.fail(error)
        self._carry_out(self._life.fail(generation_id, error, self._clock.now()))

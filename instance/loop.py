"""The one thread that owns an engine: read the mail, take transfer events in, step, send.

    mail ─▶ handlers ─▶ transfer events ─▶ grants ─▶ engine step ─▶ outbox ─▶ (again)

Nothing else touches the engine or the workers, so none of them needs a lock. Other threads reach it by `post` (transfer
events) and by the mailbox. After each layer of a step the loop looks at the mail too: a grant that arrives while its prompt
computes opens the session at once, and renewals go out and come in, so that a step longer than a lease costs nobody one.
All other mail waits for the end of the step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import msgspec
import structlog

from core.clock import Clock
from core.errors import EngineFault, HetServeError, InvalidRequest, Unavailable
from core.messages import Abandon, Cancel, Grant, Load, Message, Renew, Revoke, Submit
from decode.worker import DecodeWorker
from engine.decision import Part
from engine.engine import Engine
from engine.sequence import NewToken, Sequence
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from mail.mailbox import Mailbox
from mail.outbox import Outbox
from prefill.worker import PrefillWorker

TransferEvent = Received | Broken | Delivered | SendFailed

IDLE_WAIT_S = 0.05
TICK_S = 0.05
MOST_BACKLOG = 10_000
"""Messages put off during a step; past that they wait in the mailbox."""
LOST_STEPS = 3
"""Steps in a row that failed whole before the loop asks whether the device is still there."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Progress:
    """What other threads may know of the loop: a snapshot, replaced whole."""

    load: Load
    published_s: float
    attempts: int

    @property
    def drained(self) -> bool:
        """No attempt is here, and none will be taken: the loop has seen that it is to drain."""
        return self.load.draining and self.attempts == 0

    def load_at(self, now_s: float) -> Load:
        """The load, with how long ago the loop last came round."""
        return msgspec.structs.replace(self.load, step_age_s=now_s - self.published_s)


class EngineLoop:
    """Runs on the thread that calls `run`, until `stop`. An instance has a prefill worker, a decode worker, or both."""

    def __init__(
        self,
        engine: Engine,
        mailbox: Mailbox,
        outbox: Outbox,
        prefill: PrefillWorker | None,
        decode: DecodeWorker | None,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._mailbox = mailbox
        self._outbox = outbox
        self._prefill = prefill
        self._decode = decode
        self._clock = clock
        self._events: SimpleQueue[TransferEvent] = SimpleQueue()
        self._backlog: deque[Message] = deque()
        self._lost_steps = 0
        self._stopping = False
        self._draining = False
        self._idle = True
        self._ticked_s = clock.now()
        self.progress = Progress(Load(), clock.now(), 0)

    # --- from any thread ----------------------------------------------------------------------------------------------

    def post(self, event: TransferEvent) -> None:
        """Hand in a transfer event."""
        self._events.put(event)
        self._mailbox.wake()

    def drain(self) -> None:
        """Refuse new attempts from now on; those here go on."""
        self._draining = True

    def stop(self) -> None:
        """End `run` after the step it is in."""
        self._stopping = True
        self._mailbox.wake()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self._stopping:
            self._turn()

    def _turn(self) -> None:
        if self._idle and self._events.empty() and not self._backlog:
            self._mailbox.wait(IDLE_WAIT_S)
        while self._backlog:
            self._handle(self._backlog.popleft())
        while (message := self._mailbox.receive()) is not None:
            self._handle(message)
        self._take_events()
        self._tick()
        if self._decode is not None:
            self._decode.grant_waiting()
        self._idle = not self._step()
        self._outbox.flush()
        self._publish()

    def _step(self) -> bool:
        """One engine step. False if there was nothing to compute: no work, or all blocks are kept for transfers, so that
        only mail or a transfer event can change anything."""
        if not self._engine.has_work:
            return False
        output = self._engine.step(self._layer_written)
        for token in output.tokens:
            self._drawn(token)
        for sequence, error in output.failed:
            self._failed(sequence, error)
        if self._prefill is not None:
            self._prefill.stepped()
        if output.parts:
            self._notice_loss(output.failed_whole)
        return bool(output.parts)

    def _notice_loss(self, failed_whole: bool) -> None:
        """End the loop, and with it the instance, when steps fail because the device does. A request that breaks its steps
        ends by itself, and is no reason."""
        self._lost_steps = self._lost_steps + 1 if failed_whole else 0
        if self._lost_steps >= LOST_STEPS:
            self._lost_steps = 0
            if not self._engine.responds():
                raise EngineFault(f"{LOST_STEPS} steps in a row failed, and so did one token by itself")

    def _layer_written(self, parts: tuple[Part, ...], layer: int) -> None:
        while len(self._backlog) < MOST_BACKLOG and (message := self._mailbox.receive()) is not None:
            match message:
                case Grant() if self._prefill is not None:
                    self._prefill.granted(message, stepping=True)
                case Renew():
                    self._renewed(message)
                case _:
                    self._backlog.append(message)
        if self._prefill is not None:
            self._prefill.layer_written(parts, layer)
            self._prefill.renew()
        if self._decode is not None:
            self._decode.renew()

    def _drawn(self, token: NewToken) -> None:
        if self._prefill is not None and token.sequence.hold:
            self._prefill.drawn(token)
        elif self._decode is not None:
            self._decode.drawn(token)

    def _failed(self, sequence: Sequence, error: HetServeError) -> None:
        log.warning("attempt failed in the engine", attempt=sequence.sequence_id, code=error.code, error=str(error))
        if self._prefill is not None and sequence.hold:
            self._prefill.failed(sequence, error)
        elif self._decode is not None:
            self._decode.failed(sequence, error)

    def _handle(self, message: Message) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                if self._prefill is not None:
                    self._prefill.cancel(message.attempt)
                if self._decode is not None:
                    self._decode.cancel(message.attempt)
            case Renew():
                self._renewed(message)
            case Grant() if self._prefill is not None:
                self._prefill.granted(message)
            case Revoke() if self._prefill is not None:
                self._prefill.cancel(message.attempt)
            case Abandon() if self._decode is not None:
                self._decode.abandoned(message.attempt)
            case _:
                log.warning("message for another kind of process", kind=type(message).__name__)

    def _renewed(self, renew: Renew) -> None:
        if self._prefill is not None:
            self._prefill.renewed(renew)
        if self._decode is not None:
            self._decode.renewed(renew)

    def _submit(self, submit: Submit) -> None:
        if self._draining:
            self._outbox.failed(submit.gateway, submit.attempt, Unavailable("the instance is draining"))
        elif submit.stage == "prefill" and self._prefill is not None:
            self._prefill.submit(submit)
        elif submit.stage in ("decode", "local") and self._decode is not None:
            self._decode.submit(submit)
        else:
            error = InvalidRequest(f"this instance has no {submit.stage!r} stage", "stage")
            self._outbox.failed(submit.gateway, submit.attempt, error)

    def _take_events(self) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                return
            match event:
                case Delivered() if self._prefill is not None:
                    self._prefill.delivered(event)
                case SendFailed() if self._prefill is not None:
                    self._prefill.send_failed(event)
                case Received() if self._decode is not None:
                    self._decode.received(event)
                case Broken() if self._decode is not None:
                    self._decode.broken(event)

    def _tick(self) -> None:
        now_s = self._clock.now()
        if now_s - self._ticked_s < TICK_S:
            return
        self._ticked_s = now_s
        if self._prefill is not None:
            self._prefill.tick()
        if self._decode is not None:
            self._decode.tick()

    def _publish(self) -> None:
        load = self._engine.load()
        queued, queued_tokens = (self._decode.queued, self._decode.queued_tokens) if self._decode else (0, 0)
        attempts = sum(worker.attempts for worker in (self._prefill, self._decode) if worker is not None)
        self.progress = Progress(
            Load(
                waiting=load.waiting + queued,
                waiting_tokens=load.waiting_tokens + queued_tokens,
                running=load.running,
                context_tokens=load.context_tokens,
                free_blocks=load.free_blocks,
                held_blocks=load.held_blocks,
                steps=load.steps,
                draining=self._draining,
            ),
            self._clock.now(),
            attempts,
        )

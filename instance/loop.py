"""The one thread that owns an engine, its attempts and its mail. It decides and sends; it never waits for the device.

    turn:  mail ─▶ KV just written ─▶ transfer events ─▶ steps that are done ─▶ launch ─▶ admissions ─▶ leases ─▶ send

Nothing else touches the engine or the workers, so none of them needs a lock. Other threads reach the loop by `post` (transfer
events), by the mailbox, and, from inside a step, by the layers that it has written. `turn` does what can be done now and says
how long there will be nothing to do, so that a test or a simulator can drive it in virtual time; `run` waits in between.

Invariants:
- Steps compute on the device's thread (`engine.device`). Mail, leases and transfers go on during one, however long it takes.
- Mail has a budget of time in each turn: a flood of it delays itself, and neither steps nor leases.
- What goes wrong in the handling of one attempt ends that attempt, with `EngineFault`, and nothing else.
- A fence is taken by the thread that enqueued the writes before it, and what lies before it is pushed by the loop's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

import structlog

from core.attempts import Half
from core.clock import Clock
from core.config import Role
from core.errors import EngineFault, HetServeError, InvalidRequest, Unavailable
from core.messages import Cancel, Grant, Keep, Load, Message, Renew, Submit, Withdrawn
from decode.worker import DecodeWorker
from engine.admission import AdmissionKind
from engine.decision import Part
from engine.engine import Engine
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.store import Fence
from mail.attempt_book import AttemptBook
from prefill.worker import PrefillWorker

TransferEvent = Received | Broken | Delivered | SendFailed

TICK_S = 0.05
MAIL_BUDGET_S = 0.005
"""For mail in one turn, unless one message takes longer by itself."""
LOST_STEPS = 3
"""Steps in a row that failed whole before the loop asks whether the device is still there."""

SERVED = {Role.PREFILL: {Half.PREFILL}, Role.DECODE: {Half.DECODE, Half.WHOLE}, Role.MIXED: set(Half)}

log = structlog.get_logger()


class MessageSource(Protocol):
    """What a mailbox is to the loop."""

    def receive(self) -> Message | None: ...

    def wait(self, timeout_s: float) -> None: ...

    def wake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What other threads may know of the loop: a snapshot, replaced whole."""

    published_s: float
    attempts: int
    role: Role
    draining: bool

    @property
    def drained(self) -> bool:
        """No attempt is here, and none will be taken: the loop has seen that it is to drain."""
        return self.draining and self.attempts == 0


class EngineLoop:
    """Runs on the thread that calls `run`, until `stop`, or wherever `turn` is called.

    `fence` is that of the store that the engine writes; it is called on the device's thread.
    """

    def __init__(
        self,
        engine: Engine,
        mailbox: MessageSource,
        book: AttemptBook,
        prefill: PrefillWorker,
        decode: DecodeWorker,
        role: Role,
        clock: Clock,
        fence: Callable[[], Fence | None],
    ) -> None:
        self._engine = engine
        self._mailbox = mailbox
        self._book = book
        self._prefill = prefill
        self._decode = decode
        self._role = role
        self._clock = clock
        self._fence = fence
        self._events: SimpleQueue[TransferEvent] = SimpleQueue()
        self._layers: SimpleQueue[tuple[int, tuple[Part, ...], int, Fence | None]] = SimpleQueue()
        self._launches = 0
        self._lost_steps = 0
        self._stopping = False
        self._draining = False
        self._ticked_s = self._life_s = clock.now()
        self.progress = Progress(clock.now(), 0, role, False)

    # --- from any thread ----------------------------------------------------------------------------------------------

    def post(self, event: TransferEvent) -> None:
        """Hand in a transfer event."""
        self._events.put(event)
        self._mailbox.wake()

    def drain(self, draining: bool = True) -> None:
        """Refuse new attempts from now on; those here go on. With False, take them again."""
        self._draining = draining
        self._mailbox.wake()

    def set_role(self, role: Role) -> None:
        """Take new attempts of this role only; those of another that are here go on."""
        self._role = role
        self._mailbox.wake()

    def stop(self) -> None:
        """End `run` after the turn it is in."""
        self._stopping = True
        self._mailbox.wake()

    def load(self) -> Load:
        """How busy it is, and whether it hangs, as of now."""
        engine, progress, now_s = self._engine.load(), self.progress, self._clock.now()
        return Load(
            waiting=engine.waiting + self._decode.waiting,
            waiting_tokens=engine.waiting_tokens + self._decode.waiting_tokens,
            running=engine.running,
            context_tokens=engine.context_tokens,
            free_blocks=engine.free_blocks,
            held_blocks=engine.held_blocks,
            steps=engine.steps,
            step_age_s=max(0.0, now_s - progress.published_s),
            draining=progress.draining,
            newest_ticket=self._book.newest_ticket,
            stalled_s=self.stalled_s,
        )

    @property
    def stalled_s(self) -> float:
        """How long there has been no sign of life: no turn with nothing under way, no layer and no end of a step."""
        return max(0.0, self._clock.now() - self._life_s)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self._stopping:
            rest_s = self.turn()
            if rest_s > 0:
                self._mailbox.wait(rest_s)

    def turn(self) -> float:
        """Do all that can be done now. Returns how long, in seconds, there will be nothing to do unless somebody calls `wake`
        on the mailbox, or puts something in it."""
        more = self._take_mail()
        self._take_layers()
        self._take_events()
        self._collect()
        self._launch()
        self._tick()
        self._book.flush()
        now_s = self._clock.now()
        if not self._busy():
            self._life_s = now_s
        self.progress = Progress(now_s, len(self._book), self._role, self._draining)
        if more or self._engine.ready or not (self._events.empty() and self._layers.empty()):
            return 0.0
        return max(0.0, self._ticked_s + TICK_S - now_s)

    # --- mail ---------------------------------------------------------------------------------------------------------

    def _take_mail(self) -> bool:
        """Handle messages until there are none, or the time for them is over. Whether there may be more."""
        until_s = self._clock.now() + MAIL_BUDGET_S
        while (message := self._mailbox.receive()) is not None:
            self._handle(message)
            if self._clock.now() >= until_s:
                return True
        return False

    def _handle(self, message: Message) -> None:
        match message:
            case Submit():
                self._guard(message.attempt, self._submit, message)
            case Cancel():
                self._guard(message.attempt, self._book.cancel, message.attempt)
            case Keep():
                for wanted in message.wanted:
                    self._guard(wanted.attempt, self._book.wanted, message.gateway, wanted)
            case Renew():
                for state in message.states:
                    self._guard(state.attempt, self._book.renewed, message.worker, message.number, state)
            case Grant():
                self._guard(message.attempt, self._prefill.granted, message)
            case Withdrawn():
                self._guard(message.attempt, self._book.withdrawn, message)
            case _:
                log.warning("message for another kind of process", kind=type(message).__name__)

    def _submit(self, submit: Submit) -> None:
        if not self._book.is_new(submit):
            return
        error = self._refusal(submit)
        if error is not None:
            self._book.refuse(submit, error)
            return
        try:
            worker = self._prefill if submit.stage == Half.PREFILL.value else self._decode
            worker.submit(submit)
        except Exception as fault:  # the boundary of an attempt: nobody would hear of it otherwise
            log.exception("cannot begin", attempt=submit.attempt)
            self._engine.cancel(submit.attempt)
            self._book.refuse(submit, EngineFault(f"cannot begin: {type(fault).__name__}: {fault}"))
            return
        self._book.catch_up(submit.attempt)

    def _refusal(self, submit: Submit) -> HetServeError | None:
        try:
            half = Half(submit.stage)
        except ValueError:
            return InvalidRequest(f"Got stage {submit.stage!r} but expected one of {[half.value for half in Half]}", "stage")
        if self._draining:
            return Unavailable("the instance is draining")
        if half not in SERVED[self._role]:
            return Unavailable(f"the instance now serves as {self._role.value} and takes no {half.value} work")
        return None

    # --- transfers ----------------------------------------------------------------------------------------------------

    def _layer_written(self, launch: int, parts: tuple[Part, ...], layer: int) -> None:
        """On the device's thread."""
        self._life_s = self._clock.now()
        if parts:
            self._layers.put((launch, parts, layer, self._fence()))
            self._mailbox.wake()

    def _take_layers(self) -> None:
        while True:
            try:
                launch, parts, layer, fence = self._layers.get_nowait()
            except Empty:
                return
            for part in parts:
                self._guard(part.sequence.sequence_id, self._prefill.layer_written, launch, part, layer, fence)

    def _take_events(self) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                return
            match event:
                case Delivered():
                    self._guard(event.attempt, self._prefill.delivered, event)
                case SendFailed():
                    self._guard(event.attempt, self._prefill.send_failed, event)
                case Received():
                    self._guard(event.attempt, self._decode.received, event)
                case Broken():
                    self._guard(event.attempt, self._decode.broken, event)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Take in the steps that the device has done."""
        while self._engine.ready:
            output = self._engine.collect()
            self._life_s = self._clock.now()
            self._take_layers()  # all of this step's: its prompts can be handed over
            for token in output.tokens:
                worker = self._prefill if token.sequence.hold else self._decode
                self._guard(token.sequence.sequence_id, worker.drawn, token)
            for sequence, error in output.failed:
                log.warning("attempt failed in the engine", attempt=sequence.sequence_id, code=error.code, error=str(error))
                worker = self._prefill if sequence.hold else self._decode
                self._guard(sequence.sequence_id, worker.failed, sequence, error)
            self._notice_loss(output.failed_whole)

    def _launch(self) -> None:
        """Give the device as many steps as it takes."""
        while self._engine.launch(partial(self._layer_written, self._launches + 1)):
            self._launches += 1
            self._take_admissions()
        self._take_admissions()

    def _take_admissions(self) -> None:
        for admission in self._engine.admissions():
            name = admission.sequence.sequence_id
            match admission.kind:
                case AdmissionKind.ADMITTED:
                    self._guard(name, self._prefill.admitted, name)
                case AdmissionKind.TAKEN_BACK:
                    self._guard(name, self._prefill.taken_back, name, self._launches)
                case AdmissionKind.GRANTED:
                    self._guard(name, self._decode.granted, name)

    def _notice_loss(self, failed_whole: bool) -> None:
        """End the loop, and with it the instance, when steps fail because the device does. A request that breaks its steps
        ends by itself, and is no reason."""
        self._lost_steps = self._lost_steps + 1 if failed_whole else 0
        if self._lost_steps >= LOST_STEPS:
            self._lost_steps = 0
            if not self._engine.responds():
                raise EngineFault(f"{LOST_STEPS} steps in a row failed, and so did one token by itself")

    def _busy(self) -> bool:
        """Whether something here should go on by itself: a step, or work that waits for nobody else. A queue behind blocks that
        transfers keep waits for peers, whose leases end that."""
        if self._engine.in_flight:
            return True
        load = self._engine.load()
        return load.running > 0 or (load.waiting > 0 and load.held_blocks == 0)

    # --- the rest -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now_s = self._clock.now()
        if now_s - self._ticked_s < TICK_S:
            return
        self._ticked_s = now_s
        for attempt, error in self._book.overdue():
            self._guard(attempt.name, self._book.fail, attempt, error)
        self._book.tick()

    def _guard(self, attempt: str, handle: Callable[..., object], *args: object) -> None:
        try:
            handle(*args)
        except Exception as error:  # the boundary of an attempt: it ends, and the instance lives on
            log.exception("a handler failed", attempt=attempt)
            self._end_faulty(attempt, error)

    def _end_faulty(self, attempt: str, error: Exception) -> None:
        try:
            self._book.fault(attempt, error)
        except Exception:  # not even that: what it still holds ends with the leases of others
            log.exception("cannot end an attempt cleanly", attempt=attempt)

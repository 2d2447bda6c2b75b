"""The prefill role: read prompts, draw first tokens, push KV to the decode side.

    waiting ──▶ admitted ──▶ granted ──▶ delivered            (phases: `core.attempts`)
       ▲           │            └── session open: layers go out while later ones compute
       └─taken back┘

The decode side is asked for room once the prompt has blocks here. Its grant may come before, during or after the computation;
the session opens when it comes, beginning with all that is written by then. Until then the KV waits here, which is the
back-pressure of a full decode side; meanwhile an older claim may take the blocks back, and the prompt waits again.

Invariants:
- A block is never freed while a session may read it: the session is aborted or delivered first. What a sliding window leaves
  behind while the prompt is read is freed, and no session wants it.
- What is pushed was written before the fence that goes with it.
- A grant counts only from the attempt's own decode instance, and only for the admission that asked for it.

Neighbours: `engine` computes, `kv_transfer.sessions` moves bytes, `mail.attempt_book` keeps leases and tells who must know;
`instance.loop` calls in here. All methods run on its thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import structlog

from core.attempts import Effect, Ending, Half, Phase
from core.clock import Clock
from core.errors import HetServeError, InvalidRequest
from core.messages import Grant, Handoff, ServedBy, Submit, TokenItem, TokenLogprobs
from core.tokens import unpack_tokens
from engine.decision import Part
from engine.engine import Engine
from engine.sequence import NewToken, Sequence
from kv_transfer.events import Delivered, SendFailed
from kv_transfer.sessions import Sender, SendSession
from kv_transfer.store import Fence
from kv_transfer.terms import Terms
from mail.attempt_book import Attempt, AttemptBook

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class Reading:
    """One prompt being read here for one decode instance.

    Attributes:
        written: for each layer, how many tokens have their KV in the cache, with all that comes before them.
        fence: after the newest of these writes.
        void: what was launched up to here may write blocks that it has lost.
        asked: number of the first `Renew` that says that the prompt has blocks.
        first: what was drawn, once the prompt is read.
        told: whether the gateway was told of it. It is read, and drawn, once more after the blocks were lost.
    """

    attempt: Attempt
    sequence: Sequence
    written: list[int]
    fence: Fence | None = None
    void: int = 0
    asked: int = 0
    session: SendSession | None = None
    first: NewToken | None = None
    told: bool = False


class PrefillWorker:
    """Serves `Submit(stage="prefill")` on one engine."""

    def __init__(self, engine: Engine, sender: Sender, book: AttemptBook, clock: Clock) -> None:
        self._engine = engine
        self._sender = sender
        self._book = book
        self._clock = clock
        self._readings: dict[str, Reading] = {}

    # --- messages -----------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        if submit.peer is None:
            self._book.refuse(submit, InvalidRequest(f"attempt {submit.attempt} names no decode instance"))
            return
        try:
            sequence = Sequence(
                sequence_id=submit.attempt,
                tokens=unpack_tokens(submit.tokens),
                prompt_tokens=submit.prompt_tokens,
                sampling=submit.sampling,
                salt=submit.salt,
                hold=True,
                ticket=submit.ticket,
                arrived_s=self._clock.now(),
            )
            self._engine.add(sequence)
        except (HetServeError, ValueError) as error:
            self._book.refuse(submit, error if isinstance(error, HetServeError) else InvalidRequest(str(error)))
            return
        attempt = self._book.open(submit, Half.PREFILL, self)
        self._readings[submit.attempt] = Reading(attempt, sequence, [0] * len(self._engine.layout.layers))

    def granted(self, grant: Grant) -> None:
        """Room on the decode side. Nothing changes if the grant comes again, from somebody else, or for a prompt that has lost
        its blocks since: the decode side hears of that."""
        reading = self._readings.get(grant.attempt)
        if reading is None or grant.decode != reading.attempt.submit.peer:
            log.info("grant for nothing here", attempt=grant.attempt, decode=grant.decode.name)
            return
        life = reading.attempt.life
        if life.phase is not Phase.ADMITTED or grant.answers < reading.asked or not self._engine.pin(grant.attempt):
            return
        life.move(Phase.GRANTED)
        life.alive(self._clock.now())
        self._open_session(reading, grant)

    def answer(self, attempt: Attempt, effect: Effect) -> None:
        if effect is Effect.RELEASE:
            self._book.end(attempt, Ending.DELIVERED, "committed by the decode side")

    # --- the engine ---------------------------------------------------------------------------------------------------

    def admitted(self, sequence_id: str) -> None:
        """The prompt has blocks: ask the decode side for room."""
        reading = self._readings.get(sequence_id)
        if reading is not None:
            reading.attempt.life.move(Phase.ADMITTED)
            reading.asked = self._book.next_number
            self._book.say(reading.attempt)

    def taken_back(self, sequence_id: str, launch: int) -> None:
        """An older claim has its blocks: it waits again, and the decode side need keep no room. Steps up to `launch` may still
        write the blocks that it had."""
        reading = self._readings.get(sequence_id)
        if reading is not None:
            reading.attempt.life.move(Phase.WAITING)
            reading.written = [0] * len(reading.written)
            reading.void, reading.fence, reading.first = launch, None, None
            self._book.say(reading.attempt)

    def layer_written(self, launch: int, part: Part, layer: int, fence: Fence | None) -> None:
        """A step under way, the `launch`-th, has written one layer of a part of a prompt: push it while later layers compute."""
        reading = self._readings.get(part.sequence.sequence_id)
        if reading is None or reading.sequence is not part.sequence or launch <= reading.void:
            return
        # What the prefix cache supplied was written by earlier steps, so it too lies before this fence.
        start, stop = reading.written[layer], part.start + part.count
        if stop > start:
            reading.written[layer], reading.fence = stop, fence
            if reading.session is not None:
                reading.session.push(layer, start, stop - start, fence)

    def drawn(self, token: NewToken) -> None:
        """The prompt is read: give the first token to the gateway, and the rest of the KV to the decode side."""
        reading = self._readings.get(token.sequence.sequence_id)
        if reading is None:
            return
        reading.first = token
        if not reading.told:
            reading.told = True
            self._book.tokens(reading.attempt, _first_item(token))
        if token.finish is not None:
            self._book.end(reading.attempt, Ending.FINISHED, "finished with its first token")
        elif reading.session is not None:
            self._finish_session(reading, reading.session, token)

    def failed(self, sequence: Sequence, error: HetServeError) -> None:
        """The engine gave the sequence up."""
        reading = self._readings.get(sequence.sequence_id)
        if reading is not None:
            self._book.fail(reading.attempt, error)

    # --- the transfer -------------------------------------------------------------------------------------------------

    def delivered(self, event: Delivered) -> None:
        reading = self._readings.get(event.attempt)
        if reading is not None:
            self._book.end(reading.attempt, Ending.DELIVERED, "delivered")

    def send_failed(self, event: SendFailed) -> None:
        reading = self._readings.get(event.attempt)
        if reading is not None:
            self._book.fail(reading.attempt, event.error)

    def free(self, attempt: Attempt, reason: str) -> None:
        reading = self._readings.pop(attempt.name, None)
        try:
            if reading is not None and reading.session is not None:
                reading.session.abort(reason)
        finally:
            self._engine.cancel(attempt.name)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _open_session(self, reading: Reading, grant: Grant) -> None:
        """Start pushing, beginning with all that is written already. What is wrong with the grant's terms is an event."""
        terms = Terms(
            grant=grant.grant,
            attempt=reading.attempt.name,
            first_token=grant.first_token,
            num_tokens=_prefilled_tokens(reading),
            lease_s=grant.lease_s,
            windowed=grant.windowed,
        )
        session = reading.session = self._sender.begin(terms, grant.endpoints, reading.sequence.tables, grant.decode.incarnation)
        for layer, written in enumerate(reading.written):
            if written > 0:
                session.push(layer, 0, written, reading.fence)
        if reading.first is not None:
            self._finish_session(reading, session, reading.first)

    def _finish_session(self, reading: Reading, session: SendSession, first: NewToken) -> None:
        handoff = Handoff(token=first.token, position=first.position, tokens=_prefilled_tokens(reading))
        session.finish(msgspec.msgpack.encode(handoff))


def _prefilled_tokens(reading: Reading) -> int:
    """Tokens whose KV the decode side needs: all but the one drawn here."""
    return len(reading.attempt.submit.tokens) // 4


def _first_item(token: NewToken) -> TokenItem:
    sequence = token.sequence
    started_s = sequence.started_s if sequence.started_s is not None else sequence.arrived_s
    first_token_s = sequence.first_token_s if sequence.first_token_s is not None else started_s
    return TokenItem(
        attempt=sequence.sequence_id,
        position=token.position,
        tokens=(token.token,),
        logprobs=() if token.logprobs is None else (TokenLogprobs(token.logprobs.logprob, token.logprobs.top),),
        finish=token.finish,
        stop_token=token.stop_token,
        served=ServedBy(
            queue_s=started_s - sequence.arrived_s,
            compute_s=first_token_s - started_s,
            cached_tokens=sequence.cached_tokens,
        ),
    )

"""The decode role: reserve room, take KV in, write tokens. Also reads prompts itself, when asked to do it all.

    waiting ──▶ admitted ──▶ granted ──▶ running              (phases: `core.attempts`)
       ▲        (queued       (KV in transit)
       │         for room)      │
       └─────────┴──────────────┘  the prompt lost its blocks on the prefill side

Room is asked for once the prefill side has blocks for the prompt, so that no room is kept for prompts that cannot be read.

Invariants:
- A sequence runs only after its KV was committed: of every layer every token that it still sees, every digest.
- Blocks return to the engine only after `Receiver.close`, or after the receiver said that it is done with them.
- The number of a grant is used once, also across restarts: the incarnation is a part of it.

Neighbours: `engine` admits and computes, `kv_transfer.sessions` takes bytes in, `mail.attempt_book` keeps leases and tells who
must know; `instance.loop` calls in here. All methods run on its thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from core.attempts import Effect, Ending, Half, Phase
from core.clock import Clock
from core.errors import CorruptTransfer, HetServeError, InvalidRequest, Overloaded
from core.messages import Address, Grant, Handoff, ServedBy, Submit, TokenItem, TokenLogprobs
from core.tokens import unpack_tokens
from engine.engine import Engine
from engine.sequence import NewToken, Sequence
from kv_transfer.events import Broken, Received
from kv_transfer.sessions import Receiver
from kv_transfer.terms import Terms
from mail.attempt_book import Attempt, AttemptBook
from mail.peers import MessageSender

COUNTER_BITS = 40
"""Of a grant's 64-bit number; the incarnation is above them."""


@dataclass(eq=False, slots=True)
class Writing:
    """One generation being written here. `sequence` is None while no room is asked for."""

    attempt: Attempt
    tokens: int
    sequence: Sequence | None = None
    grant: Grant | None = None
    received: Received | None = None
    introduced: bool = False


class DecodeWorker:
    """Serves `Submit(stage="decode")` and `Submit(stage="local")` on one engine.

    `waiting` and `waiting_tokens` count what waits for its prefill side; at most `max_waiting_tokens` may. `lease_s` is how long
    a grant holds without a sign of life.
    """

    def __init__(
        self,
        engine: Engine,
        receiver: Receiver,
        book: AttemptBook,
        peers: MessageSender,
        address: Address,
        clock: Clock,
        lease_s: float,
        max_waiting_tokens: int,
    ) -> None:
        self._engine = engine
        self._receiver = receiver
        self._book = book
        self._peers = peers
        self._address = address
        self._clock = clock
        self._lease_s = lease_s
        self._max_waiting_tokens = max_waiting_tokens
        self._writings: dict[str, Writing] = {}
        self._last_grant = address.incarnation << COUNTER_BITS & (1 << 64) - 1
        self.waiting = 0
        self.waiting_tokens = 0

    # --- messages -----------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        try:
            if submit.stage == Half.WHOLE.value:
                sequence = self._sequence(submit)
                self._engine.add(sequence)
            else:
                sequence = None
                self._check_shared(submit)
        except (HetServeError, ValueError) as error:
            self._book.refuse(submit, _typed(error))
            return
        attempt = self._book.open(submit, Half(submit.stage), self)
        writing = self._writings[submit.attempt] = Writing(attempt, len(submit.tokens) // 4, sequence)
        if sequence is None:
            self._wait(writing, 1)

    def answer(self, attempt: Attempt, effect: Effect) -> None:
        writing = self._writings[attempt.name]
        if effect is Effect.RESERVE:
            self._reserve(writing)
        elif effect is Effect.GRANT:
            self._send_grant(writing)
        elif effect is Effect.KEEP_OPEN and writing.grant is not None:
            self._receiver.renew(writing.grant.grant)
        elif effect is Effect.TAKE_BACK:
            self._take_back(writing)

    # --- the engine ---------------------------------------------------------------------------------------------------

    def granted(self, sequence_id: str) -> None:
        """A reservation has its blocks: let the prefill side fill them."""
        writing = self._writings.get(sequence_id)
        if writing is None or writing.sequence is None:
            return
        writing.attempt.life.move(Phase.GRANTED)
        self._last_grant += 1
        sequence = writing.sequence
        terms = Terms(
            grant=self._last_grant,
            attempt=sequence_id,
            first_token=sequence.cached_tokens,
            num_tokens=len(sequence.tokens),
            lease_s=self._lease_s,
            windowed=self._engine.groups.windowed,
        )
        self._receiver.open(terms, sequence.tables)
        writing.grant = Grant(
            attempt=terms.attempt,
            grant=terms.grant,
            decode=self._address,
            endpoints=(self._receiver.endpoint,),
            first_token=terms.first_token,
            windowed=terms.windowed,
            lease_s=terms.lease_s,
            answers=writing.attempt.life.heard,
        )
        self._send_grant(writing)

    def drawn(self, token: NewToken) -> None:
        writing = self._writings.get(token.sequence.sequence_id)
        if writing is None:
            return
        served = None
        if not writing.introduced:
            writing.introduced = True
            served = _served(token.sequence, writing.received)
        item = TokenItem(
            attempt=token.sequence.sequence_id,
            position=token.position,
            tokens=(token.token,),
            logprobs=() if token.logprobs is None else (TokenLogprobs(token.logprobs.logprob, token.logprobs.top),),
            finish=token.finish,
            stop_token=token.stop_token,
            served=served,
        )
        self._book.tokens(writing.attempt, item)
        if token.finish is not None:
            self._book.end(writing.attempt, Ending.FINISHED, "finished")

    def failed(self, sequence: Sequence, error: HetServeError) -> None:
        """The engine gave the sequence up."""
        writing = self._writings.get(sequence.sequence_id)
        if writing is not None:
            self._book.fail(writing.attempt, error)

    # --- the transfer -------------------------------------------------------------------------------------------------

    def received(self, event: Received) -> None:
        """The KV is here and committed: the sequence runs from the token that prefill drew."""
        writing = self._of_grant(event)
        if writing is None or writing.sequence is None:
            return
        writing.attempt.life.move(Phase.RUNNING)
        writing.received = event
        try:
            handoff = _handoff(event, writing.sequence)
            finish = self._engine.start(writing.sequence, handoff.token)
        except (HetServeError, ValueError, msgspec.MsgspecError) as error:
            self._book.fail(writing.attempt, CorruptTransfer(f"the hand-off cannot be used: {error}"))
            return
        if finish is not None:  # the prefill side saw it too, and has told the gateway
            self._book.end(writing.attempt, Ending.FINISHED, "finished with its first token")

    def broken(self, event: Broken) -> None:
        writing = self._of_grant(event)
        if writing is not None and event.given_up:
            # The prefill side is over, and tells the gateway why: perhaps that all ended well, with the first token. Its word
            # to the gateway may still be on its way, and must not be overtaken by a failure.
            self._book.end(writing.attempt, Ending.WITHDRAWN, str(event.error))
        elif writing is not None:
            self._book.fail(writing.attempt, event.error)

    def free(self, attempt: Attempt, reason: str) -> None:
        writing = self._writings.pop(attempt.name, None)
        if writing is None:
            return
        try:
            if writing.sequence is None:
                self._wait(writing, -1)
            elif writing.grant is not None and writing.received is None:
                self._receiver.close(writing.grant.grant, reason)
        finally:
            self._engine.cancel(attempt.name)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _sequence(self, submit: Submit) -> Sequence:
        return Sequence(
            sequence_id=submit.attempt,
            tokens=unpack_tokens(submit.tokens),
            prompt_tokens=submit.prompt_tokens,
            sampling=submit.sampling,
            salt=submit.salt,
            ticket=submit.ticket,
            arrived_s=self._clock.now(),
        )

    def _check_shared(self, submit: Submit) -> None:
        if submit.peer is None:
            raise InvalidRequest(f"attempt {submit.attempt} names no prefill instance")
        tokens = len(submit.tokens) // 4
        if self.waiting and self.waiting_tokens + tokens > self._max_waiting_tokens:
            raise Overloaded(f"{self.waiting_tokens} tokens already wait for their prefill side on {self._address.name}")

    def _wait(self, writing: Writing, change: int) -> None:
        self.waiting += change
        self.waiting_tokens += change * writing.tokens

    def _reserve(self, writing: Writing) -> None:
        """The prefill side has blocks for the prompt: get in line for room here."""
        try:
            sequence = self._sequence(writing.attempt.submit)
            self._engine.reserve(sequence)
        except (HetServeError, ValueError) as error:
            self._book.fail(writing.attempt, _typed(error))
            return
        writing.attempt.life.move(Phase.ADMITTED)
        self._wait(writing, -1)
        writing.sequence = sequence

    def _take_back(self, writing: Writing) -> None:
        if writing.grant is not None:
            self._receiver.close(writing.grant.grant, "the prompt lost its blocks")
        self._engine.cancel(writing.attempt.name)
        writing.attempt.life.move(Phase.WAITING)
        writing.sequence = writing.grant = None
        self._wait(writing, 1)

    def _send_grant(self, writing: Writing) -> None:
        """Whether or not it leaves: while the prefill side says that it has none, it is sent again."""
        peer = writing.attempt.submit.peer
        if writing.grant is not None and peer is not None:
            writing.grant = msgspec.structs.replace(writing.grant, answers=writing.attempt.life.heard)
            self._peers.send(peer.mailbox, writing.grant)

    def _of_grant(self, event: Received | Broken) -> Writing | None:
        """Whom the event is about, unless it is about a grant that is no more."""
        writing = self._writings.get(event.attempt)
        if writing is None or writing.grant is None or writing.grant.grant != event.grant or writing.received is not None:
            return None
        return writing


def _typed(error: HetServeError | ValueError) -> HetServeError:
    return error if isinstance(error, HetServeError) else InvalidRequest(str(error))


def _handoff(event: Received, sequence: Sequence) -> Handoff:
    """Raises ValueError, MsgspecError."""
    handoff = msgspec.msgpack.decode(event.tail, type=Handoff)
    if handoff.tokens != len(sequence.tokens) or handoff.position != sequence.output_tokens:
        raise ValueError("it is about other tokens than the reservation")
    return handoff


def _served(sequence: Sequence, received: Received | None) -> ServedBy:
    started_s = sequence.started_s if sequence.started_s is not None else sequence.arrived_s
    if received is not None:
        return ServedBy(
            queue_s=started_s - sequence.arrived_s,
            cached_tokens=sequence.cached_tokens,
            kv_bytes=received.kv_bytes,
            transfer_s=received.transfer_s,
        )
    first_token_s = sequence.first_token_s if sequence.first_token_s is not None else started_s
    return ServedBy(
        queue_s=started_s - sequence.arrived_s,
        compute_s=first_token_s - started_s,
        cached_tokens=sequence.cached_tokens,
    )

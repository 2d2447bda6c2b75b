"""The decode role: reserve room, take KV in, write tokens. Also reads short prompts itself, when asked to do it all.

Each disaggregated attempt goes through

    queued ──▶ granted ──▶ running ──▶ gone
    (no room yet)  (KV in transit)  (committed, in the engine)

and a local one is `running` at once.

Invariants:
- A sequence runs only after its KV was committed: every layer, every token, every digest.
- Grants are given in order of arrival, so a large prompt is not overtaken for ever.
- Blocks return to the engine only after `Receiver.close`, or after the receiver said that it is done with them.
- An attempt whose prefill side is silent for a lease is failed, so that nothing is held for the dead. While KV is in
  transit the receiver keeps that lease, because frames count as signs of life too.

Neighbours: `engine` computes, `kv_transfer.sessions` takes bytes in, `instance.loop` calls in here.
All methods run on the engine's thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

import msgspec

from core.clock import Clock
from core.errors import CorruptTransfer, DeadlineExceeded, HetServeError, InvalidRequest, LeaseExpired, Overloaded
from core.messages import Address, Grant, Handoff, Renew, Revoke, ServedBy, Submit, TokenItem, TokenLogprobs
from core.tokens import unpack_tokens
from engine.engine import Engine
from engine.sequence import NewToken, Sequence
from kv_transfer.events import Broken, Received
from kv_transfer.sessions import Receiver
from mail.outbox import Outbox
from mail.peers import Peers
from mail.renewals import Renewals


class Phase(Enum):
    QUEUED = "queued"
    GRANTED = "granted"
    RUNNING = "running"


@dataclass(eq=False)
class DecodeAttempt:
    """One generation being written here. `prefill` is None when it is also read here."""

    submit: Submit
    prefill: Address | None
    sequence: Sequence
    expires_s: float
    lease_until_s: float
    phase: Phase
    grant: int = 0
    received: Received | None = None
    introduced: bool = False


class DecodeWorker:
    """Serves `Submit(stage="decode")` and `Submit(stage="local")` on one engine."""

    def __init__(
        self,
        engine: Engine,
        receiver: Receiver,
        outbox: Outbox,
        peers: Peers,
        address: Address,
        clock: Clock,
        lease_s: float,
        max_waiting_tokens: int,
    ) -> None:
        self._engine = engine
        self._receiver = receiver
        self._outbox = outbox
        self._peers = peers
        self._address = address
        self._clock = clock
        self._lease_s = lease_s
        self._max_waiting_tokens = max_waiting_tokens
        self._attempts: dict[str, DecodeAttempt] = {}
        self._queue: deque[DecodeAttempt] = deque()
        self._last_grant = 0
        self._renewals = Renewals(address, peers, clock, lease_s)

    @property
    def attempts(self) -> int:
        return len(self._attempts)

    @property
    def queued_tokens(self) -> int:
        """Tokens of attempts that wait for room."""
        return sum(len(attempt.sequence.tokens) for attempt in self._queue)

    @property
    def queued(self) -> int:
        return len(self._queue)

    # --- messages -----------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        if submit.attempt in self._attempts:
            return
        try:
            attempt = self._attempt(submit)
            if attempt.prefill is None:
                self._engine.add(attempt.sequence)
            else:
                self._enqueue(attempt)
        except (HetServeError, ValueError) as error:
            typed = error if isinstance(error, HetServeError) else InvalidRequest(str(error))
            if submit.peer is not None:
                self._peers.send(submit.peer.mailbox, Revoke(attempt=submit.attempt, reason=str(error)))
            self._outbox.failed(submit.gateway, submit.attempt, typed)
            return
        self._attempts[submit.attempt] = attempt
        self.grant_waiting()

    def cancel(self, attempt_id: str) -> None:
        """Drop the attempt without a word: whoever asked knows."""
        attempt = self._attempts.get(attempt_id)
        if attempt is not None:
            self._drop(attempt, "cancelled")

    def abandoned(self, attempt_id: str) -> None:
        """The prefill side will send nothing (more), and has told the gateway why."""
        attempt = self._attempts.get(attempt_id)
        if attempt is not None and attempt.phase is not Phase.RUNNING:
            self._drop(attempt, "abandoned by the prefill side")

    def renewed(self, renew: Renew) -> None:
        """The prefill side still works on these."""
        until_s = self._clock.now() + self._lease_s
        for attempt_id in renew.attempts:
            attempt = self._attempts.get(attempt_id)
            if attempt is not None and attempt.prefill == renew.worker:
                attempt.lease_until_s = until_s
                if attempt.phase is Phase.GRANTED:
                    self._receiver.renew(attempt.grant)

    # --- the transfer -------------------------------------------------------------------------------------------------

    def grant_waiting(self) -> None:
        """Reserve blocks for queued attempts, oldest first, for as long as there is room."""
        while self._queue:
            attempt = self._queue[0]
            try:
                if not self._engine.reserve(attempt.sequence):
                    return
            except HetServeError as error:
                self._fail(attempt, error)
                continue
            self._queue.popleft()
            self._grant(attempt)

    def received(self, event: Received) -> None:
        """The KV is here and committed: the sequence runs from the token that prefill drew."""
        attempt = self._attempts.get(event.attempt)
        if attempt is None or attempt.phase is not Phase.GRANTED or attempt.grant != event.grant:
            return
        try:
            handoff = msgspec.msgpack.decode(event.tail, type=Handoff)
        except msgspec.MsgspecError as error:
            self._fail(attempt, CorruptTransfer(f"unreadable hand-off: {error}"))
            return
        sequence = attempt.sequence
        if handoff.tokens != len(sequence.tokens) or handoff.position != sequence.output_tokens:
            self._fail(attempt, CorruptTransfer("the hand-off is about other tokens than the reservation"))
            return
        attempt.phase = Phase.RUNNING
        attempt.received = event
        try:
            ended = self._engine.start(sequence, handoff.token) is not None
        except HetServeError as error:
            self._fail(attempt, CorruptTransfer(f"the hand-off cannot be used: {error}"))
            return
        if ended:  # the prefill side saw it too, and has told the gateway
            del self._attempts[event.attempt]

    def broken(self, event: Broken) -> None:
        attempt = self._attempts.get(event.attempt)
        if attempt is not None and attempt.phase is Phase.GRANTED and attempt.grant == event.grant:
            self._fail(attempt, event.error)

    # --- the step -----------------------------------------------------------------------------------------------------

    def drawn(self, token: NewToken) -> None:
        attempt = self._attempts[token.sequence.sequence_id]
        served = None
        if not attempt.introduced:
            attempt.introduced = True
            served = _served(attempt)
        self._outbox.tokens(
            attempt.submit.gateway,
            TokenItem(
                attempt=token.sequence.sequence_id,
                position=token.position,
                tokens=(token.token,),
                logprobs=() if token.logprobs is None else (TokenLogprobs(token.logprobs.logprob, token.logprobs.top),),
                finish=token.finish,
                stop_token=token.stop_token,
                served=served,
            ),
        )
        if token.finish is not None:
            del self._attempts[token.sequence.sequence_id]

    def failed(self, sequence: Sequence, error: HetServeError) -> None:
        """The engine gave the sequence up."""
        self._fail(self._attempts[sequence.sequence_id], error)

    def tick(self) -> None:
        """Renew what prefill sides hold for us; give up what is past its deadline or whose prefill side is silent."""
        now_s = self._clock.now()
        for attempt in list(self._attempts.values()):
            if now_s >= attempt.expires_s:
                self._fail(attempt, DeadlineExceeded(f"not finished within {attempt.submit.deadline_s:g} s"))
            elif attempt.phase is Phase.QUEUED and now_s >= attempt.lease_until_s and attempt.prefill is not None:
                error = LeaseExpired(f"prefill instance {attempt.prefill.name} was silent for {self._lease_s:g} s")
                self._fail(attempt, error)
        self.renew()

    def renew(self) -> None:
        """Tell prefill sides what still waits here. Safe in the middle of a step, so that a long one costs nobody a lease."""
        self._renewals.send(
            (attempt.prefill, attempt_id)
            for attempt_id, attempt in self._attempts.items()
            if attempt.prefill is not None and attempt.phase is not Phase.RUNNING
        )

    # --- inside -------------------------------------------------------------------------------------------------------

    def _attempt(self, submit: Submit) -> DecodeAttempt:
        if submit.stage == "decode" and submit.peer is None:
            raise InvalidRequest(f"attempt {submit.attempt} names no prefill instance")
        now_s = self._clock.now()
        prefill = submit.peer if submit.stage == "decode" else None
        sequence = Sequence(
            sequence_id=submit.attempt,
            tokens=unpack_tokens(submit.tokens),
            prompt_tokens=submit.prompt_tokens,
            sampling=submit.sampling,
            salt=submit.salt,
            arrived_s=now_s,
        )
        phase = Phase.RUNNING if prefill is None else Phase.QUEUED
        return DecodeAttempt(submit, prefill, sequence, now_s + submit.deadline_s, now_s + self._lease_s, phase)

    def _enqueue(self, attempt: DecodeAttempt) -> None:
        tokens = len(attempt.sequence.tokens)
        if self._queue and self.queued_tokens + tokens > self._max_waiting_tokens:
            raise Overloaded(f"{self.queued_tokens} tokens already wait for room on {self._address.name}")
        self._queue.append(attempt)

    def _grant(self, attempt: DecodeAttempt) -> None:
        if attempt.prefill is None:
            return
        self._last_grant += 1
        attempt.grant = self._last_grant
        attempt.phase = Phase.GRANTED
        sequence = attempt.sequence
        self._receiver.open(
            grant=attempt.grant,
            attempt=sequence.sequence_id,
            blocks=tuple(sequence.blocks),
            first_token=sequence.cached_tokens,
            num_tokens=len(sequence.tokens),
            lease_s=self._lease_s,
        )
        grant = Grant(
            attempt=sequence.sequence_id,
            grant=attempt.grant,
            decode=self._address,
            kv_endpoint=self._receiver.endpoint,
            first_token=sequence.cached_tokens,
            lease_s=self._lease_s,
        )
        self._peers.send(attempt.prefill.mailbox, grant)

    def _drop(self, attempt: DecodeAttempt, reason: str) -> None:
        attempt_id = attempt.submit.attempt
        if attempt.phase is Phase.QUEUED:
            self._queue.remove(attempt)
        elif attempt.phase is Phase.GRANTED:
            self._receiver.close(attempt.grant, reason)
        self._engine.cancel(attempt_id)
        del self._attempts[attempt_id]

    def _fail(self, attempt: DecodeAttempt, error: HetServeError) -> None:
        if attempt.prefill is not None and attempt.phase is not Phase.RUNNING:
            self._peers.send(attempt.prefill.mailbox, Revoke(attempt=attempt.submit.attempt, reason=str(error)))
        self._drop(attempt, error.code)
        self._outbox.failed(attempt.submit.gateway, attempt.submit.attempt, error)


def _served(attempt: DecodeAttempt) -> ServedBy:
    sequence = attempt.sequence
    started_s = sequence.started_s if sequence.started_s is not None else sequence.arrived_s
    received = attempt.received
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

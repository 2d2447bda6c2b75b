"""The prefill role: read prompts, draw first tokens, push KV to the decode side.

Each attempt goes through

    waiting ──▶ running ──▶ held ──▶ gone
                   └── session open: layers are pushed while later ones compute ──┘

A grant may come before, during or after the computation; the session opens as soon as there is both a grant and a block.
Until then the KV waits here, which is the back-pressure of a full decode side.

Invariants:
- A block is never freed while a session may read it: the session is aborted or delivered first.
- An attempt ends in exactly one of: delivered, finished by its first token, failed (the gateway is told), or dropped
  because the gateway or the decode side asked for it.
- An attempt whose decode side is silent for a lease is failed, so that nothing is held for the dead.

Neighbours: `engine` computes, `kv_transfer.sessions` moves bytes, `instance.loop` calls in here.
All methods run on the engine's thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from core.clock import Clock
from core.errors import DeadlineExceeded, EngineFault, HetServeError, InvalidRequest, LeaseExpired
from core.messages import Abandon, Address, Grant, Handoff, Renew, ServedBy, Submit, TokenItem, TokenLogprobs
from core.tokens import unpack_tokens
from engine.decision import Part
from engine.engine import Engine
from engine.sequence import NewToken, Sequence, Status
from kv_transfer.events import Delivered, SendFailed
from kv_transfer.sessions import Sender, SendSession
from mail.outbox import Outbox
from mail.peers import Peers
from mail.renewals import Renewals
from prefill.early_grants import EarlyGrants


@dataclass(eq=False)
class PrefillAttempt:
    """One prompt being read here for one decode instance."""

    submit: Submit
    decode: Address
    sequence: Sequence
    expires_s: float
    lease_until_s: float
    grant: Grant | None = None
    session: SendSession | None = None
    first: NewToken | None = None


class PrefillWorker:
    """Serves `Submit(stage="prefill")` on one engine."""

    def __init__(
        self, engine: Engine, sender: Sender, outbox: Outbox, peers: Peers, address: Address, clock: Clock, lease_s: float
    ) -> None:
        self._engine = engine
        self._sender = sender
        self._outbox = outbox
        self._peers = peers
        self._clock = clock
        self._lease_s = lease_s
        self._attempts: dict[str, PrefillAttempt] = {}
        self._early = EarlyGrants(clock, lease_s)
        self._noted: list[PrefillAttempt] = []
        self._renewals = Renewals(address, peers, clock, lease_s)

    @property
    def attempts(self) -> int:
        return len(self._attempts)

    # --- messages -----------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        now_s = self._clock.now()
        if submit.attempt in self._attempts:
            return
        if submit.peer is None:
            self._refuse(submit, InvalidRequest(f"attempt {submit.attempt} names no decode instance"))
            return
        try:
            sequence = Sequence(
                sequence_id=submit.attempt,
                tokens=unpack_tokens(submit.tokens),
                prompt_tokens=submit.prompt_tokens,
                sampling=submit.sampling,
                salt=submit.salt,
                hold=True,
                arrived_s=now_s,
            )
            self._engine.add(sequence)
        except (HetServeError, ValueError) as error:
            self._refuse(submit, error)
            return
        attempt = PrefillAttempt(submit, submit.peer, sequence, now_s + submit.deadline_s, now_s + self._lease_s)
        self._attempts[submit.attempt] = attempt
        grant = self._early.take(submit.attempt)
        if grant is not None:
            self.granted(grant)

    def granted(self, grant: Grant, stepping: bool = False) -> None:
        """Room on the decode side. A grant that overtook its `Submit` is kept for it. One that comes while a step runs is
        only noted: the next layer opens the session if the step computes its prompt, else `stepped` does."""
        attempt = self._attempts.get(grant.attempt)
        if attempt is None:
            self._early.put(grant)
        elif grant.decode == attempt.decode and attempt.grant is None:
            attempt.grant = grant
            attempt.lease_until_s = self._clock.now() + self._lease_s
            if stepping:
                self._noted.append(attempt)
            else:
                self._open_session(attempt)

    def cancel(self, attempt_id: str) -> None:
        """Drop the attempt without a word: whoever asked knows."""
        self._early.take(attempt_id)
        attempt = self._attempts.get(attempt_id)
        if attempt is not None:
            self._drop(attempt, "cancelled")

    def renewed(self, renew: Renew) -> None:
        """The decode side still wants these."""
        until_s = self._clock.now() + self._lease_s
        for attempt_id in renew.attempts:
            attempt = self._attempts.get(attempt_id)
            if attempt is not None and attempt.decode == renew.worker:
                attempt.lease_until_s = until_s

    # --- the step -----------------------------------------------------------------------------------------------------

    def layer_written(self, parts: tuple[Part, ...], layer: int) -> None:
        """Push what the running step just wrote of one layer, while the next layers compute."""
        for item in parts:
            attempt = self._attempts.get(item.sequence.sequence_id)
            if attempt is None:
                continue
            session, first = attempt.session, layer
            if session is None:
                session, first = self._open_session(attempt), 0
            if session is not None:
                for written in range(first, layer + 1):
                    session.push(written, item.start, item.count)

    def stepped(self) -> None:
        """The step is over: open the sessions of grants that came while it ran and were not its own."""
        for attempt in self._noted:
            if self._attempts.get(attempt.submit.attempt) is attempt:
                self._open_session(attempt)
        self._noted.clear()

    def drawn(self, token: NewToken) -> None:
        """The prompt is read: give the first token to the gateway, and the rest of the KV to the decode side."""
        attempt = self._attempts[token.sequence.sequence_id]
        attempt.first = token
        self._outbox.tokens(attempt.submit.gateway, _first_item(token))
        if token.finish is not None:
            self._tell(attempt, "finished with its first token")
            self._drop(attempt, "finished with its first token")
        elif attempt.session is not None:
            self._finish_session(attempt)
        else:
            self._open_session(attempt)

    def failed(self, sequence: Sequence, error: HetServeError) -> None:
        """The engine gave the sequence up."""
        self._fail(self._attempts[sequence.sequence_id], error)

    # --- the transfer -------------------------------------------------------------------------------------------------

    def delivered(self, event: Delivered) -> None:
        attempt = self._attempts.pop(event.attempt, None)
        if attempt is not None:
            self._engine.release(event.attempt)

    def send_failed(self, event: SendFailed) -> None:
        attempt = self._attempts.get(event.attempt)
        if attempt is not None:
            self._fail(attempt, event.error)

    def tick(self) -> None:
        """Renew what decode sides hold for us; give up what is past its deadline or whose decode side is silent."""
        now_s = self._clock.now()
        for attempt in list(self._attempts.values()):
            if now_s >= attempt.expires_s:
                self._fail(attempt, DeadlineExceeded(f"not prefilled within {attempt.submit.deadline_s:g} s"))
            elif now_s >= attempt.lease_until_s:
                error = LeaseExpired(f"decode instance {attempt.decode.name} was silent for {self._lease_s:g} s")
                self._fail(attempt, error)
        self._early.sweep()
        self.renew()

    def renew(self) -> None:
        """Tell decode sides what still lives here. Safe in the middle of a step, so that a long one costs nobody a lease."""
        self._renewals.send((attempt.decode, attempt_id) for attempt_id, attempt in self._attempts.items())

    # --- inside -------------------------------------------------------------------------------------------------------

    def _open_session(self, attempt: PrefillAttempt) -> SendSession | None:
        """Start pushing once there is a grant and there are blocks, beginning with all that is computed already."""
        sequence, grant = attempt.sequence, attempt.grant
        if grant is None or attempt.session is not None or sequence.status not in (Status.RUNNING, Status.HELD):
            return None
        session = attempt.session = self._sender.begin(
            attempt=sequence.sequence_id,
            grant=grant.grant,
            endpoint=grant.kv_endpoint,
            blocks=sequence.blocks,
            first_token=grant.first_token,
            num_tokens=_prefilled_tokens(attempt),
            lease_s=grant.lease_s,
            incarnation=grant.decode.incarnation,
        )
        if sequence.computed_tokens > 0:
            for layer in range(len(self._engine.layout.layers)):
                session.push(layer, 0, sequence.computed_tokens)
        if attempt.first is not None:
            self._finish_session(attempt)
        return session

    def _finish_session(self, attempt: PrefillAttempt) -> None:
        if attempt.session is None or attempt.first is None:
            raise EngineFault(f"attempt {attempt.submit.attempt} has nothing to finish")
        tokens = _prefilled_tokens(attempt)
        handoff = Handoff(token=attempt.first.token, position=attempt.first.position, tokens=tokens)
        attempt.session.finish(msgspec.msgpack.encode(handoff))

    def _drop(self, attempt: PrefillAttempt, reason: str) -> None:
        attempt_id = attempt.submit.attempt
        if attempt.session is not None:
            attempt.session.abort(reason)
        self._engine.cancel(attempt_id)
        del self._attempts[attempt_id]

    def _fail(self, attempt: PrefillAttempt, error: HetServeError) -> None:
        self._tell(attempt, str(error))
        self._drop(attempt, error.code)
        self._outbox.failed(attempt.submit.gateway, attempt.submit.attempt, error)

    def _refuse(self, submit: Submit, error: HetServeError | ValueError) -> None:
        typed = error if isinstance(error, HetServeError) else InvalidRequest(str(error))
        if submit.peer is not None:
            self._peers.send(submit.peer.mailbox, Abandon(attempt=submit.attempt, reason=str(error)))
        self._outbox.failed(submit.gateway, submit.attempt, typed)

    def _tell(self, attempt: PrefillAttempt, reason: str) -> None:
        self._peers.send(attempt.decode.mailbox, Abandon(attempt=attempt.submit.attempt, reason=reason))


def _prefilled_tokens(attempt: PrefillAttempt) -> int:
    """Tokens whose KV the decode side needs: all but the one drawn here."""
    return len(attempt.submit.tokens) // 4


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

"""The attempts of one instance, and all its mail about them that is the same for reading and for writing.

    gateways ── Keep, Cancel ─────▶ ┌──────┐ ──▶ Tokens, Failed          (also again, when they were lost)
    peers ───── Renew, Withdrawn ─▶ │ book │ ──▶ Renew, Withdrawn
                                    └──────┘ ──▶ the worker that serves the half: answer, free

Invariants:
- An attempt is served once: a `Submit` that comes again, or after the attempt's end, changes nothing.
- Each attempt ends once. Whoever has to know is told, and told again as long as it asks.
- What is kept for a silent gateway, peer or client is bounded by leases and deadlines; what is remembered, in number.
- A worker or gateway is compared by its whole address, so that an earlier incarnation, or somebody else, changes nothing.

`core.attempts` decides, `prefill` and `decode` carry out what is particular to a half. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from core.attempts import Effect, Ending, Half, LifeCycle, Phase
from core.clock import Clock
from core.ended import Ended, EndedAttempts
from core.errors import AttemptLost, EngineFault, HetServeError
from core.messages import Address, AttemptState, Failed, Submit, TokenItem, Wanted, Withdrawn
from core.tail import Tail
from mail.early_states import EarlyStates
from mail.outbox import Outbox
from mail.peers import MessageSender
from mail.renewals import Renewals, Shared

IN_VAIN_LEASES = 1.5
"""Tokens that a gateway asks for, and that do not arrive for so many leases, go no way that anything goes."""


class Server(Protocol):
    """The worker that serves a half."""

    def answer(self, attempt: Attempt, effect: Effect) -> None:
        """Do what follows from what the other half says."""

    def free(self, attempt: Attempt, reason: str) -> None:
        """The attempt is over: give back all that is held for it."""


@dataclass(eq=False, slots=True)
class Attempt:
    """A live attempt."""

    submit: Submit
    life: LifeCycle
    server: Server
    tail: Tail = field(default_factory=Tail)

    @property
    def name(self) -> str:
        return self.submit.attempt


class AttemptBook:
    """Usable by one thread. `newest_ticket` is the largest that any `Submit` brought."""

    def __init__(self, worker: Address, outbox: Outbox, peers: MessageSender, clock: Clock, lease_s: float) -> None:
        self._worker = worker
        self._outbox = outbox
        self._peers = peers
        self._clock = clock
        self._lease_s = lease_s
        self._live: dict[str, Attempt] = {}
        self._ended = EndedAttempts(clock, lease_s)
        self._early = EarlyStates(clock, lease_s)
        self._renewals = Renewals(worker, peers, clock, lease_s)
        self._to_say: dict[str, Attempt] = {}
        self.newest_ticket = 0

    def __len__(self) -> int:
        return len(self._live)

    @property
    def next_number(self) -> int:
        """Of the next `Renew` that leaves."""
        return self._renewals.number + 1

    def get(self, attempt: str) -> Attempt | None:
        return self._live.get(attempt)

    # --- beginning ----------------------------------------------------------------------------------------------------

    def is_new(self, submit: Submit) -> bool:
        """Whether nothing is known of the attempt: it is not here, was not here, and was not cancelled before it came."""
        self.newest_ticket = max(self.newest_ticket, submit.ticket)
        return submit.attempt not in self._live and self._ended.ask(submit.attempt) is None

    def open(self, submit: Submit, half: Half, server: Server) -> Attempt:
        """Begin to serve."""
        attempt = Attempt(submit, LifeCycle(half, submit.deadline_s, self._lease_s, self._clock.now()), server)
        self._live[submit.attempt] = attempt
        return attempt

    def catch_up(self, attempt_id: str) -> None:
        """Take in what the other half said of an attempt before its `Submit` came."""
        said = self._early.take(attempt_id)
        if said is not None:
            worker, number, phase = said
            self.renewed(worker, number, AttemptState(attempt_id, phase))

    def refuse(self, submit: Submit, error: HetServeError) -> None:
        """Do not begin."""
        failed = self._failure(submit.attempt, error)
        self._ended.remember(submit.attempt, Ended(failed.message, failed))
        if submit.peer is not None:
            self._withdraw(submit.peer, submit.attempt, failed.message)
        self._outbox.failed(submit.gateway, failed)

    # --- while it lives -----------------------------------------------------------------------------------------------

    def tokens(self, attempt: Attempt, item: TokenItem) -> None:
        """Send new tokens, and keep them until the gateway has them."""
        attempt.tail.add(item)
        self._outbox.tokens(attempt.submit.gateway, item)

    def say(self, attempt: Attempt) -> None:
        """Tell the other half where this one stands, with the next `flush`."""
        self._to_say[attempt.name] = attempt

    def flush(self) -> None:
        """Send what has gathered."""
        self._outbox.flush()
        if self._to_say:
            said, self._to_say = self._to_say, {}
            self._renewals.send(_state(attempt) for attempt in said.values() if attempt.submit.peer is not None)

    # --- messages -----------------------------------------------------------------------------------------------------

    def wanted(self, gateway: Address, wanted: Wanted) -> None:
        """A gateway still waits for an attempt."""
        attempt = self._live.get(wanted.attempt)
        if attempt is None:
            self._wanted_in_vain(gateway, wanted)
        elif attempt.submit.gateway == gateway:
            attempt.life.wanted(self._clock.now())
            if not self._repeat(attempt.tail, gateway, wanted.position):
                self.fail(attempt, AttemptLost(f"the tokens of {self._worker.name} do not reach the gateway"))

    def renewed(self, worker: Address, number: int, state: AttemptState) -> None:
        """The other half says where it stands."""
        attempt = self._live.get(state.attempt)
        if attempt is None:
            ended = self._ended.ask(state.attempt)
            if ended is None:
                self._early.put(state.attempt, (worker, number, state.phase))
            elif not ended.delivered:
                self._withdraw(worker, state.attempt, ended.reason)
        elif attempt.submit.peer == worker:
            effect = attempt.life.renewed(state.phase, number, self._clock.now())
            if effect is Effect.SAY:
                self.say(attempt)
            elif effect is not None:
                attempt.server.answer(attempt, effect)

    def withdrawn(self, message: Withdrawn) -> None:
        """The other half is over, and the gateway knows why. What runs here needs it no more."""
        attempt = self._live.get(message.attempt)
        if attempt is not None and attempt.submit.peer == message.worker and attempt.life.phase is not Phase.RUNNING:
            self.end(attempt, Ending.WITHDRAWN, message.reason)

    def cancel(self, attempt_id: str) -> None:
        """The gateway wants it no more, and to hear nothing more of it. A cancel may overtake its `Submit`."""
        attempt = self._live.get(attempt_id)
        if attempt is not None:
            self.end(attempt, Ending.CANCELLED, "cancelled")
        elif self._ended.ask(attempt_id) is None:
            self._ended.remember(attempt_id, Ended("cancelled"))

    # --- the end ------------------------------------------------------------------------------------------------------

    def fail(self, attempt: Attempt, error: HetServeError) -> None:
        self._end(attempt, Ending.FAILED, str(error), self._failure(attempt.name, error))

    def end(self, attempt: Attempt, ending: Ending, reason: str) -> None:
        """It ended otherwise than by a failure of its own."""
        self._end(attempt, ending, reason, None)

    def fault(self, attempt_id: str, error: Exception) -> None:
        """A handler of ours failed on it: that ends it, and nothing else."""
        attempt = self._live.get(attempt_id)
        if attempt is not None:
            self.fail(attempt, EngineFault(f"a handler failed: {type(error).__name__}: {error}"))

    def overdue(self) -> Iterator[tuple[Attempt, HetServeError]]:
        """What has to `fail` now, and why."""
        now_s = self._clock.now()
        for attempt in list(self._live.values()):
            error = attempt.life.overdue(now_s)
            if error is not None:
                yield attempt, error

    def tick(self) -> None:
        """Tell peers what lives here, if it is time; forget what is old."""
        self._ended.sweep()
        self._early.sweep()
        if self._renewals.due():
            self._renewals.send(_state(attempt) for attempt in self._live.values() if attempt.life.shared)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _end(self, attempt: Attempt, ending: Ending, reason: str, failed: Failed | None) -> None:
        if attempt.life.ended:
            return
        told = attempt.life.end(ending)
        submit = attempt.submit
        self._live.pop(submit.attempt, None)
        tail = None if ending is Ending.CANCELLED else attempt.tail
        delivered = ending is Ending.DELIVERED
        self._ended.remember(submit.attempt, Ended(reason, failed, tail, delivered, self._clock.now()))
        if told.peer and submit.peer is not None:
            self._withdraw(submit.peer, submit.attempt, reason)
        if told.gateway and failed is not None:
            self._outbox.failed(submit.gateway, failed)
        attempt.server.free(attempt, reason)

    def _wanted_in_vain(self, gateway: Address, wanted: Wanted) -> None:
        ended = self._ended.ask(wanted.attempt)
        if ended is None:
            ended = self._lost(wanted.attempt, "knows nothing of this attempt")
        arrives = ended.tail is None or self._repeat(ended.tail, gateway, wanted.position)
        if ended.failed is None and not (arrives and self._may_hear(ended)):
            ended = self._lost(wanted.attempt, "cannot get its tokens through" if ended.tail else "has ended this attempt")
        if ended.failed is not None:
            self._outbox.failed(gateway, ended.failed)

    def _may_hear(self, ended: Ended) -> bool:
        """Whether a gateway that still wants an attempt of which nothing is left here may yet hear of it: from here, or from the
        other half, which goes on with it or has told why it is over."""
        return bool(ended.tail) or ended.delivered or self._clock.now() < ended.at_s + IN_VAIN_LEASES * self._lease_s

    def _repeat(self, tail: Tail, gateway: Address, position: int) -> bool:
        """Send again what the gateway lacks. False if that has been in vain for too long."""
        now_s = self._clock.now()
        for item in tail.asked(position, now_s):
            self._outbox.tokens(gateway, item)
        return tail.repeating_for_s(now_s) < IN_VAIN_LEASES * self._lease_s

    def _lost(self, attempt: str, how: str) -> Ended:
        failed = self._failure(attempt, AttemptLost(f"{self._worker.name} {how}"))
        ended = Ended(failed.message, failed)
        self._ended.remember(attempt, ended)
        return ended

    def _withdraw(self, peer: Address, attempt: str, reason: str) -> None:
        self._peers.send(peer.mailbox, Withdrawn(worker=self._worker, attempt=attempt, reason=reason))

    def _failure(self, attempt: str, error: HetServeError) -> Failed:
        return Failed(worker=self._worker, attempt=attempt, code=error.code, message=str(error))


def _state(attempt: Attempt) -> Shared:
    peer = attempt.submit.peer
    assert peer is not None, "only halves are shared"
    return peer, attempt.name, attempt.life.phase

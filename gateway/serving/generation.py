"""A request under way at the gateway, the attempt that presently serves it, and what its workers are told of that. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from core.attempts import Half
from core.messages import Address, Submit
from core.tokens import pack_tokens
from gateway.serving.journal import Entry
from router.policy import NOBODY, Assignment, Demand
from router.state import InstanceKey


class State(Enum):
    HELD = "waits in the gateway for somebody who can serve it"
    RUNNING = "an attempt serves it"
    FENCING = "its last attempt is over, and what came of it is still to be taken in"
    ENDED = "completed, failed or cancelled"


@dataclass(slots=True)
class Attempt:
    """One try. `heard` are the workers of which a token got through."""

    attempt_id: str
    assignment: Assignment
    heard: set[InstanceKey] = field(default_factory=set)

    @property
    def decoding(self) -> bool:
        """A token of the decode worker got through: from now on prefill no longer matters."""
        return self.assignment.decode.key in self.heard

    @property
    def workers(self) -> list[Address]:
        prefill = self.assignment.prefill
        return [self.assignment.decode.address] + ([prefill.address] if prefill is not None else [])

    @property
    def keys(self) -> frozenset[InstanceKey]:
        return frozenset((worker.name, worker.incarnation) for worker in self.workers)

    def needs(self, worker: InstanceKey) -> bool:
        """Whether the attempt is over without this worker."""
        prefill = self.assignment.prefill
        return worker in self.keys and not (prefill is not None and prefill.key == worker and self.decoding)


@dataclass(eq=False, slots=True)
class Generation:
    """A request under way.

    Attributes:
        expires_s: its deadline.
        avoid: who has failed it.
        failures: attempts that failed, less what steady progress has made up for.
        failed_at_tokens: how many had been delivered when the last one failed.
        patience_until_s: how long it is held while nobody could serve it; 0 while it is not.
        refused_until_s: how long workers may go on turning it away; 0 while none does.
    """

    entry: Entry
    ticket: int
    expires_s: float
    state: State = State.HELD
    attempt: Attempt | None = None
    avoid: frozenset[InstanceKey] = NOBODY
    failures: int = 0
    failed_at_tokens: int = 0
    patience_until_s: float = 0.0
    refused_until_s: float = 0.0

    @property
    def generation_id(self) -> str:
        return self.entry.request.request_id

    @property
    def done(self) -> bool:
        return self.state is State.ENDED

    @property
    def demand(self) -> Demand:
        return Demand(self.entry.request, len(self.entry.tokens))


def submits(generation: Generation, attempt: Attempt, gateway: Address, now_s: float) -> list[tuple[Address, Submit]]:
    """What to tell whom, so that they begin the attempt: all that the client may have seen counts as read."""
    request, assignment = generation.entry.request, attempt.assignment
    tokens = pack_tokens([*request.prompt, *generation.entry.tokens])

    def submit(half: Half, peer: Address | None) -> Submit:
        return Submit(
            attempt=attempt.attempt_id,
            gateway=gateway,
            tokens=tokens,
            prompt_tokens=len(request.prompt),
            sampling=request.sampling,
            stage=half.value,
            peer=peer,
            salt=request.salt,
            deadline_s=max(generation.expires_s - now_s, 1e-3),
            ticket=generation.ticket,
        )

    decode = assignment.decode.address
    if assignment.prefill is None:
        return [(decode, submit(Half.WHOLE, None))]
    prefill = assignment.prefill.address
    return [(decode, submit(Half.DECODE, prefill)), (prefill, submit(Half.PREFILL, decode))]

"""A request under way at the gateway, the attempt that presently serves it, and what its workers are told of that."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from core.attempts import Half
from core.messages import Address, Submit
from core.tokens import pack_tokens
from gateway.serving.inbox import Inbox
from gateway.serving.journal import Entry
from gateway.text.token_reader import TokenReader
from router.policy import NOBODY, Assignment
from router.state import InstanceKey


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


@dataclass(eq=False, slots=True)
class Generation:
    """A request under way. `close` it when nobody wants it any more; closing a finished one does nothing."""

    entry: Entry
    reader: TokenReader
    inbox: Inbox
    index: int
    ticket: int
    expires_s: float
    attempt: Attempt | None = None
    avoid: frozenset[InstanceKey] = NOBODY
    failures: int = 0
    stranded_until_s: float = 0.0
    refused_until_s: float = 0.0
    timer: asyncio.TimerHandle | None = None

    @property
    def generation_id(self) -> str:
        return self.entry.request.request_id

    @property
    def done(self) -> bool:
        return self.entry.outcome is not None


def submits(generation: Generation, attempt: Attempt, gateway: Address, deadline_s: float) -> list[tuple[Address, Submit]]:
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
            deadline_s=max(deadline_s, 1e-3),
            ticket=generation.ticket,
        )

    decode = assignment.decode.address
    if assignment.prefill is None:
        return [(decode, submit(Half.WHOLE, None))]
    prefill = assignment.prefill.address
    return [(decode, submit(Half.DECODE, prefill)), (prefill, submit(Half.PREFILL, decode))]

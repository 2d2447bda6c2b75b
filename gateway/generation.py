"""A request under way at the gateway, and the attempt that presently serves it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from core.messages import Address
from gateway.inbox import Inbox
from gateway.journal import Entry
from gateway.reader import TokenReader
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

"""The seam between the gateway and whoever decides: a demand and a snapshot in; an assignment, a hold or a refusal out.

A policy does no I/O and reads no clock; the simulator runs the very same objects in virtual time. It never pairs
instances of different `kind` and never picks one whose key is in `avoid` (an earlier attempt failed there).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from core.config import Role
from core.errors import Overloaded, Unavailable
from core.request import Request
from router.state import Instance, InstanceKey, Snapshot

NOBODY: frozenset[InstanceKey] = frozenset()


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where to serve one attempt. `prefill` is None when `decode` does it all.

    `ttft_s` and `tpot_s` are what the policy expects; `why` says in words what decided.
    """

    prefill: Instance | None
    decode: Instance
    ttft_s: float
    tpot_s: float
    why: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """Nobody can take the request now. `retry_after_s` is set when full queues are the reason, None when nobody lives."""

    reason: str
    retry_after_s: float | None = None

    def error(self) -> Overloaded | Unavailable:
        if self.retry_after_s is None:
            return Unavailable(self.reason)
        return Overloaded(self.reason, self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Hold:
    """Somebody could take the request, but had better not be given it yet: it is to wait in the gateway, and what is due first is
    asked about first. `retry_after_s` is what a client is told when no more may wait there."""

    reason: str
    retry_after_s: float

    def error(self) -> Overloaded:
        return Overloaded(self.reason, self.retry_after_s)


Decision = Assignment | Hold | Rejection


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be placed: a request, of which earlier attempts have generated `delivered` tokens. The next one reads them as if
    they were of the prompt."""

    request: Request
    delivered: int = 0

    @property
    def tokens(self) -> int:
        """To read before the next one can be drawn."""
        return len(self.request.prompt) + self.delivered

    @property
    def max_context_tokens(self) -> int:
        return self.request.max_context_tokens


class RoutingPolicy(Protocol):
    def assign(self, demand: Demand, snapshot: Snapshot, avoid: frozenset[InstanceKey] = NOBODY) -> Decision:
        """Choose where it is prefilled and decoded."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The instances that a request may use, before load is looked at.

    `local` instances may prefill and decode it alone; `decode` ones need one of `prefill` of the same kind.
    """

    prefill: list[Instance]
    decode: list[Instance]
    local: list[Instance]


def candidates(demand: Demand, snapshot: Snapshot, avoid: frozenset[InstanceKey], local_prefill_tokens: int) -> Candidates:
    """Who may serve the request: a mixed instance on its own or as either side; a decode instance on its own when the
    prompt is short or no live instance can prefill for it."""
    context, prompt = demand.max_context_tokens, demand.tokens
    short = prompt <= local_prefill_tokens
    decoders = [item for item in _allowed(snapshot.decode, avoid) if context <= item.capacity_tokens]
    prefillers = [item for item in _allowed(snapshot.prefill, avoid) if prompt <= item.capacity_tokens]
    kinds = {item.kind for item in prefillers}
    local = [item for item in decoders if item.role is Role.MIXED or short or item.kind not in kinds]
    if short:
        return Candidates([], [], local)
    return Candidates(prefillers, [item for item in decoders if item.kind in kinds], local)


def nobody(demand: Demand, snapshot: Snapshot, avoid: frozenset[InstanceKey]) -> Rejection:
    """The refusal for a request without any candidate."""
    if not snapshot.decode:
        return Rejection("no live instance can decode")
    if not any(demand.max_context_tokens <= item.capacity_tokens for item in snapshot.decode):
        return Rejection(f"no live instance has room for a context of {demand.max_context_tokens} tokens")
    tried = sorted(f"{name}/{incarnation}" for name, incarnation in avoid)
    return Rejection(f"every instance that could serve the request has failed it: {', '.join(tried)}")


def _allowed(instances: Iterable[Instance], avoid: frozenset[InstanceKey]) -> Iterable[Instance]:
    return [item for item in instances if item.key not in avoid] if avoid else instances

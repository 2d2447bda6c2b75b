"""The attempts that a gateway waits for: who may send their tokens, what is still missing, and whom to remind of that.

    open ──▶ (young) ──▶ listed in `Keep`s ──tokens──▶ done, dropped
                             │ a later position came first
                             ▼
                            gap ──asked for again──▶ closed, or lost after a lease

Each worker of an attempt is told several times a lease that its tokens are wanted, and from which position on. It sends again
what did not arrive, answers `Failed` for what it does not have, and ends what it is no longer asked for: so a lost `Submit`,
`Tokens`, `Failed` or `Cancel` holds nobody for longer than a lease, and a gateway that dies is not worked for for longer.

Invariants:
- An attempt is listed for its decode worker until it is dropped, for its prefill worker until a token of the decode worker was
  read: from then on prefill has nothing left that anybody misses.
- A young attempt is not listed: `Keep` and `Submit` travel over two connections, and one must not overtake the other.
- A gap that has been asked for in vain for a lease is a loss.

Pure but for the readers that it looks at; times are the caller's. Neighbour: `gateway.serving.pump`, in whose thread it lives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from core.messages import Address, Keep, Wanted
from gateway.text.token_reader import Delta, TokenReader

PER_LEASE = 5
"""The first `Keep` of an attempt comes up to two periods after it is opened: two more may be lost within the lease."""
ASKED_PER_LEASE = 20
"""How often a gap is asked for while it is young: it holds up a stream. Later the usual rounds do."""
MOST_WANTED = 1024
"""In one message, well below what the wire takes."""


@dataclass(slots=True)
class Awaited:
    """One open attempt, whose first token is at output position `begin`. `prefill`, which makes that one, is None when `decode`
    does it all. `decoding` once a token of `decode` was read."""

    reader: TokenReader
    decode: Address
    prefill: Address | None
    opened_s: float
    begin: int = 0
    decoding: bool = False
    gap_since_s: float | None = None

    def serves(self, worker: Address) -> bool:
        """Whether tokens of this very incarnation, at this very mailbox, count."""
        return worker in (self.decode, self.prefill)

    @property
    def wanted(self) -> Iterable[tuple[Address, int]]:
        """Who may still have something that is missing, and from which position on: of what the decode worker sent ahead of
        prefill's token, nothing is."""
        if self.decoding or self.prefill is None:
            return ((self.decode, self.reader.next_position),)
        return ((self.decode, self.reader.missing_from(self.begin + 1)), (self.prefill, self.reader.next_position))


class AwaitedAttempts:
    """Open attempts by id.

    Args:
        gateway: who asks.
        lease_s: how long workers go on with what nobody asks for.
    """

    def __init__(self, gateway: Address, lease_s: float, now_s: float) -> None:
        self._gateway = gateway
        self._lease_s = lease_s
        self._period_s = lease_s / PER_LEASE
        self._patience_s = lease_s / ASKED_PER_LEASE
        self._attempts: dict[str, Awaited] = {}
        self._gaps: set[str] = set()
        self._kept_s = now_s
        self._asked_s = now_s

    def __len__(self) -> int:
        return len(self._attempts)

    @property
    def tick_s(self) -> float:
        """How often to ask for `keeps` at least."""
        return self._patience_s / 2

    def open(self, attempt: str, awaited: Awaited) -> None:
        self._attempts[attempt] = awaited

    def drop(self, attempt: str) -> None:
        self._attempts.pop(attempt, None)
        self._gaps.discard(attempt)

    def find(self, attempt: str, worker: Address) -> Awaited | None:
        """The attempt's awaited, if it is open and `worker` serves it."""
        awaited = self._attempts.get(attempt)
        return awaited if awaited is not None and awaited.serves(worker) else None

    def took(self, attempt: str, delta: Delta | None, now_s: float) -> None:
        """The reader of an open attempt took something in, and made `delta` of it."""
        awaited = self._attempts[attempt]
        if delta is not None and delta.worker == (awaited.decode.name, awaited.decode.incarnation):
            awaited.decoding = True
        if not awaited.reader.gap:
            awaited.gap_since_s = None
            self._gaps.discard(attempt)
        elif awaited.gap_since_s is None:
            awaited.gap_since_s = now_s
            self._gaps.add(attempt)

    def lost(self, now_s: float) -> list[str]:
        """Attempts with a gap that nobody will close."""
        return [attempt for attempt in self._gaps if self._gap_age_s(attempt, now_s) > self._lease_s]

    def keeps(self, now_s: float) -> list[tuple[Address, Keep]]:
        """What to send now, to whom: all attempts when it is time, those with a gap in between."""
        if now_s - self._kept_s >= self._period_s:
            listed = [
                attempt
                for attempt, awaited in self._attempts.items()
                if now_s - awaited.opened_s >= self._period_s or attempt in self._gaps
            ]
            self._kept_s = now_s
        elif self._gaps and now_s - self._asked_s >= self._patience_s:
            young = (attempt for attempt in self._gaps if self._gap_age_s(attempt, now_s) < self._period_s)
            listed = [attempt for attempt in young if self._gap_age_s(attempt, now_s) >= self._patience_s]
        else:
            return []
        if listed:
            self._asked_s = now_s
        return self._messages(listed)

    def _messages(self, attempts: Iterable[str]) -> list[tuple[Address, Keep]]:
        wanted: dict[Address, list[Wanted]] = {}
        for attempt in attempts:
            awaited = self._attempts[attempt]
            for worker, position in awaited.wanted:
                wanted.setdefault(worker, []).append(Wanted(attempt, position))
        return [
            (worker, Keep(gateway=self._gateway, wanted=tuple(items[start : start + MOST_WANTED])))
            for worker, items in wanted.items()
            for start in range(0, len(items), MOST_WANTED)
        ]

    def _gap_age_s(self, attempt: str, now_s: float) -> float:
        since_s = self._attempts[attempt].gap_since_s
        return 0.0 if since_s is None else now_s - since_s

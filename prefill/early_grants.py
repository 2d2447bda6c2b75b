"""Grants that overtook their `Submit`: gateway and decode side speak to a prefill worker over different connections."""

from __future__ import annotations

from core.clock import Clock
from core.messages import Grant

CAPACITY = 4096


class EarlyGrants:
    """Keeps up to `CAPACITY` grants, each for one lease; past that the decode side's own lease ends the attempt."""

    def __init__(self, clock: Clock, lease_s: float) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._grants: dict[str, tuple[float, Grant]] = {}

    def __len__(self) -> int:
        return len(self._grants)

    def put(self, grant: Grant) -> None:
        if len(self._grants) < CAPACITY:
            self._grants[grant.attempt] = (self._clock.now() + self._lease_s, grant)

    def take(self, attempt: str) -> Grant | None:
        kept = self._grants.pop(attempt, None)
        return kept[1] if kept is not None and kept[0] > self._clock.now() else None

    def sweep(self) -> None:
        """Forget the expired. Grants are kept in order of arrival, so only the oldest need a look."""
        now_s = self._clock.now()
        while self._grants:
            attempt, (until_s, _) = next(iter(self._grants.items()))
            if until_s > now_s:
                return
            del self._grants[attempt]

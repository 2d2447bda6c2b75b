"""What a peer said of attempts whose `Submit` has not come yet: gateway and peer speak to a worker over different ways."""

from __future__ import annotations

from collections import OrderedDict

from core.attempts import Phase
from core.clock import Clock
from core.messages import Address

CAPACITY = 4096

Said = tuple[Address, int, Phase]
"""Who said it, in which of its renewals, and what."""


class EarlyStates:
    """Keeps the newest word on each of up to `CAPACITY` attempts for a lease. What is forgotten is said again soon."""

    def __init__(self, clock: Clock, lease_s: float) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._said: OrderedDict[str, tuple[float, Said]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._said)

    def put(self, attempt: str, said: Said) -> None:
        before = self._said.get(attempt)
        if before is not None and before[1][0] == said[0] and before[1][1] >= said[1]:
            return
        self._said[attempt] = (self._clock.now() + self._lease_s, said)
        self._said.move_to_end(attempt)
        if len(self._said) > CAPACITY:
            self._said.popitem(last=False)

    def take(self, attempt: str) -> Said | None:
        kept = self._said.pop(attempt, None)
        return kept[1] if kept is not None and kept[0] > self._clock.now() else None

    def sweep(self) -> None:
        """Forget the expired, oldest first."""
        now_s = self._clock.now()
        while self._said:
            attempt, (until_s, _) = next(iter(self._said.items()))
            if until_s > now_s:
                return
            del self._said[attempt]

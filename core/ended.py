"""What an instance remembers of attempts that are over: not to begin them twice, and to say their end again to who missed it.

An end is remembered for a lease after it was last asked about, so that whoever still lists the attempt is answered, and no
longer: then nobody holds anything for it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from core.clock import Clock
from core.messages import Failed
from core.tail import Tail

CAPACITY = 65_536
"""Beyond it the longest unasked are forgotten: a gateway that asks about one hears that it is lost, and tries anew."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended here.

    Attributes:
        reason: for the other half.
        failed: what the gateway was told, if it was.
        tail: tokens that the gateway may lack.
        delivered: the other half has all that it needs of this one. That it still lists the attempt means only that it has not
            seen so yet: to be told that it is over here would end it there.
        at_s: when it ended.
    """

    reason: str
    failed: Failed | None = None
    tail: Tail | None = None
    delivered: bool = False
    at_s: float = 0.0


class EndedAttempts:
    """Bounded in time and in number."""

    def __init__(self, clock: Clock, lease_s: float, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._capacity = capacity
        self._ended: OrderedDict[str, tuple[float, Ended]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ended)

    def remember(self, attempt: str, ended: Ended) -> None:
        self._ended[attempt] = (self._clock.now() + self._lease_s, ended)
        self._ended.move_to_end(attempt)
        while len(self._ended) > self._capacity:
            self._ended.popitem(last=False)

    def ask(self, attempt: str) -> Ended | None:
        """How it ended, if that is remembered; it then is for another lease."""
        found = self._ended.get(attempt)
        if found is None:
            return None
        self.remember(attempt, found[1])
        return found[1]

    def sweep(self) -> None:
        now_s = self._clock.now()
        while self._ended:
            attempt, (until_s, _) = next(iter(self._ended.items()))
            if until_s > now_s:
                return
            del self._ended[attempt]

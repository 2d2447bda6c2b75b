"""Tokens of one attempt that its gateway may not have: kept to be sent again, until a `Keep` says that they arrived.

A message on its way is not lost. So what is sent again is what was emitted before the *last* `Keep` came and what this one still
asks for: it has had the time between two of them to arrive. And a way on which nothing arrives, however often it is sent, is
no way: after some repetitions in vain the attempt is better tried elsewhere.
"""

from __future__ import annotations

from collections import deque

from core.messages import TokenItem

MOST_REPEATS = 6
"""In a row, without one token that arrives. Of `Keep`s a lease apart by a third, two leases."""


class Tail:
    """In order of position, without gaps. Bounded by what an engine writes in a lease, because attempts that no `Keep` asks
    about for so long are ended."""

    def __init__(self) -> None:
        self._items: deque[TokenItem] = deque()
        self._next = 0
        self._due = 0
        self._asked = -1
        self._repeats = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def in_vain(self) -> bool:
        """Whether the tokens do not reach the gateway, as far as one can tell."""
        return self._repeats >= MOST_REPEATS

    def add(self, item: TokenItem) -> None:
        """It is being sent for the first time."""
        self._items.append(item)
        self._next = item.position + len(item.tokens)

    def asked(self, position: int) -> tuple[TokenItem, ...]:
        """The gateway has all before `position`: what to send again."""
        while self._items and self._items[0].position + len(self._items[0].tokens) <= position:
            self._items.popleft()
        again = tuple(item for item in self._items if item.position < self._due)
        self._due = self._next
        self._repeats = self._repeats + 1 if again and position <= self._asked else 0
        self._asked = max(self._asked, position)
        return again

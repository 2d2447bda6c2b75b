"""Tokens of one attempt that its gateway may not have: kept to be sent again, until a `Keep` says that they arrived.

A message on its way is not lost. So what is sent again is what was emitted before the *last* `Keep` came and what this one still
asks for: it has had the time between two of them to arrive.
"""

from __future__ import annotations

from collections import deque

from core.messages import TokenItem


class Tail:
    """In order of position, without gaps. Bounded by what an engine writes in a lease, because attempts that no `Keep` asks
    about for so long are ended."""

    def __init__(self) -> None:
        self._items: deque[TokenItem] = deque()
        self._next = 0
        self._due = 0

    def __len__(self) -> int:
        return len(self._items)

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
        return again

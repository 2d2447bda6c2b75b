"""Tokens of one attempt that its gateway may not have: kept to be sent again, until a `Keep` says that they arrived.

A message on its way is not lost. So what is sent again is what was emitted before the *last* `Keep` came and what this one still
asks for: it has had the time between two of them to arrive. And a way on which nothing arrives, however often it is sent, is
no way: after some time of that the attempt is better tried elsewhere.
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
        self._asked = -1
        self._repeating_s: float | None = None

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: TokenItem) -> None:
        """It is being sent for the first time."""
        self._items.append(item)
        self._next = item.position + len(item.tokens)

    def asked(self, position: int, now_s: float) -> tuple[TokenItem, ...]:
        """The gateway has all before `position`: what to send again."""
        while self._items and self._items[0].position + len(self._items[0].tokens) <= position:
            self._items.popleft()
        again = tuple(item for item in self._items if item.position < self._due)
        self._due = self._next
        if not again or position > self._asked:
            self._repeating_s = None
        elif self._repeating_s is None:
            self._repeating_s = now_s
        self._asked = max(self._asked, position)
        return again

    def repeating_for_s(self, now_s: float) -> float:
        """How long the same tokens have been sent again and again, and none has arrived."""
        return 0.0 if self._repeating_s is None else now_s - self._repeating_s

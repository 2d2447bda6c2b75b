"""Sequences that wait for blocks, in the order in which they are to be admitted.

By default that is the order of arrival, and a preempted sequence keeps its place in it. A `key` puts something before
arrival, for instance a deadline. Neighbour: `engine.scheduler`, which alone decides when the head is admitted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any

from engine.sequence import Sequence

OrderKey = Callable[[Sequence], Any]
"""Smaller is earlier. Read once, when a sequence enters the queue; ties go by arrival."""


class WaitingQueue:
    """A priority queue that any member can leave: O(log n) to enter and to leave, O(1) to look at the head."""

    def __init__(self, key: OrderKey | None = None) -> None:
        self._key = key
        self._heap: list[tuple[Any, int, Sequence]] = []
        self._members: dict[str, Sequence] = {}
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        """Members in no particular order."""
        return iter(list(self._members.values()))

    @property
    def tokens(self) -> int:
        """Tokens of all members together."""
        return self._tokens

    def push(self, sequence: Sequence, arrival: int) -> None:
        """`arrival` is unique among members."""
        priority = self._key(sequence) if self._key else 0
        heapq.heappush(self._heap, (priority, arrival, sequence))
        self._members[sequence.sequence_id] = sequence
        self._tokens += len(sequence.tokens)

    def head(self) -> Sequence | None:
        self._drop_stale()
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Remove and return the head. Raises IndexError when empty."""
        self._drop_stale()
        sequence = heapq.heappop(self._heap)[2]
        self._leave(sequence)
        return sequence

    def remove(self, sequence_id: str) -> bool:
        """False if it is not a member. Its heap entry goes when it surfaces, or when such entries are the majority."""
        sequence = self._members.get(sequence_id)
        if sequence is None:
            return False
        self._leave(sequence)
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if self._is_member(entry[2])]
            heapq.heapify(self._heap)
        return True

    def _leave(self, sequence: Sequence) -> None:
        del self._members[sequence.sequence_id]
        self._tokens -= len(sequence.tokens)

    def _drop_stale(self) -> None:
        while self._heap and not self._is_member(self._heap[0][2]):
            heapq.heappop(self._heap)

    def _is_member(self, sequence: Sequence) -> bool:
        return self._members.get(sequence.sequence_id) is sequence

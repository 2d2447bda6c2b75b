"""Claims on blocks, in the order in which they are to be served: prompts to be read here, and reservations for KV that is read
elsewhere.

That order is the same on all engines of a cluster, so that two of them never wait for each other (docs/adr/0012). Neighbour:
`engine.scheduler`, which alone decides who is served.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.sequence import Sequence, Status

Order = tuple[int, str, int]
"""Smaller is older: by ticket, which gateways give; by name among equal tickets, because arrivals differ from engine to engine;
by arrival among those that have no ticket (0)."""


def order_of(sequence: Sequence, arrival: int) -> Order:
    return sequence.ticket, sequence.sequence_id if sequence.ticket else "", arrival


class WaitingQueue:
    """A sorted list that any member can leave: O(log n) comparisons to enter and to leave, O(1) to look at one by its place."""

    def __init__(self) -> None:
        self._sorted: list[tuple[Order, Sequence]] = []
        self._order_of: dict[str, Order] = {}
        self._tokens = 0
        self._reservations = 0

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[Sequence]:
        """Members, oldest first."""
        return iter([sequence for _, sequence in self._sorted])

    @property
    def tokens(self) -> int:
        """Tokens of all members together."""
        return self._tokens

    @property
    def reservations(self) -> int:
        """How many members wait for nothing but blocks, because their KV comes from elsewhere."""
        return self._reservations

    def push(self, sequence: Sequence, order: Order) -> None:
        """`order` is unique among members, and so is the sequence's id."""
        insort(self._sorted, (order, sequence), key=_order)
        self._order_of[sequence.sequence_id] = order
        self._tokens += len(sequence.tokens)
        self._reservations += sequence.incoming

    def at(self, place: int) -> Sequence | None:
        """The member with so many older ones; None if there are not as many."""
        return self._sorted[place][1] if place < len(self._sorted) else None

    def remove(self, sequence_id: str) -> bool:
        """False if it is not a member."""
        order = self._order_of.pop(sequence_id, None)
        if order is None:
            return False
        _, sequence = self._sorted.pop(bisect_left(self._sorted, order, key=_order))
        self._tokens -= len(sequence.tokens)
        self._reservations -= sequence.incoming
        return True

    def check(self) -> list[str]:
        """Every violated invariant, in words."""
        wrong = [f"{member.sequence_id} waits with blocks" for member in self if member.tables]
        wrong += [f"{member.sequence_id} waits pinned" for member in self if member.pinned]
        wrong += [
            f"{member.sequence_id} waits though {member.status.value}" for member in self if member.status is not Status.WAITING
        ]
        orders = [order for order, _ in self._sorted]
        if orders != sorted(orders) or sorted(orders) != sorted(self._order_of.values()):
            wrong.append(f"the queue is out of order: {orders}")
        counted = self._tokens, self._reservations
        actual = sum(len(member.tokens) for member in self), sum(member.incoming for member in self)
        if counted != actual:
            wrong.append(f"waiting tokens and reservations are {actual} but counted as {counted}")
        return wrong


def _order(entry: tuple[Order, Sequence]) -> Order:
    return entry[0]

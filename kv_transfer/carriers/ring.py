"""Who may touch which slot of a shared memory: the accounts of its two ends. Pure; each end's lock guards its own.

    free ──claim──▶ held ──ship──▶ shipped ═══ (number, slot) ═══▶ taken ──release──▶ done
      ▲ ◀─discard──┘                  │                                                │
      └───────────── freed ◀══════════╧═══════ how many are done ══════════════════════╛

One producer, one consumer. Shipped payloads are numbered from 0 and taken and released in that order, so that one count says
which slots come back, and a late count stands for the earlier ones. A slot is written only while it is held and read only
while it is taken; between the two a message has crossed. Slots that were used last are used next: they are in the cache, and a
pair that never has much under way touches few.
"""

from __future__ import annotations

from collections import deque

from core.errors import CorruptTransfer


class ProducerSlots:
    def __init__(self, slots: int) -> None:
        self._free = list(reversed(range(slots)))
        self._held: set[int] = set()
        self._shipped: deque[int] = deque()
        self._freed = 0

    def claim(self) -> int | None:
        """A slot to fill, or None until some are freed."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._held.add(slot)
        return slot

    def ship(self, slot: int) -> int:
        """A held slot is the consumer's now; the payload's number."""
        self._held.remove(slot)
        self._shipped.append(slot)
        return self._freed + len(self._shipped) - 1

    def discard(self, slot: int) -> None:
        """A held slot is free again."""
        self._held.remove(slot)
        self._free.append(slot)

    def freed(self, done: int) -> None:
        """The consumer is done with all payloads before number `done`. Raises CorruptTransfer if it cannot be."""
        if not self._freed < done <= self._freed + len(self._shipped):
            under_way = f"({self._freed}, {self._freed + len(self._shipped)}]"
            raise CorruptTransfer(f"Got word that {done} payloads are done but expected a count in {under_way}")
        while self._freed < done:
            self._free.append(self._shipped.popleft())
            self._freed += 1


class ConsumerSlots:
    """`every` is how many payloads a note stands for: the producer hears late, but before it can have run out of slots if it
    holds no more than `slots - every` of them itself."""

    def __init__(self, slots: int, every: int) -> None:
        self._slots = slots
        self._every = every
        self._taken: deque[tuple[int, int]] = deque()
        self._next = 0
        self._done = 0
        self._told = 0

    def take(self, number: int, slot: int) -> None:
        """A payload has arrived. Numbers may be missing: what was lost on the way is for its session to notice.

        Raises:
            CorruptTransfer: it came before, or late, so that its slot is not ours (any more); or there is no such slot, or
                it is still being read.
        """
        if number < self._next:
            raise CorruptTransfer(f"Got payload {number} again, or late: expected {self._next}")
        if slot >= self._slots or any(slot == taken for _, taken in self._taken):
            raise CorruptTransfer(f"Got payload {number} in slot {slot}, which is not the sender's to fill")
        self._taken.append((number, slot))
        self._next = number + 1

    def release(self) -> int | None:
        """Done with the oldest that was taken. How many are done, if the producer is to be told now."""
        number, _ = self._taken.popleft()
        self._done = number + 1
        if self._done - self._told < self._every:
            return None
        self._told = self._done
        return self._told

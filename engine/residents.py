"""Those who have blocks, by what they do with them.

    running    computed in each step, or its next chunk waits for its turn
    leaving    running, but the last token is being drawn by a launched step
    held       read, its first token drawn: KV is kept for another engine
    reserved   KV comes in from another engine
    ready      KV has come in; waits for a place in the batch

Neighbour: `engine.scheduler`, which decides who goes where.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator

from engine.sequence import Sequence, Status
from engine.waiting_queue import Order


class Residents:
    """A place for each status that goes with blocks. `order` tells a resident's age; `running` and `ready` are to be read only,
    the former sorted by it."""

    def __init__(self, order: Callable[[Sequence], Order]) -> None:
        self._order = order
        self.running: list[Sequence] = []
        self.ready: dict[str, Sequence] = {}
        self._leaving: dict[str, Sequence] = {}
        self._reserved: dict[str, Sequence] = {}
        self._held: dict[str, Sequence] = {}
        self._places = {Status.READY: self.ready, Status.RESERVED: self._reserved, Status.HELD: self._held}

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self._leaving.values()
        yield from self._held.values()
        yield from self._reserved.values()
        yield from self.ready.values()

    def enter(self, sequence: Sequence, status: Status) -> None:
        """A sequence that is nowhere here takes its place."""
        sequence.status = status
        if status is Status.RUNNING:
            insort(self.running, sequence, key=self._order)
        else:
            self._places[status][sequence.sequence_id] = sequence

    def leave(self, sequence: Sequence) -> None:
        """Out of wherever it is. Its status stays what it was."""
        if sequence.status is not Status.RUNNING:
            del self._places[sequence.status][sequence.sequence_id]
        elif self._leaving.pop(sequence.sequence_id, None) is None:
            self.running.remove(sequence)

    def retire(self, sequences: Iterable[Sequence]) -> None:
        """Their last token is being drawn."""
        leaving = {sequence.sequence_id: sequence for sequence in sequences}
        self._leaving.update(leaving)
        self.running = [sequence for sequence in self.running if sequence.sequence_id not in leaving]

    def active(self) -> list[Sequence]:
        """A snapshot of those who run, or could but for the size of the batch."""
        return [*list(self.running), *list(self._leaving.values()), *list(self.ready.values())]

    def kept(self) -> list[Sequence]:
        """A snapshot of those who only keep blocks: held and reserved."""
        return [*list(self._held.values()), *list(self._reserved.values())]

    def writers(self) -> Iterator[Sequence]:
        """Those who will want more blocks: they write tokens here, or will."""
        yield from (sequence for sequence in self.running if not sequence.hold)
        yield from self.ready.values()
        yield from self._reserved.values()

    def decoding(self) -> Iterator[Sequence]:
        """Those who may be recomputed instead: no transfer uses their blocks."""
        yield from (sequence for sequence in self.running if not sequence.hold)
        yield from self.ready.values()

    def unpinned(self) -> Iterator[Sequence]:
        """Prompts for which no other engine has room yet."""
        for place in (self.running, self._held.values()):
            yield from (sequence for sequence in place if sequence.hold and not sequence.pinned)

    def stand_still(self) -> bool:
        """Whether nobody here computes, and nobody will free blocks before another engine gives somebody room."""
        if self.running or self._leaving or self._reserved or self.ready:
            return False
        return not any(sequence.pinned for sequence in self._held.values())

    def check(self) -> list[str]:
        """Every violated invariant, in words."""
        wrong = []
        for status, place in self._places.items():
            wrong += [line for sequence in place.values() for line in _check(sequence, status)]
        for sequence in (*self.running, *self._leaving.values()):
            wrong += _check(sequence, Status.RUNNING)
        if [*self.running] != sorted(self.running, key=self._order):
            wrong.append("those who run are out of order")
        return wrong


def _check(sequence: Sequence, status: Status) -> list[str]:
    """What is wrong with a sequence in the place for that status."""
    name, wrong = sequence.sequence_id, []
    if sequence.status is not status or not sequence.tables:
        wrong.append(f"{name} is {sequence.status.value} with tables {sequence.tables} where {status.value} ones are")
    if sequence.incoming != (status is Status.RESERVED):
        wrong.append(f"{name} is {status.value}, which does not go with {sequence.incoming = }")
    if (sequence.hold and status not in (Status.RUNNING, Status.HELD)) or (status is Status.HELD and not sequence.hold):
        wrong.append(f"{name} is {status.value}, which does not go with {sequence.hold = }")
    if sequence.pinned and not sequence.hold:
        wrong.append(f"{name} is pinned, but nobody waits for its KV")
    return wrong

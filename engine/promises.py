"""Blocks that sequences will need as their windows move on, and that nobody else may be given until then.

The groups of layers with a window take their blocks as tokens are computed and give them back as the window leaves them. So that
this can never fail, a sequence is *promised*, when it is admitted, as many blocks as it may have in these groups at once with the
tokens that it has. One that writes tokens is promised more before it has more, or gives up its blocks, as in other groups.

    outstanding = what is promised to all - settled
    settled     = blocks that groups with a window own and that would be free if their owners let go of them

Invariant: at least `outstanding` blocks are free. Taking a block settles one and leaves one fewer free; giving one back does
the opposite; admission sees to the rest. A block that several own counts once: whoever lets go of it first will need another.
One that also cools for a step in flight does not count: if its owners let go of it now, it would not be free. So whoever has
less than he was promised finds a free block.

Neighbour: `engine.block_manager`, which tells of every change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from core.groups import NO_BLOCK
from engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Promise:
    """What one sequence is promised. `first[i]` is the first block that the i-th group with a window still has; `decodes` once
    it computes one token a step and is promised less than before."""

    blocks: int
    first: list[int]
    decodes: bool


class Promises:
    """The counts of one engine. All are 0 where no group has a window."""

    def __init__(self) -> None:
        self.outstanding = 0
        self._of: dict[Sequence, Promise] = {}
        self._cooling: Counter[int] = Counter()

    def of(self, sequence: Sequence) -> Promise:
        return self._of[sequence]

    def blocks_of(self, sequence: Sequence) -> int:
        """How many blocks it is promised, 0 if nothing."""
        promise = self._of.get(sequence)
        return 0 if promise is None else promise.blocks

    def make(self, sequence: Sequence, promise: Promise) -> None:
        self._of[sequence] = promise
        self.outstanding += promise.blocks

    def add(self, sequence: Sequence, blocks: int) -> None:
        """Promise so many more."""
        self._of[sequence].blocks += blocks
        self.outstanding += blocks

    def lower(self, promise: Promise, blocks: int) -> int:
        """Promise so many from now on, at least as many as it has. Returns by how many fewer."""
        less = max(0, promise.blocks - blocks)
        promise.blocks -= less
        self.outstanding -= less
        return less

    def end(self, sequence: Sequence) -> int:
        """It needs nothing any longer. Returns how many blocks it was promised."""
        promise = self._of.pop(sequence, None)
        return 0 if promise is None else self.lower(promise, 0)

    def taken(self) -> None:
        """A group with a window has a block that was free."""
        self.outstanding -= 1

    def freed(self, blocks: int) -> None:
        """So many blocks that were settled are free."""
        self.outstanding += blocks

    def cool(self, blocks: Iterable[int]) -> None:
        """One of the owners of each is gone, but for a step in flight."""
        for block in blocks:
            self.outstanding += self._cooling[block] == 0
            self._cooling[block] += 1

    def cooled(self, blocks: Iterable[int], references: Sequences[int]) -> None:
        """The step is collected. What somebody owns still, and no longer cools, is settled again."""
        for block in blocks:
            self._cooling[block] -= 1
            if self._cooling[block] == 0:
                del self._cooling[block]
                self.outstanding -= references[block] > 0

    def check(self, groups: Iterable[int], owners: Iterable[Sequence], free_blocks: int) -> list[str]:
        """Every violated invariant, in words; `groups` are the indexes of those with a window."""
        wrong = []
        groups, settled = list(groups), set[int]()
        live = {owner for owner in owners if owner.tables and groups}
        for owner in live:
            owned = [block for group in groups for block in owner.tables[group] if block != NO_BLOCK]
            settled.update(block for block in owned if self._cooling[block] == 0)
            if owner not in self._of or len(owned) > self._of[owner].blocks:
                wrong.append(f"{owner.sequence_id} has {len(owned)} blocks but was promised {self.blocks_of(owner)}")
        if self._of.keys() - live:
            wrong.append(f"{len(self._of.keys() - live)} are promised blocks who own nothing")
        outstanding = sum(promise.blocks for promise in self._of.values()) - len(settled)
        if outstanding != self.outstanding:
            wrong.append(f"{outstanding} promised blocks are outstanding but {self.outstanding} were counted")
        if not 0 <= outstanding <= free_blocks:
            wrong.append(f"{outstanding} promised blocks are outstanding but {free_blocks} are free")
        return wrong

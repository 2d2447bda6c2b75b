"""Blocks, and how many own each.

A block is in exactly one of three places:

    free ──take──▶ owned (references > 0) ──last owner releases──▶ cached (references = 0, still found by its content)
      ▲                   └── never found by content ──▶ free            │  ▲
      └──────────────── evicted, least recently used first ─────────────┘  └─ shared again: owned

Neighbour: `engine.block_manager`, which knows the owners.
"""

from __future__ import annotations

from collections import OrderedDict

from engine.contents import Contents


class BlockPool:
    """All blocks of one engine. `references[block]` is for others to read only."""

    def __init__(self, contents: Contents) -> None:
        num_blocks = len(contents.name_of)
        self.references = [0] * num_blocks
        self._contents = contents
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody owns, the evictable ones among them."""
        return len(self._free) + len(self._cached)

    def take(self) -> int:
        """A free block, for one owner. If all are cached, the one that was used least recently is forgotten."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._contents.forget(block)
        self.references[block] = 1
        return block

    def share(self, block: int) -> bool:
        """One owner more of a block with known content. Whether it was free."""
        idle = self.references[block] == 0
        if idle:
            del self._cached[block]
        self.references[block] += 1
        return idle

    def release(self, block: int) -> bool:
        """One owner fewer. Whether it is free now."""
        self.references[block] -= 1
        if self.references[block] > 0:
            return False
        if self._contents.name_of[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None
        return True

    def forget(self, block: int) -> None:
        """Nobody is to find it by its content any longer."""
        self._contents.forget(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def check(self, owners: list[int]) -> list[str]:
        """Every violated invariant, in words; `owners[block]` is how many there are."""
        free, wrong = set(self._free), []
        if len(free) != len(self._free):
            wrong.append("a block is free twice")
        for block, count in enumerate(owners):
            if self.references[block] != count:
                wrong.append(f"block {block} has {self.references[block]} references but {count} owners")
            cached, name = block in self._cached, self._contents.name_of[block]
            if (count > 0) + (block in free) + cached != 1:
                wrong.append(f"block {block} must be one of owned ({count}), free ({block in free}) or cached ({cached})")
            if name is None and cached:
                wrong.append(f"block {block} is cached under no hash")
            if name is not None and block in free:
                wrong.append(f"block {block} is free, but has a hash")
        return wrong + self._contents.check()

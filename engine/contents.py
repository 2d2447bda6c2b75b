"""Which block holds what: full blocks of computed tokens, found by the hash of all tokens up to their end.

Groups of layers hold different KV of the same tokens, so a block is found by its group as well. Keeping blocks under a chain
of hashes is what vLLM's and SGLang's prefix caches do. Neighbours: `core.prefix` defines the hashes, `engine.block_pool` has the
blocks.
"""

from __future__ import annotations

from core.prefix import block_hash, root_hash
from engine.sequence import Sequence


class Contents:
    """An index of one engine's blocks.

    Attributes:
        name_of: for each block, under what it is found; None if it is not.
        added: how many blocks became findable, ever.
    """

    def __init__(self, num_blocks: int, block_size: int, groups: int) -> None:
        self.name_of: list[bytes | None] = [None] * num_blocks
        self.added = 0
        self._block_size = block_size
        self._block_of: dict[bytes, int] = {}
        self._marks = [bytes([group]) if group else b"" for group in range(groups)]  # hashes are of one length

    def __len__(self) -> int:
        """How many blocks can be found."""
        return len(self._block_of)

    def __contains__(self, name: bytes) -> bool:
        return name in self._block_of

    def name(self, sequence: Sequence, group: int, index: int) -> bytes:
        """Under what the `index`-th block of a sequence is found."""
        hashes, size = sequence.block_hashes, self._block_size
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else root_hash(sequence.salt)
            start = len(hashes) * size
            hashes.append(block_hash(parent, sequence.tokens[start : start + size]))
        return hashes[index] + self._marks[group]

    def find(self, name: bytes) -> int | None:
        return self._block_of.get(name)

    def run(self, sequence: Sequence, group: int, limit: int) -> list[int]:
        """Blocks of a sequence from the first on, at most `limit`, up to the first that cannot be found."""
        found: list[int] = []
        for index in range(limit):
            block = self._block_of.get(self.name(sequence, group, index))
            if block is None:
                break
            found.append(block)
        return found

    def add(self, name: bytes, block: int) -> None:
        """From now on `block` is found under `name`, unless it has a name or another has that one."""
        if self.name_of[block] is None and name not in self._block_of:
            self.name_of[block] = name
            self._block_of[name] = block
            self.added += 1

    def forget(self, block: int) -> None:
        """It is not to be found any longer."""
        name = self.name_of[block]
        if name is not None:
            del self._block_of[name]
            self.name_of[block] = None

    def check(self) -> list[str]:
        """Every violated invariant, in words."""
        wrong = [
            f"{name.hex()} names block {block}, which is not its"
            for name, block in self._block_of.items()
            if self.name_of[block] != name
        ]
        for block, name in enumerate(self.name_of):
            if name is not None and self._block_of.get(name) != block:
                wrong.append(f"block {block} has a hash that does not lead to it")
        return wrong

"""Which KV block belongs to whom: paged, reference-counted, and addressed by content for prefix reuse.

A block is in exactly one of three places:

    free ──allocate──▶ owned (references > 0) ──last owner frees──▶ cached (references = 0, still has a hash)
      ▲                        └── never hashed ──▶ free                 │  ▲
      └──────────────── evicted, least recently used first ──────────────┘  └─ matched again: owned

What is freed while a launched step may still read or write it *cools*: it stays owned, by nobody, until that step is collected.

Invariants:
- A block is hashed only when it is full and its tokens are computed. Only hashed blocks are ever shared, and nobody writes
  to them again, so there is no copy-on-write.
- A match never covers a whole sequence: at least one token is left to compute, because a token is drawn from its logits.
- Allocation and freeing are O(1) a block.

Paging is PagedAttention's idea (vLLM), keeping unreferenced blocks under a hash chain is that of vLLM's and SGLang's
prefix caches. Neighbours: `engine.scheduler` decides who gets blocks, `core.prefix` defines the hashes. No tensors here.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from core.prefix import block_hash, root_hash
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Fit:
    """What giving a sequence blocks for all its tokens would take.

    Attributes:
        matched: blocks of the longest cached prefix.
        lacking: how many more would have to be free. 0 if there is room.
        next_content: hash of the block that would have made the match longer; None if it is as long as it may be.
    """

    matched: list[int]
    lacking: int
    next_content: bytes | None


class BlockManager:
    """Owner of `num_blocks` blocks of `block_size` tokens each. `prefix_cache` turns reuse by content on."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"Got {num_blocks = }, {block_size = } but expected at least one of each")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.freed = 0
        self._cooling: dict[int, list[list[int]]] = {}
        self._collected = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody owns, the evictable ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def cooling_blocks(self) -> int:
        """Blocks that will be free once launched steps are collected; one that is shared counts for each who freed it."""
        return sum(len(blocks) for freed in self._cooling.values() for blocks in freed)

    @property
    def cached_blocks(self) -> int:
        """Blocks that can be found by content, owned or not."""
        return len(self._block_of)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate(self, sequence: Sequence, spare_blocks: int = 0) -> bool:
        """Give a sequence that owns nothing room for all its tokens, reusing the longest cached prefix. False, with nothing
        changed, unless at least `spare_blocks` blocks stay free."""
        fit = self.fit(sequence, spare_blocks)
        if fit.lacking == 0:
            self.give(sequence, fit.matched)
        return fit.lacking == 0

    def fit(self, sequence: Sequence, spare_blocks: int = 0) -> Fit:
        """Whether `allocate` would give a sequence blocks, and if not, why. Nothing changes."""
        if sequence.tables:
            raise ValueError(f"sequence {sequence.sequence_id} already owns {len(sequence.tables[0])} blocks")
        matched, next_content = self._match(sequence)
        fresh = self.blocks_for(len(sequence.tokens)) - len(matched)
        idle = sum(1 for block in matched if self._references[block] == 0)
        return Fit(matched, max(0, idle + fresh + spare_blocks - self.free_blocks), next_content)

    def give(self, sequence: Sequence, matched: list[int]) -> None:
        """Carry out a `fit` that lacks nothing, before anything else happens here.

        Sets `tables`, and `computed_tokens` to what the cache supplied.
        """
        for block in matched:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        fresh = self.blocks_for(len(sequence.tokens)) - len(matched)
        sequence.matched_blocks = len(matched)
        sequence.computed_tokens = sequence.launched_tokens = len(matched) * self.block_size
        sequence.tables = [matched + [self._take() for _ in range(fresh)]]

    def owners_in_the_way(self, sequence: Sequence, spare_blocks: int, owners: Iterable[Sequence]) -> list[Sequence]:
        """The first of `owners` that would have to be freed for `allocate` to succeed; none if freeing them all would not do.
        Blocks that they share with somebody else, or that the sequence itself matches, make no room."""
        fit = self.fit(sequence, spare_blocks)
        lacking, reused = fit.lacking, set(fit.matched)
        leaving: Counter[int] = Counter()
        chosen: list[Sequence] = []
        for owner in owners:
            if lacking <= 0:
                break
            chosen.append(owner)
            for block in owner.tables[0]:
                leaving[block] += 1
                lacking -= leaving[block] == self._references[block] and block not in reused
        return chosen if lacking <= 0 else []

    def is_cached(self, content: bytes) -> bool:
        """Whether a block of that hash can be found."""
        return content in self._block_of

    def grow(self, sequence: Sequence) -> bool:
        """Make sure that there is room for the KV of all tokens, pending ones too. False, with nothing changed, if there is
        not."""
        (table,) = sequence.tables
        missing = self.blocks_for(sequence.total_tokens) - len(table)
        if missing <= 0:
            return True
        if missing > self.free_blocks:
            return False
        table.extend(self._take() for _ in range(missing))
        return True

    def register(self, sequence: Sequence, first_token: int) -> None:
        """Make the full blocks among computed tokens `[first_token, computed_tokens)` findable by their content.

        A block whose content is already cached in another block stays private.
        """
        first, end = first_token // self.block_size, sequence.computed_tokens // self.block_size
        if not self.prefix_cache or first >= end:
            return
        self._extend_hashes(sequence, end)
        for index in range(first, end):
            block, content = sequence.tables[0][index], sequence.block_hashes[index]
            if self._hash_of[block] is None and content not in self._block_of:
                self._hash_of[block] = content
                self._block_of[content] = block

    def free(self, sequence: Sequence, keep_cached: bool = True) -> None:
        """Take back all that a sequence owns; what a step in flight may use cools first. With `keep_cached` False its content
        may be wrong, so nobody else will match what it wrote itself. A no-op on a sequence that owns nothing."""
        if not keep_cached:
            self._forget_doubtful(sequence)
        for table in sequence.tables:
            if sequence.last_step > self._collected:
                self._cooling.setdefault(sequence.last_step, []).append(table)
            else:
                self._release(table)
        sequence.tables = []
        sequence.matched_blocks = sequence.computed_tokens = sequence.launched_tokens = sequence.pending_tokens = 0
        sequence.tenancy += 1

    def collected(self, step: int) -> None:
        """All steps up to this one are done: what cooled until then is free."""
        self._collected = step
        for done in [other for other in self._cooling if other <= step]:
            for blocks in self._cooling.pop(done):
                self._release(blocks)

    def _release(self, blocks: list[int]) -> None:
        self.freed += len(blocks)
        # Last block first, so that eviction eats a prefix from its tail and keeps the part that most prompts share.
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def check(self, owners: Iterable[Sequence]) -> list[str]:
        """Every violated invariant, in words; `owners` are all live sequences. For tests and `/debug/invariants`."""
        tables = [(sequence.sequence_id, list(table)) for sequence in owners for table in sequence.tables]
        tables += [(f"gone at step {step}", blocks) for step, freed in self._cooling.items() for blocks in freed]
        counted = [0] * self.num_blocks
        places: dict[int, set[int]] = {}
        wrong: list[str] = []
        for name, table in tables:
            if len(set(table)) != len(table):
                wrong.append(f"sequence {name} owns a block twice: {table}")
            for index, block in enumerate(table):
                counted[block] += 1
                places.setdefault(block, set()).add(index)
        wrong += [f"block {block} is shared at positions {sorted(at)}" for block, at in places.items() if len(at) > 1]
        free = set(self._free)
        if len(free) != len(self._free):
            wrong.append("a block is free twice")
        for block in range(self.num_blocks):
            wrong += self._check_block(block, counted[block], block in free)
        wrong += [
            f"{content.hex()} names block {block}, which is not its"
            for content, block in self._block_of.items()
            if self._hash_of[block] != content
        ]
        return wrong

    def _check_block(self, block: int, owners: int, free: bool) -> list[str]:
        wrong = []
        if self._references[block] != owners:
            wrong.append(f"block {block} has {self._references[block]} references but {owners} owners")
        cached = block in self._cached
        if (owners > 0) + free + cached != 1:
            wrong.append(f"block {block} must be one of owned ({owners}), free ({free}) or cached ({cached})")
        content = self._hash_of[block]
        if content is None and cached:
            wrong.append(f"block {block} is cached under no hash")
        if content is not None and (free or self._block_of.get(content) != block):
            wrong.append(f"block {block} has a hash that does not lead to it")
        return wrong

    def _match(self, sequence: Sequence) -> tuple[list[int], bytes | None]:
        """Blocks of the longest cached prefix, and what should follow them. Hashes are made only as far as that."""
        found: list[int] = []
        if not self.prefix_cache:
            return found, None
        for index in range((len(sequence.tokens) - 1) // self.block_size):
            self._extend_hashes(sequence, index + 1)
            block = self._block_of.get(sequence.block_hashes[index])
            if block is None:
                return found, sequence.block_hashes[index]
            found.append(block)
        return found, None

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) < count:
            parent = hashes[-1] if hashes else root_hash(sequence.salt)
            start = len(hashes) * size
            hashes.append(block_hash(parent, sequence.tokens[start : start + size]))

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget_doubtful(self, sequence: Sequence) -> None:
        """Forget the content of a sequence that went wrong, as far as it may be the cause.

        The step that failed wrote to no block with a hash, since those are full and computed. But an earlier one may have
        gone wrong unseen, when it drew nothing: so whatever this sequence wrote itself is forgotten. What it only matched was
        written by others; while any of them lives and does not fail, nothing speaks against it, and forgetting would cost
        all who share it. If nobody else lives in it, nobody vouches for it either: it goes, so that wrong content cannot fail
        one sequence after the other for ever.
        """
        cooling = Counter(block for freed in self._cooling.values() for blocks in freed for block in blocks)
        for table in sequence.tables:
            for index, block in enumerate(table):
                if index >= sequence.matched_blocks or self._references[block] - cooling[block] == 1:
                    self._forget(block)

    def _forget(self, block: int) -> None:
        content = self._hash_of[block]
        if content is not None:
            del self._block_of[content]
            self._hash_of[block] = None

"""Which KV block belongs to whom: paged, reference-counted, and addressed by content for prefix reuse.

A sequence has a table of blocks for each group of layers (`core.groups`), and all come from one pool. Groups without a window get
blocks for all tokens at once. Those with one get theirs as tokens are computed (`advance`), out of what the sequence was promised
(`engine.promises`), and give back what the window has left.

What is freed while a launched step may still read or write it *cools*: it stays owned, by nobody, until that step is collected.

Invariants:
- A block is hashed only when it is full and its tokens are computed. Only hashed blocks are ever shared, and nobody writes
  to them again, so there is no copy-on-write.
- A match never covers a whole sequence: at least one token is left to compute, because a token is drawn from its logits.
- In a group with a window, a prefix matches if the blocks are cached that the token after it sees. The others stay `NO_BLOCK`.
- What a window has left is free at once: whatever is launched and not collected computes tokens that no longer see it, and so
  does whoever takes the KV over.
- Allocation and freeing are O(1) a block.

Paging is PagedAttention's idea (vLLM), keeping unreferenced blocks under a hash chain is that of vLLM's and SGLang's
prefix caches. Neighbours: `engine.scheduler` decides who gets blocks, `engine.block_pool` has them, `engine.contents` finds them.
No tensors here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from core.groups import NO_BLOCK, LayerGroup
from engine.block_pool import BlockPool
from engine.contents import Contents
from engine.match import Match, longest_match
from engine.promises import Promise, Promises
from engine.sequence import Sequence
from engine.windows import Windows


@dataclass(frozen=True, slots=True)
class Fit:
    """What giving a sequence blocks for all its tokens would take.

    Attributes:
        match: what the prefix cache has of it.
        lacking: how many more blocks would have to be available. 0 if there is room.
    """

    match: Match
    lacking: int


class BlockManager:
    """Owner of `num_blocks` blocks of `block_size` tokens each.

    Args:
        prefix_cache: whether blocks are reused by content.
        windows: the groups of layers; None is one that keeps everything.

    Attributes:
        freed: goes up by every block that becomes available or a prefix that matches spares, and by some that were so before.
        windowed: whether some group has a window.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True, windows: Windows | None = None) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"Got {num_blocks = }, {block_size = } but expected at least one of each")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.windows = windows or Windows.none(block_size, num_blocks)
        self.windowed = bool(self.windows.windowed)
        self.freed = 0
        self._full = self.windows.full
        self._contents = Contents(num_blocks, block_size, self.windows.count)
        self._pool = BlockPool(self._contents)
        self._promises = Promises()
        self._ragged: set[int] = set()
        self._cooling: dict[int, list[tuple[int, list[int]]]] = {}
        self._collected = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody owns, the evictable ones among them."""
        return self._pool.free_blocks

    @property
    def available_blocks(self) -> int:
        """Free blocks that are promised to nobody."""
        return self._pool.free_blocks - self._promises.outstanding

    @property
    def cooling_blocks(self) -> int:
        """Blocks that will be free once launched steps are collected; one that is shared counts for each who freed it."""
        return sum(len(blocks) for freed in self._cooling.values() for _, blocks in freed)

    @property
    def cached_blocks(self) -> int:
        """Blocks that can be found by content, owned or not."""
        return len(self._contents)

    @property
    def registered(self) -> int:
        """How many blocks became findable by their content, ever."""
        return self._contents.added

    def blocks_for(self, tokens: int) -> int:
        """Blocks of one group."""
        return -(-tokens // self.block_size)

    def kept_for(self, tokens: int) -> int:
        """Blocks of all groups without a window."""
        return len(self._full) * self.blocks_for(tokens)

    def kept(self, sequence: Sequence) -> int:
        """How many blocks a sequence owns in groups without a window."""
        return sum([len(sequence.tables[group]) for group in self._full]) if sequence.tables else 0

    def lacking_for(self, sequence: Sequence, tokens: int) -> int:
        """How many more blocks a sequence that decodes will own, or be promised, once it has so many tokens."""
        return max(0, self.kept_for(tokens) - self.kept(sequence)) + self._lacks_promise(sequence, tokens)

    def owned(self, sequence: Sequence) -> int:
        """How many blocks a sequence owns in all groups."""
        return sum([len(table) - table.count(NO_BLOCK) for table in sequence.tables])

    # --- admission ----------------------------------------------------------------------------------------------------

    def wanted(self, sequence: Sequence) -> int:
        """Blocks, owned or promised, of a sequence with the tokens that it has, if the prefix cache has nothing of it."""
        tokens = len(sequence.tokens)
        return self.kept_for(tokens) + self.windows.promise(sequence, tokens, sequence.incoming)

    def allocate(self, sequence: Sequence, spare_blocks: int = 0) -> bool:
        """Give a sequence that owns nothing room for all its tokens, reusing the longest cached prefix. False, with nothing
        changed, unless at least `spare_blocks` blocks stay available."""
        fit = self.fit(sequence, spare_blocks)
        if fit.lacking == 0:
            self.give(sequence, fit.match.tables)
        return fit.lacking == 0

    def fit(self, sequence: Sequence, spare_blocks: int = 0) -> Fit:
        """Whether `allocate` would give a sequence blocks, and if not, why. Nothing changes."""
        if sequence.tables:
            raise ValueError(f"sequence {sequence.sequence_id} already owns {self.owned(sequence)} blocks")
        limit = (len(sequence.tokens) - 1) // self.block_size if self.prefix_cache else 0
        match = longest_match(sequence, limit, self._contents, self.windows, self._pool.references)
        references = self._pool.references
        shared = sum(1 for group in self._full for block in match.tables[group] if references[block] > 0)
        # What matches in a group with a window is a part of the promise.
        lacking = self.wanted(sequence) - shared + spare_blocks - self.available_blocks
        return Fit(match, max(0, lacking))

    def give(self, sequence: Sequence, matched: list[list[int]]) -> None:
        """Carry out a `fit` that lacks nothing, before anything else happens here.

        Sets `tables`, and `computed_tokens` to what the cache supplied. Groups with a window get no more than that yet, unless
        the KV comes from elsewhere: then all that the token after the last one sees.
        """
        found, total = len(matched[0]), self.blocks_for(len(sequence.tokens))
        sequence.tables, sequence.matched_blocks = matched, found
        sequence.computed_tokens = sequence.launched_tokens = found * self.block_size
        for group in self._full:
            for block in matched[group]:
                self._pool.share(block)
        if self.windowed:
            self._promise(sequence)
        for group in self._full:  # only now: whatever matched might have been evicted
            matched[group].extend([self._take() for _ in range(total - found)])
        if sequence.incoming:
            for place, (group, window) in enumerate(self.windows.windowed):
                self._expect(sequence, sequence.tables[group], window, self._promises.of(sequence).first[place])

    def owners_in_the_way(self, sequence: Sequence, spare_blocks: int, owners: Iterable[Sequence]) -> list[Sequence]:
        """The first of `owners` that would have to be freed for `allocate` to succeed; none if freeing them all would not do.
        Blocks that they share with somebody else, or that the sequence itself matches, make no room."""
        fit = self.fit(sequence, spare_blocks)
        lacking, reused = fit.lacking, {block for group in self._full for block in fit.match.tables[group]}
        leaving: Counter[int] = Counter()
        chosen: list[Sequence] = []
        for owner in owners:
            if lacking <= 0:
                break
            chosen.append(owner)
            lacking -= self._promises.blocks_of(owner)
            for group in self._full:
                for block in owner.tables[group]:
                    leaving[block] += 1
                    lacking -= leaving[block] == self._pool.references[block] and block not in reused
        return chosen if lacking <= 0 else []

    def is_cached(self, content: bytes) -> bool:
        """Whether a block of that name can be found."""
        return content in self._contents

    # --- from step to step --------------------------------------------------------------------------------------------

    def grow(self, sequence: Sequence) -> bool:
        """Make sure that there is room for the KV of all tokens, pending ones too: blocks in groups without a window, a promise
        of as many in the others. False, with nothing changed, if there is none."""
        tables = [sequence.tables[group] for group in self._full]
        missing = max(0, self.blocks_for(sequence.total_tokens) - len(tables[0])) if tables else 0
        more = self._lacks_promise(sequence, sequence.total_tokens)
        if missing * len(tables) + more > self.available_blocks:
            return False
        for table in tables:
            table.extend([self._take() for _ in range(missing)])
        if more:
            self._promises.add(sequence, more)
        return True

    def advance(self, sequence: Sequence, end: int) -> None:
        """A step is about to compute tokens up to `end`: groups with a window give back what is left behind, and get room for
        what comes. Cannot fail."""
        promise = self._promises.of(sequence)
        self._slide(sequence, promise)
        if not promise.decodes and self._decodes(sequence):
            promise.decodes = True
            self.freed += self._promises.lower(promise, self.windows.promise(sequence, sequence.total_tokens, True))
        for group, _ in self.windows.windowed:
            table = sequence.tables[group]
            while len(table) * self.block_size < end:
                table.append(self._take_promised())

    def settle(self, sequence: Sequence) -> None:
        """It computes nothing any longer, and keeps what the token after its last one sees."""
        if self.windowed:
            promise = self._promises.of(sequence)
            self._slide(sequence, promise)
            self.freed += self._promises.lower(promise, self.owned(sequence) - self.kept(sequence))

    def register(self, sequence: Sequence, first_token: int) -> None:
        """Make the full blocks among computed tokens `[first_token, computed_tokens)` findable by their content.

        A block whose content is already cached in another block stays private.
        """
        first, end = first_token // self.block_size, sequence.computed_tokens // self.block_size
        if not self.prefix_cache or first >= end:
            return
        for group, table in enumerate(sequence.tables):
            for index in range(first, end):
                block = table[index]
                if block != NO_BLOCK and block not in self._ragged:
                    self._contents.add(self._contents.name(sequence, group, index), block)

    def free(self, sequence: Sequence, keep_cached: bool = True) -> None:
        """Take back all that a sequence owns; what a step in flight may use cools first. With `keep_cached` False its content
        may be wrong, so nobody else will match what it wrote itself. A no-op on a sequence that owns nothing."""
        if not keep_cached:
            self._forget_doubtful(sequence)
        self.freed += self._promises.end(sequence)
        for group, table in enumerate(sequence.tables):
            if sequence.last_step > self._collected:
                self._cooling.setdefault(sequence.last_step, []).append((group, _present(table)))
                if group not in self._full:
                    self._promises.cool(_present(table))
            else:
                freed = self._release(table)
                if group not in self._full:
                    self._promises.freed(freed)
        sequence.tables = []
        sequence.matched_blocks = sequence.computed_tokens = sequence.launched_tokens = sequence.pending_tokens = 0
        sequence.tenancy += 1

    def collected(self, step: int) -> None:
        """This step is done, and all before it were: what cooled until then is free. Every step is named once."""
        self._collected = step
        for group, blocks in self._cooling.pop(step, ()):
            self._release(blocks)
            if group not in self._full:
                self._promises.cooled(blocks, self._pool.references)

    def check(self, owners: Iterable[Sequence]) -> list[str]:
        """Every violated invariant, in words; `owners` are all live sequences. For tests and `/debug/invariants`."""
        owners = list(owners)
        tables = [(sequence.sequence_id, list(table)) for sequence in owners for table in sequence.tables]
        tables += [(f"gone at step {step}", blocks) for step, freed in self._cooling.items() for _, blocks in freed]
        counted = [0] * self.num_blocks
        wrong: list[str] = []
        for name, table in tables:
            own = _present(table)
            if len(set(own)) != len(own):
                wrong.append(f"sequence {name} owns a block twice: {table}")
            for block in own:
                counted[block] += 1
        places: dict[int, set[tuple[int, int]]] = {}
        for sequence in owners:
            for group, table in enumerate(sequence.tables):
                for index, block in enumerate(table):
                    if block != NO_BLOCK:
                        places.setdefault(block, set()).add((group, index))
        wrong += [f"block {block} is shared at positions {sorted(at)}" for block, at in places.items() if len(at) > 1]
        wrong += self._pool.check(counted)
        wrong += [line for sequence in owners for line in self._check_windows(sequence)]
        windowed = [group for group, _ in self.windows.windowed]
        return wrong + self._promises.check(windowed, owners, self.free_blocks)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _promise(self, sequence: Sequence) -> None:
        """Promise what groups with a window will need, and begin with what matched of it."""
        position = len(sequence.tokens) if sequence.incoming else sequence.computed_tokens
        firsts = [self.windows.first_kept(window, position) for _, window in self.windows.windowed]
        blocks = self.windows.promise(sequence, len(sequence.tokens), sequence.incoming)
        self._promises.make(sequence, Promise(blocks, firsts, sequence.incoming))
        for group, _ in self.windows.windowed:
            for block in _present(sequence.tables[group]):
                if self._pool.share(block):
                    self._promises.taken()

    def _lacks_promise(self, sequence: Sequence, tokens: int) -> int:
        """How many blocks more it has to be promised before it decodes with so many tokens."""
        return max(0, self.windows.promise(sequence, tokens, True) - self._promises.blocks_of(sequence)) if self.windowed else 0

    def _expect(self, sequence: Sequence, table: list[int], window: LayerGroup, first: int) -> None:
        """Room from block `first` on for the KV that comes from elsewhere, of what the token after the last one sees."""
        matched, tokens = len(table), len(sequence.tokens)
        table.extend([NO_BLOCK] * (first - matched))
        while len(table) < self.blocks_for(tokens):
            table.append(self._take_promised())
        if matched <= first < len(table) and first * self.block_size < window.first_seen(tokens):
            self._ragged.add(table[first])  # of its first tokens nothing comes

    def _take(self) -> int:
        block = self._pool.take()
        self._ragged.discard(block)
        return block

    def _take_promised(self) -> int:
        self._promises.taken()
        if self._full:  # of what is evicted, somebody may have a copy under way, which then spares blocks
            self.freed += 1
        return self._take()

    def _slide(self, sequence: Sequence, promise: Promise) -> None:
        """Groups with a window give back what the next token to be computed does not see."""
        for place, (group, window) in enumerate(self.windows.windowed):
            first = self.windows.first_kept(window, sequence.computed_tokens)
            table = sequence.tables[group]
            for index in reversed(range(promise.first[place], first)):  # the last first, as in `_release`
                if self._pool.release(table[index]):
                    self._promises.freed(1)
                table[index] = NO_BLOCK
            promise.first[place] = max(first, promise.first[place])

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether no step that is to come or under way computes more than one token of it: all of them draw."""
        under_way = sequence.launched_tokens - sequence.computed_tokens
        return not sequence.hold and sequence.unlaunched_tokens == 1 and under_way == sequence.pending_tokens

    def _release(self, blocks: list[int]) -> int:
        """One owner fewer of each; how many of them are free now."""
        self.freed += len(blocks)
        # Last block first, so that eviction eats a prefix from its tail and keeps the part that most prompts share.
        return sum([self._pool.release(block) for block in reversed(blocks) if block != NO_BLOCK])

    def _forget_doubtful(self, sequence: Sequence) -> None:
        """Forget the content of a sequence that went wrong, as far as it may be the cause.

        The step that failed wrote to no block with a hash, since those are full and computed. But an earlier one may have
        gone wrong unseen, when it drew nothing: so whatever this sequence wrote itself is forgotten. What it only matched was
        written by others; while any of them lives and does not fail, nothing speaks against it, and forgetting would cost
        all who share it. If nobody else lives in it, nobody vouches for it either: it goes, so that wrong content cannot fail
        one sequence after the other for ever. That goes for what a window has left behind, too.
        """
        cooling = Counter(block for freed in self._cooling.values() for _, blocks in freed for block in blocks)
        references = self._pool.references
        for group, table in enumerate(sequence.tables):
            for index, block in enumerate(table):
                if block != NO_BLOCK:
                    if index >= sequence.matched_blocks or references[block] - cooling[block] == 1:
                        self._pool.forget(block)
                elif index < len(sequence.block_hashes):
                    left = self._contents.find(self._contents.name(sequence, group, index))
                    if left is not None and (index >= sequence.matched_blocks or references[left] == cooling[left]):
                        self._pool.forget(left)

    def _check_windows(self, sequence: Sequence) -> list[str]:
        wrong = []
        for group, window in self.windows.windowed if sequence.tables else ():
            table = sequence.tables[group]
            position = len(sequence.tokens) if sequence.incoming else sequence.computed_tokens
            first = self.windows.first_kept(window, position)
            if NO_BLOCK in table[first:]:
                wrong.append(f"{sequence.sequence_id} needs group {group} from block {first} on but has {table}")
        return wrong


def _present(table: list[int]) -> list[int]:
    """Without those that a window has left."""
    return [block for block in table if block != NO_BLOCK] if NO_BLOCK in table else table

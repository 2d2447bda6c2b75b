"""How many blocks of each group of layers a sequence keeps: the arithmetic of sliding windows.

A group without a window keeps everything. One with a window keeps what the next token to be computed still sees, and what
comes after that. Neighbours: `core.groups` says which layers are in a group, `engine.block_manager` has the blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable

from core.groups import LayerGroup, LayerGroups
from engine.sequence import Sequence


class Windows:
    """The groups of one engine.

    Args:
        block_size: tokens of a block.
        num_blocks: of the whole cache.
        max_chunk: most tokens of a sequence in one step.
        steps_ahead: see `ModelRunner`.

    Attributes:
        full: indexes of the groups without a window.
        windowed: index and group of the others.
    """

    def __init__(self, groups: LayerGroups, block_size: int, num_blocks: int, max_chunk: int, steps_ahead: int) -> None:
        self.count = len(groups.groups)
        self.full = tuple(index for index, group in enumerate(groups.groups) if group.sliding_window is None)
        self.windowed = tuple((index, group) for index, group in enumerate(groups.groups) if group.sliding_window is not None)
        self._alike = Counter(group.sliding_window for group in groups.groups)
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._max_chunk = max_chunk
        self._least_chunk = min(max_chunk, max((window for window in self._alike if window is not None), default=max_chunk))
        self._steps_ahead = steps_ahead

    @classmethod
    def none(cls, block_size: int, num_blocks: int) -> Windows:
        """One group, which keeps everything."""
        return cls(LayerGroups((LayerGroup(()),)), block_size, num_blocks, 1, 0)

    def first_kept(self, group: LayerGroup, position: int) -> int:
        """The first block that a group keeps when the token at `position` is the next to be computed."""
        return group.first_seen(position) // self._block_size

    def firsts_kept(self, blocks: int, position: int | None) -> list[tuple[int, int]]:
        """The same for each group with a window, and its index. Where `position` is None, for the token behind so many blocks."""
        at = blocks * self._block_size if position is None else position
        return [(index, self.first_kept(group, at)) for index, group in self.windowed]

    def needed(self, tokens: int, chunk: int) -> int:
        """Most blocks that a sequence of at most `tokens` tokens, at most `chunk` of them in one step, ever has in all groups."""
        return sum(alike * self._reach(window, tokens, chunk) for window, alike in self._alike.items())

    def longest(self, limit: int) -> int:
        """The most tokens, at most `limit`, of a sequence that the cache has room for."""
        fits = range(limit + 1)
        return bisect_right(fits, self._num_blocks, key=lambda tokens: self.needed(tokens, self._least_chunk)) - 1

    def chunk(self, sequence: Sequence) -> int:
        """Most tokens of a sequence in one step. As many as its widest window sees, if it would not fit the cache with more."""
        return self._chunk(sequence.most_tokens) if self.windowed else self._max_chunk

    def promise(self, sequence: Sequence, tokens: int, decodes: bool) -> int:
        """Most blocks that it has in groups with a window as long as it has no more than `tokens` tokens, and those that are
        drawn until all of these are computed. `decodes`: it computes one token a step."""
        if not self.windowed:
            return 0
        chunk = 1
        if not decodes:
            most = sequence.most_tokens
            tokens, chunk = min(most, tokens + 1 + self._steps_ahead), self._chunk(most)
        return sum(alike * self._reach(window, tokens, chunk) for window, alike in self._alike.items() if window is not None)

    def longest_match(self, run: int, find: Callable[[int, int], int | None], position: int | None) -> int:
        """The largest prefix, in blocks and at most `run`, that a sequence can go on behind: of groups with a window those can be
        found (`find(group, index)`) that the token at `position` sees. None: that which follows the prefix.

        Looks from the end on: behind every longer prefix, too, a block that is missing is seen. So what is left of the windows is
        not looked for."""
        end = run
        while end > 0:
            seen = self.firsts_kept(end, position)
            gaps = [next((index for index in range(first, end) if find(group, index) is None), end) for group, first in seen]
            if min(gaps, default=end) == end:
                break
            end = min(gaps)
        return end

    def _chunk(self, tokens: int) -> int:
        return self._max_chunk if self.needed(tokens, self._max_chunk) <= self._num_blocks else self._least_chunk

    def _reach(self, window: int | None, tokens: int, chunk: int) -> int:
        """Of one group: blocks that hold what the oldest token under way sees, up to the end of the newest."""
        whole = -(-tokens // self._block_size)
        if window is None:
            return whole
        return min(whole, -(-(window - 1 + (1 + self._steps_ahead) * chunk) // self._block_size) + 1)

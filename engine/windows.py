"""How many blocks of each group of layers a sequence keeps: the arithmetic of sliding windows.

A group without a window keeps everything. One with a window keeps what the next token to be computed still sees, and what
comes after that. Neighbours: `core.groups` says which layers are in a group, `engine.block_manager` has the blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from core.groups import LayerGroup, LayerGroups
from engine.sequence import Sequence


class Windows:
    """The groups of one engine.

    Args:
        block_size: tokens of a block.
        chunk: most tokens of a sequence in one step.
        steps_ahead: see `ModelRunner`.

    Attributes:
        full: indexes of the groups without a window.
        windowed: index and group of the others.
    """

    def __init__(self, groups: LayerGroups, block_size: int, chunk: int, steps_ahead: int) -> None:
        self.count = len(groups.groups)
        self.full = tuple(index for index, group in enumerate(groups.groups) if group.sliding_window is None)
        self.windowed = tuple((index, group) for index, group in enumerate(groups.groups) if group.sliding_window is not None)
        self._groups = groups.groups
        self._block_size = block_size
        self._chunk = chunk
        self._steps_ahead = steps_ahead

    @classmethod
    def none(cls, block_size: int) -> Windows:
        """One group, which keeps everything."""
        return cls(LayerGroups((LayerGroup(()),)), block_size, 1, 0)

    def first_kept(self, group: LayerGroup, position: int) -> int:
        """The first block that a group keeps when the token at `position` is the next to be computed."""
        return group.first_seen(position) // self._block_size

    def reach(self, group: LayerGroup, tokens: int, decodes: bool) -> int:
        """Most blocks that a sequence of at most `tokens` tokens ever has in a group: those that hold what the oldest token
        under way sees, up to the end of the newest. `decodes`: it computes one token a step."""
        whole = -(-tokens // self._block_size)
        if group.sliding_window is None:
            return whole
        under_way = (1 + self._steps_ahead) * (1 if decodes else self._chunk)
        return min(whole, -(-(group.sliding_window - 1 + under_way) // self._block_size) + 1)

    def longest(self, blocks: int, limit: int) -> int:
        """The most tokens, at most `limit`, that a sequence can have with so many blocks."""
        fits = range(limit + 1)
        return bisect_right(fits, blocks, key=lambda tokens: sum(self.reach(group, tokens, False) for group in self._groups)) - 1

    def promise(self, sequence: Sequence, decodes: bool) -> int:
        """The same over all groups with a window, for all tokens that the sequence may come to have."""
        if not self.windowed:
            return 0
        # The last token is drawn but never computed.
        most = len(sequence.tokens) if sequence.hold else sequence.prompt_tokens + sequence.sampling.max_tokens - 1
        return sum(self.reach(group, max(most, len(sequence.tokens)), decodes) for _, group in self.windowed)

    def longest_match(self, run: int, find: Callable[[int, int], int | None], position: int | None) -> int:
        """The largest prefix, in blocks and at most `run`, that a sequence can go on behind: of groups with a window those can be
        found (`find(group, index)`) that the token at `position` sees. None: that which follows the prefix.

        Looks from the end on: behind every longer prefix, too, a block that is missing is seen. So what is left of the windows is
        not looked for."""
        end = run
        while end > 0:
            seen = [
                (group, self.first_kept(window, end * self._block_size if position is None else position))
                for group, window in self.windowed
            ]
            gaps = [next((index for index in range(first, end) if find(group, index) is None), end) for group, first in seen]
            if min(gaps, default=end) == end:
                break
            end = min(gaps)
        return end

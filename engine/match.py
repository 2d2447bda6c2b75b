"""What the prefix cache has of a sequence: the longest prefix of it that all groups of layers can go on behind.

Groups without a window need all blocks of the prefix, the others what the token after it sees. Neighbours: `engine.contents`
finds blocks, `engine.windows` says what is seen, `engine.block_manager` gives what was found.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from core.groups import NO_BLOCK
from engine.contents import Contents
from engine.sequence import Sequence
from engine.windows import Windows


@dataclass(frozen=True, slots=True)
class Match:
    """The longest match.

    Attributes:
        tables: for each group, its blocks, all of one length.
        next_content: name of the block that groups without a window lack for a longer match; None if they lack none.
        latent: blocks in use that groups without a window could share if what windows see were cached as far as they are.
    """

    tables: list[list[int]]
    next_content: bytes | None
    latent: int


def longest_match(sequence: Sequence, limit: int, contents: Contents, windows: Windows, references: Sequences[int]) -> Match:
    """Of at most `limit` blocks. Where a group without a window lacks one, hashes are made no further."""
    run, next_content = limit, None
    found: dict[int, list[int]] = {}
    for group in windows.full:
        found[group] = contents.run(sequence, group, run)
        if len(found[group]) < run:
            run = len(found[group])
            next_content = contents.name(sequence, group, run)

    def find(group: int, index: int) -> int | None:
        return contents.find(contents.name(sequence, group, index))

    position = len(sequence.tokens) if sequence.incoming else None
    length = windows.longest_match(run, find, position)
    if not windows.full and all(first >= length for _, first in windows.firsts_kept(length, position)):
        length = 0  # it is not seen, but that is not to say that it is cached
    latent = [block for blocks in found.values() for block in blocks[length:run] if references[block] > 0]
    for group, first in windows.firsts_kept(length, position):
        seen = [find(group, index) or 0 for index in range(first, length)]
        found[group] = [NO_BLOCK] * (length - len(seen)) + seen
    return Match([found[group][:length] for group in range(windows.count)], next_content, len(latent))

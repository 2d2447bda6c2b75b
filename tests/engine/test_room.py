from __future__ import annotations

import pytest

from engine.block_manager import BlockManager
from engine.room import Room
from engine.sequence import Sequence
from tests.support.engines import sequence

SIZE = 4


def owner(blocks: BlockManager, name: str, tokens: list[int], *, hold: bool = False, max_tokens: int = 8) -> Sequence:
    """Somebody whose tokens are all computed, and can be found in the cache."""
    made = sequence(name, tokens, max_tokens, hold=hold)
    assert blocks.allocate(made)
    made.computed_tokens = made.launched_tokens = len(tokens)
    blocks.register(made, 0)
    return made


@pytest.mark.parametrize(
    ("tokens", "output", "max_tokens", "hold", "wanted"),
    [
        (8, 0, 5, False, 3),
        (8, 0, 100, False, 4),
        (8, 3, 5, False, 3),
        (8, 3, 100, False, 5),
        (8, 0, 1, False, 2),
        (8, 0, 100, True, 2),
        (9, 0, 100, True, 3),
    ],
)
def test_a_claim_wants_room_for_its_tokens_and_for_so_much_output(
    tokens: int, output: int, max_tokens: int, hold: bool, wanted: int
) -> None:
    room = Room(BlockManager(64, SIZE), headroom_tokens=8)
    made = sequence("a", list(range(tokens)), max_tokens, delivered=[1] * output, hold=hold)
    assert room.wanted(made) == wanted
    made.tables = [[0, 1]]
    assert room.headroom(made) == max(0, wanted - 2)


def test_room_is_kept_for_those_who_write_and_for_what_is_passed() -> None:
    blocks = BlockManager(10, SIZE, prefix_cache=False)
    room = Room(blocks, headroom_tokens=8)
    writer = owner(blocks, "writer", [1] * 8, max_tokens=20)
    claim = sequence("claim", [2] * 12, 1)
    assert not room.take(claim, [writer], 4)
    assert claim.tables == []
    room.give_up(1)
    assert room.take(claim, [writer], 3)
    assert blocks.free_blocks == 5


def test_room_that_nobody_needs_any_longer_counts_like_freed_blocks() -> None:
    """A refusal is remembered until as much as was lacking is freed or given up."""
    blocks = BlockManager(8, SIZE, prefix_cache=False)
    room = Room(blocks, headroom_tokens=100)
    writer = owner(blocks, "writer", [1] * 8, max_tokens=17)
    claim = sequence("claim", [2] * 24, 1)
    assert not room.take(claim, [writer], 0)
    assert not room.take(claim, [], 0), "lacking 4, and nobody has told of it"
    room.give_up(room.headroom(writer))
    assert room.take(claim, [], 0)


def test_a_refused_claim_is_looked_at_again_when_its_next_block_is_cached() -> None:
    blocks = BlockManager(4, SIZE)
    room = Room(blocks, headroom_tokens=0)
    other = sequence("other", list(range(12)), 1)
    assert blocks.allocate(other)
    claim = sequence("claim", list(range(13)), 1)
    assert not room.take(claim, [], 0)
    other.computed_tokens = 12
    blocks.register(other, 0)
    assert room.take(claim, [], 0)
    assert claim.matched_blocks == 3


def test_the_fewest_that_make_room_are_named_in_the_order_given() -> None:
    blocks = BlockManager(8, SIZE, prefix_cache=False)
    room = Room(blocks, headroom_tokens=0)
    owners = [owner(blocks, name, [1] * 8, hold=True) for name in ("a", "b", "c")]
    claim = sequence("claim", [2] * 16, 1)
    assert not room.take(claim, [], 0)
    assert room.made_by(claim, owners) == owners[:1]
    assert room.made_by(claim, owners[1:]) == owners[1:2]


def test_blocks_that_a_claim_would_share_make_no_room_for_it() -> None:
    blocks = BlockManager(8, SIZE)
    room = Room(blocks, headroom_tokens=0)
    alike = owner(blocks, "alike", [*range(12), 1], hold=True)
    other = owner(blocks, "other", [7] * 16, hold=True)
    claim = sequence("claim", list(range(20)), 1)
    assert not room.take(claim, [], 0)
    assert room.made_by(claim, [alike]) == []
    assert room.made_by(sequence("like no other", [9] * 16, 1), [alike]) == [alike]
    assert other.tables


def test_what_would_not_do_is_not_counted_again_before_something_is_given_up() -> None:
    blocks = BlockManager(8, SIZE, prefix_cache=False)
    room = Room(blocks, headroom_tokens=0)
    first, second = (owner(blocks, name, [1] * 16, hold=True) for name in ("first", "second"))
    claim = sequence("claim", [2] * 28, 1)
    assert not room.take(claim, [], 0)
    assert room.made_by(claim, [first]) == []
    counted = blocks.owners_in_the_way
    blocks.owners_in_the_way = lambda *args: pytest.fail("it was counted again")
    assert not room.take(claim, [], 0)
    assert room.made_by(claim, [first]) == []
    blocks.owners_in_the_way = counted
    blocks.free(second)
    assert not room.take(claim, [], 0)
    assert room.made_by(claim, [first]) == [first]

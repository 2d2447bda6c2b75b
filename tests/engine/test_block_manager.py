from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_manager import BlockManager
from engine.sequence import Sequence
from tests.support.engines import sequence


def compute(blocks: BlockManager, owner: Sequence, tokens: int | None = None) -> None:
    """What an engine does after a step: the KV of the first `tokens` tokens is in the cache now."""
    first = owner.computed_tokens
    owner.computed_tokens = len(owner.tokens) if tokens is None else tokens
    blocks.register(owner, first)


def allocated(blocks: BlockManager, name: str, tokens: list[int], salt: bytes = b"") -> Sequence:
    owner = sequence(name, tokens, salt=salt)
    assert blocks.allocate(owner)
    return owner


def computed(blocks: BlockManager, name: str, tokens: list[int]) -> Sequence:
    owner = allocated(blocks, name, tokens)
    compute(blocks, owner)
    return owner


def test_allocation_gives_room_for_all_tokens_or_changes_nothing() -> None:
    blocks = BlockManager(4, 4)
    first = allocated(blocks, "a", list(range(9)))
    assert (len(first.tables[0]), blocks.free_blocks) == (3, 1)
    second = sequence("b", list(range(20, 25)))
    assert not blocks.allocate(second)
    assert (second.tables, blocks.free_blocks) == ([], 1)
    assert blocks.check([first]) == []


def test_allocation_leaves_the_spare_blocks_asked_for() -> None:
    blocks = BlockManager(4, 4)
    owner = sequence("a", list(range(12)))
    assert not blocks.allocate(owner, spare_blocks=2)
    assert blocks.allocate(owner, spare_blocks=1)


def test_allocating_twice_is_an_error() -> None:
    blocks = BlockManager(4, 4)
    owner = allocated(blocks, "a", [1, 2])
    with pytest.raises(ValueError, match="already owns"):
        blocks.allocate(owner)


def test_a_computed_prefix_is_shared_while_its_owner_lives() -> None:
    blocks = BlockManager(8, 4)
    first = computed(blocks, "a", [*range(8), 30])
    second = allocated(blocks, "b", [*range(8), 31, 32])
    assert second.tables[0][:2] == first.tables[0][:2]
    assert second.tables[0][2] != first.tables[0][2]
    assert second.computed_tokens == 8
    blocks.free(first)
    assert blocks.check([second]) == []
    assert blocks.free_blocks == 5


def test_a_prefix_outlives_its_owner_until_evicted() -> None:
    blocks = BlockManager(3, 4)
    blocks.free(computed(blocks, "a", list(range(8))))
    assert blocks.free_blocks == 3
    again = allocated(blocks, "b", [*range(8), 9])
    assert again.computed_tokens == 8
    blocks.free(again)
    blocks.free(allocated(blocks, "c", list(range(20, 32))))
    assert allocated(blocks, "d", [*range(8), 9]).computed_tokens == 0


def test_nothing_matches_before_it_is_computed() -> None:
    blocks = BlockManager(8, 4)
    first = allocated(blocks, "a", list(range(12)))
    compute(blocks, first, 7)
    assert allocated(blocks, "b", list(range(12))).computed_tokens == 4


@pytest.mark.parametrize(("tokens", "reused"), [(4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_match_leaves_at_least_one_token_to_compute(tokens: int, reused: int) -> None:
    blocks = BlockManager(8, 4)
    blocks.free(computed(blocks, "a", list(range(12))))
    assert allocated(blocks, "b", list(range(tokens))).computed_tokens == reused


def test_a_different_salt_never_matches() -> None:
    blocks = BlockManager(8, 4)
    computed(blocks, "a", list(range(8)))
    assert allocated(blocks, "b", [*range(8), 9], salt=b"other tenant").computed_tokens == 0


def test_a_block_matches_only_behind_the_same_prefix() -> None:
    blocks = BlockManager(8, 4)
    computed(blocks, "a", [1, 1, 1, 1, 2, 2, 2, 2])
    assert allocated(blocks, "b", [3, 3, 3, 3, 2, 2, 2, 2, 5]).computed_tokens == 0


def test_without_a_prefix_cache_nothing_is_reused() -> None:
    blocks = BlockManager(8, 4, prefix_cache=False)
    blocks.free(computed(blocks, "a", list(range(8))))
    again = allocated(blocks, "b", [*range(8), 9])
    assert (again.computed_tokens, again.block_hashes, blocks.cached_blocks) == (0, [], 0)


def test_eviction_takes_the_least_recently_used_prefix_first() -> None:
    blocks = BlockManager(4, 4)
    old = computed(blocks, "old", [1] * 4)
    new = computed(blocks, "new", [2] * 4)
    blocks.free(old)
    blocks.free(new)
    blocks.free(allocated(blocks, "touch", [1] * 5))
    blocks.free(allocated(blocks, "big", list(range(10, 22))))
    assert allocated(blocks, "old again", [1] * 5).computed_tokens == 4
    assert allocated(blocks, "new again", [2] * 5).computed_tokens == 0


def test_eviction_eats_a_prefix_from_its_tail() -> None:
    blocks = BlockManager(3, 4)
    blocks.free(computed(blocks, "a", list(range(12))))
    blocks.free(allocated(blocks, "b", [40, 41]))
    assert allocated(blocks, "c", list(range(12))).computed_tokens == 8


def test_equal_content_computed_twice_is_kept_once() -> None:
    blocks = BlockManager(8, 4)
    first, second = allocated(blocks, "a", list(range(8))), allocated(blocks, "b", list(range(8)))
    compute(blocks, first)
    compute(blocks, second)
    assert blocks.cached_blocks == 2
    assert blocks.check([first, second]) == []
    blocks.free(second)
    assert blocks.check([first]) == []


def test_content_that_may_be_wrong_is_never_matched_again() -> None:
    blocks = BlockManager(8, 4)
    bad = computed(blocks, "bad", list(range(8)))
    sharer = allocated(blocks, "sharer", [*range(8), 9])
    blocks.free(bad, keep_cached=False)
    assert blocks.check([sharer]) == []
    assert allocated(blocks, "next", [*range(8), 9]).computed_tokens == 0


def test_a_fault_leaves_what_others_wrote_and_live_in() -> None:
    """A fault in one sequence once threw out the system prompt that fifty others shared."""
    blocks = BlockManager(8, 4)
    writer = computed(blocks, "writer", list(range(8)))
    bad = allocated(blocks, "bad", [*range(8), *[9] * 5])
    compute(blocks, bad)
    assert bad.matched_blocks == 2
    blocks.free(bad, keep_cached=False)
    assert blocks.check([writer]) == []
    assert allocated(blocks, "next", [*range(8), *[9] * 5]).computed_tokens == 8


def test_what_nobody_else_lives_in_is_forgotten_with_a_fault() -> None:
    """Else wrong content that its writer left behind would fail one sequence after the other."""
    blocks = BlockManager(8, 4)
    blocks.free(computed(blocks, "writer", list(range(8))))
    first, second = (allocated(blocks, name, [*range(8), 9]) for name in ("first", "second"))
    blocks.free(first, keep_cached=False)
    assert allocated(blocks, "third", [*range(8), 9]).computed_tokens == 8
    blocks.free(second, keep_cached=False)
    assert blocks.cached_blocks == 2, "the third still lives"


def test_whoever_is_gone_but_for_a_step_in_flight_vouches_for_nothing() -> None:
    blocks = BlockManager(8, 4)
    blocks.free(computed(blocks, "writer", list(range(8))))
    first, second = (allocated(blocks, name, [*range(8), 9]) for name in ("first", "second"))
    first.last_step = second.last_step = 1
    for each in (first, second):
        blocks.free(each, keep_cached=False)
    assert blocks.cached_blocks == 0
    blocks.collected(1)
    assert blocks.check([]) == []
    assert blocks.free_blocks == 8


def test_freeing_a_sequence_without_blocks_changes_nothing() -> None:
    blocks = BlockManager(2, 4)
    blocks.free(sequence("a", [1]))
    assert blocks.free_blocks == 2


def test_growth_takes_one_block_at_the_boundary_and_none_when_empty() -> None:
    blocks = BlockManager(2, 2)
    owner = allocated(blocks, "a", [1, 2])
    assert blocks.grow(owner)
    assert len(owner.tables[0]) == 1
    owner.tokens.append(3)
    assert blocks.grow(owner)
    assert len(owner.tables[0]) == 2
    owner.tokens += [4, 5]
    assert not blocks.grow(owner)
    assert len(owner.tables[0]) == 2


def test_the_checker_sees_a_leak_a_double_owner_and_a_wrong_count() -> None:
    blocks = BlockManager(4, 4)
    owner = allocated(blocks, "a", list(range(8)))
    assert blocks.check([])
    twin = sequence("twin", list(range(8)))
    twin.tables = [list(reversed(owner.tables[0]))]
    assert any("shared at positions" in line for line in blocks.check([owner, twin]))
    owner.tables[0].append(owner.tables[0][0])
    assert any("owns a block twice" in line for line in blocks.check([owner]))


class BlockManagerMachine(RuleBasedStateMachine):
    """Random owners of a tiny pool, against a model that remembers what was last computed into each block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(6, 2)
        self.owners: list[Sequence] = []
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.count = 0

    def remember(self, owner: Sequence, first: int) -> None:
        for index in range(first // 2, -(-owner.computed_tokens // 2)):
            self.content[owner.tables[0][index]] = (owner.salt, tuple(owner.tokens[: min(index * 2 + 2, owner.computed_tokens)]))

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from([b"", b"s"]), spare=st.integers(0, 2))
    def allocate(self, tokens: list[int], salt: bytes, spare: int) -> None:
        self.count += 1
        owner = sequence(f"s{self.count}", tokens, salt=salt)
        before = self.blocks.free_blocks
        if not self.blocks.allocate(owner, spare):
            assert (owner.tables, self.blocks.free_blocks) == ([], before)
            return
        self.owners.append(owner)
        assert self.blocks.free_blocks >= spare
        assert len(owner.tables[0]) == self.blocks.blocks_for(len(tokens))
        assert owner.computed_tokens < len(tokens)
        for index in range(owner.computed_tokens // 2):
            assert self.content[owner.tables[0][index]] == (salt, tuple(tokens[: index * 2 + 2]))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        room = min(len(owner.tokens), len(owner.tables[0]) * 2)
        first = owner.computed_tokens
        owner.computed_tokens = data.draw(st.integers(first, room))
        self.remember(owner, first)
        self.blocks.register(owner, first)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        owner.tokens.append(token)
        before, free = list(owner.tables[0]), self.blocks.free_blocks
        missing = self.blocks.blocks_for(len(owner.tokens)) - len(before)
        assert self.blocks.grow(owner) == (missing <= free)
        assert owner.tables[0][: len(before)] == before

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), keep=st.booleans())
    def free(self, data: st.DataObject, keep: bool) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.owners.remove(owner)
        self.blocks.free(owner, keep)
        assert owner.tables == []

    @invariant()
    def consistent(self) -> None:
        assert self.blocks.check(self.owners) == []
        owned = {block for owner in self.owners for block in owner.tables[0]}
        assert self.blocks.free_blocks == 6 - len(owned)


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

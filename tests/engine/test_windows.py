"""Sliding windows: which blocks a sequence has at any time, who can reuse what they left, and that there are always enough."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.errors import ContextLengthExceeded
from core.groups import NO_BLOCK, LayerGroup, LayerGroups
from core.sampling import SamplingParams
from engine.block_manager import BlockManager
from engine.engine import Engine
from engine.room import Room
from engine.sequence import Sequence, Status
from engine.windows import Windows
from tests.support.engines import KVCheckingRunner, run_alone, sequence
from tests.support.engines import Windows as LayerWindows

SIZE = 4
STEP = CostModel(step_s=1.0, prefill_token_s=0, attention_s=0, decode_sequence_s=0, decode_context_s=0)
LONG = [number % 40 for number in range(64)]


def engine(num_blocks: int, windows: LayerWindows, *, chunk: int = 8, steps_ahead: int = 0, prefix_cache: bool = True) -> Engine:
    clock = ManualClock()
    runner = KVCheckingRunner(num_blocks, SIZE, 0.0, steps_ahead, STEP, clock, windows)
    config = EngineConfig(max_num_batched_tokens=chunk, headroom_tokens=0, prefix_cache=prefix_cache)
    return Engine(runner, config, clock)


def finish(it: Engine) -> None:
    while it.has_work:
        assert it.step().failed == ()
    assert it.invariants() == []
    assert isinstance(it._runner, KVCheckingRunner)
    assert it._runner.wrong == []


def kept(made: Sequence, group: int) -> int:
    return len(made.tables[group]) - made.tables[group].count(NO_BLOCK)


def manager(num_blocks: int, *windows: int | None, chunk: int = 8, steps_ahead: int = 0) -> BlockManager:
    groups = LayerGroups(tuple(LayerGroup((layer,), window) for layer, window in enumerate(windows)))
    return BlockManager(num_blocks, SIZE, True, Windows(groups, SIZE, num_blocks, chunk, steps_ahead))


def computed(blocks: BlockManager, name: str, tokens: list[int], **options: object) -> Sequence:
    """Read in chunks of 8."""
    made = sequence(name, tokens, 1, **options)
    assert blocks.allocate(made)
    while made.computed_tokens < len(tokens):
        first, end = made.computed_tokens, min(made.computed_tokens + 8, len(tokens))
        blocks.advance(made, end)
        made.computed_tokens = made.launched_tokens = end
        blocks.register(made, first)
    return made


def count_calls(owner: object, method: str) -> list[None]:
    """One entry more whenever that method is called from now on."""
    calls: list[None] = []
    original: Callable[..., Any] = getattr(owner, method)

    def counted(*args: object) -> Any:
        calls.append(None)
        return original(*args)

    setattr(owner, method, counted)
    return calls


# --- how many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps_ahead", "reading", "decoding"),
    # Tokens under way see 7 before the oldest of them; with 8 a step that is a range of 15, 23, 31, which begins anywhere.
    [(0, 4, 3), (1, 6, 3), (2, 8, 4)],
)
def test_a_long_sequence_has_no_more_blocks_than_its_window_spans(steps_ahead: int, reading: int, decoding: int) -> None:
    it = engine(100, (8, None), steps_ahead=steps_ahead)
    made = sequence("a", LONG, 40)
    it.add(made)
    most = {False: 0, True: 0}
    while it.has_work:
        while it.launch():
            in_flight = made.launched_tokens - made.computed_tokens
            most[in_flight == made.pending_tokens] = max(most[in_flight == made.pending_tokens], kept(made, 0))
            assert len(made.tables[0]) * SIZE >= made.launched_tokens
        it.collect()
    assert most == {False: reading, True: decoding}
    assert made.tokens[64:] == run_alone(LONG, SamplingParams(max_tokens=40))
    finish(it)
    assert it.load().free_blocks == 100


def test_windows_make_a_prompt_fit_that_would_not_fit_all_layers() -> None:
    # Whole: 17 blocks. A window: its 7 tokens and a chunk of 8, which begin anywhere.
    least = 17 + 3 * 5
    it = engine(least, (8, 8, 8, None), prefix_cache=False)
    made = sequence("a", LONG, 4)
    it.add(made)
    finish(it)
    assert made.tokens[64:] == run_alone(LONG, SamplingParams(max_tokens=4))
    with pytest.raises(ContextLengthExceeded, match="67 tokens to keep, in 32 blocks of 4, but the KV cache has 31"):
        engine(least - 1, (8, 8, 8, None)).add(sequence("b", LONG, 4))


@pytest.mark.parametrize(
    ("windows", "blocks", "tokens"),
    [
        ((None, None), 16, 64),
        ((8, None), 2, 4),
        ((8, None), 9, 16),
        ((8, None), 21, 64),
        ((8, 8, 8, None), 31, 64),
        ((8,), 5, 256),
    ],
)
def test_what_a_cache_can_hold_of_one_sequence(windows: LayerWindows, blocks: int, tokens: int) -> None:
    """It holds that much, and no token more."""
    it = engine(blocks, windows)
    assert it.capacity_tokens == tokens
    it.add(sequence("a", [1] * (tokens - 1), 1))
    if tokens < it.max_model_len:
        with pytest.raises(ContextLengthExceeded):
            it.add(sequence("b", [1] * tokens, 2))


def test_without_a_full_layer_a_sequence_of_any_length_needs_a_fixed_number_of_blocks() -> None:
    it = engine(5, (8, 8), prefix_cache=False)
    made = sequence("a", LONG * 3, 60)
    it.add(made)
    finish(it)
    assert made.tokens[192:] == run_alone(LONG * 3, SamplingParams(max_tokens=60))


def test_prompts_that_are_being_read_keep_what_they_were_promised_from_all_others() -> None:
    """The windowed group of `first` has taken a part of its 5 blocks only; a second one is admitted no sooner than it decodes."""
    it = engine(17 + 5 + 4, (8, None), prefix_cache=False)
    first, second = sequence("first", LONG, 4), sequence("second", [1], 1)
    it.add(first)
    it.add(second)
    it.step()
    assert (kept(first, 0), second.status, it.load().free_blocks) == (2, Status.WAITING, 26 - 16 - 5)
    finish(it)


def test_one_that_decodes_is_promised_no_more_than_decoding_takes() -> None:
    it = engine(20, (8,))
    made = sequence("a", LONG, 10)
    it.add(made)
    available = []
    while it.has_work and made.output_tokens < 4:
        it.step()
        available.append(it._blocks.available_blocks)
    # 7 tokens before a chunk of 8, then before one token, which begin anywhere.
    assert available == [20 - 5] * 8 + [20 - 3] * 3
    finish(it)


def test_a_prompt_that_is_read_keeps_exactly_what_goes_over() -> None:
    it = engine(40, (6, None))
    held = sequence("a", LONG[:30], hold=True)
    it.add(held)
    while it.has_work:
        it.step()
    assert held.status is Status.HELD
    assert [block == NO_BLOCK for block in held.tables[0]] == [True] * 6 + [False] * 2  # tokens 25 to 29
    assert (kept(held, 1), it.load().held_blocks, it.load().free_blocks) == (8, 10, 30)
    assert it.cancel("a")
    finish(it)


def test_a_sequence_that_fits_only_so_is_read_in_chunks_of_a_window() -> None:
    """With 40 tokens in a step each window would keep all of the 67, in 17 blocks, and so no such prompt would ever fit."""
    it = engine(17 + 3 * 5, (8, 8, 8, None), chunk=40, prefix_cache=False)
    assert it.capacity_tokens == 68
    long, short = sequence("long", LONG, 4), sequence("short", LONG[:20], 4)
    it.add(long)
    it.add(short)
    chunks: dict[str, list[int]] = {"long": [], "short": []}
    while it.has_work:
        for part in it.step().parts:
            chunks[part.sequence.sequence_id].append(part.count)
    assert chunks == {"long": [8] * 8 + [1] * 3, "short": [20, 1, 1, 1]}
    assert long.tokens[64:] == run_alone(LONG, SamplingParams(max_tokens=4))
    finish(it)


def test_a_reservation_fits_a_cache_that_is_smaller_than_the_largest_step() -> None:
    it = engine(17 + 3 * 5, (8, 8, 8, None), chunk=1000)
    moved = sequence("moved", LONG, 4)
    it.reserve(moved)
    assert [admission.sequence for admission in it.admissions()] == [moved]


def test_output_that_may_never_come_keeps_nobody_waiting() -> None:
    """A window of 64 tokens, 4 of which each needs to begin with: with `headroom_tokens` of 0 that is all that is promised."""
    it = engine(12, (64,), prefix_cache=False)
    made = [sequence(f"s{index}", LONG[:3], 40, ticket=index + 1) for index in range(5)]
    for each in made:
        it.add(each)
    it.step()
    it.step()
    assert [each.status for each in made] == [Status.RUNNING] * 5
    finish(it)
    assert all(each.tokens[3:] == run_alone(LONG[:3], SamplingParams(max_tokens=40)) for each in made)
    assert made[0].preemptions == 0
    assert made[4].preemptions > 0, "5 times 43 tokens are more than 12 blocks: the youngest give way as windows fill"


def test_headroom_is_kept_for_windows_that_fill() -> None:
    clock = ManualClock()
    runner = KVCheckingRunner(12, SIZE, 0.0, 0, STEP, clock, (64,))
    it = Engine(runner, EngineConfig(max_num_batched_tokens=8, headroom_tokens=16, prefix_cache=False), clock)
    made = [sequence(f"s{index}", LONG[:3], 17, ticket=index + 1) for index in range(5)]
    for each in made:
        it.add(each)
    most = 0
    while it.has_work:
        assert it.step().failed == ()
        most = max(most, it.load().running)
    assert most == 2, "19 tokens each, in 5 blocks"
    assert [each.preemptions for each in made] == [0] * 5
    finish(it)


@pytest.mark.parametrize("steps_ahead", [1, 2, 3])
def test_tokens_that_are_drawn_while_a_prompt_is_under_way_have_blocks(steps_ahead: int) -> None:
    """Its blocks are full, and no window has left any of them when the next token is launched."""
    it = engine(40, (1, 5, None), steps_ahead=steps_ahead)
    made = sequence("a", LONG[:8], 20)
    it.add(made)
    while it.has_work:
        while it.launch():
            assert it._scheduler.check() == []
        it.collect()
    finish(it)


# --- reuse ----------------------------------------------------------------------------------------------------------------


def test_a_prefix_matches_where_its_window_is_cached_and_begins_with_nothing_on_the_left() -> None:
    blocks = manager(40, 6, None)
    blocks.free(computed(blocks, "a", LONG[:32]))
    again = sequence("b", [*LONG[:24], 99, 98], 1)
    assert blocks.allocate(again)
    assert (again.computed_tokens, again.matched_blocks) == (24, 6)
    assert [block == NO_BLOCK for block in again.tables[0]] == [True] * 4 + [False] * 2  # the next token sees 19 to 24
    assert len(again.tables[1]) == 7
    assert blocks.check([again]) == []


def test_of_what_a_window_leaves_at_once_the_end_is_evicted_first() -> None:
    """A prefix that others share is short: the longer one that this prompt alone can reuse goes first."""
    blocks = manager(17, 6, None, chunk=32)
    made = sequence("a", LONG[:33], 1)
    assert blocks.allocate(made)
    for first, end in ((0, 32), (32, 33)):
        blocks.advance(made, end)
        made.computed_tokens = made.launched_tokens = end
        blocks.register(made, first)
    while blocks.cached_blocks == 16:
        blocks._pool.take()
    shared = [len(blocks.fit(sequence("c", [*LONG[:end], 99], 1)).match.tables[0]) for end in (8, 16, 24, 32)]
    assert shared == [2, 4, 5, 8]


def test_a_match_is_as_long_as_the_blocks_of_every_group_allow() -> None:
    blocks = manager(40, 6, None)
    first = computed(blocks, "a", LONG[:32])
    left = [first.tables[0][index] for index in (6, 7)]
    blocks.free(first)
    blocks._pool.forget(left[0])
    blocks._pool.forget(left[1])
    again = sequence("b", LONG[:32], 1)
    assert blocks.allocate(again)
    assert again.computed_tokens == 24
    assert blocks.check([again]) == []


def test_with_windows_alone_the_beginning_of_a_prefix_need_not_be_there() -> None:
    blocks = manager(5, 6)
    blocks.free(computed(blocks, "a", LONG[:64]))
    again = sequence("b", [*LONG[:60], 99], 1)
    assert blocks.allocate(again)
    assert (again.computed_tokens, again.tables[0].count(NO_BLOCK)) == (60, 13)


def test_what_a_sequence_needs_is_not_evicted_for_what_it_gets() -> None:
    blocks = manager(13, 6, None)
    blocks.free(computed(blocks, "a", LONG[:24]))
    again = sequence("b", [*LONG[:24], 99], 1)
    assert blocks.allocate(again)
    blocks.advance(again, 25)
    owned = [block for table in again.tables for block in table if block != NO_BLOCK]
    assert len(set(owned)) == len(owned) == 7 + 3
    assert blocks.check([again]) == []


def test_a_block_of_which_only_the_end_came_in_is_never_reused() -> None:
    it = engine(60, (5, None))
    runner = it._runner
    assert isinstance(runner, KVCheckingRunner)
    moved = sequence("moved", LONG[:30], 8)
    it.reserve(moved)
    it.admissions()
    assert [block == NO_BLOCK for block in moved.tables[0]] == [True] * 6 + [False] * 2
    runner.write(moved, 0, 30)  # of the windowed layer tokens 26 to 29: block 6 begins with 24, which token 28 sees
    assert it.start(moved, run_alone(LONG[:30], SamplingParams(max_tokens=1))[0]) is None
    finish(it)
    later = sequence("later", LONG[:29], 1)
    it.add(later)
    finish(it)
    assert later.cached_tokens == 0
    whole = sequence("whole", [*moved.tokens[:36], 49], 1)
    it.add(whole)
    finish(it)
    assert whole.cached_tokens == 36, "block 8 is whole, and all that token 36 sees"


def test_a_reservation_gets_what_its_prefix_supplies_and_room_for_the_rest_of_the_window() -> None:
    blocks = manager(60, 6, None)
    blocks.free(computed(blocks, "a", LONG[:28]))
    moved = sequence("moved", LONG[:30], 8)
    moved.incoming = True
    assert blocks.allocate(moved)
    assert (moved.computed_tokens, kept(moved, 0), len(moved.tables[0]), len(moved.tables[1])) == (28, 2, 8, 8)
    assert not blocks._ragged, "the first of the two is the cache's"
    assert blocks.check([moved]) == []


def test_what_a_window_left_behind_is_forgotten_with_a_fault() -> None:
    blocks = manager(60, 6, None)
    bad = computed(blocks, "bad", LONG[:32])
    sharer = computed(blocks, "sharer", [*LONG[:8], 99])
    assert sharer.matched_blocks == 2
    blocks.free(bad, keep_cached=False)
    assert blocks.check([sharer]) == []
    assert blocks.cached_blocks == 0


def test_what_a_window_left_that_others_wrote_and_live_in_stays() -> None:
    blocks = manager(60, 6, None)
    writer = computed(blocks, "writer", LONG[:8])
    bad = computed(blocks, "bad", LONG[:32])
    assert (bad.matched_blocks, bad.tables[0][:2]) == (2, [NO_BLOCK] * 2)
    blocks.free(bad, keep_cached=False)
    assert blocks.check([writer]) == []
    assert blocks.cached_blocks == 2 + 2


def test_a_refused_claim_is_looked_at_again_when_anything_is_cached() -> None:
    blocks = manager(17, 6, None)
    room = Room(blocks, headroom_tokens=0)
    other = sequence("other", LONG[:24], 1)
    assert blocks.allocate(other)
    claim = sequence("claim", [*LONG[:24], 99], 1)
    for end in (8, 16, 24):
        assert not room.take(claim, [], 0)
        blocks.advance(other, end)
        other.computed_tokens = other.launched_tokens = end
        blocks.register(other, end - 8)
    assert room.take(claim, [], 0)
    assert claim.matched_blocks == 6


@pytest.mark.parametrize("windows", [(6,), (6, None), (1, None), (6, 20, None), (6, 20)])
@pytest.mark.parametrize("incoming", [False, True])
def test_the_longest_match_is_the_longest_of_all_prefixes_that_would_do(windows: LayerWindows, incoming: bool) -> None:
    chance = Random(str((windows, incoming)))
    for _ in range(200):
        blocks = manager(60, *windows)
        blocks.free(computed(blocks, "a", LONG[:48]))
        for block in range(60):
            if chance.random() < 0.1:
                blocks._pool.forget(block)
        again = sequence("b", LONG[:41], 1)
        again.incoming = incoming

        def cached(group: int, index: int, again: Sequence = again, blocks: BlockManager = blocks) -> bool:
            return blocks.is_cached(blocks._contents.name(again, group, index))

        fit = blocks.fit(again)
        does = [
            all(
                cached(group, index)
                for group, window in enumerate(windows)
                for index in range(0 if window is None else max(0, (41 if incoming else end * SIZE) - window + 1) // SIZE, end)
            )
            for end in range(11)
        ]
        longest = max(end for end in range(11) if does[end])
        if all(block == NO_BLOCK for table in fit.match.tables for block in table):
            longest = 0
        assert [len(table) for table in fit.match.tables] == [longest] * len(windows)


def test_what_is_not_seen_of_a_reservation_does_not_count_as_cached() -> None:
    blocks = manager(40, 6)
    blocks.free(computed(blocks, "other", LONG[40:50]))
    moved = sequence("moved", LONG[:30], 8)
    moved.incoming = True
    assert blocks.allocate(moved)
    assert (moved.computed_tokens, kept(moved, 0)) == (0, 2)
    assert blocks.check([moved]) == []


def test_a_long_match_looks_up_no_more_than_its_windows_see() -> None:
    """A prompt of 100,000 tokens may be the head of the queue for many steps."""
    blocks = manager(80, 6, 6, 6, None)
    blocks.free(computed(blocks, "a", LONG))
    again = sequence("b", [*LONG, 99], 1)
    looked_up = count_calls(blocks._contents, "find")
    assert [len(table) for table in blocks.fit(again).match.tables] == [16] * 4
    assert len(looked_up) == 2 * 3 * 2, "of each window two blocks, once to find them and once to take them"


def test_a_refused_claim_is_looked_at_again_only_if_what_is_cached_could_make_room() -> None:
    """In windows alone a match spares nothing: what they see is promised all the same."""
    blocks = manager(11, 6)
    room = Room(blocks, headroom_tokens=0)
    other, claim = sequence("other", LONG[:24], 1), sequence("claim", [*LONG[:32], 99], 1)
    third = sequence("third", LONG[30:40], 1)
    assert room.take(other, [], 0)
    assert room.take(third, [], 0)
    looks = count_calls(blocks, "fit")
    for end in (8, 16, 24):
        assert not room.take(claim, [], 0)
        blocks.advance(other, end)
        other.computed_tokens = other.launched_tokens = end
        blocks.register(other, end - 8)
    assert len(looks) == 1
    blocks.free(other)
    assert room.take(claim, [], 0)


def test_a_claim_that_lacked_only_what_windows_see_is_looked_at_again_when_that_is_cached() -> None:
    blocks = manager(24, 6, None)
    room = Room(blocks, headroom_tokens=0)
    other = computed(blocks, "other", LONG[:24])
    claim = sequence("claim", [*LONG[:24], 99], 1)
    for index in (4, 5):
        blocks._contents.forget(other.tables[0][index])
    assert room.take(sequence("filler", LONG[30:42], 1, hold=True), [], 0)
    assert (blocks.fit(claim).match.latent, blocks.available_blocks) == (2, 7)
    assert not room.take(claim, [], 0), "3 blocks beside 4 that match, and a window of 5"
    blocks.register(other, 16)
    assert room.take(claim, [], 0)
    assert claim.matched_blocks == 6


def test_a_refused_claim_is_looked_at_again_when_what_it_matched_came_into_use_by_eviction() -> None:
    """`other` has a copy under way of what `claim` matches; its window evicts the cached one, and so the copy becomes shared."""
    blocks = manager(7, None, 6)
    room = Room(blocks, headroom_tokens=0)
    for name, tokens in (("evicted", LONG[:4]), ("cached", LONG[30:38])):
        blocks.free(computed(blocks, name, tokens))
    other, claim = sequence("other", LONG[:4], 1), sequence("claim", LONG[:9], 1)
    assert room.take(other, [], 0)
    assert not room.take(claim, [], 0)
    blocks.advance(other, 4)
    other.computed_tokens = other.launched_tokens = 4
    blocks.register(other, 0)
    assert room.take(claim, [], 0)
    assert blocks.check([other, claim]) == []


def test_a_promise_that_ended_counts_like_freed_blocks() -> None:
    blocks = manager(11, 6, None)
    room = Room(blocks, headroom_tokens=0)
    owner, claim = sequence("owner", LONG[:24], 1), sequence("claim", LONG[30:54], 1)
    assert room.take(owner, [], 0)
    assert (kept(owner, 0), blocks.available_blocks, blocks.free_blocks) == (0, 0, 5)
    assert not room.take(claim, [], 0)
    blocks.free(owner)
    assert room.take(claim, [], 0)


# --- the checker ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(1, 1), (1, 2), (2, 1)])
def test_what_cools_for_some_of_its_owners_counts_for_those_who_are_left(steps: tuple[int, int]) -> None:
    blocks = manager(60, 8)
    stays = computed(blocks, "stays", LONG[:16])
    alone = blocks.available_blocks
    go = [sequence(name, [*LONG[:16], 39], 1) for name in "ab"]
    for made, step in zip(go, steps, strict=True):
        assert blocks.allocate(made)
        assert kept(made, 0) == 2
        made.last_step = step
    for index, made in enumerate(go):
        blocks.free(made)
        assert blocks.check([stays, *go[index + 1 :]]) == []
    for step in (1, 2):
        blocks.collected(step)
        assert blocks.check([stays]) == []
    assert blocks.available_blocks == alone
    blocks.free(stays)
    assert blocks.available_blocks == 60


def test_the_checker_sees_a_promise_that_is_not_kept() -> None:
    blocks = manager(30, 6, None)
    made = computed(blocks, "a", LONG[:24])
    assert blocks.check([made]) == []
    blocks._promises.outstanding += 1
    assert any("outstanding but" in line for line in blocks.check([made]))
    blocks._promises.outstanding -= 1
    made.tables[0][-1] = NO_BLOCK
    assert any("needs group 0 from block" in line for line in blocks.check([made]))

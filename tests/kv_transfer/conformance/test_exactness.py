"""What arrives is what was sent, whatever the shapes, the order and the company."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.layout import KVLayout, LayerShape, Shard, Span
from kv_transfer.byte_store import ByteStore
from kv_transfer.events import Delivered, Received, SendFailed
from kv_transfer.terms import Terms
from kv_transfer.transports.fault import Fault, Message
from tests.kv_transfer.conformance.ways import (
    LAYERS,
    SOURCE_BLOCKS,
    TARGET_BLOCKS,
    Way,
    assert_same,
    over_all_ways,
    over_quick_ways,
    push_all,
)
from tests.kv_transfer.rig import POISON, filled, layout, poisoned, sequence_bytes, untouched_outside


@over_quick_ways
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 40),
    st.integers(0, 40),
    st.lists(st.integers(1, 39), max_size=4),
    st.randoms(use_true_random=False),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_what_arrives_is_what_was_sent_whatever_the_block_sizes_and_the_order(
    way: Way, source_size: int, target_size: int, one: int, other: int, cuts: list[int], dice: random.Random, dtype: str
) -> None:
    first, stop = sorted((one, other))
    source, target = filled(layout(source_size, dtype), 41), poisoned(layout(target_size, dtype), 41)
    source_blocks, target_blocks = dice.sample(range(41), 40), dice.sample(range(41), 40)
    edges = sorted({0, stop, *(cut for cut in cuts if cut < stop)})
    pushes = [(layer, low, high - low) for layer in range(LAYERS) for low, high in pairwise(edges)]
    dice.shuffle(pushes)
    with way.connected(source, target) as pair:
        pair.receiver.open(Terms(1, "a", first, stop, 30.0), [target_blocks])
        session = pair.sender.begin(Terms(1, "a", first, stop, 30.0), [pair.receiver.endpoint], [source_blocks])
        for push in pushes:
            session.push(*push)
        session.finish(b"first token")
        (received,), (delivered,) = pair.received.expect(Received), pair.sent.expect(Delivered)
    size = (stop - first) * source.layout.bytes_per_token
    assert (received.grant, received.attempt, received.tail) == (1, "a", b"first token")
    assert received.kv_bytes == delivered.kv_bytes == size
    assert sequence_bytes(target, target_blocks, first, stop) == sequence_bytes(source, source_blocks, first, stop)
    assert untouched_outside(target, target_blocks, first, stop)


@over_all_ways
def test_a_session_that_begins_after_everything_is_computed_catches_up(way: Way) -> None:
    with way.connected() as pair:
        pair.receiver.open(Terms(1, "attempt-1", 5, 12, 30.0), [TARGET_BLOCKS])
        session = pair.sender.begin(Terms(1, "attempt-1", 5, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        for layer in range(LAYERS):
            session.push(layer, 0, 8)  # what had been computed before
        for layer in range(LAYERS):
            session.push(layer, 6, 6)  # the step that was running, overlapping it
        session.finish(b"")
        pair.received.expect(Received)
        assert_same(pair, 5, 12)


@over_all_ways
def test_blocks_may_be_given_as_they_are_allocated(way: Way) -> None:
    blocks: list[int] = []
    with way.connected() as pair:
        pair.receiver.open(Terms(1, "attempt-1", 0, 12, 30.0), [TARGET_BLOCKS])
        session = pair.sender.begin(Terms(1, "attempt-1", 0, 12, 30.0), [pair.receiver.endpoint], [blocks])
        for chunk, block in enumerate(SOURCE_BLOCKS):
            blocks.append(block)
            for layer in range(LAYERS):
                session.push(layer, chunk * 4, 4)
        session.finish(b"")
        pair.received.expect(Received)
        assert_same(pair)


@over_all_ways
def test_many_sessions_share_a_connection_and_all_arrive(way: Way) -> None:
    source, target = filled(layout(4), 100), poisoned(layout(3), 140)
    with way.connected(source, target) as pair:
        for grant in range(40):
            first = grant % 5
            pair.receiver.open(Terms(grant, f"a{grant}", first, 8, 30.0), [range(grant * 3, grant * 3 + 3)])
            session = pair.sender.begin(
                Terms(grant, f"a{grant}", first, 8, 30.0), [pair.receiver.endpoint], [[2 * grant, 2 * grant + 1]]
            )
            push_all(session, 8)
            session.finish(str(grant).encode())
        for received in pair.received.expect(Received, 40):
            grant, first = received.grant, received.grant % 5
            assert received.tail == str(grant).encode()
            got = sequence_bytes(target, range(grant * 3, grant * 3 + 3), first, 8)
            assert got == sequence_bytes(source, [2 * grant, 2 * grant + 1], first, 8)
        assert len(pair.sent.expect(Delivered, 40)) == 40
        assert pair.receiver.open_grants == 0


@over_all_ways
def test_a_short_session_is_not_stuck_behind_a_long_one(way: Way) -> None:
    """Sessions take turns piece by piece: a session of one piece passes one of hundreds."""
    shape = [LayerShape(8, 128, 128)]
    source, target = ByteStore(layout(256, shapes=shape), 65), ByteStore(layout(256, shapes=shape), 65)
    gate, behind = threading.Event(), threading.Event()

    def plan(message: Message) -> Fault | None:
        if message.dialled and message.index == 3:
            behind.set()
            gate.wait(20)
        return None

    with way.connected(source, target, plan) as pair:
        sessions = []
        for grant, blocks in ((1, range(64)), (2, [64])):
            pair.receiver.open(Terms(grant, f"a{grant}", 0, len(blocks) * 256, 30.0), [blocks])
            session = pair.sender.begin(Terms(grant, f"a{grant}", 0, len(blocks) * 256, 30.0), [pair.receiver.endpoint], [blocks])
            session.push(0, 0, len(blocks) * 256)
            session.finish(b"")
            sessions.append(session)
            assert behind.wait(20)  # the long one is on the wire before the short one begins
        gate.set()
        pair.received.expect(Received, 2)
        assert [received.grant for received in pair.received.of(Received)] == [2, 1]


@over_all_ways
@pytest.mark.parametrize(("first", "stop"), [(0, 12), (5, 12), (11, 12), (0, 2)])
def test_a_windowed_grant_moves_only_what_each_layer_still_sees(way: Way, first: int, stop: int) -> None:
    shapes = [LayerShape(2, 3, 2), LayerShape(1, 4, 4, sliding_window=4), LayerShape(2, 2, 1, sliding_window=100)]
    source, target = filled(layout(4, shapes=shapes)), poisoned(layout(3, shapes=shapes))
    wanted = [range(first, stop), range(min(max(first, stop - 3), stop), stop), range(first, stop)]
    target_blocks = [30, 4, 2, 7]
    with way.connected(source, target) as pair:
        pair.receiver.open(Terms(1, "a", first, stop, 30.0, windowed=True), [target_blocks])
        session = pair.sender.begin(Terms(1, "a", first, stop, 30.0, windowed=True), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        push_all(session, stop)
        session.finish(b"")
        (received,), _ = pair.received.expect(Received), pair.sent.expect(Delivered)
    assert received.kv_bytes == sum(len(tokens) * source.layout.layer_bytes_per_token(i) for i, tokens in enumerate(wanted))
    for layer, tokens in enumerate(wanted):
        for key_or_value in (0, 1):
            got, sent = target.pages[layer][key_or_value], source.pages[layer][key_or_value]
            expected = np.full_like(got, POISON)
            for token in tokens:
                expected[target_blocks[token // 3], token % 3] = sent[SOURCE_BLOCKS[token // 4], token % 4]
            assert np.array_equal(got, expected)


@over_all_ways
def test_sides_that_disagree_about_windows_do_not_exchange_a_byte(way: Way) -> None:
    with way.connected() as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [TARGET_BLOCKS])
        push_all(pair.sender.begin(Terms(1, "a", 0, 12, 30.0, windowed=True), [pair.receiver.endpoint], [SOURCE_BLOCKS]))
        (failed,) = pair.sent.expect(SendFailed)
        assert "not for this attempt" in str(failed.error)
        assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 0)


@over_all_ways
def test_ranks_that_hold_the_same_part_exchange_it(way: Way) -> None:
    """Layers and heads keep the model's numbers; the stores hold nothing else."""
    model = layout().model
    parts = [KVLayout(model=model, shard=Shard(Span(1, 3), Span(1, 2)), block_size=size) for size in (4, 5)]
    source, target = filled(parts[0]), poisoned(parts[1])
    with way.connected(source, target) as pair:
        pair.receiver.open(Terms(1, "a", 2, 12, 30.0), [TARGET_BLOCKS])
        session = pair.sender.begin(Terms(1, "a", 2, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        for layer in (1, 2):
            session.push(layer, 0, 12)
        session.finish(b"")
        pair.received.expect(Received)
    assert sequence_bytes(target, TARGET_BLOCKS, 2, 12) == sequence_bytes(source, SOURCE_BLOCKS, 2, 12)
    assert untouched_outside(target, TARGET_BLOCKS, 2, 12)

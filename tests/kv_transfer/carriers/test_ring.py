"""Who may touch which slot, whatever order the two ends run in and whatever the peer says."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import CorruptTransfer
from kv_transfer.carriers.ring import ConsumerSlots, ProducerSlots

STEPS = st.lists(st.sampled_from(["claim", "ship", "discard", "lose", "take", "release", "hear"]), max_size=300)


class World:
    """Both ends, the stream between them and the notes back; `memory` is what each slot holds."""

    def __init__(self, slots: int, every: int) -> None:
        self.producer, self.consumer = ProducerSlots(slots), ConsumerSlots(slots, every)
        self.memory = [-1] * slots
        self.held: deque[tuple[int, int]] = deque()  # slot, content
        self.stream: deque[tuple[int, int, int]] = deque()  # number, slot, content
        self.taken: deque[tuple[int, int]] = deque()  # slot, content
        self.notes: deque[int] = deque()
        self.made = self.read = 0

    def can(self, step: str) -> bool:
        waiting = {"ship": self.held, "discard": self.held, "lose": self.held, "take": self.stream, "release": self.taken}
        if step == "claim":
            return len(self.held) < 2
        return bool(waiting.get(step, self.notes))

    def do(self, step: str) -> bool:
        """False if there was nothing to claim."""
        match step:
            case "claim":
                slot = self.producer.claim()
                if slot is None:
                    return False
                busy = [*self.held, *self.taken, *((slot, content) for _, slot, content in self.stream)]
                assert slot not in [other for other, _ in busy]
                self.memory[slot] = self.made
                self.held.append((slot, self.made))
                self.made += 1
            case "discard":
                slot, _ = self.held.pop()  # the younger first, if there are two
                self.producer.discard(slot)
            case "ship" | "lose":
                slot, content = self.held.popleft()
                number = self.producer.ship(slot)
                if step == "ship":
                    self.stream.append((number, slot, content))
            case "take":
                number, slot, content = self.stream.popleft()
                self.consumer.take(number, slot)
                self.taken.append((slot, content))
            case "release":
                slot, content = self.taken.popleft()
                assert self.memory[slot] == content
                self.read += 1
                done = self.consumer.release()
                if done is not None:
                    self.notes.append(done)
            case "hear":
                self.producer.freed(self.notes.popleft())
        return True


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(4, 9), st.integers(1, 7))
def test_a_slot_is_one_ends_at_a_time_and_is_read_as_it_was_filled(steps: list[str], slots: int, every: int) -> None:
    world = World(slots, min(every, slots - 2))
    for step in steps:
        if world.can(step):
            world.do(step)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(4, 9), st.integers(1, 7))
def test_a_producer_that_holds_at_most_one_gets_another_once_the_consumer_has_caught_up(
    steps: list[str], slots: int, every: int
) -> None:
    world = World(slots, min(every, slots - 2))
    for step in steps:
        if world.can(step) and step != "lose":
            world.do(step)
    for step in ("take", "release", "hear"):
        while world.can(step):
            world.do(step)
    if len(world.held) < 2:
        assert world.do("claim")


def test_slots_that_lost_payloads_held_come_back_with_the_next_word() -> None:
    world = World(4, 2)
    for step in ("claim", "lose", "claim", "ship", "take", "release", "hear"):
        world.do(step)
    assert [world.do("claim") for _ in range(5)] == [True] * 4 + [False]


def test_notes_are_few() -> None:
    world = World(6, 4)
    for _ in range(40):
        for step in ("claim", "ship", "take", "release"):
            world.do(step)
        notes = len(world.notes)
        while world.notes:
            world.do("hear")
        assert notes == (1 if world.read % 4 == 0 else 0)


@pytest.mark.parametrize("done", [0, 1, 4, 1 << 63])
def test_word_about_payloads_that_were_not_under_way_is_refused(done: int) -> None:
    producer = ProducerSlots(4)
    for _ in range(3):
        slot = producer.claim()
        assert slot is not None
        producer.ship(slot)
    producer.freed(1)  # the rest: said before, and never shipped
    with pytest.raises(CorruptTransfer, match="expected a count in"):
        producer.freed(done)
    producer.freed(3)


@pytest.mark.parametrize(
    ("number", "slot", "words"),
    [
        (0, 2, "again"),  # repeated
        (2, 2, "late"),
        (4, 2, "again"),
        (5, 4, "slot 4"),  # no such slot
        (5, 1, "slot 1"),  # being read
    ],
)
def test_a_payload_that_is_not_the_next_or_not_where_the_sender_may_fill_is_refused(number: int, slot: int, words: str) -> None:
    consumer = ConsumerSlots(4, 2)
    consumer.take(0, 0)
    consumer.take(4, 1)  # those between were lost on the way
    consumer.release()
    with pytest.raises(CorruptTransfer, match=words):
        consumer.take(number, slot)
    consumer.take(5, 0)

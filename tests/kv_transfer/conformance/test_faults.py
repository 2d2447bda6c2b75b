"""Faults of the wire and of payloads: noticed by both sides, never stored, never committed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from core.clock import ManualClock
from core.errors import CorruptTransfer, LeaseExpired, TransferError
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.frames import HEADER_BYTES
from kv_transfer.transports.fault import Drop, Duplicate, Fault, FlipBit, Message, Reorder, Trickle, Truncate
from tests.kv_transfer.conformance.ways import (
    LAYERS,
    TARGET_BLOCKS,
    WAYS,
    Way,
    assert_same,
    begin,
    over_all_ways,
    over_quick_ways,
    push_all,
    settle,
)
from tests.kv_transfer.rig import POISON, Pair, untouched_outside


def fault_cases() -> list[tuple[str, Fault]]:
    cases: list[tuple[str, Fault]] = [("drop", Drop()), ("duplicate", Duplicate()), ("reorder", Reorder())]
    cases += [(f"truncate {keep}", Truncate(keep)) for keep in (0, 1, 51, 52, 53, 60)]
    cases += [(f"flip {bit}", FlipBit(bit)) for bit in (0, 100, 300, 415, 416, 440)]
    return cases


def end(pair: Pair, clock: ManualClock) -> None:
    """Until both sides know: what none can see, the leases end."""
    while not (pair.sent.events and pair.received.events):
        clock.advance(1.0)
        pair.sweep()


def matrix(indices: Sequence[int], together: bool = False) -> pytest.MarkDecorator:
    """Every fault in every message, over every way; in the middle one over the slow ways. Frames that leave `together` are one
    message, the first, where the stream carries payloads."""
    middle = indices[len(indices) // 2]
    cases = [
        pytest.param(way, name, fault, index, id=f"{way.name}-{name}-{index}")
        for way in WAYS
        for name, fault in fault_cases()
        for index in indices
        if index == middle or not way.slow
        if index == indices[0] or not (together and way.in_stream)
    ]
    return pytest.mark.parametrize(("way", "name", "fault", "index"), cases)


@matrix(range(2, 2 + LAYERS + 2))
def test_a_fault_in_any_frame_is_noticed_by_both_sides(way: Way, name: str, fault: Fault, index: int) -> None:
    clock = ManualClock()

    def plan(message: Message) -> Fault | None:
        return fault if message.dialled and message.index == index else None

    with way.connected(plan=plan, clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        settle(pair)
        for layer in range(LAYERS):
            session.push(layer, 0, 12)
            settle(pair)
        session.finish(b"t")
        end(pair, clock)
        assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 12)
        if name == "duplicate" and pair.received.of(Received):  # the first FINISH was right; the second came after the end
            assert_same(pair)
        else:
            assert not pair.received.of(Received)
            assert not pair.sent.of(Delivered)


@matrix([2, 3, 4], together=True)
def test_nor_is_it_missed_when_frames_leave_together(way: Way, name: str, fault: Fault, index: int) -> None:
    clock, pushed, struck = ManualClock(), threading.Event(), threading.Event()

    def plan(message: Message) -> Fault | None:
        if not message.dialled or message.index != index:
            return pushed.wait(20) and None
        struck.set()
        return fault

    with way.connected(plan=plan, clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        push_all(session)
        session.finish(b"t")
        pushed.set()
        assert struck.wait(20)
        end(pair, clock)
        assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 12)
        if pair.received.of(Received):  # only what came after the right FINISH can have been hurt
            assert name in ("duplicate", "drop", "reorder")
            assert_same(pair)


@over_quick_ways
def test_every_flipped_bit_of_frames_that_leave_together_is_noticed(way: Way) -> None:
    for bit in range(0, 8 * 915, 61):  # what three pieces, BEGIN and FINISH are where one message holds them
        pushed = threading.Event()

        def plan(message: Message, bit: int = bit, pushed: threading.Event = pushed) -> Fault | None:
            pushed.wait(20)
            return FlipBit(bit) if message.dialled and message.index == 2 else None

        with way.connected(plan=plan) as pair:
            session = begin(pair)
            push_all(session)
            session.finish(b"t")
            pushed.set()
            pair.sent.expect(SendFailed)
            assert not pair.received.of(Received)


@over_quick_ways
def test_every_flipped_bit_of_a_commit_is_noticed(way: Way) -> None:
    for bit in range(0, (HEADER_BYTES + 10) * 8, 3):
        clock, armed = ManualClock(), threading.Event()

        def plan(message: Message, bit: int = bit, armed: threading.Event = armed) -> Fault | None:
            return FlipBit(bit) if not message.dialled and armed.is_set() else None

        with way.connected(plan=plan, clock=clock) as pair:
            session = begin(pair)
            push_all(session)
            settle(pair)
            armed.set()
            session.finish(b"")
            (failed,) = pair.sent.expect(SendFailed)
            assert isinstance(failed.error, CorruptTransfer)


@over_all_ways
def test_a_wire_that_trickles_delivers_all_the_same(way: Way) -> None:
    with way.connected(plan=lambda message: Trickle(7, 0.0)) as pair:
        session = begin(pair)
        push_all(session)
        session.finish(b"")
        pair.sent.expect(Delivered)
        assert_same(pair)


@over_all_ways
def test_a_trickled_frame_is_no_sign_of_life_until_it_is_whole(way: Way) -> None:
    clock, gate = ManualClock(), threading.Event()
    chunks = 0

    def pause(seconds: float) -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 3:
            clock.advance(6.0)
            pair.receiver.sweep()
            gate.set()

    def plan(message: Message) -> Fault | None:
        return Trickle(10, 1.0) if message.dialled and message.index == 3 else None

    with way.connected(plan=plan, sleep=pause, clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        settle(pair)  # BEGIN has left
        push_all(session)
        assert gate.wait(20)
        (broken,) = pair.received.expect(Broken)
        assert isinstance(broken.error, LeaseExpired)
        pair.sent.expect(SendFailed)
        assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 0)


@over_all_ways
def test_a_lost_connection_fails_what_was_on_it_and_the_next_session_dials_again(way: Way) -> None:
    cut = threading.Event()

    def plan(message: Message) -> Fault | None:
        return Truncate(60) if cut.is_set() and message.dialled and not cut.clear() else None

    with way.connected(plan=plan, clock=ManualClock()) as pair:
        session = begin(pair, 1)
        settle(pair)
        session.push(0, 0, 12)
        settle(pair)
        cut.set()
        push_all(session)
        session.finish(b"")
        pair.sent.expect(SendFailed)
        (broken,) = pair.received.expect(Broken)
        assert broken.grant == 1
        session = begin(pair, 2)
        push_all(session)
        session.finish(b"")
        pair.sent.expect(Delivered)
        assert_same(pair)


# --- payloads, wherever they travel -----------------------------------------------------------------------------------


def flip(payload: memoryview, last: bytes) -> None:
    payload[len(payload) // 2] ^= 4


def cut_short(payload: memoryview, last: bytes) -> None:
    half = len(payload) // 2
    payload[half:] = bytes(len(payload) - half)


def again(payload: memoryview, last: bytes) -> None:
    """What was there before is still there: a write that was lost, or came in the wrong order."""
    size = min(len(last), len(payload))
    payload[:size] = last[:size]


def swap(payload: memoryview, last: bytes) -> None:
    payload[:] = bytes(reversed(payload))


@over_all_ways
@pytest.mark.parametrize("harm", [flip, cut_short, again, swap])
@pytest.mark.parametrize("at", range(LAYERS))
def test_a_payload_that_is_not_what_was_digested_is_not_stored(
    way: Way, harm: Callable[[memoryview, bytes], None], at: int
) -> None:
    seen: list[bytes] = []

    def damage(payload: memoryview) -> None:
        last = seen[-1] if seen else bytes(len(payload))
        if len(seen) == at:
            harm(payload, last)
        seen.append(bytes(payload))

    with way.connected(damage=damage) as pair:
        session = begin(pair)
        push_all(session)
        session.finish(b"")
        (broken,), (failed,) = pair.received.expect(Broken), pair.sent.expect(SendFailed)
        assert isinstance(broken.error, CorruptTransfer)
        assert isinstance(failed.error, CorruptTransfer)
        assert (pair.target.pages[at][0] == POISON).all()


@over_all_ways
def test_a_carrier_that_breaks_costs_its_connection_and_the_next_session_dials_anew(way: Way) -> None:
    broken_once = threading.Event()

    def damage(payload: memoryview) -> None:
        if not broken_once.is_set():
            broken_once.set()
            raise TransferError("the carrier is gone")

    with way.connected(damage=damage, clock=(clock := ManualClock())) as pair:
        session = begin(pair, 1)
        settle(pair)
        push_all(session)
        (failed,) = pair.sent.expect(SendFailed)
        assert "the carrier is gone" in str(failed.error)
        pair.received.expect(Broken)
        assert clock.now() == 0.0
        session = begin(pair, 2)
        push_all(session)
        session.finish(b"")
        pair.received.expect(Received)
        assert_same(pair)

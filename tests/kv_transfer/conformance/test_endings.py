"""How sessions end: who is told, what is no more read or written, and what a lease is worth."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from core.clock import ManualClock, MonotonicClock
from core.errors import LeaseExpired, TransferAborted
from kv_transfer.byte_store import ByteStore
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.terms import Terms
from kv_transfer.transports.fault import Drop, Fault, Message
from tests.kv_transfer.conformance.ways import (
    LAYERS,
    SOURCE_BLOCKS,
    TARGET_BLOCKS,
    Way,
    begin,
    over_all_ways,
    push_all,
    settle,
)
from tests.kv_transfer.rig import layout, untouched_outside


@over_all_ways
@pytest.mark.parametrize("at", [1, 2, LAYERS])
def test_nothing_is_written_after_close_and_the_sender_is_told(way: Way, at: int) -> None:
    """The receiver closes a grant while its `at`-th piece is being stored: close waits for that one, and it is the last."""
    reached, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    class Store(ByteStore):
        writes = 0

        def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
            assert not closed.is_set(), "written after close"
            self.writes += 1
            if self.writes == at:
                reached.set()
                go_on.wait(20)
            super().write(layer, blocks, start, count, data)

    target = Store(layout(4), 32)
    with way.connected(target=target) as pair:
        session = begin(pair)
        push_all(session)
        session.finish(b"")
        assert reached.wait(20)
        closing = threading.Thread(target=lambda: (pair.receiver.close(1, "the client has left"), closed.set()))
        closing.start()
        assert not closed.wait(0.02)
        go_on.set()
        closing.join(20)
        assert closed.is_set()
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, TransferAborted)
        assert "the client has left" in str(failed.error)
        assert target.writes == at
        assert pair.received.events == []
        assert not pair.receiver.close(1, "again")
        assert session.ended


@over_all_ways
def test_abort_ends_the_receiving_side_and_the_store_is_not_read_again(way: Way) -> None:
    reading, go_on = threading.Event(), threading.Event()

    class Store(ByteStore):
        reads = 0

        def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
            self.reads += 1
            reading.set()
            go_on.wait(20)
            super().read(layer, blocks, start, count, out)

    source = Store(layout(4), 32)
    with way.connected(source) as pair:
        session = begin(pair)
        push_all(session)
        assert reading.wait(20)
        returned = threading.Event()
        threading.Thread(target=lambda: (session.abort("cancelled"), returned.set())).start()
        assert not returned.wait(0.05)  # a read is under way: abort waits for it
        go_on.set()
        assert returned.wait(20)
        reads = source.reads
        push_all(session)
        session.finish(b"")
        (broken,) = pair.received.expect(Broken)
        assert isinstance(broken.error, TransferAborted)
        assert "cancelled" in str(broken.error)
        assert source.reads == reads == 1
        assert pair.sent.events == []
        assert not session.abort("again")


@over_all_ways
def test_a_silent_sender_loses_its_lease_and_hears_of_it(way: Way) -> None:
    clock, stored = ManualClock(), threading.Event()

    class Store(ByteStore):
        def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
            super().write(layer, blocks, start, count, data)
            stored.set()

    with way.connected(target=Store(layout(4), 32), clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        session.push(0, 0, 12)
        assert stored.wait(20)
        clock.advance(4.0)
        assert pair.receiver.renew(1)
        clock.advance(4.0)
        pair.receiver.sweep()
        assert pair.received.events == []
        clock.advance(5.0)
        assert not pair.receiver.renew(1)
        pair.receiver.sweep()
        (broken,) = pair.received.expect(Broken)
        assert isinstance(broken.error, LeaseExpired)
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, LeaseExpired)
        assert pair.receiver.open_grants == 0


@over_all_ways
def test_leases_are_swept_without_anyone_asking(way: Way) -> None:
    with way.connected(clock=MonotonicClock()) as pair:
        pair.receiver.open(Terms(1, "attempt-1", 0, 12, 0.05), [TARGET_BLOCKS])
        (broken,) = pair.received.expect(Broken)
        assert isinstance(broken.error, LeaseExpired)


@over_all_ways
def test_waiting_for_pushes_costs_the_sender_no_lease(way: Way) -> None:
    clock = ManualClock()
    with way.connected(clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        session.push(0, 0, 12)
        settle(pair)
        clock.advance(4.0)
        pair.receiver.renew(1)
        clock.advance(4.0)
        pair.receiver.renew(1)
        pair.sender.sweep()
        push_all(session)
        session.finish(b"")
        pair.sent.expect(Delivered)


@over_all_ways
def test_a_commit_that_never_comes_fails_the_session_when_its_lease_is_over(way: Way) -> None:
    clock, cut = ManualClock(), threading.Event()

    def plan(message: Message) -> Fault | None:
        return Drop() if not message.dialled and cut.is_set() else None

    with way.connected(plan=plan, clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        push_all(session)
        settle(pair)
        cut.set()
        session.finish(b"")
        pair.received.expect(Received)
        clock.advance(4.0)
        pair.sender.sweep()
        assert pair.sent.events == []
        clock.advance(2.0)
        pair.sender.sweep()
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, LeaseExpired)


@over_all_ways
@pytest.mark.parametrize(
    "misuse",
    [
        lambda session: session.push(99, 0, 1),
        lambda session: session.push(0, 0, 1000),
        lambda session: session.finish(b""),
        lambda session: session.finish(bytes(1 << 20)),
    ],
)
def test_a_call_that_cannot_be_right_fails_its_session_and_nothing_else(way: Way, misuse: object) -> None:
    with way.connected() as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [TARGET_BLOCKS])
        wrong = pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS[:1]])
        other = begin(pair, 2)
        misuse(wrong)
        pair.sent.expect(SendFailed)
        push_all(other)
        other.finish(b"")
        pair.sent.expect(Delivered)


@over_all_ways
def test_a_store_that_cannot_be_read_fails_its_session_and_nothing_else(way: Way) -> None:
    with way.connected() as pair:
        pair.receiver.open(Terms(1, "a", 0, 4, 30.0), [TARGET_BLOCKS])
        wrong = pair.sender.begin(Terms(1, "a", 0, 4, 30.0), [pair.receiver.endpoint], [[10_000]])
        wrong.push(0, 0, 4)
        (failed,) = pair.sent.expect(SendFailed)
        assert "10000" in str(failed.error)
        pair.received.expect(Broken)
        session = begin(pair, 2)
        push_all(session)
        session.finish(b"")
        pair.sent.expect(Delivered)


@over_all_ways
def test_closing_tells_every_session(way: Way) -> None:
    with way.connected() as pair:
        for grant in (1, 2):
            begin(pair, grant)
        pair.sender.close()
        assert {event.attempt for event in pair.sent.expect(SendFailed, 2)} == {"attempt-1", "attempt-2"}
        pair.receiver.stop()
        assert {event.grant for event in pair.received.expect(Broken, 2)} == {1, 2}
        with pytest.raises(TransferAborted):
            pair.sender.begin(Terms(3, "b", 0, 1, 1.0), ["somewhere:1"], [[0]])
        with pytest.raises(TransferAborted):
            pair.receiver.open(Terms(3, "b", 0, 1, 1.0), [[0]])


@over_all_ways
@pytest.mark.parametrize("phase", ["at once", "begun", "pushed in part", "pushed", "finished"])
def test_an_abort_in_any_phase_is_the_end_on_both_sides(way: Way, phase: str) -> None:
    """Commits are held back, so that the last phase lasts."""
    hold_back, go_on = threading.Event(), threading.Event()

    def plan(message: Message) -> Fault | None:
        if not message.dialled and hold_back.is_set():
            go_on.wait(20)
        return None

    reads: list[int] = []

    class Store(ByteStore):
        def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
            reads.append(layer)
            super().read(layer, blocks, start, count, out)

    clock = ManualClock()
    with way.connected(Store(layout(4), 32), plan=plan, clock=clock) as pair:
        session = begin(pair)
        if phase != "at once":
            settle(pair)
        if phase == "pushed in part":
            session.push(0, 0, 12)
            settle(pair)
        if phase in ("pushed", "finished"):
            push_all(session)
            settle(pair)
        if phase == "finished":
            hold_back.set()
            session.finish(b"")
            pair.sender.sweep()
        assert session.abort("changed my mind")
        before = len(reads)
        assert session.ended
        assert not session.abort("again")
        push_all(session)
        session.finish(b"")
        go_on.set()
        pair.receiver.close(1, "so be it")
        pair.receiver.open(Terms(2, "b", 0, 12, 30.0), [TARGET_BLOCKS])
        other = pair.sender.begin(Terms(2, "b", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        push_all(other)
        other.finish(b"")
        pair.sent.expect(Delivered)
        assert [event.attempt for event in pair.sent.events] == ["b"]  # of the aborted one there is none
        assert len(reads) == before + LAYERS


@over_all_ways
@pytest.mark.parametrize("dialled", [True, False], ids=["to the receiver", "to the sender"])
def test_a_partition_in_one_direction_ends_at_the_leases(way: Way, dialled: bool) -> None:
    clock, cut = ManualClock(), threading.Event()

    def plan(message: Message) -> Fault | None:
        return Drop() if cut.is_set() and message.dialled == dialled else None

    with way.connected(plan=plan, clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        settle(pair)
        cut.set()
        push_all(session)
        session.finish(b"")
        while not (pair.sent.events and pair.received.events):
            clock.advance(1.0)
            pair.sweep()
        (failed,) = pair.sent.expect(SendFailed)
        assert failed.error.code in ("lease_expired", "transfer_failed", "transfer_aborted")
        if dialled:
            (broken,) = pair.received.expect(Broken)
            assert isinstance(broken.error, LeaseExpired | TransferAborted) or broken.error.code == "transfer_failed"
            assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 0)
        assert pair.receiver.open_grants == 0


@over_all_ways
def test_what_was_on_its_way_when_its_blocks_changed_hands_is_not_written(way: Way) -> None:
    """A frame is two seconds late; its lease was 50 ms, and the blocks belong to somebody else since."""
    armed, late, go_on, clock = threading.Event(), threading.Event(), threading.Event(), ManualClock()

    def plan(message: Message) -> Fault | None:
        if message.dialled and armed.is_set():
            late.set()
            go_on.wait(20)
        return None

    with way.connected(plan=plan, clock=clock) as pair:
        session = begin(pair, lease_s=0.05)
        settle(pair)
        session.push(0, 0, 12)
        settle(pair)
        armed.set()
        session.push(1, 0, 12)
        assert late.wait(20)
        clock.advance(2.0)
        pair.receiver.sweep()
        (broken,) = pair.received.expect(Broken)
        assert isinstance(broken.error, LeaseExpired)
        for page in (page for pages in pair.target.pages for page in pages):
            page[:] = 0  # the new owner's
        pair.receiver.open(Terms(2, "new owner", 0, 12, 30.0), [TARGET_BLOCKS])
        armed.clear()
        go_on.set()
        pair.sent.expect(SendFailed)
        session = pair.sender.begin(Terms(2, "new owner", 0, 4, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        session.push(0, 0, 4)
        pair.sent.expect(SendFailed, 2)  # of other tokens: refused, and by then the late frame has been read
        assert not any(page.any() for pages in pair.target.pages for page in pages)

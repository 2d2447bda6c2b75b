"""Nothing is read before the device has written it, and waiting for the device holds up nobody else."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from core.clock import ManualClock
from kv_transfer.byte_store import ByteStore
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.sessions import SendSession
from kv_transfer.store import Fence
from kv_transfer.terms import Terms
from tests.kv_transfer.conformance.ways import LAYERS, Way, over_all_ways
from tests.kv_transfer.rig import Pair, layout

STOP = 8


def send_all(session: SendSession) -> None:
    for layer in range(LAYERS):
        session.push(layer, 0, STOP)
    session.finish(b"")


class Flag:
    """A device's fence that passes when told, or breaks."""

    def __init__(self, store: FencedStore) -> None:
        self._store = store
        self.open, self.asks = False, 0
        self.broken: Exception | None = None

    def passed(self) -> bool:
        self._store.asked.set()
        self.asks += 1
        if self.broken is not None:
            raise self.broken
        return self.open


class FencedStore(ByteStore):
    """An engine whose writes are not visible until their fence opens, as on a GPU."""

    def __init__(self) -> None:
        super().__init__(layout(), 32)
        self.asked, self.fences, self.reads = threading.Event(), list[Flag](), list[tuple[int, int, int]]()

    def fence(self) -> Fence:
        self.fences.append(Flag(self))
        return self.fences[-1]

    def open(self) -> None:
        for fence in self.fences:
            fence.open = True

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        self.reads.append((layer, start, count))
        super().read(layer, blocks, start, count, out)


@contextmanager
def fenced(way: Way) -> Iterator[tuple[FencedStore, Pair, SendSession]]:
    """A session that has begun on a store whose fences are closed."""
    store = FencedStore()
    with way.connected(store) as pair:
        pair.receiver.open(Terms(1, "a", 0, STOP, 60.0), [[1, 2]])
        yield store, pair, pair.sender.begin(Terms(1, "a", 0, STOP, 60.0), [pair.receiver.endpoint], [[4, 2]])


@over_all_ways
def test_nothing_is_read_before_its_fence(way: Way) -> None:
    with fenced(way) as (store, pair, session):
        send_all(session)
        assert store.asked.wait(20)
        assert store.reads == []
        store.open()
        pair.sent.expect(Delivered)


@over_all_ways
def test_a_session_whose_fence_is_closed_holds_up_no_other(way: Way) -> None:
    with fenced(way) as (store, pair, behind):
        send_all(behind)
        assert store.asked.wait(20)
        for grant in range(2, 12):
            pair.receiver.open(Terms(grant, f"a{grant}", 0, STOP, 60.0), [[5, 6]])
            session = pair.sender.begin(Terms(grant, f"a{grant}", 0, STOP, 60.0), [pair.receiver.endpoint], [[4, 2]])
            seen = len(store.fences)
            send_all(session)
            for fence in store.fences[seen:]:
                fence.open = True
            pair.received.expect(Received, grant - 1)
        assert not behind.ended
        store.open()
        pair.sent.expect(Delivered, 11)


@over_all_ways
def test_a_piece_that_joins_another_on_its_way_waits_for_its_own_fence(way: Way) -> None:
    with fenced(way) as (store, pair, session):
        session.push(0, 0, 4)
        session.push(0, 4, 4)
        assert store.asked.wait(20)
        store.fences[0].open = True
        while not store.reads:
            threading.Event().wait(0.001)
        assert store.reads == [(0, 0, 4)]
        send_all(session)  # what was pushed already is skipped, also its new fence
        store.open()
        pair.sent.expect(Delivered)


@over_all_ways
def test_abort_does_not_wait_for_a_fence_and_what_waits_there_is_not_read(way: Way) -> None:
    with fenced(way) as (store, pair, session):
        send_all(session)
        assert store.asked.wait(20)
        assert session.abort("preempted")
        store.open()
        pair.received.expect(Broken)
        assert store.reads == []


@over_all_ways
def test_waiting_for_the_device_costs_no_lease(way: Way) -> None:
    clock, store = ManualClock(), FencedStore()
    with way.connected(store, clock=clock) as pair:
        pair.receiver.open(Terms(1, "a", 0, STOP, 5.0), [[1, 2]])
        session = pair.sender.begin(Terms(1, "a", 0, STOP, 5.0), [pair.receiver.endpoint], [[4, 2]])
        send_all(session)
        while store.fences[-1].asks < 10:  # until BEGIN has left, and nothing else can
            threading.Event().wait(0.001)
        for _ in range(3):
            clock.advance(4.0)
            assert pair.receiver.renew(1)
            assert pair.sender.sweep() is not None
        store.open()
        pair.sent.expect(Delivered)


@over_all_ways
def test_a_fence_that_fails_ends_its_session_and_no_other(way: Way) -> None:
    with fenced(way) as (store, pair, session):
        send_all(session)
        for fence in store.fences:
            fence.broken = RuntimeError("device lost")
        assert "device lost" in str(pair.sent.expect(SendFailed)[0].error)
        pair.received.expect(Broken)
        pair.receiver.open(Terms(2, "b", 0, STOP, 60.0), [[1, 2]])
        seen = len(store.fences)
        session = pair.sender.begin(Terms(2, "b", 0, STOP, 60.0), [pair.receiver.endpoint], [[4, 2]])
        send_all(session)
        for fence in store.fences[seen:]:
            fence.open = True
        pair.sent.expect(Delivered)

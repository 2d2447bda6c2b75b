"""One inbound grant: what its lock promises to whoever takes the blocks back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from core.clock import ManualClock
from core.errors import CorruptTransfer, TransferError
from core.layout import Span
from kv_transfer.byte_store import ByteStore
from kv_transfer.frames import HEADER_BYTES, Begin, Finish, Header, Kind, parse_header, unpack_body
from kv_transfer.inbound import GrantEnded, InboundGrant
from kv_transfer.terms import Terms
from tests.kv_transfer.rig import filled, layout, poisoned, session_frames, untouched_outside

SEED = 7
FRAMES = session_frames(
    filled(layout(4)), SEED, Terms(1, "a", 0, 8, 30.0), [[3, 5]], [(0, 0, 4), (0, 4, 4), (1, 0, 8), (2, 0, 8)]
)


class Sender:
    def abort(self, grant: int, error: TransferError) -> None:
        raise AssertionError("an inbound grant itself tells nobody")


def parts(frame: bytes) -> tuple[Header, memoryview, memoryview]:
    view = memoryview(frame)
    return parse_header(view[:HEADER_BYTES], SEED), view[:HEADER_BYTES], view[HEADER_BYTES:]


def begun(store: ByteStore, clock: ManualClock | None = None) -> InboundGrant:
    grant = InboundGrant(store, clock or ManualClock(), Terms(1, "a", 0, 8, 5.0), [[6, 2]])
    header, packed, payload = parts(FRAMES[0])
    grant.begin(header, packed, unpack_body(payload, Begin), Sender())
    return grant


def test_once_ended_it_takes_nothing_however_right() -> None:
    store = poisoned(layout(4))
    grant = begun(store)
    assert grant.end()
    assert not grant.end()
    for frame in FRAMES[1:-1]:
        with pytest.raises(GrantEnded):
            grant.write(*parts(frame))
    header, packed, payload = parts(FRAMES[-1])
    with pytest.raises(GrantEnded):
        grant.finish(header, packed, unpack_body(payload, Finish))
    with pytest.raises(GrantEnded):
        grant.begin(*parts(FRAMES[0])[:2], Begin("a", store.layout.region(Span(0, 8)), False), Sender())
    assert not grant.renew()
    assert untouched_outside(store, [6, 2], 0, 0)


def test_whoever_ends_it_waits_for_one_write_and_is_not_overtaken_by_the_next() -> None:
    outcomes: list[bool] = []

    class Store(ByteStore):
        on_write: Callable[[], None] = staticmethod(lambda: None)

        def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
            self.on_write()
            super().write(layer, blocks, start, count, data)

    store = Store(layout(4), 8)
    grant = begun(store)
    closing = threading.Thread(target=lambda: outcomes.append(grant.end()))

    def close_meanwhile() -> None:
        closing.start()
        give_up_s = time.monotonic() + 20
        while not grant._ending and time.monotonic() < give_up_s:
            time.sleep(0.001)
        assert outcomes == []

    store.on_write = close_meanwhile
    grant.write(*parts(FRAMES[1]))
    with pytest.raises(GrantEnded):  # in the very next moment, whether or not the closing thread has had its turn
        grant.write(*parts(FRAMES[2]))
    closing.join(20)
    assert outcomes == [True]


def test_the_lease_runs_from_the_last_frame() -> None:
    clock = ManualClock()
    grant = begun(poisoned(layout(4)), clock)
    for frame in FRAMES[1:-1]:
        clock.advance(4.0)
        grant.write(*parts(frame))
    assert grant.remaining_s() == 5.0
    clock.advance(4.0)
    header, packed, payload = parts(FRAMES[-1])
    received, _ = grant.finish(header, packed, unpack_body(payload, Finish))
    assert received.transfer_s == 16.0  # from the first piece on
    assert header.kind is Kind.FINISH


def test_a_frame_out_of_turn_is_refused_before_it_is_written() -> None:
    store = poisoned(layout(4))
    grant = begun(store)
    with pytest.raises(CorruptTransfer, match="expected 1"):
        grant.write(*parts(FRAMES[2]))
    assert untouched_outside(store, [6, 2], 0, 0)


def test_a_renewal_starts_the_lease_anew_and_cannot_bring_back_what_is_over() -> None:
    clock = ManualClock(1000.0)
    grant = begun(poisoned(layout(4)), clock)
    clock.advance(4.0)
    assert grant.remaining_s() == pytest.approx(1.0)
    assert grant.renew()
    assert grant.remaining_s() == pytest.approx(5.0)
    clock.advance(4.0)
    grant.write(*parts(FRAMES[1]))
    clock.advance(6.0)
    assert grant.remaining_s() == pytest.approx(-1.0)
    assert not grant.renew()

"""Peers that refuse, restart, stall, hang or die: they cost their own sessions, and nobody else's."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from core.clock import ManualClock
from core.errors import HandshakeRefused, LeaseExpired, TransferAborted, TransferError
from kv_transfer.byte_store import ByteStore
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.receiver import KVReceiver
from kv_transfer.sessions import Sender, SendSession
from kv_transfer.terms import Terms
from tests.kv_transfer.conformance.ways import (
    SOURCE_BLOCKS,
    TARGET_BLOCKS,
    Way,
    over_all_ways,
    push_all,
)
from tests.kv_transfer.rig import SECRET, Inbox, filled, layout, poisoned, sequence_bytes


@over_all_ways
def test_another_incarnation_at_the_endpoint_is_refused_by_name(way: Way) -> None:
    with way.connected() as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [TARGET_BLOCKS])
        pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS], 9)
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, HandshakeRefused)
        assert failed.error.field == "incarnation"


def start(sender: Sender, receiver: KVReceiver, grant: int, incarnation: int | None = None) -> SendSession:
    receiver.open(Terms(grant, f"a{grant}", 0, 12, 30.0), [TARGET_BLOCKS])
    session = sender.begin(Terms(grant, f"a{grant}", 0, 12, 30.0), [receiver.endpoint], [SOURCE_BLOCKS], incarnation)
    push_all(session)
    session.finish(b"")
    return session


@over_all_ways
@pytest.mark.parametrize(("secret", "fingerprint", "field"), [(SECRET + b"?", "model", "secret"), (SECRET, "x", "fingerprint")])
def test_a_refused_handshake_fails_the_session_by_name(way: Way, secret: bytes, fingerprint: str, field: str) -> None:
    wires, sent, strange, received = way.wires(), Inbox(), Inbox(), Inbox()
    with (
        wires.receiver(poisoned(layout()), received) as receiver,
        wires.sender(filled(layout()), strange, secret, fingerprint) as stranger,
        wires.sender(filled(layout()), sent) as sender,
    ):
        start(stranger, receiver, 1)
        (failed,) = strange.expect(SendFailed)
        assert isinstance(failed.error, HandshakeRefused)
        assert failed.error.field == field
        start(sender, receiver, 2)
        received.expect(Received)


@over_all_ways
def test_after_a_receiver_restarts_the_next_session_connects_anew(way: Way) -> None:
    wires, inbox, sent = way.wires(), Inbox(), Inbox()
    with wires.sender(filled(layout()), sent) as sender:
        for incarnation in (1, 2, 3):
            with wires.receiver(poisoned(layout()), inbox, incarnation) as receiver:
                start(sender, receiver, 7, incarnation)
                sent.expect(Delivered, incarnation)


@over_all_ways
def test_a_receiver_that_stops_in_mid_session_fails_it_and_no_other_receivers(way: Way) -> None:
    wires, inbox, sent = way.wires(), Inbox(), Inbox()
    dying, living = wires.receiver(poisoned(layout()), inbox), wires.receiver(poisoned(layout()), inbox)
    with living, wires.sender(filled(layout()), sent) as sender:
        dying.open(Terms(1, "dying", 0, 12, 30.0), [TARGET_BLOCKS])
        session = sender.begin(Terms(1, "dying", 0, 12, 30.0), [dying.endpoint], [SOURCE_BLOCKS])
        session.push(0, 0, 12)
        dying.stop()
        (broken,) = inbox.expect(Broken)
        assert isinstance(broken.error, TransferAborted)
        (failed,) = sent.expect(SendFailed)
        assert failed.attempt == "dying"
        start(sender, living, 2)
        sent.expect(Delivered)


@over_all_ways
def test_a_sender_that_dies_breaks_its_sessions_at_once_and_nobody_elses(way: Way) -> None:
    wires, inbox, sent = way.wires(), Inbox(), Inbox()
    with wires.receiver(poisoned(layout()), inbox) as receiver, wires.sender(filled(layout()), sent) as living:
        with wires.sender(filled(layout()), Inbox()) as dying:
            receiver.open(Terms(1, "dying", 0, 12, 3600.0), [[20, 21, 22]])
            dying.begin(Terms(1, "dying", 0, 12, 3600.0), [receiver.endpoint], [SOURCE_BLOCKS]).push(0, 0, 12)
            while dying.sweep() is not None:  # until that has left
                time.sleep(0.001)
            start(living, receiver, 2)
            sent.expect(Delivered)
            inbox.expect(Received)
        (broken,) = inbox.expect(Broken)
        assert broken.attempt == "dying"
        assert receiver.open_grants == 0


@over_all_ways
def test_a_receiver_that_hangs_holds_up_no_other_and_loses_its_sessions_at_their_leases(way: Way) -> None:
    """Its store hangs, as a device may: frames stop being read, and the stream fills up."""
    hanging, go_on = threading.Event(), threading.Event()

    class Store(ByteStore):
        def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
            hanging.set()
            go_on.wait(30)
            super().write(layer, blocks, start, count, data)

    clock = ManualClock()
    wires, inbox, sent = way.wires(), Inbox(), Inbox()
    wires = type(wires)(wires.streams, wires.carriers, clock)
    target = poisoned(layout())
    with (
        wires.receiver(Store(layout(), 32), Inbox()) as hung,
        wires.receiver(target, inbox) as living,
        wires.sender(source := filled(layout()), sent) as sender,
    ):
        hung.open(Terms(1, "hung", 0, 12, 30.0), [TARGET_BLOCKS])
        session = sender.begin(Terms(1, "hung", 0, 12, 5.0), [hung.endpoint], [SOURCE_BLOCKS])
        push_all(session)
        session.finish(b"")
        assert hanging.wait(20)
        start(sender, living, 2)
        sent.expect(Delivered)
        assert sequence_bytes(target, TARGET_BLOCKS, 0, 12) == sequence_bytes(source, SOURCE_BLOCKS, 0, 12)
        while not sent.of(SendFailed):
            clock.advance(1.0)
            sender.sweep()
        assert isinstance(sent.of(SendFailed)[0].error, LeaseExpired)
        go_on.set()


@over_all_ways
def test_a_sender_that_hangs_within_a_frame_holds_up_no_other(way: Way) -> None:
    wires, inbox, sent = way.wires(), Inbox(), Inbox()
    with wires.receiver(poisoned(layout()), inbox) as receiver, wires.sender(filled(layout()), sent) as sender:
        stalled = wires.streams.connect(receiver.endpoint)
        stalled.send([b"HS"])
        start(sender, receiver, 1)
        sent.expect(Delivered)
        stalled.close()


@over_all_ways
def test_an_endpoint_where_nobody_listens_fails_the_session_and_no_other(way: Way) -> None:
    wires, sent, inbox = way.wires(), Inbox(), Inbox()
    with wires.receiver(poisoned(layout()), inbox) as gone:
        endpoint = gone.endpoint
    with wires.receiver(poisoned(layout()), inbox) as receiver, wires.sender(filled(layout()), sent) as sender:
        sender.begin(Terms(1, "a", 0, 12, 30.0), [endpoint], [SOURCE_BLOCKS])
        (failed,) = sent.expect(SendFailed)
        assert isinstance(failed.error, TransferError)
        start(sender, receiver, 2)
        sent.expect(Delivered)


@over_all_ways
def test_a_grant_of_an_earlier_time_is_refused_and_its_number_stays_good(way: Way) -> None:
    """The sender acts on a grant that was closed and given anew, to another attempt."""
    with way.connected() as pair:
        pair.receiver.open(Terms(1, "old", 0, 12, 30.0), [TARGET_BLOCKS])
        pair.receiver.close(1, "taken back")
        pair.receiver.open(Terms(1, "new", 0, 12, 30.0), [TARGET_BLOCKS])
        stale = pair.sender.begin(Terms(1, "old", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        push_all(stale)
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, TransferAborted)
        assert pair.received.events == []
        assert pair.receiver.open_grants == 1

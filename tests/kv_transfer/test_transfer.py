"""Sender and receiver together, in what does not depend on the way that KV goes: doors, handlers, misuse, carriers."""

from __future__ import annotations

import resource
import threading
from dataclasses import replace

import pytest

from core.clock import ManualClock, MonotonicClock
from core.errors import HandshakeRefused, LeaseExpired, TransferError
from core.layout import LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.carriers.inline import INLINE
from kv_transfer.events import Delivered, Received, SendFailed
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transports.inproc import InprocTransport
from tests.kv_transfer.conformance.ways import SOURCE_BLOCKS, TARGET_BLOCKS, assert_same, begin, push_all
from tests.kv_transfer.memory_carrier import MemoryCarrier
from tests.kv_transfer.rig import (
    SECRET,
    Inbox,
    connected,
    filled,
    layout,
    poisoned,
)


def test_a_peer_that_does_not_read_fails_its_sessions_and_does_not_hold_the_thread() -> None:
    """The receiver's process is stopped: its kernel takes bytes until the buffers are full, and no more."""
    wires, clock, inbox = InprocTransport(), ManualClock(), Inbox()
    shape = [LayerShape(8, 128, 128)]
    source = ByteStore(layout(256, shapes=shape), 32)
    listening = wires.listen()
    with KVSender(source, wires, SECRET, "model", 1, clock, inbox) as sender:
        session = sender.begin(Terms(1, "a", 0, 32 * 256, 5.0), [listening.endpoint], [range(32)])
        session.push(0, 0, 32 * 256)
        stopped = listening.accept()  # never answers the handshake
        clock.advance(6.0)
        sender.sweep()
        (failed,) = inbox.expect(SendFailed)
        assert isinstance(failed.error, LeaseExpired)
        stopped.close()
    listening.close()


def test_a_handshake_that_stalls_is_cut_off() -> None:
    clock, wires = ManualClock(), InprocTransport()
    with KVReceiver(poisoned(layout()), wires, SECRET, "model", 1, clock, Inbox()) as receiver:
        stalled = wires.connect(receiver.endpoint)
        stalled.send([b"HS"])
        while receiver.sweep() is None:  # until it has been accepted
            threading.Event().wait(0.001)
        clock.advance(10.0)
        receiver.sweep()
        with pytest.raises(TransferError):
            stalled.recv_into(memoryview(bytearray(1)))
        stalled.close()


def test_a_receiver_that_gets_no_thread_for_a_peer_goes_on_to_serve_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Thread.start, []

    def no_more_threads(thread: threading.Thread) -> None:
        if thread.name == "kv-receiver" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more_threads)
    with connected() as pair:
        for grant in (1, 2):
            session = begin(pair, grant)
            push_all(session)
            session.finish(b"tail")
            if grant == 1:
                pair.sent.expect(SendFailed)
                pair.receiver.close(1, "failed")
        pair.sent.expect(Delivered)
        (received,) = pair.received.expect(Received)
        assert received.grant == 2
    assert len(refused) == 1


def test_a_crowd_of_silent_strangers_keeps_no_member_out() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    wires = InprocTransport()
    with connected(dialling=wires, clock=ManualClock()) as pair:  # and no handshake times out
        crowd = [wires.connect(pair.receiver.endpoint) for _ in range(1100)]
        session = begin(pair)
        push_all(session)
        session.finish(b"")
        pair.sent.expect(Delivered)
        for stranger in crowd:
            stranger.close()


def test_a_handler_that_raises_harms_no_other_session(caplog: pytest.LogCaptureFixture) -> None:
    wires, sent = InprocTransport(), Inbox()

    def raising(event: object) -> None:
        raise RuntimeError("a worker's bug")

    with (
        KVReceiver(poisoned(layout()), wires, SECRET, "model", 1, MonotonicClock(), raising) as receiver,
        KVSender(filled(layout()), wires, SECRET, "model", 1, MonotonicClock(), sent) as sender,
    ):
        for grant in (1, 2):
            receiver.open(Terms(grant, "a", 0, 12, 30.0), [TARGET_BLOCKS])
            session = sender.begin(Terms(grant, "a", 0, 12, 30.0), [receiver.endpoint], [SOURCE_BLOCKS])
            push_all(session)
            session.finish(b"")
            sent.expect(Delivered, grant)
    assert "a worker's bug" in caplog.text


def test_impossible_grants_are_refused() -> None:
    with connected() as pair:
        begin(pair)
        right = Terms(5, "a", 0, 12, 1.0)
        for wrong in ({"grant": 1}, {"grant": -1}, {"first_token": 13}, {"lease_s": 0.0}):
            with pytest.raises(ValueError, match="Got"):
                pair.receiver.open(replace(right, **wrong), [[1, 2, 3]])
        with pytest.raises(ValueError, match="within 0 blocks"):
            pair.receiver.open(right, [[]])


# --- carriers ---------------------------------------------------------------------------------------------------------


def test_payloads_may_travel_beside_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kv_transfer")
    carriers = [MemoryCarrier(), *INLINE]
    with connected(carriers=carriers) as pair:
        for grant in (1, 2):
            session = begin(pair, grant)
            push_all(session)
            session.finish(b"")
            pair.received.expect(Received, grant)
            assert_same(pair)
    assert "goes by memory" in caplog.text
    assert "comes by memory" in caplog.text


def test_a_pair_without_common_memory_falls_back_and_both_sides_say_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kv_transfer")
    with connected(carriers=[MemoryCarrier(), *INLINE], listening_carriers=[MemoryCarrier(), *INLINE]) as pair:
        session = begin(pair)
        push_all(session)
        session.finish(b"")
        pair.received.expect(Received)
        assert_same(pair)
    assert "goes by inline (memory: another process)" in caplog.text
    assert "comes by inline (memory: another process)" in caplog.text


def test_a_forced_carrier_that_does_not_work_fails_the_session_by_name() -> None:
    with connected(carriers=[MemoryCarrier()], listening_carriers=INLINE) as pair:
        begin(pair)
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, HandshakeRefused)
        assert failed.error.field == "carrier"
        assert "memory" in str(failed.error)

"""Sender and receiver together, over in-process streams: what arrives, what ends a session, and who is told."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import ManualClock, MonotonicClock
from core.errors import CorruptTransfer, HandshakeRefused, LeaseExpired, TransferAborted, TransferError
from core.layout import KVLayout, LayerShape, Shard, Span
from kv_transfer.byte_store import ByteStore
from kv_transfer.carriers.inline import INLINE
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.frames import HEADER_BYTES
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.sessions import SendSession
from kv_transfer.transports.fault import Drop, Duplicate, Fault, FaultTransport, FlipBit, Message, Reorder, Trickle, Truncate
from kv_transfer.transports.inproc import InprocTransport
from tests.kv_transfer.memory_carrier import MemoryCarrier
from tests.kv_transfer.rig import (
    POISON,
    SECRET,
    Inbox,
    Pair,
    connected,
    filled,
    layout,
    poisoned,
    sequence_bytes,
    untouched_outside,
)

LAYERS = 3
SOURCE_BLOCKS, TARGET_BLOCKS = [6, 1, 9], [30, 4, 2]


def begin(pair: Pair, grant: int = 1, first: int = 0, stop: int = 12, lease_s: float = 30.0) -> SendSession:
    pair.receiver.open(grant, f"attempt-{grant}", TARGET_BLOCKS, first, stop, lease_s)
    return pair.sender.begin(f"attempt-{grant}", grant, pair.receiver.endpoint, SOURCE_BLOCKS, first, stop, lease_s)


def push_all(session: SendSession, stop: int = 12) -> None:
    for layer in range(LAYERS):
        session.push(layer, 0, stop)


def assert_same(pair: Pair, first: int = 0, stop: int = 12) -> None:
    expected = sequence_bytes(pair.source, SOURCE_BLOCKS, first, stop)
    assert sequence_bytes(pair.target, TARGET_BLOCKS, first, stop) == expected
    assert untouched_outside(pair.target, TARGET_BLOCKS, first, stop)


@settings(max_examples=60, deadline=None)
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
    source_size: int, target_size: int, one: int, other: int, cuts: list[int], dice: random.Random, dtype: str
) -> None:
    first, stop = sorted((one, other))
    source, target = filled(layout(source_size, dtype), 41), poisoned(layout(target_size, dtype), 41)
    source_blocks, target_blocks = dice.sample(range(41), 40), dice.sample(range(41), 40)
    edges = sorted({0, stop, *(cut for cut in cuts if cut < stop)})
    pushes = [(layer, low, high - low) for layer in range(LAYERS) for low, high in pairwise(edges)]
    dice.shuffle(pushes)
    with connected(source, target) as pair:
        pair.receiver.open(1, "a", target_blocks, first, stop, 30.0)
        session = pair.sender.begin("a", 1, pair.receiver.endpoint, source_blocks, first, stop, 30.0)
        for push in pushes:
            session.push(*push)
        session.finish(b"first token")
        (received,), (delivered,) = pair.received.expect(Received), pair.sent.expect(Delivered)
    size = (stop - first) * source.layout.bytes_per_token
    assert (received.grant, received.attempt, received.tail) == (1, "a", b"first token")
    assert received.kv_bytes == delivered.kv_bytes == size
    assert sequence_bytes(target, target_blocks, first, stop) == sequence_bytes(source, source_blocks, first, stop)
    assert untouched_outside(target, target_blocks, first, stop)


def test_a_session_that_begins_after_everything_is_computed_catches_up() -> None:
    with connected() as pair:
        pair.receiver.open(1, "attempt-1", TARGET_BLOCKS, 5, 12, 30.0)
        session = pair.sender.begin("attempt-1", 1, pair.receiver.endpoint, SOURCE_BLOCKS, 5, 12, 30.0)
        for layer in range(LAYERS):
            session.push(layer, 0, 8)  # what had been computed before
        for layer in range(LAYERS):
            session.push(layer, 6, 6)  # the step that was running, overlapping it
        session.finish(b"")
        pair.received.expect(Received)
        assert_same(pair, 5, 12)


def test_blocks_may_be_given_as_they_are_allocated() -> None:
    blocks: list[int] = []
    with connected() as pair:
        pair.receiver.open(1, "attempt-1", TARGET_BLOCKS, 0, 12, 30.0)
        session = pair.sender.begin("attempt-1", 1, pair.receiver.endpoint, blocks, 0, 12, 30.0)
        for chunk, block in enumerate(SOURCE_BLOCKS):
            blocks.append(block)
            for layer in range(LAYERS):
                session.push(layer, chunk * 4, 4)
        session.finish(b"")
        pair.received.expect(Received)
        assert_same(pair)


def test_many_sessions_share_a_connection_and_all_arrive() -> None:
    source, target = filled(layout(4), 100), poisoned(layout(3), 140)
    with connected(source, target) as pair:
        for grant in range(40):
            first = grant % 5
            pair.receiver.open(grant, f"a{grant}", range(grant * 3, grant * 3 + 3), first, 8, 30.0)
            session = pair.sender.begin(f"a{grant}", grant, pair.receiver.endpoint, [2 * grant, 2 * grant + 1], first, 8, 30.0)
            push_all(session, 8)
            session.finish(str(grant).encode())
        for received in pair.received.expect(Received, 40):
            grant, first = received.grant, received.grant % 5
            assert received.tail == str(grant).encode()
            got = sequence_bytes(target, range(grant * 3, grant * 3 + 3), first, 8)
            assert got == sequence_bytes(source, [2 * grant, 2 * grant + 1], first, 8)
        assert len(pair.sent.expect(Delivered, 40)) == 40
        assert pair.receiver.open_grants == 0


def test_a_short_session_is_not_stuck_behind_a_long_one() -> None:
    """Sessions take turns piece by piece: a session of one piece passes one of hundreds."""
    shape = [LayerShape(8, 128, 128)]
    source, target = ByteStore(layout(256, shapes=shape), 65), ByteStore(layout(256, shapes=shape), 65)
    gate, behind = threading.Event(), threading.Event()

    def plan(message: Message) -> Fault | None:
        if message.dialled and message.index == 3:
            behind.set()
            gate.wait(20)
        return None

    with connected(source, target, FaultTransport(InprocTransport(), plan)) as pair:
        sessions = []
        for grant, blocks in ((1, range(64)), (2, [64])):
            pair.receiver.open(grant, f"a{grant}", blocks, 0, len(blocks) * 256, 30.0)
            session = pair.sender.begin(f"a{grant}", grant, pair.receiver.endpoint, blocks, 0, len(blocks) * 256, 30.0)
            session.push(0, 0, len(blocks) * 256)
            session.finish(b"")
            sessions.append(session)
            assert behind.wait(20)  # the long one is on the wire before the short one begins
        gate.set()
        pair.received.expect(Received, 2)
        assert [received.grant for received in pair.received.of(Received)] == [2, 1]


# --- endings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, LAYERS])
def test_nothing_is_written_after_close_and_the_sender_is_told(at: int) -> None:
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
    with connected(target=target) as pair:
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


def test_abort_ends_the_receiving_side_and_the_store_is_not_read_again() -> None:
    reading, go_on = threading.Event(), threading.Event()

    class Store(ByteStore):
        reads = 0

        def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
            self.reads += 1
            reading.set()
            go_on.wait(20)
            super().read(layer, blocks, start, count, out)

    source = Store(layout(4), 32)
    with connected(source) as pair:
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


def test_a_silent_sender_loses_its_lease_and_hears_of_it() -> None:
    clock, stored = ManualClock(), threading.Event()

    class Store(ByteStore):
        def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
            super().write(layer, blocks, start, count, data)
            stored.set()

    with connected(target=Store(layout(4), 32), clock=clock) as pair:
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


def test_leases_are_swept_without_anyone_asking() -> None:
    with connected(clock=MonotonicClock()) as pair:
        pair.receiver.open(1, "attempt-1", TARGET_BLOCKS, 0, 12, 0.05)
        (broken,) = pair.received.expect(Broken)
        assert isinstance(broken.error, LeaseExpired)


def test_waiting_for_pushes_costs_the_sender_no_lease() -> None:
    clock = ManualClock()
    with connected(clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        session.push(0, 0, 12)
        while pair.sender.sweep() is not None:  # until all that was pushed has left
            threading.Event().wait(0.001)
        clock.advance(4.0)
        pair.receiver.renew(1)
        clock.advance(4.0)
        pair.receiver.renew(1)
        pair.sender.sweep()
        push_all(session)
        session.finish(b"")
        pair.sent.expect(Delivered)


def test_a_commit_that_never_comes_fails_the_session_when_its_lease_is_over() -> None:
    clock = ManualClock()

    def plan(message: Message) -> Fault | None:
        return Drop() if not message.dialled and message.index == 2 else None

    with connected(listening=(wires := FaultTransport(InprocTransport(), plan)), dialling=wires, clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        push_all(session)
        session.finish(b"")
        pair.received.expect(Received)
        clock.advance(4.0)
        pair.sender.sweep()
        assert pair.sent.events == []
        clock.advance(2.0)
        pair.sender.sweep()
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, LeaseExpired)


def test_a_peer_that_does_not_read_fails_its_sessions_and_does_not_hold_the_thread() -> None:
    """The receiver's process is stopped: its kernel takes bytes until the buffers are full, and no more."""
    wires, clock, inbox = InprocTransport(), ManualClock(), Inbox()
    shape = [LayerShape(8, 128, 128)]
    source = ByteStore(layout(256, shapes=shape), 32)
    listening = wires.listen()
    with KVSender(source, wires, SECRET, "model", 1, clock, inbox) as sender:
        session = sender.begin("a", 1, listening.endpoint, range(32), 0, 32 * 256, 5.0)
        session.push(0, 0, 32 * 256)
        stopped = listening.accept()  # never answers the handshake
        clock.advance(6.0)
        sender.sweep()
        (failed,) = inbox.expect(SendFailed)
        assert isinstance(failed.error, LeaseExpired)
        stopped.close()
    listening.close()


def test_an_endpoint_where_nobody_listens_fails_the_session_at_once() -> None:
    inbox = Inbox()
    with KVSender(filled(layout()), InprocTransport(), SECRET, "model", 1, MonotonicClock(), inbox) as sender:
        sender.begin("a", 1, "inproc:99", [0], 0, 4, 30.0)
        (failed,) = inbox.expect(SendFailed)
        assert "nobody listens" in str(failed.error)


def test_after_a_receiver_restarts_the_next_session_connects_anew() -> None:
    wires, inbox, sent = InprocTransport(), Inbox(), Inbox()
    with KVSender(filled(layout()), wires, SECRET, "model", 1, MonotonicClock(), sent) as sender:
        for incarnation in (1, 2, 3):
            with KVReceiver(poisoned(layout()), wires, SECRET, "model", incarnation, MonotonicClock(), inbox) as receiver:
                receiver.open(7, f"a{incarnation}", TARGET_BLOCKS, 0, 12, 30.0)
                session = sender.begin(f"a{incarnation}", 7, receiver.endpoint, SOURCE_BLOCKS, 0, 12, 30.0, incarnation)
                push_all(session)
                session.finish(b"")
                sent.expect(Delivered, incarnation)


def test_a_lost_connection_fails_what_was_on_it_and_the_next_session_dials_again() -> None:
    def plan(message: Message) -> Fault | None:
        return Truncate(60) if message.dialled and message.connection == 0 and message.index == 4 else None

    with connected(dialling=FaultTransport(InprocTransport(), plan)) as pair:
        session = begin(pair, 1)
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


def test_another_incarnation_at_the_endpoint_is_refused_by_name() -> None:
    with connected() as pair:
        pair.receiver.open(1, "a", TARGET_BLOCKS, 0, 12, 30.0)
        pair.sender.begin("a", 1, pair.receiver.endpoint, SOURCE_BLOCKS, 0, 12, 30.0, incarnation=9)
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, HandshakeRefused)
        assert failed.error.field == "incarnation"


@pytest.mark.parametrize(("secret", "fingerprint", "field"), [(SECRET + b"?", "model", "secret"), (SECRET, "x", "fingerprint")])
def test_a_refused_handshake_fails_the_session_by_name(secret: bytes, fingerprint: str, field: str) -> None:
    with connected() as pair:
        inbox = Inbox()
        wires = pair.receiver._listener._transport  # type: ignore[attr-defined]
        with KVSender(pair.source, wires, secret, fingerprint, 1, MonotonicClock(), inbox) as stranger:
            pair.receiver.open(1, "a", TARGET_BLOCKS, 0, 12, 30.0)
            stranger.begin("a", 1, pair.receiver.endpoint, SOURCE_BLOCKS, 0, 12, 30.0)
            (failed,) = inbox.expect(SendFailed)
            assert isinstance(failed.error, HandshakeRefused)
            assert failed.error.field == field
        session = pair.sender.begin("a", 1, pair.receiver.endpoint, SOURCE_BLOCKS, 0, 12, 30.0)
        push_all(session)
        session.finish(b"")
        pair.received.expect(Received)


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


@pytest.mark.parametrize(
    "misuse",
    [
        lambda session: session.push(99, 0, 1),
        lambda session: session.push(0, 0, 1000),
        lambda session: session.finish(b""),
        lambda session: session.finish(bytes(1 << 20)),
    ],
)
def test_a_call_that_cannot_be_right_fails_its_session_and_nothing_else(misuse: object) -> None:
    with connected() as pair:
        pair.receiver.open(1, "a", TARGET_BLOCKS, 0, 12, 30.0)
        wrong = pair.sender.begin("a", 1, pair.receiver.endpoint, SOURCE_BLOCKS[:1], 0, 12, 30.0)
        other = begin(pair, 2)
        misuse(wrong)  # type: ignore[operator]
        pair.sent.expect(SendFailed)
        push_all(other)
        other.finish(b"")
        pair.sent.expect(Delivered)


def test_a_store_that_cannot_be_read_fails_its_session_and_nothing_else() -> None:
    with connected() as pair:
        pair.receiver.open(1, "a", TARGET_BLOCKS, 0, 4, 30.0)
        wrong = pair.sender.begin("a", 1, pair.receiver.endpoint, [10_000], 0, 4, 30.0)
        wrong.push(0, 0, 4)
        (failed,) = pair.sent.expect(SendFailed)
        assert "10000" in str(failed.error)
        pair.received.expect(Broken)
        session = begin(pair, 2)
        push_all(session)
        session.finish(b"")
        pair.sent.expect(Delivered)


def test_a_handler_that_raises_harms_no_other_session(caplog: pytest.LogCaptureFixture) -> None:
    wires, sent = InprocTransport(), Inbox()

    def raising(event: object) -> None:
        raise RuntimeError("a worker's bug")

    with (
        KVReceiver(poisoned(layout()), wires, SECRET, "model", 1, MonotonicClock(), raising) as receiver,
        KVSender(filled(layout()), wires, SECRET, "model", 1, MonotonicClock(), sent) as sender,
    ):
        for grant in (1, 2):
            receiver.open(grant, "a", TARGET_BLOCKS, 0, 12, 30.0)
            session = sender.begin("a", grant, receiver.endpoint, SOURCE_BLOCKS, 0, 12, 30.0)
            push_all(session)
            session.finish(b"")
            sent.expect(Delivered, grant)
    assert "a worker's bug" in caplog.text


def test_closing_tells_every_session() -> None:
    with connected() as pair:
        for grant in (1, 2):
            begin(pair, grant)
        pair.sender.close()
        assert {event.attempt for event in pair.sent.expect(SendFailed, 2)} == {"attempt-1", "attempt-2"}
        pair.receiver.stop()
        assert {event.grant for event in pair.received.expect(Broken, 2)} == {1, 2}
        with pytest.raises(TransferAborted):
            pair.sender.begin("b", 3, "inproc:1", [0], 0, 1, 1.0)
        with pytest.raises(TransferAborted):
            pair.receiver.open(3, "b", [0], 0, 1, 1.0)


def test_impossible_grants_are_refused() -> None:
    with connected() as pair:
        begin(pair)
        for wrong in ({"grant": 1}, {"grant": -1}, {"blocks": []}, {"first_token": 13}, {"lease_s": 0.0}):
            with pytest.raises(ValueError, match="Got"):
                pair.receiver.open(
                    **{
                        "grant": 5,
                        "attempt": "a",
                        "blocks": [1, 2, 3],
                        "first_token": 0,
                        "num_tokens": 12,
                        "lease_s": 1.0,
                        **wrong,
                    }
                )


# --- faults on the wire -----------------------------------------------------------------------------------------------


def fault_cases() -> list[tuple[str, Fault]]:
    cases: list[tuple[str, Fault]] = [("drop", Drop()), ("duplicate", Duplicate()), ("reorder", Reorder())]
    cases += [(f"truncate {keep}", Truncate(keep)) for keep in (0, 1, 51, 52, 53, 60)]
    cases += [(f"flip {bit}", FlipBit(bit)) for bit in (0, 100, 300, 415, 416, 440)]
    return cases


@pytest.mark.parametrize(("name", "fault"), fault_cases(), ids=[name for name, _ in fault_cases()])
@pytest.mark.parametrize("index", range(2, 2 + LAYERS + 2))
def test_a_fault_in_any_frame_is_noticed_by_both_sides(name: str, fault: Fault, index: int) -> None:
    clock = ManualClock()

    def plan(message: Message) -> Fault | None:
        return fault if message.dialled and message.index == index else None

    with connected(dialling=FaultTransport(InprocTransport(), plan), clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        push_all(session)
        session.finish(b"t")
        if name == "duplicate" and index == 2 + LAYERS + 1:
            pair.received.expect(Received)  # the first FINISH was right; the second comes after the end
            pair.sent.expect(Delivered)
            assert_same(pair)
            return
        while not (pair.sent.events and pair.received.events):  # what no side can see, the leases end
            clock.advance(1.0)
            pair.sweep()
        assert not pair.received.of(Received)
        assert not pair.sent.of(Delivered)
        assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 12)


def test_every_flipped_bit_of_a_commit_is_noticed() -> None:
    for bit in range(0, (HEADER_BYTES + 10) * 8, 3):
        clock = ManualClock()

        def plan(message: Message, bit: int = bit) -> Fault | None:
            return FlipBit(bit) if not message.dialled and message.index == 2 else None

        with connected(dialling=FaultTransport(InprocTransport(), plan), clock=clock) as pair:
            session = begin(pair)
            push_all(session)
            session.finish(b"")
            (failed,) = pair.sent.expect(SendFailed)
            assert isinstance(failed.error, CorruptTransfer)


def test_a_wire_that_trickles_delivers_all_the_same() -> None:
    with connected(dialling=FaultTransport(InprocTransport(), lambda message: Trickle(7, 0.0))) as pair:
        session = begin(pair)
        push_all(session)
        session.finish(b"")
        pair.sent.expect(Delivered)
        assert_same(pair)


def test_a_trickled_frame_is_no_sign_of_life_until_it_is_whole() -> None:
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

    with connected(dialling=FaultTransport(InprocTransport(), plan, pause), clock=clock) as pair:
        session = begin(pair, lease_s=5.0)
        while pair.sender.sweep() is not None:  # until BEGIN has left
            threading.Event().wait(0.001)
        push_all(session)
        assert gate.wait(20)
        (broken,) = pair.received.expect(Broken)
        assert isinstance(broken.error, LeaseExpired)
        pair.sent.expect(SendFailed)
        assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 0)


# --- sliding windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "stop"), [(0, 12), (5, 12), (11, 12), (0, 2)])
def test_a_windowed_grant_moves_only_what_each_layer_still_sees(first: int, stop: int) -> None:
    shapes = [LayerShape(2, 3, 2), LayerShape(1, 4, 4, sliding_window=4), LayerShape(2, 2, 1, sliding_window=100)]
    source, target = filled(layout(4, shapes=shapes)), poisoned(layout(3, shapes=shapes))
    wanted = [range(first, stop), range(min(max(first, stop - 3), stop), stop), range(first, stop)]
    target_blocks = [30, 4, 2, 7]
    with connected(source, target) as pair:
        pair.receiver.open(1, "a", target_blocks, first, stop, 30.0, windowed=True)
        session = pair.sender.begin("a", 1, pair.receiver.endpoint, SOURCE_BLOCKS, first, stop, 30.0, windowed=True)
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


def test_sides_that_disagree_about_windows_do_not_exchange_a_byte() -> None:
    with connected() as pair:
        pair.receiver.open(1, "a", TARGET_BLOCKS, 0, 12, 30.0)
        push_all(pair.sender.begin("a", 1, pair.receiver.endpoint, SOURCE_BLOCKS, 0, 12, 30.0, windowed=True))
        (failed,) = pair.sent.expect(SendFailed)
        assert "not for this attempt" in str(failed.error)
        assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 0)


def test_ranks_that_hold_the_same_part_exchange_it() -> None:
    """Layers and heads keep the model's numbers; the stores hold nothing else."""
    model = layout().model
    parts = [KVLayout(model=model, shard=Shard(Span(1, 3), Span(1, 2)), block_size=size) for size in (4, 5)]
    source, target = filled(parts[0]), poisoned(parts[1])
    with connected(source, target) as pair:
        pair.receiver.open(1, "a", TARGET_BLOCKS, 2, 12, 30.0)
        session = pair.sender.begin("a", 1, pair.receiver.endpoint, SOURCE_BLOCKS, 2, 12, 30.0)
        for layer in (1, 2):
            session.push(layer, 0, 12)
        session.finish(b"")
        pair.received.expect(Received)
    assert sequence_bytes(target, TARGET_BLOCKS, 2, 12) == sequence_bytes(source, SOURCE_BLOCKS, 2, 12)
    assert untouched_outside(target, TARGET_BLOCKS, 2, 12)


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


@pytest.mark.parametrize("at", range(LAYERS))
def test_bytes_that_a_carrier_damages_are_noticed_before_they_are_stored(at: int) -> None:
    seen = 0

    def damage(payload: memoryview) -> None:
        nonlocal seen
        if seen == at:
            payload[len(payload) // 2] ^= 4
        seen += 1

    with connected(carriers=[MemoryCarrier(damage)]) as pair:
        session = begin(pair)
        for layer in range(LAYERS):
            session.push(layer, 0, 12)
        session.finish(b"")
        (broken,) = pair.received.expect(Broken)
        assert isinstance(broken.error, CorruptTransfer)
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, CorruptTransfer)
        assert (pair.target.pages[at][0] == POISON).all()


def test_a_carrier_that_breaks_costs_its_connection_and_the_next_session_dials_anew() -> None:
    broken_once = threading.Event()

    def damage(payload: memoryview) -> None:
        if not broken_once.is_set():
            broken_once.set()
            raise TransferError("the memory is gone")

    with connected(carriers=[MemoryCarrier(damage)]) as pair:
        push_all(begin(pair, 1))
        (failed,) = pair.sent.expect(SendFailed)
        assert "the memory is gone" in str(failed.error)
        session = begin(pair, 2)
        push_all(session)
        session.finish(b"")
        pair.received.expect(Received)
        assert_same(pair)

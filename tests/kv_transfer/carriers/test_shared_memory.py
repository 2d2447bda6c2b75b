"""The carrier's two ends, first alone and then under sessions: waiting, waking, falling back, and peers that lie."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import msgspec
import psutil
import pytest

from core.clock import ManualClock
from core.config import TransferConfig
from core.errors import ConfigError, CorruptTransfer, HandshakeRefused, LeaseExpired, TransferError
from core.layout import LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.carrier import CarrierUnavailable, Tell
from kv_transfer.carriers import carriers_for
from kv_transfer.carriers.inline import INLINE
from kv_transfer.carriers.sealed_memory import NAME
from kv_transfer.carriers.shared_memory import (
    NOTE_EVERY,
    SLOTS,
    SharedMemoryAcceptance,
    SharedMemoryCarrier,
    SharedMemoryIncoming,
    SharedMemoryOffer,
    SharedMemoryOutgoing,
    pack_stamp,
)
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.frames import NOWHERE, PIECE_BYTES, Header, Kind
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transport import Buffer, Connection
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.socket_connection import SocketConnection
from tests.kv_transfer.rig import POISON, SECRET, Inbox, connected, filled, layout, poisoned, sequence_bytes, untouched_outside

PIECE = 5000
SOURCE_BLOCKS, TARGET_BLOCKS = [6, 1, 9], [30, 4, 2]
LAYERS = 3


def data(length: int) -> Header:
    return Header(Kind.DATA, 1, NOWHERE, length, 0, 0)


def mapped() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count(f"/memfd:{NAME}")


@dataclass
class Ends:
    """Both ends over a socket pair, with no protocol around them."""

    outgoing: SharedMemoryOutgoing
    incoming: SharedMemoryIncoming
    dialled: SocketConnection
    key: int
    notes: list[bytes] = field(default_factory=list)

    def send(self, payload: bytes) -> None:
        room = self.outgoing.room(len(payload))
        room[:] = payload
        self.outgoing.ship([], room)

    def take(self, length: int) -> memoryview:
        return self.incoming.take(data(length))

    def hear(self) -> None:
        while self.notes:
            self.outgoing.heard(self.notes.pop(0))


@pytest.fixture
def ends() -> Iterator[Ends]:
    near, far = (SocketConnection(sock) for sock in socket.socketpair())
    carrier, notes = SharedMemoryCarrier(), []
    offer = carrier.offer(PIECE)
    acceptance = carrier.accept(offer.details, PIECE)
    key = acceptance._memory.key
    made = Ends(offer.settle(near, acceptance.details), acceptance.open(far, notes.append), near, key, notes)
    yield made
    for end in (made.outgoing, made.incoming, near, far):
        end.close()


def test_payloads_of_every_size_arrive_in_order(ends: Ends) -> None:
    for turn, size in enumerate((1, 2, PIECE, PIECE - 1, 4096, 7, PIECE, PIECE, PIECE, 3)):
        ends.send(bytes([turn]) * size)
        payload = ends.take(size)
        assert bytes(payload) == bytes([turn]) * size
        ends.incoming.release(payload)
        ends.hear()


def test_as_many_are_under_way_as_there_are_slots_then_the_sender_waits_for_a_note(ends: Ends) -> None:
    for turn in range(SLOTS):
        ends.send(bytes([turn]) * PIECE)
    got = threading.Event()
    waiting = threading.Thread(target=lambda: (ends.outgoing.room(1), got.set()), daemon=True)
    waiting.start()
    for turn in range(NOTE_EVERY):
        assert not got.is_set()
        assert ends.notes == []
        payload = ends.take(PIECE)
        assert bytes(payload) == bytes([turn]) * PIECE
        ends.incoming.release(payload)
    assert len(ends.notes) == 1
    ends.hear()
    waiting.join(20)
    assert got.is_set()
    assert bytes(ends.take(PIECE)) == bytes([NOTE_EVERY]) * PIECE  # what was not yet taken is untouched


def test_a_room_given_back_wakes_who_waits_for_one(ends: Ends) -> None:
    for _ in range(SLOTS - 1):
        ends.send(b"x")
    held = ends.outgoing.room(1)
    got = threading.Event()
    waiting = threading.Thread(target=lambda: (ends.outgoing.room(1), got.set()), daemon=True)
    waiting.start()
    assert not got.wait(0.05)  # it waits by now, or will find the room at once
    ends.outgoing.discard(held)
    assert got.wait(20)


def test_two_rooms_and_two_payloads_may_be_held_at_a_time(ends: Ends) -> None:
    one, two = ends.outgoing.room(3), ends.outgoing.room(3)
    two[:], one[:] = b"two", b"one"
    ends.outgoing.ship([], one)
    ends.outgoing.ship([], two)
    first, second = ends.take(3), ends.take(3)
    assert (bytes(first), bytes(second)) == (b"one", b"two")
    ends.incoming.release(first)
    ends.incoming.release(second)


def test_a_room_given_back_unsent_is_used_again(ends: Ends) -> None:
    for _ in range(3 * SLOTS):
        ends.outgoing.discard(ends.outgoing.room(1))
    ends.send(b"sent")
    assert bytes(ends.take(4)) == b"sent"


@pytest.mark.parametrize("held", [0, 1])
def test_close_wakes_who_waits_for_room(ends: Ends, held: int) -> None:
    for _ in range(SLOTS - held):
        ends.send(b"x")
    rooms = [ends.outgoing.room(1) for _ in range(held)]
    raised: list[TransferError] = []

    def wait() -> None:
        try:
            ends.outgoing.room(1)
        except TransferError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    ends.outgoing.close()
    waiting.join(20)
    assert len(raised) == 1
    for room in rooms:
        room[:] = b"y"  # whoever is writing still may
        ends.outgoing.discard(room)


def test_closed_ends_refuse_and_let_go_of_the_memory(ends: Ends) -> None:
    before = mapped()
    ends.send(b"x")
    ends.outgoing.close()
    ends.incoming.close()
    with pytest.raises(TransferError):
        ends.outgoing.room(1)
    with pytest.raises(TransferError):
        ends.take(1)
    assert mapped() == before - 2


def test_a_room_may_be_given_back_while_an_older_one_is_held(ends: Ends) -> None:
    older, younger = ends.outgoing.room(5), ends.outgoing.room(5)
    older[:] = b"older"
    ends.outgoing.discard(younger)
    ends.outgoing.room(5)[:] = b"third"
    ends.outgoing.ship([], older)
    assert bytes(ends.take(5)) == b"older"


def test_who_has_given_a_slot_away_cannot_touch_it_any_more(ends: Ends) -> None:
    sent, unsent = ends.outgoing.room(1), ends.outgoing.room(1)
    ends.outgoing.ship([], sent)
    ends.outgoing.discard(unsent)
    taken = ends.take(1)
    ends.incoming.release(taken)
    for view in (sent, unsent, taken):
        with pytest.raises(ValueError, match="released"):
            view[0]


# --- a peer that lies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stamp", "words"),
    [
        (lambda key: pack_stamp(0, SLOTS, key), f"slot {SLOTS}"),
        (lambda key: pack_stamp(0, 0xFFFFFFFF, key), "slot 4294967295"),
        (lambda key: pack_stamp(0, 0, key ^ 1), "digest"),
        (lambda key: bytes(len(pack_stamp(0, 0, key))), "digest"),
        (lambda key: bytes([pack_stamp(0, 0, key)[0] ^ 1]) + pack_stamp(0, 0, key)[1:], "digest"),
        (lambda key: pack_stamp(0, 0, key)[:8] + b"\1" + pack_stamp(0, 0, key)[9:], "digest"),
    ],
)
def test_a_place_that_the_other_end_did_not_name_is_refused(ends: Ends, stamp: Callable[[int], bytes], words: str) -> None:
    ends.dialled.send([stamp(ends.key)])
    with pytest.raises(CorruptTransfer, match=words):
        ends.take(1)


def test_a_payload_that_comes_again_is_refused(ends: Ends) -> None:
    """Its slot is the sender's by now: it may be filled while it is read."""
    ends.send(b"x")
    payload = ends.take(1)
    ends.dialled.send([pack_stamp(0, 1, ends.key)])
    with pytest.raises(CorruptTransfer, match="again"):
        ends.take(1)
    ends.incoming.release(payload)


def test_a_payload_longer_than_a_slot_is_refused(ends: Ends) -> None:
    ends.dialled.send([pack_stamp(0, SLOTS - 1, ends.key)])
    with pytest.raises(CorruptTransfer, match="8193 bytes"):
        ends.take(2 * 4096 + 1)


@pytest.mark.parametrize("note", [b"", b"1234567", b"123456789", bytes(8), b"\3" + bytes(7), b"\xff" * 8])
def test_a_note_that_no_honest_receiver_sends_is_refused(ends: Ends, note: bytes) -> None:
    for _ in range(2):
        ends.send(b"x")
    with pytest.raises(CorruptTransfer):
        ends.outgoing.heard(note)


def test_a_receiver_that_only_claims_to_have_found_the_memory_is_not_believed() -> None:
    near, far = socket.socketpair()
    before = mapped()
    offer = SharedMemoryCarrier().offer(PIECE)
    with pytest.raises(TransferError, match="says that it has"):
        offer.settle(SocketConnection(near), bytes(16))
    offer.withdraw()
    del offer
    assert mapped() == before
    near.close()
    far.close()


def test_a_host_without_memory_to_share_costs_the_connection_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with connected(carriers=carriers_for("auto")) as pair:
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
            (failed,) = pair.sent.expect(SendFailed)
        assert "no memory to share" in str(failed.error)
        pair.receiver.open(Terms(2, "b", 0, 12, 30.0), [TARGET_BLOCKS])
        pair.sender.begin(Terms(2, "b", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS]).push(0, 0, 12)
        while not (pair.target.pages[0][0][TARGET_BLOCKS] == pair.source.pages[0][0][SOURCE_BLOCKS]).all():
            threading.Event().wait(0.001)


def test_sides_whose_pieces_differ_share_no_memory() -> None:
    offer = SharedMemoryCarrier().offer(PIECE)
    with pytest.raises(CarrierUnavailable, match="Got a memory of"):
        SharedMemoryCarrier().accept(offer.details, 3 * PIECE)
    offer.withdraw()


# --- under sessions ---------------------------------------------------------------------------------------------------


class Elsewhere(SharedMemoryCarrier):
    """Of a process whose memory nobody else can see: what it names is not there."""

    def offer(self, piece_bytes: int) -> SharedMemoryOffer:
        offer = super().offer(piece_bytes)
        offer.details = msgspec.msgpack.encode((os.getpid(), 1 << 20, bytes(16)))
        return offer


class Shipping(SharedMemoryOutgoing):
    """What happens to each payload between its digest and its departure is `plan`'s: damaged, lost, or nothing."""

    plan: Callable[[int], str] = lambda number: ""
    shipped = 0

    def ship(self, head: Sequence[Buffer], payload: memoryview, tail: Sequence[Buffer] = ()) -> None:
        fault, self.shipped = self.plan(self.shipped), self.shipped + 1
        if fault == "damage":
            payload[len(payload) // 2] ^= 4
        if fault == "lose":
            with self._changed:
                self._accounts.ship(self._slot_of(payload))
        else:
            super().ship(head, payload, tail)


class Watched(SharedMemoryCarrier):
    """Shows the sending ends that it makes, and meddles with what they ship."""

    def __init__(self, plan: Callable[[int], str] = lambda number: "") -> None:
        self.plan = plan
        self.ends: list[Shipping] = []

    def offer(self, piece_bytes: int) -> SharedMemoryOffer:
        watched = self

        class Shown(SharedMemoryOffer):
            def settle(self, connection: Connection, details: bytes) -> SharedMemoryOutgoing:
                honest = super().settle(connection, details)
                end = Shipping(connection, honest._slots, honest._key)
                end.plan = watched.plan
                watched.ends.append(end)
                return end

        return Shown(super().offer(piece_bytes)._memory)


def test_every_transport_of_the_configuration_has_its_carriers() -> None:
    for name in get_args(TransferConfig.model_fields["transport"].annotation):
        assert carriers_for(name)


def test_auto_prefers_shared_memory_and_forced_is_forced() -> None:
    assert [carrier.name for carrier in carriers_for("auto")] == ["shm", "inline"]
    assert [carrier.name for carrier in carriers_for("shm")] == ["shm"]
    assert [carrier.name for carrier in carriers_for("tcp")] == ["inline"]
    with pytest.raises(ConfigError, match="shm"):
        carriers_for("pigeon")


def test_a_pair_on_one_host_takes_shared_memory_and_gives_it_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kv_transfer")
    before, open_files = mapped(), psutil.Process().num_fds()
    with connected(carriers=carriers_for("auto")) as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [TARGET_BLOCKS])
        session = pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        for layer in range(LAYERS):
            session.push(layer, 0, 12)
        session.finish(b"")
        pair.received.expect(Received)
        pair.sent.expect(Delivered)
        assert sequence_bytes(pair.target, TARGET_BLOCKS, 0, 12) == sequence_bytes(pair.source, SOURCE_BLOCKS, 0, 12)
        assert mapped() == before + 2
    assert "goes by shm" in caplog.text
    assert "comes by shm" in caplog.text
    assert mapped() == before
    assert psutil.Process().num_fds() <= open_files  # those of earlier tests may end meanwhile


def test_a_pair_that_shares_no_memory_falls_back_and_both_sides_say_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kv_transfer")
    before, open_files = mapped(), psutil.Process().num_fds()
    with connected(carriers=[Elsewhere(), *INLINE], listening_carriers=carriers_for("auto")) as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [TARGET_BLOCKS])
        session = pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        for layer in range(LAYERS):
            session.push(layer, 0, 12)
        session.finish(b"")
        pair.received.expect(Received)
        assert mapped() == before
    assert psutil.Process().num_fds() <= open_files  # those of earlier tests may end meanwhile
    why = r"(shm: the sender's memory is not within reach: No such file or directory)"
    assert f"goes by inline {why}" in caplog.text
    assert f"comes by inline {why}" in caplog.text


@pytest.mark.parametrize("listening", ["auto", "tcp", "shm"])
def test_forced_where_it_cannot_be_it_is_refused_by_name(listening: str) -> None:
    with connected(carriers=[Elsewhere()], listening_carriers=carriers_for(listening)) as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [TARGET_BLOCKS])
        pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, HandshakeRefused)
        assert failed.error.field == "carrier"
        assert "shm: " in str(failed.error)


def test_forced_on_a_system_without_it_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with connected(carriers=carriers_for("shm")) as pair:
        pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, HandshakeRefused)
        assert "shm: this system has no sealed memory" in str(failed.error)


@pytest.mark.parametrize("at", range(LAYERS))
def test_bytes_that_change_on_their_way_are_noticed_before_they_are_stored(at: int) -> None:
    carrier = Watched(lambda number: "damage" if number == at else "")
    with connected(carriers=[carrier]) as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [TARGET_BLOCKS])
        session = pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
        for layer in range(LAYERS):
            session.push(layer, 0, 12)
        session.finish(b"")
        (broken,) = pair.received.expect(Broken)
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(broken.error, CorruptTransfer)
        assert isinstance(failed.error, CorruptTransfer)
        assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 12)
        assert (pair.target.pages[at][0][TARGET_BLOCKS] == POISON).all()


class Liar(SharedMemoryIncoming):
    """Says that it is done with what it has not read yet."""

    def take(self, header: Header) -> memoryview:
        self._tell((1 << 20).to_bytes(8, "little"))
        return super().take(header)


class LyingCarrier(SharedMemoryCarrier):
    def accept(self, details: bytes, piece_bytes: int) -> SharedMemoryAcceptance:
        class Lying(SharedMemoryAcceptance):
            def open(self, connection: Connection, tell: Tell) -> SharedMemoryIncoming:
                honest = super().open(connection, tell)
                return Liar(connection, honest._slots, honest._key, tell)

        return Lying(super().accept(details, piece_bytes)._memory)


def test_a_receiver_that_lies_about_what_it_is_done_with_loses_the_connection() -> None:
    with connected(carriers=carriers_for("shm"), listening_carriers=[LyingCarrier()]) as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [TARGET_BLOCKS])
        pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS]).push(0, 0, 12)
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, CorruptTransfer)
        assert "payloads are done" in str(failed.error)
        pair.received.expect(Broken)


@contextmanager
def stuck_receiver(wires: InprocTransport, clock: ManualClock) -> Iterator[tuple[KVReceiver, threading.Event]]:
    """Its first write does not return until the event is set: to its sender, a receiver that hangs."""
    reached, go_on = threading.Event(), threading.Event()

    class Store(ByteStore):
        def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
            reached.set()
            assert go_on.wait(60)
            super().write(layer, blocks, start, count, data)

    shape = [LayerShape(8, 128, 128)]
    inbox = Inbox()
    with KVReceiver(Store(layout(256, shapes=shape), 32), wires, SECRET, "m", 1, clock, inbox, carriers_for("shm")) as receiver:
        receiver.open(Terms(1, "stuck", 0, 32 * 256, 1e6), [range(32)])
        yield receiver, reached
        go_on.set()


def test_a_receiver_that_hangs_costs_its_own_sessions_and_nobody_elses() -> None:
    wires, clock, sent, received = InprocTransport(), ManualClock(), Inbox(), Inbox()
    shape = [LayerShape(8, 128, 128)]
    source, target = filled(layout(256, shapes=shape), 32), poisoned(layout(256, shapes=shape), 32)
    carrier = Watched()
    with (
        KVReceiver(target, wires, SECRET, "m", 1, clock, received, carriers_for("shm")) as lively,
        stuck_receiver(wires, clock) as (receiver, reached),
        KVSender(source, wires, SECRET, "m", 2, clock, sent, [carrier]) as sender,
    ):
        stuck = sender.begin(Terms(1, "stuck", 0, 32 * 256, 5.0), [receiver.endpoint], [range(32)])
        stuck.push(0, 0, 32 * 256)  # 16 pieces: far more than the ring holds
        assert reached.wait(20)
        (end,) = carrier.ends
        while len(end._accounts._shipped) < SLOTS:  # the ring is full: the link's thread waits in it
            threading.Event().wait(0.001)
        lively.open(Terms(2, "lively", 0, 32 * 256, 30.0), [range(32)])
        session = sender.begin(Terms(2, "lively", 0, 32 * 256, 30.0), [lively.endpoint], [range(32)])
        session.push(0, 0, 32 * 256)
        session.finish(b"")
        received.expect(Received)
        assert [event.attempt for event in sent.expect(Delivered)] == ["lively"]
        assert not stuck.ended
        clock.advance(6.0)
        sender.sweep()
        (failed,) = sent.expect(SendFailed)
        assert failed.attempt == "stuck"
        assert isinstance(failed.error, LeaseExpired)
    assert (target.pages[0][0] == source.pages[0][0]).all()


def test_one_thread_sends_what_no_send_carries() -> None:
    """A second one is for sends that take as long as gathering does; here each would only wake for nothing."""
    shape = [LayerShape(8, 128, 128)]
    source, target = filled(layout(256, shapes=shape), 32), poisoned(layout(256, shapes=shape), 32)
    with connected(source, target, carriers=carriers_for("shm")) as pair:
        pair.receiver.open(Terms(1, "a", 0, 32 * 256, 30.0), [range(32)])
        session = pair.sender.begin(Terms(1, "a", 0, 32 * 256, 30.0), [pair.receiver.endpoint], [range(32)])
        session.push(0, 0, 32 * 256)
        session.finish(b"")
        pair.sent.expect(Delivered)
        assert [thread.name for thread in threading.enumerate()].count(f"kv-sender {pair.receiver.endpoint}") == 1


def test_payloads_that_are_lost_cost_their_sessions_and_no_room_for_good() -> None:
    carrier = Watched(lambda number: "lose" if number % 2 else "")
    with connected(carriers=[carrier]) as pair:
        for grant in range(1, 3 * SLOTS):
            pair.receiver.open(Terms(grant, f"a{grant}", 0, 12, 30.0), [TARGET_BLOCKS])
            session = pair.sender.begin(Terms(grant, f"a{grant}", 0, 12, 30.0), [pair.receiver.endpoint], [SOURCE_BLOCKS])
            for layer in range(LAYERS):
                session.push(layer, 0, 12)
            session.finish(b"")
            pair.sent.expect(SendFailed, grant)
        assert not pair.received.of(Received)
        assert len(carrier.ends) == 1


def test_the_ring_takes_what_the_configuration_promises() -> None:
    assert SLOTS >= 4
    assert SLOTS * PIECE_BYTES == 12 << 20

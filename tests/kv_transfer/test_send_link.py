"""The sending side against peers that it should not believe, and stores that make it wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from core.clock import ManualClock, MonotonicClock
from core.errors import CorruptTransfer, LeaseExpired, TransferError
from core.layout import LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.carrier import Carrier
from kv_transfer.carriers.inline import INLINE
from kv_transfer.events import Broken, Delivered, SendFailed
from kv_transfer.frames import (
    HEADER_BYTES,
    JOINED_BYTES,
    PIECE_BYTES,
    Commit,
    Kind,
    SessionDigest,
    pack_body,
    pack_frame,
    parse_header,
)
from kv_transfer.protocol import Handshake, Identity, Peer
from kv_transfer.sender import KVSender
from kv_transfer.sessions import SendSession
from kv_transfer.terms import Terms
from kv_transfer.transport import Connection
from kv_transfer.transports.fault import Fault, FaultTransport, Message
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.memory_carrier import MemoryCarrier
from tests.kv_transfer.rig import SECRET, Inbox, Pair, connected, filled, layout, poisoned, sequence_bytes

STOP = 8
HANDSHAKE_MESSAGES = 2  # of the dialling side


class FakeReceiver:
    """Speaks the protocol by hand, so that it can lie."""

    def __init__(self, connection: Connection, peer: Peer) -> None:
        self.connection, self.peer = connection, peer
        self.digest = SessionDigest()

    def read_frame(self) -> Kind:
        header = memoryview(bytearray(HEADER_BYTES))
        self.connection.recv_into(header)
        parsed = parse_header(header, self.peer.recv_seed)
        self.connection.recv_into(memoryview(bytearray(parsed.length)))
        self.digest.add(header)
        return parsed.kind

    def read_session(self) -> None:
        while self.read_frame() is not Kind.FINISH:
            pass

    def reply(self, kind: Kind, body: bytes, sequence: int = 0, grant: int = 1) -> None:
        self.connection.send([pack_frame(kind, grant, sequence, body, self.peer.send_seed), body])

    def commit(self) -> bytes:
        return pack_body(Commit(self.digest.value()))


@contextmanager
def against_fake() -> Iterator[tuple[FakeReceiver, SendSession, Inbox]]:
    wires, inbox = InprocTransport(), Inbox()
    listener = wires.listen()
    with KVSender(filled(layout()), wires, SECRET, "model", 1, MonotonicClock(), inbox) as sender:
        session = sender.begin(Terms(1, "a", 0, STOP, 60.0), [listener.endpoint], [[4, 2]])
        connection = listener.accept()
        peer, _ = Handshake(Identity("model", layout(), 5), SECRET, INLINE).answer(connection)
        yield FakeReceiver(connection, peer), session, inbox
        connection.close()
    listener.close()


def send_all(session: SendSession) -> None:
    for layer in range(3):
        session.push(layer, 0, STOP)
    session.finish(b"")


def test_a_right_commit_is_believed() -> None:
    with against_fake() as (fake, session, inbox):
        send_all(session)
        fake.read_session()
        fake.reply(Kind.COMMIT, fake.commit(), sequence=0, grant=77)  # of some session we never had
        fake.reply(Kind.COMMIT, fake.commit(), sequence=1)
        inbox.expect(Delivered)
        assert len(inbox.events) == 1


def test_a_commit_of_something_else_fails_the_session() -> None:
    with against_fake() as (fake, session, inbox):
        send_all(session)
        fake.read_session()
        fake.reply(Kind.COMMIT, pack_body(Commit(fake.digest.value() ^ 1)))
        assert isinstance(inbox.expect(SendFailed)[0].error, CorruptTransfer)


def test_a_commit_before_the_finish_fails_the_session() -> None:
    with against_fake() as (fake, session, inbox):
        session.push(0, 0, STOP)
        assert [fake.read_frame(), fake.read_frame()] == [Kind.BEGIN, Kind.DATA]
        fake.reply(Kind.COMMIT, fake.commit())
        assert isinstance(inbox.expect(SendFailed)[0].error, CorruptTransfer)


@pytest.mark.parametrize(
    ("kind", "body", "sequence"),
    [(Kind.COMMIT, None, 1), (Kind.DATA, b"x", 0), (Kind.COMMIT, b"\xc1", 0), (Kind.ABORT, b"\x90", 0)],
)
def test_an_answer_that_no_honest_receiver_gives_ends_the_connection(kind: Kind, body: bytes | None, sequence: int) -> None:
    with against_fake() as (fake, session, inbox):
        send_all(session)
        fake.read_session()
        fake.reply(kind, fake.commit() if body is None else body, sequence)
        assert isinstance(inbox.expect(SendFailed)[0].error, CorruptTransfer)
        with pytest.raises(TransferError):
            fake.read_frame()


def test_a_session_that_starves_costs_the_connection_so_that_nothing_stays_stuck_behind_it() -> None:
    wires, clock, inbox = InprocTransport(), ManualClock(), Inbox()
    listener = wires.listen()
    with KVSender(filled(layout()), wires, SECRET, "model", 1, clock, inbox) as sender:
        sender.begin(Terms(1, "a", 0, STOP, 5.0), [listener.endpoint], [[4, 2]])
        stopped = listener.accept()  # and never a word
        clock.advance(6.0)
        sender.sweep()
        assert isinstance(inbox.expect(SendFailed)[0].error, LeaseExpired)
        with pytest.raises(TransferError):
            stopped.recv_into(memoryview(bytearray(1 << 20)))
        sender.begin(Terms(2, "b", 0, STOP, 5.0), [listener.endpoint], [[4, 2]])
        listener.accept().close()
        assert inbox.expect(SendFailed, 2)[1].attempt == "b"
        stopped.close()
    listener.close()


# --- what a grant may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"first_token": STOP + 1}, "first_token"),
        ({"first_token": -1}, "first_token"),
        ({"grant": -1}, "64 bits"),
        ({"grant": 1 << 64}, "64 bits"),
        ({"grant": 1}, "twice"),
        ({"lease_s": 0.0}, "lease_s"),
        ({"lease_s": float("nan")}, "lease_s"),
        ({"lease_s": float("inf")}, "lease_s"),
    ],
)
def test_a_grant_that_cannot_be_fails_its_session_and_nothing_else(wrong: dict[str, Any], why: str) -> None:
    bad = replace(Terms(2, "bad", 0, STOP, 60.0), **wrong)
    assert_fails_alone(lambda pair: pair.sender.begin(bad, [pair.receiver.endpoint], [[4, 2]]), why)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({"endpoints": ["inproc:99"]}, "nobody listens"),
        ({"incarnation": 9}, "incarnation"),
        ({"endpoints": []}, "0 endpoints"),
        ({"endpoints": ["inproc:1", "inproc:1"]}, "2 endpoints"),
    ],
)
def test_a_grant_from_nowhere_fails_its_session_and_nothing_else(where: dict[str, Any], why: str) -> None:
    bad = Terms(2, "bad", 0, STOP, 60.0)
    assert_fails_alone(
        lambda pair: pair.sender.begin(bad, **{"endpoints": [pair.receiver.endpoint], "tables": [[4, 2]], **where}), why
    )


def assert_fails_alone(begin: Callable[[Pair], SendSession], why: str) -> None:
    """Another session of the pair is delivered nevertheless."""
    with connected() as pair:
        pair.receiver.open(Terms(1, "good", 0, STOP, 60.0), [[1, 2]])
        good = pair.sender.begin(Terms(1, "good", 0, STOP, 60.0), [pair.receiver.endpoint], [[4, 2]])
        bad = begin(pair)
        (failed,) = pair.sent.expect(SendFailed)
        assert failed.attempt == "bad"
        assert why in str(failed.error)
        assert bad.ended
        send_all(bad)
        assert not bad.abort("again")
        send_all(good)
        pair.sent.expect(Delivered)
        assert len(pair.sent.events) == 2


def test_an_endpoint_that_is_no_name_is_a_transfer_error() -> None:
    inbox = Inbox()
    with KVSender(filled(layout()), TcpTransport(), SECRET, "model", 1, MonotonicClock(), inbox) as sender:
        for number, endpoint in enumerate(["", "x", "a" * 100 + ":1", "\ud800:1", "a..b:1", "[::1]:x"]):
            sender.begin(Terms(number, "a", 0, STOP, 60.0), [endpoint], [[4, 2]])
            assert type(inbox.expect(SendFailed, number + 1)[number].error) is TransferError


def test_a_number_of_programmers_is_a_value_error() -> None:
    with connected() as pair, pytest.raises(ValueError, match="num_tokens"):
        pair.sender.begin(Terms(1, "a", 0, -1, 60.0), [pair.receiver.endpoint], [[4, 2]])


def test_the_next_incarnation_of_a_peer_may_use_its_numbers_again_at_once() -> None:
    """The first incarnation is dead without a word: its session and its connection are still there."""
    wires, inbox = InprocTransport(), Inbox()
    listener = wires.listen()
    with KVSender(filled(layout()), wires, SECRET, "model", 1, MonotonicClock(), inbox) as sender:
        peers = []
        for incarnation in (5, 6):
            session = sender.begin(Terms(7, f"a{incarnation}", 0, STOP, 60.0), [listener.endpoint], [[4, 2]], incarnation)
            connection = listener.accept()
            peer, _ = Handshake(Identity("model", layout(), incarnation), SECRET, INLINE).answer(connection)
            peers.append(FakeReceiver(connection, peer))
        send_all(session)
        peers[1].read_session()
        peers[1].reply(Kind.COMMIT, peers[1].commit(), grant=7)
        assert [event.attempt for event in inbox.expect(Delivered)] == ["a6"]
        assert inbox.of(SendFailed) == []
        for fake in peers:
            fake.connection.close()
    listener.close()


def test_a_dial_that_nobody_waits_for_any_more_is_given_up() -> None:
    wires, inbox = InprocTransport(), Inbox()
    listener = wires.listen()
    with KVSender(filled(layout()), wires, SECRET, "model", 1, MonotonicClock(), inbox) as sender:
        session = sender.begin(Terms(1, "a", 0, STOP, 60.0), [listener.endpoint], [[4, 2]])
        silent = listener.accept()
        silent.recv_into(memoryview(bytearray(1)))  # the handshake has begun
        assert session.abort("changed my mind")
        with pytest.raises(TransferError):
            silent.recv_into(memoryview(bytearray(1 << 20)))
        silent.close()
    listener.close()


def test_a_piece_that_was_prepared_while_another_left_has_a_lease_of_its_own() -> None:
    shape = [LayerShape(8, 128, 128)]
    piece = PIECE_BYTES // layout(256, shapes=shape).layer_bytes_per_token(0)
    clock, gates, reached = ManualClock(), [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    both_read = threading.Barrier(2)

    class Store(ByteStore):
        reads = 0

        def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
            super().read(layer, blocks, start, count, out)
            self.reads += 1
            if self.reads == 2:
                both_read.wait(20)

    def plan(message: Message) -> Fault | None:
        if message.dialled and message.index in (3, 4):
            reached[message.index - 3].set()
            gates[message.index - 3].wait(20)
        return None

    wires = FaultTransport(InprocTransport(), plan)
    source, target = Store(layout(256, shapes=shape), 16), ByteStore(layout(256, shapes=shape), 16)
    with connected(source, target, wires, clock=clock) as pair:
        pair.receiver.open(Terms(1, "a", 0, 4 * piece, 60.0), [range(16)])
        session = pair.sender.begin(Terms(1, "a", 0, 4 * piece, 5.0), [pair.receiver.endpoint], [range(16)])
        while pair.sender.sweep() is not None:  # until BEGIN has left
            threading.Event().wait(0.001)
        session.push(0, 0, 2 * piece)
        assert reached[0].wait(20)
        both_read.wait(20)  # the second piece is prepared while the first is on its way
        gates[0].set()
        assert reached[1].wait(20)
        clock.advance(6.0)
        pair.sender.sweep()
        (failed,) = pair.sent.expect(SendFailed)
        assert isinstance(failed.error, LeaseExpired)
        gates[1].set()


LIKE = [LayerShape(8, 128, 128)] * 8
UNLIKE = [LayerShape(8, 128, 128), LayerShape(4, 256, 256)] * 4  # their layers do not join


def messages_for(tokens: int, carriers: Sequence[Carrier], shapes: Sequence[LayerShape]) -> list[int]:
    """Sizes of the messages that carry a session of 8 layers of 4 KiB a token, all pushed before the connection is up."""
    kind = layout(256, shapes=shapes)
    sizes, pushed = [], threading.Event()

    def plan(message: Message) -> Fault | None:
        if message.dialled:
            pushed.wait(20)
            sizes.append(message.size_bytes)
        return None

    source, target = filled(kind, 1), poisoned(kind, 1)
    with connected(source, target, FaultTransport(InprocTransport(), plan), carriers=carriers) as pair:
        pair.receiver.open(Terms(1, "a", 0, tokens, 60.0), [[0]])
        session = pair.sender.begin(Terms(1, "a", 0, tokens, 60.0), [pair.receiver.endpoint], [[0]])
        for layer in range(8):
            session.push(layer, 0, tokens)
        session.finish(b"")
        pushed.set()
        pair.sent.expect(Delivered)
    assert sequence_bytes(target, [0], 0, tokens) == sequence_bytes(source, [0], 0, tokens)
    return sizes[HANDSHAKE_MESSAGES:]


@pytest.mark.parametrize("shapes", [LIKE, UNLIKE])
def test_small_pieces_leave_together_where_the_stream_carries_them(shapes: Sequence[LayerShape]) -> None:
    (one,) = messages_for(2, INLINE, shapes)
    assert one > 8 * 2 * 4096
    two = messages_for(64, INLINE, shapes)
    assert len(two) == 2
    assert all(size > JOINED_BYTES for size in two)
    assert len(messages_for(256, INLINE, shapes)) == 8


def test_what_something_else_carries_leaves_frame_by_frame() -> None:
    assert len(messages_for(2, [MemoryCarrier()], LIKE)) == 1
    assert len(messages_for(64, [MemoryCarrier()], LIKE)) == 2
    assert len(messages_for(2, [MemoryCarrier()], UNLIKE)) == 8


def test_what_cannot_be_read_ends_its_session_and_not_what_was_read_before_it() -> None:
    class Store(ByteStore):
        broken = True

        def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
            if layer == 1 and self.broken:
                raise ValueError("a bad block")
            super().read(layer, blocks, start, count, out)

    source, target = Store(layout(), 32), poisoned(layout())
    with connected(source, target) as pair:
        for grant in range(1, 5):  # more than there are rooms
            pair.receiver.open(Terms(grant, f"a{grant}", 0, STOP, 60.0), [[grant, 9]])
            send_all(pair.sender.begin(Terms(grant, f"a{grant}", 0, STOP, 60.0), [pair.receiver.endpoint], [[4, 2]]))
            assert "a bad block" in str(pair.sent.expect(SendFailed, grant)[-1].error)
        assert len(pair.received.expect(Broken, 4)) == 4
        source.broken = False
        pair.receiver.open(Terms(5, "a5", 0, STOP, 60.0), [[5, 6]])
        send_all(pair.sender.begin(Terms(5, "a5", 0, STOP, 60.0), [pair.receiver.endpoint], [[4, 2]]))
        assert [event.attempt for event in pair.sent.expect(Delivered)] == ["a5"]
    assert sequence_bytes(target, [5, 6], 0, STOP) == sequence_bytes(source, [4, 2], 0, STOP)

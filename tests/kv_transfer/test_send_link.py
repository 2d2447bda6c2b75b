"""The sending side against peers that it should not believe, and stores that make it wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from core.clock import ManualClock, MonotonicClock
from core.errors import CorruptTransfer, LeaseExpired, TransferError
from kv_transfer.byte_store import ByteStore
from kv_transfer.carriers.inline import INLINE
from kv_transfer.events import Broken, Delivered, SendFailed
from kv_transfer.frames import HEADER_BYTES, Commit, Kind, SessionDigest, pack_body, pack_frame, parse_header
from kv_transfer.protocol import Handshake, Identity, Peer
from kv_transfer.sender import KVSender
from kv_transfer.sessions import SendSession
from kv_transfer.store import Fence
from kv_transfer.transport import Connection
from kv_transfer.transports.inproc import InprocTransport
from tests.kv_transfer.rig import SECRET, Inbox, connected, filled, layout

STOP = 8


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
        session = sender.begin("a", 1, listener.endpoint, [4, 2], 0, STOP, 60.0)
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
        sender.begin("a", 1, listener.endpoint, [4, 2], 0, STOP, 5.0)
        stopped = listener.accept()  # and never a word
        clock.advance(6.0)
        sender.sweep()
        assert isinstance(inbox.expect(SendFailed)[0].error, LeaseExpired)
        with pytest.raises(TransferError):
            stopped.recv_into(memoryview(bytearray(1 << 20)))
        sender.begin("b", 2, listener.endpoint, [4, 2], 0, STOP, 5.0)
        listener.accept().close()
        assert inbox.expect(SendFailed, 2)[1].attempt == "b"
        stopped.close()
    listener.close()


class FencedStore(ByteStore):
    """An engine whose writes are not visible until the fence opens, as on a GPU."""

    def __init__(self) -> None:
        super().__init__(layout(), 32)
        self.open, self.waiting, self.reads = threading.Event(), threading.Event(), 0

    def fence(self) -> Fence:
        return self

    def wait(self) -> None:
        self.waiting.set()
        assert self.open.wait(20)

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        assert self.open.is_set(), "read before the fence"
        self.reads += 1
        super().read(layer, blocks, start, count, out)


def test_nothing_is_read_before_its_fence() -> None:
    store = FencedStore()
    with connected(store) as pair:
        pair.receiver.open(1, "a", [1, 2], 0, STOP, 60.0)
        session = pair.sender.begin("a", 1, pair.receiver.endpoint, [4, 2], 0, STOP, 60.0)
        send_all(session)
        assert store.waiting.wait(20)
        store.open.set()
        pair.sent.expect(Delivered)


def test_abort_does_not_wait_for_a_fence_and_what_waits_there_is_not_read() -> None:
    store = FencedStore()
    with connected(store) as pair:
        pair.receiver.open(1, "a", [1, 2], 0, STOP, 60.0)
        session = pair.sender.begin("a", 1, pair.receiver.endpoint, [4, 2], 0, STOP, 60.0)
        send_all(session)
        assert store.waiting.wait(20)
        assert session.abort("preempted")
        store.open.set()
        pair.received.expect(Broken)
        assert store.reads == 0

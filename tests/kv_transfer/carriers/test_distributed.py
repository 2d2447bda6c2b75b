"""The gloo carrier within one process: what arrives, who is refused, what lies and hangs cost, and that nothing is left."""

from __future__ import annotations

import gc
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from subprocess import run

import msgspec
import psutil
import pytest

from core.errors import ConfigError, CorruptTransfer, HandshakeRefused, LeaseExpired, TransferError
from core.layout import LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.carrier import CarrierUnavailable, Outgoing
from kv_transfer.carriers import carriers_for, distributed, gloo_pair
from kv_transfer.carriers.distributed import DistributedCarrier, DistributedEnd, DistributedIncoming, DistributedOutgoing
from kv_transfer.carriers.gloo_pair import GlooPair, Move
from kv_transfer.carriers.gloo_rendezvous import Rank, Rendezvous, mac
from kv_transfer.carriers.inline import INLINE
from kv_transfer.events import Broken, Delivered, Received, SendFailed
from kv_transfer.frames import NOWHERE, Header, Kind
from kv_transfer.terms import Terms
from kv_transfer.transport import Buffer, Connection
from kv_transfer.transports.fault import Delay, Drop, Duplicate, Fault, FaultTransport, FlipBit, Message, Truncate
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.socket_connection import SocketConnection
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rig import Pair, ScriptedConnection, connected, filled, layout, poisoned, sequence_bytes, untouched_outside

HOST = "127.0.0.1"
SOURCE_BLOCKS, TARGET_BLOCKS = [6, 1, 9], [30, 4, 2]
KEY = b"k" * 64
GLOO = [DistributedCarrier(HOST)]


def send(pair: Pair, grant: int = 1, lease_s: float = 30.0) -> None:
    pair.receiver.open(Terms(grant, f"a{grant}", 0, 12, lease_s), [TARGET_BLOCKS])
    session = pair.sender.begin(Terms(grant, f"a{grant}", 0, 12, lease_s), [pair.receiver.endpoint], [SOURCE_BLOCKS])
    for layer in range(3):
        session.push(layer, 0, 12)
    session.finish(b"tail")


def arrives(pair: Pair, grant: int) -> bool:
    send(pair, grant)
    while True:
        seen = pair.sent.of((Delivered, SendFailed))
        for event in seen:
            if event.attempt == f"a{grant}":
                return isinstance(event, Delivered)
        pair.sent.expect((Delivered, SendFailed), len(seen) + 1)


def assert_arrived(pair: Pair) -> None:
    assert sequence_bytes(pair.target, TARGET_BLOCKS, 0, 12) == sequence_bytes(pair.source, SOURCE_BLOCKS, 0, 12)
    assert untouched_outside(pair.target, TARGET_BLOCKS, 0, 12)


# --- what it carries ------------------------------------------------------------------------------------------------------


def test_kv_of_many_pieces_arrives_as_it_was_sent() -> None:
    shape = [LayerShape(8, 128, 128)]  # 4 KiB a token: 12 pieces of 2 MiB
    source, target = filled(layout(256, shapes=shape), 24), poisoned(layout(192, shapes=shape), 32)
    with connected(source, target, TcpTransport(), carriers=GLOO) as pair:
        pair.receiver.open(Terms(1, "a", 0, 24 * 256, 30.0), [range(32)])
        session = pair.sender.begin(Terms(1, "a", 0, 24 * 256, 30.0), [pair.receiver.endpoint], [range(24)])
        session.push(0, 0, 24 * 256)
        session.finish(b"")
        pair.received.expect(Received)
        pair.sent.expect(Delivered)
    for got, sent in zip(target.pages[0], source.pages[0], strict=True):
        assert got.tobytes() == sent.tobytes()


def test_payloads_do_not_travel_on_the_connection() -> None:
    sizes: list[int] = []

    def plan(message: Message) -> Fault | None:
        sizes.append(message.size_bytes)
        return None

    large = layout(4, shapes=[LayerShape(8, 128, 128)])
    with connected(ByteStore(large, 32), ByteStore(large, 32), FaultTransport(InprocTransport(), plan), carriers=GLOO) as pair:
        pair.receiver.open(Terms(1, "a", 0, 12, 30.0), [[0, 1, 2]])
        session = pair.sender.begin(Terms(1, "a", 0, 12, 30.0), [pair.receiver.endpoint], [[0, 1, 2]])
        session.push(0, 0, 12)
        session.finish(b"")
        (received,) = pair.received.expect(Received)
    assert received.kv_bytes == 12 * 4096
    assert sum(sizes) < 4096


def test_a_payload_damaged_on_its_way_costs_its_session_alone() -> None:
    damaged = [True]

    class Damaging(DistributedOutgoing):
        def ship(self, head: Sequence[Buffer], payload: memoryview, tail: Sequence[Buffer] = ()) -> None:
            if damaged.pop() if damaged else False:
                payload[0] ^= 1
            super().ship(head, payload, tail)

    class End(DistributedEnd):
        def settle(self, connection: Connection, details: bytes) -> Outgoing:
            self.hear(details)
            return Damaging(connection, self._pair(connection), self._piece_bytes)

    class Carrier(DistributedCarrier):
        def offer(self, piece_bytes: int) -> DistributedEnd:
            return End(0, HOST, piece_bytes)

    with connected(carriers=[Carrier(HOST)], listening_carriers=GLOO) as pair:
        send(pair, 1)
        (broken,), (failed,) = pair.received.expect(Broken), pair.sent.expect(SendFailed)
        assert type(broken.error) is type(failed.error) is CorruptTransfer
        send(pair, 2)
        pair.received.expect(Received)
        assert_arrived(pair)


# --- when it is chosen ----------------------------------------------------------------------------------------------------


def test_it_is_forced_never_taken_by_itself() -> None:
    assert [carrier.name for carrier in carriers_for("distributed", HOST)] == ["distributed"]
    assert "distributed" not in [carrier.name for carrier in carriers_for("auto", HOST)]
    with pytest.raises(ConfigError, match="distributed"):
        carriers_for("pigeon")


def test_whoever_does_not_force_it_imports_no_torch() -> None:
    asks = "import sys; from kv_transfer.carriers import carriers_for; carriers_for('auto'); assert 'torch' not in sys.modules"
    run([sys.executable, "-c", asks], check=True, timeout=60)


@pytest.mark.parametrize(("dialling", "listening"), [(GLOO, INLINE), (INLINE, GLOO)])
def test_forced_on_one_side_alone_it_is_refused_by_name(dialling: Sequence, listening: Sequence) -> None:
    with connected(carriers=dialling, listening_carriers=listening) as pair:
        send(pair)
        (failed,) = pair.sent.expect(SendFailed)
    assert isinstance(failed.error, HandshakeRefused)
    assert failed.error.field == "carrier"
    assert "distributed" in str(failed.error)


def test_a_torch_without_gloo_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    with connected(carriers=GLOO) as pair:
        send(pair)
        (failed,) = pair.sent.expect(SendFailed)
    assert isinstance(failed.error, HandshakeRefused)
    assert "distributed: this torch comes without gloo" in str(failed.error)


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        (b"", "malformed"),
        (b"\xc1" * 100, "malformed"),
        (msgspec.msgpack.encode(["2.13.0"]), "malformed"),
        (msgspec.msgpack.encode([1, 2]), "malformed"),
        (msgspec.msgpack.encode(["0.4.1", b"n" * 32]), "torch .* here, 0.4.1 there"),
        (msgspec.msgpack.encode([distributed._version(), b"short"]), "nonce of 5 bytes"),
        (b"\x92" + b"\xdd\xff\xff\xff\xff" * 30, "malformed"),
    ],
)
def test_details_that_lie_are_refused_on_either_side(details: bytes, reason: str) -> None:
    with pytest.raises(CarrierUnavailable, match=reason):
        DistributedCarrier(HOST).accept(details, 1 << 20)
    near, far = socket.socketpair()
    with far, pytest.raises(CarrierUnavailable, match=reason):
        DistributedCarrier(HOST).offer(1 << 20).settle(SocketConnection(near), details)


def test_a_host_that_is_not_ours_is_a_typed_error() -> None:
    with connected(carriers=[DistributedCarrier("203.0.113.7")]) as pair:
        send(pair)
        (failed,) = pair.sent.expect(SendFailed)
    assert type(failed.error) is TransferError
    assert "203.0.113.7" in str(failed.error)


# --- making the pair ------------------------------------------------------------------------------------------------------


def gloo_record(port: int, host: str = HOST) -> bytes:
    """What a rank tells of itself behind the host's name: an address, and a number for each rank."""
    address = struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host)
    return struct.pack("<Q", 136) + address.ljust(128, b"\0") + struct.pack("<qqq", -1, 0, 1)


def packed(name: str, record: bytes, key: bytes = KEY) -> bytes:
    body = msgspec.msgpack.encode((name, record))
    return struct.pack("<H", len(body)) + body + mac(key, b"record", 1, body)


def unused_port() -> int:
    with socket.create_server((HOST, 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_pair, "GLOO_TIMEOUT_S", 0.05)
    monkeypatch.setattr(gloo_pair, "PROOF_TIMEOUT_S", 0.3)
    monkeypatch.setattr(distributed, "SETUP_TIMEOUT_S", 0.3)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (packed("0/1", gloo_record(unused_port())), TransferError, "cannot meet"),
        (packed("0/1", gloo_record(0)), TransferError, "cannot meet"),
        (packed("0/1", gloo_record(65535, "127.255.255.254")), TransferError, "cannot meet"),
        (packed("0/1", gloo_record(9)[:8] + b"\x63\x00" + gloo_record(9)[10:]), TransferError, "cannot meet"),
        (packed("0/1", gloo_record(9), b"another key"), CorruptTransfer, "MAC"),
        (packed("0/0", gloo_record(9)), CorruptTransfer, "not like this side's own"),
        (packed("0/1", gloo_record(9)[:-1]), CorruptTransfer, "not like this side's own"),
        (packed("0/1", struct.pack("<Q", 1 << 60) + gloo_record(9)[8:]), CorruptTransfer, "not like this side's own"),
        (packed("0/1", b""), CorruptTransfer, "not like this side's own"),
        (struct.pack("<H", 3) + b"\x92\xa1" + mac(KEY, b"record", 1, b"\x92\xa1\xa1") + b"\xa1", CorruptTransfer, "MAC"),
        (b"\xff\xff" + b"x" * 100, CorruptTransfer, "65535 bytes"),
        (b"", TransferError, "the connection"),
    ],
)
def test_a_peer_that_lies_about_where_it_is_is_a_typed_error(answer: bytes, kind: type[TransferError], reason: str) -> None:
    near, far = socket.socketpair()
    with far:
        far.sendall(answer)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(kind, match=reason) as raised:
            GlooPair(SocketConnection(near), KEY, 0, HOST)
    assert raised.type is kind


@pytest.mark.usefixtures("brief")
def test_a_peer_that_falls_silent_while_the_pair_is_made_costs_the_connection_not_the_thread() -> None:
    near, far = socket.socketpair()
    end = DistributedCarrier(HOST).offer(1 << 20)
    with far, pytest.raises(TransferError):
        end.settle(SocketConnection(near), DistributedCarrier(HOST).offer(1 << 20).details)


def everything(sock: socket.socket) -> bytes:
    """Until gloo hangs up."""
    sock.settimeout(20)
    parts = []
    try:
        while part := sock.recv(4096):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@contextmanager
def strangers(port_of: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Somebody comes to gloo's socket under every number, before the peer knows where it is."""
    came: list[socket.socket] = []
    told = Rendezvous.set

    def tell(self: Rendezvous, key: str, value: bytes) -> None:
        for number in (0, 1):
            stranger = socket.create_connection((HOST, port_of(value)))
            stranger.sendall(struct.pack("<q", number))
            came.append(stranger)
        told(self, key, value)

    monkeypatch.setattr(Rendezvous, "set", tell)
    try:
        yield came
    finally:
        for stranger in came:
            stranger.close()


@pytest.mark.usefixtures("brief")
def test_no_kv_goes_to_a_stranger_who_comes_to_the_pairs_socket_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def port_of(record: bytes) -> int:
        at = 8 + struct.unpack_from("<Q", record)[0] + 8
        return int(struct.unpack_from(">H", record, at + 2)[0])

    with strangers(port_of, monkeypatch) as came, connected(carriers=GLOO) as pair:
        send(pair, lease_s=2.0)
        (ended,) = pair.sent.expect((Delivered, SendFailed))
        if isinstance(ended, Delivered):  # gloo heard the peer before the strangers
            assert_arrived(pair)
        else:
            assert isinstance(ended.error, TransferError)
            assert pair.received.of(Received) == []
        pair.sender.close()
        pair.receiver.stop()
        heard = [everything(stranger) for stranger in came]
    assert len(heard) == 4
    assert max(len(what) for what in heard) < 12 * 16  # the smallest piece


@pytest.mark.usefixtures("brief")
def test_a_pair_whose_other_end_cannot_prove_itself_is_none() -> None:
    near, far = (SocketConnection(sock) for sock in socket.socketpair())
    failures: list[TransferError] = []

    class Forger(GlooPair):
        def _prove(self, key: bytes, rank: Rank) -> None:
            super()._prove(b"guessed", rank)

    def make(kind: type[GlooPair], connection: Connection, rank: Rank) -> None:
        try:
            kind(connection, KEY, rank, HOST)
        except TransferError as error:
            failures.append(error)

    threads = [threading.Thread(target=make, args=args) for args in ((GlooPair, near, 1), (Forger, far, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert "somebody else has come to this pair" in [str(error) for error in failures]
    assert len(failures) == 2


# --- hanging and ending ---------------------------------------------------------------------------------------------------


@contextmanager
def gloo_pairs() -> Iterator[tuple[GlooPair, GlooPair]]:
    ends: dict[Rank, GlooPair] = {}
    near, far = (SocketConnection(sock) for sock in socket.socketpair())

    def make(connection: Connection, rank: Rank) -> None:
        ends[rank] = GlooPair(connection, KEY, rank, HOST)

    other = threading.Thread(target=make, args=(far, 1))
    other.start()
    make(near, 0)
    other.join(60)
    yield ends[0], ends[1]
    for end in ends.values():
        end.close()
    near.close()
    far.close()


@pytest.mark.parametrize("operation", ["send", "receive"])
@pytest.mark.parametrize("closer", [0, 1])
def test_closing_either_end_wakes_whoever_waits_in_a_pair(operation: str, closer: int) -> None:
    with gloo_pairs() as pairs:
        errors: list[TransferError] = []
        waiting = threading.Event()

        def wait() -> None:
            waiting.set()
            try:
                getattr(pairs[0], operation)(memoryview(bytearray(1 << 20)), 3600.0).wait()
            except TransferError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait(20)
        threading.Event().wait(0.05)  # most likely inside by now; woken or refused, it must end
        pairs[closer].close()
        thread.join(60)
        assert not thread.is_alive()
        assert len(errors) == 1


def test_an_operation_has_a_time_limit_and_ends_the_pair() -> None:
    with gloo_pairs() as (one, other):
        with pytest.raises(TransferError):
            one.receive(memoryview(bytearray(8)), 0.05).wait()
        with pytest.raises(TransferError):
            other.receive(memoryview(bytearray(8)), 3600.0).wait()


def test_a_receiver_that_stops_does_not_wait_for_a_payload_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header is there, its payload hangs: only the carrier can be woken."""
    monkeypatch.setattr(distributed, "PAYLOAD_TIMEOUT_S", 3600.0)
    hanging, go_on = threading.Event(), threading.Event()
    send_now = GlooPair.send

    def hang(self: GlooPair, data: memoryview, timeout_s: float) -> Move:
        if data.nbytes != 32:  # a proof
            hanging.set()
            go_on.wait(60)
        return send_now(self, data, timeout_s)

    monkeypatch.setattr(GlooPair, "send", hang)
    with connected(carriers=GLOO) as pair:
        send(pair, lease_s=3600.0)
        assert hanging.wait(20)
        pair.receiver.stop()
        (broken,) = pair.received.expect(Broken)
        assert broken.attempt == "a1"
        go_on.set()


def test_a_receiver_that_takes_nothing_costs_its_lease_not_the_senders_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PAYLOAD_TIMEOUT_S", 3600.0)
    stored = threading.Event()

    class Stuck(ByteStore):
        def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
            stored.wait(60)

    try:
        large = layout(256, shapes=[LayerShape(8, 128, 128)])
        with connected(filled(large, 8), Stuck(large, 8), carriers=GLOO) as pair:
            pair.receiver.open(Terms(1, "a1", 0, 8 * 256, 3600.0), [range(8)])
            session = pair.sender.begin(Terms(1, "a1", 0, 8 * 256, 0.5), [pair.receiver.endpoint], [range(8)])
            session.push(0, 0, 8 * 256)
            (failed,) = pair.sent.expect(SendFailed)
            assert isinstance(failed.error, LeaseExpired)
            pair.sender.close()  # joins the thread that was sending
            stored.set()
    finally:
        stored.set()


FAULTS = [Drop(), Duplicate(), FlipBit(3), FlipBit(8 * 60), FlipBit(8 * 80), Truncate(1), Truncate(55), Delay(0.01)]


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("index", range(2, 6))
@pytest.mark.parametrize("dialled", [True, False])
def test_a_fault_on_the_connection_ends_in_kv_or_in_a_typed_error(fault: Fault, index: int, dialled: bool) -> None:
    """From the handshake's last message on: the records of the pair, headers, the commit."""
    over = threading.Event()

    def plan(message: Message) -> Fault | None:
        struck = message.index == index and message.dialled is dialled and not over.is_set()
        return fault if struck else None

    wires = FaultTransport(InprocTransport(), plan)
    with connected(dialling=wires, carriers=GLOO) as pair:
        send(pair, 1, lease_s=0.5)
        ended = pair.sent.expect((Delivered, SendFailed))[0]
        if isinstance(ended, SendFailed):
            assert isinstance(ended.error, TransferError)
        else:
            pair.received.expect(Received)
            assert_arrived(pair)
        over.set()
        pair.receiver.close(1, "over")
        assert any(arrives(pair, grant) for grant in (2, 3))  # the connection may be found broken only now
        assert_arrived(pair)


@pytest.mark.parametrize("count", [0, 2, 1 << 63])
def test_a_header_that_comes_twice_or_went_missing_gets_no_other_headers_payload(count: int) -> None:
    with gloo_pairs() as (one, other):
        stream = ScriptedConnection(struct.pack("<QQ", 0, count))
        incoming = DistributedIncoming(stream, other, 1 << 20)
        header = Header(Kind.DATA, 1, NOWHERE, 8, 0, 0)
        move = one.send(memoryview(bytearray(b"the next")), 60.0)
        assert bytes(incoming.take(header)) == b"the next"
        move.wait()
        with pytest.raises(TransferError, match=f"Got payload {count} but expected payload 1"):
            incoming.take(header)


# --- what is left ---------------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_200_connections() -> None:
    process = psutil.Process()

    def held() -> tuple[int, int]:
        gc.collect()
        return process.num_fds(), process.num_threads()

    errors = []
    with connected(carriers=GLOO) as pair:
        send(pair, 0)
        pair.received.expect(Received)
    before = held()
    for life in range(200):
        with connected(carriers=GLOO) as pair:
            send(pair, life)
            if life % 2:
                pair.received.expect(Received)
            if life % 4 > 1:
                pair.receiver.stop()
        errors += pair.sent.of(SendFailed)  # an error that somebody keeps holds nothing open
    assert held() == before
    assert errors


def test_an_error_that_somebody_keeps_keeps_no_socket_and_no_thread() -> None:
    process = psutil.Process()
    with gloo_pairs():
        pass
    gc.collect()
    before, errors = (process.num_fds(), process.num_threads()), []
    with gloo_pairs() as (one, other):
        for end in (one, other):
            with pytest.raises(TransferError) as raised:
                end.receive(memoryview(bytearray(8)), 0.01).wait()
            errors.append(raised.value)
    del one, other, end, raised
    gc.collect()
    assert (process.num_fds(), process.num_threads()) == before
    assert len(errors) == 2

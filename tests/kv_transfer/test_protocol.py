"""The handshake: no secret, no connection; no match, no connection; and both sides know why."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import HandshakeRefused, TransferError
from core.layout import KVLayout, LayerShape, Shard, Span
from kv_transfer import protocol
from kv_transfer.carrier import Carrier, CarrierUnavailable
from kv_transfer.carriers.inline import INLINE, InlineCarrier, InlineEnd
from kv_transfer.protocol import MAGIC, MAX_HANDSHAKE_BYTES, PROTOCOL_VERSION, Handshake, Identity, Peer
from kv_transfer.transport import Connection
from kv_transfer.transports.fault import FaultTransport, FlipBit, Message
from kv_transfer.transports.inproc import InprocTransport
from tests.kv_transfer.rig import SECRET, SHAPES, ScriptedConnection, layout

IDENTITY = Identity("model-a", layout(4), 1)


def sharded(layers: Span, heads: Span) -> KVLayout:
    return KVLayout(model=layout(4).model, shard=Shard(layers, heads), block_size=4)


Outcome = Peer | TransferError


def outcome(step: Callable[[Connection], tuple[Peer, object]], connection: Connection) -> Outcome:
    try:
        return step(connection)[0]
    except TransferError as error:
        connection.close()
        return error


def shake(dialler: Handshake, listener: Handshake, transport: FaultTransport | None = None) -> tuple[Outcome, Outcome]:
    """Both sides' outcomes, dialler's first."""
    wires = transport or InprocTransport()
    listening = wires.listen()
    near = wires.connect(listening.endpoint)
    far = listening.accept()
    answers: list[Outcome] = []
    thread = threading.Thread(target=lambda: answers.append(outcome(listener.answer, far)))
    thread.start()
    mine = outcome(dialler.dial, near)
    thread.join(20)
    near.close()
    far.close()
    listening.close()
    return mine, answers[0]


def test_two_of_one_cluster_know_each_other_and_share_seeds() -> None:
    other = Identity("model-a", layout(16), 7)
    mine, theirs = shake(Handshake(IDENTITY, SECRET, INLINE), Handshake(other, SECRET, INLINE))
    assert isinstance(mine, Peer)
    assert isinstance(theirs, Peer)
    assert (mine.identity, theirs.identity) == (other, IDENTITY)
    assert (mine.send_seed, mine.recv_seed) == (theirs.recv_seed, theirs.send_seed)
    assert mine.send_seed != mine.recv_seed


def test_each_connection_has_its_own_seeds() -> None:
    seeds = set()
    for _ in range(5):
        peer, _ = shake(Handshake(IDENTITY, SECRET, INLINE), Handshake(IDENTITY, SECRET, INLINE))
        assert isinstance(peer, Peer)
        seeds |= {peer.send_seed, peer.recv_seed}
    assert len(seeds) == 10


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("fingerprint", Identity("model-b", layout(4), 1)),
        ("dtype", Identity("model-a", layout(4, dtype="float16"), 1)),
        ("layers", Identity("model-a", layout(4, shapes=SHAPES[:2]), 1)),
        ("kv_heads", Identity("model-a", layout(4, shapes=[*SHAPES[:2], LayerShape(4, 2, 1)]), 1)),
        ("key_dim", Identity("model-a", layout(4, shapes=[*SHAPES[:2], LayerShape(2, 4, 1)]), 1)),
        ("value_dim", Identity("model-a", layout(4, shapes=[*SHAPES[:2], LayerShape(2, 2, 2)]), 1)),
        ("sliding_window", Identity("model-a", layout(4, shapes=[*SHAPES[:2], LayerShape(2, 2, 1, 8)]), 1)),
        ("shard", Identity("model-a", sharded(Span(0, 2), Span(0, 2)), 1)),
        ("shard", Identity("model-a", sharded(Span(0, 3), Span(1, 2)), 1)),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_a_peer_that_differs_is_refused_by_name_on_both_sides(field: str, other: Identity, swap: bool) -> None:
    sides = [Handshake(IDENTITY, SECRET, INLINE), Handshake(other, SECRET, INLINE)]
    if swap:
        sides.reverse()
    for refused in shake(*sides):
        assert isinstance(refused, HandshakeRefused)
        assert refused.field == field


@pytest.mark.parametrize("swap", [False, True])
def test_another_secret_is_refused_on_both_sides_and_tells_nothing_of_the_model(swap: bool) -> None:
    sides = [Handshake(IDENTITY, SECRET, INLINE), Handshake(IDENTITY, SECRET + b"!", INLINE)]
    if swap:
        sides.reverse()
    for refused in shake(*sides):
        assert isinstance(refused, HandshakeRefused)
        assert refused.field == "secret"
        assert "model-a" not in str(refused)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dialled", [True, False])
def test_every_flipped_bit_of_every_message_is_refused_or_breaks_the_connection(index: int, dialled: bool) -> None:
    sizes: list[int] = []

    def run(bit: int | None) -> tuple[Outcome, Outcome]:
        def plan(message: Message) -> FlipBit | None:
            # Number 0 is the dialler's connection, 1 the listener's.
            if message.dialled != dialled or message.index != index:
                return None
            sizes.append(message.size_bytes)
            return None if bit is None else FlipBit(bit)

        return shake(
            Handshake(IDENTITY, SECRET, INLINE), Handshake(IDENTITY, SECRET, INLINE), FaultTransport(InprocTransport(), plan)
        )

    assert all(isinstance(side, Peer) for side in run(None))
    step = 5 if sizes[0] > 60 else 1
    for bit in range(0, sizes[0] * 8, step):
        # A length that grows makes an honest reader wait for more; the receiver's timer ends that.
        if bit // 8 in range(8, 12):
            continue
        assert not all(isinstance(side, Peer) for side in run(bit)), f"bit {bit} went unnoticed"


def prefixed(step: int, body: bytes, magic: bytes = MAGIC, version: int = PROTOCOL_VERSION, length: int | None = None) -> bytes:
    return struct.pack("<4sHBxI", magic, version, step, len(body) if length is None else length) + body


@pytest.mark.parametrize(
    ("field", "stream"),
    [
        ("magic", b"GET / HTTP/1.1\r\n\r\n"),
        ("version", prefixed(1, bytes(32), version=PROTOCOL_VERSION + 1)),
        ("protocol", prefixed(3, bytes(32))),
        ("protocol", prefixed(1, bytes(31))),
        ("protocol", prefixed(1, b"", length=MAX_HANDSHAKE_BYTES + 1)),
        ("protocol", prefixed(5, b"\xc1")),
    ],
)
def test_strangers_are_refused_by_name_and_told_so(field: str, stream: bytes) -> None:
    connection = ScriptedConnection(stream)
    with pytest.raises(HandshakeRefused) as refused:
        Handshake(IDENTITY, SECRET, INLINE).answer(connection)
    assert refused.value.field == field
    if connection.sent:
        told = ScriptedConnection(connection.sent[-1])
        with pytest.raises(HandshakeRefused) as heard:
            Handshake(IDENTITY, SECRET, INLINE).dial(told)
        assert heard.value.field == field


def test_a_peer_of_another_version_hears_so(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Handshake(IDENTITY, SECRET, INLINE)
    wires = InprocTransport()
    listening = wires.listen()
    near = wires.connect(listening.endpoint)
    near.send([prefixed(1, bytes(32), version=PROTOCOL_VERSION + 1)])
    with pytest.raises(HandshakeRefused, match="version"):
        old.answer(listening.accept())
    monkeypatch.setattr(protocol, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    with pytest.raises(HandshakeRefused) as refused:
        Handshake._expect(near, protocol._Step.CHALLENGE, 64, 64)
    assert refused.value.field == "version"
    near.close()
    listening.close()


def test_a_proof_cannot_be_reflected() -> None:
    """A stranger without the secret who answers a dialler with that dialler's own words gets nowhere."""
    nonce = bytes(range(32))
    echo = ScriptedConnection(prefixed(2, nonce + nonce))
    with pytest.raises(HandshakeRefused) as refused:
        Handshake(IDENTITY, SECRET, INLINE, lambda size: nonce).dial(echo)
    assert refused.value.field == "secret"


def test_a_recorded_conversation_does_not_open_a_second_connection() -> None:
    recorded: list[bytes] = []

    honest, listener = Handshake(IDENTITY, SECRET, INLINE, lambda size: b"d" * size), Handshake(IDENTITY, SECRET, INLINE)
    wires = InprocTransport()
    listening = wires.listen()
    near = wires.connect(listening.endpoint)
    far = listening.accept()

    class Tap:
        def send(self, parts: list[bytes], *, wait: bool = True) -> None:
            recorded.append(b"".join(parts))
            near.send(parts, wait=wait)

        def recv_into(self, view: memoryview) -> None:
            near.recv_into(view)

        def close(self) -> None:
            near.close()

    thread = threading.Thread(target=lambda: outcome(listener.answer, far))
    thread.start()
    honest.dial(Tap())
    thread.join(20)
    with pytest.raises(HandshakeRefused) as refused:
        listener.answer(ScriptedConnection(b"".join(recorded)))
    assert refused.value.field == "secret"
    near.close()
    far.close()
    listening.close()


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_and_never_crash(stream: bytes) -> None:
    for step in (Handshake(IDENTITY, SECRET, INLINE).answer, Handshake(IDENTITY, SECRET, INLINE).dial):
        with pytest.raises(TransferError):
            step(ScriptedConnection(stream))


@given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), lambda inner: st.lists(inner), max_leaves=20))
def test_an_identity_that_is_not_one_is_refused_though_its_proof_is_right(body: object) -> None:
    try:
        packed = msgspec.msgpack.encode(body)
    except OverflowError:
        return
    listener = Handshake(IDENTITY, SECRET, INLINE, lambda size: b"l" * size)
    proof = listener._proof(b"dial", b"d" * 32 + b"l" * 32, packed)
    with pytest.raises(HandshakeRefused) as refused:
        listener.answer(ScriptedConnection(prefixed(1, b"d" * 32) + prefixed(3, proof + packed)))
    assert refused.value.field == "protocol"


@pytest.mark.parametrize("secret", [b"", b"short"])
def test_a_side_without_a_real_secret_does_not_start(secret: bytes) -> None:
    with pytest.raises(ValueError, match="secret"):
        Handshake(IDENTITY, secret, INLINE)


# --- carriers ---------------------------------------------------------------------------------------------------------


class Named(InlineCarrier):
    """A carrier that may be impossible on either side, and keeps account of what was begun and not ended."""

    def __init__(self, name: str, offers: bool = True, accepts: bool = True) -> None:
        self.name, self._offers, self._accepts = name, offers, accepts
        self.ends: list[End] = []

    def offer(self, piece_bytes: int) -> End:
        return self._end(self._offers, "no device here")

    def accept(self, details: bytes, piece_bytes: int) -> End:
        assert details == b"details of " + self.name.encode()
        return self._end(self._accepts, "another host")

    def _end(self, possible: bool, why: str) -> End:
        if not possible:
            raise CarrierUnavailable(why)
        self.ends.append(End(self.name))
        return self.ends[-1]


class End(InlineEnd):
    def __init__(self, name: str) -> None:
        super().__init__(1024)
        self.details = b"details of " + name.encode()
        self.settled = self.withdrawn = False

    def settle(self, connection: Connection, details: bytes) -> object:
        assert details == self.details
        self.settled = True
        return super().settle(connection, details)

    def withdraw(self) -> None:
        self.withdrawn = not self.settled


def agree(dialling: list[Carrier], listening: list[Carrier]) -> tuple[Outcome, Outcome]:
    return shake(Handshake(IDENTITY, SECRET, dialling), Handshake(IDENTITY, SECRET, listening))


def test_the_first_carrier_that_both_can_use_is_taken_and_both_know_why() -> None:
    fast, here_only, slow = Named("fast"), Named("here-only", offers=False), Named("slow")
    fast_there = Named("fast", accepts=False)
    for side in agree([here_only, fast, slow], [Named("slow"), fast_there]):
        assert isinstance(side, Peer)
        assert side.carrier == "slow"
        assert "fast: another host" in side.declined
    assert [end.withdrawn for end in fast.ends] == [True]
    assert [end.settled for end in slow.ends] == [True]


def test_the_dialling_side_prefers() -> None:
    for side in agree([Named("a"), Named("b")], [Named("b"), Named("a")]):
        assert isinstance(side, Peer)
        assert (side.carrier, side.declined) == ("a", "")


@pytest.mark.parametrize(
    ("dialling", "listening", "why"),
    [
        (Named("fast", offers=False), Named("fast"), "no device here"),
        (Named("fast"), Named("fast", accepts=False), "another host"),
        (Named("fast"), Named("slow"), "does not allow"),
    ],
)
def test_a_forced_carrier_that_does_not_work_is_refused_by_name_on_both_sides(
    dialling: Carrier, listening: Carrier, why: str
) -> None:
    for side in agree([dialling], [listening]):
        assert isinstance(side, HandshakeRefused)
        assert side.field == "carrier"
        assert why in str(side)
        assert "fast" in str(side)


def test_a_listener_that_chooses_what_was_not_offered_is_refused() -> None:
    class Liar(Handshake):
        def _choose(self, connection, offered):
            return "other", InlineEnd(1), ""

    mine, _ = shake(Handshake(IDENTITY, SECRET, INLINE), Liar(IDENTITY, SECRET, INLINE))
    assert isinstance(mine, HandshakeRefused)
    assert mine.field == "protocol"


def test_what_was_offered_is_withdrawn_when_the_handshake_breaks() -> None:
    carrier, nonce = Named("fast"), b"d" * 32
    dialling = Handshake(IDENTITY, SECRET, [carrier], lambda size: nonce)
    proof = dialling._proof(b"listen", nonce + nonce)
    with pytest.raises(TransferError):
        dialling.dial(ScriptedConnection(prefixed(2, nonce + proof)))  # and then it hangs up
    assert [end.withdrawn for end in carrier.ends] == [True]


def test_without_a_carrier_there_is_no_handshake() -> None:
    with pytest.raises(ValueError, match="carriers"):
        Handshake(IDENTITY, SECRET, [])


@pytest.mark.parametrize(("fingerprint", "carriers"), [("x" * 70_000, 1), ("x", 32)])
def test_what_could_not_be_said_in_one_message_does_not_start(fingerprint: str, carriers: int) -> None:
    with pytest.raises(ValueError, match="expected it to fit"):
        Handshake(Identity(fingerprint, layout(), 1), SECRET, list(INLINE) * carriers)

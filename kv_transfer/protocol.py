"""The handshake: two processes prove that they share the cluster's secret, then compare what they are.

    dialling side                                   listening side
    HELLO     nonce                            ──▶
                                               ◀──  CHALLENGE  nonce, proof("listen")
    IDENTITY  proof("dial", identity), identity, carriers offered ──▶
                                               ◀──  WELCOME    proof("welcome", both identities), identity, carrier chosen

Proofs are HMAC-SHA256 over a label, both nonces and what they vouch for; the labels keep one side's proof from being played
back as the other's. Nothing is told about the model before the other side has proved itself. Either side may say REFUSE
instead of its next message, naming the field; both then raise `HandshakeRefused` with it.

The dialling side names the carriers (`kv_transfer.carrier`) that it can use, best first; the listening side takes the first that
it can use too, and says why not those before it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import msgspec

from core.errors import HandshakeRefused, ProtocolError, TransferError
from core.layout import KVLayout, LayerShape
from core.wire import unpack_bounded
from kv_transfer.carrier import Acceptance, Carrier, CarrierUnavailable, Offer, Outgoing
from kv_transfer.frames import largest_piece_bytes
from kv_transfer.transport import Connection

MAGIC = b"HSKV"
PROTOCOL_VERSION = 4
MIN_SECRET_BYTES = 16
MAX_HANDSHAKE_BYTES = 64 * 1024
MAX_DETAILS_BYTES = 1024
LAYOUT_FIELDS = ("dtype", "layers", *LayerShape.__struct_fields__, "shard")
FIELDS = ("magic", "version", "secret", "fingerprint", *LAYOUT_FIELDS, "incarnation", "carrier", "protocol")

_PREFIX = struct.Struct("<4sHBBI")  # magic, version, step, zero, length
_NONCE_BYTES = 32
_PROOF_BYTES = 32

RandomBytes = Callable[[int], bytes]
Message = TypeVar("Message", bound=msgspec.Struct)


class Identity(msgspec.Struct, frozen=True):
    """What a side says of itself. `fingerprint` names the weights; `incarnation` grows when the worker restarts."""

    fingerprint: str
    layout: KVLayout
    incarnation: int

    def mismatch(self, other: Identity) -> str | None:
        """The first field on which no transfer between the two could be right, or None."""
        return "fingerprint" if self.fingerprint != other.fingerprint else self.layout.mismatch(other.layout)


@dataclass(frozen=True)
class Peer:
    """The other side, proved and compatible. The seeds are this connection's, one per direction. `carrier` is the name of what
    carries payloads, `declined` says why not by what either side would have liked better."""

    identity: Identity
    send_seed: int
    recv_seed: int
    carrier: str
    declined: str = ""


class _Named(msgspec.Struct, frozen=True, array_like=True):
    """A carrier and its end's details."""

    name: str
    details: bytes


class _Introduction(msgspec.Struct, frozen=True):
    identity: Identity
    carriers: tuple[_Named, ...]


class _Welcome(msgspec.Struct, frozen=True):
    identity: Identity
    carrier: _Named
    declined: str


class _Step(IntEnum):
    HELLO = 1
    CHALLENGE = 2
    IDENTITY = 3
    WELCOME = 4
    REFUSE = 5


class _Refusal(msgspec.Struct, frozen=True):
    field: str
    message: str


class Handshake:
    """One side of the handshake.

    Args:
        secret: shared by the cluster, at least 16 bytes.
        carriers: what may carry payloads, best first.
        random_bytes: makes nonces.
    """

    def __init__(
        self, identity: Identity, secret: bytes, carriers: Sequence[Carrier], random_bytes: RandomBytes = secrets.token_bytes
    ) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"Got a secret of {len(secret)} bytes but expected at least {MIN_SECRET_BYTES}")
        if not carriers:
            raise ValueError("Got no carriers but expected at least one")
        size = len(msgspec.msgpack.encode(identity)) + len(carriers) * 2 * MAX_DETAILS_BYTES + _PROOF_BYTES
        if size > MAX_HANDSHAKE_BYTES:
            raise ValueError(f"Got an identity of {size} bytes but expected it to fit {MAX_HANDSHAKE_BYTES}")
        self._identity = identity
        self._secret = secret
        self._carriers = tuple(carriers)
        self._piece_bytes = largest_piece_bytes(identity.layout)
        self._random_bytes = random_bytes

    def dial(self, connection: Connection) -> tuple[Peer, Outgoing]:
        """Raises HandshakeRefused (the field says why) or TransferError (the connection or the carrier broke)."""
        mine = self._random_bytes(_NONCE_BYTES)
        _send(connection, _Step.HELLO, mine)
        answer = self._expect(connection, _Step.CHALLENGE, _NONCE_BYTES + _PROOF_BYTES, _NONCE_BYTES + _PROOF_BYTES)
        nonces = mine + answer[:_NONCE_BYTES]
        self._check(connection, answer[_NONCE_BYTES:], b"listen", nonces)
        offers, impossible = self._offers(connection)
        try:
            named = tuple(_Named(name, offer.details) for name, offer in offers.items())
            packed = msgspec.msgpack.encode(_Introduction(self._identity, named))
            _send(connection, _Step.IDENTITY, self._proof(b"dial", nonces, packed) + packed)
            answer = self._expect(connection, _Step.WELCOME, _PROOF_BYTES, MAX_HANDSHAKE_BYTES)
            theirs = answer[_PROOF_BYTES:]
            self._check(connection, answer[:_PROOF_BYTES], b"welcome", nonces, packed, theirs)
            welcome = _unpacked(connection, theirs, _Welcome)
            self._compare(connection, welcome.identity)
            chosen = offers.get(welcome.carrier.name)
            if chosen is None:
                raise _refuse(connection, "protocol", f"Got carrier {welcome.carrier.name!r}, which was not offered")
            outgoing = chosen.settle(connection, welcome.carrier.details)
        finally:
            for offer in offers.values():
                offer.withdraw()
        seeds = self._seed(b"to listener", nonces), self._seed(b"to dialler", nonces)
        declined = "; ".join(reason for reason in (*impossible, welcome.declined) if reason)
        return Peer(welcome.identity, *seeds, welcome.carrier.name, declined), outgoing

    def answer(self, connection: Connection) -> tuple[Peer, Acceptance]:
        """The listening side of `dial`; raises as it does."""
        theirs = self._expect(connection, _Step.HELLO, _NONCE_BYTES, _NONCE_BYTES)
        mine = self._random_bytes(_NONCE_BYTES)
        nonces = theirs + mine
        _send(connection, _Step.CHALLENGE, mine + self._proof(b"listen", nonces))
        body = self._expect(connection, _Step.IDENTITY, _PROOF_BYTES, MAX_HANDSHAKE_BYTES)
        packed = body[_PROOF_BYTES:]
        self._check(connection, body[:_PROOF_BYTES], b"dial", nonces, packed)
        introduction = _unpacked(connection, packed, _Introduction)
        self._compare(connection, introduction.identity)
        name, acceptance, declined = self._choose(connection, introduction.carriers)
        try:
            welcome = msgspec.msgpack.encode(_Welcome(self._identity, _Named(name, acceptance.details), declined))
            _send(connection, _Step.WELCOME, self._proof(b"welcome", nonces, packed, welcome) + welcome)
        except TransferError:
            acceptance.withdraw()
            raise
        seeds = self._seed(b"to dialler", nonces), self._seed(b"to listener", nonces)
        return Peer(introduction.identity, *seeds, name, declined), acceptance

    def _offers(self, connection: Connection) -> tuple[dict[str, Offer], list[str]]:
        """What this side can offer, best first, and why not the others."""
        offers: dict[str, Offer] = {}
        impossible = []
        for carrier in self._carriers:
            try:
                offers[carrier.name] = carrier.offer(self._piece_bytes)
            except CarrierUnavailable as error:
                impossible.append(f"{carrier.name}: {error}")
        if not offers:
            raise _refuse(connection, "carrier", f"none is possible for the sender ({'; '.join(impossible)})")
        return offers, impossible

    def _choose(self, connection: Connection, offered: Sequence[_Named]) -> tuple[str, Acceptance, str]:
        """The first carrier that both sides can use, this side's end of it, and why not those before it."""
        mine = {carrier.name: carrier for carrier in self._carriers}
        declined: list[str] = []
        for offer in offered:
            carrier = mine.get(offer.name)
            try:
                if carrier is None:
                    raise CarrierUnavailable("the receiver does not allow it")
                return offer.name, carrier.accept(offer.details, self._piece_bytes), "; ".join(declined)[:MAX_DETAILS_BYTES]
            except CarrierUnavailable as error:
                declined.append(f"{offer.name[:40]}: {error}")
        reasons = f"the receiver has {', '.join(mine)}; " + "; ".join(declined)
        raise _refuse(connection, "carrier", f"no carrier that both sides can use ({reasons})")

    def _proof(self, label: bytes, *parts: bytes) -> bytes:
        mac = hmac.new(self._secret, digestmod=hashlib.sha256)
        for part in (b"hetserve kv", PROTOCOL_VERSION.to_bytes(2, "little"), label, *parts):
            mac.update(len(part).to_bytes(4, "little"))
            mac.update(part)
        return mac.digest()

    def _seed(self, label: bytes, nonces: bytes) -> int:
        return int.from_bytes(self._proof(b"seed " + label, nonces)[:8], "little")

    def _check(self, connection: Connection, given: bytes, label: bytes, *parts: bytes) -> None:
        if not hmac.compare_digest(given, self._proof(label, *parts)):
            raise _refuse(connection, "secret", "the peer does not know this cluster's secret")

    def _compare(self, connection: Connection, theirs: Identity) -> None:
        field = self._identity.mismatch(theirs)
        if field is not None:
            mine, other = _described(self._identity, field), _described(theirs, field)
            raise _refuse(connection, field, f"{mine} here, {other} there")

    @staticmethod
    def _expect(connection: Connection, step: _Step, least: int, most: int) -> bytes:
        """The body of the peer's next message. Raises HandshakeRefused if it is not `step`."""
        prefix = bytearray(_PREFIX.size)
        connection.recv_into(memoryview(prefix))
        magic, version, found, zero, length = _PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise _refuse(connection, "magic", "the peer does not speak this protocol")
        if length > MAX_HANDSHAKE_BYTES:
            raise _refuse(connection, "protocol", f"Got {length} bytes but expected at most {MAX_HANDSHAKE_BYTES}")
        # Read the message whole before refusing it: hanging up on unread bytes could destroy the refusal on its way.
        body = bytearray(length)
        connection.recv_into(memoryview(body))
        if version != PROTOCOL_VERSION:
            raise _refuse(connection, "version", f"version {PROTOCOL_VERSION} here, {version} there")
        if found == _Step.REFUSE:
            raise _refusal(bytes(body))
        if found != step or zero or not least <= length <= most:
            raise _refuse(connection, "protocol", f"Got handshake message {found} of {length} bytes but expected {step.name}")
        return bytes(body)


def _send(connection: Connection, step: _Step, body: bytes) -> None:
    connection.send([_PREFIX.pack(MAGIC, PROTOCOL_VERSION, step, 0, len(body)) + body])


def _refuse(connection: Connection, field: str, message: str) -> HandshakeRefused:
    """Tell the peer and hang up; what to raise."""
    with suppress(TransferError):
        _send(connection, _Step.REFUSE, msgspec.msgpack.encode(_Refusal(field, message[:1000])))
    connection.close()
    return HandshakeRefused(f"{field}: {message}", field)


def _unpacked(connection: Connection, packed: bytes, kind: type[Message]) -> Message:
    try:
        return msgspec.convert(unpack_bounded(packed, MAX_HANDSHAKE_BYTES), kind, strict=True)
    except (ProtocolError, msgspec.ValidationError) as error:
        raise _refuse(connection, "protocol", f"Got a malformed {kind.__name__.strip('_').lower()}: {error}") from error


def _described(identity: Identity, field: str) -> str:
    """What a side is in this field, for the message of a refusal."""
    model, shard = identity.layout.model, identity.layout.shard
    plain = {
        "fingerprint": identity.fingerprint,
        "dtype": model.dtype,
        "layers": str(len(model.layers)),
        "shard": f"layers {shard.layers.start}-{shard.layers.stop}, heads {shard.heads.start}-{shard.heads.stop}",
    }
    return plain[field] if field in plain else str(sorted({str(getattr(shape, field)) for shape in model.layers}))


def _refusal(body: bytes) -> HandshakeRefused:
    try:
        refusal = msgspec.convert(unpack_bounded(body, 4096, max_container=8), _Refusal, strict=True)
    except (ProtocolError, msgspec.ValidationError):
        return HandshakeRefused("the peer refused and its reason is malformed", "protocol")
    field = refusal.field if refusal.field in FIELDS else "protocol"
    return HandshakeRefused(f"the peer refused: {field}: {refusal.message[:1000]}", field)

"""The wire after the handshake: fixed headers, raw payloads, nothing believed before its digest is checked.

    magic 2 | kind 1 | zero 1 | layers 2 + 2 | grant 8 | heads 2 + 2 | tokens 4 + 4 | length 4 | sequence 4 | payload digest 8
    | own digest 8

Little endian, 52 bytes; layers, heads and tokens are a first and a count. A payload is one layer's bytes behind the other's, each
as a `KVStore` has them. The header digest covers the 44 bytes before it, among them the payload's digest: so a header is known to
be right before its length is believed, and a payload cannot be moved under another header. Both are xxh3_64 seeded with a secret
value of this connection and direction, so that a frame spliced in from elsewhere is noise. This guards against faults and stale
peers, not against somebody who rewrites traffic at will: that takes encryption below (a tunnel).

`sequence` counts a session's frames from 0; in replies, a connection's. Tensor bytes travel raw; the bodies of all other
frames are bounded msgpack.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import msgspec
import xxhash

from core.errors import CorruptTransfer, LeaseExpired, ProtocolError, TransferAborted, TransferError
from core.layout import KVLayout, Region, Span
from core.wire import unpack_bounded
from kv_transfer.terms import Terms
from kv_transfer.transport import Buffer

MAGIC = 0x564B
PIECE_BYTES = 1 << 21
# What is small leaves together up to so much, as one frame where layers are alike, else as one message: the call that sends a
# piece, and the peer that it wakes, cost more than a small one does. Half a piece, which every room can hold.
JOINED_BYTES = PIECE_BYTES // 2
MAX_CONTROL_BYTES = 64 * 1024
MAX_REASON_CHARS = 1000
NOWHERE = Region(Span(0, 0), Span(0, 0), Span(0, 0))

_HEADER = struct.Struct("<HBBHHQHHIIIIQ")
_DIGEST = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _DIGEST.size

Body = TypeVar("Body", bound=msgspec.Struct)


class Kind(IntEnum):
    BEGIN = 1
    DATA = 2
    FINISH = 3
    ABORT = 4
    COMMIT = 5
    NOTE = 6


@dataclass(frozen=True, slots=True)
class Header:
    """`region` is `NOWHERE` but for DATA. `length` and `payload_digest` describe what follows."""

    kind: Kind
    grant: int
    region: Region
    length: int
    sequence: int
    payload_digest: int


class Begin(msgspec.Struct, frozen=True):
    """The sender's view of the grant: must equal the receiver's, or the grant is not this one. `windowed`: of each layer only
    what `core.layout.needed` says."""

    attempt: str
    region: Region
    windowed: bool


class Finish(msgspec.Struct, frozen=True):
    """`frames` came before this one; `digest` is over their header digests in order. `tail` belongs to the workers."""

    frames: int
    digest: int
    tail: bytes


class Commit(msgspec.Struct, frozen=True):
    """`digest` is over the session's header digests, FINISH's among them: what is committed is what was sent."""

    digest: int


class Abort(msgspec.Struct, frozen=True):
    """`code` is a `core.errors` code."""

    code: str
    reason: str


def begin_of(terms: Terms, layout: KVLayout) -> Begin:
    """What a rank of this layout says, and expects to be told, at the beginning of such a session."""
    return Begin(terms.attempt, layout.region(terms.tokens), terms.windowed)


class SessionDigest:
    """The digest over all frames of a session, in order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, header: bytes | memoryview) -> None:
        """Add a packed header: its digest covers it and its payload."""
        self._hash.update(bytes(header[_HEADER.size : HEADER_BYTES]))

    def value(self) -> int:
        return self._hash.intdigest()


def pack_frame(kind: Kind, grant: int, sequence: int, payload: Buffer, seed: int, region: Region = NOWHERE) -> bytes:
    """The header of a frame with this payload."""
    length = payload.nbytes if isinstance(payload, memoryview) else len(payload)
    return pack_header(kind, grant, sequence, length, payload_digest(payload, seed), seed, region)


def payload_digest(payload: Buffer, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(payload, seed)


def pack_header(
    kind: Kind,
    grant: int,
    sequence: int,
    length: int,
    digest: int,
    seed: int,
    region: Region = NOWHERE,
) -> bytes:
    """The header of a frame whose payload has this length and digest."""
    layers, heads, tokens = region.layers, region.heads, region.tokens
    where = layers.start, layers.size, grant, heads.start, heads.size, tokens.start, tokens.size
    packed = _HEADER.pack(MAGIC, kind, 0, *where, length, sequence, digest)
    return packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed, seed))


def parse_header(data: Buffer, seed: int) -> Header:
    """Raises CorruptTransfer on anything but a header that the peer made: the stream cannot be trusted further then."""
    view = memoryview(data)
    if view.nbytes != HEADER_BYTES:
        raise CorruptTransfer(f"Got a header of {view.nbytes} bytes but expected {HEADER_BYTES}")
    (digest,) = _DIGEST.unpack_from(view, _HEADER.size)
    if digest != xxhash.xxh3_64_intdigest(view[: _HEADER.size], seed):
        raise CorruptTransfer("a frame header's digest is wrong")
    magic, kind, zero, layer, layers, grant, head, heads, start, count, *rest = _HEADER.unpack_from(view)
    if magic != MAGIC or zero or kind not in _KINDS:
        raise CorruptTransfer(f"Got a frame of {magic = :#x}, {kind = }, {zero = } that no honest peer sends")
    region = Region(Span(layer, layer + layers), Span(head, head + heads), Span(start, start + count))
    return Header(Kind(kind), grant, region, *rest)


def check_payload(header: Header, payload: Buffer, seed: int) -> None:
    """Raises CorruptTransfer if the payload is not the one the header was made for."""
    if payload_digest(payload, seed) != header.payload_digest:
        raise CorruptTransfer(f"a payload's digest is wrong: {header.kind.name}, {header.region}")


def piece_tokens(layout: KVLayout, layer: int) -> int:
    """Most tokens of a layer in one DATA frame: about 2 MiB of them, at least one."""
    return max(1, PIECE_BYTES // max(1, layout.layer_bytes_per_token(layer)))


def largest_piece_bytes(layout: KVLayout) -> int:
    """Most bytes of a DATA frame's payload."""
    layers = range(layout.shard.layers.start, layout.shard.layers.stop)
    return max(piece_tokens(layout, layer) * layout.layer_bytes_per_token(layer) for layer in layers)


def pack_body(body: Begin | Finish | Commit | Abort) -> bytes:
    packed: bytes = msgspec.msgpack.encode(body)
    if len(packed) > MAX_CONTROL_BYTES:
        raise ValueError(f"Got a {type(body).__name__} of {len(packed)} bytes but expected at most {MAX_CONTROL_BYTES}")
    return packed


def unpack_body(payload: bytes | memoryview, body: type[Body]) -> Body:
    """Raises CorruptTransfer on anything that `pack_body` does not make."""
    try:
        return msgspec.convert(unpack_bounded(payload, MAX_CONTROL_BYTES, max_container=8), body, strict=True)
    except (ProtocolError, msgspec.ValidationError) as error:
        raise CorruptTransfer(f"Got a malformed {body.__name__}: {error}") from error


def abort_of(error: TransferError) -> Abort:
    return Abort(error.code, str(error)[:MAX_REASON_CHARS])


def error_of(abort: Abort) -> TransferError:
    """The peer's reason, as this side's error."""
    kind = _ABORT_ERRORS.get(abort.code, TransferAborted)
    return kind(f"the peer gave up: {abort.reason[:MAX_REASON_CHARS]}")


_KINDS = frozenset(Kind)
_ABORT_ERRORS: dict[str, type[TransferError]] = {kind.code: kind for kind in (CorruptTransfer, LeaseExpired, TransferAborted)}

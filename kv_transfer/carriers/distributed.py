"""Payloads through `torch.distributed`, point to point: each connection has a group of two ranks, over gloo.

The group comes about once the handshake has chosen it, and goes with its connection; its socket, its threads and whatever
hangs in it are its own, so that a stopped peer stops nobody else. Headers and control frames stay on the connection; behind each
header travels a count, so that a payload can never be taken for another header's.

Never taken by `auto`: gloo is slower than plain TCP, and trusts who talks to it (see `gloo_pair`): its socket takes anybody until
the pair has proved itself, and whoever breaks its protocol ends the process. For networks that only the cluster is on.

NCCL is not built (docs/adr/0013-payload-carriers.md says what it would take). KV on a GPU passes through pinned memory and
gloo, which has not run on one.
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import torch
import torch.distributed as dist

from core.errors import ProtocolError, TransferError
from core.wire import unpack_bounded
from kv_transfer.carrier import CarrierUnavailable, Tell
from kv_transfer.carriers.buffers import BUFFERS, Buffers
from kv_transfer.carriers.gloo_pair import GlooPair, Move, Rank
from kv_transfer.frames import Header
from kv_transfer.transport import Buffer, Connection

SETUP_TIMEOUT_S = 5.0
PAYLOAD_TIMEOUT_S = 30.0  # for one piece; a peer that hangs is the leases' business long before

_NONCE_BYTES = 32
_COUNT = struct.Struct("<Q")


class _Details(msgspec.Struct, frozen=True, array_like=True):
    """`torch` must be the peer's, because gloo promises no protocol across versions; both nonces make the pair's key."""

    torch: str
    nonce: bytes


class DistributedCarrier:
    """gloo listens on `host`."""

    name = "distributed"

    def __init__(self, host: str) -> None:
        self._host = host

    def offer(self, piece_bytes: int) -> DistributedEnd:
        return DistributedEnd(0, self._host, piece_bytes)

    def accept(self, details: bytes, piece_bytes: int) -> DistributedEnd:
        end = DistributedEnd(1, self._host, piece_bytes)
        end.hear(details)
        return end


class DistributedEnd:
    """Either side's end before there is a pair. It holds nothing that would have to be given back.

    Raises:
        CarrierUnavailable: this torch has no gloo.
    """

    def __init__(self, rank: Rank, host: str, piece_bytes: int) -> None:
        if not dist.is_gloo_available():
            raise CarrierUnavailable("this torch comes without gloo")
        self._rank = rank
        self._host = host
        self._piece_bytes = piece_bytes
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._peer_nonce = b""
        self.details = msgspec.msgpack.encode(_Details(_version(), self._nonce))

    def hear(self, details: bytes) -> None:
        """The other side's. Raises CarrierUnavailable if the two cannot make a pair."""
        try:
            theirs = msgspec.convert(unpack_bounded(details, 1024, max_container=2), _Details, strict=True)
        except (ProtocolError, msgspec.ValidationError) as error:
            raise CarrierUnavailable(f"Got malformed details: {error}") from error
        if theirs.torch != _version():
            raise CarrierUnavailable(f"torch {_version()} here, {theirs.torch[:40]} there")
        if len(theirs.nonce) != _NONCE_BYTES:
            raise CarrierUnavailable(f"Got a nonce of {len(theirs.nonce)} bytes but expected {_NONCE_BYTES}")
        self._peer_nonce = theirs.nonce

    def settle(self, connection: Connection, details: bytes) -> DistributedOutgoing:
        self.hear(details)
        return DistributedOutgoing(connection, self._pair(connection), self._piece_bytes)

    def open(self, connection: Connection, tell: Tell) -> DistributedIncoming:
        return DistributedIncoming(connection, self._pair(connection), self._piece_bytes)

    def withdraw(self) -> None:
        pass

    def _pair(self, connection: Connection) -> GlooPair:
        nonces = (self._nonce, self._peer_nonce) if self._rank == 0 else (self._peer_nonce, self._nonce)
        with _closing(connection, SETUP_TIMEOUT_S):
            return GlooPair(connection, b"".join(nonces), self._rank, self._host)


class DistributedOutgoing:
    """Payloads are handed to gloo and waited for only when their buffers are needed again: a header that the peer misses must not
    keep this side from going on, because the next one's count is what tells the peer."""

    moves_bytes = False

    def __init__(self, connection: Connection, pair: GlooPair, piece_bytes: int) -> None:
        self._connection = connection
        self._pair = pair
        self._piece_bytes = piece_bytes
        self._changed = threading.Condition()
        self._free: list[memoryview] = []
        self._made = 0
        self._leaving: deque[tuple[Move, memoryview]] = deque()
        self._closed = False
        self._shipped = 0

    def room(self, size: int) -> memoryview:
        move: Move | None = None
        with self._changed:
            while not self._closed and not self._free and not self._leaving and self._made == BUFFERS:
                self._changed.wait()
            if self._closed:
                raise TransferError("the connection is closed")
            if self._free:
                whole = self._free.pop()
            elif self._made < BUFFERS:
                whole = memoryview(bytearray(self._piece_bytes))
                self._made += 1
            else:
                move, whole = self._leaving.popleft()
        if move is not None:
            move.wait(PAYLOAD_TIMEOUT_S)
        return whole[:size]

    def ship(self, head: Sequence[Buffer], payload: memoryview, tail: Sequence[Buffer] = ()) -> None:
        try:
            self._connection.send([*head, _COUNT.pack(self._shipped), *tail])
            self._shipped += 1
            move = self._pair.send(payload)
        except TransferError:
            self.discard(payload)
            raise
        with self._changed:
            if not self._closed:
                self._leaving.append((move, memoryview(payload.obj)))
                self._changed.notify()

    def discard(self, payload: memoryview) -> None:
        with self._changed:
            self._free.append(memoryview(payload.obj))
            self._changed.notify()

    def heard(self, note: bytes) -> None:
        raise TransferError("this carrier's other end has nothing to tell")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pair.close()
        with self._changed:
            self._leaving.clear()  # gloo lives as long as they do


class DistributedIncoming:
    def __init__(self, connection: Connection, pair: GlooPair, piece_bytes: int) -> None:
        self._connection = connection
        self._pair = pair
        self._buffers = Buffers(piece_bytes)
        self._taken = 0

    def take(self, header: Header) -> memoryview:
        count = bytearray(_COUNT.size)
        self._connection.recv_into(memoryview(count))
        (found,) = _COUNT.unpack(count)
        if found != self._taken:
            raise TransferError(f"Got payload {found} but expected payload {self._taken}")
        self._taken += 1
        payload = self._buffers.take(header.length)
        try:
            self._pair.recv_into(payload, PAYLOAD_TIMEOUT_S)
        except TransferError:
            self._buffers.give(payload)
            raise
        return payload

    def release(self, payload: memoryview) -> None:
        self._buffers.give(payload)

    def close(self) -> None:
        self._buffers.close()
        self._pair.close()


@contextmanager
def _closing(connection: Connection, after_s: float) -> Iterator[None]:
    """A peer that stops while the pair is being made costs the connection, not its thread."""
    timer = threading.Timer(after_s, connection.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _version() -> str:
    return torch.__version__.partition("+")[0]

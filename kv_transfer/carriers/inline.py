"""Payloads on the stream itself, right behind their headers. Works wherever the stream does."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import TransferError
from kv_transfer.carrier import Tell
from kv_transfer.carriers.buffers import Buffers
from kv_transfer.frames import Header
from kv_transfer.transport import Buffer, Connection


class InlineCarrier:
    name = "inline"

    def offer(self, piece_bytes: int) -> InlineEnd:
        return InlineEnd(piece_bytes)

    def accept(self, details: bytes, piece_bytes: int) -> InlineEnd:
        return InlineEnd(piece_bytes)


INLINE = (InlineCarrier(),)


class InlineEnd:
    """Either side's end before the connection is set up: there is nothing to agree on."""

    details = b""

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes

    def settle(self, connection: Connection, details: bytes) -> InlineOutgoing:
        return InlineOutgoing(connection, self._piece_bytes)

    def open(self, connection: Connection, tell: Tell) -> InlineIncoming:
        return InlineIncoming(connection, self._piece_bytes)

    def withdraw(self) -> None:
        pass


class InlineOutgoing:
    moves_bytes = True

    def __init__(self, connection: Connection, piece_bytes: int) -> None:
        self._connection = connection
        self._buffers = Buffers(piece_bytes)

    def room(self, size: int) -> memoryview:
        return self._buffers.take(size)

    def ship(self, head: Sequence[Buffer], payload: memoryview, tail: Sequence[Buffer] = ()) -> None:
        try:
            self._connection.send([*head, payload, *tail])
        finally:
            self._buffers.give(payload)

    def discard(self, payload: memoryview) -> None:
        self._buffers.give(payload)

    def heard(self, note: bytes) -> None:
        raise TransferError("this carrier's other end has nothing to tell")

    def close(self) -> None:
        self._buffers.close()


class InlineIncoming:
    def __init__(self, connection: Connection, piece_bytes: int) -> None:
        self._connection = connection
        self._buffers = Buffers(piece_bytes)

    def take(self, header: Header) -> memoryview:
        payload = self._buffers.take(header.length)
        try:
            self._connection.recv_into(payload)
        except TransferError:
            self._buffers.give(payload)
            raise
        return payload

    def release(self, payload: memoryview) -> None:
        self._buffers.give(payload)

    def close(self) -> None:
        self._buffers.close()

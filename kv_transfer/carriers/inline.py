"""Payloads on the stream itself, right behind their headers. Works wherever the stream does."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from core.errors import TransferError
from kv_transfer.carrier import Tell
from kv_transfer.frames import Header
from kv_transfer.transport import Buffer, Connection

BUFFERS = 2  # one is filled while the other is emptied


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


class _Buffers:
    """`BUFFERS` buffers of one size, made when first needed and kept, so that each is touched anew only once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self._free: list[memoryview] = []
        self._made = 0
        self._closed = False

    def take(self, size: int) -> memoryview:
        """Waits until one is free. Raises TransferError once closed."""
        with self._changed:
            while not self._closed and not self._free and self._made == BUFFERS:
                self._changed.wait()
            if self._closed:
                raise TransferError("the connection is closed")
            if not self._free:
                self._free.append(memoryview(bytearray(self._size)))
                self._made += 1
            return self._free.pop()[:size]

    def give(self, view: memoryview) -> None:
        with self._changed:
            self._free.append(memoryview(view.obj))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class InlineOutgoing:
    def __init__(self, connection: Connection, piece_bytes: int) -> None:
        self._connection = connection
        self._buffers = _Buffers(piece_bytes)

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
        self._buffers = _Buffers(piece_bytes)

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

"""A carrier within one process: payloads stay in buffers that both ends see, as they do in shared memory.

It proves that nothing but the inline carrier counts on payloads travelling on the stream.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from core.errors import TransferError
from kv_transfer.carrier import CarrierUnavailable, Tell
from kv_transfer.frames import Header
from kv_transfer.transport import Buffer, Connection

SLOTS = 2


class Channel:
    """Buffers in turn; the sending end waits for the receiving end to tell that one is free."""

    def __init__(self, piece_bytes: int) -> None:
        self.slots = [memoryview(bytearray(piece_bytes)) for _ in range(SLOTS)]
        self.changed = threading.Condition()
        self.free = list(range(SLOTS))
        self.closed = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class MemoryCarrier:
    name = "memory"

    def __init__(self) -> None:
        self._channels: dict[bytes, Channel] = {}

    def offer(self, piece_bytes: int) -> MemoryOffer:
        channel = Channel(piece_bytes)
        name = str(id(channel)).encode()
        self._channels[name] = channel
        return MemoryOffer(self, name, channel)

    def accept(self, details: bytes, piece_bytes: int) -> MemoryAcceptance:
        channel = self._channels.get(details)
        if channel is None:
            raise CarrierUnavailable("another process")
        return MemoryAcceptance(channel)


class MemoryOffer:
    def __init__(self, carrier: MemoryCarrier, name: bytes, channel: Channel) -> None:
        self._carrier, self.details, self._channel = carrier, name, channel

    def settle(self, connection: Connection, details: bytes) -> MemoryOutgoing:
        return MemoryOutgoing(connection, self._channel)

    def withdraw(self) -> None:
        self._carrier._channels.pop(self.details, None)


class MemoryAcceptance:
    details = b""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def open(self, connection: Connection, tell: Tell) -> MemoryIncoming:
        return MemoryIncoming(connection, self._channel, tell)

    def withdraw(self) -> None:
        pass


class MemoryOutgoing:
    moves_bytes = False

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self._connection, self._channel = connection, channel
        self._held: list[int] = []

    def room(self, size: int) -> memoryview:
        with self._channel.changed:
            self._channel.changed.wait_for(lambda: self._channel.closed or self._channel.free)
            if self._channel.closed:
                raise TransferError("the memory is gone")
            self._held.append(self._channel.free.pop(0))
            return self._channel.slots[self._held[-1]][:size]

    def ship(self, head: Sequence[Buffer], payload: memoryview, tail: Sequence[Buffer] = ()) -> None:
        slot = self._held.pop(0)
        self._connection.send([*head, bytes([slot]), *tail])

    def discard(self, payload: memoryview) -> None:
        self.heard(bytes([self._held.pop(0)]))

    def heard(self, note: bytes) -> None:
        with self._channel.changed:
            if len(note) != 1 or note[0] >= SLOTS or note[0] in self._channel.free:
                raise TransferError("Got a note about no buffer that was sent")
            self._channel.free.append(note[0])
            self._channel.changed.notify_all()

    def close(self) -> None:
        self._channel.close()


class MemoryIncoming:
    def __init__(self, connection: Connection, channel: Channel, tell: Tell) -> None:
        self._connection, self._channel, self._tell = connection, channel, tell
        self._taken: list[int] = []

    def take(self, header: Header) -> memoryview:
        slot = bytearray(1)
        self._connection.recv_into(memoryview(slot))
        if slot[0] >= SLOTS:
            raise TransferError("Got a buffer that does not exist")
        self._taken.append(slot[0])
        return self._channel.slots[slot[0]][: header.length]

    def release(self, payload: memoryview) -> None:
        self._tell(bytes([self._taken.pop(0)]))

    def close(self) -> None:
        self._channel.close()

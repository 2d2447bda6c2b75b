"""Payloads through memory that both processes map. For pairs on one host.

The sender gathers a piece straight into a slot and digests it there; behind the header the stream brings which slot that is; the
receiver digests and scatters straight out of it, and from time to time tells how many it is done with. Nobody spins: the
stream wakes the receiver, its notes wake the sender. A slot is one end's at a time (`kv_transfer.carriers.ring`), so that what a
digest was taken over is what is stored.

Memory: `SLOTS` largest pieces for each connection, about 6 MiB, in place from the handshake on.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress

import xxhash

from core.errors import CorruptTransfer, TransferError
from kv_transfer.carrier import Tell
from kv_transfer.carriers.ring import ConsumerSlots, ProducerSlots
from kv_transfer.carriers.sealed_memory import OwnMemory, PeerMemory
from kv_transfer.frames import Header
from kv_transfer.transport import Buffer, Connection

SLOTS = 6
NOTE_EVERY = 4

_STAMP = struct.Struct("<QI")  # number, slot
_CHECK = struct.Struct("<Q")  # digest of the two, keyed by what only the memory tells
_NOTE = struct.Struct("<Q")
STAMP_BYTES = _STAMP.size + _CHECK.size


class SharedMemoryCarrier:
    name = "shm"

    def offer(self, piece_bytes: int) -> SharedMemoryOffer:
        return SharedMemoryOffer(OwnMemory(SLOTS * _slot_bytes(piece_bytes)))

    def accept(self, details: bytes, piece_bytes: int) -> SharedMemoryAcceptance:
        return SharedMemoryAcceptance(PeerMemory(details, SLOTS * _slot_bytes(piece_bytes)))


SHARED_MEMORY = SharedMemoryCarrier()


class SharedMemoryOffer:
    """Owns the memory until it is settled or withdrawn."""

    def __init__(self, memory: OwnMemory) -> None:
        self.details = memory.address
        self._memory: OwnMemory | None = memory

    def settle(self, connection: Connection, details: bytes) -> SharedMemoryOutgoing:
        memory = self._memory
        if memory is None or not memory.proved_by(details):
            raise TransferError("the receiver has not found this side's memory but says that it has")
        memory.touch()
        self.withdraw()
        return SharedMemoryOutgoing(connection, _slots(memory.view), memory.key)

    def withdraw(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close_file()


class SharedMemoryAcceptance:
    """Owns the memory until it is opened or withdrawn: an error that somebody keeps may keep this too."""

    def __init__(self, memory: PeerMemory) -> None:
        self.details = memory.answer
        self._memory: PeerMemory | None = memory

    def open(self, connection: Connection, tell: Tell) -> SharedMemoryIncoming:
        memory, self._memory = self._memory, None
        if memory is None:
            raise TransferError("the memory is in use or given back")
        return SharedMemoryIncoming(connection, _slots(memory.view), memory.key, tell)

    def withdraw(self) -> None:
        self._memory = None


class SharedMemoryOutgoing:
    moves_bytes = False

    def __init__(self, connection: Connection, slots: Sequence[memoryview], key: int) -> None:
        self._connection = connection
        self._slots = slots
        self._key = key
        self._changed = threading.Condition()
        self._accounts = ProducerSlots(len(slots))
        self._held: list[tuple[memoryview, int]] = []
        self._closed = False

    def room(self, size: int) -> memoryview:
        with self._changed:
            while not self._closed:
                slot = self._accounts.claim()
                if slot is not None:
                    room = self._slots[slot][:size]
                    self._held.append((room, slot))
                    return room
                self._changed.wait()
        raise TransferError("the connection is closed")

    def ship(self, head: Sequence[Buffer], payload: memoryview, tail: Sequence[Buffer] = ()) -> None:
        with self._changed:
            slot = self._slot_of(payload)
            number = self._accounts.ship(slot)
        self._connection.send([*head, pack_stamp(number, slot, self._key), *tail])

    def discard(self, payload: memoryview) -> None:
        with self._changed:
            self._accounts.discard(self._slot_of(payload))
            self._changed.notify()

    def heard(self, note: bytes) -> None:
        if len(note) != _NOTE.size:
            raise CorruptTransfer(f"Got a note of {len(note)} bytes but expected {_NOTE.size}")
        with self._changed:
            self._accounts.freed(*_NOTE.unpack(note))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._slots = ()
            self._changed.notify_all()

    def _slot_of(self, payload: memoryview) -> int:
        """With the lock held: which slot a room is; it is its holder's no more."""
        at = next(at for at, (room, _) in enumerate(self._held) if room is payload)
        _, slot = self._held.pop(at)
        _let_go(payload)
        return slot


class SharedMemoryIncoming:
    def __init__(self, connection: Connection, slots: Sequence[memoryview], key: int, tell: Tell) -> None:
        self._connection = connection
        self._slots = slots
        self._key = key
        self._tell = tell
        self._lock = threading.Lock()
        self._accounts = ConsumerSlots(len(slots), NOTE_EVERY)
        self._stamp = memoryview(bytearray(STAMP_BYTES))

    def take(self, header: Header) -> memoryview:
        self._connection.recv_into(self._stamp)
        number, slot = parse_stamp(self._stamp, self._key)
        with self._lock:
            if not self._slots:
                raise TransferError("the connection is closed")
            if header.length > self._slots[0].nbytes:
                raise CorruptTransfer(f"Got {header.length} bytes but expected at most the {self._slots[0].nbytes} of a slot")
            self._accounts.take(number, slot)
            return self._slots[slot][: header.length]

    def release(self, payload: memoryview) -> None:
        _let_go(payload)
        with self._lock:
            done = self._accounts.release()
            if done is not None:
                self._tell(_NOTE.pack(done))

    def close(self) -> None:
        with self._lock:
            self._slots = ()


def _let_go(payload: memoryview) -> None:
    """The slot is no more its holder's, who then cannot touch it by mistake; nor does an error that somebody keeps keep it."""
    with suppress(BufferError):  # a store that still looks at it is wrong, but its view is not ours to take
        payload.release()


def pack_stamp(number: int, slot: int, key: int) -> bytes:
    """What the stream brings behind a header."""
    stamp = _STAMP.pack(number, slot)
    return stamp + _CHECK.pack(xxhash.xxh3_64_intdigest(stamp, key))


def parse_stamp(data: memoryview, key: int) -> tuple[int, int]:
    """A payload's number and its slot. Raises CorruptTransfer on what the other end of this memory did not make."""
    (check,) = _CHECK.unpack_from(data, _STAMP.size)
    if check != xxhash.xxh3_64_intdigest(data[: _STAMP.size], key):
        raise CorruptTransfer("the digest of a payload's place is wrong")
    number, slot = _STAMP.unpack_from(data)
    return number, slot


def _slot_bytes(piece_bytes: int) -> int:
    """Slots start on pages."""
    return -(-piece_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _slots(memory: memoryview) -> tuple[memoryview, ...]:
    size = memory.nbytes // SLOTS
    return tuple(memory[at : at + size] for at in range(0, SLOTS * size, size))

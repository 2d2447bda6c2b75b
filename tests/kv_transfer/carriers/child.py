"""One side of a transfer in a process of its own, for tests that kill it: says where it is and stays there.

    python -m tests.kv_transfer.carriers.child send ENDPOINT PHASE
    python -m tests.kv_transfer.carriers.child receive PHASE

Phases, in order: `handshake` (the memory is there, this side has not answered or not settled), `under way` (a piece is in the
works: the sender gathers its fifth, the receiver stores its first), `done` (all is committed, the connection is idle).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from core.clock import MonotonicClock
from kv_transfer.byte_store import ByteStore
from kv_transfer.carriers.shared_memory import (
    SharedMemoryAcceptance,
    SharedMemoryCarrier,
    SharedMemoryOffer,
    SharedMemoryOutgoing,
)
from kv_transfer.events import Delivered, Received
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transport import Connection
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.carriers.pieces import BLOCKS, LEASE_S, TOKENS, large_layout
from tests.kv_transfer.rig import SECRET, Inbox, filled


def stay(phase: str) -> None:
    print(phase, flush=True)
    threading.Event().wait()


class Carrier(SharedMemoryCarrier):
    def __init__(self, phase: str) -> None:
        self._phase = phase

    def offer(self, piece_bytes: int) -> SharedMemoryOffer:
        phase = self._phase

        class Offer(SharedMemoryOffer):
            def settle(self, connection: Connection, details: bytes) -> SharedMemoryOutgoing:
                if phase == "handshake":
                    stay(phase)
                return super().settle(connection, details)

        return Offer(super().offer(piece_bytes)._memory)

    def accept(self, details: bytes, piece_bytes: int) -> SharedMemoryAcceptance:
        acceptance = super().accept(details, piece_bytes)
        if self._phase == "handshake":
            stay(self._phase)
        return acceptance


class Store(ByteStore):
    def __init__(self, phase: str) -> None:
        super().__init__(large_layout(), len(BLOCKS))
        self._phase, self._reads = phase, 0

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        self._reads += 1
        if self._phase == "under way" and self._reads == 5:
            stay(self._phase)
        super().read(layer, blocks, start, count, out)

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        if self._phase == "under way":
            stay(self._phase)
        super().write(layer, blocks, start, count, data)


def send(endpoint: str, phase: str) -> None:
    inbox, store = Inbox(), Store(phase)
    for pages, full in zip(store.pages, filled(large_layout(), len(BLOCKS)).pages, strict=True):
        for page, content in zip(pages, full, strict=True):
            page[:] = content
    with KVSender(store, TcpTransport(), SECRET, "model", 3, MonotonicClock(), inbox, [Carrier(phase)]) as sender:
        session = sender.begin(Terms(9, "killed", 0, TOKENS, LEASE_S), [endpoint], [BLOCKS])
        session.push(0, 0, TOKENS)
        session.finish(b"")
        inbox.expect(Delivered, timeout_s=60)
        stay("done")


def receive(phase: str) -> None:
    inbox = Inbox()
    with KVReceiver(Store(phase), TcpTransport(), SECRET, "model", 1, MonotonicClock(), inbox, [Carrier(phase)]) as receiver:
        receiver.open(Terms(9, "killed", 0, TOKENS, LEASE_S), [BLOCKS])
        print(receiver.endpoint, flush=True)
        inbox.expect(Received, timeout_s=60)
        stay("done")


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:])

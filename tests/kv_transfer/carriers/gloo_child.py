"""One side of a transfer over gloo in a process of its own, for tests that kill or stop it: says where it is and stays there.

    python -m tests.kv_transfer.carriers.gloo_child send ENDPOINT PHASE
    python -m tests.kv_transfer.carriers.gloo_child receive PHASE

Phases, in order: `pair` (chosen, but the pair is not made), `payload` (a header is over, its payload is not), `store` (between
two payloads: the sender gathers its fifth piece, the receiver stores its first), `done` (committed; the connection is idle).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from core.clock import MonotonicClock
from core.layout import LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.carriers import distributed
from kv_transfer.carriers.distributed import DistributedCarrier
from kv_transfer.carriers.gloo_pair import GlooPair, Move
from kv_transfer.carriers.gloo_rendezvous import Rank
from kv_transfer.events import Delivered, Received
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.terms import Terms
from kv_transfer.transport import Connection
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rig import SECRET, Inbox, filled, layout

HOST = "127.0.0.1"
BLOCKS = range(12)
TOKENS = 12 * 256  # 6 pieces of 2 MiB
LAYOUT = layout(256, shapes=[LayerShape(8, 128, 128)])


def stay(phase: str) -> None:
    print(phase, flush=True)
    threading.Event().wait()


class Pair(GlooPair):
    phase = ""
    made = False

    def __init__(self, connection: Connection, key: bytes, rank: Rank, host: str) -> None:
        if self.phase == "pair":
            stay(self.phase)
        super().__init__(connection, key, rank, host)
        self.made = True

    def send(self, data: memoryview, timeout_s: float) -> Move:
        if self.made and self.phase == "payload":
            stay(self.phase)
        return super().send(data, timeout_s)

    def receive(self, out: memoryview, timeout_s: float) -> Move:
        if self.made and self.phase == "payload":
            stay(self.phase)
        return super().receive(out, timeout_s)


class Store(ByteStore):
    def __init__(self, phase: str) -> None:
        super().__init__(LAYOUT, len(BLOCKS))
        self._phase, self._reads = phase, 0

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        self._reads += 1
        if self._phase == "store" and self._reads == 5:
            stay(self._phase)
        super().read(layer, blocks, start, count, out)

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        if self._phase == "store":
            stay(self._phase)
        super().write(layer, blocks, start, count, data)


def send(endpoint: str, phase: str) -> None:
    inbox, store = Inbox(), Store(phase)
    for pages, full in zip(store.pages, filled(LAYOUT, len(BLOCKS)).pages, strict=True):
        for page, content in zip(pages, full, strict=True):
            page[:] = content
    carriers = [DistributedCarrier(HOST)]
    with KVSender(store, TcpTransport(), SECRET, "model", 3, MonotonicClock(), inbox, carriers) as sender:
        session = sender.begin(Terms(9, "child's", 0, TOKENS, 3600.0), [endpoint], [BLOCKS])
        session.push(0, 0, TOKENS)
        session.finish(b"")
        inbox.expect(Delivered, timeout_s=60)
        stay("done")


def receive(phase: str) -> None:
    inbox, carriers = Inbox(), [DistributedCarrier(HOST)]
    with KVReceiver(Store(phase), TcpTransport(), SECRET, "model", 1, MonotonicClock(), inbox, carriers) as receiver:
        receiver.open(Terms(9, "child's", 0, TOKENS, 3600.0), [BLOCKS])
        print(receiver.endpoint, flush=True)
        inbox.expect(Received, timeout_s=60)
        stay("done")


if __name__ == "__main__":
    Pair.phase = sys.argv[-1]
    distributed.GlooPair = Pair
    {"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:])

"""What the tests of KV transfer share: small layouts, filled stores, an inbox for events, a connected pair."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from core.clock import Clock, MonotonicClock
from core.errors import TransferError
from core.groups import Tables, layer_groups
from core.layout import KVLayout, LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.carrier import Carrier
from kv_transfer.carriers.inline import INLINE
from kv_transfer.frames import payload_digest
from kv_transfer.outbound import Outbound
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.store import read_region
from kv_transfer.terms import Terms
from kv_transfer.transport import Buffer, Transport
from kv_transfer.transports.inproc import InprocTransport

SECRET = b"a secret of the whole cluster"
SHAPES = (LayerShape(2, 3, 2), LayerShape(1, 4, 4), LayerShape(2, 2, 1))
POISON = 0xA5

Event = TypeVar("Event")


def layout(block_size: int = 4, dtype: str = "bfloat16", shapes: Sequence[LayerShape] = SHAPES) -> KVLayout:
    return KVLayout.whole(layers=tuple(shapes), dtype=dtype, block_size=block_size)


def filled(kind: KVLayout, num_blocks: int = 32, seed: int = 1) -> ByteStore:
    store = ByteStore(kind, num_blocks)
    random = np.random.default_rng(seed)
    for page in (page for pair in store.pages for page in pair):
        page[:] = random.integers(0, 256, page.shape, dtype=np.uint8)
    return store


def poisoned(kind: KVLayout, num_blocks: int = 32) -> ByteStore:
    store = ByteStore(kind, num_blocks)
    for page in (page for pair in store.pages for page in pair):
        page[:] = POISON
    return store


def token_bytes(store: ByteStore, blocks: Sequence[int], token: int) -> bytes:
    """One token's KV over all layers, looked up slot by slot."""
    block, offset = blocks[token // store.layout.block_size], token % store.layout.block_size
    return b"".join(page[block, offset].tobytes() for pair in store.pages for page in pair)


def sequence_bytes(store: ByteStore, blocks: Sequence[int], first: int, stop: int) -> bytes:
    return b"".join(token_bytes(store, blocks, token) for token in range(first, stop))


def untouched_outside(store: ByteStore, blocks: Sequence[int], first: int, stop: int) -> bool:
    """Whether every slot of a poisoned store but those of tokens `[first, stop)` still holds poison."""
    size = store.layout.block_size
    granted = {(blocks[token // size], token % size) for token in range(first, stop)}
    mask = np.ones((store.pages[0][0].shape[0], size), dtype=bool)
    for block, offset in granted:
        mask[block, offset] = False
    return all(bool((page[mask] == POISON).all()) for pair in store.pages for page in pair)


class Inbox:
    """Events as they come, from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.events: list[object] = []

    def __call__(self, event: object) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def expect(self, kind: type[Event], count: int = 1, timeout_s: float = 20.0) -> list[Event]:
        """Wait until there are `count` events of a kind; fails if they do not come."""

        def found() -> list[Event]:
            return [event for event in self.events if isinstance(event, kind)]

        with self._changed:
            arrived = self._changed.wait_for(lambda: len(found()) >= count, timeout_s)
            assert arrived, f"expected {count} {kind.__name__}, got {self.events}"
            return found()

    def of(self, kind: type[Event]) -> list[Event]:
        with self._changed:
            return [event for event in self.events if isinstance(event, kind)]


@dataclass
class Pair:
    source: ByteStore
    target: ByteStore
    sender: KVSender
    receiver: KVReceiver
    sent: Inbox
    received: Inbox

    def sweep(self) -> None:
        self.sender.sweep()
        self.receiver.sweep()


@contextmanager
def connected(
    source: ByteStore | None = None,
    target: ByteStore | None = None,
    dialling: Transport | None = None,
    listening: Transport | None = None,
    clock: Clock | None = None,
    carriers: Sequence[Carrier] = INLINE,
    listening_carriers: Sequence[Carrier] | None = None,
) -> Iterator[Pair]:
    """A receiver and a sender over one transport; both are stopped on the way out."""
    shared = InprocTransport()
    listening = listening or dialling or shared
    source = source or filled(layout())
    target = target or poisoned(layout())
    sent, received, clock = Inbox(), Inbox(), clock or MonotonicClock()
    with (
        KVReceiver(target, listening, SECRET, "model", 1, clock, received, listening_carriers or carriers) as receiver,
        KVSender(source, dialling or shared, SECRET, "model", 2, clock, sent, carriers) as sender,
    ):
        yield Pair(source, target, sender, receiver, sent, received)


def session_frames(
    store: ByteStore,
    seed: int,
    terms: Terms,
    tables: Tables,
    pushes: Sequence[tuple[int, int, int]],
    tail: bytes = b"tail",
) -> list[bytes]:
    """The frames of one session as an honest sender makes them, one per push."""
    outbound = Outbound(store.layout, layer_groups(store.layout), terms, tables)
    frames: list[bytes] = []

    def drain() -> None:
        frames.extend(filter(None, [outbound.take_begin(seed)]))
        while region := outbound.take_region():
            payload = bytearray(store.layout.region_bytes(region))
            read_region(store, outbound.tables, region, memoryview(payload))
            frames.append(outbound.stamp_region(region, len(payload), payload_digest(payload, seed), seed) + payload)
        frames.extend(filter(None, [outbound.take_finish(seed)]))

    for layer, start, count in pushes:
        outbound.push(layer, start, count, None)
        drain()
    outbound.finish(tail)
    drain()
    return frames


class ScriptedConnection:
    """Receives a fixed stream, then ends; keeps what is sent."""

    def __init__(self, stream: bytes) -> None:
        self._stream = memoryview(stream)
        self._position = 0
        self.sent: list[bytes] = []
        self.closed = False

    def send(self, parts: Sequence[Buffer], *, wait: bool = True) -> None:
        self.sent.append(b"".join(parts))

    def recv_into(self, view: memoryview) -> None:
        if self.closed or self._position + len(view) > len(self._stream):
            raise TransferError("the connection ended")
        view[:] = self._stream[self._position : self._position + len(view)]
        self._position += len(view)

    def close(self) -> None:
        self.closed = True

"""The ways that KV may go: each must keep every promise of `kv_transfer.sessions`. A new carrier is one more entry in `WAYS`.

The suite runs every test over every way (`over_all_ways`). A test asks its way for a connected pair, with faults of the stream as
a plan says, and with faults of the payload wherever that travels. Which answers a carrier's own end gives is its business: a
test that wants to hurt the commit arms its plan once all pieces have left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import get_args

import pytest

from core.clock import Clock, MonotonicClock
from core.config import TransferConfig
from kv_transfer.byte_store import ByteStore
from kv_transfer.carrier import Carrier
from kv_transfer.carriers import carriers_for
from kv_transfer.carriers.inline import INLINE
from kv_transfer.events import OnReceiverEvent, OnSenderEvent
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.sessions import SendSession
from kv_transfer.terms import Terms
from kv_transfer.transport import Transport
from kv_transfer.transports.fault import Fault, FaultPlan, FaultTransport, Message
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.conformance.damage import Damage, DamagedCarrier
from tests.kv_transfer.memory_carrier import MemoryCarrier
from tests.kv_transfer.rig import SECRET, Pair, connected, sequence_bytes, untouched_outside

LAYERS = 3
HANDSHAKE = 2  # messages of either side
SOURCE_BLOCKS, TARGET_BLOCKS = [6, 1, 9], [30, 4, 2]


@dataclass(frozen=True)
class Way:
    """`streams` makes the transport that both sides share, `carriers` what both sides allow, anew for each test. Each side's end
    of the carrier sends `opening` messages between the handshake and the first frame; plans neither see nor count them. A `slow`
    way takes a second or so for each connection: of a matrix of faults it sees one row."""

    name: str
    streams: Callable[[], Transport] = InprocTransport
    carriers: Callable[[], Sequence[Carrier]] = lambda: INLINE
    slow: bool = False
    opening: int = 0

    @property
    def in_stream(self) -> bool:
        return self.carriers() == INLINE

    def wires(self, plan: FaultPlan | None = None, sleep: Callable[[float], None] = time.sleep) -> Wires:
        streams = self.streams()
        return Wires(streams if plan is None else FaultTransport(streams, self._of_frames(plan), sleep), self.carriers())

    def _of_frames(self, plan: FaultPlan) -> FaultPlan:
        def of_frames(message: Message) -> Fault | None:
            if message.index < HANDSHAKE:
                return plan(message)
            index = message.index - self.opening
            return plan(replace(message, index=index)) if index >= HANDSHAKE else None

        return of_frames

    def connected(
        self,
        source: ByteStore | None = None,
        target: ByteStore | None = None,
        plan: FaultPlan | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Clock | None = None,
        damage: Damage | None = None,
    ) -> AbstractContextManager[Pair]:
        wires = self.wires(plan, sleep)
        carriers = wires.carriers if damage is None else [DamagedCarrier(carrier, damage) for carrier in wires.carriers]
        return connected(source, target, wires.streams, clock=clock, carriers=carriers, listening_carriers=wires.carriers)


@dataclass(frozen=True)
class Wires:
    """One network, for tests that need more ends than a pair."""

    streams: Transport
    carriers: Sequence[Carrier]
    clock: Clock = field(default_factory=MonotonicClock)

    def receiver(self, store: ByteStore, on_event: OnReceiverEvent, incarnation: int = 1) -> KVReceiver:
        return KVReceiver(store, self.streams, SECRET, "model", incarnation, self.clock, on_event, self.carriers)

    def sender(self, store: ByteStore, on_event: OnSenderEvent, secret: bytes = SECRET, fingerprint: str = "model") -> KVSender:
        return KVSender(store, self.streams, secret, fingerprint, 2, self.clock, on_event, self.carriers)


WAYS = [
    Way("inproc"),
    Way("tcp", TcpTransport),
    Way("tcp-small-buffers", lambda: TcpTransport(buffer_bytes=1 << 16)),
    Way("beside-the-stream", carriers=lambda: [MemoryCarrier()]),
    Way("shm", TcpTransport, lambda: carriers_for("shm")),
    Way("gloo", TcpTransport, lambda: carriers_for("distributed"), slow=True, opening=1),
]
# What `transfer.transport` may force, between real processes.
TRANSPORTS = [name for name in get_args(TransferConfig.model_fields["transport"].annotation) if name != "auto"]

over_all_transports = pytest.mark.parametrize("transport", TRANSPORTS)
over_all_ways = pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
QUICK = [way for way in WAYS if not way.slow]
over_quick_ways = pytest.mark.parametrize("way", QUICK, ids=[way.name for way in QUICK])


# --- what the tests say often -----------------------------------------------------------------------------------------


def begin(pair: Pair, grant: int = 1, first: int = 0, stop: int = 12, lease_s: float = 30.0) -> SendSession:
    pair.receiver.open(Terms(grant, f"attempt-{grant}", first, stop, lease_s), [TARGET_BLOCKS])
    return pair.sender.begin(Terms(grant, f"attempt-{grant}", first, stop, lease_s), [pair.receiver.endpoint], [SOURCE_BLOCKS])


def push_all(session: SendSession, stop: int = 12) -> None:
    for layer in range(LAYERS):
        session.push(layer, 0, stop)


def settle(pair: Pair) -> None:
    """Wait until all that was pushed has left."""
    while pair.sender.sweep() is not None:
        time.sleep(0.001)


def assert_same(pair: Pair, first: int = 0, stop: int = 12) -> None:
    expected = sequence_bytes(pair.source, SOURCE_BLOCKS, first, stop)
    assert sequence_bytes(pair.target, TARGET_BLOCKS, first, stop) == expected
    assert untouched_outside(pair.target, TARGET_BLOCKS, first, stop)

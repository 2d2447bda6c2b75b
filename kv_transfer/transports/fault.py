"""A transport that misbehaves on purpose, as a plan says: for tests and failure drills of a whole cluster.

A fault applies to one message, which is one call of `Connection.send`: one handshake message, or the frames that leave together.
The plan is a function, so the same plan makes the same faults; waiting is injected too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.errors import TransferError
from kv_transfer.transport import Buffer, Connection, Listener, Transport


@dataclass(frozen=True)
class Drop:
    """The message never leaves."""


@dataclass(frozen=True)
class Delay:
    seconds: float


@dataclass(frozen=True)
class FlipBit:
    """`bit` counts from the message's first byte, modulo its size."""

    bit: int


@dataclass(frozen=True)
class Truncate:
    """The first `keep_bytes` bytes leave, then the connection closes."""

    keep_bytes: int


@dataclass(frozen=True)
class Duplicate:
    """The message leaves twice."""


@dataclass(frozen=True)
class Reorder:
    """The message leaves after the next one."""


@dataclass(frozen=True)
class Trickle:
    """The message leaves in pieces of `chunk_bytes`, with a pause after each."""

    chunk_bytes: int
    pause_s: float


Fault = Drop | Delay | FlipBit | Truncate | Duplicate | Reorder | Trickle


@dataclass(frozen=True)
class Message:
    """What a plan decides on: the `index`-th message of the `connection`-th connection of this transport (either from 0).
    `dialled` says that this side dialled, so that the message goes to the listener."""

    connection: int
    index: int
    size_bytes: int
    dialled: bool


FaultPlan = Callable[[Message], Fault | None]


class FaultTransport:
    """Wraps what `inner` connects and accepts. Faults are made on the sending side."""

    def __init__(self, inner: Transport, plan: FaultPlan, sleep: Callable[[float], None] = time.sleep) -> None:
        self._inner = inner
        self._plan = plan
        self._sleep = sleep
        self._lock = threading.Lock()
        self._made = 0

    def listen(self) -> FaultListener:
        return FaultListener(self._inner.listen(), self)

    def connect(self, endpoint: str) -> FaultConnection:
        return self.wrap(self._inner.connect(endpoint), dialled=True)

    def wrap(self, connection: Connection, dialled: bool) -> FaultConnection:
        with self._lock:
            number = self._made
            self._made += 1
        return FaultConnection(connection, number, dialled, self._plan, self._sleep)


class FaultListener:
    def __init__(self, inner: Listener, transport: FaultTransport) -> None:
        self._inner = inner
        self._transport = transport

    @property
    def endpoint(self) -> str:
        return self._inner.endpoint

    def accept(self) -> FaultConnection:
        return self._transport.wrap(self._inner.accept(), dialled=False)

    def close(self) -> None:
        self._inner.close()


class FaultConnection:
    def __init__(self, inner: Connection, number: int, dialled: bool, plan: FaultPlan, sleep: Callable[[float], None]) -> None:
        self._inner = inner
        self._number = number
        self._dialled = dialled
        self._plan = plan
        self._sleep = sleep
        self._lock = threading.Lock()
        self._sent = 0
        self._held: list[bytes] = []

    def send(self, parts: Sequence[Buffer], *, wait: bool = True) -> None:
        message = b"".join(parts)
        with self._lock:
            fault = self._plan(Message(self._number, self._sent, len(message), self._dialled))
            self._sent += 1
            if isinstance(fault, Reorder):
                self._held.append(message)
                return
            self._misbehave(message, fault, wait)
            held, self._held = self._held, []
            for late in held:
                self._inner.send([late], wait=wait)

    def recv_into(self, view: memoryview) -> None:
        self._inner.recv_into(view)

    def close(self) -> None:
        self._inner.close()

    def _misbehave(self, message: bytes, fault: Fault | None, wait: bool) -> None:
        match fault:
            case Drop():
                return
            case Truncate(keep_bytes):
                self._inner.send([message[:keep_bytes]], wait=wait)
                self._inner.close()
                raise TransferError("cut short by plan")
            case Trickle(chunk_bytes, pause_s):
                for at in range(0, len(message), chunk_bytes):
                    self._inner.send([message[at : at + chunk_bytes]], wait=wait)
                    self._sleep(pause_s)
                return
            case FlipBit(bit):
                flipped = bytearray(message)
                flipped[bit // 8 % len(message)] ^= 1 << bit % 8
                self._inner.send([bytes(flipped)], wait=wait)
                return
            case Delay(seconds):
                self._sleep(seconds)
            case Duplicate():
                self._inner.send([message], wait=wait)
        self._inner.send([message], wait=wait)

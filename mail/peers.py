"""The sending side: one ZeroMQ PUSH socket per mailbox that a thread sends to.

Invariants:
- Sending never blocks and never raises for what a peer can cause: a peer that does not read has a bounded queue, then loses
  messages, and the sender is told.
- There are never more than `most` sockets. Peers come and go, and nobody says so when one has gone: whoever was not sent
  anything for `idle_s` is forgotten, and where all are in use, the least recently used makes room. One that is sent to again
  is connected to again.

A message to a peer that is forgotten while it still waits in the queue is lost, as one on a broken connection is; who sends
learns it, if at all, from the words of the protocol above (`Keep`, `Renew`). Not thread-safe: each thread has its own.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import zmq

from core.clock import Clock, MonotonicClock
from core.messages import Message
from core.wire import MAX_MESSAGE_BYTES, encode
from mail.door import Door
from mail.mailbox import QUEUED_MESSAGES

MOST_SOCKETS = 512
"""Well above the members of a cluster, well below the file descriptors of a process (a socket takes two)."""
IDLE_S = 60.0
LONGEST_REDIAL_MS = 2000


class MessageSender(Protocol):
    """What `Peers` is to those who send: a test may put something less reliable in its place (`mail.faults`)."""

    @property
    def lost(self) -> int: ...

    def send(self, endpoint: str, message: Message) -> bool: ...

    def forget(self, endpoint: str) -> None: ...

    def close(self, linger_s: float = 0.5) -> None: ...


@dataclass(slots=True)
class _Link:
    socket: zmq.Socket[bytes]
    used_s: float


class Peers:
    """Sends messages to mailboxes, connecting on first use. `lost` counts those that `send` answered with False."""

    def __init__(self, door: Door, clock: Clock | None = None, most: int = MOST_SOCKETS, idle_s: float = IDLE_S) -> None:
        self._door = door
        self._clock = clock or MonotonicClock()
        self._most = most
        self._idle_s = idle_s
        self._links: OrderedDict[str, _Link] = OrderedDict()  # the least recently used first
        self._lost = 0

    @property
    def lost(self) -> int:
        return self._lost

    @property
    def open(self) -> int:
        """Sockets held now."""
        return len(self._links)

    def send(self, endpoint: str, message: Message) -> bool:
        """Queue a message; False when it cannot be: the peer's queue is full, the endpoint is not one, the message is larger
        than a mailbox takes, or the process is out of sockets. Never blocks."""
        now_s = self._clock.now()
        self._forget_idle(now_s)
        sent = self._send(endpoint, encode(message), now_s)
        self._lost += not sent
        return sent

    def forget(self, endpoint: str) -> None:
        """Close the connection and drop what it had queued."""
        link = self._links.pop(endpoint, None)
        if link is not None:
            link.socket.close(linger=0)

    def close(self, linger_s: float = 0.5) -> None:
        """Close all connections, giving queued messages up to `linger_s` to leave."""
        for link in self._links.values():
            link.socket.close(linger=round(linger_s * 1000))
        self._links.clear()

    def _send(self, endpoint: str, data: bytes, now_s: float) -> bool:
        if len(data) > MAX_MESSAGE_BYTES:
            return False
        try:
            link = self._links.get(endpoint) or self._connect(endpoint, now_s)
            if link is None:
                return False
            link.socket.send(data, zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return False
        except zmq.ZMQError:  # out of descriptors, or a socket that is none any more: the next message gets a new one
            self.forget(endpoint)
            return False
        link.used_s = now_s
        self._links.move_to_end(endpoint)
        return True

    def _forget_idle(self, now_s: float) -> None:
        while self._links:
            endpoint, link = next(iter(self._links.items()))
            if now_s - link.used_s < self._idle_s:
                return
            self.forget(endpoint)

    def _connect(self, endpoint: str, now_s: float) -> _Link | None:
        """None when the endpoint is not one. Raises ZMQError when there is no socket to be had."""
        if not endpoint.startswith("tcp://"):
            return None
        while len(self._links) >= self._most:
            self.forget(next(iter(self._links)))
        try:
            socket = self._door.context.socket(zmq.PUSH)
        except zmq.ZMQError:
            if self._links:  # others of this process hold the rest: make room for the next message at least
                self.forget(next(iter(self._links)))
            raise
        keys = self._door.keys
        socket.curve_serverkey = keys.public.encode()
        socket.curve_publickey = keys.public.encode()
        socket.curve_secretkey = keys.secret.encode()
        socket.set(zmq.SNDHWM, QUEUED_MESSAGES)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.IPV6, 1)
        socket.set(zmq.HEARTBEAT_IVL, 2000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 6000)
        socket.set(zmq.RECONNECT_IVL_MAX, LONGEST_REDIAL_MS)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError:
            socket.close()
            return None
        link = self._links[endpoint] = _Link(socket, now_s)
        return link
